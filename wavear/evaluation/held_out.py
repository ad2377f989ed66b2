"""Exact bits per sample of held-out recordings in bounded memory, and counts of codes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from wavear.audio.emphasis import emphasised
from wavear.audio.grid import Grid
from wavear.common.errors import WavearError
from wavear.data.corpus import Recording, reason
from wavear.data.crops import (
    Batch,
    Crop,
    Layout,
    Segments,
    blank_crop,
    coded,
    collate,
    read_crop,
    read_span,
)
from wavear.models.base import AutoregressiveModel
from wavear.models.crop_loss import crop_loss, layout_of

_EVALUATION_SEGMENT = 16384  # samples of loss per crop: little context, and bounded memory
_EVALUATION_BATCH = {"cpu": 1, "cuda": 16}  # crops at once
_EVALUATION_LANES = {"cpu": 8, "cuda": 64}  # recordings at once, of models that carry their state
_MARKOV_CLASSES = 1024  # the table of an order-1 Markov chain has the square of the classes
_READ_SECONDS = 30
_LEAST_REST = 4096  # samples of a recording that is cut to fit a limit
_Note = Callable[[Recording, int, np.ndarray], object]


@dataclass(frozen=True)
class Bits:
    """Negative log2-likelihood, summed per recording."""

    total: np.ndarray
    """(recordings,), bits."""
    samples: np.ndarray
    """(recordings,)."""
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    """Recordings that could not be read, or in part: name and reason. What was read counts."""

    @property
    def per_sample(self) -> float:
        """Mean over all samples.

        Raises
        ------
        ValueError
            If there are none.
        """
        if not self.samples.sum():
            why = next(
                (f"{name}: {why}" for name, why in self.skipped.items()), "all are too short"
            )
            raise WavearError(f"not one held-out sample can be read ({why})")
        return float(self.total.sum() / self.samples.sum())


@torch.no_grad()
def held_out_bits(
    model: AutoregressiveModel,
    recordings: Sequence[Recording],
    speakers: Sequence[str] = (),
    *,
    rank: int = 0,
    world: int = 1,
    note: _Note | None = None,
) -> Bits:
    """Return the bits of whole recordings under `model`, on the device it is on.

    Crops with the receptive field in front of each cover the recordings, so every sample is scored
    once and with all of its past, whatever the length; a model that carries its state carries it
    along each recording. Arithmetic is the model's own (float32), sums are float64.

    Parameters
    ----------
    model : AutoregressiveModel
    recordings : sequence of Recording
        Their last samples, less than one mel frame, are left out.
    speakers : sequence of str
        Names in the order of their numbers.
    rank, world : int
        Of `world` processes, this one scores every `world`-th crop; the sums are to be added up.
    note : callable, optional
        Receives the bits of every sample, crop by crop: recording, first sample, bits (n,).

    Returns
    -------
    Bits
        With the names of recordings that could not be read.
    """
    longest = max((r.frames for r in recordings), default=1)
    layout = layout_of(model, min(_EVALUATION_SEGMENT, longest))
    segments = Segments(recordings, layout, speakers)
    found = Bits(np.zeros(len(recordings)), np.zeros(len(recordings), dtype=np.int64))
    training = model.training
    model.eval()
    scored = _carried if model.carries else _crops
    for batch, nats, mask in scored(model, segments, found, rank, world):
        source = batch.source.cpu().numpy()
        bits = nats.sum(1, dtype=torch.float64).cpu().numpy() / math.log(2)
        np.add.at(found.total, source, bits)
        np.add.at(found.samples, source, mask.sum(1).cpu().numpy())
        for row, n in enumerate(source if note is not None else ()):
            assert note is not None
            first, last = batch.span[row].tolist()
            if last > first:
                bits = nats[row, first:last].double().cpu().numpy() / math.log(2)
                note(recordings[n], int(batch.start[row]) + first, bits)
    model.train(training)
    return found


_Scored = Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]


def _crops(
    model: AutoregressiveModel, segments: Segments, found: Bits, rank: int, world: int
) -> _Scored:
    """Score crops, some at once: yield each batch with its nats and mask, (B, window)."""
    layout, recordings = segments.layout, segments.recordings
    device = next(model.parameters()).device
    crops = [(n, *crop) for n, each in enumerate(recordings) for crop in layout.cover(each)]
    mine, size = crops[rank::world], _EVALUATION_BATCH.get(device.type, 1)
    for at in range(0, len(mine), size):
        rows = []
        for n, start, first, last in mine[at : at + size]:
            crop = _read(recordings[n], layout, start, found)
            if crop is not None:
                rows.append(segments.item(recordings[n], n, start, first, last, crop))
        if rows:
            batch = collate(rows).to(device)
            yield batch, *crop_loss(model, batch, layout)


def _carried(
    model: AutoregressiveModel, segments: Segments, found: Bits, rank: int, world: int
) -> _Scored:
    """Score recordings from end to end with the state carried along, as `_crops`.

    Recordings of similar length run in parallel, since the samples of one wait for each other.
    """
    layout, recordings = segments.layout, segments.recordings
    device = next(model.parameters()).device
    lengths = [layout.length(recording) for recording in recordings]
    mine = sorted(range(len(lengths)), key=lengths.__getitem__)[rank::world]
    size = _EVALUATION_LANES.get(device.type, 1)
    for lanes in (mine[at : at + size] for at in range(0, len(mine), size)):
        state = model.init_state(len(lanes))
        previous = torch.full((len(lanes),), model.start_code, device=device)
        for start in range(0, lengths[lanes[-1]], layout.segment):
            items = []
            for n in lanes:
                last = max(0, min(layout.segment, lengths[n] - start))  # 0: the recording ended
                crop = _read(recordings[n], layout, start, found) if last else None
                if crop is None:
                    lengths[n], last = min(lengths[n], start), 0  # what follows has no past
                    crop = blank_crop(recordings[n], layout)
                place = start if last else 0
                items.append(segments.item(recordings[n], n, place, 0, last, crop))
            batch = collate(items).to(device)
            nats, mask = crop_loss(model, batch, layout, carried=(state, previous))
            previous = model.grid.encode(coded(batch, layout)[:, -1])
            yield batch, nats, mask


def _read(recording: Recording, layout: Layout, start: int, found: Bits) -> Crop | None:
    """Read a crop; note one that cannot be read in `found`, and return None."""
    try:
        return read_crop(recording, layout, start)
    except (ValueError, OSError, MemoryError) as error:
        found.skipped.setdefault(recording.name, reason(error, recording))
        return None


def subset(recordings: Sequence[Recording], samples: float) -> list[Recording]:
    """Return the first recordings, at least one, up to `samples` together; the last one is cut.

    A rest below `_LEAST_REST` is left out.
    """
    chosen, left = [], int(samples)
    for recording in recordings:
        if chosen and left < min(_LEAST_REST, recording.frames):
            break
        frames = min(recording.frames, max(left, _LEAST_REST))
        chosen.append(dataclasses.replace(recording, frames=frames))
        left -= recording.frames
    return chosen


def code_blocks(recording: Recording, layout: Layout, grid: Grid) -> Iterator[np.ndarray]:
    """Yield the codes that `held_out_bits` scores, block by block."""
    block, total = math.ceil(_READ_SECONDS * layout.sample_rate), layout.length(recording)
    for start in range(0, total, block):
        before = min(start, 1)
        waveform = torch.from_numpy(
            read_span(recording, layout.sample_rate, start - before, min(start + block, total))
        )
        yield grid.encode(emphasised(waveform, layout.pre_emphasis)[before:]).numpy()


@dataclass
class Counts:
    """Numbers of occurrences of codes, and of pairs of codes."""

    single: np.ndarray
    """(Q,)."""
    pairs: np.ndarray | None
    """(Q, Q), [previous, code]; silence precedes the first sample. None above 1024 classes."""

    @classmethod
    def of(cls, recordings: Iterable[Recording], layout: Layout, grid: Grid) -> Counts:
        """Count over recordings; those that cannot be read are skipped."""
        classes = grid.classes
        single = np.zeros(classes, dtype=np.int64)
        pairs = np.zeros(classes * classes, dtype=np.int64) if classes <= _MARKOV_CLASSES else None
        for recording in recordings:
            previous = grid.silence
            try:
                for codes in code_blocks(recording, layout, grid):
                    single += np.bincount(codes, minlength=classes)
                    if pairs is not None:
                        before = np.concatenate([[previous], codes[:-1]])
                        pairs += np.bincount(before * classes + codes, minlength=classes * classes)
                        previous = codes[-1]
            except (ValueError, OSError, MemoryError):
                continue
        return cls(single, None if pairs is None else pairs.reshape(classes, classes))


def baselines(train: Counts, held_out: Counts) -> dict[str, float]:
    """Return bits per sample of held-out codes under distributions fitted to training codes.

    - uniform: log2 Q.
    - unigram: p(b) = (n(b) + 1) / (n + Q) for every sample.
    - markov: order 1, p(b | a) = (n(a, b) + d(a) p(b)) / (n(a) + d(a)) with d(a) the number of
      distinct successors of a (Witten and Bell, 1991): unseen pairs fall back on the unigram. Left
      out for more than 1024 classes.

    Without held-out codes, only the uniform distribution has bits.
    """
    classes = train.single.size
    unigram = (train.single + 1) / (train.single.sum() + classes)
    found = {"uniform": math.log2(classes)}
    if not (count := int(held_out.single.sum())):
        return found
    found["unigram"] = float(-(held_out.single * np.log2(unigram)).sum() / count)
    if train.pairs is not None and held_out.pairs is not None:
        distinct = (train.pairs > 0).sum(1, keepdims=True)
        law = (train.pairs + distinct * unigram) / np.maximum(
            train.pairs.sum(1, keepdims=True) + distinct, 1
        )
        law = np.where(distinct > 0, law, unigram)
        found["markov"] = float(-(held_out.pairs * np.log2(law)).sum() / count)
    return found
