"""Read tensors that `torch.save` wrote, once it is clear how much memory they take."""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from wavear.common.errors import WavearError

# What the pickle of a tensor, or of a dict of tensors and numbers, refers to. The loader allows
# more, such as `bytearray`, which takes as much memory as the file asks for.
_GLOBALS = re.compile(
    r"torch \w+Storage|torch (Size|device|b?float\d+|u?int\d+)|collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
)
_LEGACY_PICKLES = 5  # magic number, protocol, system, the object, keys of storages


def load_tensors(path: Path) -> Any:
    """Return the tensor, or the dict, of a `.pt` file, by torch's loader that runs no code.

    Raises
    ------
    WavearError
        If it is damaged, holds other objects, or would take more memory than the file is large; the
        message does not name the file.
    """
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > size:
                    raise WavearError("it is compressed, or promises more than it holds")
                pickles = [n for n in archive.namelist() if n.endswith(".pkl")]
                for name in pickles:
                    _check_globals(archive.open(name))
            _check_sizes(torch.load(path, map_location="meta", weights_only=True), size)
        else:
            with open(path, "rb") as file:
                numbers = sum(_check_globals(file) for _ in range(_LEGACY_PICKLES))
            if numbers > max(8 * size, 2**20):
                raise WavearError("its tensors are larger than the file")
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except WavearError:
        raise
    except Exception:  # the loader raises whatever the first damaged byte leads to
        raise WavearError("it is not a file of PyTorch (.pt, .pth), or is damaged") from None
    _check_sizes(loaded, size)
    return loaded


def _check_globals(pickle: Any) -> int:
    """Refuse a pickle that refers to anything but tensors; return the sum of its whole numbers."""
    total = 0
    for operation, argument, _ in pickletools.genops(pickle):
        if operation.name == "STACK_GLOBAL" or (
            operation.name in ("GLOBAL", "INST") and not _GLOBALS.fullmatch(str(argument))
        ):
            raise WavearError(f"it holds {argument or 'objects'}, expected tensors")
        if isinstance(argument, int) and "PUT" not in operation.name:
            total += abs(argument) if argument != torch.serialization.MAGIC_NUMBER else 0
    return total


def _check_sizes(loaded: Any, size: int) -> None:
    """Refuse tensors larger than their file: `expand` repeats numbers without storing them."""
    for tensor in loaded.values() if isinstance(loaded, dict) else [loaded]:
        if not isinstance(tensor, torch.Tensor):
            continue
        claimed = tensor.numel() * tensor.element_size()
        if max(claimed, tensor.untyped_storage().nbytes()) > size:
            raise WavearError(
                f"its tensor of shape {tuple(tensor.shape)} is larger than the file ({size} bytes):"
                " save a copy (tensor.contiguous().clone())"
            )
