"""Mels in files: NumPy's, torch's, HDF5 and Kaldi's, none of whose content is executed."""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch

from wavear.audio.waveforms import as_tensor
from wavear.common.atomic import replace_file
from wavear.common.errors import WavearError, one_line
from wavear.common.log import get_logger
from wavear.common.untrusted import parse_json
from wavear.mel import kaldi
from wavear.mel.conventions import Frames, describe_source
from wavear.mel.detection import ConditionedModel, Expectation, adapt_mel
from wavear.mel.features import FeatureConfig
from wavear.mel.spectrogram import MelConfig
from wavear.mel.torch_files import load_tensors

logger = get_logger(__name__)

LARGEST_ARRAY = 2**30  # bytes in a compressed file: 10 hours of 80 bands at 86 frames per second
_HDF5 = (".h5", ".hdf5")
MEL_SUFFIXES = (".npy", ".npz", ".pt", ".safetensors", *_HDF5)
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def read_mel(
    path: str | Path,
    config: Frames,
    *,
    model: ConditionedModel | None = None,
    source: MelConfig | str | None = None,
    seconds: float | None = None,
    force: bool = False,
) -> torch.Tensor:
    """Read a mel (M, F), float32, from a file and adapt it to the mels that a model was trained on.

    The training data of `model` judge a mel of unknown configuration; `source`, `seconds` and
    `force` are those of `wavear.adapt_mel`, and a `config` in the file overrides `source`.
    Features, where `config` is a `FeatureConfig`, are checked by their shape and type.
    """
    mel, own = load_mel(path, config)
    if isinstance(config, FeatureConfig):
        return mel
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


def load_mel(path: str | Path, config: Frames) -> tuple[torch.Tensor, MelConfig | None]:
    """Return the mel (M, F) of a file, float32 and finite, and its own configuration, if any.

    The file holds a tensor (M, F) or (1, M, F), floating point: `.npy`; `.npz`, named `mel` or the
    only one, and perhaps `config`, the JSON of a `MelConfig`; `.pt`, a tensor or a dict with `mel`,
    read by torch's loader for weights, which runs no code; `.safetensors` or HDF5, named `mel` or
    the only one. An entry of a Kaldi archive, `feats.ark:OFFSET`, has frames first. The expected
    `config` is for messages; with a `FeatureConfig` the file holds what its `values` takes.
    """
    path = Path(path)
    mel, described = _read(path)
    if isinstance(config, FeatureConfig):
        mel, described = config.values(mel, str(path)), None
    shape = tuple(mel.shape)
    mel = mel[0] if mel.dim() == 3 and shape[0] == 1 else mel
    if mel.dim() != 2:
        raise WavearError(
            f"{path}: the mel has shape {shape}, expected ({config.bands} bands, frames)"
        )
    if mel.dtype not in _FLOATS or mel.layout is not torch.strided:
        raise WavearError(f"{path}: the mel is {mel.dtype}, expected floating point")
    if mel.shape[1] == 0:
        raise WavearError(f"{path}: the mel has no frames")
    mel = mel.detach().float()
    if not bool(torch.isfinite(mel).all()):
        frame = int((~torch.isfinite(mel)).any(dim=0).nonzero()[0])
        raise WavearError(f"{path}: the mel holds NaN or infinity, first in frame {frame}")
    return mel, None if described is None else _config_of(described, path)


def features_in(path: Path, sample_rate: int, hop_length: int, classes: int) -> FeatureConfig:
    """Return the settings of the features in a file, with its number of channels."""
    given, _ = _read(path)
    channels = 1 if given.dim() == 1 else len(given)
    config = FeatureConfig(
        sample_rate=sample_rate, hop_length=hop_length, channels=channels, classes=classes
    )
    config.values(given, str(path))
    return config


def _read(path: Path) -> tuple[torch.Tensor, Any]:
    """Return the tensor of a file, and the text or fields of its configuration, if any."""
    suffix = path.suffix.lower()
    if (entry := kaldi.split_entry(path)) is not None:
        return _to_tensor(kaldi.read_matrix(*entry).T), None
    if suffix not in MEL_SUFFIXES:
        raise WavearError(f"{path} is not a mel file by its name: expected {listed(MEL_SUFFIXES)}")
    if path.stat().st_size == 0:
        raise WavearError(f"{path} is empty (0 bytes)")
    if suffix == ".npy":
        return _read_npy(path), None
    if suffix == ".npz":
        return _read_npz(path)
    if suffix == ".pt":
        return _read_pt(path)
    if suffix in _HDF5:
        return _read_hdf5(path), None
    return _read_safetensors(path)


def is_mel(path: Path) -> bool:
    """Return True for the name of a mel file, or of an entry of a Kaldi archive."""
    return path.suffix.lower() in MEL_SUFFIXES or kaldi.split_entry(path) is not None


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


def _read_npy(path: Path) -> torch.Tensor:
    try:
        return _to_tensor(array_of(path.read_bytes()))
    except (ValueError, EOFError, OverflowError) as error:
        raise WavearError(f"{path} is damaged or not a NumPy array: {one_line(error)}") from None


def _read_npz(path: Path) -> tuple[torch.Tensor, Any]:
    if not zipfile.is_zipfile(path):  # np.load would try to unpickle it
        raise WavearError(f"{path} is damaged or not an .npz archive")
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {name.removesuffix(".npy"): name for name in archive.namelist()}
            name = _only("mel", [name for name in arrays if name != "config"])
            described = "config" in arrays and str(_member(archive, arrays["config"]))
            return _to_tensor(_member(archive, arrays[name])), described or None
    except (
        ValueError,
        EOFError,
        OverflowError,
        MemoryError,
        NotImplementedError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise WavearError(f"{path} is damaged or not a mel: {one_line(error)}") from None


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Return an array of an .npz archive: its header and its size have to agree, and be limited."""
    size = archive.getinfo(name).file_size
    if size > LARGEST_ARRAY:
        raise WavearError(f"{name} has {size} bytes, expected at most {LARGEST_ARRAY}")
    with archive.open(name) as file:
        return array_of(file.read())


def array_of(data: bytes) -> np.ndarray:
    """Return the array of a .npy file in memory, which it shares.

    Raises
    ------
    ValueError
        If it is damaged, holds objects, or its header promises another size.
    """
    file = io.BytesIO(data)
    if data[:6] != b"\x93NUMPY":
        raise WavearError("it does not begin like a NumPy array")
    try:
        form = np.lib.format
        first = form.read_magic(file) == (1, 0)
        read = form.read_array_header_1_0 if first else form.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except (SyntaxError, TypeError, KeyError, RecursionError, MemoryError, TokenError) as error:
        raise WavearError(f"its header is damaged: {one_line(error)}") from None
    if dtype.hasobject:
        raise WavearError("it holds objects, not numbers")
    count = math.prod(shape)
    if count < 0 or count * dtype.itemsize != len(data) - file.tell():
        raise WavearError(
            f"its header promises {shape} of {dtype}, and {len(data) - file.tell()} bytes follow"
        )
    array = np.frombuffer(data, dtype, count, file.tell())
    return array.reshape(shape, order="F" if fortran else "C")


def _read_pt(path: Path) -> tuple[torch.Tensor, Any]:
    try:
        loaded = load_tensors(path)
    except WavearError as error:
        raise WavearError(
            f"{path} is damaged or not a tensor that loads without running code: {error}"
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


def _read_hdf5(path: Path) -> torch.Tensor:
    """Read a dataset of the file's first level; links to other files are not followed."""
    try:
        import h5py  # type: ignore[import-not-found]
    except ImportError:
        raise WavearError(f"{path} needs the package h5py: pip install h5py") from None
    try:
        with h5py.File(path, "r") as file:
            links = {name: file.get(name, getlink=True) for name in file}
            own = [name for name, link in links.items() if isinstance(link, h5py.HardLink)]
            data = file[_only("mel", [n for n in own if isinstance(file[n], h5py.Dataset)])]
            if data.external or data.is_virtual:
                raise WavearError("its data lie in other files, which are not followed")
            if data.dtype.kind not in "fiu" or data.nbytes > LARGEST_ARRAY:
                raise WavearError(
                    f"it holds {data.nbytes} bytes of {data.dtype}, expected numbers, at most"
                    f" {LARGEST_ARRAY} bytes"
                )
            return _to_tensor(data[()])
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise WavearError(f"{path} is damaged or not a mel: {one_line(error)}") from None


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
            parse_json(described) if isinstance(described, str) else described
        )
    except ValueError as error:
        raise WavearError(
            f"{path}: 'config' is not a mel configuration: {one_line(error)}"
        ) from None
