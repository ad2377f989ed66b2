"""Whatever a user passes is used or refused by a `WavearError` in one line."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import MEL, tiny

import wavear
from wavear import MelConfig, Stream, audio

FREE, FOLLOWS = tiny(), tiny(mel=MEL)
FRAMES = torch.full((10, 5), -5.0)
WAVE = torch.zeros(200)

WRONG: dict[str, Any] = {
    "none": None,
    "text": "a.wav",
    "path": Path("a.wav"),
    "bytes": b"x",
    "zero": 0,
    "negative": -1,
    "nan": math.nan,
    "infinite": math.inf,
    "huge": 10**30,
    "list": [],
    "mixed": [1, "a", None],
    "ragged": [[1.0, 2.0], [3.0]],
    "dictionary": {},
    "object": object(),
    "complex": 1j,
    "config": MEL,
    "model_config": FOLLOWS.config,
    "model": FOLLOWS,
    "scalar": torch.tensor(1.0),
    "empty": torch.zeros(0),
    "cube": torch.zeros(2, 3, 4, 5),
    "integers": torch.zeros(10, 5, dtype=torch.int64),
    "imaginary": torch.zeros(10, 5, dtype=torch.complex64),
    "not_finite": torch.full((100,), math.nan),
    "gradient": torch.zeros(10, 5, requires_grad=True),
    "meta": torch.zeros(100, device="meta"),
    "sparse": torch.zeros(10, 5).to_sparse(),
    "float8": torch.zeros(10, 5).to(torch.float8_e4m3fn),
    "int16": np.zeros(100, np.int16),
    "objects": np.array([None, 1], object),
    "words": np.array(["a", "b"]),
    "dates": np.zeros(3, "M8[s]"),
    "big_endian": np.zeros(100, ">f4"),
    "reversed": np.zeros((10, 5), np.float32)[:, ::-1],
}

CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "log_mel": (wavear.log_mel, {"waveform": WAVE, "config": MEL}),
    "generate": (
        wavear.generate,
        {
            "model": FREE, "mel": None, "samples": 4, "speaker": None, "seed": 0,
            "temperature": 1.0, "top_k": None, "top_p": None, "prime": None,
            "engine": "reference", "weights": "float32", "threads": None,
        },
    ),
    "generate_mel": (wavear.generate, {"model": FOLLOWS, "mel": FRAMES, "engine": "reference"}),
    "score": (
        wavear.score,
        {"model": FREE, "waveform": WAVE, "mel": None, "speaker": None, "grid": None},
    ),
    "watch": (
        wavear.watch, {"waveform": WAVE, "sample_rate": 8000, "mel": FRAMES, "config": MEL}
    ),
    "convert_mel": (wavear.convert_mel, {"mel": FRAMES, "source": MEL, "target": MEL}),
    "judge_mel": (wavear.judge_mel, {"mel": FRAMES, "model": FOLLOWS, "seconds": None}),
    "adapt_mel": (
        wavear.adapt_mel, {"mel": FRAMES, "model": FOLLOWS, "source": None, "seconds": None}
    ),
    "mulaw_encode": (wavear.mulaw_encode, {"waveform": WAVE, "classes": 256}),
    "mulaw_decode": (wavear.mulaw_decode, {"codes": torch.zeros(3).long(), "classes": 256}),
    "read": (audio.read, {"path": "a.wav", "sample_rate": None, "start": 0, "frames": None}),
    "write": (audio.write, {"path": "o.wav", "waveform": WAVE, "sample_rate": 8000}),
    "fade": (audio.fade, {"waveform": WAVE, "sample_rate": 8000, "milliseconds": 5.0}),
    "normalize_peak": (audio.normalize_peak, {"waveform": WAVE, "decibels": -1.0}),
    "resample": (audio.resample, {"waveform": WAVE, "from_rate": 8000, "to_rate": 16000}),
    "trim_silence": (
        audio.trim_silence,
        {"waveform": WAVE, "top_db": 60.0, "margin": 1, "frame_length": 20, "hop_length": 5},
    ),
    "preset": (MelConfig.preset, {"name": "hifigan"}),
    "push": (lambda mel: Stream(FOLLOWS, engine="reference").push(mel), {"mel": FRAMES}),
    "stream": (Stream, {"model": FREE, "seed": 0, "temperature": 1.0, "engine": "reference"}),
}  # fmt: skip
CASES = [(name, argument) for name, (_, given) in CALLS.items() for argument in given]


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_any_argument_is_used_or_refused_in_one_line(
    name: str, argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another exception is a traceback of the command line, or of a notebook."""
    monkeypatch.chdir(tmp_path)
    audio.write("a.wav", WAVE, 8000)
    function, given = CALLS[name]
    for kind, value in WRONG.items():
        message = ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                function(**{**given, argument: value})
            except (wavear.WavearError, OSError) as error:
                message = str(error)
            except Exception as error:
                pytest.fail(f"{name}({argument}={kind}): {type(error).__name__}: {error}")
        assert "\n" not in message, kind


@pytest.mark.parametrize("kind", [lambda x: x, np.asarray], ids=["tensor", "array"])
def test_log_mel_of_arrays_and_single_waveforms(kind: Callable[..., Any]):
    waveform = torch.randn(400) * 0.1
    expected = wavear.log_mel(waveform[None], MEL)
    assert torch.equal(wavear.log_mel(kind(waveform[None]), MEL), expected)
    assert torch.equal(wavear.log_mel(kind(waveform), MEL), expected[0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: wavear.log_mel(WAVE, FOLLOWS.config), "pass model.config.mel"),  # type: ignore[arg-type]
        (lambda: wavear.generate("runs/best", samples=3), "'runs/best'"),  # type: ignore[arg-type]
        (lambda: wavear.generate("runs/best", samples=3), "wavear.load"),  # type: ignore[arg-type]
        (lambda: wavear.score(FREE, "a.wav"), "wavear.audio.read"),  # type: ignore[arg-type]
        (lambda: audio.read("x.raw"), "convert them to WAV"),
        (lambda: wavear.Stream(FOLLOWS).push("x"), "read the file first"),  # type: ignore[arg-type]
        (lambda: wavear.StreamBatch(FREE).add(state={"a": 1}), "state is a dict"),  # type: ignore[arg-type]
        (lambda: wavear.watch(WAVE, 0), "sample_rate is 0"),
    ],
)
def test_refusals_name_the_remedy(call: Callable[[], Any], words: str):
    with pytest.raises(wavear.WavearError, match=words):
        call()
