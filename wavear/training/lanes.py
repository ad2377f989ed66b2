"""Training data for models whose past is unbounded: every row of the batches reads recordings from front to back.

Row b of all batches is a lane. It plays stretches of recordings, segment after segment, and the
state goes along from one batch to the next (truncated backpropagation through time: the state
carries no gradient). Where a stretch begins, the state begins anew.

What a lane plays in its visit v (`VISIT` segments, batches v * VISIT and following) is a function
of (seed, lane, v): so a resumed run reads on where it stopped, whatever workers there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.data.corpus import Recording, reason
from wavear.data.crops import Layout, Segments, read_crop
from wavear.data.recordings import frames_of
from wavear.models.base import AutoregressiveModel

VISIT = 32  # segments of a visit: a recording of more is played in stretches of it


class Lanes(Segments):
    """Item i is the segment of lane i % batch_size in batch i // batch_size.

    A stretch is what a window of `VISIT` segments covers of a recording, at a random place, each
    place of all as likely as another: so every second of audio counts the same, but for what the
    end of a visit cuts off.

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
        lengths = frames_of(recordings) // layout.hop * layout.hop
        self.ends = np.cumsum(self._places(lengths), dtype=np.int64)

    def _places(self, lengths: np.ndarray) -> np.ndarray:
        """Where the window may lie: it covers at least a segment, or all of a recording that is shorter."""
        segment = self.layout.segment
        covered = np.maximum(lengths - segment, 0) + self.span - np.minimum(segment, lengths)
        return covered // self.layout.hop + 1

    def visit(self, lane: int, number: int) -> list[tuple[int, int, bool]]:
        """(recording, start, whether a stretch begins) of each segment of a visit."""
        key = np.array([self.seed, (number << 20) + lane], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=1 << 64))
        hop, segment = self.layout.hop, self.layout.segment
        plan: list[tuple[int, int, bool]] = []
        while len(plan) < VISIT:
            place = int(generator.random() * self.ends[-1])
            source = int(np.searchsorted(self.ends, place, side="right"))
            total = self.layout.length(self.recordings[source])
            first = (
                (place - (int(self.ends[source - 1]) if source else 0)) * hop
                + min(segment, total)
                - self.span
            )
            start, stop = max(first, 0), min(first + self.span, total)
            plan += [(source, at, at == start) for at in range(start, stop, segment)]
        return plan[:VISIT]

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch, lane = divmod(index, self.batch_size)
        source, start, begins = self.visit(lane, batch // VISIT)[batch % VISIT]
        recording = self.recordings[source]
        last = min(self.layout.segment, self.layout.length(recording) - start)
        skipped = []
        try:
            waveform = read_crop(recording, self.layout, start)
        except (ValueError, OSError) as error:
            # The lane rests: what it plays must not depend on what can be read.
            skipped, last = [(recording.name, reason(error, recording))], 0
            waveform = np.zeros(self.layout.window + 2 * self.layout.margin, dtype=np.float32)
        item = self.item(recording, source, start, 0, last, waveform)
        return item | {"begins": begins, "skipped": skipped}


class Carried:
    """The states of the lanes of one process between two batches, as `AutoregressiveModel.export_state` has them."""

    def __init__(
        self, model: AutoregressiveModel, lanes: int, tensors: dict[str, Tensor] | None = None
    ):
        if tensors is None:
            previous = torch.full(
                (lanes,), model.start_code, device=next(model.parameters()).device
            )
            tensors = {"previous": previous, **model.export_state(model.init_state(lanes))}
        self.tensors = tensors

    def take(self, model: AutoregressiveModel, rows: slice, begins: Tensor) -> tuple[Any, Tensor]:
        """The state of some lanes, and the code that each of them read last; anew where a stretch begins."""
        fresh = Carried(model, len(begins)).tensors
        mixed = {}
        for name, tensor in self.tensors.items():
            mask = begins.reshape(-1, *[1] * (tensor.dim() - 1))
            mixed[name] = torch.where(
                mask, fresh[name].to(tensor.dtype), tensor[rows].to(mask.device)
            )
        previous = mixed.pop("previous")
        return model.import_state(mixed), previous

    @staticmethod
    def give(model: AutoregressiveModel, state: Any, codes: Tensor) -> dict[str, Tensor]:
        """What is to be carried on after a segment that ended in these codes, (lanes,)."""
        return {
            "previous": codes,
            **{name: tensor.detach() for name, tensor in model.export_state(state).items()},
        }

    def put(self, parts: list[dict[str, Tensor]]) -> None:
        """Take over what `give` gave of all lanes, in order."""
        self.tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
