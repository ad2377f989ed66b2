"""Cut crops for training and validation: at random, or so that they cover a recording once.

A crop is a window of codes that begins at sample s of its recording, a multiple of the hop. With a
receptive field of R samples, the distribution of sample t depends on the samples t - R .. t - 1. So
the samples t - s >= R of the window have the same distribution as in the whole recording: they
carry loss, and those before are context. At s = 0 the past is the silence that generation starts
from too, and every sample carries loss.

The mel of a crop is computed from `margin` more samples on both sides (the conditioning's lookahead
and the Fourier windows), mirrored at the recording's ends as in `log_mel`. Frames beyond the ends
repeat the first and the last, as in `condition` of a model. So the loss of a crop equals the slice
of the loss of the whole.

    file      0 ....................................................................... T
    window              s [ context: R ][ loss .............. ] s + window
    waveform  s - margin [..................................................] s + window + margin
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch

from wavear import audio
from wavear.audio.emphasis import emphasised
from wavear.common.errors import WavearError
from wavear.data.corpus import Recording, reason
from wavear.data.recordings import frames_of
from wavear.mel.conventions import Frames
from wavear.mel.spectrogram import MelConfig, log_mel

_TRIES = 1000  # unreadable files drawn before giving up
_QUIET_TRIES = 4  # crops below the level `redraw_below` drawn before one is accepted


@dataclass(frozen=True)
class Layout:
    """Geometry of a model's crops, in samples at the model's rate."""

    segment: int
    """Samples that carry loss, a multiple of `hop`."""
    context: int
    """Samples before them, a multiple of `hop`: the receptive field or a little more."""
    receptive_field: int
    """0, like the context, if a state is carried."""
    hop: int
    """Samples per mel frame; 1 without a mel."""
    lookahead: int
    """Mel frames after a crop that its conditioning needs."""
    lookback: int
    """Mel frames before a crop that its conditioning needs."""
    mel: Frames | None
    sample_rate: int
    pre_emphasis: float = 0.0
    """See `wavear.audio.emphasis`."""

    @property
    def window(self) -> int:
        """Codes of a crop."""
        return self.context + self.segment

    @property
    def margin(self) -> int:
        """Samples read on both sides of the window for the mel and for pre-emphasis."""
        if self.mel is None:
            return int(self.pre_emphasis > 0)
        return (self.around + self.mel.context_frames) * self.hop

    @property
    def around(self) -> int:
        """Mel frames read on each side of a crop."""
        return max(self.lookback, self.lookahead)

    def length(self, recording: Recording) -> int:
        """Return the samples of a recording that can carry loss: whole frames."""
        return recording.frames // self.hop * self.hop

    def starts(self, recording: Recording) -> range:
        """Return the equally likely starts of crops; those below 0 stand for 0.

        They are there so that the first samples carry loss as often as others, although a crop at 0
        has no context.
        """
        return range(-self.context, max(self.length(recording) - self.window, 0) + 1, self.hop)

    def cover(self, recording: Recording) -> list[tuple[int, int, int]]:
        """Return crops whose losses cover the recording once.

        Each is (start, first, last): its window positions [first, last) carry loss.
        """
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
    """(B, lookback + window // hop + lookahead), int64: frames of the waveform's mel to use."""
    mel: torch.Tensor
    """These frames of mels from files, (B, M, n), float32; (B, 0, 0): computed from the audio."""
    span: torch.Tensor
    """(B, 2), int64: the window positions [first, last) that carry loss."""
    speaker: torch.Tensor
    """(B,), int64; 0 without speakers."""
    source: torch.Tensor
    """(B,), int64: the number of the recording."""
    start: torch.Tensor
    """(B,), int64: first sample of the window in the recording."""
    begins: torch.Tensor
    """(B,), bool: no state is carried over from the batch before."""
    skipped: list[tuple[str, str]]
    """Files that could not be read while drawing: name and reason."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """Return a batch with `change` applied to every tensor."""
        tensors = (getattr(self, f.name) for f in fields(self) if f.name != "skipped")
        return Batch(*map(change, tensors), skipped=self.skipped)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch on a device."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, so that copies to a GPU overlap with its work."""
        return self.map(lambda t: t.pin_memory())

    def split(self, parts: int) -> list[Batch]:
        """Return `parts` equal parts."""
        size = len(self.source) // parts
        return [self.map(lambda t, at=at: t[at : at + size]) for at in range(0, size * parts, size)]


def read_span(recording: Recording, sample_rate: int, first: int, last: int) -> np.ndarray:
    """Return samples [first, last) of a recording at `sample_rate`, float32 in [-1, 1].

    No more is decoded than they need.

    Raises
    ------
    ValueError, OSError
        As `wavear.audio.read`.
    """
    start, frames = recording.start + first, last - first
    waveform = audio.read(recording.path, sample_rate, start, frames).numpy()
    if waveform.size < frames:
        raise WavearError(
            f"ends at sample {first + waveform.size}; its header gives {last} or more"
        )
    return np.clip(waveform * np.float32(recording.gain), -1.0, 1.0)


class Crop(NamedTuple):
    """A crop as it is read."""

    waveform: np.ndarray
    """(margin + window + margin,), with `log_mel`'s padding."""
    mel: np.ndarray
    """See `Batch.mel`: (M, n) or (0, 0)."""


def read_crop(recording: Recording, layout: Layout, start: int) -> Crop:
    """Read the crop that begins at a sample; raises as `read_span`."""
    frame = start // layout.hop
    mel = file_mel(recording, layout, frame - layout.lookback, _frame_after(layout, start))
    total = recording.frames
    places = np.arange(start - layout.margin, start + layout.window + layout.margin)
    # Mirrored about the end samples, as `log_mel` pads. No frame uses samples further out.
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
    return Crop(crop, np.zeros((0, 0), np.float32) if mel is None else mel)


def blank_crop(recording: Recording, layout: Layout) -> Crop:
    """Return zeros in place of a crop that carries no loss."""
    shape = (0, 0)
    if recording.mel is not None and layout.mel is not None:
        shape = (layout.mel.bands, layout.lookback + _frame_after(layout, 0))
    waveform = np.zeros(layout.window + 2 * layout.margin, dtype=np.float32)
    return Crop(waveform, np.zeros(shape, np.float32))


def file_mel(recording: Recording, layout: Layout, first: int, last: int) -> np.ndarray | None:
    """Return frames [first, last) of a recording's mel from a file, (M, n); None if it has none.

    Frames beyond the ends repeat the first and the last.
    """
    if recording.mel is None or layout.mel is None:
        return None
    inside = np.clip(np.arange(first, last), 0, layout.length(recording) // layout.hop - 1)
    return recording.mel(inside + recording.start // layout.hop)


def _frame_after(layout: Layout, start: int) -> int:
    """Return the first frame after those of the crop at a sample."""
    return (start + layout.window) // layout.hop + layout.lookahead


def mel_of(batch: Batch, layout: Layout) -> torch.Tensor:
    """Return the mel that a model is conditioned on, (B, M, n): from files, or of the waveform."""
    if batch.mel.shape[1]:
        return batch.mel
    assert isinstance(layout.mel, MelConfig)  # features are always from files
    own = log_mel(batch.waveform, layout.mel)
    return own.gather(2, batch.frames[:, None].expand(-1, own.shape[1], -1))


def frame_indices(recording: Recording, layout: Layout, start: int) -> np.ndarray:
    """Return the frames of the crop's own mel that the model is conditioned on, (n,) int64."""
    if layout.mel is None:
        return np.zeros(0, dtype=np.int64)
    frame = start // layout.hop
    wanted = np.arange(frame - layout.lookback, _frame_after(layout, start))
    first = frame - layout.around - layout.mel.context_frames  # of the crop's own mel
    return np.clip(wanted, 0, layout.length(recording) // layout.hop - 1) - first


class Segments(torch.utils.data.Dataset):
    """The stream of random crops: item i is a function of recordings, layout, seed and i only.

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
        times, so that pauses do not fill the batches. They still occur inside louder crops, and
        occasionally by chance.
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
                crop = read_crop(recording, self.layout, start)
            except (ValueError, OSError) as error:
                # Not remembered: a draw must not depend on this worker's earlier draws.
                skipped.append((recording.name, reason(error, recording)))
                continue
            first = 0 if start == 0 else self.layout.receptive_field
            last = min(self.layout.window, self.layout.length(recording) - start)
            if self.redraw_below is not None and quiet < _QUIET_TRIES:
                lossy = crop.waveform[self.layout.margin + first : self.layout.margin + last]
                if np.mean(np.square(lossy, dtype=np.float64)) < 10 ** (self.redraw_below / 10):
                    quiet += 1
                    continue
            return self.item(recording, source, start, first, last, crop) | {"skipped": skipped}
        raise WavearError(f"none of {_TRIES} files drawn could be read; the last: {skipped[-1][1]}")

    def item(
        self,
        recording: Recording,
        source: int,
        start: int,
        first: int,
        last: int,
        crop: Crop,
    ) -> dict:
        """Return a row of a `Batch`."""
        speaker = self.speakers[recording.speaker] if self.speakers and recording.speaker else 0
        return {
            "waveform": crop.waveform,
            "mel": crop.mel,
            "frames": frame_indices(recording, self.layout, start),
            "span": (first, last),
            "speaker": speaker,
            "source": source,
            "start": start,
            "begins": True,
            "skipped": [],
        }


def collate(items: Sequence[dict[str, Any]]) -> Batch:
    """Return a `Batch` of rows."""
    skipped = [bad for item in items for bad in item["skipped"]]
    arrays = {f.name: [item[f.name] for item in items] for f in fields(Batch)}
    del arrays["skipped"]
    return Batch(
        **{name: torch.from_numpy(np.stack(rows)) for name, rows in arrays.items()}, skipped=skipped
    )


class Order(torch.utils.data.Sampler[list[int]]):
    """The numbers of the crops of each step, from `first_step` on, without end.

    Step n has the crops n * size .. (n + 1) * size - 1. Process `rank` of `world` takes its share
    in order, so all processes together draw the same crops, however many they are.
    """

    def __init__(self, size: int, first_step: int = 0, rank: int = 0, world: int = 1):
        if size % world:
            raise WavearError(
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
    """Return the waveform that the codes of a batch encode, (B, window), with pre-emphasis."""
    window = batch.waveform[:, layout.margin : layout.margin + layout.window]
    if not layout.pre_emphasis:
        return window
    before = batch.waveform[:, layout.margin - 1] * (batch.start > 0)  # silence before the start
    return emphasised(window, layout.pre_emphasis, before)
