"""Particles: streams side by side, of which those nearest to the mel continue."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import CASES, conditioning, piece, random_uniforms

import wavear
from wavear import MelConfig, WavearError, log_mel
from wavear.generation import sampler
from wavear.generation.conditioner import Conditioner
from wavear.generation.engines import make_engine
from wavear.generation.particles import Particles
from wavear.generation.reference import ReferenceEngine
from wavear.generation.settings import Sampling
from wavear.generation.streams import Stream
from wavear.mel.mel_files import read_mel
from wavear.models.checkpoint import SHIPPED, VOICE
from wavear.models.frames import shared, stacked

pytestmark = pytest.mark.usefixtures("one_thread")
MEL = MelConfig(sample_rate=8000, n_fft=128, window_length=128, hop_length=32, bands=8, fmax=None)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = wavear.WaveNetConfig(
        sample_rate=8000, mel=MEL, layers=3, stacks=1, residual_channels=8, skip_channels=8,
        head_channels=8, conditioning_channels=4,
    )  # fmt: skip
    made = wavear.WaveNet(config).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return made


def mel_for(model: Any, frames: int) -> torch.Tensor:
    """Return the mel (M, F) of noise whose level moves."""
    random = torch.Generator().manual_seed(frames)
    hop = model.config.mel.hop_length
    level = torch.rand(frames, generator=random).repeat_interleave(hop)
    noise = torch.randn(frames * hop, generator=random) * 0.2 * level
    return log_mel(noise[None], model.config.mel)[0]


def made(model: Any, mel: torch.Tensor, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    given: dict[str, Any] = {"particles": 5} | settings
    return wavear.generate(model, mel, return_log_probability=True, **given)


def test_the_audio_is_that_of_one_line_of_ancestors(model):
    """Its log-probabilities are those of its own codes, so states, codes and scores go together."""
    mel = mel_for(model, 40)
    audio, scores = made(model, mel)
    torch.testing.assert_close(scores, wavear.score(model, audio, mel[None]), rtol=1e-4, atol=1e-4)
    single = wavear.generate(model, mel)
    assert not torch.equal(audio, single)
    assert torch.equal(made(model, mel, particles=1)[0], single)


def test_each_particle_is_compared_by_its_own_past(model):
    mel = mel_for(model, 20)
    engine, conditioner = make_engine(model, 5)[1], Conditioner(model, [mel], None)
    particles = Particles(model, engine, mel, torch.zeros(0), list(range(6)))
    particles.run(640, shared(conditioner.span(0, 640), 5), 1.0)
    codes, _ = particles.chosen()
    nearest = particles._distances().argmin()  # type: ignore[union-attr]
    heard = model.grid.decode(torch.from_numpy(codes)).double()[-particles._kept :]
    assert torch.equal(particles._tail[nearest], heard)


@pytest.mark.parametrize("family", ["wavenet", "predictive"])
def test_engines_chunks_and_batches_make_the_same_audio(model, family, monkeypatch):
    if family == "predictive":
        torch.manual_seed(1)
        own = dataclasses.replace(MEL, n_fft=256, window_length=256, bands=20)
        model = wavear.PredictiveWaveNet(
            wavear.PredictiveWaveNetConfig(sample_rate=8000, mel=own, layers=2)
        ).eval()
    mels = [mel_for(model, frames) for frames in (12, 16)]
    both = wavear.generate(model, mels, particles=3, seed=[4, 5])
    alone = wavear.generate(model, mels[1], particles=3, seed=5)[0]
    assert torch.equal(both[1], alone)
    assert torch.equal(alone, wavear.generate(model, mels[1], particles=3, seed=5, threads=2)[0])
    reference = wavear.generate(model, mels[1], particles=3, seed=5, engine="reference")[0]
    torch.testing.assert_close(alone, reference, rtol=0, atol=4e-5)  # a step of the grid
    whole = sampler.chunks
    monkeypatch.setattr(sampler, "chunks", lambda *given: whole(*given, length=100))
    assert torch.equal(alone, wavear.generate(model, mels[1], particles=3, seed=5)[0])


@pytest.mark.parametrize(
    "change",
    [{}, {"centre": "start", "power": 2.0, "log_base": "db"}, {"window_length": 100, "scale": 0.5}],
)
def test_frames_and_distances_are_those_of_log_mel(change):
    config = dataclasses.replace(MEL, **change)
    model = wavear.WaveNet(wavear.WaveNetConfig(sample_rate=8000, mel=config, layers=2))
    audio = torch.randn(1, 32 * 20, dtype=torch.float64) * 0.1
    mel = log_mel(audio, config)[0]
    left, right = config.window_span
    for frame in (8, 11):
        stop = frame * 32 + right
        particles = Particles(model, None, mel, audio[0, :stop], [1, 2, 3])  # type: ignore[arg-type]
        window = audio[:, frame * 32 - left : stop]
        torch.testing.assert_close(particles._frames(window)[0], mel[:, frame])
        assert particles._distances().max() < 1e-9  # type: ignore[union-attr]
        between = Particles(model, None, mel, audio[0, : stop + 8], [1, 2])  # type: ignore[arg-type]
        assert between._distances()[0] > 1e-2  # type: ignore[index]


@pytest.mark.parametrize("name", ["wavenet", "predictive", "gru", "transformer", "linear", ""])
def test_copied_streams_equal_exported_and_imported_ones(name):
    if name == "linear":
        model = wavear.Linear(wavear.LinearConfig(order=4))
    else:
        case, settings = CASES[name or "wavenet"]
        model = case.make(**settings)
    engines = [
        make_engine(model, 5, "numba", threads=2)[1] if name else ReferenceEngine(model, 5)
        for _ in range(2)
    ]
    copied, imported = engines
    cond = conditioning(model, 5, 80)
    for start, stop in ((0, 37), (37, 80)):  # copies are made at both ends
        draws, part = random_uniforms(5, stop - start, start), piece(cond, start, stop)
        assert np.array_equal(copied.generate(draws, part), imported.generate(draws, part))
        copied.copy_streams([0, 3, 0], [1, 2, 4])  # across the groups of two threads
        for source, target in ((0, 1), (3, 2), (0, 4)):
            imported.load_state(target, imported.state(source))
    for n in range(5):
        expected, found = imported.state(n), copied.state(n)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_shared_conditioning_equals_a_copy_for_each_stream():
    case, settings = CASES["predictive"]
    model = case.make(**settings)
    one, draws = conditioning(model, 1, 80), random_uniforms(5, 80)
    expected = make_engine(model, 5)[1].generate(draws, stacked([one] * 5))
    assert shared(one, 5).gates.stride(0) == 0
    assert np.array_equal(make_engine(model, 5)[1].generate(draws, shared(one, 5)), expected)


def test_particles_are_nearer_to_the_mel_of_a_voice():
    """On the sentence that comes with the voice."""
    model = wavear.load()
    mel = read_mel(SHIPPED / VOICE / "sentence.npz", model.config.mel)[:, 20:80]
    distances = [
        (log_mel(made(model, mel, particles=n)[0], model.config.mel)[0] - mel).abs().mean()
        for n in (1, 4)
    ]
    assert distances[1] < 0.95 * distances[0]


def test_a_recording_is_continued(model):
    mel = mel_for(model, 40)
    prime = 0.9 * wavear.generate(model, mel)[0, :500]
    audio, scores = made(model, mel, prime=prime, include_prime=True)
    assert torch.equal(audio[0, :500], prime)
    assert audio.shape == (1, 40 * 32)
    after = wavear.score(model, audio, mel[None])[:, 500:]
    torch.testing.assert_close(scores, after, rtol=1e-4, atol=1e-4)


def test_what_does_not_go_with_particles_is_refused(model):
    mel = mel_for(model, 40)
    for settings, message in (
        ({"particles": 0}, "particles is 0; it must be a whole number of at least 1"),
        ({"best_of": 2}, "particles is 5: drop best_of 2"),
        ({"argmax": True}, "particles is 5: drop argmax"),
    ):
        with pytest.raises(WavearError, match=message):
            made(model, mel, **settings)
    free = wavear.WaveNet(wavear.WaveNetConfig(layers=2))
    with pytest.raises(WavearError, match="particles need a model of logarithmic mels"):
        wavear.generate(free, samples=10, particles=2)
    with pytest.raises(WavearError, match="particles are chosen by what follows"):
        Stream.with_settings(model, Sampling(particles=2))
