"""`wavear.display` shows sound, pictures and curves as self-contained HTML."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import wavear
from wavear import display

RATE = 16000
TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)


def embedded(view: display.View, kind: str) -> list[bytes]:
    """Return the contents of the data URIs of a MIME type."""
    return [
        base64.b64decode(data)
        for data in re.findall(rf'"data:{kind};base64,([^"]+)"', view._repr_html_())
    ]


def pixels(png: bytes) -> np.ndarray:
    import matplotlib.image

    return matplotlib.image.imread(io.BytesIO(png), format="png")


@pytest.mark.parametrize("waveform", [TONE, torch.from_numpy(TONE)[None]], ids=["array", "tensor"])
def test_a_player_holds_the_samples(waveform):
    (data,) = embedded(display.hear(waveform, RATE), "audio/flac")
    samples, rate = soundfile.read(io.BytesIO(data))
    assert rate == RATE
    assert np.abs(samples - TONE).max() <= 2**-15  # 16 bits


def test_a_picture_shows_the_pitch():
    """A tone an octave higher is brighter at another height, and only there."""
    octave = (0.5 * np.sin(2 * np.pi * 880 * np.arange(RATE) / RATE)).astype(np.float32)
    drawn = [pixels(embedded(display.hear(x, RATE), "image/png")[0]) for x in (TONE, octave)]
    assert drawn[0].shape == drawn[1].shape
    column = drawn[0].shape[1] // 2
    below = drawn[0].shape[0] // 2  # the mel is the lower part of the picture
    heights = [int(x[below:-70, column, :3].sum(-1).argmax()) for x in drawn]
    assert heights[1] < heights[0] - 20  # higher in the picture


def test_a_comparison_shares_colours():
    """A quieter copy is drawn darker, not with colours of its own."""
    view = display.side_by_side({"recording": TONE, "copy": TONE / 100}, RATE)
    loud, quiet = (pixels(png)[..., :3] for png in embedded(view, "image/png"))
    (single,) = embedded(display.hear(TONE / 100, RATE), "image/png")
    assert quiet[200:-70].mean() < pixels(single)[200:-70, ..., :3].mean() - 0.02
    assert len(embedded(view, "audio/flac")) == 2
    assert loud.shape == quiet.shape


def test_labels_are_text():
    view = display.hear(TONE, RATE, "<b>x</b>")
    assert "<b>" not in view.html
    assert "&lt;b&gt;" in view.html


def test_a_curve_is_of_a_run_or_its_checkpoint(tmp_path: Path):
    (tmp_path / "last").mkdir()
    rows = "".join(f"{step},{8 - step / 100},\n" for step in range(0, 300, 10))
    (tmp_path / "metrics.csv").write_text("step,train_bits,validation_bits\n" + rows)
    views = [display.curve(tmp_path), display.curve(tmp_path / "last")]
    assert embedded(views[0], "image/png") == embedded(views[1], "image/png") != []


def test_a_folder_without_a_curve_is_refused(tmp_path: Path):
    with pytest.raises(wavear.WavearError, match=r"has no metrics\.csv with a curve"):
        display.curve(tmp_path)


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (np.zeros((2, 100), np.float32), r"shape \(2, 100\), expected"),
        (np.zeros(100, np.int16), "int16 of shape"),
        (np.zeros(0, np.float32), r"shape \(0,\)"),
        (np.full(100, np.nan, np.float32), "non-finite"),
    ],
)
def test_a_bad_waveform_is_refused(waveform, message):
    with pytest.raises(wavear.WavearError, match=message):
        display.hear(waveform, RATE)
