"""Training of every family; models that carry a state read recordings in lanes."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_families import MODELS, make, random_codes

from wavear import TrainConfig, audio, load, score, train
from wavear.cli.commands import main
from wavear.data.corpus import open_corpus
from wavear.data.crops import Layout
from wavear.training.lanes import VISIT, Carried, Lanes
from wavear.training.state import load_state

UNCONDITIONAL: dict[str, Any] = {"unconditional": True, "mel_hop_length": None}
# Fields of `TrainConfig` that make a small model of each family.
TRAINED: dict[str, dict[str, Any]] = {
    "wavenet": {
        "layers": 3, "stacks": 1, "residual_channels": 8, "skip_channels": 8, "head_channels": 8,
    },
    # Unconditional: a network would memorise the mels of three tones and fail on the fourth.
    "gru": {
        "layers": 1, "channels": 16, "head_channels": 16, "segment": 240, **UNCONDITIONAL,
    },
    "transformer": {
        "layers": 2, "channels": 16, "heads": 2, "window": 8, "patch": 4, "learning_rate": 3e-3,
        **UNCONDITIONAL,
    },
    "linear": {"order": 8},
}  # fmt: skip


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("recordings")
    for n in range(4):
        t = np.arange(3000 + 700 * n) / 8000
        tone = 0.4 * np.sin(2 * np.pi * (200 + 50 * n) * t)
        audio.write(folder / f"{n}.wav", tone.astype(np.float32), 8000)
    return folder


def settings(family: str, recordings: Any, out: Any, **changes: Any) -> TrainConfig:
    fixed: dict[str, Any] = {
        "segment": 480, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 5, "max_steps": 40,
        "sample_rate": 8000, "mel_hop_length": 64, "precision": "32", "device": "cpu",
        "progress": False, "sample_seconds": 0.0, "family": family, "data": recordings, "out": out,
    }  # fmt: skip
    return TrainConfig(**{**fixed, **TRAINED[family], **changes})


@pytest.mark.parametrize("family", TRAINED)
def test_training_learns_and_the_command_line_uses_the_model(family, recordings, tmp_path, capsys):
    result = train(settings(family, recordings, tmp_path / "run"))
    assert result.bits_final < result.bits_before - 0.5
    model = load(result.best)
    assert model.family == family
    held_out = audio.read(sorted(recordings.glob("*.wav"))[0], 8000)
    bits = -score(model, held_out[:1000]).mean() / math.log(2)
    assert bits < 8
    assert main(["info", str(result.best)]) == 0
    assert family in capsys.readouterr().out
    if not model.conditioned:
        made = tmp_path / "made.wav"
        assert main(["generate", str(result.best), "--seconds", "0.05", "--out", str(made)]) == 0
        assert audio.read(made, 8000).numel() == 400


@pytest.mark.parametrize(("family", "law"), [("wavenet", "logistic_mixture"), ("gru", "gaussian")])
def test_distributions_over_values_train(family, law, recordings, tmp_path):
    result = train(settings(family, recordings, tmp_path / "run", law=law, **UNCONDITIONAL))
    assert result.bits_final < result.bits_before - 0.5
    assert result.held_out["uniform"] == 16


@pytest.mark.parametrize("family", ["gru", "transformer"])
def test_resume_equals_uninterrupted(family, recordings, tmp_path):
    """Weights and carried states, bit for bit; a state goes from batch to batch."""
    often = {"max_steps": 12, "checkpoint_every": 6}
    train(settings(family, recordings, tmp_path / "whole", **often))
    before, after = (
        load_state(path)["carried"] for path in sorted((tmp_path / "whole/states").iterdir())[-2:]
    )
    assert all(t.abs().sum() > 0 for t in before.values() if t.is_floating_point())
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())
    train(settings(family, recordings, tmp_path / "cut", **often, validate_every=100))
    for path in sorted((tmp_path / "cut" / "states").glob("*"))[1:]:
        if "12" in path.name:
            path.unlink()
    train(settings(family, recordings, tmp_path / "cut", **often, resume=True))
    for name, tensor in load(tmp_path / "whole" / "last").state_dict().items():
        assert torch.equal(tensor, load(tmp_path / "cut" / "last").state_dict()[name]), name


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="family is 'rnn', it must be one of predictive, wavenet"):
        TrainConfig(data="x", out="y", family="rnn")


# ---- lanes


LAYOUT = Layout(
    segment=100, context=0, receptive_field=0, hop=1, lookahead=0, lookback=0, mel=None,
    sample_rate=8000,
)  # fmt: skip


def test_lanes_read_recordings_in_order_and_every_part_equally_often(recordings):
    corpus, layout = (
        open_corpus(str(recordings), sample_rate=8000, validation_fraction=0.01),
        LAYOUT,
    )
    lanes = Lanes(corpus.train, layout, batch_size=3, seed=1)
    counts = [np.zeros(r.frames, dtype=int) for r in corpus.train]
    for visit in range(400):
        plan = lanes.visit(0, visit)
        assert len(plan) == VISIT
        assert plan == Lanes(corpus.train, layout, batch_size=3, seed=1).visit(0, visit)
        before = None
        for source, start, begins in plan:
            assert begins or (before is not None and before == (source, start - 100))
            counts[source][start : start + 100] += 1
            before = (source, start)
    means = [count.mean() for count in counts]
    assert min(means) > 0.8 * max(means)
    assert min(count[:-100].min() for count in counts) > 0.6 * np.mean(means)
    # Items follow the plan.
    for batch in (0, 1, VISIT - 1, VISIT, 5 * VISIT + 3):
        for lane in range(3):
            item = lanes[batch * 3 + lane]
            source, start, begins = lanes.visit(lane, batch // VISIT)[batch % VISIT]
            assert (item["source"], item["start"], item["begins"]) == (source, start, begins)
    assert lanes.visit(0, 0) != lanes.visit(1, 0)


def test_an_unreadable_file_adds_no_loss(recordings, tmp_path):
    for path in recordings.glob("*.wav"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    corpus = open_corpus(str(tmp_path), sample_rate=8000, validation_fraction=0.01)
    lanes = Lanes(corpus.train, LAYOUT, batch_size=1)
    source = lanes.visit(0, 0)[0][0]
    (tmp_path / corpus.train[source].name).write_bytes(b"gone")
    item = lanes[0]
    assert item["span"] == (0, 0)
    assert item["skipped"][0][0] == corpus.train[source].name


def test_carried_states_are_reset_where_a_recording_begins():
    model = make(MODELS["wavenet"], torch.float32)
    carried = Carried(model, 2)
    codes = random_codes(model, 2, 30)
    with torch.no_grad():
        state, previous = carried.take(model, slice(0, 2), torch.tensor([True, True]))
        model(codes, None, state, previous)
        carried.put([Carried.give(model, state, codes[:, -1])])
        state, previous = carried.take(model, slice(0, 2), torch.tensor([False, True]))
    fresh = model.export_state(model.init_state(2))
    assert previous.tolist() == [int(codes[0, -1]), model.start_code]
    found = model.export_state(state)
    assert all(torch.equal(found[name][1], fresh[name][1]) for name in fresh)
    assert any(not torch.equal(found[name][0], fresh[name][0]) for name in fresh)
