"""Laws over values on the CPU engine, by way of the GRU: draws and scores."""

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

# What the network puts out is in units of full scale, and a code is narrower than float32's
# rounding of the sum that makes a mean is small, so the error counts in deviations: about e^-2.
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
def test_scores_of_laws_over_values_equal_forward(config, batch):
    model = make_gru(**config)
    codes, cond = random_codes(model, batch, 150), conditioning(model, batch, 150)
    codes[0, [3, 60]] = 0, model.config.classes - 1
    found = scored_in_parts(NumbaGRUEngine(model, batch), codes, cond, (0, 70, 150))
    np.testing.assert_allclose(found, parallel(model, codes, cond), atol=1e-4, rtol=1e-5)


@values
def test_draws_of_laws_over_values_equal_those_of_the_law(config):
    """Of the law that forward gives at each sample, the value that the uniform selects."""
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
    # float32 moves a mean by about 1e-7 of full scale: of the codes of 16 bits, 3e-5 wide, some in
    # a thousand are at an edge. Where a uniform falls to the very end of a mixture's component, its
    # value hangs on the last bits.
    assert (off > 1).mean() < 0.003
    assert (off == 0).mean() > 0.98
    assert len(np.unique(found)) > 50
    np.testing.assert_allclose(nats, parallel(model, found, cond), atol=1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match="categorical"):
        NumbaGRUEngine(model, 3).generate(uniforms, cond, top_k=3)
