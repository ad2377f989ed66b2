"""The memory that a step of training needs, measured on a small crop before the first step."""

from __future__ import annotations

import dataclasses

import torch

from wavear.common.errors import WavearError
from wavear.common.machine import available_memory
from wavear.data.crops import Segments, collate
from wavear.models.base import AutoregressiveModel
from wavear.models.crop_loss import crop_loss
from wavear.training.config import TrainConfig

_PROBE = 2048  # samples of loss of the small crop
# Of a step's peak to the bytes that the layers keep for the backward pass: measured 1.2 to 1.8 for
# the four families, and 3.9 where a WaveNet recomputes its layers.
_LARGEST_RATIO, _RECOMPUTING_RATIO = 1.8, 4.0
_GIB = 2**30


def check_memory(
    model: AutoregressiveModel,
    segments: Segments,
    config: TrainConfig,
    dtype: torch.dtype | None,
    kind: str,
    processes: int,
) -> None:
    """Refuse batches that the free memory cannot hold.

    Parameters
    ----------
    dtype : torch.dtype, optional
        Of the layers, as for `crop_loss`.
    kind : str
        Of the device: cpu, cuda or mps.
    processes : int
        That train on this machine and share its memory.

    Raises
    ------
    WavearError
        If a step needs more memory than is free; it has the number that fits.
    """
    assert config.batch_size is not None
    free = torch.cuda.mem_get_info()[0] if kind == "cuda" else available_memory()
    if free is None:
        return
    free //= 1 if kind == "cuda" else processes
    layout = segments.layout
    crops = config.batch_size // (processes * config.accumulate)
    per_sample = _kept_per_sample(model, segments, dtype)
    per_crop = per_sample * layout.window
    if crops * per_crop <= free:
        return
    needs = (
        f"a step needs {crops * per_crop / _GIB:.1f} GiB or more, and {free / _GIB:.1f} are free"
    )
    safe = free / (_RECOMPUTING_RATIO if model.activation_checkpointing else _LARGEST_RATIO)
    if (fits := int(safe / per_crop)) >= 1:
        share = config.batch_size // processes
        parts = next(d for d in range(1, share + 1) if share % d == 0 and share // d <= fits)
        raise WavearError(
            f"batch_size is {config.batch_size}: {needs}; {fits * processes * config.accumulate}"
            f" fits, or {config.batch_size} with accumulate {parts}"
        )
    longest = int(safe / per_sample) - layout.context
    hint = (
        f"{longest} fits with a batch of {processes}" if longest > 0 else "choose a smaller model"
    )
    raise WavearError(f"segment is {config.segment}: {needs}; {hint}")


def _kept_per_sample(
    model: AutoregressiveModel, segments: Segments, dtype: torch.dtype | None
) -> float:
    """Return the bytes that the backward pass keeps, per sample of the window, on the CPU."""
    whole = segments.layout
    samples = min(whole.segment, -(-_PROBE // whole.hop) * whole.hop)
    probe = dataclasses.replace(whole, segment=samples)
    crops = Segments(segments.recordings, probe, list(segments.speakers), segments.seed)
    kept: dict[int, int] = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        losses, _ = crop_loss(model, collate([crops[0]]), probe, dtype)
    del losses  # storages of the graph may be freed from here on
    return sum(kept.values()) / probe.window
