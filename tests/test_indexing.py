"""The index: what it knows is what the files say, whatever happened to it, to them, or to the process that made it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wavear
from wavear import audio
from wavear.cli import commands
from wavear.data import corpus as corpus_module
from wavear.data import indexing, levels
from wavear.data.arrays import map_arrays, save_arrays
from wavear.data.corpus import open_corpus
from wavear.data.crops import Segments
from wavear.data.indexing import Files, Index
from wavear.data.listing import listed
from wavear.data.recordings import Recordings
from wavear.models.crop_loss import layout_of

RATE = 8000


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WAVEAR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path):
    """30 files of distinct lengths in two folders, and one that is no audio."""
    for number in range(30):
        write(tmp_path / "data" / f"s{number % 2}" / f"{number:02}.wav", 1000 + 7 * number)
    (tmp_path / "data" / "bad.wav").write_text("no audio")
    return tmp_path / "data"


def write(path: Path, samples: int, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    audio.write(path, np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32), RATE)


@pytest.fixture
def looks(monkeypatch):
    """Files that are looked into, in this process."""
    seen: list[str] = []
    real = levels.look

    def counting(kind, item):
        seen.append(Path(str(item[0])).name)
        return real(kind, item)

    monkeypatch.setattr(levels, "look", counting)
    return seen


def lengths(corpus: corpus_module.Corpus) -> dict[str, int]:
    return {r.name: r.frames for r in corpus.train + corpus.validation}


def opened(folder: Path, **settings: Any) -> corpus_module.Corpus:
    return open_corpus(folder, sample_rate=RATE, **settings)


# --- arrays on disk


ARRAYS = {
    "a": np.arange(5, dtype=np.uint64) * 2**60,
    "b": np.array([[1.5, np.nan]]),
    "c": np.zeros(0, np.int32),
    "d": np.arange(-3, 4, dtype=np.int8),
    "e": np.array([-(2**40)]),
}


def test_arrays_come_back_mapped_and_read_only(tmp_path):
    save_arrays(tmp_path / "x", ARRAYS, "some arrays")
    found = map_arrays(tmp_path / "x", "some arrays")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    with pytest.raises(ValueError, match="read-only"):
        found["a"][0] = 1


@pytest.mark.parametrize("at", [0, 9, 60, -1, -30], ids=str)
def test_arrays_that_have_changed_by_a_bit_are_refused(tmp_path, at):
    save_arrays(tmp_path / "x", ARRAYS, "some arrays")
    content = bytearray((tmp_path / "x").read_bytes())
    content[at] ^= 4
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=r"x is damaged"):
        map_arrays(tmp_path / "x", "some arrays")


@pytest.mark.parametrize("size", [0, 5, 40, -1])
def test_arrays_cut_short_are_refused(tmp_path, size):
    save_arrays(tmp_path / "x", ARRAYS, "some arrays")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:size])
    with pytest.raises(ValueError, match=r"x is damaged"):
        map_arrays(tmp_path / "x", "some arrays")


def test_other_arrays_are_refused(tmp_path):
    save_arrays(tmp_path / "x", ARRAYS, "some arrays")
    with pytest.raises(ValueError, match="it holds 'some arrays', expected 'others'"):
        map_arrays(tmp_path / "x", "others")


# --- listing


def test_a_folder_is_listed_in_the_order_of_its_names(tmp_path):
    """Characters around the slash among them; a link to a folder above does not lead round and round."""
    names = [
        "a/x.wav",
        "a-b.wav",
        "a.b/y.wav",
        "a.wav",
        "a/b/c.wav",
        "a b/z.wav",
        "ä.wav",
        "Z.wav",
        "a0.wav",
    ]
    for name in names:
        write(tmp_path / name, 100)
    (tmp_path / "a" / "round").symlink_to(tmp_path)
    (tmp_path / "other").symlink_to(tmp_path / "a.b")
    listing = listed(tmp_path)
    assert [listing.base(n) for n in range(len(listing))] == sorted([*names, "other/y.wav"])


def test_a_folder_that_cannot_be_listed_is_named(corpus):
    if os.geteuid() == 0:
        pytest.skip("root may list everything")
    (corpus / "s1").chmod(0)
    try:
        found = opened(corpus)
    finally:
        (corpus / "s1").chmod(0o755)
    assert ("s1/", "cannot be listed: Permission denied") in found.bad
    assert all(name.startswith("s0") for name in lengths(found))


def test_names_that_are_no_unicode_are_read(tmp_path):
    write(tmp_path / "a.wav", 500)
    os.rename(os.fsencode(tmp_path / "a.wav"), os.fsencode(tmp_path) + b"/\xff.wav")
    write(tmp_path / "b.wav", 600)
    for keep in (None, True):
        if keep:
            wavear.index(tmp_path)
        assert sorted(lengths(opened(tmp_path)).values()) == [500, 600]


def test_rows_are_what_a_list_of_recordings_was(tmp_path):
    """Names, paths, stretches, speakers and splits, row by row, and as a sequence."""
    for name in ("a.wav", "b.wav", "sub/c.wav"):
        write(tmp_path / name, 4000)
    rows = [
        {"path": "a.wav", "speaker": "ann"},
        {
            "path": "./sub//c.wav",
            "start": 0.125,
            "duration": 0.25,
            "speaker": "bob",
            "split": "dev",
        },
        {"path": str(tmp_path / "b.wav"), "start": 0.1, "speaker": 7},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = opened(tmp_path / "m.jsonl")
    assert isinstance(found.train, Recordings)
    a, b = found.train
    (c,) = found.validation
    assert (a.path, a.name, a.start, a.frames, a.speaker, a.split) == (
        tmp_path / "a.wav",
        "a.wav",
        0,
        4000,
        "ann",
        None,
    )
    assert (b.path, b.name, b.start, b.frames) == (
        tmp_path / "b.wav",
        f"{tmp_path}/b.wav#0.1",
        800,
        3200,
    )
    assert (c.path, c.name, c.start, c.frames) == (
        tmp_path / "sub/c.wav",
        "sub/c.wav#0.125",
        1000,
        2000,
    )
    assert (c.span, b.span, a.span) == ((0.125, 0.25), (0.1, None), (0.0, None))
    assert found.speakers == ["7", "ann", "bob"]
    assert found.train[-1] == b == found.train[1:][0]
    assert found.train == [a, b]
    assert found.train != [b, a]
    with pytest.raises(IndexError):
        found.train[2]


# --- what is kept


def test_the_second_time_nothing_is_looked_into(corpus, looks):
    first = wavear.index(corpus)
    assert (first.files, first.new, [name for name, _ in first.bad]) == (31, 31, ["bad.wav"])
    assert first.seconds == pytest.approx(sum(1000 + 7 * n for n in range(30)) / RATE)
    assert first.rates == [RATE]
    assert len(looks) == 31
    second = wavear.index(corpus)
    assert (second.new, second.bad, second.seconds) == (0, first.bad, first.seconds)
    assert len(looks) == 31
    assert not list((corpus).glob(".*"))  # nothing is written among the data
    assert first.folder is not None
    assert first.folder.is_relative_to(indexing.default_folder())


def test_a_corpus_from_its_index_is_the_corpus_without_one(corpus, monkeypatch):
    without = opened(corpus)
    assert not indexing.default_folder().exists()  # few files are none of the index's business
    monkeypatch.setattr(indexing, "KEEP_FROM", 10)
    for _ in range(2):
        with_index = opened(corpus)
        assert (with_index.train, with_index.validation, with_index.bad) == (
            without.train,
            without.validation,
            without.bad,
        )
        assert with_index.train.fingerprint() == without.train.fingerprint()
    assert (indexing.cached(corpus) / "headers.safetensors").is_file()
    assert isinstance(with_index.train.listing.text.base, np.memmap | np.ndarray)
    assert not with_index.train.listing.text.flags.writeable


@pytest.mark.parametrize(
    "settings",
    [{"normalise": "rms"}, {"trim_silence": 20.0}, {"normalise": "peak", "speakers": True}],
)
def test_levels_are_measured_once_per_setting(corpus, monkeypatch, looks, settings):
    without = opened(corpus, **settings) if "speakers" not in settings else None
    if "speakers" in settings:
        (corpus / "bad.wav").unlink()
        without = opened(corpus, **settings, normalise_by="speaker")
        settings = settings | {"normalise_by": "speaker"}
    assert without is not None
    monkeypatch.setattr(indexing, "KEEP_FROM", 10)
    opened(corpus, **settings)
    looks.clear()
    again = opened(corpus, **settings)
    assert looks == []
    assert again.train == without.train
    assert again.validation == without.validation
    write(corpus / "s1" / "03.wav", 1500)
    assert opened(corpus, **settings).train != without.train
    assert looks == ["03.wav", "03.wav"]  # its header and its level
    opened(corpus, normalise="peak", trim_silence=30.0)
    assert len(looks) >= 2 + 30


def test_new_and_changed_files_are_looked_into_and_removed_ones_forgotten(corpus, looks):
    wavear.index(corpus)
    looks.clear()
    write(corpus / "s0" / "new.wav", 2000)
    (corpus / "s0" / "04.wav").unlink()
    write(corpus / "s1" / "05.wav", 3000)  # another size
    status = (corpus / "s1" / "07.wav").stat()
    write(corpus / "s1" / "07.wav", 1049, seed=1)  # the same size, another time
    os.utime(corpus / "s1" / "07.wav", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    report = wavear.index(corpus)
    assert sorted(looks) == ["05.wav", "07.wav", "new.wav"]
    assert (report.files, report.new) == (31, 3)
    found = map_arrays(indexing.cached(corpus) / "headers.safetensors", "wavear index of headers 1")
    assert len(found["key"]) == 31
    assert 1028 not in found["a"]
    assert 3000 in found["a"]


def test_a_file_that_could_not_be_opened_is_tried_again(corpus, looks):
    manifest = corpus / "list.csv"
    manifest.write_text("path\ns0/00.wav\ns0/02.wav\nmissing.wav\n")
    assert [name for name, _ in wavear.index(manifest).bad] == ["missing.wav"]
    looks.clear()
    assert wavear.index(manifest).bad[0][0] == "missing.wav"
    assert looks == ["missing.wav"]
    write(corpus / "missing.wav", 500)
    assert wavear.index(manifest).bad == []


def test_stretches_of_a_file_are_one_file(corpus, looks):
    rows = "".join(f"s0/00.wav,{n / 100},0.01\n" for n in range(10))
    (corpus / "list.csv").write_text("path,start,duration\n" + rows + "s0/00.wav,9,\n")
    found = opened(corpus / "list.csv")
    assert looks == ["00.wav"]
    assert len(found.train) + len(found.validation) == 10
    assert found.bad == [("s0/00.wav#9", "it is to be read from 9 s on, and ends at 0.125 s")]


@pytest.mark.parametrize("damage", ["cut", "bit", "text"])
def test_a_damaged_index_is_named_and_made_again(corpus, looks, damage):
    wavear.index(corpus)
    path = indexing.cached(corpus) / "headers.safetensors"
    content = path.read_bytes()
    broken = {
        "cut": content[:-9],
        "bit": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        "text": b"hello",
    }
    path.write_bytes(broken[damage])
    looks.clear()
    report = wavear.index(corpus)
    assert report.new == len(looks) == 31
    assert len(report.notes) == 1
    assert f"{path} is damaged" in report.notes[0]
    assert "made again" in report.notes[0]
    assert wavear.index(corpus).notes == []


def test_an_index_that_is_no_array_file_of_ours_runs_no_code(corpus, tmp_path):
    """A pickle in its place is refused like any other damage."""
    import pickle

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    wavear.index(corpus)
    for name in ("headers", "listing"):
        (indexing.cached(corpus) / f"{name}.safetensors").write_bytes(pickle.dumps(Bomb()))
    (indexing.cached(corpus) / "headers-0.journal").write_bytes(pickle.dumps(Bomb()))
    assert wavear.index(corpus).new == 31
    assert not (tmp_path / "exploded").exists()


def test_beside_the_data_it_serves_everybody_and_moves_with_them(
    corpus, looks, monkeypatch, tmp_path
):
    report = wavear.index(corpus, beside=True)
    assert report.folder == corpus / ".wavear-index"
    monkeypatch.setenv("WAVEAR_CACHE", str(tmp_path / "somebody else's"))
    looks.clear()
    corpus.rename(tmp_path / "moved")
    assert wavear.index(tmp_path / "moved").new == 0
    assert looks == []
    assert not (tmp_path / "somebody else's").exists()


def test_beside_read_only_data_the_cache_takes_what_is_new(corpus, looks, monkeypatch):
    wavear.index(corpus, beside=True)
    write(corpus / "s0" / "new.wav", 2000)
    real = Path.touch

    def refuse(path, *rest):
        if path.is_relative_to(corpus):
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *rest)

    monkeypatch.setattr(Path, "touch", refuse)  # a mode says nothing to root
    before = {p: p.stat().st_mtime_ns for p in (corpus / ".wavear-index").iterdir()}
    looks.clear()
    report = wavear.index(corpus)
    assert (report.new, looks) == (1, ["new.wav"])
    assert report.folder == indexing.cached(corpus)
    assert wavear.index(corpus).new == 0
    assert {p: p.stat().st_mtime_ns for p in (corpus / ".wavear-index").iterdir()} == before


def test_where_nothing_can_be_written_the_corpus_opens_all_the_same(corpus, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file where the cache would be")
    monkeypatch.setattr(indexing, "KEEP_FROM", 10)
    found = opened(corpus)
    assert len(lengths(found)) == 30
    assert any("the index of" in note and "is not kept" in note for note in found.notes)


# --- in processes


def test_processes_find_what_threads_find(corpus, monkeypatch):
    expected = opened(corpus)
    monkeypatch.setattr(indexing, "_PROCESSES_FROM", {"header": 1, "level": 1})
    monkeypatch.setattr(indexing, "_BLOCK", {"header": 4, "level": 4})
    monkeypatch.setattr(levels, "default_processes", lambda: 2)
    shown: list[tuple[int, str]] = []

    def progress(items, total, text):
        shown.append((total, text))
        return items

    found = opened(corpus, progress=progress)
    assert (found.train, found.validation, found.bad) == (
        expected.train,
        expected.validation,
        expected.bad,
    )
    assert shown == [(31, "reading headers")]
    leveled = opened(corpus, normalise="rms", progress=progress)
    monkeypatch.undo()
    assert leveled.train == opened(corpus, normalise="rms").train


def test_a_file_that_kills_its_process_is_named_and_the_others_are_read(
    corpus, monkeypatch, tmp_path
):
    """A decoder's fault, say: here a module before soundfile which ends the process at one file."""
    fake = tmp_path / "fake" / "soundfile.py"
    fake.parent.mkdir()
    fake.write_text(
        "import os, sys\n"
        "sys.path.remove(os.path.dirname(__file__))\n"
        "del sys.modules['soundfile']\n"
        "import soundfile\n"
        "real = soundfile.SoundFile\n"
        "def deadly(source, *rest, **more):\n"
        "    if '17.wav' in str(source): os._exit(139)\n"
        "    return real(source, *rest, **more)\n"
        "soundfile.SoundFile = deadly\n"
    )
    monkeypatch.syspath_prepend(fake.parent)  # processes import from where this one does
    monkeypatch.setattr(indexing, "_PROCESSES_FROM", {"header": 1, "level": 1})
    monkeypatch.setattr(indexing, "_BLOCK", {"header": 2, "level": 2})
    report = wavear.index(corpus, processes=1)
    assert dict(report.bad)["s1/17.wav"] == "kills the process that looks into it"
    assert len(report.bad) == 2
    assert report.seconds == pytest.approx(sum(1000 + 7 * n for n in range(30) if n != 17) / RATE)


SLOWLY = """
import sys, time
from wavear import indexing, looking
import wavear
indexing._BLOCK = {"header": 5, "level": 5}
real = levels.look
def slow(kind, item):
    time.sleep(0.05)
    return real(kind, item)
levels.look = slow
levels.THREADS = 1
wavear.index(sys.argv[1])
"""


def test_an_index_that_was_killed_goes_on_where_it_was(corpus, looks):
    environment = os.environ | {
        "PYTHONPATH": str(Path(wavear.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    child = subprocess.Popen([sys.executable, "-c", SLOWLY, str(corpus)], env=environment)
    folder = indexing.cached(corpus)
    end = time.monotonic() + 60
    while time.monotonic() < end and not any(
        p.stat().st_size > 300 for p in folder.glob("*.journal")
    ):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (folder / "headers.safetensors").exists()
    (journal,) = folder.glob("*.journal")
    journal.write_bytes(journal.read_bytes() + b"wvjr half a block")
    report = wavear.index(corpus)
    assert 1 <= len(looks) <= 26
    assert report.new == len(looks)
    assert report.files == 31
    assert [name for name, _ in report.bad] == ["bad.wav"]
    assert report.seconds == pytest.approx(sum(1000 + 7 * n for n in range(30)) / RATE)
    assert not list(folder.glob("*.journal"))
    looks.clear()
    assert wavear.index(corpus).new == 0


def test_two_processes_at_once_look_into_each_file_once(corpus):
    environment = os.environ | {
        "PYTHONPATH": str(Path(wavear.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    program = SLOWLY.replace("wavear.index(sys.argv[1])", "print(wavear.index(sys.argv[1]).new)")
    command = [sys.executable, "-c", program, str(corpus)]
    children = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    new = sorted(int(child.communicate(timeout=100)[0]) for child in children)
    assert new == [0, 31]


# --- the command


def test_the_command_says_what_it_found(corpus, capsys):
    assert commands.main(["index", str(corpus)]) == 1
    out, err = capsys.readouterr()
    assert "31 files, 31 of them new or changed; 1 cannot be used" in out
    assert "30 recordings" not in out
    assert f"index: {indexing.cached(corpus)}" in out
    assert "bad.wav: is not audio" in err
    (corpus / "bad.wav").unlink()
    assert commands.main(["index", str(corpus), "--beside"]) == 0
    assert f"index: {corpus / '.wavear-index'}" in capsys.readouterr().out
    assert commands.main(["index", str(corpus / "nowhere")]) == 1
    assert (
        capsys.readouterr().err.strip()
        == f"wavear: error: {corpus / 'nowhere'}: no such folder or manifest"
    )


def test_keys_tell_names_sizes_and_times_apart(corpus):
    files = Files.of_listing(listed(corpus))
    assert len(set(files.key.tolist())) == 31
    again = Files.of_listing(listed(corpus))
    assert np.array_equal(files.key, again.key)
    assert Index(corpus).notes == []


def test_levels_of_stretches_of_a_file_are_their_own(corpus, monkeypatch):
    """A loud half and a quiet one have two gains, also when they come from the index."""
    waveform = np.random.default_rng(0).normal(0, 0.1, 8000).clip(-0.3, 0.3) * np.repeat(
        [1.0, 0.1], 4000
    )
    audio.write(corpus / "halves.wav", waveform.astype(np.float32), RATE)
    (corpus / "list.csv").write_text("path,start,duration\nhalves.wav,0,0.5\nhalves.wav,0.5,0.5\n")
    monkeypatch.setattr(indexing, "KEEP_FROM", 2)
    for _ in range(2):
        found = opened(corpus / "list.csv", normalise="peak")
        loud, quiet = sorted(r.gain for r in found.train + found.validation)
        assert loud == pytest.approx(0.9 / 0.3, rel=1e-3)
        assert quiet == pytest.approx(0.9 / 0.03, rel=1e-2)


def test_files_with_a_hash_sign_in_their_names_are_held_out_one_by_one(tmp_path):
    """And stretches of such a file together: `take #1.wav#0.02` is of `take #1.wav`."""
    for number in range(40):
        write(tmp_path / f"take #{number}.wav", 500)
    found = opened(tmp_path, validation_fraction=0.2)
    assert 2 <= len(found.validation) <= 16
    recordings = corpus_module.find(tmp_path)
    assert {r.name for r in corpus_module.split(recordings, 0.2)[1]} == {
        r.name for r in found.validation
    }
    rows = [f"take #{number}.wav,{start}" for number in range(40) for start in (0, 0.02, 0.04)]
    (tmp_path / "list.csv").write_text("\n".join(["path,start", *rows]) + "\n")
    stretches = opened(tmp_path / "list.csv", validation_fraction=0.2)
    assert {r.path for r in stretches.validation} == {r.path for r in found.validation}
    assert len(stretches.validation) == 3 * len(found.validation)
    cut = corpus_module.split(corpus_module.find(tmp_path / "list.csv"), 0.2)
    assert {r.name for r in cut[1]} == {r.name for r in stretches.validation}


def test_journals_of_other_settings_are_neither_read_nor_removed(tmp_path):
    own, other = (
        tmp_path / f"levels-22050-rms{more}-{uuid.uuid4().hex}.journal" for more in ("", "-40.0")
    )
    own.touch()
    other.touch()
    assert indexing._journals(tmp_path, "levels-22050-rms") == [own]
    assert indexing._journals(tmp_path, "levels-22050-rms-40.0") == [other]


def test_crops_are_drawn_as_from_a_list(corpus):
    """Item i of rows of arrays is item i of a list of the same recordings."""
    config = wavear.WaveNetConfig(
        layers=2, stacks=1, residual_channels=4, skip_channels=4, head_channels=4, sample_rate=RATE,
        mel=wavear.MelConfig(sample_rate=RATE, n_fft=256, window_length=256, hop_length=64, bands=8, fmax=4000),
    )  # fmt: skip
    layout = layout_of(wavear.WaveNet(config), 256)
    train = opened(corpus).train
    rows, objects = Segments(train, layout, seed=5), Segments(list(train), layout, seed=5)
    assert rows.ends.tolist() == np.cumsum([layout.length(r) for r in train]).tolist()
    for number in range(20):
        a, b = rows[number], objects[number]
        assert (a["source"], a["start"]) == (b["source"], b["start"])
        assert np.array_equal(a["waveform"], b["waveform"])
