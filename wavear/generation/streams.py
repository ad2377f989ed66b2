"""Audio as its mel arrives: one stream, or several side by side whose members come and go.

The parts of a stream equal `wavear.generate` of the whole mel bit for bit, wherever it was cut:
engines resume, uniforms are a function of the sample's number, and the conditioning is computed in
the same blocks (`wavear/generation/conditioner.py`). Frames that no later sample needs are dropped,
so memory does not grow.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wavear.common.errors import WavearError
from wavear.generation.engine import Engine
from wavear.generation.engines import make_engine, name_of_engine
from wavear.generation.progress import CHUNK
from wavear.generation.settings import Sampling
from wavear.generation.states import StreamState, check_model, describe, engine_tensors
from wavear.generation.utterance import Utterance, advance
from wavear.models.base import AutoregressiveModel


class Stream:
    """One utterance, made as its mel arrives, or sample by sample without an end.

    Parameters
    ----------
    model : AutoregressiveModel
        Its weights must not change while streams of it are alive.
    seed : int, 0 to 2**64 - 1
    speaker : int or str, optional
        Number or name, for a model with speakers.
    temperature : float
        Above 0; divides the logits.
    engine, weights, threads
        See `wavear.generation.engines.make_engine`.
    prime : Tensor or array, shape (T,), floating point in [-1, 1], at the model's rate, optional
        A recording to continue, see `wavear.generate`; the stream returns the audio after it. With
        mels, its frames are pushed first.
    top_k, top_p
        See `wavear.generate`.

    Raises
    ------
    WavearError
        If an argument does not fit the model.

    Examples
    --------
    >>> from wavear import MelConfig, WaveNet, WaveNetConfig, generate
    >>> sizes = {"layers": 2, "stacks": 1, "residual_channels": 4, "skip_channels": 4}
    >>> model = WaveNet(WaveNetConfig(**sizes, mel=MelConfig()))
    >>> mel = torch.randn(80, 12)
    >>> stream = Stream(model)
    >>> parts = [stream.push(mel[:, :5]), stream.push(mel[:, 5:]), stream.flush()]
    >>> [len(part) for part in parts]  # the look-ahead is 4 frames of 256 samples
    [256, 1792, 1024]
    >>> torch.equal(torch.cat(parts), generate(model, mel)[0])
    True
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        seed: int = 0,
        speaker: int | str | None = None,
        temperature: float = 1.0,
        engine: str = "auto",
        weights: str = "float32",
        threads: int | None = None,
        prime: Tensor | np.ndarray | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ):
        sampling = Sampling(
            seed, temperature, top_k, top_p, speaker=speaker, engine=engine, weights=weights,
            threads=threads,
        )  # fmt: skip
        self._utterance = Utterance(model, sampling.checked(model), prime)
        self._start_engine(model, sampling)

    def _start_engine(self, model: AutoregressiveModel, runs: Sampling) -> None:
        with torch.inference_mode():
            self.engine, self._engine = make_engine(
                model, 1, runs.engine, weights=runs.weights, threads=runs.threads
            )
        self._runs = dataclasses.replace(runs, engine=self.engine)

    @classmethod
    def with_settings(cls, model: AutoregressiveModel, sampling: Sampling) -> Stream:
        """Return a stream with these settings, of which `best_of` and `particles` must be 1."""
        if sampling.best_of > 1:
            raise WavearError("best_of compares whole utterances; a stream is heard before it ends")
        if sampling.particles > 1:
            raise WavearError("particles are chosen by what follows; a stream is heard before that")
        stream = cls.__new__(cls)
        stream._utterance = Utterance(model, sampling.checked(model))
        stream._start_engine(model, sampling)
        return stream

    @property
    def description(self) -> str:
        """The engine, and its weights if they are rounded."""
        return name_of_engine(self.engine, self._runs.weights)

    @property
    def position(self) -> int:
        """Samples so far, including the prime."""
        return self._utterance.position

    @property
    def latency(self) -> int:
        """Frames that are needed for the first sample; 0 without mels.

        A block of frames (one, where the hop is 86 samples or more) and the look-ahead.
        """
        return self._utterance.latency

    def push(self, mel: Tensor | np.ndarray) -> Tensor:
        """Append frames and return the samples that they determine.

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
        WavearError
            If the mel does not fit the model, the stream was flushed, or the model takes no mel.
        """
        self._utterance.push(mel)
        return self._make()

    def flush(self) -> Tensor:
        """Declare the frames complete and return the rest, (samples,), float32; the stream ends."""
        self._utterance.flush()
        return self._make()

    def pull(self, samples: int) -> Tensor:
        """Return the next samples of a model that takes no mel: (samples,), float32 in [-1, 1].

        Raises
        ------
        WavearError
            If the model takes mels: `push` them.
        """
        self._utterance.pull(samples)
        return self._make()

    def state(self) -> StreamState:
        """Return the present state, to resume later, elsewhere, or twice: see `Stream.load`."""
        return self._utterance.state(self._engine.state(0), describe(self._utterance.model))

    def save(self, path: str | Path) -> Path:
        """Write `state()` to a safetensors file, for `Stream.load` in any process."""
        return self.state().save(path)

    def fork(self, seed: int | None = None) -> Stream:
        """Return another stream from here: the same future, or that of another seed."""
        return Stream.load(
            self._utterance.model,
            self.state(),
            seed=seed,
            engine=self.engine,
            weights=self._runs.weights,
            threads=self._runs.threads,
        )

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
        """Return a stream that resumes a `state`.

        On the same engine with the same weights it equals the uninterrupted stream bit for bit. On
        another one it equals that engine's own up to float32 rounding.

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
        WavearError
            If the state is of another model (the message names the differences), or the file is
            damaged.
        """
        state = state if isinstance(state, StreamState) else StreamState.load(state)
        check_model(state, describe(model))
        stream = cls.__new__(cls)
        stream._start_engine(model, Sampling(engine=engine, weights=weights, threads=threads))
        with torch.inference_mode():
            stream._engine.load_state(0, engine_tensors(state, stream._engine.state(0), model))
        stream._utterance = Utterance.restored(model, state, seed)
        return stream

    def _make(self) -> Tensor:
        with torch.inference_mode():
            if samples := self._utterance.ready:
                self._utterance.fill(self._engine, 0)
            parts = [advance(self._engine, [self._utterance], n)[0] for n in _pieces(samples)]
        return torch.cat([torch.empty(0), *parts])


class StreamBatch:
    """Streams side by side that come and go, each bit for bit as if it ran by itself.

    A batch shares each read of the weights: together the members are faster than one by one. `step`
    moves all members that can move; push the frames of all of them before a step to keep them
    together.

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
        self._sampling = Sampling(top_k=top_k, top_p=top_p).checked(model)
        self._engine: Engine
        with torch.inference_mode():
            self.engine, self._engine = make_engine(
                model, 1, engine, weights=weights, threads=threads
            )
            self._beginning = self._engine.state(0)
        self._model = describe(model)  # once: hashes of the weights, which the engine has packed
        self._members: dict[int, Utterance] = {}
        # The states of the members that the engine does not hold, and the members that it holds.
        self._states: dict[int, dict[str, Tensor]] = {}
        self._seated: list[int] = []
        self._next = 0

    def __len__(self) -> int:
        return len(self._members)

    def add(
        self,
        seed: int = 0,
        speaker: int | str | None = None,
        temperature: float = 1.0,
        prime: Tensor | np.ndarray | None = None,
        state: StreamState | str | Path | None = None,
    ) -> int:
        """Add a member, with the arguments of `Stream`, or one that resumes a `state`.

        Returns
        -------
        int: the number of the member for the other methods
        """
        if state is None:
            sampling = dataclasses.replace(
                self._sampling, seed=seed, speaker=speaker, temperature=temperature
            )
            utterance = Utterance(self.model, sampling.checked(self.model, quiet=True), prime)
            tensors = self._beginning
        else:
            state = state if isinstance(state, StreamState) else StreamState.load(state)
            check_model(state, self._model)
            tensors = engine_tensors(state, self._beginning, self.model)
            utterance = Utterance.restored(self.model, state)
            theirs, ours = ((s.top_k, s.top_p) for s in (utterance.sampling, self._sampling))
            if theirs != ours:
                raise WavearError(
                    f"(top_k, top_p) are {theirs} in the state and {ours} in the batch: they must"
                    " agree"
                )
        member, self._next = self._next, self._next + 1
        self._members[member], self._states[member] = utterance, tensors
        return member

    def push(self, member: int, mel: Tensor | np.ndarray) -> None:
        """Append frames of a member, as in `Stream.push`; `step` makes the audio."""
        self._member(member).push(mel)

    def flush(self, member: int) -> None:
        """Declare the frames of a member complete; `step` makes the rest of its audio."""
        self._member(member).flush()

    def pull(self, member: int, samples: int) -> None:
        """Ask for `samples` more of a member, of a model that takes no mel; `step` makes them."""
        self._member(member).pull(samples)

    def step(self) -> dict[int, Tensor]:
        """Make all samples that are determined by now.

        Returns
        -------
        dict from the number of each member that has new samples to them, (samples,), float32
        """
        made: dict[int, list[Tensor]] = {}
        with torch.inference_mode():
            while ready := {m: u.ready for m, u in self._members.items() if u.ready}:
                self._seat(set(ready))
                utterances = [self._members[member] for member in self._seated]
                for place, utterance in enumerate(utterances):
                    utterance.fill(self._engine, place)
                for n in _pieces(min(ready.values())):
                    parts = advance(self._engine, utterances, n)
                    for member, part in zip(self._seated, parts, strict=True):
                        made.setdefault(member, []).append(part)
        return {member: torch.cat(parts) for member, parts in made.items()}

    def state(self, member: int) -> StreamState:
        """Return a member's present state, for `Stream.load`, or `add` here or in another batch."""
        utterance = self._member(member)
        seated = member not in self._states
        place = self._seated.index(member) if seated else None
        tensors = self._states[member] if place is None else self._engine.state(place)
        return utterance.state(tensors, self._model)

    def remove(self, member: int) -> None:
        """Drop a member; samples that were not made are lost."""
        self._member(member)
        del self._members[member]
        self._states.pop(member, None)

    def _member(self, member: int) -> Utterance:
        if member not in self._members:
            raise WavearError(f"there is no member {member!r}: it was never added, or was removed")
        return self._members[member]

    def _seat(self, members: set[int]) -> None:
        """Let the engine hold exactly these members, in their old places if as many stay."""
        if members == set(self._seated):
            return
        old, same = dict(enumerate(self._seated)), len(members) == len(self._seated)
        stay = {place for place, member in old.items() if same and member in members}
        for place, member in old.items():
            if place not in stay and member in self._members:
                self._states[member] = self._engine.state(place)
        if not same:
            self._engine = self._engine.resized(len(members))
        coming = iter(sorted(members - {old[place] for place in stay}))
        self._seated = [
            old[place] if place in stay else next(coming) for place in range(len(members))
        ]
        for place, member in enumerate(self._seated):
            if place not in stay:
                self._engine.load_state(place, self._states.pop(member))


def _pieces(samples: int) -> list[int]:
    """Return sizes of calls of an engine, short enough for a prompt Ctrl-C."""
    return [min(CHUNK, samples - start) for start in range(0, samples, CHUNK)]
