"""Two processes do not write one run or one file; the claim of a killed process does not block."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import tiny
from small_training import config_of

import wavear
from wavear import WavearError, audio, train
from wavear.common import claims
from wavear.common.claims import claimed
from wavear.generation import distributed
from wavear.generation.files import generate_file, synthesize, write_mels
from wavear.generation.jobs import plan
from wavear.generation.settings import Sampling

pytestmark = pytest.mark.usefixtures("one_thread")

_HOLD = """
import os, sys, time
from wavear.common.claims import claimed
with claimed(sys.argv[2:], sys.argv[1] or None):
    print(os.getpid(), flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_PATIENCE", 0.2)


@pytest.fixture
def hold() -> Iterator[Callable[..., subprocess.Popen]]:
    """Return a function that starts a process with a claim."""
    started: list[subprocess.Popen] = []

    def start(folder: Path | str, *targets: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", _HOLD, str(folder), *map(str, targets)]
        environment = os.environ | {"PYTHONPATH": str(Path(wavear.__file__).parents[1])}
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        started.append(holder)
        assert holder.stdout is not None
        assert int(holder.stdout.readline()) == holder.pid
        return holder

    yield start
    for holder in started:
        holder.kill()
        holder.communicate()


def test_a_second_training_in_one_folder_is_refused(tones, tmp_path, hold):
    out = tmp_path / "run"
    holder = hold(out, out)
    message = rf"run is being written by process {holder.pid} on .*: wait for it, or choose another"
    for settings in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(WavearError, match=message):
            train(config_of(tones, out, max_steps=1, **settings))
    assert sorted(p.suffix for p in out.iterdir()) == [".json", ".lock"]  # of the holder
    holder.kill()
    holder.wait()
    train(config_of(tones, out, max_steps=1))
    with pytest.raises(WavearError, match=f"by process {os.getpid()} "), claimed([out], out):
        train(config_of(tones, out, max_steps=1, resume=True))  # a second one in this process
    assert not list(out.glob(".wavear-*"))


def test_a_refused_training_leaves_no_folder(tones, tmp_path):
    with pytest.raises(FileNotFoundError):
        train(config_of(tmp_path / "none", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_second_synthesis_of_one_file_is_refused(tmp_path, hold):
    model = tiny(mel=wavear.MelConfig(), sample_rate=22050)
    for name in ("a", "b"):
        audio.write(tmp_path / f"{name}.wav", np.zeros(512), 22050)
    a, b, out = tmp_path / "a.wav", tmp_path / "b.wav", tmp_path / "out"
    both = plan([a, b], out, ".wav")
    holder = hold("", out / "b.wav")
    settings = Sampling(engine="reference")
    calls: list[Callable[[], Any]] = [
        lambda: synthesize(model, both, settings),
        lambda: distributed.synthesize(model, both, out, settings),
        lambda: distributed.synthesize(model, both, out, settings, overwrite=True),
        lambda: write_mels(both, wavear.MelConfig()),
    ]
    for call in calls:
        with pytest.raises((WavearError, FileExistsError), match=r"b\.wav is being written"):
            call()
    assert [path.suffix for path in out.iterdir() if path.name[0] != "."] == []
    assert synthesize(model, plan([a], out, ".wav"), settings).files == 1  # another file
    holder.kill()
    holder.wait()
    assert synthesize(model, plan([b], out, ".wav"), settings).files == 1
    assert sorted(path.name for path in out.iterdir()) == ["a.wav", "b.wav"]
    with claimed([out / "new.wav"]), pytest.raises(WavearError, match=r"new\.wav is being written"):
        generate_file(tiny(), 0.01, out / "new.wav", settings)


@pytest.mark.parametrize(("held", "wanted"), [("x", "x/sub"), ("x/sub", "x")])
def test_claims_are_found_from_folders_above_and_below(tmp_path, held, wanted):
    target = tmp_path / "x" / "sub" / "a.wav"
    with claimed([target], tmp_path / held):
        with (
            pytest.raises(WavearError, match=r"a\.wav is being written"),
            claimed([target], tmp_path / wanted),
        ):
            pass
        with claimed([tmp_path / "x" / "sub" / "b.wav"], tmp_path / wanted):
            pass
    assert list(tmp_path.iterdir()) == []


def test_planted_files_are_not_opened_as_claims(tmp_path):
    """A lock file is empty and not a link: older filelock truncates what it opens."""
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / ".wavear-claim-1-a.lock").symlink_to(tmp_path / "thesis")
    (tmp_path / ".wavear-claim-1-b.lock").write_text("more work")
    (tmp_path / ".wavear-claim-1-c.lock").write_text("")
    (tmp_path / ".wavear-claim-1-c.json").write_text("[" * 100_000)
    with claimed([tmp_path / "a.wav"]):
        pass
    assert (tmp_path / "thesis").read_text() == "years of work"
    assert (tmp_path / ".wavear-claim-1-b.lock").read_text() == "more work"
    assert not (tmp_path / ".wavear-claim-1-c.lock").exists()
