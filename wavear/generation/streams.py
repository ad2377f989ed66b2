"""Audio as its mel arrives: one stream, or several side by side whose members come and go.

What comes out, put together, is to the bit what `wavear.generate` makes of the whole mel, however
it was cut: engines go on where they stopped, uniforms are a function of the sample's number, and
the conditioning is computed in the same blocks (`wavear/generation/conditioner.py`). Frames that no
sample to come needs are dropped: memory does not grow.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.audio.emphasis import Deemphasis, coefficient
from wavear.generation.conditioner import UtteranceConditioner
from wavear.generation.engines import (
    _ARGMAX,
    _CHUNK,
    _check_mel,
    _check_seeds,
    _check_speaker,
    _check_temperature,
    _check_truncation,
    make_engine,
    name_of_engine,
)
from wavear.generation.priming import check_prime, context, deemphasis_after, encode_prime, fill
from wavear.generation.states import FORMAT, StreamState, check_model, describe
from wavear.models.base import AutoregressiveModel
from wavear.models.frames import stacked
from wavear.models.sampling import uniforms


class Stream:
    """One utterance, made as its mel arrives, or for as long as wanted.

    Parameters
    ----------
    model : AutoregressiveModel
        Its weights must not change while streams of it are alive.
    seed : int, 0 to 2**64 - 1
    speaker : int, optional
        For a model with speakers.
    temperature : float
        Above 0; divides the logits.
    engine, weights, threads
        See `wavear.generation.engines.make_engine`.
    prime : Tensor or array, shape (T,), floating point in [-1, 1], at the model's rate, optional
        A recording to go on from, see `wavear.generate`; what comes out is what follows it. With
        mels, its frames are pushed first.
    top_k, top_p
        See `wavear.generate`.

    Raises
    ------
    ValueError
        If an argument does not fit the model.

    Examples
    --------
    >>> from wavear import MelConfig, WaveNet, WaveNetConfig, generate
    >>> config = WaveNetConfig(layers=2, stacks=1, residual_channels=4, skip_channels=4, mel=MelConfig())
    >>> model, mel = WaveNet(config), torch.randn(80, 12)
    >>> stream = Stream(model, engine="reference")
    >>> parts = [stream.push(mel[:, :5]), stream.push(mel[:, 5:]), stream.flush()]
    >>> [len(part) for part in parts]  # the look-ahead is 4 frames of 256 samples
    [256, 1792, 1024]
    >>> torch.equal(torch.cat(parts), generate(model, mel, engine="reference")[0])
    True
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        seed: int = 0,
        speaker: int | None = None,
        temperature: float = 1.0,
        engine: str = "auto",
        weights: str = "float32",
        threads: int | None = None,
        prime: Tensor | np.ndarray | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ):
        self._utterance = _Utterance(model, seed, speaker, temperature, prime, top_k, top_p)
        if self._utterance.truncation[0] == 1:
            warnings.warn(_ARGMAX, stacklevel=2)
        with torch.inference_mode():
            self.engine, self._engine = make_engine(
                model, 1, engine, weights=weights, threads=threads
            )
        self._settings: dict[str, Any] = {
            "engine": self.engine,
            "weights": weights,
            "threads": threads,
        }

    @property
    def description(self) -> str:
        """The engine, and its weights if they are rounded."""
        return name_of_engine(self.engine, self._settings["weights"])

    @property
    def position(self) -> int:
        """Samples so far, the prime among them."""
        return self._utterance.position

    @property
    def latency(self) -> int:
        """Frames that must be there before there is a first sample; 0 without mels.

        A block of frames (one, where the hop is 86 samples or more) and the look-ahead.
        """
        return self._utterance.latency

    def push(self, mel: Tensor | np.ndarray) -> Tensor:
        """The samples that these frames make certain.

        Parameters
        ----------
        mel : Tensor or array, shape (M, n), or (M,) for one frame
            The frames that follow those pushed before.

        Returns
        -------
        Tensor, shape (samples,), float32 in [-1, 1], on the CPU
            May be empty: the samples of a frame depend on the `model.lookahead` frames that follow
            it.

        Raises
        ------
        ValueError
            If the mel does not fit the model, the stream was flushed, or the model takes no mel.
        """
        self._utterance.push(mel)
        return self._make(self._utterance.ready)

    def flush(self) -> Tensor:
        """The rest: no more frames will come. (samples,), float32; the stream has then ended."""
        self._utterance.flush()
        return self._make(self._utterance.ready)

    def pull(self, samples: int) -> Tensor:
        """The next `samples` samples of a model that takes no mel: (samples,), float32 in [-1, 1].

        Raises
        ------
        ValueError
            If the model takes mels: `push` them.
        """
        self._utterance.pull(samples)
        return self._make(self._utterance.ready)

    def state(self) -> StreamState:
        """What the stream is at this moment, to go on from later, elsewhere, or twice: see `Stream.load`."""
        return self._utterance.state(self._engine.state(0))

    def save(self, path: str | Path) -> Path:
        """Write `state()` to a safetensors file; `Stream.load` goes on from it, in any process, on any engine."""
        return self.state().save(path)

    def fork(self, seed: int | None = None) -> Stream:
        """Another stream that goes on from here: the same future from the same pushes, unless it has another seed."""
        return Stream.load(self._utterance.model, self.state(), seed=seed, **self._settings)

    @classmethod
    def load(
        cls,
        model: AutoregressiveModel,
        state: StreamState | str | Path,
        *,
        seed: int | None = None,
        engine: str = "auto",
        weights: str = "float32",
        threads: int | None = None,
    ) -> Stream:
        """A stream that goes on where `state` was taken.

        On the same engine with the same weights it is to the bit as if it had never stopped. On
        another one it is what that engine would have made of the same past, up to float32 rounding.

        Parameters
        ----------
        model : AutoregressiveModel
            The one that the state is of.
        state : StreamState, or the path that `save` wrote
        seed : int, optional
            Of the samples from here on; by default the stream's own.
        engine, weights, threads
            See `wavear.generation.engines.make_engine`.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the state is of another model (the message names what differs), or the file is
            damaged.
        """
        state = state if isinstance(state, StreamState) else StreamState.load(state)
        check_model(state, model)
        stream = cls.__new__(cls)
        with torch.inference_mode():
            stream.engine, stream._engine = make_engine(
                model, 1, engine, weights=weights, threads=threads
            )
            stream._engine.load_state(0, _checked(state, stream._engine.state(0), model))
        stream._utterance = _Utterance.restored(model, state, seed)
        stream._settings = {"engine": stream.engine, "weights": weights, "threads": threads}
        return stream

    def _make(self, samples: int) -> Tensor:
        with torch.inference_mode():
            if samples and self._utterance.prime is not None:
                self._utterance.fill(self._engine, 0)
            parts = [_advance(self._engine, [self._utterance], n)[0] for n in _pieces(samples)]
        return torch.cat([torch.empty(0), *parts])


class StreamBatch:
    """Streams side by side, whose members come and go, each to the bit as if it ran alone.

    A batch shares each read of the weights: together the members are faster than apart. `step`
    moves all that have something to do; pushing the members' frames first and stepping then keeps
    them together.

    Parameters
    ----------
    model : AutoregressiveModel
    engine, weights, threads
        See `wavear.generation.engines.make_engine`.
    top_k, top_p
        See `wavear.generate`; the same for all members.

    Examples
    --------
    >>> from wavear import WaveNet, WaveNetConfig
    >>> model = WaveNet(WaveNetConfig(layers=2, stacks=1, residual_channels=4, skip_channels=4))
    >>> batch = StreamBatch(model, engine="reference")
    >>> first, second = batch.add(seed=1), batch.add(seed=2)
    >>> batch.pull(first, 30)
    >>> batch.pull(second, 20)
    >>> {member: len(audio) for member, audio in batch.step().items()}
    {0: 30, 1: 20}
    >>> batch.remove(first)
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        engine: str = "auto",
        weights: str = "float32",
        threads: int | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ):
        self.model = model
        self._truncation = _check_truncation(model, top_k, top_p, False)
        if self._truncation[0] == 1:
            warnings.warn(_ARGMAX, stacklevel=2)
        with torch.inference_mode():
            self.engine, self._engine = make_engine(
                model, 1, engine, weights=weights, threads=threads
            )
            self._beginning = self._engine.state(0)
        self._members: dict[int, _Utterance] = {}
        self._states: dict[
            int, dict[str, Tensor]
        ] = {}  # of the members that the engine does not hold
        self._seated: list[int] = []  # those that it holds, in their places
        self._next = 0

    def __len__(self) -> int:
        return len(self._members)

    def add(
        self,
        seed: int = 0,
        speaker: int | None = None,
        temperature: float = 1.0,
        prime: Tensor | np.ndarray | None = None,
        state: StreamState | str | Path | None = None,
    ) -> int:
        """A new member, with the arguments of `Stream`, or going on from a `state` (then they are the state's).

        Returns
        -------
        int: its number, by which the other methods know it
        """
        if state is None:
            utterance, tensors = (
                _Utterance(self.model, seed, speaker, temperature, prime, *self._truncation),
                self._beginning,
            )
        else:
            state = state if isinstance(state, StreamState) else StreamState.load(state)
            check_model(state, self.model)
            tensors = _checked(state, self._beginning, self.model)
            utterance = _Utterance.restored(self.model, state, None)
            if utterance.truncation != self._truncation:
                raise ValueError(
                    f"(top_k, top_p) are {utterance.truncation} in the state and {self._truncation} in the batch: "
                    "they must agree"
                )
        member, self._next = self._next, self._next + 1
        self._members[member], self._states[member] = utterance, tensors
        return member

    def push(self, member: int, mel: Tensor | np.ndarray) -> None:
        """More frames for a member, as in `Stream.push`; `step` makes the audio."""
        self._member(member).push(mel)

    def flush(self, member: int) -> None:
        """No more frames will come for a member; `step` makes the rest of its audio."""
        self._member(member).flush()

    def pull(self, member: int, samples: int) -> None:
        """Ask for `samples` more of a member, of a model that takes no mel; `step` makes them."""
        self._member(member).pull(samples)

    def step(self) -> dict[int, Tensor]:
        """Make all that is certain by now.

        Returns ------- dict from the member's number to its new samples (samples,), float32;
        without those that have none
        """
        made: dict[int, list[Tensor]] = {}
        with torch.inference_mode():
            while ready := {m: u.ready for m, u in self._members.items() if u.ready}:
                self._seat(set(ready))
                for place, member in enumerate(self._seated):
                    if self._members[member].prime is not None:
                        self._members[member].fill(self._engine, place)
                for n in _pieces(min(ready.values())):
                    parts = _advance(
                        self._engine, [self._members[member] for member in self._seated], n
                    )
                    for member, part in zip(self._seated, parts, strict=True):
                        made.setdefault(member, []).append(part)
        return {member: torch.cat(parts) for member, parts in made.items()}

    def state(self, member: int) -> StreamState:
        """What a member is at this moment, for `Stream.load`, or `add` here or in another batch."""
        utterance = self._member(member)
        seated = member not in self._states
        return utterance.state(
            self._engine.state(self._seated.index(member)) if seated else self._states[member]
        )

    def remove(self, member: int) -> None:
        """Forget a member; what it did not make is lost."""
        self._member(member)
        del self._members[member]
        self._states.pop(member, None)

    def _member(self, member: int) -> _Utterance:
        if member not in self._members:
            raise ValueError(f"there is no member {member!r}: it was never added, or is removed")
        return self._members[member]

    def _seat(self, members: set[int]) -> None:
        """Let the engine hold exactly these members; who stays keeps the place, where as many come as go."""
        old = dict(enumerate(self._seated))
        if members == set(self._seated):
            return
        stay = (
            {place for place, member in old.items() if member in members}
            if len(members) == len(old)
            else set()
        )
        for place, member in old.items():
            if place not in stay and member in self._members:
                self._states[member] = self._engine.state(place)
        if len(members) != len(old):
            self._engine = self._engine.resized(len(members))
        coming = iter(sorted(members - {old[place] for place in stay}))
        self._seated = [
            old[place] if place in stay else next(coming) for place in range(len(members))
        ]
        for place, member in enumerate(self._seated):
            if place not in stay:
                self._engine.load_state(place, self._states.pop(member))


class _Utterance:
    """A stream without its engine: what was given for it, and how far it has come."""

    def __init__(
        self,
        model: AutoregressiveModel,
        seed: int,
        speaker: int | None,
        temperature: float,
        prime: Any,
        top_k: int | None,
        top_p: float | None,
    ):
        self.model = model
        self.truncation = _check_truncation(model, top_k, top_p, False)
        if not isinstance(seed, int | np.integer):
            raise ValueError(f"seed is {seed!r}, it must be a whole number from 0 to 2**64 - 1")
        self.seed = _check_seeds(seed)[0]
        speakers = _check_speaker(speaker, model.config.speakers)
        if speakers is not None and len(speakers) != 1:
            raise ValueError(f"speaker is {speaker!r}: a stream has one")
        self.speaker = None if speakers is None else speakers[0]
        scale = _check_temperature(temperature, 1, 1)
        if isinstance(scale, np.ndarray):
            raise ValueError(f"temperature is {temperature!r}: a stream has one number")
        self.temperature = scale
        self.conditioner = UtteranceConditioner(model, self.speaker)
        self.position = 0
        self.asked = 0  # samples, prime and all, of a model without mels
        self.prime: np.ndarray | None = None  # codes (P,), until they are filled in
        self.deemphasis = Deemphasis(coefficient(model.config))
        if prime is not None:
            waveform = check_prime(prime)
            if len(waveform) != 1:
                raise ValueError(
                    f"prime has shape {tuple(waveform.shape)}: a stream has one, of shape (T,)"
                )
            self.position = self.asked = waveform.shape[1]
            self.prime = encode_prime(waveform, model)[0]
            self.deemphasis = deemphasis_after(waveform[0], model)

    @property
    def latency(self) -> int:
        return self.conditioner.block + self.model.lookahead if self.conditioner.has_mel else 0

    @property
    def ready(self) -> int:
        """Samples that can be made now."""
        return max(
            0,
            (self.conditioner.certain if self.conditioner.has_mel else self.asked) - self.position,
        )

    def push(self, mel: Tensor | np.ndarray) -> None:
        # A copy of an array: torch warns of memory that it may not write, and takes no negative
        # strides.
        mel = mel if isinstance(mel, Tensor) else torch.from_numpy(np.array(mel))
        if not self.conditioner.has_mel:
            raise ValueError(
                "the model takes no mel: it was trained without mel conditioning; pull samples instead"
            )
        if self.conditioner.closed:
            raise ValueError("the stream was flushed, it has ended: begin a new one")
        mel = mel[:, None] if mel.dim() == 1 else mel
        if mel.dim() != 2:
            raise ValueError(f"mel has shape {tuple(mel.shape)}, expected (M, n) or (M,)")
        if mel.shape == (self.model.config.mel.bands, 0):
            return
        self.conditioner.push(_check_mel(mel, self.model.config.mel)[0])  # type: ignore[index]
        self.conditioner.forget(self._needed())

    def flush(self) -> None:
        if not self.conditioner.has_mel:
            raise ValueError(
                "the model takes no mel: there is nothing to flush, pull samples instead"
            )
        if self.conditioner.closed:
            raise ValueError("the stream was flushed before, it has ended")
        covered = self.conditioner.frames * self.conditioner.hop
        if covered < self.position:
            raise ValueError(
                f"the mel covers {covered} samples and the prime has {self.position}: push its frames too"
            )
        self.conditioner.close()

    def pull(self, samples: int) -> None:
        if self.conditioner.has_mel:
            raise ValueError(
                "the model is conditioned on mels: push them, and each push returns samples"
            )
        if isinstance(samples, bool) or not isinstance(samples, int | np.integer) or samples < 0:
            raise ValueError(f"samples is {samples!r}, it must be a whole number of at least 0")
        self.asked += int(samples)

    def fill(self, engine: Any, place: int) -> None:
        """Move the engine past the prime."""
        assert self.prime is not None
        fill(engine, place, self.model, self.prime, self.conditioner)
        self.prime = None

    def inputs(self, samples: int) -> tuple[np.ndarray, Any]:
        """Uniforms (n,) and conditioning (1, C, n), (1, C, 1) or None of the next samples."""
        cond = self.conditioner.span(self.position, self.position + samples)
        return uniforms(self.seed, self.position, samples), cond

    def moved(self, samples: int) -> None:
        self.position += samples
        self.conditioner.forget(self._needed())

    def _needed(self) -> int:
        """The first sample whose conditioning will be asked for."""
        return self.position if self.prime is None else context(self.model, len(self.prime))

    def state(self, tensors: dict[str, Tensor]) -> StreamState:
        tensors = dict(tensors)
        if self.conditioner.frames:
            tensors["mel"] = self.conditioner.held.cpu().contiguous()
        if self.prime is not None:
            tensors["prime"] = torch.from_numpy(self.prime)
        about = {
            "format": FORMAT,
            "position": self.position,
            "asked": self.asked,
            "seed": self.seed,
            "speaker": self.speaker,
            "temperature": self.temperature,
            "top_k": self.truncation[0],
            "top_p": self.truncation[1],
            "first_frame": self.conditioner.first_held,
            "closed": self.conditioner.closed,
            "deemphasis": self.deemphasis.memory,
            "model": describe(self.model),
        }
        return StreamState(tensors, about)

    @classmethod
    def restored(
        cls, model: AutoregressiveModel, state: StreamState, seed: int | None
    ) -> _Utterance:
        about = state.about
        own = about["seed"] if seed is None else seed
        utterance = cls(
            model, own, about["speaker"], about["temperature"], None, about["top_k"], about["top_p"]
        )
        utterance.position, utterance.asked = about["position"], about["asked"]
        utterance.deemphasis.memory = about.get("deemphasis", 0.0)
        if "mel" in state.tensors:
            utterance.conditioner.hold(state.tensors["mel"], about["first_frame"], about["closed"])
        elif about["closed"]:
            utterance.conditioner.close()
        if "prime" in state.tensors:
            utterance.prime = state.tensors["prime"].numpy()
        return utterance


def _advance(engine: Any, utterances: list[_Utterance], samples: int) -> list[Tensor]:
    """The next samples (n,) of each; the engine holds exactly these."""
    draws, rows = zip(*(utterance.inputs(samples) for utterance in utterances), strict=True)
    cond = None if rows[0] is None else stacked(rows)
    temperatures = np.repeat([[utterance.temperature] for utterance in utterances], samples, axis=1)
    top_k, top_p = utterances[0].truncation
    codes = engine.generate(np.stack(draws), cond, temperatures, top_k=top_k, top_p=top_p)
    for utterance in utterances:
        utterance.moved(samples)
    decoded = utterances[0].model.grid.decode(torch.from_numpy(codes))
    return [utterance.deemphasis(row) for utterance, row in zip(utterances, decoded, strict=True)]


def _pieces(samples: int) -> list[int]:
    """Sizes of calls of an engine: at most a fraction of a second each, so that Ctrl-C is prompt."""
    return [min(_CHUNK, samples - start) for start in range(0, samples, _CHUNK)]


def _checked(
    state: StreamState, pattern: dict[str, Tensor], model: AutoregressiveModel
) -> dict[str, Tensor]:
    """The engine's part of a state, whose names and shapes are those of `pattern`."""
    tensors = {
        name: tensor for name, tensor in state.tensors.items() if name not in ("mel", "prime")
    }
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in each.items()} for each in (tensors, pattern)
    ]
    codes = [tensors.get("previous", torch.tensor([-1]))]
    codes += [state.tensors[name] for name in ("prime", "codes", "past") if name in state.tensors]
    mel = state.tensors.get("mel")
    sound = shapes[0] == shapes[1] and int(tensors.get("time", torch.tensor([0])).min()) >= 0
    sound = sound and all(0 <= int(c.min()) <= int(c.max()) < model.config.classes for c in codes)
    if not sound or (
        mel is not None
        and (mel.dim() != 2 or len(mel) != model.config.mel.bands or not mel.numel())
    ):
        raise ValueError(
            "the state is damaged: its tensors are not those of a stream of this model"
        )
    return tensors
