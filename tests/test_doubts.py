"""One rule for samples beyond full scale, and warnings about faults that can be read."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import soundfile
import torch
from small_training import config_of
from test_data import MEL, make_layout

import wavear
from wavear import WavearError, audio, train
from wavear.audio.scale import limited
from wavear.data.corpus import Treatment, find, open_corpus, prepare
from wavear.data.crops import read_span
from wavear.data.doubts import doubts
from wavear.generation.files import write_mels
from wavear.generation.jobs import plan

RATE = 8000
TONE = (0.9 * np.sin(np.arange(8000) * 0.3)).astype(np.float32)


def write(path, waveform, rate: int = RATE, subtype: str = "FLOAT"):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform, rate, subtype)
    return path


def found(folder, rate: int = RATE) -> list[str]:
    return doubts(prepare(find(folder), Treatment(rate))[0], rate)


# --- beyond full scale

LOUD = np.where(np.arange(8000) % 4 == 0, 2 * TONE, 0.1 * TONE)  # a part beyond
SHARE = float((np.abs(LOUD) > 1).mean())


def test_training_clips_and_warns_with_the_share(tmp_path, caplog):
    for n in range(2):
        write(tmp_path / f"data/{n}.wav", LOUD * (1 - 0.01 * n))
    (one, *_), expected = find(tmp_path / "data"), f"in up to {SHARE:.2%} of the samples (0.wav)"
    assert [expected in line for line in found(tmp_path / "data")] == [True]
    assert np.array_equal(read_span(one, RATE, 0, 8000), LOUD.astype(np.float32).clip(-1, 1))
    with caplog.at_level(logging.WARNING):
        config = config_of(tmp_path / "data", tmp_path / "run", max_steps=1, progress=True)
        train(config)
    assert sum("exceed full scale and are clipped" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize("factor", [32767, 4])
def test_files_mostly_beyond_full_scale_are_refused_everywhere(tmp_path, factor):
    file = write(tmp_path / "bad.wav", np.concatenate([np.zeros(20000), factor * TONE]))
    message = r"of the samples exceed full scale, expected \[-1, 1\]: divide 16-bit values by 32768"
    write(tmp_path / "good.wav", TONE)
    corpus = open_corpus(tmp_path, sample_rate=RATE)
    assert [name for name, why in corpus.bad if "divide 16-bit values by 32768" in why] == [
        "bad.wav"
    ]
    with pytest.raises(WavearError, match=rf"none of the files can be used.*{message}"):
        open_corpus(file, sample_rate=RATE)
    with pytest.raises(WavearError, match=message):
        limited(torch.from_numpy(factor * TONE), "a.wav", pytest.fail)


def test_mels_of_clipped_files_are_those_of_training(tmp_path, caplog):
    config = wavear.MelConfig(**MEL, fmax=4000)
    write(tmp_path / "loud.wav", LOUD)
    write(tmp_path / "int16.wav", 32767 * TONE)
    with caplog.at_level(logging.WARNING):
        report = write_mels(plan([tmp_path], tmp_path / "mels", ".npy"), config)
    assert f"loud.wav: {SHARE:.2%} of the samples exceed full scale and are clipped" in caplog.text
    clipped = torch.from_numpy(LOUD.astype(np.float32).clip(-1, 1))[None]
    expected = wavear.log_mel(clipped, config)[0].numpy()
    np.testing.assert_array_equal(np.load(tmp_path / "mels" / "loud.npy"), expected)
    assert [path.name for path, why in report.failed if "exceed full scale" in why] == ["int16.wav"]


def test_scores_clip_and_refuse(caplog):
    model, _ = make_layout()
    model = model.float().eval()
    waveform = torch.from_numpy(LOUD.astype(np.float32))
    with caplog.at_level(logging.WARNING):
        given = wavear.score(model, waveform)
    assert f"waveform: {SHARE:.2%} of the samples" in caplog.text
    torch.testing.assert_close(given, wavear.score(model, waveform.clamp(-1, 1)), rtol=0, atol=0)
    with pytest.raises(WavearError, match=r"waveform: .* exceed full scale"):
        wavear.score(model, torch.from_numpy(TONE) * 32767)


def test_levels_that_are_set_need_no_clipping(tmp_path):
    write(tmp_path / "a.wav", LOUD)
    opened, _ = prepare(find(tmp_path), Treatment(RATE, normalize="peak"))
    assert doubts(opened, RATE) == []


# --- other faults


def noise(seed: int, rate: int = RATE) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(2 * rate)


FAULTS = {
    "sound": (lambda n: noise(n), RATE, None),
    "low rate": (
        lambda n: noise(n),
        22050,
        r"3 of 3 recordings have a lower rate than the model's 22050 Hz, down to 8000 Hz: above 4",
    ),
    "upsampled": (
        lambda n: audio.resample(noise(n), RATE, 22050),
        22050,
        r"3 of 3 examined recordings are empty above 4000 Hz, as if upsampled from 8000 Hz",
    ),
    "silence": (
        lambda n: np.full(8000, 1e-4 * n),
        RATE,
        r"3 of 3 examined recordings are silent \(peaks up to -7[45] dB\)",
    ),
    "zeros": (lambda n: np.zeros(8000 + n), RATE, r"are silent \(peaks up to minus infinity dB\)"),
    "antiphase": (
        lambda n: np.stack([noise(n), -0.98 * noise(n)], 1),
        RATE,
        r"3 of 3 .* stereo in antiphase: the mono mix is at -40 dB of the channels' level",
    ),
    "stereo": (lambda n: np.stack([noise(n), noise(n + 9)], 1), RATE, None),
    "offset": (lambda n: noise(n) + 0.05, RATE, r"3 of 3 .* DC offset of up to 0\.05\d? of full"),
}


@pytest.mark.parametrize(("make", "rate", "message"), FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_faults_are_one_warning_with_the_number(tmp_path, make, rate, message, subtype):
    low = message is not None and "lower rate" in message
    for n in range(3):
        write(tmp_path / f"{n}.wav", make(n), RATE if low else rate, subtype)
    lines = found(tmp_path, rate)
    if message is None:
        assert lines == []
    else:
        (line,) = lines
        assert re.search(message, line), line
