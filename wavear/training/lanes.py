"""Batches for models with unbounded context: each row reads recordings from front to back.

Row b of all batches is a lane. It plays stretches of recordings, segment after segment, and its
state is carried from one batch to the next (truncated backpropagation through time: the state
carries no gradient). The state is reset where a stretch begins.

The stretches of visit v of a lane (batches v * VISIT to v * VISIT + VISIT - 1) are a function of
(seed, lane, v), so a resumed run continues exactly, with any number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wavear.data.corpus import Recording, reason
from wavear.data.crops import Layout, Segments, blank_crop, read_crop
from wavear.data.recordings import frames_of
from wavear.models.base import AutoregressiveModel

VISIT = 32  # segments of a visit: a longer recording is played in stretches of this length


class Place(NamedTuple):
    """A segment of a lane."""

    source: int
    """Number of the recording."""
    start: int
    """First sample."""
    begins: bool
    """True if a stretch begins here."""


class Lanes(Segments):
    """Item i is the segment of lane i % batch_size in batch i // batch_size.

    A stretch is the part of a recording under a window of `VISIT` segments. All positions of the
    window are equally likely, so every second of audio has the same weight, except for cuts at the
    end of a visit.

    Parameters
    ----------
    recordings, layout, speakers, seed
        See `Segments`.
    batch_size : int
        Lanes.
    """

    def __init__(
        self,
        recordings: Sequence[Recording],
        layout: Layout,
        speakers: Sequence[str] = (),
        seed: int = 0,
        *,
        batch_size: int,
    ):
        super().__init__(recordings, layout, speakers, seed)
        self.batch_size = batch_size
        self.span = VISIT * layout.segment
        # Positions of the window: it covers at least a segment, or all of a shorter recording.
        lengths, segment = frames_of(recordings) // layout.hop * layout.hop, layout.segment
        covered = np.maximum(lengths - segment, 0) + self.span - np.minimum(segment, lengths)
        self.ends = np.cumsum(covered // layout.hop + 1, dtype=np.int64)

    def visit(self, lane: int, number: int) -> list[Place]:
        """Return the segments of a visit."""
        key = np.array([self.seed, (number << 20) + lane], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=1 << 64))
        hop, segment = self.layout.hop, self.layout.segment
        plan: list[Place] = []
        while len(plan) < VISIT:
            place = int(generator.random() * self.ends[-1])
            source = int(np.searchsorted(self.ends, place, side="right"))
            total = self.layout.length(self.recordings[source])
            position = place - (int(self.ends[source - 1]) if source else 0)
            first = position * hop + min(segment, total) - self.span
            start, stop = max(first, 0), min(first + self.span, total)
            plan += [Place(source, at, at == start) for at in range(start, stop, segment)]
        return plan[:VISIT]

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch, lane = divmod(index, self.batch_size)
        source, start, begins = self.visit(lane, batch // VISIT)[batch % VISIT]
        recording, layout = self.recordings[source], self.layout
        last = min(layout.segment, layout.length(recording) - start)
        skipped = []
        try:
            crop = read_crop(recording, layout, start)
        except (ValueError, OSError) as error:
            # The lane rests: its plan must not depend on what can be read.
            skipped, last = [(recording.name, reason(error, recording))], 0
            crop = blank_crop(recording, layout)
        item = self.item(recording, source, start, 0, last, crop)
        return item | {"begins": begins, "skipped": skipped}


class Carried:
    """States of the lanes of one process between two batches, as `export_state` of the model."""

    def __init__(
        self, model: AutoregressiveModel, lanes: int, tensors: dict[str, Tensor] | None = None
    ):
        if tensors is None:
            device = next(model.parameters()).device
            previous = torch.full((lanes,), model.start_code, device=device)
            tensors = {"previous": previous, **model.export_state(model.init_state(lanes))}
        self.tensors = tensors

    def take(self, model: AutoregressiveModel, rows: slice, begins: Tensor) -> tuple[Any, Tensor]:
        """Return the state and the last code of some lanes, reset where a stretch begins."""
        mixed = {}
        for name, fresh in Carried(model, len(begins)).tensors.items():
            tensor = self.tensors[name]
            mask = begins.reshape(-1, *[1] * (tensor.dim() - 1))
            mixed[name] = torch.where(mask, fresh.to(tensor.dtype), tensor[rows].to(mask.device))
        previous = mixed.pop("previous")
        return model.import_state(mixed), previous

    @staticmethod
    def give(model: AutoregressiveModel, state: Any, codes: Tensor) -> dict[str, Tensor]:
        """Return the tensors to carry after a segment that ends in these codes, (lanes,)."""
        exported = {name: tensor.detach() for name, tensor in model.export_state(state).items()}
        return {"previous": codes, **exported}

    def put(self, parts: list[dict[str, Tensor]]) -> None:
        """Store what `give` returned for all lanes, in order."""
        self.tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
