"""A resumed run: the numbers of speakers stay bound to their names, and speakers can be added."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from small_training import config_of, record_of, state_of

import wavear
from wavear import WavearError, train

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
