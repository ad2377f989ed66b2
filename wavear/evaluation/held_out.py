"""Bits per sample of held-out recordings: of a model, exactly and in bounded memory, and of what needs no model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from wavear.audio.emphasis import emphasised
from wavear.audio.grid import Grid
from wavear.data.corpus import Recording, reason
from wavear.data.crops import Layout, Segments, coded, collate, read_crop, read_span
from wavear.models.base import AutoregressiveModel
from wavear.models.crop_loss import crop_loss, layout_of

_EVALUATION_SEGMENT = (
    16384  # samples of loss per crop: the context costs little, and the memory stays bounded
)
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
    """Recordings that could not be read, or in part: name and reason. What could be read of them counts."""

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
                (f"{name}: {reason}" for name, reason in self.skipped.items()), "they are too short"
            )
            raise ValueError(f"not one held-out sample can be read ({why})")
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
    """Bits of whole recordings under `model`, on the device it is on.

    The recordings are covered by crops with the receptive field in front of each, so every sample
    is scored once and with all of its past, whatever the length. Arithmetic is the model's own
    (float32), sums are float64.

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
        Is told the bits of every sample, crop by crop: recording, first sample, bits (n,).

    Returns
    -------
    Bits
        With the names of recordings that could not be read.
    """
    layout = layout_of(model, min(_EVALUATION_SEGMENT, _longest(recordings)))
    device = next(model.parameters()).device
    segments = Segments(recordings, layout, speakers)
    if model.carries:
        return _carried_bits(model, segments, rank, world, note)
    crops = [
        (n, *crop) for n, recording in enumerate(recordings) for crop in layout.cover(recording)
    ]
    found = Bits(np.zeros(len(recordings)), np.zeros(len(recordings), dtype=np.int64))
    size = _EVALUATION_BATCH.get(device.type, 1)
    training = model.training
    model.eval()
    mine = crops[rank::world]
    for at in range(0, len(mine), size):
        rows: list[dict] = []
        scored: list[tuple[Recording, int, int, int]] = []
        for n, start, first, last in mine[at : at + size]:
            waveform = _read(recordings[n], layout, start, found)
            if waveform is not None:
                rows.append(segments.item(recordings[n], n, start, first, last, waveform))
                scored.append((recordings[n], start, first, last))
        if not rows:
            continue
        batch = collate(rows).to(device)
        nats, mask = crop_loss(model, batch, layout)
        np.add.at(
            found.total,
            batch.source.cpu().numpy(),
            nats.sum(1, dtype=torch.float64).cpu().numpy() / math.log(2),
        )
        np.add.at(found.samples, batch.source.cpu().numpy(), mask.sum(1).cpu().numpy())
        for row, (recording, start, first, last) in enumerate(scored if note is not None else ()):
            assert note is not None
            note(
                recording, start + first, nats[row, first:last].double().cpu().numpy() / math.log(2)
            )
    model.train(training)
    return found


def _read(recording: Recording, layout: Layout, start: int, found: Bits) -> np.ndarray | None:
    """A crop; None if it cannot be read, which is noted in `found`."""
    try:
        return read_crop(recording, layout, start)
    except (ValueError, OSError) as error:
        found.skipped.setdefault(recording.name, reason(error, recording))
        return None


def _carried_bits(
    model: AutoregressiveModel, segments: Segments, rank: int, world: int, note: _Note | None
) -> Bits:
    """`held_out_bits` of a model that carries its state along each recording; of several processes each takes some.

    Recordings of like length run side by side, since the samples of one wait for each other.
    """
    layout, device, training = segments.layout, next(model.parameters()).device, model.training
    found = Bits(
        np.zeros(len(segments.recordings)), np.zeros(len(segments.recordings), dtype=np.int64)
    )
    lengths = [layout.length(recording) for recording in segments.recordings]
    mine = sorted(range(len(lengths)), key=lengths.__getitem__)[rank::world]
    size = _EVALUATION_LANES.get(device.type, 1)
    model.eval()
    for lanes in (mine[at : at + size] for at in range(0, len(mine), size)):
        state, previous = (
            model.init_state(len(lanes)),
            torch.full((len(lanes),), model.start_code, device=device),
        )
        for start in range(0, lengths[lanes[-1]], layout.segment):
            items = []
            for n in lanes:
                last = max(
                    0, min(layout.segment, lengths[n] - start)
                )  # 0: this recording has ended
                recording = segments.recordings[n]
                waveform = _read(recording, layout, start, found) if last else None
                if waveform is None:
                    lengths[n], last = min(lengths[n], start), 0  # what comes behind has no past
                    waveform = np.zeros(layout.window + 2 * layout.margin, dtype=np.float32)
                items.append(segments.item(recording, n, start if last else 0, 0, last, waveform))
            batch = collate(items).to(device)
            nats, mask = crop_loss(model, batch, layout, carried=(state, previous))
            previous = model.grid.encode(coded(batch, layout)[:, -1])
            found.total[lanes] += nats.sum(1, dtype=torch.float64).cpu().numpy() / math.log(2)
            found.samples[lanes] += mask.sum(1).cpu().numpy()
            for row, n in enumerate(lanes if note is not None else ()):
                assert note is not None
                if last := int(batch.span[row, 1]):
                    note(
                        segments.recordings[n],
                        start,
                        nats[row, :last].double().cpu().numpy() / math.log(2),
                    )
    model.train(training)
    return found


def _longest(recordings: Sequence[Recording]) -> int:
    return max((r.frames for r in recordings), default=1)


def subset(recordings: Sequence[Recording], samples: float) -> list[Recording]:
    """The first recordings up to `samples` together: the last one is cut there, at least one is chosen.

    A rest below `_LEAST_REST` is left away.
    """
    chosen, left = [], int(samples)
    for recording in recordings:
        if chosen and left < min(_LEAST_REST, recording.frames):
            break
        chosen.append(
            dataclasses.replace(recording, frames=min(recording.frames, max(left, _LEAST_REST)))
        )
        left -= recording.frames
    return chosen


def code_blocks(recording: Recording, layout: Layout, grid: Grid) -> Iterator[np.ndarray]:
    """The codes of a recording, as `held_out_bits` covers it, block by block."""
    block, total = math.ceil(_READ_SECONDS * layout.sample_rate), layout.length(recording)
    for start in range(0, total, block):
        before = min(start, 1)
        waveform = read_span(
            recording, layout.sample_rate, start - before, min(start + block, total)
        )
        yield grid.encode(
            emphasised(torch.from_numpy(waveform), layout.pre_emphasis)[before:]
        ).numpy()


@dataclass
class Counts:
    """How often codes, and pairs of codes, occur."""

    single: np.ndarray
    """(Q,)."""
    pairs: np.ndarray | None
    """(Q, Q), [previous, code]; the first sample follows silence. None for more than 1024 classes."""

    @classmethod
    def of(cls, recordings: Iterable[Recording], layout: Layout, grid: Grid) -> Counts:
        """Counted over recordings; those that cannot be read are passed over."""
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
            except (ValueError, OSError):
                continue
        return cls(single, None if pairs is None else pairs.reshape(classes, classes))


def baselines(train: Counts, held_out: Counts) -> dict[str, float]:
    """Bits per sample of the held-out codes under laws that need no model, fitted to the training codes.

    - uniform: log2 Q.
    - unigram: one law for every sample, p(b) = (n(b) + 1) / (n + Q).
    - markov: order 1, p(b | a) = (n(a, b) + d(a) p(b)) / (n(a) + d(a)) with d(a) the number of
      distinct successors of
      a (Witten and Bell, 1991): what was never seen falls back on the unigram. Left out for more
      than 1024 classes.
    """
    classes = train.single.size
    unigram = (train.single + 1) / (train.single.sum() + classes)
    count = max(int(held_out.single.sum()), 1)
    found = {
        "uniform": math.log2(classes),
        "unigram": float(-(held_out.single * np.log2(unigram)).sum() / count),
    }
    if train.pairs is not None and held_out.pairs is not None:
        distinct = (train.pairs > 0).sum(1, keepdims=True)
        law = (train.pairs + distinct * unigram) / np.maximum(
            train.pairs.sum(1, keepdims=True) + distinct, 1
        )
        law = np.where(distinct > 0, law, unigram)
        found["markov"] = float(-(held_out.pairs * np.log2(law)).sum() / count)
    return found
