"""The index caches headers and levels of files, and survives interruption, damage and change."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wavear
from wavear import audio
from wavear.cli import commands
from wavear.data import corpus as corpus_module
from wavear.data import indexing, levels, workers
from wavear.data.corpus import open_corpus
from wavear.data.listing import listed
from wavear.data.recordings import Builder, Recordings, fingerprint
from wavear.data.store import FILE, DamagedError, Store

RATE = 8000


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WAVEAR_CACHE", str(tmp_path / "cache"))


def write(path: Path, samples: int, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    audio.write(path, np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32), RATE)


@pytest.fixture
def corpus(tmp_path):
    """Return a folder with 30 files of distinct lengths, and one that is not audio."""
    for number in range(30):
        write(tmp_path / "data" / f"s{number % 2}" / f"{number:02}.wav", 1000 + 7 * number)
    (tmp_path / "data" / "bad.wav").write_text("not audio")
    return tmp_path / "data"


SECONDS = pytest.approx(sum(1000 + 7 * n for n in range(30)) / RATE)


@pytest.fixture
def looks(monkeypatch):
    """Return the list of the files that this process reads, by name."""
    seen: list[str] = []
    real = levels.look

    def counting(source, *rest):
        seen.append(Path(str(source)).name)
        return real(source, *rest)

    monkeypatch.setattr(levels, "look", counting)
    return seen


def test_waiting_for_another_process_is_logged(tmp_path, caplog, capsys):
    with caplog.at_level("INFO"):
        indexing.Index(tmp_path, progress=lambda items, *_: items)._wait()
        indexing.Index(tmp_path)._wait()
    assert caplog.messages == [f"another process is indexing {tmp_path}: waiting for it"]
    assert capsys.readouterr().out == ""


def opened(folder: Path, **settings: Any) -> corpus_module.Corpus:
    return open_corpus(folder, sample_rate=RATE, **settings)


def lengths(corpus: corpus_module.Corpus) -> dict[str, int]:
    return {r.name: r.frames for r in corpus.train + corpus.validation}


def use_processes(monkeypatch, block: int) -> None:
    for name in ("HEADERS", "LEVELS"):
        work = dataclasses.replace(getattr(indexing, name), block=block, processes_from=1)
        monkeypatch.setattr(indexing, name, work)
    monkeypatch.setattr(corpus_module, "LEVELS", indexing.LEVELS)
    monkeypatch.setattr(indexing.Index.find, "__defaults__", (indexing.HEADERS, ""))


# --- listing


def test_folder_is_listed_by_name(tmp_path):
    """Names have characters that sort near the slash; a link to a parent is not followed twice."""
    names = ["a/x.wav", "a-b.wav", "a.b/y.wav", "a.wav", "a/b/c.wav", "a b/z.wav", "ä.wav", "Z.wav"]
    for name in names:
        write(tmp_path / name, 100)
    (tmp_path / "a" / "round").symlink_to(tmp_path)
    (tmp_path / "other").symlink_to(tmp_path / "a.b")
    assert [r.name for r in listed(tmp_path)] == sorted([*names, "other/y.wav"])


def test_unlistable_folder_is_named(corpus):
    if os.geteuid() == 0:
        pytest.skip("root may list every folder")
    (corpus / "s1").chmod(0)
    try:
        found = opened(corpus)
    finally:
        (corpus / "s1").chmod(0o755)
    assert ("s1/", "cannot be listed: Permission denied") in found.bad
    assert all(name.startswith("s0") for name in lengths(found))


def test_names_that_are_not_unicode_are_read(tmp_path):
    write(tmp_path / "a.wav", 500)
    os.rename(os.fsencode(tmp_path / "a.wav"), os.fsencode(tmp_path) + b"/\xff.wav")
    write(tmp_path / "b.wav", 600)
    for _ in range(2):
        assert sorted(lengths(opened(tmp_path)).values()) == [500, 600]
        wavear.index(tmp_path)


def test_recordings_are_a_sequence(tmp_path):
    for name in ("a.wav", "b.wav", "sub/c.wav"):
        write(tmp_path / name, 4000)
    stretch = {"start": 0.125, "duration": 0.25, "speaker": "bob", "split": "dev"}
    rows = [
        {"path": "a.wav", "speaker": "ann"},
        {"path": "./sub//c.wav", **stretch},
        {"path": str(tmp_path / "b.wav"), "start": 0.1, "speaker": 7},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = opened(tmp_path / "m.jsonl")
    assert isinstance(found.train, Recordings)
    a, b = found.train
    (c,) = found.validation
    assert (a.path, a.name, a.start, a.frames) == (tmp_path / "a.wav", "a.wav", 0, 4000)
    assert (a.speaker, a.split) == ("ann", None)
    assert (b.path, b.name) == (tmp_path / "b.wav", f"{tmp_path}/b.wav#0.1")
    assert (b.start, b.frames) == (800, 3200)
    assert (c.path, c.name) == (tmp_path / "sub/c.wav", "sub/c.wav#0.125")
    assert (c.start, c.frames) == (1000, 2000)
    assert (c.span, b.span, a.span) == ((0.125, 0.25), (0.1, None), (0.0, None))
    assert found.speakers == ["7", "ann", "bob"]
    assert found.train[-1] == b == found.train[1:][0]
    assert found.train == [a, b]
    assert found.train != [b, a]
    assert fingerprint(found.train) == fingerprint([a, b]) != fingerprint([b, a])
    with pytest.raises(IndexError):
        found.train[2]


def test_fingerprint_equals_that_of_version_0_1(tmp_path):
    """So runs of version 0.1 resume: names, stretches, gains and speakers have the same hash."""
    for number in range(6):
        write(tmp_path / f"{number}.wav", 1000 + number)
    rows = [f"{n}.wav,{n * 0.01},{0.05 if n % 2 else ''},s{n % 2}" for n in range(6)]
    (tmp_path / "m.csv").write_text("\n".join(["path,start,duration,speaker", *rows]))
    assert fingerprint(opened(tmp_path / "m.csv").train) == "1255f209e6e1a474"


def test_million_rows_take_little_memory():
    """A row takes at most 100 bytes plus its name; 20,000 rows stand for a million."""
    builder = Builder(Path("data"))
    for number in range(20_000):
        builder.add(f"reader-{number // 100:05}/{number:07}.wav", f"reader-{number // 100}")
    found = builder.done()
    columns = [v for v in vars(found).values() if isinstance(v, np.ndarray)]
    held = len(found.text) + sum(column.nbytes for column in columns)
    assert held <= 20_000 * (100 + len("reader-00000/0000000.wav"))
    assert found.take(slice(0, 10)).text is found.text


# --- caching


def test_second_index_reads_no_file(corpus, looks):
    first = wavear.index(corpus)
    assert (first.files, first.new, [name for name, _ in first.bad]) == (31, 31, ["bad.wav"])
    assert (first.seconds, first.rates, len(looks)) == (SECONDS, [RATE], 31)
    second = wavear.index(corpus)
    assert (second.new, second.bad, second.seconds) == (0, first.bad, first.seconds)
    assert len(looks) == 31
    assert not list((corpus).glob(".*"))  # the data folder is unchanged
    assert first.folder == indexing.cached(corpus)
    assert first.folder is not None
    assert first.folder.is_relative_to(os.environ["WAVEAR_CACHE"])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalize": "rms"},
        {"trim_silence": 20.0},
        {"normalize": "peak", "normalize_by": "speaker", "speakers": True},
    ],
    ids=["headers", "rms", "trim", "speakers"],
)
def test_corpus_from_index_equals_corpus_without(corpus, monkeypatch, looks, settings):
    if "speakers" in settings:
        (corpus / "bad.wav").unlink()
    without = opened(corpus, **settings)
    assert not (Path(os.environ["WAVEAR_CACHE"])).exists()  # few files need no index
    monkeypatch.setattr(indexing, "KEEP_FROM", 10)
    opened(corpus, **settings)
    looks.clear()
    again = opened(corpus, **settings)
    assert looks == []
    assert (again.train, again.validation, again.bad) == (
        without.train,
        without.validation,
        without.bad,
    )
    assert fingerprint(again.train) == fingerprint(without.train)
    write(corpus / "s1" / "03.wav", 1500)
    assert opened(corpus, **settings).train != without.train
    assert looks == ["03.wav"] * (2 if settings else 1)  # its header and its level


def test_levels_of_stretches_are_distinct(corpus, monkeypatch):
    """The loud and the quiet half of a file have different gains, also from the index."""
    waveform = np.random.default_rng(0).uniform(-0.3, 0.3, 8000) * np.repeat([1.0, 0.1], 4000)
    audio.write(corpus / "halves.wav", waveform.astype(np.float32), RATE)
    (corpus / "list.csv").write_text("path,start,duration\nhalves.wav,0,0.5\nhalves.wav,0.5,0.5\n")
    monkeypatch.setattr(indexing, "KEEP_FROM", 2)
    for _ in range(2):
        found = opened(corpus / "list.csv", normalize="peak")
        loud, quiet = sorted(r.gain for r in found.train + found.validation)
        assert loud == pytest.approx(0.9 / 0.3, rel=1e-2)
        assert quiet == pytest.approx(0.9 / 0.03, rel=1e-2)


def test_only_new_and_changed_files_are_read_and_removed_files_dropped(corpus, looks):
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
    with sqlite3.connect(indexing.cached(corpus) / FILE) as database:
        frames = {count for (count,) in database.execute("SELECT frames FROM look")}
        assert database.execute("SELECT count(*) FROM look").fetchone() == (31,)
    database.close()
    assert 1028 not in frames
    assert {2000, 3000} <= frames


def test_file_that_could_not_be_opened_is_retried(corpus, looks):
    manifest = corpus / "list.csv"
    manifest.write_text("path\ns0/00.wav\ns0/02.wav\nmissing.wav\n")
    assert [name for name, _ in wavear.index(manifest).bad] == ["missing.wav"]
    looks.clear()
    assert wavear.index(manifest).bad[0][0] == "missing.wav"
    assert looks == ["missing.wav"]
    write(corpus / "missing.wav", 500)
    assert wavear.index(manifest).bad == []


def test_header_is_read_once_for_all_stretches(corpus, looks):
    rows = "".join(f"s0/00.wav,{n / 100},0.01\n" for n in range(10))
    (corpus / "list.csv").write_text("path,start,duration\n" + rows + "s0/00.wav,9,\n")
    found = opened(corpus / "list.csv")
    assert looks == ["00.wav"]
    assert len(found.train) + len(found.validation) == 10
    assert found.bad == [("s0/00.wav#9", "starts at 9 s, but the file ends at 0.125 s")]


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def other_tables(path: Path) -> None:
    database = sqlite3.connect(path)
    database.execute("CREATE TRIGGER t AFTER INSERT ON look BEGIN DELETE FROM look; END")
    database.commit()
    database.close()


def text_for_numbers(path: Path) -> None:
    database = sqlite3.connect(path)
    database.execute("PRAGMA ignore_check_constraints = ON")
    database.execute("UPDATE look SET frames = 'many'")
    database.commit()
    database.close()


def changed_row(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(flip(content, content.rindex(b"is not audio")))


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5000]),
    "text": lambda path: path.write_bytes(b"hello"),
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: (path.unlink(), sqlite3.connect(path).execute("CREATE TABLE look (a)")),
    "trigger": other_tables,
    "types": text_for_numbers,
    "row": changed_row,
    "pickle": lambda path: path.write_bytes(pickle.dumps(path)),
}


@pytest.mark.filterwarnings("ignore:unclosed database")
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_index_is_rebuilt(corpus, looks, damage):
    wavear.index(corpus)
    path = indexing.cached(corpus) / FILE
    DAMAGE[damage](path)
    looks.clear()
    report = wavear.index(corpus)
    assert report.new == len(looks) == 31
    assert len(report.notes) == 1
    assert f"{path} is damaged" in report.notes[0]
    assert "rebuilt" in report.notes[0]
    assert wavear.index(corpus).notes == []


def test_store_refuses_links_pipes_and_foreign_journals(tmp_path):
    """SQLite would follow the link, block, or delete the file that a journal names."""
    Store(tmp_path / "real").close()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "made-elsewhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "dangling", "pipe"):
        with pytest.raises(DamagedError, match="not a regular file"):
            Store(tmp_path / name)
    assert not (tmp_path / "made-elsewhere").exists()
    journal = tmp_path / "real-journal"
    journal.write_bytes(bytes(100) + bytes.fromhex("d9d505f920a163d7"))
    with pytest.raises(DamagedError, match="its journal names another file"):
        Store(tmp_path / "real")
    journal.unlink()
    os.mkfifo(journal)
    with pytest.raises(DamagedError, match="real-journal is not a regular file"):
        Store(tmp_path / "real")


def test_an_index_in_the_data_folder_moves_with_it(corpus, looks, monkeypatch, tmp_path):
    assert wavear.index(corpus, beside=True).folder == corpus / ".wavear-index"
    monkeypatch.setenv("WAVEAR_CACHE", str(tmp_path / "somebody else's"))
    looks.clear()
    corpus.rename(tmp_path / "moved")
    assert wavear.index(tmp_path / "moved").new == 0
    assert looks == []
    assert not (tmp_path / "somebody else's").exists()


def test_cache_extends_an_index_in_a_read_only_data_folder(corpus, looks, monkeypatch):
    wavear.index(corpus, beside=True)
    write(corpus / "s0" / "new.wav", 2000)
    real = Path.touch

    def refuse(path, *rest):
        if path.is_relative_to(corpus):
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *rest)

    monkeypatch.setattr(Path, "touch", refuse)  # root ignores file modes
    before = {p: p.stat().st_mtime_ns for p in (corpus / ".wavear-index").iterdir()}
    looks.clear()
    report = wavear.index(corpus)
    assert (report.new, looks) == (1, ["new.wav"])
    assert report.folder == indexing.cached(corpus)
    assert wavear.index(corpus).new == 0
    assert {p: p.stat().st_mtime_ns for p in (corpus / ".wavear-index").iterdir()} == before


def test_corpus_opens_without_a_writable_cache(corpus, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file in place of the cache folder")
    monkeypatch.setattr(indexing, "KEEP_FROM", 10)
    found = opened(corpus)
    assert len(lengths(found)) == 30
    assert any("the index of" in note and "is not kept" in note for note in found.notes)


# --- in processes


@pytest.mark.slow
def test_processes_equal_threads(corpus, monkeypatch):
    expected = opened(corpus, normalize="rms")
    use_processes(monkeypatch, 16)
    monkeypatch.setattr(workers, "default_processes", lambda: 2)
    shown: list[tuple[int, str]] = []

    def progress(items, total, text):
        shown.append((total, text))
        return items

    found = opened(corpus, normalize="rms", progress=progress)
    assert (found.train, found.validation) == (expected.train, expected.validation)
    assert found.bad == expected.bad
    assert shown == [(31, "reading headers"), (30, "measuring levels")]


def test_file_that_crashes_its_process_is_named(corpus, monkeypatch, tmp_path):
    """A fake `soundfile` that ends the process at one file stands for a faulty decoder."""
    fake = tmp_path / "fake" / "soundfile.py"
    fake.parent.mkdir()
    fake.write_text(
        "import importlib.util, os, sys\n"
        "from importlib.machinery import PathFinder\n"
        "rest = [path for path in sys.path if path != os.path.dirname(__file__)]\n"
        "spec = PathFinder.find_spec('soundfile', rest)\n"
        "real = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(real)\n"
        "globals().update(vars(real))\n"
        "def SoundFile(source, *rest, **more):\n"
        "    if '17.wav' in str(source): os._exit(139)\n"
        "    return real.SoundFile(source, *rest, **more)\n"
    )
    monkeypatch.syspath_prepend(fake.parent)  # workers use this process's import path
    use_processes(monkeypatch, 16)
    report = wavear.index(corpus, processes=1)
    assert dict(report.bad)["s1/17.wav"] == "crashes the process that reads it"
    assert len(report.bad) == 2
    assert report.seconds == pytest.approx(sum(1000 + 7 * n for n in range(30) if n != 17) / RATE)


SLOWLY = """
import sys, time
import wavear
from wavear.data import indexing, levels, workers
work = indexing.Work(5, 4000, "")
indexing.Index.find.__defaults__ = (work, "")
real = levels.look
def slow(*item):
    time.sleep(0.05)
    return real(*item)
levels.look = slow
workers.THREADS = 1
print(wavear.index(sys.argv[1]).new)
"""


def start_slowly(corpus: Path) -> subprocess.Popen[str]:
    root = str(Path(wavear.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SLOWLY, str(corpus)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def rows_in(path: Path) -> int:
    try:
        database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            return database.execute("SELECT count(*) FROM look").fetchone()[0]
        finally:
            database.close()
    except sqlite3.Error:
        return 0


def test_interrupted_index_resumes(corpus, looks):
    child = start_slowly(corpus)
    path = indexing.cached(corpus) / FILE
    end = time.monotonic() + 100
    while time.monotonic() < end and not rows_in(path):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    report = wavear.index(corpus)
    assert 1 <= len(looks) <= 26
    assert report.new == len(looks)
    assert (report.files, [name for name, _ in report.bad]) == (31, ["bad.wav"])
    assert (report.seconds, report.notes) == (SECONDS, [])
    looks.clear()
    assert wavear.index(corpus).new == 0


@pytest.mark.slow
def test_two_processes_read_each_file_once(corpus):
    children = [start_slowly(corpus) for _ in range(2)]
    assert sorted(int(child.communicate(timeout=200)[0]) for child in children) == [0, 31]


# --- the command


def test_command_reports_the_index(corpus, capsys):
    assert commands.main(["index", str(corpus)]) == 1
    out, err = capsys.readouterr()
    assert "31 files, 31 of them new or changed; 1 cannot be used" in out
    assert f"index: {indexing.cached(corpus)}" in out
    assert "bad.wav: is not audio" in err
    (corpus / "bad.wav").unlink()
    assert commands.main(["index", str(corpus), "--beside"]) == 0
    assert f"index: {corpus / '.wavear-index'}" in capsys.readouterr().out
