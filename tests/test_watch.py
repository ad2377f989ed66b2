"""The watch on generated audio finds failures, and none in recordings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import wavear
from wavear import (
    MelConfig,
    WaveNet,
    WaveNetConfig,
    audio,
    log_mel,
    mulaw_decode,
    mulaw_encode,
    watch,
)

RATE = 8000
MEL = MelConfig(
    sample_rate=RATE, n_fft=256, window_length=256, hop_length=80, bands=20, fmax=4000.0
)


def kinds(waveform: Any, **settings: Any) -> list[str]:
    return [finding.kind for finding in watch(waveform, RATE, **settings)]


def voice(seconds: float, level: float = 0.3) -> np.ndarray:
    """Return a buzz of varying pitch and level, with noise 40 dB below."""
    time = np.arange(int(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(120 + 20 * np.sin(3 * time)) / RATE
    buzz = sum(np.sin(k * phase) / k for k in range(1, 15)) * (0.6 + 0.4 * np.sin(7 * time))
    noise = np.random.default_rng(0).normal(0, 0.01, len(time))
    return (level * (buzz / 2 + noise)).astype(np.float32)


def model(**settings: Any) -> WaveNet:
    torch.manual_seed(0)
    sizes = dict.fromkeys(
        ("residual_channels", "skip_channels", "head_channels", "conditioning_channels"), 8
    )
    return WaveNet(WaveNetConfig(layers=4, stacks=2, sample_rate=RATE, **sizes, **settings)).eval()


def generated(network: WaveNet, seconds: float = 2.0, **settings: Any) -> np.ndarray:
    return wavear.generate(network, samples=int(seconds * RATE), seed=1, **settings)[0].numpy()


# ---- failures of models


def test_an_untrained_model_makes_noise():
    (finding,) = [found for found in watch(generated(model()), RATE) if found.kind == "noise"]
    assert finding.start == 0
    assert finding.stop > 1.9
    assert "white noise (-" in finding.what
    assert "--temperature 0.8" in finding.advice


def test_a_model_of_only_silence_is_reported_as_silence():
    network = model()
    with torch.no_grad():
        network.head[3].bias[128] += 50  # type: ignore[union-attr]
    (finding,) = watch(generated(network), RATE)
    assert (finding.kind, finding.start, round(finding.stop)) == ("silence", 0.0, 2)


def test_a_model_of_a_single_code_is_reported_as_constant():
    network = model()
    with torch.no_grad():
        network.head[3].bias[200] += 50  # type: ignore[union-attr]
    found = watch(generated(network), RATE)
    assert [finding.kind for finding in found] == ["constant"]
    value = mulaw_decode(torch.tensor([200])).item()
    assert f"a constant ({value:.2f})" in found[0].what


def test_argmax_of_a_model_is_reported_as_a_loop():
    """Without randomness the embedding leads through a cycle of three codes."""
    network = model()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        # Code c leads to c + 40 of 120, 160, 200, by one-hot rows through the last layer's skip.
        network.embedding.weight[[120, 160, 200], [0, 1, 2]] = 1.0
        last: Any = network.blocks[-1]
        last.dilated.weight[:8, 8:] = 10 * torch.eye(8)  # tanh of the current sample
        last.dilated.bias[8:] = 10.0  # open gates
        last.skip.weight[:8] = torch.eye(8)
        head: Any = network.head
        head[1].weight[:8] = torch.eye(8)
        head[3].weight[160, 0] = head[3].weight[200, 1] = head[3].weight[120, 2] = 100.0
        head[3].bias[120] = 1.0
    with pytest.warns(UserWarning, match="collapses"):
        waveform = generated(network, argmax=True)
    assert len(np.unique(waveform[100:])) == 3
    (finding,) = [found for found in watch(waveform, RATE) if found.kind == "loop"]
    assert f"a loop of {1000 * 3 / RATE:.1f} ms" in finding.what
    assert finding.start < 0.01
    assert "argmax" in finding.advice


def test_noise_is_found_where_it_begins():
    waveform = np.concatenate(
        [voice(2), np.random.default_rng(0).normal(0, 0.2, 2 * RATE).astype(np.float32)]
    )
    (finding,) = watch(waveform, RATE)
    assert finding.kind == "noise"
    assert abs(finding.start - 2) < 0.1
    assert abs(finding.stop - 4) < 0.1


def test_silence_is_found_where_it_begins():
    codes = mulaw_encode(torch.from_numpy(voice(2)))
    codes[RATE:] = 128 + torch.arange(len(codes) - RATE) % 2  # models make silence of two codes
    (finding,) = watch(mulaw_decode(codes), RATE)
    assert finding.kind == "silence"
    assert abs(finding.start - 1) < 0.05


def test_clipping_is_reported_with_its_share():
    clean = voice(2)
    assert kinds(clean) == []
    (finding,) = watch(np.clip(8 * clean, -1, 1), RATE)
    assert finding.kind == "clipping"
    share = (np.abs(8 * clean) >= 0.999).mean()
    assert f"{share:.2%} of the samples" in finding.what
    # A single sample at full scale is not clipping.
    assert kinds(np.clip(clean / np.abs(clean).max(), -1, 1)) == []


# ---- compared with a mel


def test_audio_quieter_or_louder_than_the_mel_is_found():
    waveform = voice(3)
    mel = log_mel(torch.from_numpy(waveform)[None], MEL)[0]
    assert kinds(waveform, mel=mel, config=MEL) == []
    broken = waveform.copy()
    broken[RATE : 2 * RATE] = 0
    (finding,) = watch(broken, RATE, mel=mel, config=MEL)
    assert finding.kind == "quieter"
    assert abs(finding.start - 1) < 0.05
    assert abs(finding.stop - 2) < 0.05
    silent = log_mel(torch.from_numpy(broken)[None], MEL)[0]
    assert kinds(broken, mel=silent, config=MEL) == []
    found = watch(waveform, RATE, mel=silent, config=MEL)
    assert [finding.kind for finding in found] == ["louder"]


@pytest.mark.parametrize(
    "base", [{"log_base": "10"}, {"log_base": "db"}, {"log_base": "db", "power": 2.0}], ids=str
)
def test_audio_quieter_than_a_mel_of_any_convention_is_found(base):
    config = MelConfig(**{**MEL.to_dict(), **base})
    waveform = voice(2)
    mel = log_mel(torch.from_numpy(waveform)[None], config)[0]
    assert kinds(waveform, mel=mel, config=config) == []
    # A difference of 20 dB is not reported, one of 26 dB is.
    assert kinds(waveform / 10, mel=mel, config=config) == []
    (finding,) = watch(waveform / 20, RATE, mel=mel, config=config)
    assert "dB quieter than the mel" in finding.what
    assert abs(int(finding.what.split()[0]) - 26) <= 1


def test_silence_that_the_mel_contains_is_not_found():
    waveform = np.zeros(2 * RATE, np.float32)
    mel = log_mel(torch.from_numpy(waveform)[None], MEL)[0]
    assert kinds(waveform) == ["silence"]
    assert kinds(waveform, mel=mel, config=MEL) == []


# ---- audio without failures


@pytest.mark.parametrize("seconds", [0.001, 0.1, 0.9])
def test_short_audio_has_no_finding(seconds):
    assert kinds(np.zeros(max(int(seconds * RATE), 1))) == []


def test_a_pause_is_not_found():
    waveform = np.concatenate(
        [voice(1), np.zeros(2 * RATE, np.float32), voice(1), np.zeros(RATE // 2, np.float32)]
    )
    assert kinds(waveform) == []


def test_quiet_audio_is_not_silence():
    assert kinds(voice(4, level=0.01)) == []  # -40 dB


@pytest.mark.parametrize(
    "folder", ["kerstin_de", "ljspeech_mini", "cmu_arctic_slt", "vctk_mini", "sms_tools_sounds"]
)
def test_recordings_have_no_findings(folder, data_dir: Path):
    paths = sorted(
        path for path in (data_dir / folder).rglob("*") if path.suffix in (".wav", ".flac")
    )
    for path in paths[:: max(1, len(paths) // 8)]:
        waveform = audio.read(path, 22050, frames=8 * 22050)
        through_codes = mulaw_decode(mulaw_encode(waveform))
        assert watch(waveform, 22050) == []
        assert (
            watch(
                through_codes,
                22050,
                mel=log_mel(waveform[None], MelConfig())[0],
                config=MelConfig(),
            )
            == []
        )


def test_shapes():
    with pytest.raises(ValueError, match=r"shape \(1, 100\), expected \(T,\)"):
        watch(torch.zeros(1, 100), RATE)
