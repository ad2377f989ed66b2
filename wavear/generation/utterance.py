"""An utterance that is made as its mel arrives: the part of a stream without an engine."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.audio.emphasis import Deemphasis, coefficient
from wavear.audio.waveforms import as_tensor
from wavear.common.errors import WavearError
from wavear.generation.conditioner import UtteranceConditioner
from wavear.generation.engine import Engine
from wavear.generation.inputs import check_mel
from wavear.generation.priming import check_prime, context, deemphasis_after, encode_prime, fill
from wavear.generation.settings import Sampling
from wavear.generation.states import FORMAT, StreamState
from wavear.models.base import AutoregressiveModel
from wavear.models.frames import stacked
from wavear.models.sampling import uniforms

_LONGEST_SECONDS = 86400  # that a state can ask for


class Utterance:
    """One stream: frames and samples so far, and the inputs of the next samples."""

    def __init__(self, model: AutoregressiveModel, sampling: Sampling, prime: Any = None):
        if len(sampling.seeds) != 1 or not isinstance(sampling.seed, int | np.integer):
            raise WavearError(f"seed is {sampling.seed!r}; a stream has one whole number")
        speakers = sampling.speakers(model)
        if speakers is not None and len(speakers) != 1:
            raise WavearError(f"speaker is {sampling.speaker!r}; a stream has one")
        if isinstance(sampling.temperature_of(1, 1), np.ndarray):
            raise WavearError(f"temperature is {sampling.temperature!r}; a stream has one number")
        self.model, self.sampling = model, sampling
        self.speaker = None if speakers is None else speakers[0]
        self.conditioner = UtteranceConditioner(model, self.speaker)
        self.position = 0
        self.asked = 0  # samples, including the prime, of a model without mels
        self.prime: np.ndarray | None = None  # codes (P,), until they are filled in
        self.deemphasis = Deemphasis(coefficient(model.config))
        if prime is not None:
            waveform = check_prime(prime)
            if len(waveform) != 1:
                raise WavearError(
                    f"prime has shape {tuple(waveform.shape)}; a stream has one, of shape (T,)"
                )
            self.position = self.asked = waveform.shape[1]
            self.prime = encode_prime(waveform, model)[0]
            self.deemphasis = deemphasis_after(waveform[0], model)

    @property
    def latency(self) -> int:
        """Frames before the first sample."""
        return self.conditioner.block + self.model.lookahead if self.conditioner.has_mel else 0

    @property
    def ready(self) -> int:
        """Samples that can be made now."""
        known = self.conditioner.certain if self.conditioner.has_mel else self.asked
        return max(0, known - self.position)

    def push(self, mel: Tensor | np.ndarray) -> None:
        """Append frames (M, n) or (M,)."""
        mel = as_tensor(mel, "mel")
        if not self.conditioner.has_mel:
            raise WavearError(
                "the model takes no mel: it was trained without mel conditioning; pull samples"
                " instead"
            )
        if self.conditioner.closed:
            raise WavearError("the stream was flushed and has ended: begin a new one")
        mel = mel[:, None] if mel.dim() == 1 else mel
        if mel.dim() != 2:
            raise WavearError(f"mel has shape {tuple(mel.shape)}, expected (M, n) or (M,)")
        if mel.shape == (self.model.config.mel.bands, 0):
            return
        (mel,) = check_mel(mel, self.model.config.mel) or [mel]
        self.conditioner.push(mel)
        self.conditioner.forget(self._needed())

    def flush(self) -> None:
        """Declare the frames complete."""
        if not self.conditioner.has_mel:
            raise WavearError("the model takes no mel: nothing to flush, pull samples instead")
        if self.conditioner.closed:
            raise WavearError("the stream was flushed before and has ended")
        covered = self.conditioner.frames * self.conditioner.hop
        if covered < self.position:
            raise WavearError(
                f"the mel covers {covered} samples and the prime has {self.position}: push its"
                " frames too"
            )
        self.conditioner.close()

    def pull(self, samples: int) -> None:
        """Ask for more samples of a model without mels."""
        if self.conditioner.has_mel:
            raise WavearError(
                "the model is conditioned on mels: push them, and each push returns samples"
            )
        if isinstance(samples, bool) or not isinstance(samples, int | np.integer) or samples < 0:
            raise WavearError(f"samples is {samples!r}; it must be a whole number of at least 0")
        self.asked += int(samples)

    def fill(self, engine: Engine, place: int) -> None:
        """Move the engine past the prime, if it is not filled in yet."""
        if self.prime is not None:
            fill(engine, place, self.model, self.prime, self.conditioner)
            self.prime = None

    def inputs(self, samples: int) -> tuple[np.ndarray, Any]:
        """Return uniforms (n,) and conditioning (1, C, n) or (1, C, 1) of the next samples."""
        cond = self.conditioner.span(self.position, self.position + samples)
        return uniforms(self.sampling.seeds[0], self.position, samples), cond

    def moved(self, samples: int) -> None:
        """Count samples that were made."""
        self.position += samples
        self.conditioner.forget(self._needed())

    def _needed(self) -> int:
        """Return the first sample whose conditioning will be asked for."""
        return self.position if self.prime is None else context(self.model, len(self.prime))

    def state(self, tensors: dict[str, Tensor], model: dict[str, Any]) -> StreamState:
        """Return the state of the stream, given the engine's part and the model's description."""
        tensors = dict(tensors)
        if self.conditioner.frames:
            tensors["mel"] = self.conditioner.held.cpu().contiguous()
        if self.prime is not None:
            tensors["prime"] = torch.from_numpy(self.prime)
        about = {
            "format": FORMAT,
            "position": self.position,
            "asked": self.asked,
            "seed": self.sampling.seeds[0],
            "speaker": self.speaker,
            "temperature": self.sampling.temperature_of(1, 1),
            "top_k": self.sampling.top_k,
            "top_p": self.sampling.top_p,
            "first_frame": self.conditioner.first_held,
            "closed": self.conditioner.closed,
            "deemphasis": self.deemphasis.memory,
            "model": model,
        }
        return StreamState(tensors, about)

    @classmethod
    def restored(
        cls, model: AutoregressiveModel, state: StreamState, seed: int | None = None
    ) -> Utterance:
        """Return the utterance of a state, from here on with another seed if one is given."""
        about = state.about
        names = ("seed", "speaker", "temperature", "top_k", "top_p")
        sampling = Sampling(**{name: about[name] for name in names})
        if seed is not None:
            sampling = dataclasses.replace(sampling, seed=seed)
        utterance = cls(model, sampling.checked(model, quiet=True))
        utterance.position, utterance.asked = about["position"], about["asked"]
        utterance.deemphasis.memory = about.get("deemphasis", 0.0)
        if "mel" in state.tensors:
            utterance.conditioner.hold(state.tensors["mel"], about["first_frame"], about["closed"])
        elif about["closed"]:
            utterance.conditioner.close()
        if "prime" in state.tensors:
            utterance.prime = state.tensors["prime"].numpy()
        if not utterance.consistent:
            raise WavearError(
                f"the state is damaged: position {utterance.position}, asked {utterance.asked} and"
                f" first_frame {about['first_frame']} do not fit its frames"
            )
        return utterance

    @property
    def consistent(self) -> bool:
        """True if the samples so far, those asked for and the frames held fit each other."""
        conditioner, longest = self.conditioner, _LONGEST_SECONDS * self.model.config.sample_rate
        if not conditioner.has_mel:
            return not conditioner.frames and 0 <= self.asked - self.position <= longest
        covered = max(
            conditioner.frames * conditioner.hop, 0 if self.prime is None else len(self.prime)
        )
        return self.position <= covered and conditioner.holds(self._needed())


def advance(engine: Engine, utterances: list[Utterance], samples: int) -> list[Tensor]:
    """Return the next samples (n,) of each of the utterances, which are those of the engine."""
    draws, rows = zip(*(utterance.inputs(samples) for utterance in utterances), strict=True)
    cond = None if rows[0] is None else stacked(rows)
    temperatures = np.stack([u.sampling.temperature_of(1, samples) for u in utterances])
    temperatures = np.repeat(temperatures.reshape(-1, 1), samples, axis=1)
    sampling = utterances[0].sampling
    codes = engine.generate(
        np.stack(draws), cond, temperatures, top_k=sampling.top_k, top_p=sampling.top_p
    )
    for utterance in utterances:
        utterance.moved(samples)
    decoded = utterances[0].model.grid.decode(torch.from_numpy(codes))
    return [utterance.deemphasis(row) for utterance, row in zip(utterances, decoded, strict=True)]
