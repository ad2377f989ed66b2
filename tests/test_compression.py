"""Compression is lossless, its size is the likelihood of `forward`, and other files are refused."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from engine_cases import make_gru, make_predictive, make_transformer, make_wavenet
from scipy.signal import lfilter

import wavear
from wavear.audio.grid import Grid
from wavear.common.errors import WavearError
from wavear.generation import compression
from wavear.generation.compression import compress, decompress
from wavear.generation.cpu.coding import LEAST_SHARE
from wavear.models.distributions import LAWS
from wavear.models.linear import Linear, LinearConfig

RATE = 22050
# SHA-256 of the files of `test_digests_of_files_pin_the_arithmetic`, their beginning.
ADAPTIVE, WAVENET = "151bf69d101c7a24", "4517bfdfd2685b4e"
VALUES = {"law": "logistic_mixture", "mixtures": 3, "classes": 65536}


def linear(**config: Any) -> Linear:
    model = Linear(LinearConfig(order=2, **config))
    model.set(np.array([1.6, -0.7]), 0.0, 0.01)
    return model.eval()


MODELS = {
    "adaptive": lambda: None,
    "wavenet": make_wavenet,
    "wavenet, mixture": lambda: make_wavenet(gain=1.0, **VALUES),
    "wavenet, gaussian": lambda: make_wavenet(law="gaussian", classes=65536),
    "wavenet, laplace": lambda: make_wavenet(law="laplace", classes=65536),
    "wavenet, mel": lambda: make_wavenet(mel=wavear.MelConfig(hop_length=100, bands=12)),
    "gru, gaussian": lambda: make_gru(law="gaussian", classes=65536),
    "transformer": make_transformer,
    "predictive": lambda: make_predictive(rate=RATE, speakers=0),
    "linear": lambda: linear(grid="linear"),
    "linear, gaussian": lambda: linear(law="gaussian"),
    "linear, companded": lambda: linear(domain="companded"),
}


def sound(samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Return 16-bit noise after a resonance, clipped in places, silent in others."""
    noise = np.random.default_rng(seed).normal(0, 0.05, (samples, channels))
    found = np.asarray(lfilter([1.0], [1.0, -1.6, 0.7], noise, axis=0))
    found[samples // 3 : samples // 2] = 0
    found[-(samples // 6) :] *= 20
    return np.clip(np.round(found * 32768), -32768, 32767).astype(np.int16)


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "x.wav", sound(600), RATE, subtype="PCM_16")
    return tmp_path / "x.wav"


def test_models_of_every_distribution_are_coded():
    networks = [make() for name, make in MODELS.items() if name.startswith("wavenet")]
    assert {model.config.law for model in networks} == set(LAWS)


COMPILED = {"gru, gaussian", "transformer", "predictive"}  # with kernels of their own


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in COMPILED else n for n in MODELS]
)
@pytest.mark.parametrize(("samples", "channels"), [(1, 1), (5000, 2)])
def test_every_sample_returns_and_the_size_is_that_of_forward(name, samples, channels, tmp_path):
    source, packed, back = tmp_path / "x.wav", tmp_path / "x.wvr", tmp_path / "y.wav"
    soundfile.write(source, sound(samples, channels), RATE, subtype="PCM_16")
    model = MODELS[name]()
    report = compress(source, packed, model)
    decompress(packed, back, model)
    assert source.read_bytes() == back.read_bytes()
    if model is None or model.config.mel is not None:
        return
    pcm = torch.from_numpy(sound(samples, channels).T.astype(np.float32) / 32768)
    nats = wavear.score(model, pcm).numpy()
    bits = -np.logaddexp(nats, math.log(LEAST_SHARE)).sum() / math.log(2)
    spans = Grid("linear", 65536).spans(model.grid)
    if spans is not None and model.grid.classes < 65536:
        counts = spans[1] - spans[0] + 1
        bits += float(np.log2(counts[model.grid.encode(pcm).numpy()]).sum())
    overhead = compression._HEADER.size + 4 * channels
    # A stream ends on a byte; two place a number in its range; zeros at its end are left out. Rare
    # codes are off by up to one of 2^32.
    assert abs(8 * (report.size - overhead) - bits) <= 24 * channels + 2e-3 * bits


def test_step_that_differs_from_forward_is_refused(wav, tmp_path, monkeypatch):
    """The fault: `forward` sees the samples one late after sample 300, and `step` does not."""
    model = make_wavenet()
    forward = type(model).forward

    def late(self, codes, *rest):
        codes = codes.clone()
        codes[:, 301:] = codes[:, 300:-1].clone()
        return forward(self, codes, *rest)

    monkeypatch.setattr(type(model), "forward", late)
    with pytest.raises(WavearError, match=r"step and forward .* differ at sample 3\d\d"):
        compress(wav, tmp_path / "x.wvr", model)
    assert not (tmp_path / "x.wvr").exists()


def test_digests_of_files_pin_the_arithmetic(wav, tmp_path):
    """A changed digest means that older files cannot be decoded: raise `ARITHMETIC` with it."""
    model = make_wavenet(gain=1.0, **VALUES)
    for number, parameter in enumerate(model.parameters()):
        values = np.sin(np.arange(parameter.numel()) * 0.7 + number) / 4
        parameter.data = torch.from_numpy(values.astype(np.float32)).view_as(parameter)
    for given, digest in ((None, ADAPTIVE), (model, WAVENET)):
        compress(wav, tmp_path / "x.wvr", given, overwrite=True)
        data = (tmp_path / "x.wvr").read_bytes()
        assert hashlib.sha256(data).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-9], "damaged: it has"),
        (lambda data: data[:60] + bytes([data[60] ^ 8]) + data[61:], "CRC-32"),
        (lambda data: data[:4] + b"\x63" + data[5:], "arithmetic 99"),
        (lambda data: b"RIFF" + data[4:], "is not a file that"),
        (lambda data: data[:15] + b"\xff" + data[16:], "damaged: its header has"),
        (lambda data: data[:22] + b"\x01" + data[23:], "was compressed with the model"),
    ],
)
def test_damaged_and_foreign_files_are_refused(damage, message, wav, tmp_path):
    compress(wav, tmp_path / "x.wvr")
    (tmp_path / "y.wvr").write_bytes(damage((tmp_path / "x.wvr").read_bytes()))
    with pytest.raises(WavearError, match=message):
        decompress(tmp_path / "y.wvr", tmp_path / "y.wav")


def test_unsuited_models_and_recordings_are_refused(wav, tmp_path):
    out = tmp_path / "x.wvr"
    with pytest.raises(WavearError, match="conditioned on speakers"):
        compress(wav, out, make_wavenet(speakers=2))
    with pytest.raises(WavearError, match="a rate of 22050 Hz and the model 16000 Hz"):
        compress(wav, out, make_wavenet(sample_rate=16000))
    soundfile.write(tmp_path / "y.wav", np.zeros(9), RATE, subtype="PCM_24")
    with pytest.raises(WavearError, match=r"y.wav: stores .* expected 16-bit PCM"):
        compress(tmp_path / "y.wav", out)
    compress(wav, tmp_path / "z.wvr")
    with pytest.raises(WavearError, match="without a checkpoint: drop --checkpoint"):
        decompress(tmp_path / "z.wvr", tmp_path / "z.wav", make_wavenet())
    compress(wav, out, make_wavenet())
    with pytest.raises(FileExistsError):
        compress(wav, out)
    with pytest.raises(WavearError, match="compressed with the model"):
        decompress(out, tmp_path / "y.flac", make_wavenet(seed=1))


def test_the_input_is_never_replaced_and_folders_are_made(wav, tmp_path):
    before = wav.read_bytes()
    with pytest.raises(FileExistsError, match="is the input itself"):
        compress(wav, tmp_path / "." / "x.wav", overwrite=True)
    out = tmp_path / "new" / "a.wav"  # a name that decompress takes, too
    compress(wav, out)
    with pytest.raises(FileExistsError, match="is the input itself"):
        decompress(out, out, overwrite=True)
    decompress(out, tmp_path / "newer" / "y.wav")
    assert wav.read_bytes() == before
    restored = soundfile.read(tmp_path / "newer" / "y.wav")[0]
    assert (restored == soundfile.read(wav)[0]).all()
