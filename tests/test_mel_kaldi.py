"""Mels in Kaldi's archives and lists: read without kaldiio, which runs commands and unpickles."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from wavear import MelConfig, WavearError
from wavear.generation.jobs import plan
from wavear.mel import kaldi
from wavear.mel.mel_files import is_mel, read_mel

FRAMES = np.random.default_rng(0).normal(-5, 1, (7, 80))


def matrix(values: np.ndarray, kind: bytes = b"FM") -> bytes:
    data = values.astype("<f4" if kind == b"FM" else "<f8").tobytes()
    return (
        b"\0B" + kind + b" " + struct.pack("<bibi", 4, values.shape[0], 4, values.shape[1]) + data
    )


def archive(path: Path, **entries: bytes) -> dict[str, int]:
    offsets, content = {}, b""
    for name, data in entries.items():
        content += name.encode() + b" "
        offsets[name] = len(content)
        content += data
    path.write_bytes(content)
    return offsets


@pytest.mark.parametrize("kind", [b"FM", b"DM"])
def test_entries_of_archives_and_lists_are_read(tmp_path: Path, kind: bytes):
    other = FRAMES[:3] - 1
    at = archive(tmp_path / "feats.ark", a=matrix(FRAMES, kind), b=matrix(other, kind))
    # As after a move: the list has a path that is not here.
    (tmp_path / "feats.scp").write_text(f"a /exp/feats.ark:{at['a']}\nb\texp/feats.ark:{at['b']}\n")
    for name in ("feats.ark", "feats.scp"):
        found = kaldi.entries(tmp_path / name)
        assert found == {n: tmp_path / f"feats.ark:{at[n]}" for n in "ab"}
    for name, expected in {"a": FRAMES, "b": other}.items():
        assert is_mel(found[name])
        mel = read_mel(found[name], MelConfig())
        assert np.array_equal(mel.numpy(), expected.T.astype(np.float32))


def test_compressed_matrices_equal_the_formula(tmp_path: Path):
    """The formats of Kaldi's compressed-matrix.h, computed value by value."""
    low, span, rows, columns = -11.0, 13.0, 5, 80
    random = np.random.default_rng(0)
    head = struct.pack("<ffii", low, span, rows, columns)
    words = random.integers(0, 65536, (rows, columns)).astype("<u2")
    octets = random.integers(0, 256, (rows, columns)).astype("u1")
    octets[:, 0] = [0, 64, 65, 192, 255]
    knots = np.sort(random.integers(0, 65536, (columns, 4)), 1).astype("<u2")
    at = archive(
        tmp_path / "x.ark",
        one=b"\0BCM " + head + knots.tobytes() + octets.T.tobytes(),
        two=b"\0BCM2 " + head + words.tobytes(),
        three=b"\0BCM3 " + head + octets.tobytes(),
    )

    def value(v: int, k: np.ndarray) -> float:
        p0, p25, p75, p100 = (low + span * int(each) / 65535 for each in k)
        if v <= 64:
            return p0 + (p25 - p0) * v / 64
        if v <= 192:
            return p25 + (p75 - p25) * (v - 64) / 128
        return p75 + (p100 - p75) * (v - 192) / 63

    expected = {
        "one": [[value(int(octets[r, c]), knots[c]) for c in range(80)] for r in range(rows)],
        "two": low + span * words / 65535,
        "three": low + span * octets / 255,
    }
    assert [*kaldi.entries(tmp_path / "x.ark")] == [*at]
    for name, values in expected.items():
        found = kaldi.read_matrix(tmp_path / "x.ark", at[name])
        np.testing.assert_allclose(found, np.asarray(values), atol=1e-5)


@pytest.mark.parametrize("method", [None, 1, 2, 3, 5])
def test_archives_of_kaldiio_are_read_as_by_kaldiio(tmp_path: Path, method: int | None):
    kaldiio = pytest.importorskip("kaldiio", reason="needs kaldiio, as the oracle")
    scp = str(tmp_path / "x.scp")
    mels = {"a": FRAMES.astype(np.float32), "b": FRAMES[:4].astype(np.float32)}
    kaldiio.save_ark(str(tmp_path / "x.ark"), mels, scp=scp, compression_method=method)
    for name, expected in kaldiio.load_scp(scp).items():
        entry = kaldi.entries(Path(scp))[name]
        found = read_mel(entry, MelConfig(), source=MelConfig())
        np.testing.assert_allclose(found.numpy(), expected.T, atol=1e-6)


@pytest.mark.parametrize(
    "place",
    [
        "touch ran; cat feats.ark |",
        "cat feats.ark:2 |",
        "| cat",
        "touch ran|feats.ark:2",
        "feats.ark",
        "feats.ark:2[0:3]",
        "-",
        "feats.npy:2",
        "",
    ],
)
def test_anything_but_a_path_and_an_offset_is_refused(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    archive(tmp_path / "feats.ark", a=matrix(FRAMES))
    Path("feats.scp").write_text(f"a {place}\n")
    with pytest.raises(WavearError, match=r"feats\.scp:1: .*(expected PATH\.ark|is not below)"):
        kaldi.entries(Path("feats.scp"))
    assert not Path("ran").exists()


def test_archives_elsewhere_are_not_followed(tmp_path: Path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "other").mkdir()
    archive(tmp_path / "other" / "feats.ark", a=matrix(FRAMES))
    scp = tmp_path / "lists" / "feats.scp"
    for place in (f"{tmp_path}/other/feats.ark:2", "../other/feats.ark:2"):
        scp.write_text(f"a {place}\n")
        with pytest.raises(WavearError, match=r"other/feats\.ark is not below .*lists: move it"):
            kaldi.entries(scp)
    (tmp_path / "lists" / "feats.ark").symlink_to(tmp_path / "other" / "feats.ark")
    with pytest.raises(WavearError, match="is not below"):
        kaldi.entries(scp)


class Payload:
    def __reduce__(self) -> tuple:
        return (Path("ran").touch, ())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a PKL" + pickle.dumps(Payload()), "something else than binary matrices"),
        (b"a  [ 1 2\n 3 4 ]\n", "something else than binary matrices"),
        (b"a " + matrix(FRAMES)[:-1], r"a matrix of 7 by 80 \(2240 bytes\), and 2239 follow"),
        (b"a " + b"\0BFM " + struct.pack("<bibi", 4, 2**30, 4, 2**30), "is damaged: a matrix of"),
        (b"a " + b"\0BFM " + struct.pack("<bibi", 4, -1, 4, -1), "is damaged: a matrix of"),
        (b"a " + b"\0BCM ", "a matrix without a size"),
        (b"../a " + matrix(FRAMES), "the name '../a' cannot be that of a file"),
        (b"a " + matrix(FRAMES) + b"a " + matrix(FRAMES), "holds 'a' twice"),
        (b"x" * 3000, "damaged or not an archive"),
        (b"", "holds no matrices"),
    ],
)
def test_damaged_and_foreign_archives_are_one_line(tmp_path, monkeypatch, content, reason):
    monkeypatch.chdir(tmp_path)
    Path("x.ark").write_bytes(content)
    with pytest.raises(WavearError, match=reason):
        kaldi.entries(Path("x.ark"))
    if content.startswith(b"a ") and "twice" not in reason:
        with pytest.raises(WavearError, match=reason):
            read_mel(Path("x.ark:2"), MelConfig())
    assert not Path("ran").exists()


def test_each_entry_becomes_a_file_of_its_name(tmp_path: Path):
    archive(tmp_path / "feats.ark", **{"utt.1": matrix(FRAMES), "utt.2": matrix(FRAMES)})
    for out, made in ((tmp_path / "out", ""), (None, "-synthesized")):
        jobs = plan([tmp_path / "feats.ark"], out, ".wav", ending="-seed0")
        assert [job.target.name for job in jobs] == [f"utt.{n}-seed0{made}.wav" for n in "12"]
        assert {job.target.parent for job in jobs} == {out or tmp_path}
    with pytest.raises(WavearError, match="is not an audio file by its name"):
        plan([tmp_path / "feats.ark"], tmp_path / "out", ".npz", mels=False)


def test_names_with_dots_keep_them(tmp_path: Path):
    (tmp_path / "a.b.wav").touch()
    targets = [
        plan([tmp_path / "a.b.wav"], out, ".flac", ending=end)[0].target.name
        for out, end in ((None, ""), (tmp_path / "out", "-seed1"), (tmp_path / "out", ""))
    ]
    assert targets == ["a.b-synthesized.flac", "a.b-seed1.flac", "a.b.flac"]
