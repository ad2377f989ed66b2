"""A linear predictor as a law over codes: what a model has to beat to have learnt more than linear prediction.

It is a `wavear.Linear` of the 32 samples before, which sees what the model sees and no more, and is
measured in the same bits. Samples and (of mu-law codes) their companded values are tried, with a
Laplace and a normal law of what is left over; what is likeliest on the recordings it is fitted to
is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

from wavear.audio.grid import Grid
from wavear.models.fitting import Fitter
from wavear.models.linear import Linear

ORDER = 32
_BLOCK = 2**16  # samples at once


def fit_predictor(recordings: Iterable[np.ndarray], grid: Grid, order: int = ORDER) -> Linear:
    """The likeliest linear predictor of recordings given as codes (T_i,).

    Raises
    ------
    ValueError
        If there are no samples.
    """
    fitter = Fitter(grid, order=order, law="auto", domain="auto", method="silence")
    for codes in recordings:
        fitter.begin()
        fitter.push(codes)
        fitter.end()
    return fitter.fit().model


@torch.inference_mode()
def bits_of(model: Linear, codes: np.ndarray) -> np.ndarray:
    """-log2 P of every code given those before it, (T,) float64; the first ones follow silence.

    Parameters
    ----------
    model : Linear
    codes : array, shape (T,), integers in [0, Q)
    """
    given = torch.from_numpy(np.asarray(codes, dtype=np.int64))[None]
    state, previous, found = model.init_state(1), torch.full((1,), model.start_code), [np.zeros(0)]
    for start in range(0, given.shape[1], _BLOCK):
        block = given[:, start : start + _BLOCK]
        nats = model.law.log_prob(model(block, None, state, previous), block)
        found.append(-nats[0].numpy() / math.log(2))
        previous = block[:, -1]
    return np.concatenate(found)
