"""The page of `wavear serve` in a real Chromium: sound comes out, live audio has no gaps."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from serve_models import small_wavenet

import wavear
from wavear import MelConfig, audio

pytest.importorskip("starlette", reason="needs wavear[serve]")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium on the PATH")

RATE = 16000
MEL = MelConfig(sample_rate=RATE, hop_length=128, n_fft=512, window_length=512, bands=8, fmax=None)


# `wavear` with a front end whose mel depends on the text, instead of Tacotron 2.
PROGRAM = """
import sys, torch
from wavear.cli.commands import main
from wavear.serving import server
class FrontEnd:
    def __init__(self, model, bundle): pass
    def mel(self, text, seed=0):
        return torch.linspace(-8, -2, len(text)).repeat(8, 1)
server.Tacotron = FrontEnd
sys.exit(main())
"""


def served(folder: Path, model: Any, *flags: str) -> Iterator[str]:
    """Serve a model in another process; yield the page's address."""
    model.save(folder / "model")
    command = [sys.executable, "-c", PROGRAM, "serve", "model", "--port", "0", "--buffer", "1"]
    command += flags
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield process.stdout.readline().strip()
        process.terminate()


@pytest.fixture(scope="module")
def model() -> Any:
    return small_wavenet(RATE)


@pytest.fixture(scope="module")
def free(tmp_path_factory: Any, model: Any) -> Iterator[str]:
    yield from served(tmp_path_factory.mktemp("free"), model)


@pytest.fixture(scope="module")
def vocoder(tmp_path_factory: Any) -> Iterator[str]:
    model = small_wavenet(RATE, MEL)
    yield from served(tmp_path_factory.mktemp("mel"), model, "--tacotron2", "stub")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=flags)


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Return a function that opens an address; the page must log no error."""
    problems: list[str] = []
    context = browser.new_context(permissions=["microphone"])

    def open_page(address: str) -> Any:
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.goto(address)
        until(page, "document.getElementById('model').textContent.includes('Hz')")
        return page

    yield open_page
    context.close()
    assert problems == []


def downloaded(page: Any, button: str, path: Path) -> np.ndarray:
    with page.expect_download() as download:
        page.click(button)
    download.value.save_as(path)
    samples, rate = soundfile.read(path, dtype="int16")
    assert rate == RATE
    return samples


def until(page: Any, condition: str, seconds: float = 60) -> None:
    """Wait for a condition; the page's policy forbids `wait_for_function`, which needs eval."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(30)


def play_until(page: Any, seconds: float) -> None:
    until(page, f"parseFloat(document.getElementById('played').textContent) >= {seconds}")


def test_a_recording_goes_in_and_sound_comes_out(vocoder, opened, tmp_path):
    page = opened(vocoder)
    tone = 0.5 * np.sin(2 * np.pi * 300 * np.arange(RATE) / RATE)
    audio.write(tmp_path / "tone.wav", tone, RATE)
    page.set_input_files("#file", tmp_path / "tone.wav")
    page.click("#synthesize:enabled", timeout=30000)
    page.wait_for_selector("#save:enabled", timeout=60000)
    assert "real time" in page.inner_text("#r-status")
    assert page.evaluate("document.getElementById('synthesis-picture').naturalWidth") > 300
    samples = downloaded(page, "#save", tmp_path / "made.wav")
    assert len(samples) == RATE
    assert len(set(samples.tolist())) > 20
    page.click("#both")
    until(page, "document.querySelector('figure i').style.left > '50%'")
    until(page, "document.getElementById('both').textContent === 'Play'")


def test_the_microphone_is_recorded(vocoder, opened):
    page = opened(vocoder)
    page.click("#record")
    until(page, "document.getElementById('record').textContent === 'Stop'")
    page.wait_for_timeout(1000)
    page.click("#record")
    page.wait_for_selector("#synthesize:enabled", timeout=30000)
    assert float(re.findall(r"([\d.]+) s", page.inner_text("#upload-status"))[0]) > 0.5


def test_two_clients_play_ten_seconds_without_an_underrun(free, model, opened, tmp_path):
    """Three times at most: other tests use the cores, too, and may keep one from the server."""
    for _ in range(3):
        pages = [opened(free), opened(free)]
        for seed, page in enumerate(pages):
            page.fill("#seed", str(seed))
            page.click("#play")
        for page in pages:
            play_until(page, 10)
        underruns = [page.inner_text("#underruns") for page in pages]
        if underruns == ["0", "0"]:
            break
        for page in pages:
            page.close()
    else:
        pytest.fail(f"{underruns} underruns in the last of three times")
    for seed, page in enumerate(pages):
        samples = downloaded(page, "#download", tmp_path / f"{seed}.wav")
        assert f"--seed {seed} --temperature 1 --out" in page.inner_text("#command")
        page.click("#play")
        assert len(samples) >= 10 * RATE
        made = wavear.generate(model, samples=len(samples), seed=seed)[0]
        audio.write(tmp_path / "right.wav", made, RATE)
        assert (samples == soundfile.read(tmp_path / "right.wav", dtype="int16")[0]).all()


def test_going_back_repeats_and_forking_does_not(free, opened):
    page = opened(free)
    page.click("#play")
    play_until(page, 1)
    page.click("#mark")
    page.wait_for_selector("#marks li:nth-child(2)")
    play_until(page, 3)

    def after(button: str) -> np.ndarray:
        before = page.evaluate("wavear.samples().length")
        page.click(f"#marks li:nth-child(2) button:text('{button}')")
        until(page, f"wavear.samples().length < {before}")
        until(page, f"wavear.samples().length >= {2.5 * RATE}")
        return np.array(page.evaluate("Array.from(wavear.samples())"))[: round(2.5 * RATE)]

    first, again = after("go back"), after("go back")
    page.fill("#seed", "99")
    forked = after("fork")
    assert (first == again).all()
    assert (first[:RATE] == forked[:RATE]).all()
    assert (first != forked)[2 * RATE :].any()


def test_a_text_is_spoken(vocoder, opened, tmp_path):
    page = opened(vocoder)
    text = "one two three " * 10
    page.fill("#text", text)
    page.fill("#seed", "5")
    page.click("#speak-button")
    until(page, "document.getElementById('live-status').textContent.includes('Spoken')")
    assert page.inner_text("#underruns") == "0"
    assert page.inner_text("#speak-button") == "Speak"
    samples = downloaded(page, "#download", tmp_path / "spoken.wav")
    mel = torch.linspace(-8, -2, len(text)).repeat(8, 1)
    made = wavear.generate(small_wavenet(RATE, MEL), mel, seed=5)[0]
    audio.write(tmp_path / "right.wav", made, RATE)
    assert (samples == soundfile.read(tmp_path / "right.wav", dtype="int16")[0]).all()


def test_going_back_leaves_no_silence(free, opened):
    """The worklet plays on until it holds enough of the repeated stream."""
    page = opened(free)
    heard = page.evaluate(
        """async () => {
          globalThis.AudioWorkletProcessor = class { port = { postMessage() {} }; };
          globalThis.registerProcessor = (name, made) => { globalThis[name] = made; };
          await import("/worklet.js");
          const player = new globalThis.player({ processorOptions: { start: 300 } });
          const give = (epoch, position, value) => player.port.onmessage(
            { data: { epoch, position, samples: new Float32Array(200).fill(value) } });
          const outs = [];
          const take = () => {
            const out = new Float32Array(128);
            player.process([], [[out]]);
            outs.push(out[0], out[127]);
          };
          give(0, 0, 1); take(); give(0, 200, 1); take();
          give(1, 50, 2); take(); give(1, 250, 2); take();
          return [...outs, player.now.heard, player.underruns];
        }"""
    )
    assert heard == [0, 0, 1, 1, 1, 1, 2, 2, 178, 0]


def test_a_slider_is_heard_soon(free, opened):
    page = opened(free)
    page.click("#play")
    play_until(page, 1)
    page.evaluate(
        "const s = document.getElementById('temperature'); s.value = 0.5;"
        " s.dispatchEvent(new Event('change'))"
    )
    until(page, "document.getElementById('latency').textContent.includes('ms')")
    assert int(page.inner_text("#latency").split()[0]) < 2000
