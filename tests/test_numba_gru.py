"""Distributions over values on the CPU engine: draws and scores, of a GRU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_cases import (
    conditioning,
    make_gru,
    parallel,
    random_codes,
    random_uniforms,
    scored_in_parts,
)

from wavear.generation.cpu.gru import NumbaGRUEngine

# The network computes means in units of full scale. A code of 16 bits is so narrow that float32
# rounding of a mean matters, so the error counts in deviations: about e^-2.
VALUES = {
    "mixture": {"law": "logistic_mixture", "mixtures": 3, "speakers": 2},
    "10, coarse": {
        "law": "logistic_mixture",
        "mixtures": 10,
        "layers": 1,
        "coarse_classes": 64,
    },
    "512, coarse": {"law": "gaussian", "classes": 512, "coarse_classes": 3, "speakers": 2},
    "gaussian": {"law": "gaussian", "layers": 1},
    "laplace": {"law": "laplace", "classes": 256},
}
values = pytest.mark.parametrize("config", VALUES.values(), ids=VALUES.keys())


@values
@pytest.mark.parametrize("batch", [1, 5])
def test_scores_of_distributions_over_values_equal_forward(config, batch):
    model = make_gru(**config)
    codes, cond = random_codes(model, batch, 150), conditioning(model, batch, 150)
    codes[0, [3, 60]] = 0, model.config.classes - 1
    found = scored_in_parts(NumbaGRUEngine(model, batch), codes, cond, (0, 70, 150))
    np.testing.assert_allclose(found, parallel(model, codes, cond), atol=1e-4, rtol=1e-5)


@values
def test_draws_of_distributions_over_values_equal_forward(config):
    """Each uniform selects its value from the distribution that forward returns."""
    model = make_gru(**config)
    uniforms, cond = random_uniforms(3, 400), conditioning(model, 3, 400)
    temperature = np.where(np.arange(400) < 200, 0.6, 1.0)[None].repeat(3, axis=0)
    nats = np.empty((3, 400))
    found = NumbaGRUEngine(model, 3).generate(uniforms, cond, temperature, log_probability=nats)
    with torch.inference_mode():
        parameters = model(torch.from_numpy(found), cond).double()
        draws = [
            model.law.sample(
                parameters[:, :, t],
                torch.from_numpy(uniforms[:, t]),
                torch.from_numpy(temperature[:, t]),
            )
            for t in range(400)
        ]
    off = np.abs(found - torch.stack(draws, dim=1).numpy())
    # float32 moves a mean by about 1e-7 of full scale. A code of 16 bits is 3e-5 wide, so a few
    # values in a thousand cross an edge. A uniform at the very end of a mixture's component selects
    # a value that depends on the last bits.
    assert (off > 1).mean() < 0.003
    assert (off == 0).mean() > 0.98
    assert len(np.unique(found)) > 50
    np.testing.assert_allclose(nats, parallel(model, found, cond), atol=1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match="categorical"):
        NumbaGRUEngine(model, 3).generate(uniforms, cond, top_k=3)
