"""Waveforms: resampled, trimmed, normalized, faded."""

from __future__ import annotations

import librosa
import numpy as np
import pytest
import torch

from wavear import audio

# --- resampling and trimming

RATES = [
    (44100, 22050),
    (48000, 22050),
    (44100, 16000),
    (16000, 22050),
    (8000, 44100),
    (22050, 8000),
    (11025, 11024),
]


@pytest.mark.parametrize(("from_rate", "to_rate"), RATES)
def test_resampling_a_tone_gives_the_tone(from_rate, to_rate):
    # Delay and gain would show as well. The ends, where the tone is cut off, are excluded.
    frequency = min(from_rate, to_rate) // 4
    tone = np.sin(2 * np.pi * frequency * np.arange(from_rate) / from_rate)
    expected = np.sin(2 * np.pi * frequency * np.arange(to_rate) / to_rate)
    resampled = audio.resample(tone, from_rate, to_rate)
    assert resampled.shape == expected.shape
    margin = to_rate // 10
    # VHQ is accurate to 28 bits, 4e-9; its passband is less flat than that.
    np.testing.assert_allclose(
        resampled[margin:-margin], expected[margin:-margin], rtol=0, atol=1e-5
    )


def test_resampling_does_not_alias():
    tone = np.sin(2 * np.pi * 12_000 * np.arange(44100) / 44100)
    assert np.abs(audio.resample(tone, 44100, 22050)[2000:-2000]).max() < 1e-6


@pytest.mark.parametrize(("from_rate", "to_rate"), RATES)
def test_resampling_agrees_with_librosa(from_rate, to_rate):
    noise = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    theirs = librosa.resample(noise, orig_sr=from_rate, target_sr=to_rate, res_type="soxr_vhq")
    ours = audio.resample(noise, from_rate, to_rate)
    both = min(len(ours), len(theirs))
    assert abs(len(ours) - len(theirs)) <= 1
    np.testing.assert_allclose(ours[:both], theirs[:both], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_resampling_keeps_shape_and_type(dtype):
    waveform = torch.randn(2, 3, 1000).to(dtype)
    resampled = audio.resample(waveform, 16000, 8000)
    assert resampled.shape == (2, 3, 500)
    assert resampled.dtype == dtype
    alone = audio.resample(waveform[1, 2], 16000, 8000)
    torch.testing.assert_close(resampled[1, 2], alone, rtol=0, atol=0)
    assert isinstance(audio.resample(waveform.numpy(), 16000, 8000), np.ndarray)
    assert torch.equal(audio.resample(waveform, 8000, 8000), waveform)


@pytest.mark.parametrize(
    ("waveform", "rates", "message"),
    [
        (np.zeros(10), (500, 8000), "sample rate is 500 Hz"),
        (np.zeros(10), (8000, 500_000), "sample rate is 500000 Hz"),
        (np.zeros(0), (8000, 16000), r"float64 of shape \(0,\), expected floating point of shape"),
        (np.zeros(10, dtype=np.int16), (8000, 16000), "int16 of shape"),
    ],
)
def test_resampling_refuses_invalid_arguments(waveform, rates, message):
    with pytest.raises(ValueError, match=message):
        audio.resample(waveform, *rates)


@pytest.mark.parametrize("top_db", [20.0, 40.0, 60.0])
@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_trimming_equals_librosa(top_db, convert):
    envelope = np.concatenate(
        [np.full(9000, 1e-4), np.linspace(0, 1, 20_000), np.linspace(1, 0, 9000), np.zeros(7000)]
    )
    waveform = (envelope * np.random.default_rng(0).uniform(-1, 1, len(envelope))).astype(
        np.float32
    )
    _, (first, last) = librosa.effects.trim(waveform, top_db=top_db)
    trimmed = audio.trim_silence(convert(waveform), top_db=top_db, margin=0)
    assert type(trimmed) is type(convert(waveform))
    np.testing.assert_array_equal(np.asarray(trimmed), waveform[first:last])
    with_margin = audio.trim_silence(waveform, top_db=top_db, margin=700)
    np.testing.assert_array_equal(with_margin, waveform[max(first - 700, 0) : last + 700])


@pytest.mark.parametrize("samples", [0, 1, 100, 5000], ids=str)
def test_trimming_audio_without_silence_and_silence_only(samples):
    assert len(audio.trim_silence(np.zeros(samples))) == samples
    assert len(audio.trim_silence(np.ones(samples))) == samples


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"waveform": np.zeros((2, 10))},
            r"shape \(2, 10\), expected floating point of shape \(T,\)",
        ),
        ({"waveform": np.zeros(10, dtype=int)}, "int64 of shape"),
        ({"top_db": 0}, "top_db is 0, expected more than 0"),
        ({"margin": -1}, "margin is -1, expected 0 or more"),
        ({"hop_length": 0}, "hop_length is 0, expected 1 or more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_trimming_refuses_invalid_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        audio.trim_silence(**{"waveform": np.zeros(10), **options})


def test_normalize_peak():
    waveform = torch.tensor([[0.1, -0.2, 0.0], [0.0, 0.0, 0.0]])
    made = audio.normalize_peak(waveform, -6.0)
    assert abs(made[0].abs().max().item() - 10 ** (-6 / 20)) < 1e-6
    torch.testing.assert_close(made[0] / made[0, 1], waveform[0] / waveform[0, 1])
    assert not made[1].any()
    np.testing.assert_allclose(audio.normalize_peak(waveform.numpy(), -6.0), made, rtol=1e-6)
    with pytest.raises(ValueError, match="the peak is 3 dB, expected -200 to 0"):
        audio.normalize_peak(waveform, 3)


def test_fade():
    made = audio.fade(np.ones(1000, np.float32), 10_000, 10.0)
    assert made.dtype == np.float32
    assert (made[100:900] == 1).all()
    assert made[0] < 1e-3
    assert (np.diff(made[:100]) > 0).all()
    np.testing.assert_array_equal(made, made[::-1])
    # Two overlapping fades keep the level.
    np.testing.assert_allclose(made[:100] + made[:100][::-1], 1, atol=1e-6)
    assert torch.equal(audio.fade(torch.ones(9), 8000, 0.0), torch.ones(9))
    assert audio.fade(torch.ones(3), 1000, 1000.0).shape == (3,)
    with pytest.raises(ValueError, match="the fade is -1 ms"):
        audio.fade(torch.ones(3), 1000, -1)
