"""A resumed run: the numbers of speakers stay bound to their names, and speakers can be added."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from small_training import config_of, record_of, state_of

import wavear
from wavear import TrainConfig, WavearError, train

KEY = "model.conditioning.speakers.weight"


def test_renamed_removed_and_added_speakers_are_refused_by_name(tones, tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tones, data)
    settings = {"speakers": True, "unconditional": True}
    train(config_of(data, out, max_steps=1, **settings))
    resume = config_of(data, out, max_steps=2, resume=True, **settings)
    (data / "speaker1").rename(data / "anna")
    with pytest.raises(WavearError, match=r"missing: speaker1; new: anna\)\. Restore the names"):
        train(resume)
    shutil.copytree(data / "anna", data / "speaker1")
    with pytest.raises(WavearError, match=r"other speakers than .* has \(new: anna\)"):
        train(resume)
    shutil.rmtree(data / "anna")
    assert train(resume).steps == 2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_added_speakers_get_the_next_numbers(tones, tmp_path, optimizer):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tones, data)
    settings = {"speakers": True, "optimizer": optimizer, "learning_rate": 1e-3, "ema_decay": 0.0}
    train(config_of(data, out, max_steps=2, **settings))
    before = state_of(out)["state_dict"][KEY]
    # By its name the new speaker would come first, and one of the others is gone.
    (data / "speaker0").rename(data / "anna")
    settings |= {"resume": True, "extend_speakers": True}
    with pytest.raises(WavearError, match="has taken all of its 2 steps: raise --max-steps"):
        train(config_of(data, out, max_steps=2, **settings))
    result = train(config_of(data, out, max_steps=4, **settings))
    after = state_of(out)["state_dict"][KEY]
    # Two steps at a rate of 1e-3 move a weight by about that each, and the rows are far apart.
    torch.testing.assert_close(after[:2], before, atol=4e-3, rtol=0)
    torch.testing.assert_close(after[2], before.mean(0), atol=4e-3, rtol=0)
    assert (after[2] != before.mean(0)).any()  # it is trained on
    for folder in (result.best, result.last):
        described = json.loads((folder / "config.json").read_text())
        assert described["training"]["speakers"] == ["speaker0", "speaker1", "anna"]
        assert wavear.load(folder).config.speakers == 3
    assert record_of(out)["data"]["speakers"] == ["speaker0", "speaker1", "anna"]


FREE = dict.fromkeys(
    ("layers", "stacks", "residual_channels", "skip_channels", "classes", "head_channels",
     "conditioning_channels", "mel_bands", "mel_hop_length"),
)  # fmt: skip


def fine_tuning(data, out, checkpoint, **settings):
    """Return a fine-tuning of no step: its model is that of the start."""
    fields = TrainConfig.__dataclass_fields__
    sizes = {name: fields[name].default for name in FREE}
    settings = sizes | {"from_checkpoint": str(checkpoint), "learning_rate": 1e-30} | settings
    return config_of(data, out, **{"speakers": True, "max_steps": 1, "ema_decay": 0.0} | settings)


def test_fine_tuning_adds_speakers_and_old_ones_sound_the_same(tones, tmp_path):
    old = train(config_of(tones, tmp_path / "old", speakers=True, max_steps=2)).last
    data = tmp_path / "data"
    shutil.copytree(tones / "speaker0", data / "anna")
    shutil.copytree(tones / "speaker1", data / "speaker1")
    new = train(fine_tuning(data, tmp_path / "new", old)).last
    before, after = wavear.load(old), wavear.load(new)
    assert list(after.speaker_names) == ["speaker0", "speaker1", "anna"]  # one is not in the data
    mel = torch.randn(8, 5) - 5
    for speaker in ("speaker0", "speaker1"):
        one, other = (wavear.generate(m, mel, speaker=speaker, seed=1) for m in (before, after))
        assert torch.equal(one, other)
    rows = after.conditioning.speakers.weight
    torch.testing.assert_close(rows[2], rows[:2].mean(0), rtol=0, atol=1e-6)
    settings = {"resume": True, "max_steps": 2}
    assert train(fine_tuning(data, tmp_path / "new", old, **settings)).steps == 2
    with pytest.raises(WavearError, match="has 2 speakers: set speakers"):
        fine_tuning(data, "out", old, speakers=False)


def test_fine_tuning_gives_speakers_to_a_model_without(tones, tmp_path, caplog):
    old = train(config_of(tones, tmp_path / "old", max_steps=2)).last
    new = train(fine_tuning(tones, tmp_path / "new", old, progress=True)).last
    assert f"bits of {old}: train longer" in caplog.text
    mel = torch.randn(8, 5) - 5
    one = wavear.generate(wavear.load(old), mel, seed=1)
    for speaker in ("speaker0", "speaker1"):
        assert torch.equal(one, wavear.generate(wavear.load(new), mel, speaker=speaker, seed=1))
    free = train(config_of(tones, tmp_path / "free", max_steps=1, unconditional=True)).last
    with pytest.raises(WavearError, match="has neither mels nor speakers"):
        fine_tuning(tones, "out", free)
    torch.manual_seed(0)
    wavear.WaveNet(wavear.load(new).config).save(tmp_path / "nameless")
    with pytest.raises(WavearError, match="has 2 speakers without names"):
        train(fine_tuning(tones, tmp_path / "run", tmp_path / "nameless"))


def test_fine_tuning_accepts_mels_that_equal_those_of_the_checkpoint(tones, tmp_path):
    old = train(config_of(tones, tmp_path / "old", max_steps=1, mel_norm="none")).last
    fine_tuning(tones, "out", old, mel_norm="none")
    with pytest.raises(WavearError, match=r"mel_norm is 'slaney', and .* has 'none'"):
        fine_tuning(tones, "out", old, mel_norm="slaney")
