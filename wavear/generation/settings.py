"""How audio is sampled: one record from the command line and the public functions to the draw.

It imports torch only where it is used: `wavear COMMAND --help` reads the fields.
"""

from __future__ import annotations

import dataclasses
import numbers
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from wavear.common.errors import WavearError

COLDEST = 1e-6  # every engine can divide by this temperature and by what it makes of the logits

if TYPE_CHECKING:
    from torch import Tensor

    from wavear.models.base import AutoregressiveModel

    Seed = int | Sequence[int]
    Speaker = int | str | Sequence[int | str] | Tensor | None
    Temperature = float | Tensor | np.ndarray
else:  # the command line makes its flags from these types: one number of each
    Seed, Speaker, Temperature = int, str | int | None, float  # a name of digits stays text


@dataclass(frozen=True)
class Sampling:
    """How audio is sampled, and on which engine; `wavear.generate` describes each field."""

    seed: Seed = 0
    """0 to 2**64 - 1; the same seed gives the same audio."""
    temperature: Temperature = 1.0
    """Divides the logits: 1 as trained, below 1 duller and cleaner, above 1 noisier."""
    top_k: int | None = None
    """Draw each sample among the k likeliest values only."""
    top_p: float | None = None
    """Draw each sample among the likeliest values that together have this probability (such as
    0.95), without the rare ones that crackle."""
    argmax: bool = False
    """Always take the likeliest value: the same audio for every seed, which collapses to silence
    or a tone."""
    best_of: int = 1
    """Make this many candidates and keep the likeliest; takes as many times as long."""
    particles: int = 1
    """Make this many streams side by side and every few milliseconds continue those whose mel is
    nearest to the one given (such as 8): closer to the recording, and as many times as long."""
    speaker: Speaker = None
    """Name or number of the speaker, for a model with speakers; a text is a name if one has it."""
    engine: str = "auto"
    """auto, numba (compiled for this CPU), triton or cuda-graph (on a CUDA device), or reference
    (slow, any device)."""
    weights: str = "float32"
    """float32, or rounded, which is faster and slightly noisier: bfloat16 (numba, triton), int8
    (numba), float16 (triton); `wavear bench` measures the cost."""
    threads: int | None = None
    """CPU cores to use; all by default."""

    @property
    def seeds(self) -> list[int]:
        """The seeds, one or one per utterance."""
        return [int(s) for s in self.seed] if isinstance(self.seed, Iterable) else [self.seed]

    def checked(self, model: AutoregressiveModel, quiet: bool = False) -> Sampling:
        """Return these settings for a model, with `argmax` as a `top_k` of 1, which is warned of.

        A `WavearError` names a value that is out of range, or truncation of a distribution that has
        no codes to choose among.
        """
        from wavear.models.base import check_model
        from wavear.models.distributions import refuse_truncation

        check_model(model)
        seed: Any = self.seed
        several = isinstance(seed, Iterable) and getattr(seed, "ndim", 1) == 1
        values: list[Any] = list(seed) if several else [seed]
        for value in values:
            if not _is_whole(value) or not 0 <= value < 2**64:
                raise WavearError(f"seed is {value!r}; it must be a whole number, 0 to 2**64 - 1")
        if not self.seeds:
            raise WavearError("seed is empty: give one number, or one per utterance")
        scale = self._temperatures()
        if not ((scale >= COLDEST).all() and (scale <= 1 / COLDEST).all()):
            raise WavearError(
                f"temperature is {self.temperature!r}; it must be {COLDEST:g} to {1 / COLDEST:g}"
            )
        truncated = self.top_k is not None or self.top_p is not None
        if not model.law.truncates:
            refuse_truncation(model.config.law, 1 if self.argmax else self.top_k, self.top_p)
        for name, value in (
            ("top_k", self.top_k),
            ("best_of", self.best_of),
            ("particles", self.particles),
        ):
            if value is not None and (not _is_whole(value) or value < 1):
                raise WavearError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if self.top_p is not None and (
            isinstance(self.top_p, bool)
            or not isinstance(self.top_p, numbers.Real)
            or not 0 < self.top_p <= 1
        ):
            raise WavearError(f"top_p is {self.top_p!r}; it must be above 0 and at most 1")
        if self.argmax and truncated:
            raise WavearError("argmax takes the likeliest code: drop top_k and top_p")
        top_k = 1 if self.argmax else self.top_k
        if self.particles > 1 and (self.best_of > 1 or top_k == 1):
            other = f"best_of {self.best_of}" if self.best_of > 1 else "argmax"
            raise WavearError(f"particles is {self.particles}: drop {other}")
        if self.best_of > 1 and top_k == 1:
            raise WavearError(f"best_of is {self.best_of}, and there is one argmax: drop either")
        if top_k == 1 and not quiet:
            warnings.warn(
                "argmax takes the likeliest code at every sample, and such audio collapses to"
                " silence or to a tone; a temperature of 0.8 or a top_p of 0.9 is cleaner than 1"
                " and stays alive",
                stacklevel=3,
            )
        return dataclasses.replace(self, top_k=top_k, argmax=False)

    def temperature_of(self, batch: int, total: int) -> float | np.ndarray:
        """Return one temperature, or one per sample, shape (batch, total)."""
        values = self._temperatures()
        if values.ndim == 0:
            return float(values)
        if values.shape not in ((total,), (batch, total), (batch, 1)):
            raise WavearError(
                f"temperature has shape {values.shape}, expected one number, ({total},) or"
                f" ({batch}, {total})"
            )
        return np.ascontiguousarray(np.broadcast_to(values, (batch, total)))

    def _temperatures(self) -> np.ndarray:
        from wavear.audio.waveforms import as_tensor

        given: Any = self.temperature
        if isinstance(given, str):
            raise WavearError(f"temperature is {given!r:.60}; it must be a number, or numbers")
        return as_tensor(given, "temperature").cpu().double().numpy()

    def speakers(self, model: AutoregressiveModel) -> list[int] | None:
        """Return the numbers of the speakers, one or one per utterance; None without speakers."""
        from wavear.audio.waveforms import as_tensor
        from wavear.models.base import check_model

        check_model(model)
        count, names = model.config.speakers, model.speaker_names
        given: Any = self.speaker
        if count == 0:
            if given is not None:
                raise WavearError(f"speaker is {given}; the model was trained without any")
            return None
        known = f"0 to {count - 1}" + (f", or a name: {', '.join(names)}" if names else "")
        if given is None:
            raise WavearError(f"the model needs a speaker, {known}")
        if isinstance(given, str):
            given = [given]
        elif not isinstance(given, Sequence):  # a number, or an array of them
            given = as_tensor(given, "speaker").tolist()
        chosen: list[Any] = list(given) if isinstance(given, Sequence) else [given]
        if not chosen or not all(isinstance(v, str) or _is_whole(v) for v in chosen):
            raise WavearError(
                f"speaker is {self.speaker!r}; expected a whole number or a name, or one per"
                " utterance"
            )
        return [_speaker_number(value, count, names, known) for value in chosen]


def _speaker_number(value: int | str, count: int, names: Sequence[str], known: str) -> int:
    """Return the number of a speaker; a number that none has may be a name, such as 1034."""
    named = isinstance(value, str) and value in names
    if not named and str(value).isdecimal() and int(value) < count:
        return int(value)
    if str(value) in names:
        return names.index(str(value))
    raise WavearError(f"speaker is {value}; the model has {known}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def candidate_seeds(seed: int, best_of: int) -> list[int]:
    """Return the seeds of an utterance's candidates: its own, then distant ones.

    Examples
    --------
    >>> candidate_seeds(7, 2)
    [7, 11400714819323198492]
    """
    return [(seed + i * 0x9E3779B97F4A7C15) % 2**64 for i in range(best_of)]
