"""Random segments of recordings, and the crops that cover a recording once: what training and validation feed a model.

A crop is a window of codes that begins at sample s of its recording, a multiple of the hop. With a
receptive field of R samples, the law of sample t needs the samples t - R .. t - 1, so inside the
window the samples t - s >= R have the law they have in the whole recording: these carry loss, the
ones before are context. Where s = 0 the recording begins, its past is the silence that generation
starts from too, and every sample carries loss.

The mel of a crop is computed from `margin` more samples on both sides (the frames the conditioning
looks ahead, plus what the windows of the Fourier transform see), mirrored at the recording's ends
as `log_mel` mirrors them, and frames beyond the ends repeat the first and the last, as `condition`
of a model repeats them. So the loss of a crop is the slice of the loss of the whole.

    file      0 ....................................................................... T
    window              s [ context: R ][ loss .............. ] s + window
    waveform  s - margin [..................................................] s + window + margin
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from wavear import audio
from wavear.audio.emphasis import emphasised
from wavear.data.corpus import Recording, reason
from wavear.data.recordings import frames_of
from wavear.mel.spectrogram import MelConfig

_TRIES = 1000  # files drawn in vain before we believe that none can be read
_QUIET_TRIES = 4  # crops below the level `redraw_below`, before one is taken nevertheless


@dataclass(frozen=True)
class Layout:
    """Geometry of the crops of a model; everything in samples at the model's rate."""

    segment: int
    """Samples that carry loss, a multiple of `hop`."""
    context: int
    """Samples in front of them, a multiple of `hop`: the receptive field or a little more."""
    receptive_field: int
    """0, like the context, where a state is carried."""
    hop: int
    """Samples per mel frame; 1 without a mel."""
    lookahead: int
    """Mel frames behind a crop that its conditioning needs."""
    lookback: int
    """Mel frames in front of a crop that its conditioning needs."""
    mel: MelConfig | None
    sample_rate: int
    pre_emphasis: float = 0.0
    """See `wavear.audio.emphasis`."""

    @property
    def window(self) -> int:
        """Codes of a crop."""
        return self.context + self.segment

    @property
    def margin(self) -> int:
        """Samples read on both sides of the window for the mel's sake, and that of pre-emphasis."""
        return (
            int(self.pre_emphasis > 0)
            if self.mel is None
            else (self.around + self.mel.context_frames) * self.hop
        )

    @property
    def around(self) -> int:
        """Mel frames that a crop is read with on each side."""
        return max(self.lookback, self.lookahead)

    def length(self, recording: Recording) -> int:
        """Samples of a recording that can carry loss: whole frames."""
        return recording.frames // self.hop * self.hop

    def starts(self, recording: Recording) -> range:
        """Where crops may begin, each as likely as the next; those below 0 stand for 0.

        Some are below 0 so that the first samples are drawn as often as others: a crop at 0 has no
        context to lose.
        """
        return range(-self.context, max(self.length(recording) - self.window, 0) + 1, self.hop)

    def cover(self, recording: Recording) -> list[tuple[int, int, int]]:
        """(start, first, last) of crops whose loss, on window positions [first, last), covers the recording once."""
        total = self.length(recording)
        crops = [(0, 0, min(self.window, total))]
        for start in range(self.segment, total - self.context, self.segment):
            crops.append((start, self.context, min(self.window, total - start)))
        return crops


@dataclass
class Batch:
    """Crops, on the host or on the device."""

    waveform: torch.Tensor
    """(B, margin + window + margin), float32 in [-1, 1]."""
    frames: torch.Tensor
    """(B, lookback + window // hop + lookahead), int64: which frames of the waveform's own mel to condition on."""
    span: torch.Tensor
    """(B, 2), int64: the window positions [first, last) that carry loss."""
    speaker: torch.Tensor
    """(B,), int64; 0 without speakers."""
    source: torch.Tensor
    """(B,), int64: the number of the recording."""
    start: torch.Tensor
    """(B,), int64: where in the recording the window begins."""
    begins: torch.Tensor
    """(B,), bool: no state is carried over from the batch before."""
    skipped: list[tuple[str, str]]
    """Files that could not be read while this batch was drawn: name and reason."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """With `change` applied to every tensor."""
        tensors = {
            f.name: change(getattr(self, f.name)) for f in fields(self) if f.name != "skipped"
        }
        return Batch(**tensors, skipped=self.skipped)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """On a device."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """In page-locked memory, from where copies to a GPU overlap with its work."""
        return self.map(lambda t: t.pin_memory())

    def split(self, parts: int) -> list[Batch]:
        """In `parts` equal parts."""
        size = len(self.source) // parts
        return [self.map(lambda t, at=at: t[at : at + size]) for at in range(0, size * parts, size)]


def read_span(recording: Recording, sample_rate: int, first: int, last: int) -> np.ndarray:
    """Samples [first, last) of a recording at `sample_rate`, float32 in [-1, 1], decoding no more than they need.

    Raises
    ------
    ValueError, OSError
        As `wavear.audio.read`.
    """
    waveform = audio.read(
        recording.path, sample_rate, recording.start + first, last - first
    ).numpy()
    if waveform.size < last - first:
        raise ValueError(
            f"ends at sample {first + waveform.size}, before the {last} its header promises"
        )
    return np.clip(waveform * np.float32(recording.gain), -1.0, 1.0)


def read_crop(recording: Recording, layout: Layout, start: int) -> np.ndarray:
    """The waveform of a crop, shape (margin + window + margin,), with what `log_mel` sees beyond the ends."""
    total = recording.frames
    places = np.arange(start - layout.margin, start + layout.window + layout.margin)
    # Mirrored about the end samples, as `log_mel` pads; further out than any frame looks, it is all
    # the same.
    period = max(2 * (total - 1), 1)
    mirrored = places % period
    mirrored = np.minimum(np.minimum(mirrored, period - mirrored), total - 1)
    needed = (places < total + layout.margin) & (places >= -layout.margin)
    if layout.mel is None or layout.mel.padding == "zeros":
        needed &= (places >= 0) & (places < total)
    inside = mirrored[needed]
    first, last = int(inside.min()), int(inside.max()) + 1
    crop = np.zeros(places.size, dtype=np.float32)
    crop[needed] = read_span(recording, layout.sample_rate, first, last)[inside - first]
    return crop


def frame_indices(recording: Recording, layout: Layout, start: int) -> np.ndarray:
    """Which frames of the crop's own mel stand for the frames the model is conditioned on; shape (n,), int64."""
    if layout.mel is None:
        return np.zeros(0, dtype=np.int64)
    frame = start // layout.hop
    wanted = np.arange(
        frame - layout.lookback, frame + layout.window // layout.hop + layout.lookahead
    )
    first = frame - layout.around - layout.mel.context_frames  # of the crop's own mel
    return np.clip(wanted, 0, layout.length(recording) // layout.hop - 1) - first


class Segments(torch.utils.data.Dataset):
    """The stream of random crops: item i is a function of (recordings, layout, seed, i), whoever draws it and when.

    Parameters
    ----------
    recordings : sequence of Recording
        Drawn with probability proportional to their length, so that every second of audio counts
        the same.
    layout : Layout
    speakers : sequence of str
        Names in the order of their numbers; empty without speakers.
    seed : int
    redraw_below : float, optional
        dB of full scale (-60, say): a crop whose loss lies on quieter audio is drawn again, up to 4
        times, so that pauses do not fill the batches. They are still heard: inside louder crops,
        and one time in a while by chance.
    """

    def __init__(
        self,
        recordings: Sequence[Recording],
        layout: Layout,
        speakers: Sequence[str] = (),
        seed: int = 0,
        redraw_below: float | None = None,
    ):
        self.recordings = recordings
        self.layout = layout
        self.speakers = {name: number for number, name in enumerate(speakers)}
        self.seed = seed
        self.redraw_below = redraw_below
        self.ends = np.cumsum(frames_of(recordings) // layout.hop * layout.hop, dtype=np.int64)

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = np.random.Generator(
            np.random.Philox(key=np.array([self.seed, index], dtype=np.uint64))
        )
        skipped: list[tuple[str, str]] = []
        quiet = 0
        for _ in range(_TRIES):
            which, where = generator.random(2)
            source = int(np.searchsorted(self.ends, which * self.ends[-1], side="right"))
            recording = self.recordings[source]
            starts = self.layout.starts(recording)
            start = max(starts[int(where * len(starts))], 0)
            try:
                waveform = read_crop(recording, self.layout, start)
            except (ValueError, OSError) as error:
                # Not remembered: what is drawn must not depend on what this worker met before.
                skipped.append((recording.name, reason(error, recording)))
                continue
            first = 0 if start == 0 else self.layout.receptive_field
            last = min(self.layout.window, self.layout.length(recording) - start)
            if self.redraw_below is not None and quiet < _QUIET_TRIES:
                heard = waveform[self.layout.margin + first : self.layout.margin + last]
                if np.mean(np.square(heard, dtype=np.float64)) < 10 ** (self.redraw_below / 10):
                    quiet += 1
                    continue
            return self.item(recording, source, start, first, last, waveform) | {"skipped": skipped}
        raise ValueError(f"none of {_TRIES} files drawn could be read; the last: {skipped[-1][1]}")

    def item(
        self,
        recording: Recording,
        source: int,
        start: int,
        first: int,
        last: int,
        waveform: np.ndarray,
    ) -> dict:
        """One row of a `Batch`."""
        return {
            "waveform": waveform,
            "frames": frame_indices(recording, self.layout, start),
            "span": (first, last),
            "speaker": self.speakers[recording.speaker]
            if self.speakers and recording.speaker
            else 0,
            "source": source,
            "start": start,
            "begins": True,
            "skipped": [],
        }


def collate(items: Sequence[dict[str, Any]]) -> Batch:
    """Rows to a `Batch`."""
    return Batch(
        torch.from_numpy(np.stack([item["waveform"] for item in items])),
        torch.from_numpy(np.stack([item["frames"] for item in items])),
        torch.tensor([item["span"] for item in items]),
        torch.tensor([item["speaker"] for item in items]),
        torch.tensor([item["source"] for item in items]),
        torch.tensor([item["start"] for item in items]),
        torch.tensor([item["begins"] for item in items]),
        skipped=[bad for item in items for bad in item["skipped"]],
    )


class Order(torch.utils.data.Sampler[list[int]]):
    """Numbers of the crops of each step, from `first_step` on, without end.

    Step n has the crops n * size .. (n + 1) * size - 1, of which process `rank` of `world` takes
    its share in order: together the processes see the same crops whatever their number.
    """

    def __init__(self, size: int, first_step: int = 0, rank: int = 0, world: int = 1):
        if size % world:
            raise ValueError(
                f"a batch of {size} crops cannot be shared by {world} processes: choose a multiple"
            )
        self.size, self.first_step, self.rank, self.world = size, first_step, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        share = self.size // self.world
        step = self.first_step
        while True:
            begin = step * self.size + self.rank * share
            yield list(range(begin, begin + share))
            step += 1


def coded(batch: Batch, layout: Layout) -> torch.Tensor:
    """What the codes of a batch are of, (B, window): the waveform, pre-emphasised if the model's is."""
    window = batch.waveform[:, layout.margin : layout.margin + layout.window]
    if not layout.pre_emphasis:
        return window
    before = batch.waveform[:, layout.margin - 1] * (
        batch.start > 0
    )  # in front of a recording is silence
    return emphasised(window, layout.pre_emphasis, before)
