"""What goes wrong in a step: a loss that is no number, a loss that leaps; and the batch it happened to."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from wavear.audio.grid import Grid
from wavear.common.atomic import replace_file
from wavear.data.corpus import Recording
from wavear.data.crops import Batch, Layout, coded

_WINDOW = 100  # steps that say what is usual
_LEAST = 20  # steps before anything counts as unusual
_DEVIATIONS = 8  # above the median; 1.4826 median absolute deviations are one standard deviation of a normal law
_LEAST_BITS = 0.25  # above the median: where all steps are alike, a small difference is none


class Spikes:
    """Tells when the loss of a step leaps: above the median of the last 100 by 8 deviations and a quarter of a bit.

    The deviation is 1.4826 times the median absolute deviation, so a few wild steps do not hide the
    next one.

    Examples
    --------
    >>> spikes = Spikes()
    >>> [spikes.step(bits) is not None for bits in [3.0, 3.1] * 20 + [9.0, 9.5, 3.0, 9.0]][-4:]
    [True, False, False, True]
    """

    def __init__(self, recent: Sequence[float] = (), inside: bool = False):
        self.recent = list(recent)
        self.inside = inside

    def step(self, bits: float) -> float | None:
        """Take note of a step; the usual loss if a spike begins here. A spike lasts until the loss is usual again."""
        usual = median(self.recent) if len(self.recent) >= _LEAST else math.inf
        spread = (
            1.4826 * median(abs(value - usual) for value in self.recent)
            if math.isfinite(usual)
            else 0.0
        )
        high = bits > usual + max(_DEVIATIONS * spread, _LEAST_BITS)
        begins, self.inside = high and not self.inside, high
        self.recent = [*self.recent, bits][-_WINDOW:]
        return usual if begins else None


def crops_named(
    batch: Batch, recordings: Sequence[Recording], rate: int, nats: torch.Tensor
) -> list[str]:
    """The crops of a batch, those without a number first and then by loss: "a.wav at 1.25 s (3.21 bits)".

    Parameters
    ----------
    nats : Tensor, shape (B,)
        Loss of each crop, summed over its samples.
    """
    samples = (batch.span[:, 1] - batch.span[:, 0]).tolist()
    bits = [
        nat / max(count, 1) / math.log(2) for nat, count in zip(nats.tolist(), samples, strict=True)
    ]
    order = sorted(
        range(len(bits)),
        key=lambda n: (math.isfinite(bits[n]), -bits[n] if math.isfinite(bits[n]) else 0),
    )
    sources, starts = batch.source.tolist(), batch.start.tolist()
    return [
        f"{recordings[sources[n]].name} at {starts[n] / rate:.2f} s ({bits[n]:.2f} bits)"
        for n in order
    ]


def save_batch(
    path: Path,
    batch: Batch,
    layout: Layout,
    grid: Grid,
    step: int,
    nats: torch.Tensor,
    crops: Sequence[str],
) -> None:
    """Write a batch as safetensors: waveform (the window, at the model's rate), codes, and what else it was made of.

    `padded_waveform` is what the mels were computed from; the metadata have the step and the crops
    by name.
    """
    from safetensors.torch import save_file

    window = batch.waveform[:, layout.margin : layout.margin + layout.window]
    tensors = {
        "waveform": window,
        "codes": grid.encode(coded(batch, layout)).to(torch.int32),
        "padded_waveform": batch.waveform,
        "frames": batch.frames,
        "span": batch.span,
        "speaker": batch.speaker,
        "source": batch.source,
        "start": batch.start,
        "nats": nats,
    }
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {
        "step": str(step),
        "sample_rate": str(layout.sample_rate),
        "crops": json.dumps(list(crops)),
    }
    replace_file(path, lambda temporary: save_file(whole, temporary, metadata=metadata))
