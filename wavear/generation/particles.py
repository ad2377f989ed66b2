"""Particles: sequential Monte Carlo towards the mel that a model is given.

N streams of one utterance, the particles, run side by side. After every step of `STEP` hops the
newest mel frame of each is compared with the given mel, and the particles are drawn again with
weights exp(-`SHARPNESS` * distance): those near the mel continue several times, those far from it
end (bootstrap filter with systematic resampling; Gordon, Salmond and Smith, 1993; Kitagawa, 1996).
The distance is the root mean square over bands of the difference in nats. So the audio follows the
levels that the recording happened to have, where a single stream draws its own; it is a sample of

    P(x | mel) * product over steps of exp(-SHARPNESS * distance(x, mel))

in the limit of many particles, and of the model only where SHARPNESS is 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.audio.emphasis import Deemphasis, coefficient
from wavear.common.errors import WavearError
from wavear.generation.engine import Engine
from wavear.mel.conversion import per_neper
from wavear.mel.spectrogram import MelConfig, compress_, filters_and_window
from wavear.models.base import AutoregressiveModel
from wavear.models.sampling import systematic, uniforms

STEP = 0.5
"""Hops between two draws of the particles."""
SHARPNESS = 30.0
"""Factor on the distance in nats."""
_SETTLED = 4096  # samples after which the memory of the de-emphasis no longer counts


def check_particles(model: AutoregressiveModel) -> None:
    """Refuse a model whose audio cannot be compared with a mel."""
    config = model.config.mel
    if not isinstance(config, MelConfig) or config.log_base == "none":
        raise WavearError("particles need a model of logarithmic mels, which this is not")


class Particles:
    """The particles of one utterance, whose engine has a stream for each.

    Parameters
    ----------
    model : AutoregressiveModel
    engine : Engine
        Of N streams, at the first sample to make.
    mel : Tensor, shape (M, F)
    past : Tensor, shape (P,)
        The samples before, a prime.
    seeds : list of int
        Of each particle, and one more for the draws of particles.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        engine: Engine,
        mel: Tensor,
        past: Tensor,
        seeds: list[int],
    ):
        config: MelConfig = model.config.mel
        self.model, self.engine, self.config = model, engine, config
        self.mel = mel.cpu().double() / per_neper(config)
        self.position = len(past)
        *self.seeds, self.draw_seed = seeds
        self._left, self._right = config.window_span
        self._emphasis = coefficient(model.config)
        self._kept = self._left + self._right + (_SETTLED if self._emphasis else 0)
        # The decoded codes of each particle, before de-emphasis.
        self._tail = past.double().repeat(len(self.seeds), 1)[:, -self._kept :]
        self._made: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def run(
        self, samples: int, cond: Any, temperature: float | np.ndarray, **truncation: Any
    ) -> None:
        """Make the next samples of all particles, from their conditioning (N, C, samples)."""
        step = max(round(STEP * self.config.hop_length), 1)
        first, end = self.position, self.position + samples
        draws = np.stack([uniforms(seed, first, samples) for seed in self.seeds])
        places = uniforms(self.draw_seed, first, samples + 1)
        temperatures = np.broadcast_to(temperature, draws.shape)
        while self.position < end:
            start, stop = self.position, min((self.position // step + 1) * step, end)
            part = slice(start - first, stop - first)
            scores = np.empty((len(self.seeds), stop - start))
            codes = self.engine.generate(
                draws[:, part],
                cond if cond.shape[2] == 1 else cond[:, :, part],
                temperatures[:, part],
                log_probability=scores,
                **truncation,
            )
            self.position = stop
            values = self.model.grid.decode(torch.from_numpy(codes)).double()
            self._tail = torch.cat([self._tail, values], dim=1)[:, -self._kept :]
            parents = np.arange(len(codes))
            if stop % step == 0:
                parents = self._drawn(parents, float(places[stop - first]))
            self._made.append((codes, scores, parents))

    def chosen(self) -> tuple[np.ndarray, np.ndarray]:
        """Return codes (T,) and log-probabilities (T,) of the particle nearest to its mel."""
        distance = self._distances()
        index = 0 if distance is None else int(distance.argmin())
        codes, scores = [], []
        for made, score, parents in reversed(self._made):
            index = int(parents[index])
            codes.append(made[index])
            scores.append(score[index])
        return np.concatenate(codes[::-1]), np.concatenate(scores[::-1])

    def _distances(self) -> Tensor | None:
        """Return how far the newest frame of each particle is from the mel, in nats, (N,)."""
        # Of the frame whose window ends with the last sample: between two frames of the mel.
        place = (self.position - self._right) / self.config.hop_length
        first = int(place // 1)
        if self._tail.shape[1] < self._kept or first < 0:
            return None  # the mel mirrors the samples at the start
        share = place - first
        last = min(first + 1, self.mel.shape[1] - 1)
        target = torch.lerp(self.mel[:, min(first, last)], self.mel[:, last], share)
        heard = self._tail
        if self._emphasis:
            heard = torch.stack([Deemphasis(self._emphasis)(row) for row in heard])
        found = self._frames(heard[:, -(self._left + self._right) :]) / per_neper(self.config)
        return (found - target).square().mean(dim=1).sqrt()

    def _frames(self, samples: Tensor) -> Tensor:
        """Return the mel frames (N, M) whose windows are these samples, as `log_mel` makes them."""
        config = self.config
        filters, window = filters_and_window(config, samples.device, samples.dtype)
        spectrum = torch.fft.rfft(samples * window, n=config.n_fft)
        bins = spectrum.real.square() + spectrum.imag.square() + config.power_offset
        bins.clamp_(min=config.power_floor)
        return compress_((bins.sqrt() if config.power == 1 else bins) @ filters.T, config)

    def _drawn(self, parents: np.ndarray, uniform: float) -> np.ndarray:
        """Draw the particles that continue, copy their states, and return their parents."""
        distance = self._distances()
        if distance is None:
            return parents
        weights = torch.softmax(-SHARPNESS * distance, dim=0).numpy()
        drawn = systematic(weights, uniform)
        counts = np.bincount(drawn, minlength=len(parents))
        spare = np.repeat(parents, np.maximum(counts - 1, 0))  # survivors stay where they are
        ended = np.flatnonzero(counts == 0)
        parents[ended] = spare
        if len(ended):
            self.engine.copy_streams(spare.tolist(), ended.tolist())
            self._tail[ended] = self._tail[spare]
        return parents
