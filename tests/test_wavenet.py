"""WaveNet: the equations of the paper, the receptive field, alignment of the conditioning.

The promises of every family are tested in `test_families`.
"""

import math
from typing import Any

import pytest
import torch

from wavear import MelConfig, WaveNet, WaveNetConfig
from wavear.models.conditioning import Interpolation, upsampling_scales

MEL = MelConfig(sample_rate=8000, n_fft=64, window_length=64, hop_length=12, bands=5, fmax=4000.0)
SMALL: dict[str, Any] = {
    "residual_channels": 6,
    "skip_channels": 7,
    "head_channels": 9,
    "conditioning_channels": 5,
    "sample_rate": 8000,
}

SHAPES = {
    "two stacks": WaveNetConfig(layers=6, stacks=2, classes=16, **SMALL),
    "kernel 3": WaveNetConfig(layers=4, stacks=2, kernel_size=3, classes=16, **SMALL),
    "kernel 5, one layer": WaveNetConfig(layers=1, stacks=1, kernel_size=5, classes=3, **SMALL),
    "mel": WaveNetConfig(layers=4, stacks=1, classes=16, mel=MEL, **SMALL),
    "speakers": WaveNetConfig(layers=4, stacks=2, classes=16, speakers=3, **SMALL),
    "mel and speakers": WaveNetConfig(
        layers=3, stacks=1, kernel_size=3, classes=16, mel=MEL, speakers=2, **SMALL
    ),
}
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())


def make(config) -> Any:
    torch.manual_seed(0)
    return WaveNet(config).double()


def make_cond(model, batch, frames):
    config = model.config
    if not model.conditioned:
        return None
    mel = torch.randn(batch, config.mel.bands, frames, dtype=torch.float64) if config.mel else None
    speaker = torch.arange(batch) % config.speakers if config.speakers else None
    return model.condition(mel, speaker)


@shapes
def test_output_depends_on_exactly_the_receptive_field(config):
    """The gradient of the logits at t is zero at samples from t on and before the field."""
    model = make(config)
    field = model.receptive_field
    t, total = field + 2, field + 6
    codes = torch.randint(config.classes, (1, total))
    embedded = []
    handle = model.embedding.register_forward_hook(
        lambda _m, _i, out: embedded.append(out) or out.retain_grad()
    )
    cond = make_cond(model, 1, -(-total // MEL.hop_length))
    cond = cond[:, :, :total] if cond is not None else None
    # tanh(z) * sigmoid(z) may happen to be flat in one unit, but not the sum of all logits with
    # random weights.
    logits = model(codes, cond)
    (logits[0, :, t] * torch.randn(config.classes, dtype=torch.float64)).sum().backward()
    handle.remove()
    # The embedding at position u is that of the sample u - 1.
    reach = embedded[0].grad[0].abs().sum(dim=1) > 0
    expected = torch.zeros(total, dtype=torch.bool)
    expected[t - field + 1 : t + 1] = True
    assert reach.tolist() == expected.tolist()


def test_receptive_field_of_a_known_shape():
    # Dilations 1 to 512: 1023 past samples in each of two stacks, and the sample before.
    assert WaveNetConfig(layers=20, stacks=2).receptive_field == 2047
    assert WaveNetConfig(layers=24, stacks=4, kernel_size=3).receptive_field == 1 + 4 * 2 * 63


def test_silence_precedes_the_first_sample():
    model = make(SHAPES["two stacks"])
    codes = torch.randint(16, (1, 5))
    assert model.shift(codes).tolist() == [[8, *codes[0, :4].tolist()]]


def test_the_product_of_the_scales_is_the_hop():
    for hop in (1, 2, 7, 12, 80, 200, 256, 257, 300, 512, 1024, 1102):
        assert math.prod(upsampling_scales(hop)) == hop


def test_interpolation_starts_linear():
    x = torch.tensor([[[0.0, 1.0, 3.0, 3.0]]])
    # Interpolate between centres: the samples of a frame lie at -3/8, -1/8, 1/8, 3/8 of the
    # distance between frames.
    expected = [0.625, 0.875, 1.25, 1.75, 2.25, 2.75, 3.0, 3.0]
    torch.testing.assert_close(
        Interpolation(1, 4)(x)[0, 0], torch.tensor(expected), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("hop", [1, 7, 12, 256])
def test_conditioning_is_aligned(hop):
    """Mel frame f changes samples of the frames f - lookahead .. f + lookahead, and no others."""
    mel = MelConfig(
        sample_rate=8000, n_fft=1024, window_length=1024, hop_length=hop, bands=5, fmax=4000.0
    )
    model = make(WaveNetConfig(layers=2, stacks=1, classes=16, mel=mel, **SMALL))
    frames, f = 21, 10
    x = torch.randn(1, 5, frames, dtype=torch.float64)
    changed = x.clone()
    changed[:, :, f] += 1
    with torch.no_grad():
        before, after = model.condition(x), model.condition(changed)
    assert before.shape == (1, 5, frames * hop)
    moved = (before != after).any(dim=1)[0].reshape(frames, hop).any(dim=1)
    reach = [abs(g - f) <= model.lookahead for g in range(frames)]
    assert not (moved & ~torch.tensor(reach)).any()
    assert moved[f - model.conditioning.context : f + model.conditioning.context + 1].all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 10, "stacks": 3}, "10 layers do not divide into 3 stacks"),
        ({"kernel_size": 1}, "kernel_size is 1"),
        ({"classes": 1}, "classes is 1"),
        ({"classes": 65537}, "classes is 65537"),
        ({"residual_channels": 0}, "residual_channels is 0"),
        ({"layers": 2.5}, "layers is 2.5"),
        ({"layers": 100, "stacks": 1}, "at most 24 fit a stack"),
        ({"sample_rate": 10}, "sample_rate is 10"),
        ({"mel": MEL, "sample_rate": 16000}, "8000 Hz audio and the model of 16000 Hz"),
    ],
)
def test_invalid_configurations_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        WaveNetConfig(**settings)


def test_forward_equals_the_equations_of_the_paper():
    """Compute matrix products, one sample at a time, from the whole past."""
    config = WaveNetConfig(layers=4, stacks=2, kernel_size=3, classes=16, mel=MEL, **SMALL)
    model = make(config)
    codes = torch.randint(16, (1, 24))
    with torch.no_grad():
        cond = model.condition(torch.randn(1, 5, 2, dtype=torch.float64))
        x = model.embedding.weight[[model.start_code, *codes[0, :-1].tolist()]]  # (T, R)
        skip = torch.zeros(24, 7, dtype=torch.float64)
        for i, block in enumerate(model.blocks):
            dilated = block.dilated.weight.view(12, 3, 6)  # (outputs, taps from the oldest, inputs)
            out = x.clone()
            for t in range(24):
                z = block.dilated.bias + block.conditioning.weight @ cond[0, :, t]
                for k in range(3):
                    past = t - (2 - k) * config.dilations[i]
                    if past >= 0:
                        z = z + dilated[:, k] @ x[past]
                h = torch.tanh(z[:6]) * torch.sigmoid(z[6:])
                skip[t] += block.skip.weight @ h + block.skip.bias
                if block.residual is not None:
                    out[t] = x[t] + block.residual.weight @ h + block.residual.bias
            x = out
        first, second = model.head[1], model.head[3]
        hidden = torch.relu(torch.relu(skip) @ first.weight.T + first.bias)
        logits = hidden @ second.weight.T + second.bias
        torch.testing.assert_close(model(codes, cond)[0].T, logits, rtol=0, atol=1e-12)
