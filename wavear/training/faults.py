"""Non-finite losses and spikes: detect them, name the crops of their batch, save the batch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from wavear.common.atomic import replace_tensors
from wavear.data.corpus import Recording
from wavear.data.crops import Batch, coded
from wavear.training.module import TrainingModule

_WINDOW = 100  # steps that define the usual loss
_LEAST = 20  # steps before anything counts as unusual
_DEVIATIONS = 8  # above the median
_LEAST_BITS = 0.25  # above the median: where all steps are alike, a small difference is harmless
_NAMED = 8  # crops of a batch in a message


class Spikes:
    """Detects spikes of the loss: above the median of 100 steps by 8 deviations and 0.25 bits.

    The deviation is 1.4826 times the median absolute deviation (the standard deviation of a normal
    distribution), so that a few wild steps do not hide the next one.

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
        """Add the loss of a step; return the usual loss if a spike begins here.

        A spike lasts until the loss is usual again.
        """
        usual, spread = math.inf, 0.0
        if len(self.recent) >= _LEAST:
            usual = median(self.recent)
            spread = 1.4826 * median(abs(value - usual) for value in self.recent)
        high = bits > usual + max(_DEVIATIONS * spread, _LEAST_BITS)
        begins, self.inside = high and not self.inside, high
        self.recent = [*self.recent, bits][-_WINDOW:]
        return usual if begins else None


def crops_named(
    batch: Batch, recordings: Sequence[Recording], rate: int, nats: torch.Tensor
) -> list[str]:
    """Return the crops of a batch as "a.wav at 1.25 s (3.21 bits)", non-finite or largest first.

    `nats`, (B,), is the loss of each crop, summed over its samples.
    """
    samples = (batch.span[:, 1] - batch.span[:, 0]).clamp(min=1)
    bits = (nats.cpu() / samples.cpu() / math.log(2)).tolist()
    order = sorted(range(len(bits)), key=lambda n: bits[n] if math.isfinite(bits[n]) else math.inf)
    places = zip(batch.source.tolist(), batch.start.tolist(), bits, strict=True)
    texts = [f"{recordings[n].name} at {at / rate:.2f} s ({b:.2f} bits)" for n, at, b in places]
    return [texts[n] for n in reversed(order)]


def some(crops: Sequence[str]) -> str:
    """Return a list of crops for a message, shortened."""
    more = f"; and {len(crops) - _NAMED} more" if len(crops) > _NAMED else ""
    return "; ".join(crops[:_NAMED]) + more


def save_batch(
    path: Path, batch: Batch, module: TrainingModule, step: int, crops: Sequence[str]
) -> None:
    """Write a batch as safetensors: waveform (the window), codes, and what they were made from.

    `padded_waveform` is the input of the mels; the metadata hold the step and the crops by name.
    """
    layout = module.layout
    tensors = {
        "waveform": batch.waveform[:, layout.margin : layout.margin + layout.window],
        "codes": module.model.grid.encode(coded(batch, layout)).to(torch.int32),
        "padded_waveform": batch.waveform,
        "nats": module.last.crop_nats,
    }
    names = ("frames", "mel", "span", "speaker", "source", "start")
    tensors |= {name: getattr(batch, name) for name in names}
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {
        "step": str(step),
        "sample_rate": str(layout.sample_rate),
        "crops": json.dumps(list(crops)),
    }
    replace_tensors(path, whole, metadata)
