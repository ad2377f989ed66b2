"""The step of a training, its scores of held-out audio, and the state that it saves."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from small_training import (
    RATE,
    assert_same,
    config_of,
    state_of,
    timeless_rows,
)
from tqdm import tqdm

import wavear
from wavear import audio, train
from wavear.common.errors import WavearError
from wavear.data.corpus import Recording, open_corpus
from wavear.data.crops import Order, Segments, collate
from wavear.evaluation import held_out
from wavear.evaluation.held_out import Counts, baselines, held_out_bits, subset
from wavear.models.crop_loss import crop_loss, layout_of
from wavear.training.callbacks import ProgressBar
from wavear.training.module import TrainingModule, learning_rate
from wavear.training.state import load_state, save_state, state_paths

pytestmark = pytest.mark.usefixtures("one_thread")


def settings_model(**settings: Any) -> wavear.WaveNet:
    torch.manual_seed(0)
    return wavear.WaveNet(config_of("-", "-", **settings).model_config())


def batch_of(tones: Path, model: wavear.WaveNet, count: int) -> Any:
    segments = Segments(open_corpus(tones, sample_rate=RATE).train, layout_of(model, 512))
    return collate([segments[i] for i in range(count)])


def test_moving_average_follows_its_formula(tones, tmp_path, monkeypatch):
    weights, averages = [], []
    real = TrainingModule.update_average

    def record(module: TrainingModule) -> None:
        weights.append(module.model.get_parameter("embedding.weight").detach().clone())
        real(module)
        averages.append(module.average.get_parameter("embedding.weight").detach().clone())

    monkeypatch.setattr(TrainingModule, "update_average", record)
    result = train(config_of(tones, tmp_path / "run", max_steps=5, ema_decay=0.3))
    expected = averages[0]
    for n in range(2, 6):
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weights[n - 1]
    torch.testing.assert_close(averages[-1], expected)
    assert torch.equal(wavear.load(result.last).embedding.weight, averages[-1])
    assert not torch.allclose(weights[-1], averages[-1], atol=1e-4)


@pytest.mark.parametrize("hold", [0.0, 0.3])
def test_learning_rate_rises_holds_and_falls(hold):
    rates = [learning_rate(step, step / 1000, 0.5, 100, hold) for step in range(1001)]
    assert rates[0] == pytest.approx(0.5 / 100, rel=1e-3)
    assert np.argmax(rates) in range(95, 101)
    assert hold == 0 or rates[99:301] == [0.5] * 202
    middle = round(1000 * (1 + hold) / 2)
    assert rates[middle] == pytest.approx(0.5 * 0.51)
    assert rates[1000] == pytest.approx(0.5 * 0.02)
    assert (np.diff(rates[301:]) < 0).all()


def gradients(tones: Path, accumulate: int, world: int) -> list[torch.Tensor]:
    """Return the gradient of a batch, summed as `training_step` does, averaged as DDP does."""
    model = settings_model().double()
    layout = layout_of(model, 512)
    stream = Segments(open_corpus(tones, sample_rate=RATE).train, layout)
    found = []
    for rank in range(world):
        batch = collate([stream[i] for i in next(iter(Order(4, 0, rank, world)))])
        for part in batch.split(accumulate):
            losses, _ = crop_loss(model, part, layout)
            total = losses.sum() / (len(batch.source) * layout.segment) / world
            found.append(torch.autograd.grad(total, list(model.parameters())))
    return [torch.stack(terms).sum(0) for terms in zip(*found, strict=True)]


@pytest.mark.parametrize(("accumulate", "world"), [(4, 1), (2, 2)])
def test_parts_and_processes_do_not_change_the_gradient(tones, accumulate, world):
    """To 1e-12 in float64: the same terms, summed in another order."""
    for a, b in zip(gradients(tones, 1, 1), gradients(tones, accumulate, world), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_parts_do_not_change_the_run(tones, tmp_path):
    """With clipping, which scales gradients in place; to the rounding of float32 sums."""
    settings: dict[str, Any] = {"batch_size": 4, "max_steps": 3, "gradient_clip": 0.01}
    for accumulate in (1, 4):
        train(config_of(tones, tmp_path / str(accumulate), accumulate=accumulate, **settings))
    a, b = (state_of(tmp_path / name)["state_dict"] for name in "14")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=0)
    # Clipping and Adam would hide a factor.
    norms = [[row["gradient_norm"] for row in timeless_rows(tmp_path / name)] for name in "14"]
    values = [[float(norm) for norm in column if norm] for column in norms]
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_bf16_gradient_is_that_of_float32_up_to_rounding(tones, tmp_path):
    model = settings_model()
    batch, layout = batch_of(tones, model, 4), layout_of(model, 512)
    parameters = [p for p in model.parameters() if p.dim() > 1]
    found = []
    for dtype in (None, torch.bfloat16):
        losses, mask = crop_loss(model, batch, layout, dtype)
        assert losses.dtype == torch.float32
        gradient = torch.autograd.grad(losses.sum() / mask.sum(), parameters)
        assert all(g.dtype == torch.float32 for g in gradient)
        found.append((losses.sum().item(), torch.cat([g.flatten() for g in gradient])))
    assert found[1][0] == pytest.approx(found[0][0], rel=5e-3)
    assert torch.cosine_similarity(found[0][1], found[1][1], dim=0) > 0.99
    assert found[0][0] != found[1][0]
    settings: dict[str, Any] = {"max_steps": 20, "learning_rate": 1e-2}
    result = train(config_of(tones, tmp_path / "run", precision="bf16", **settings))
    assert result.bits_final < result.bits_before - 0.2
    assert wavear.load(result.best).embedding.weight.dtype == torch.float32


def test_input_noise_affects_the_past_only(tones):
    """Noise does not change the loss of a model whose past has no weight."""
    model = settings_model()
    batch, layout = batch_of(tones, model, 1), layout_of(model, 512)

    def loss(seed: int | None, codes: float = 3.0) -> torch.Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return crop_loss(model, batch, layout, None, generator, codes)[0]

    clean = loss(None)
    assert torch.equal(loss(1), loss(1))
    assert not torch.equal(loss(1), loss(2))
    assert not torch.equal(loss(1), clean)
    assert torch.equal(loss(1, 0.0), clean)
    with torch.no_grad():
        model.embedding.weight.zero_()
    assert torch.equal(loss(1), loss(None))


# --- bits


@pytest.mark.parametrize(("chunk", "world"), [(64, 1), (500, 3), (100000, 1)])
def test_held_out_bits_equal_score(tones, monkeypatch, chunk, world):
    """Per recording; the lengths are whole frames, since `score` extends others."""
    monkeypatch.setattr(held_out, "_EVALUATION_SEGMENT", chunk)
    model = settings_model().double()
    corpus = open_corpus(tones, sample_rate=RATE).train[:3]
    recordings = [dataclasses.replace(r, frames=r.frames // 64 * 64) for r in corpus]
    found = [held_out_bits(model, recordings, rank=n, world=world) for n in range(world)]
    total = np.sum([f.total for f in found], axis=0)
    samples = np.sum([f.samples for f in found], axis=0)
    for number, recording in enumerate(recordings):
        waveform = audio.read(recording.path, frames=recording.frames)
        expected = -wavear.score(model, waveform).sum().item() / math.log(2)
        assert samples[number] == recording.frames
        assert total[number] == pytest.approx(expected, rel=1e-6)
    assert found[0].per_sample == pytest.approx(found[0].total.sum() / found[0].samples.sum())


def test_baselines_of_a_known_chain():
    """The unigram equals the entropy of the chain's distribution, order 1 its entropy rate."""
    generator = np.random.default_rng(0)
    chain = np.array(
        [[0.9, 0.1, 0.0, 0.0], [0.2, 0.5, 0.3, 0.0], [0.0, 0.3, 0.4, 0.3], [0.0, 0.0, 0.6, 0.4]]
    )

    def counts(length: int) -> Counts:
        codes = [0]
        for u in generator.random(length):
            codes.append(min(int(np.searchsorted(np.cumsum(chain[codes[-1]]), u)), 3))
        pairs = np.zeros((4, 4), dtype=np.int64)
        np.add.at(pairs, (codes[:-1], codes[1:]), 1)
        return Counts(np.bincount(codes[1:], minlength=4), pairs)

    found = baselines(counts(60000), counts(60000))
    values, vectors = np.linalg.eig(chain.T)
    law = np.real(vectors[:, np.argmax(np.real(values))])
    law /= law.sum()
    logarithms = np.log2(chain, out=np.zeros_like(chain), where=chain > 0)
    assert found["uniform"] == 2
    assert found["unigram"] == pytest.approx(-(law * np.log2(law)).sum(), abs=0.02)
    assert found["markov"] == pytest.approx(-(law @ (chain * logarithms)).sum(), abs=0.02)
    unseen = Counts(np.array([1, 1, 1]), np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]]))
    seen = Counts(np.array([5, 0, 0]), np.array([[5, 0, 0], [0, 0, 0], [0, 0, 0]]))
    assert all(math.isfinite(bits) for bits in baselines(seen, unseen).values())


def test_counts_equal_a_loop_over_codes(tones, monkeypatch):
    monkeypatch.setattr(held_out, "_READ_SECONDS", 0.05)  # recordings are read in several blocks
    recordings = open_corpus(tones, sample_rate=RATE).train
    model = settings_model()
    counted = Counts.of(recordings, layout_of(model, 64), model.grid)
    single, pairs = np.zeros(32, dtype=int), np.zeros((32, 32), dtype=int)
    for recording in recordings:
        codes = wavear.mulaw_encode(audio.read(recording.path), 32).numpy()
        codes = codes[: recording.frames // 64 * 64]
        np.add.at(single, codes, 1)
        np.add.at(pairs, (np.concatenate([[16], codes[:-1]]), codes), 1)
    assert np.array_equal(counted.single, single)
    assert counted.pairs is not None
    assert np.array_equal(counted.pairs, pairs)


def test_long_recordings_are_validated_in_part():
    sizes = (("a", 100_000), ("b", 3000))
    recordings = [Recording(Path(name), name, 7, frames, RATE) for name, frames in sizes]
    assert [(r.name, r.start, r.frames) for r in subset(recordings, 50_000)] == [("a", 7, 50_000)]
    assert [r.frames for r in subset(recordings, 10)] == [4096]
    assert [r.frames for r in subset(recordings, 101_000)] == [100_000]
    assert subset(recordings, 103_000) == recordings == subset(recordings, 1e9)
    assert subset(recordings[::-1], 10)[0].frames == 3000


# --- the state on disk


def test_state_round_trips(tmp_path):
    tensor = torch.randn(3, 2)
    state = {
        "int keys": {0: {"step": torch.tensor(3.0)}, 1: []},
        "bf16": tensor.bfloat16(),
        "shared": [tensor, tensor, tensor.t()],
        "numbers": (1, 2.5, float("inf"), True, None, "text"),
        "empty": {},
    }
    save_state(state, tmp_path / "s.safetensors")
    found = load_state(tmp_path / "s.safetensors")
    assert_same(found, state)
    assert isinstance(found["numbers"], tuple)


def test_unsupported_values_are_named_and_leave_the_old_state(tmp_path):
    path = tmp_path / "s.safetensors"
    save_state({"a": 1}, path)
    with pytest.raises(TypeError, match=r"state\.outer\.1 is of type (Posix|Windows)?Path"):
        save_state({"outer": [1, Path("x")]}, path)
    with pytest.raises(TypeError, match="state has a key of type tuple"):
        save_state({(1, 2): 3}, path)  # type: ignore
    assert load_state(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["s.safetensors"]


def test_damaged_states_are_refused(tones, tmp_path):
    out = tmp_path / "run"
    train(config_of(tones, out, max_steps=1))
    path, first = state_paths(out)
    first.unlink()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WavearError, match=r"holds no good state .*1\.safetensors is damaged or"):
        train(config_of(tones, out, max_steps=2, resume=True))
    path.write_bytes((out / "last" / "model.safetensors").read_bytes())
    with pytest.raises(WavearError, match=r"1\.safetensors is not a training state: weights only"):
        train(config_of(tones, out, max_steps=2, resume=True))


def test_a_damaged_held_out_file_has_no_unigram_bits(tones, tmp_path):
    """Its codes cannot be counted: -0.000 bits would be a number of nothing."""
    held = tmp_path / "held"
    held.mkdir()
    waveform = np.full(40000, 0.1, np.float32)
    waveform[30000] = np.nan
    soundfile.write(held / "a.wav", waveform, RATE, "FLOAT")
    result = train(config_of(tones, tmp_path / "run", validation=str(held), max_steps=1))
    assert result.held_out.keys() == {"model", "uniform"}


def test_progress_is_the_share_of_the_run_and_resumes(monkeypatch: pytest.MonkeyPatch):
    """Half of the run was done before; 10 s then took it to three quarters: 10 s are left."""
    monkeypatch.setattr("wavear.training.callbacks._training", lambda module: module)
    bar: Any = ProgressBar(SimpleNamespace(shown={"loss": "1"}))  # type: ignore[arg-type]
    bar._trainer = trainer = SimpleNamespace(global_step=100, is_global_zero=True)
    module = SimpleNamespace(progress=0.5)
    module.progress = 1.4  # of a time that the first validation took
    bar.on_train_start(trainer, module)
    assert bar.train_progress_bar.n == 1
    module.progress = 0.5
    bar.on_train_start(trainer, module)
    bar.on_train_epoch_start(trainer, module)
    module.progress = 0.75
    bar.on_train_batch_end(trainer, module, None, None, 0)
    shown = bar.train_progress_bar.format_dict | {"elapsed": 10.0}
    text = tqdm.format_meter(**shown)
    assert "training:  75%" in text
    assert "00:10 left" in text
    assert "step=100" in text
    module.progress = 0.8
    for interval, expected in ((bar.interval, 0.75), (0.0, 0.8)):  # seconds to the next look
        bar.interval = interval
        bar.on_train_batch_end(trainer, module, None, None, 0)
        assert bar.train_progress_bar.n == expected
