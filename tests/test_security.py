"""Each line of SECURITY.md: untrusted data run no code, open no address, read no other file."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from small_models import RATE, SIZES, tiny

import wavear
from wavear import EvaluateConfig, audio, corpora
from wavear.cli.commands import main
from wavear.data import shards
from wavear.data.corpus import find, open_corpus
from wavear.data.store import FILE, DamagedError, Store
from wavear.evaluation.evaluation import Evaluation, compare_models, evaluate
from wavear.generation.states import StreamState
from wavear.mel.mel_files import read_mel
from wavear.mel.spectrogram import MelConfig
from wavear.training.config import TrainConfig
from wavear.training.run import train, write_held_out
from wavear.training.state import load_state

TRAINING: dict[str, Any] = {
    "family": "wavenet", "layers": 2, "stacks": 1, **SIZES, "classes": 16,
    "sample_rate": RATE, "mel_bands": 8,
    "mel_hop_length": 64, "segment": 256, "warmup_steps": 1, "validate_every": 1000,
    "sample_seconds": 0.0, "progress": False,
    "device": "cpu", "precision": "32", "max_steps": 1, "batch_size": 2,
}  # fmt: skip
FAST = EvaluateConfig(clips=1, seconds=0.1, threads=1, resamples=100, shown=0)


class Bomb:
    """Leave a folder "ran" in the current directory when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a directory with data/{0..3}.wav, in which nothing may create "ran"."""
    for n in range(4):
        path = tmp_path / "data" / f"{n}.wav"
        path.parent.mkdir(exist_ok=True)
        audio.write(path, np.random.default_rng(n).uniform(-0.5, 0.5, 4000), RATE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(folder: Path, **record: Any) -> Path:
    """Save a checkpoint in a run whose train.json holds a record."""
    tiny().save(folder / "best")
    (folder / "train.json").write_text(json.dumps(record))
    return folder / "best"


COMMANDS = [
    "pipe:touch ran",
    "{pipe:touch ran;,x}.tar",
    "http://127.0.0.1:9/a.tar",
    "{http://127.0.0.1:9/a,data/x}.tar",
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("field", ["data", "validation"])
def test_commands_and_urls_of_a_run_are_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, command: str, field: str
):
    gopen = pytest.importorskip("webdataset.gopen", reason="the extra webdataset is not installed")
    reached: list[str] = []
    monkeypatch.setattr(gopen, "gopen", lambda name, mode: reached.append(name))
    config = {
        "data": "data",
        "validation": "data",
        "validation_fraction": 0.3,
        "sample_rate": RATE,
    } | {field: command}
    best = saved(here / "run", config=config, model={})
    with pytest.raises(
        ValueError, match=r"train\.json names .*, a command or a URL, which is not followed"
    ):
        write_held_out(here / "run", here / "held.jsonl")
    notes = evaluate(best, here / "data", here / "out", FAST).record["notes"]
    assert any("names" in note and "is not followed" in note for note in notes)
    assert (reached, (here / "ran").exists()) == ([], False)


@pytest.mark.parametrize("name", ["pipe:touch ran;.tar", "{pipe:touch ran;,x}.tar"])
def test_a_file_named_like_a_command_is_a_file(here: Path, name: str):
    pytest.importorskip("webdataset", reason="the extra webdataset is not installed")
    with tarfile.open(here / "a.tar", "w") as archive:
        archive.add(here / "data", arcname=".")
    os.rename(here / "a.tar", here / name)
    assert len(find("*.tar")) == len(find(name)) == 4
    paths = [name, "pipe:touch ran", "data/0.wav", "data/1.wav"]
    (here / "list.jsonl").write_text("".join(json.dumps({"path": path}) + "\n" for path in paths))
    corpus = open_corpus(here / "list.jsonl", sample_rate=RATE)
    assert {bad for bad, _ in corpus.bad} == {name, "pipe:touch ran"}
    assert not (here / "ran").exists()


def test_commands_that_the_user_types_are_followed(here: Path):
    pytest.importorskip("webdataset", reason="the extra webdataset is not installed")
    with tarfile.open(here / "a.tar", "w") as archive:
        archive.add(here / "data", arcname=".")
    assert len(find(f"pipe:touch ran; cat '{here}/a.tar'")) == 4
    assert (here / "ran").exists()


def evaluated(here: Path) -> Path:
    evaluate(saved(here / "run", config={}), here / "data", here / "out", FAST)
    return here / "out" / "evaluation.json"


def test_an_evaluation_cannot_load_a_checkpoint_of_the_hub(
    here: Path, monkeypatch: pytest.MonkeyPatch
):
    import huggingface_hub

    def download(*arguments: Any, **named: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    record = json.loads(evaluated(here).read_text())
    record["checkpoint"]["source"] = "hf:owner/name"
    for name in ("a", "b"):
        (here / name).mkdir()
        (here / name / "evaluation.json").write_text(json.dumps(record))
    table = compare_models([here / "a", here / "b"], here / "table", None, FAST)
    assert any("hf:owner/name: no such directory)" in note for note in table.record["notes"])


@pytest.mark.parametrize("name", ["../../data/0.wav", "/etc/passwd"])
def test_the_sound_of_an_evaluation_lies_in_its_folder(here: Path, name: str):
    path = evaluated(here)
    record = json.loads(path.read_text())
    record["clips"][0]["audio"] = {"original": name}
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"names {re.escape(name)}, which lies outside its folder"):
        Evaluation.read(path)


def test_pickles_in_place_of_files_of_wavear_are_refused(here: Path):
    best = saved(here / "run")
    for path in (best / "model.safetensors", best / "config.json", here / "x.safetensors"):
        content = path.read_bytes() if path.exists() else b""
        path.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(ValueError, match="damaged"):
            wavear.load(best) if content else load_state(path)
        path.write_bytes(content or path.read_bytes())
    with pytest.raises(ValueError, match="damaged"):
        StreamState.load(here / "x.safetensors")
    with pytest.raises(DamagedError, match="not an index"):
        Store(here / "x.safetensors")
    assert not (here / "ran").exists()


def test_mels_are_read_without_pickles(here: Path):
    torch.save({"mel": Bomb()}, "a.pt")
    Path("b.pt").write_bytes(pickle.dumps(Bomb()))
    np.save("a.npy", np.array([Bomb()]), allow_pickle=True)
    Path("b.npy").write_bytes(pickle.dumps(Bomb()))
    np.savez("a.npz", mel=np.array([Bomb()], dtype=object))
    Path("b.npz").write_bytes(pickle.dumps(Bomb()))
    Path("a.safetensors").write_bytes(pickle.dumps(Bomb()))
    for name in ("a.pt", "b.pt", "a.npy", "b.npy", "a.npz", "b.npz", "a.safetensors"):
        with pytest.raises(ValueError, match=re.escape(name)):
            read_mel(name, MelConfig())
    assert not (here / "ran").exists()


@pytest.mark.parametrize("family", ["planted", "planted.Model", "wavear.models.wavenet.WaveNet"])
def test_no_name_in_a_checkpoint_is_imported(
    here: Path, monkeypatch: pytest.MonkeyPatch, family: str
):
    best = saved(here / "run")
    Path("planted.py").write_text("import os\nos.mkdir('ran')\n")
    monkeypatch.syspath_prepend(here)
    described = json.loads((best / "config.json").read_text()) | {"family": family}
    (best / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"has family .*, known are predictive, wavenet"):
        wavear.load(best)
    assert not (here / "ran").exists()


# ---- the current directory


def plant(folder: Path) -> None:
    """Write modules that leave a mark when imported, named like ours, libraries' and Python's."""
    for name in (
        "wavear",
        "numpy",
        "soundfile",
        "json",
        "multiprocessing",
        "random",
        "signal",
        "sitecustomize",
    ):
        (folder / f"{name}.py").write_text(
            f"import os\nos.makedirs({str(folder / 'ran')!r}, exist_ok=True)\n"
        )


def test_index_workers_do_not_import_from_the_current_directory(
    here: Path, monkeypatch: pytest.MonkeyPatch
):
    from wavear.data import workers

    plant(here)
    monkeypatch.setattr(sys, "path", ["", str(here), *sys.path])
    monkeypatch.setenv("PYTHONPATH", os.pathsep)  # which also means the current directory
    blocks = [(n, [(str(here / "data" / f"{n}.wav"),)]) for n in range(4)]
    found = dict(workers.look_in_processes(blocks, 2))
    assert [found[n][0].frames for n in range(4)] == [4000] * 4
    assert not (here / "ran").exists()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no PYTHONSAFEPATH")
def test_loader_workers_do_not_import_from_the_current_directory(here: Path):
    plant(here)
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        train(TrainConfig(data=str(here / "data"), out=str(here / "run"), workers=1, **TRAINING))
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert not (here / "ran").exists()
    assert "PYTHONSAFEPATH" not in os.environ


def test_settings_for_the_compiler_in_the_current_directory_are_refused(
    here: Path, capsys: pytest.CaptureFixture
):
    Path(".numba_config.yaml").write_text("cache_dir: .\n")
    assert main(["info", "run"]) == 1
    assert capsys.readouterr().err.startswith(
        "wavear: error: .numba_config.yaml in the current directory would"
    )


# ---- archives and folders


def test_no_member_of_a_shard_is_unpacked(here: Path):
    content = (here / "data" / "0.wav").read_bytes()
    with tarfile.open("a.tar", "w") as archive:
        for name in ("../up.wav", str(here / "absolute.wav"), "in/side.wav"):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for name, kind in (("link.wav", tarfile.SYMTYPE), ("pipe.wav", tarfile.FIFOTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
    corpus = open_corpus("a.tar", sample_rate=RATE)
    assert (len(corpus.train) + len(corpus.validation), corpus.bad) == (3, [])
    assert sorted(path.name for path in here.iterdir()) == ["a.tar", "data"]
    assert not (here.parent / "up.wav").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
def test_pipes_among_the_data_are_named_and_block_nothing(here: Path):
    os.mkfifo("data/x.wav")
    index = here / "data" / ".wavear-index"
    index.mkdir()
    for name in (FILE, f"{FILE}-journal", "index.lock"):
        os.mkfifo(index / name)
    program = "from wavear.data.corpus import index; print(index('data').bad)"
    path = os.pathsep.join([str(Path(wavear.__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert "('x.wav', " in done.stdout
    assert "is not a regular file" in done.stdout


def test_shards_hold_regular_files_inside_the_folder_only(
    here: Path, capsys: pytest.CaptureFixture
):
    (here / "secret.wav").write_bytes(b"mine")
    (here / "elsewhere").mkdir()
    (here / "elsewhere" / "b.wav").write_bytes(b"mine")
    os.symlink(here / "secret.wav", "data/out.wav")
    os.symlink(here / "elsewhere", "data/folder")
    os.symlink("0.wav", "data/inside.wav")
    skipped = {"out.wav", "folder/b.wav"}
    if hasattr(os, "mkfifo"):
        os.mkfifo("data/pipe.wav")
        skipped.add("pipe.wav")
    (here / "data" / "list.csv").write_text(
        f"path\n../secret.wav\n{here}/secret.wav\nout.wav\n0.wav\n"
    )
    report = shards.write_shards("data", "made")
    assert {name for name, _ in report.failed} == skipped
    assert report.files == 5
    assert shards.write_shards("data/list.csv", "listed").files == 1
    assert all(b"mine" not in path.read_bytes() for path in here.glob("*/*.tar"))
    assert main(["shards", "data", "--out", "again"]) == 1
    assert re.search(
        r"out\.wav: lies outside .*/data: copy it into that folder to pack it",
        capsys.readouterr().err,
    )


def test_a_download_is_unpacked_below_its_folder_only(here: Path):
    """torchaudio does not check an existing archive, which may be somebody else's."""
    data = here / "corpora"
    data.mkdir()
    with tarfile.open(data / "waves_yesno.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("../ran")
        entry.size = 4
        archive.addfile(entry, io.BytesIO(b"mine"))
    with pytest.raises(OSError, match="cannot be downloaded to"):
        corpora.YesNo().download(data)
    assert not (here / "ran").exists()
    assert "extraction_filter" not in vars(tarfile.TarFile)


def test_names_from_data_are_text_in_a_report(here: Path):
    os.rename("data/0.wav", "data/<script>alert(1)<&.wav")
    evaluate(
        saved(here / "run", config={}),
        here / "data",
        here / "out",
        dataclasses.replace(FAST, shown=4),
    )
    page = (here / "out" / "report.html").read_text()
    assert "<script" not in page


def test_bad_releases_of_dependencies_are_excluded():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    lines = re.findall(
        r'^    "(.+)",$', project.split("\ndependencies = [")[1].split("\n]")[0], re.MULTILINE
    )
    needed = {requirement.name: requirement.specifier for requirement in map(Requirement, lines)}
    bad = {
        "lightning": ("2.6.2", "2.6.3", "2.4.0"),
        "torch": ("2.5.1", "2.9.1"),
        "tqdm": ("4.66.2",),
    }
    bad |= {"matplotlib": ("3.10.8",)}
    assert [
        (name, v) for name, versions in bad.items() for v in versions if v in needed[name]
    ] == []
