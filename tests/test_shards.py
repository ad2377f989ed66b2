"""Tar shards: compatible with webdataset, and a run on them equals the run on their files."""

from __future__ import annotations

import gc
import io
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from small_training import config_of

import wavear
from wavear import MelConfig, WaveNet, WaveNetConfig, audio
from wavear.cli import commands
from wavear.data import shards
from wavear.data.corpus import open_corpus
from wavear.data.crops import Layout, Segments, read_span
from wavear.models.crop_loss import layout_of
from wavear.training.state import state_paths

RATE = 8000


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WAVEAR_CACHE", str(tmp_path / "cache"))


def noise(samples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    """Write ten files of two speakers, WAV and FLAC, one with a dot in its name."""
    for number in range(10):
        name = f"speaker{number % 2}/{number:02}" + (".flac" if number % 3 else ".take.wav")
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        audio.write(tmp_path / "data" / name, noise(2000 + 300 * number, number), RATE)
    return tmp_path / "data"


@pytest.fixture
def made(folder, tmp_path):
    """Write these files to shards."""
    return shards.write_shards(folder, tmp_path / "shards", megabytes=0.02, speakers=True)


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def wav(samples: int, seed: int, tmp_path: Path) -> bytes:
    audio.write(tmp_path / "made.wav", noise(samples, seed), RATE)
    return (tmp_path / "made.wav").read_bytes()


def layout() -> Layout:
    mel = MelConfig(
        sample_rate=RATE, n_fft=256, window_length=256, hop_length=64, bands=8, fmax=4000
    )
    config = WaveNetConfig(
        layers=4,
        stacks=2,
        residual_channels=6,
        skip_channels=6,
        head_channels=8,
        classes=32,
        sample_rate=RATE,
        mel=mel,
    )
    return layout_of(WaveNet(config), 512)


def test_shards_contain_the_files_byte_for_byte(folder, made, tmp_path):
    assert [path.name for path in made.shards] == [
        f"shard-{n:06}.tar" for n in range(len(made.shards))
    ]
    assert len(made.shards) >= 2
    assert (made.files, made.failed) == (10, [])
    found = {}
    for path in made.shards:
        with tarfile.open(path) as archive:
            for entry in archive:
                found[entry.name] = archive.extractfile(entry).read()  # type: ignore[union-attr]
    for path in folder.rglob("*.*"):
        key = path.relative_to(folder).as_posix().replace(".take", "_take")
        assert found.pop(key) == path.read_bytes()
        assert json.loads(found.pop(key.rpartition(".")[0] + ".json")) == {
            "speaker": path.parent.name
        }
    assert found == {}
    again = shards.write_shards(folder, tmp_path / "again", megabytes=0.02, speakers=True)
    assert [a.read_bytes() for a in again.shards] == [b.read_bytes() for b in made.shards]


def test_webdataset_reads_our_shards(made):
    wds = pytest.importorskip("webdataset", reason="the extra webdataset is not installed")
    names = [str(path) for path in made.shards]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = list(wds.WebDataset(names, shardshuffle=False, empty_check=False))
        gc.collect()  # webdataset leaves its files open
    assert len(samples) == 10
    corpus = open_corpus(str(made.shards[0].parent / "*.tar"), sample_rate=RATE, speakers=True)
    by_key = {
        r.name.split(".tar/")[1].rpartition(".")[0]: r for r in corpus.train + corpus.validation
    }
    assert by_key.keys() == {sample["__key__"] for sample in samples}
    for sample in samples:
        recording = by_key[sample["__key__"]]
        content = next(sample[ending] for ending in ("wav", "flac") if ending in sample)
        assert isinstance(recording.path, audio.Member)
        with open(recording.path.archive, "rb") as file:
            file.seek(recording.path.offset)
            assert file.read(recording.path.size) == content
        assert recording.speaker == json.loads(sample["json"])["speaker"]


def test_shards_of_webdataset_are_read(tmp_path):
    wds = pytest.importorskip("webdataset", reason="the extra webdataset is not installed")
    with wds.ShardWriter(str(tmp_path / "w-%03d.tar"), maxcount=2, verbose=0) as writer:
        for number in range(5):
            sample = {
                "__key__": f"a/{number}",
                "wav": wav(1000 + number, number, tmp_path),
                "txt": "said",
            }
            writer.write(
                sample
                | {"json": {"speaker": number % 2} | ({"split": "dev"} if number > 2 else {})}
            )
    corpus = open_corpus(tmp_path / "w-{000..002}.tar", sample_rate=RATE, validation_fraction=0.2)
    found = {r.name: (r.frames, r.split) for r in corpus.train + corpus.validation}
    assert found == {
        f"w-00{n // 2}.tar/a/{n}.wav": (1000 + n, "validation" if n > 2 else None) for n in range(5)
    }


def test_member_equals_its_file(folder, made):
    """Bit for bit: whole, in part, and at another rate."""
    corpus = open_corpus(str(made.shards[0].parent / "*.tar"), sample_rate=RATE)
    for recording in corpus.train + corpus.validation:
        path = folder / recording.name.split(".tar/")[1].replace("_take", ".take")
        assert recording.frames == audio.info(path).frames
        assert np.array_equal(
            read_span(recording, RATE, 0, recording.frames), audio.read(path).numpy()
        )
        assert np.array_equal(
            read_span(recording, RATE, 700, 1500), audio.read(path, None, 700, 800).numpy()
        )
        assert np.array_equal(
            audio.read(recording.path, 6000, 10, 500), audio.read(path, 6000, 10, 500)
        )
        assert str(recording.path).endswith(recording.name)


@pytest.mark.parametrize("kind", ["ogg", "flac", "wav"])
def test_wrong_header_of_a_member_is_corrected(tmp_path, kind):
    """The same holds for files: a WAV from a pipe declares 2**32 bytes."""
    members = {}
    for seed, name in enumerate((f"b.{kind}", f"a.{kind}")):
        audio.write(tmp_path / name, noise(6000, seed), RATE)
        content = bytearray((tmp_path / name).read_bytes())
        if kind == "wav":
            content[40:44] = content[4:8] = b"\xff\xff\xff\xff"
        if kind == "flac":
            content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])
        (tmp_path / name).write_bytes(content)
        members[name] = bytes(content)
    tar(tmp_path / "s.tar", members)
    corpus = open_corpus(tmp_path / "s.tar", sample_rate=RATE)
    for recording in (*corpus.train, *corpus.validation):
        assert recording.frames == 6000
        assert np.array_equal(
            read_span(recording, RATE, 5000, 6000),
            audio.read(tmp_path / recording.name.split("/")[1], None, 5000, 1000),
        )


def test_order_of_shards_equals_order_of_a_folder(tmp_path, folder):
    """Item i of shards equals item i of a folder with the same names, so runs resume."""
    made = shards.write_shards(folder, tmp_path / "s", speakers=True, seed=None)
    (tmp_path / "f" / "shard-000000.tar").mkdir(parents=True)
    for path in folder.rglob("*.*"):
        name = path.relative_to(folder).as_posix().replace(".take", "_take")
        target = tmp_path / "f" / "shard-000000.tar" / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    assert len(made.shards) == 1
    one, other = (
        open_corpus(data, sample_rate=RATE)
        for data in (str(tmp_path / "s" / "*.tar"), str(tmp_path / "f"))
    )
    assert [r.name for r in one.validation] == [r.name for r in other.validation]
    ours, theirs = (Segments(c.train, layout(), seed=3) for c in (one, other))
    for number in range(30):
        a, b = ours[number], theirs[number]
        assert np.array_equal(a["waveform"], b["waveform"])
        assert (a["source"], a["start"]) == (b["source"], b["start"])


def test_every_shard_is_scanned_once(made, monkeypatch):
    pattern = str(made.shards[0].parent / "*.tar")
    first = open_corpus(pattern, sample_rate=RATE)
    seen = []
    real = shards.scan
    monkeypatch.setattr(shards, "scan", lambda path: seen.append(Path(path).name) or real(path))
    assert open_corpus(pattern, sample_rate=RATE).train == first.train
    assert seen == []
    extra = made.shards[0].parent / "zz.tar"
    tar(
        extra,
        {
            "more.wav": (made.shards[0].parent.parent / "data/speaker0/00.take.wav").read_bytes(),
            "more.spk": b"c",
        },
    )
    again = open_corpus(pattern, sample_rate=RATE)
    assert len(again.train) + len(again.validation) == 11
    assert seen == ["zz.tar"]


def test_index_of_shards_keeps_bad_shards(made, monkeypatch):
    pattern = str(made.shards[0].parent / "*.tar")
    bad = made.shards[0].parent / "bad.tar"
    bad.write_bytes(b"no tar at all")
    report = wavear.index(pattern)
    assert (report.files, report.new) == (10, 10)
    assert [name for name, _ in report.bad] == ["bad.tar"]
    monkeypatch.setattr(shards, "scan", None)  # the second time scans no shard
    again = wavear.index(pattern)
    assert (again.files, again.new, again.bad) == (10, 0, report.bad)


def test_validation_can_be_shards(made):
    first, *rest = map(str, made.shards)
    corpus = open_corpus(first, sample_rate=RATE, validation=str(made.shards[1]))
    assert {r.name.split("/")[0] for r in corpus.train} == {"shard-000000.tar"}
    assert {r.name.split("/")[0] for r in corpus.validation} == {"shard-000001.tar"}
    assert rest


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def without_end(content: bytes) -> bytes:
    return content.rstrip(b"\0")[:-1].ljust(-(-len(content.rstrip(b"\0")) // 512) * 512, b"\1")


def broken_inside(content: bytes) -> bytes:
    at = content.index(b"c.wav")
    return content[:at] + b"\xff" + content[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "kept", "why"),
    [
        (truncated, {"a.wav", "b.wav"}, "truncated inside: the archive ends before it does"),
        (without_end, {"a.wav", "b.wav", "c.wav"}, "has no end mark"),
        (broken_inside, {"a.wav", "b.wav"}, "damaged: no member at byte"),
        (lambda content: b"", set(), "is not a tar archive"),
    ],
    ids=["truncated", "without-end", "broken-inside", "empty"],
)
def test_members_before_the_damage_are_used(tmp_path, damage, kept, why):
    for seed, archive in enumerate(("whole", "x")):
        members = {f"{n}.wav": wav(3000, ord(n) + 100 * seed, tmp_path) for n in "abc"}
        tar(tmp_path / f"{archive}.tar", members)
    (tmp_path / "x.tar").write_bytes(damage((tmp_path / "x.tar").read_bytes()))
    corpus = open_corpus(tmp_path / "{whole,x}.tar", sample_rate=RATE)
    names = {r.name for r in corpus.train + corpus.validation}
    assert {n.split("/")[1] for n in names if n.startswith("x.")} == kept
    assert any(name.startswith("x.tar") and why in fault for name, fault in corpus.bad)


def test_other_members_are_skipped(tmp_path):
    content = wav(3000, 1, tmp_path)
    members = {
        "./a.wav": content,
        "a.txt": b"said",
        "a.speaker.txt": b"ann\n",
        "b.mp4": b"film",
        "._a.wav": b"of another system",
        "c.WAV": wav(3000, 2, tmp_path),
        "c.json": b'{"speaker": "bob", "text": "x"}',
        "d.wav": b"no audio",
        "e.json": b"{",
    }
    tar(tmp_path / "s.tar", members)
    corpus = open_corpus(tmp_path / "s.tar", sample_rate=RATE)
    assert {(r.name, r.speaker) for r in corpus.train + corpus.validation} == {
        ("s.tar/a.wav", "ann"),
        ("s.tar/c.WAV", "bob"),
    }
    assert {name for name, _ in corpus.bad} == {"s.tar/d.wav", "s.tar/e.json"}


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (
            "nowhere-{00..03}.tar",
            FileNotFoundError,
            r"nowhere-00\.tar: no such shard, nor the 3 others",
        ),
        ("nowhere/*.tar", FileNotFoundError, r"nowhere/\*\.tar: no such shards"),
        ("empty.tar", ValueError, r"empty\.tar: no audio files \(wav, .*\) in these 1 shards"),
        ("pipe:exit 3", OSError, r"pipe:exit 3 cannot be fetched"),
        ("pipe:true", OSError, r"pipe:true cannot be fetched"),
    ],
)
def test_missing_shards_are_refused(tmp_path, monkeypatch, data, error, message):
    if "{" in data or "pipe" in data:
        pytest.importorskip("webdataset", reason="the extra webdataset is not installed")
    monkeypatch.chdir(tmp_path)
    tar(tmp_path / "empty.tar", {"a.txt": b"nothing to hear"})
    with pytest.raises(error, match=message):
        open_corpus(data, sample_rate=RATE)
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_missing_shard_is_named(made):
    pytest.importorskip("webdataset", reason="the extra webdataset is not installed")
    count = len(made.shards)
    corpus = open_corpus(
        str(made.shards[0].parent / f"shard-{{000000..{count:06}}}.tar"), sample_rate=RATE
    )
    assert [(name.split("/")[-1], why) for name, why in corpus.bad] == [
        (f"shard-{count:06}.tar", "no such file")
    ]
    assert len(corpus.train) + len(corpus.validation) == 10


def test_pipe_is_fetched_once(made, tmp_path):
    pytest.importorskip("webdataset", reason="the extra webdataset is not installed")
    last = len(made.shards) - 1
    log = tmp_path / "log"
    pattern = f"pipe:echo >> {log}; cat {made.shards[0].parent}/shard-{{000000..{last:06}}}.tar"
    local = open_corpus(str(made.shards[0].parent / "*.tar"), sample_rate=RATE)
    for _ in range(2):
        fetched = open_corpus(pattern, sample_rate=RATE)
        assert sorted(r.frames for r in fetched.train + fetched.validation) == sorted(
            r.frames for r in local.train + local.validation
        )
    assert len(log.read_text()) == last + 1


def test_invalid_shard_requests_are_refused(folder, made, tmp_path):
    before = {path: path.read_bytes() for path in made.shards}
    with pytest.raises(FileExistsError, match="is not empty: choose another folder"):
        shards.write_shards(folder, made.shards[0].parent)
    assert {path: path.read_bytes() for path in made.shards[0].parent.iterdir()} == before
    (tmp_path / "list.csv").write_text("path,start\ndata/speaker1/01.flac,0.1\n")
    with pytest.raises(ValueError, match=r"list\.csv cuts files .*: shards contain whole files"):
        shards.write_shards(tmp_path / "list.csv", tmp_path / "new")
    for name in ("a.b.wav", "a_b.wav"):
        audio.write(tmp_path / name, noise(100, 0), RATE)
    (tmp_path / "list.csv").write_text("path\na.b.wav\na_b.wav\n")
    with pytest.raises(ValueError, match="two files have the key a_b"):
        shards.write_shards(tmp_path / "list.csv", tmp_path / "new")


def test_run_on_shards_resumes_exactly(made, tmp_path):
    """A run in two parts equals a run in one, bit for bit."""

    def run(out: str, **changed: Any) -> Path:
        pattern = str(made.shards[0].parent / "*.tar")
        settings: dict[str, Any] = {"layers": 2, "stacks": 1, "segment": 256, "speakers": True}
        config = config_of(pattern, tmp_path / out, checkpoint_every=2, **settings | changed)
        return wavear.train(config).last

    straight = run("straight")
    run("parts")
    for path in state_paths(tmp_path / "parts")[:1]:
        path.unlink()  # like a run killed after step 2
    resumed = run("parts", resume=True, workers=1)
    a, b = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    assert all((a[name] == b[name]).all() for name in a)
    assert wavear.load(straight).config.speakers == 2


def test_command_writes_shards(folder, tmp_path, capsys):
    assert (
        commands.main(
            ["shards", str(folder), "--out", str(tmp_path / "made"), "--megabytes", "0.02"]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "10 files" in printed
    assert "shard-000000.tar to shard-0000" in printed
    assert commands.main(["index", str(tmp_path / "made" / "*.tar")]) == 0
    assert "10 files, 10 of them new" in capsys.readouterr().out
    assert commands.main(["shards", str(folder), "--out", str(tmp_path / "made")]) == 1
    assert capsys.readouterr().err.startswith("wavear: error: ")
