"""A converted mel equals the mel of the target's convention, or the conversion is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from wavear import MelConfig, convert_mel, log_mel
from wavear.mel.conversion import VALUE_FIELDS

SMALL = MelConfig(
    sample_rate=8000, n_fft=128, window_length=128, hop_length=32, bands=12, fmax=4000.0, floor=1e-4
)


def sound() -> torch.Tensor:
    """Return a sound with loud, quiet and silent parts."""
    time = torch.arange(2400, dtype=torch.float64) / 8000
    wave = 0.5 * torch.sin(2 * torch.pi * (200 * time + 3000 * time**2)) * torch.exp(-20 * time)
    wave[-300:] = 0
    return wave[None]


conventions = st.builds(
    lambda base, scale, shift, floor, clip, mode: replace(
        SMALL, log_base=base, scale=scale, shift=shift, floor=floor, clip=clip, floor_mode=mode
    ),
    base=st.sampled_from(["e", "10", "db", "none"]),
    scale=st.sampled_from([1.0, 0.01, -0.5, 3.0]),
    shift=st.sampled_from([0.0, 1.0, -4.0]),
    floor=st.sampled_from([1e-6, 1e-4, 1e-2]),
    clip=st.sampled_from([None, (0.0, 1.0), (-4.0, 4.0), (-100.0, 0.0)]),
    mode=st.sampled_from(["clip", "clip", "add"]),
)


def check_conversion(source: MelConfig, target: MelConfig) -> None:
    wave = sound()
    given, wanted = log_mel(wave, source), log_mel(wave, target)
    try:
        made = convert_mel(given, source, target)
    except ValueError as error:
        assert "cannot be converted exactly: " in str(error)  # noqa: PT017
        assert any(f"{field} is" in str(error) for field in ("floor", "clip"))  # noqa: PT017
        # Only conversions that can be wrong are refused: the source clips values that the target
        # keeps, at some gain of this sound. An added floor is exempt: below it float64 still has
        # digits of the sound, but float32 has none.
        if source.floor_mode == "clip":
            wrong = []
            for gain in (1.0, 1e4, 1e15, 1e-4):
                forced = convert_mel(
                    log_mel(gain * wave, source), source, target, ignore=("floor", "clip")
                )
                wrong.append(
                    not torch.allclose(forced, log_mel(gain * wave, target), rtol=0, atol=1e-9)
                )
            assert any(wrong)
        return
    # float64 in and out; values near an added floor have lost digits, and converting a small slope
    # to a large one amplifies the error.
    torch.testing.assert_close(made, wanted, rtol=1e-6, atol=1e-5)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(source=conventions, target=conventions)
def test_a_converted_mel_equals_the_mel_of_the_target(source: MelConfig, target: MelConfig):
    check_conversion(source, target)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(source=conventions, target=conventions)
def test_many_converted_mels_equal_those_of_the_target(source: MelConfig, target: MelConfig):
    check_conversion(source, target)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(source=conventions, target=conventions)
def test_conversion_there_and_back_is_the_identity(source: MelConfig, target: MelConfig):
    mel = log_mel(sound(), source)
    try:
        there = convert_mel(mel, source, target)
        back = convert_mel(there, target, source)
    except ValueError:
        assume(False)
        raise
    torch.testing.assert_close(back, mel, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "target", [replace(SMALL, log_base="10"), replace(SMALL, log_base="db", scale=0.01, shift=1.0)]
)
def test_conversion_there_and_back_in_float32(target: MelConfig):
    mel = log_mel(sound(), SMALL).float()
    there = convert_mel(mel, SMALL, target)
    assert there.dtype == torch.float32
    # Rounding is 3e-8 for values up to 1 (scaled decibels) and 2.4e-7 for values up to 4 (log10);
    # one neper is 0.087 or 0.43 of these units.
    torch.testing.assert_close(convert_mel(there, target, SMALL), mel, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["r9y9", "espnet", "fatchord", "hifigan", "librosa-default"])
def test_presets_equal_the_scaled_natural_logarithm(name: str):
    """The formula is v = slope * ln(band) + shift."""
    config = MelConfig.preset(name)
    natural = replace(config, log_base="e", scale=1.0, shift=0.0, clip=None)
    wave = torch.randn(1, 30_000, dtype=torch.float64) * 0.1
    mel = log_mel(wave, natural)
    slope = {
        "r9y9": 1,
        "espnet": 1,
        "fatchord": 0.2,
        "hifigan": math.log(10),
        "librosa-default": 10,
    }[name] / math.log(10)
    expected = mel * slope + (1 if name == "fatchord" else 0)
    torch.testing.assert_close(convert_mel(mel, natural, config), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(convert_mel(expected, config, natural), mel, rtol=0, atol=1e-12)


def test_raising_the_floor_is_exact_and_lowering_it_is_refused():
    deep, shallow = replace(SMALL, floor=1e-8), replace(SMALL, floor=1e-3)
    wave = sound()
    made = convert_mel(log_mel(wave, deep), deep, shallow)
    torch.testing.assert_close(made, log_mel(wave, shallow), rtol=0, atol=1e-9)
    with pytest.raises(
        ValueError,
        match=r"\d\.\d% of the values are the quietest .*floor is 0.001 in the source and 1e-08 in",
    ):
        convert_mel(log_mel(wave, shallow), shallow, deep)
    loud = torch.full((12, 3), -2.0)  # no value is at the floor, so none was clipped
    assert torch.equal(convert_mel(loud, shallow, deep), loud)
    made = convert_mel(log_mel(wave, shallow), shallow, deep, ignore=("floor",))
    torch.testing.assert_close(made, log_mel(wave, shallow), rtol=0, atol=1e-9)


def test_predicted_values_below_the_floor_are_raised_to_it():
    mel = torch.full((12, 2), math.log(1e-4) - 1.0)
    common = replace(SMALL, log_base="10")
    assert torch.allclose(convert_mel(mel, SMALL, common), torch.tensor(-4.0))


ANALYSIS: dict[str, Any] = {
    "sample_rate": 16000,
    "n_fft": 256,
    "window_length": 100,
    "window": "hamming",
    "hop_length": 40,
    "centre": "start",
    "padding": "zeros",
    "bands": 11,
    "fmin": 20.0,
    "fmax": 3000.0,
    "mel_scale": "htk",
    "norm": None,
    "power": 2.0,
    "power_offset": 1e-9,
    "power_floor": 1e-9,
}


@pytest.mark.parametrize("field", ANALYSIS)
def test_another_analysis_is_refused_by_name(field: str):
    other = replace(SMALL, **{field: ANALYSIS[field]})
    mel = torch.zeros(12, 5)
    wanted = (
        rf"{field} is {getattr(SMALL, field)!r} in the source and {ANALYSIS[field]!r} in the target"
    )
    with pytest.raises(ValueError, match=wanted):
        convert_mel(mel, SMALL, other)
    assert torch.equal(convert_mel(mel, SMALL, other, ignore=(field,)), mel)


def test_every_field_concerns_the_analysis_or_the_values():
    assert sorted([*ANALYSIS, *VALUE_FIELDS]) == sorted(SMALL.to_dict())


def test_fmax_none_equals_half_of_the_sample_rate():
    mel = torch.zeros(12, 5)
    assert convert_mel(mel, replace(SMALL, fmax=None), SMALL) is mel


def test_arrays_and_batches_keep_their_type():
    common = replace(SMALL, log_base="10")
    array = np.linspace(-5, 1, 24, dtype=np.float32).reshape(12, 2)
    made = convert_mel(array, SMALL, common)
    assert isinstance(made, np.ndarray)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, array / np.log(10), rtol=1e-6)
    batch = convert_mel(torch.from_numpy(np.stack([array, array])), SMALL, common)
    assert torch.equal(batch[1], torch.from_numpy(made))
    for wrong in (np.zeros((2, 12), np.float32), np.zeros((12, 2), int), np.zeros(12, np.float32)):
        with pytest.raises(ValueError, match=r"expected floating point, \(..., 12, F\)"):
            convert_mel(wrong, SMALL, common)
