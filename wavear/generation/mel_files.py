"""Mels in files: .npy, .npz, .pt and .safetensors, none of whose content is executed."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from wavear.audio.waveforms import as_tensor
from wavear.common.atomic import replace_file
from wavear.common.errors import WavearError
from wavear.common.log import get_logger
from wavear.mel.detection import Expectation, adapt_mel, describe_source
from wavear.mel.spectrogram import MelConfig
from wavear.models.base import AutoregressiveModel

logger = get_logger(__name__)

MEL_SUFFIXES = (".npy", ".npz", ".pt", ".safetensors")


def read_mel(
    path: str | Path,
    config: MelConfig,
    *,
    model: AutoregressiveModel | None = None,
    source: MelConfig | str | None = None,
    seconds: float | None = None,
    force: bool = False,
) -> torch.Tensor:
    """Read a mel (M, F), float32, from a file and adapt it to the mels that a model was trained on.

    The file holds a tensor (M, F) or (1, M, F), floating point: `.npy`; `.npz`, named `mel` or the
    only one, and perhaps `config`, the JSON of a `MelConfig`; `.pt`, a tensor or a dict with `mel`,
    read by torch's loader for weights, which runs no code; `.safetensors`, named `mel` or the only
    one. The training data of `model` judge a mel of unknown configuration; `source`, `seconds` and
    `force` are those of `wavear.adapt_mel`, and a `config` in the file overrides `source`.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in MEL_SUFFIXES:
        raise WavearError(f"{path} is not a mel file by its name: expected {listed(MEL_SUFFIXES)}")
    if path.stat().st_size == 0:
        raise WavearError(f"{path} is empty (0 bytes)")
    if suffix == ".npy":
        mel, described = _read_npy(path), None
    elif suffix == ".npz":
        mel, described = _read_npz(path)
    elif suffix == ".pt":
        mel, described = _read_pt(path)
    else:
        mel, described = _read_safetensors(path)
    shape = tuple(mel.shape)
    mel = mel[0] if mel.dim() == 3 and shape[0] == 1 else mel
    if mel.dim() != 2:
        raise WavearError(
            f"{path}: the mel has shape {shape}, expected ({config.bands} bands, frames)"
        )
    if not mel.is_floating_point():
        raise WavearError(f"{path}: the mel is {mel.dtype}, expected floating point")
    if mel.shape[1] == 0:
        raise WavearError(f"{path}: the mel has no frames")
    mel = mel.float()
    if not bool(torch.isfinite(mel).all()):
        frame = int((~torch.isfinite(mel)).any(dim=0).nonzero()[0])
        raise WavearError(f"{path}: the mel holds NaN or infinity, first in frame {frame}")
    own = None if described is None else _config_of(described, path)
    if own is not None and source is not None and describe_source(source, config) != own:
        logger.warning("%s: its own mel configuration overrides the one given", path)
    try:
        return adapt_mel(
            mel,
            model or Expectation(config),
            own or source,
            seconds=seconds,
            force=force,
            warn=lambda line: logger.warning("%s: %s", path, line),
        )
    except ValueError as error:
        raise WavearError(f"{path}: {error}") from None


def write_mel(path: Path, mel: torch.Tensor, config: MelConfig) -> None:
    """Write a mel (M, F) whole or not at all: `.npz` with `mel` and `config`, or plain `.npy`."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # given a name, NumPy would add an ending to it
            if path.suffix == ".npy":
                np.save(file, mel.numpy())
            else:
                np.savez(file, mel=mel.numpy(), config=np.array(json.dumps(config.to_dict())))

    try:
        replace_file(path, write)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error


def listed(suffixes: Sequence[str]) -> str:
    """Return suffixes as an enumeration.

    Examples
    --------
    >>> listed([".a", ".b", ".c"])
    '.a, .b or .c'
    """
    return ", ".join(suffixes[:-1]) + f" or {suffixes[-1]}"


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line; of an `OSError`, the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _read_npy(path: Path) -> torch.Tensor:
    try:
        with open(path, "rb") as file:
            _require_magic(file)
        # Mapped, so that a header that promises too much is refused before memory is allocated.
        return _to_tensor(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, EOFError, OverflowError) as error:
        raise WavearError(f"{path} is damaged or not a NumPy array: {one_line(error)}") from None


def _require_magic(file: BinaryIO) -> None:
    if file.read(6) != b"\x93NUMPY":  # np.load would try to unpickle it
        raise WavearError("it does not begin like a NumPy array")


def _read_npz(path: Path) -> tuple[torch.Tensor, Any]:
    if not zipfile.is_zipfile(path):  # np.load would try to unpickle it
        raise WavearError(f"{path} is damaged or not an .npz archive")
    try:
        with np.load(path, allow_pickle=False) as archive:
            name = _only("mel", [name for name in archive.files if name != "config"])
            described = str(archive["config"]) if "config" in archive.files else None
            return _to_tensor(archive[name]), described
    except (
        ValueError,
        EOFError,
        OverflowError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise WavearError(f"{path} is damaged or not a mel: {one_line(error)}") from None


def _read_pt(path: Path) -> tuple[torch.Tensor, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the loader raises whatever the first damaged byte leads to
        reason = one_line(error).split(". ")[0][:200]
        raise WavearError(
            f"{path} is damaged or not a tensor that loads without running code: {reason}"
        ) from None
    described = None
    if isinstance(loaded, dict):
        described = loaded.get("config")
        tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
        try:
            loaded = tensors[_only("mel", list(tensors))]
        except WavearError as error:
            raise WavearError(f"{path}: {error}") from None
    if not isinstance(loaded, torch.Tensor):
        raise WavearError(
            f"{path} holds a {type(loaded).__name__}, expected a tensor or a dict with 'mel'"
        )
    return as_tensor(loaded, str(path)), described


def _read_safetensors(path: Path) -> tuple[torch.Tensor, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            name = _only("mel", list(file.keys()))
            return file.get_tensor(name), (file.metadata() or {}).get("config")
    except (SafetensorError, WavearError) as error:
        raise WavearError(
            f"{path} is damaged or not a safetensors file of a mel: {one_line(error)}"
        ) from None


def _only(name: str, names: list[str]) -> str:
    if name in names:
        return name
    if len(names) == 1:
        return names[0]
    found = ", ".join(map(repr, names)) or "nothing"
    raise WavearError(f"it holds {found}, expected an array named {name!r}")


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind not in "fiu":
        raise WavearError(f"it holds {array.dtype}, not numbers")
    kind = np.float32 if array.dtype.kind == "f" else np.int64
    return torch.from_numpy(np.array(array, dtype=kind))


def _config_of(described: Any, path: Path) -> MelConfig:
    try:
        return MelConfig.from_dict(
            json.loads(described) if isinstance(described, str) else described
        )
    except ValueError as error:
        raise WavearError(
            f"{path}: 'config' is not a mel configuration: {one_line(error)}"
        ) from None
