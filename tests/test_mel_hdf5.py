"""Mels in HDF5 files, where h5py is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from wavear import MelConfig
from wavear.mel import mel_files
from wavear.mel.mel_files import read_mel

MEL = np.random.default_rng(0).normal(-5, 1, (80, 7)).astype(np.float32)


def test_without_the_package_one_line_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "x.h5").write_bytes(b"HDF")
    with pytest.raises(ValueError, match=r"x\.h5 needs the package h5py: pip install h5py$"):
        read_mel(tmp_path / "x.h5", MelConfig())


def test_the_only_dataset_is_read_and_others_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    path, linked, outside = (tmp_path / f"{name}.h5" for name in ("x", "linked", "outside"))
    with h5py.File(path, "w") as file:
        file["feats"] = MEL
    assert np.array_equal(read_mel(path, MelConfig()).numpy(), MEL)
    with h5py.File(linked, "w") as file:
        file["mel"] = h5py.ExternalLink("x.h5", "/feats")
    with pytest.raises(ValueError, match="it holds nothing, expected an array named 'mel'"):
        read_mel(linked, MelConfig())
    MEL.tofile(tmp_path / "raw")
    with h5py.File(outside, "w") as file:
        file.create_dataset("mel", MEL.shape, "f4", external=[(tmp_path / "raw", 0, MEL.nbytes)])
    with pytest.raises(ValueError, match="its data lie in other files"):
        read_mel(outside, MelConfig())
    monkeypatch.setattr(mel_files, "LARGEST_ARRAY", MEL.nbytes - 1)
    with pytest.raises(ValueError, match="2240 bytes of float32, expected numbers, at most 2239"):
        read_mel(path, MelConfig())
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"x\.h5 is damaged or not a mel"):
        read_mel(path, MelConfig())
