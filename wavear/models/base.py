"""The contract of an autoregressive model: P(x) = product over t of P(x_t | x_<t, c)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wavear.audio.grid import Grid
from wavear.mel.spectrogram import MelConfig
from wavear.models.distributions import LAWS, Law, law_of

_PREFILL = (
    4096  # samples that `prefill` computes at once: its memory does not grow with the past given
)


class AutoregressiveModel(nn.Module):
    """Base of every family: what training, scoring and generation rely on.

    Letters: B batch, T samples, F mel frames, M mel bands, C conditioning channels, Q code classes,
    P numbers that the output law takes for each sample (`model.law.channels`; of a categorical law
    its Q logits).

    A subclass defines `forward` (all samples in parallel) and `init_state` with `step` (one sample
    at a time). The two are the same law: `step` fed with `codes` one by one returns the columns of
    `forward(codes)`. State is an argument, never an attribute, and nothing is cached past the
    weights.
    """

    family: ClassVar[str | None] = None
    """The name of the family in checkpoints and on the command line; None of a class that cannot be saved."""
    config: Any
    """Frozen dataclass, saved with the weights: of a network a `CommonConfig`."""
    conditioning: Any
    """What a mel and a speaker become, a module with `lookahead`: often `make_conditioning(config)`; None without."""

    frames_are_exact: bool = False
    """Whether `condition` makes a frame's values to the bit alike on the CPU, however many frames it makes at once."""
    bf16: bool | None = None
    """Whether the layers can be trained in bfloat16; None: if the law is categorical, whose input is a look-up."""
    activation_checkpointing: bool | None = None
    """Whether `forward` keeps only the inputs of its layers for the backward pass; None: the family cannot."""

    @property
    def receptive_field(self) -> int | None:
        """How many past samples the law of the next one depends on; None where unbounded."""
        raise NotImplementedError

    @property
    def carries(self) -> bool:
        """Whether training carries the state from segment to segment of a recording, instead of cutting random crops
        with the receptive field in front of each: so it is where the past that counts is unbounded,
        or very long."""
        return self.receptive_field is None

    @property
    def law(self) -> Law:
        """What the output means: its probability of every code, and how a code is drawn."""
        return law_of(self.config)

    @property
    def grid(self) -> Grid:
        """What the codes stand for."""
        return self.law.grid

    @property
    def start_code(self) -> int:
        """The code that stands before the first sample: silence."""
        return self.grid.silence

    @property
    def multiply_adds(self) -> int:
        """Multiplications and additions, a pair counted once, of the network for one sample of one stream.

        Without the conditioning's upsampling, which runs once per utterance
        (`wavear.models.info.multiply_adds`).
        """
        raise NotImplementedError

    @property
    def weight_bytes(self) -> int:
        """Bytes of float32 weights that one sample of one stream needs."""
        return 4 * self.multiply_adds

    @property
    def lookahead(self) -> int:
        """How many mel frames after frame f the samples of frame f depend on."""
        return self.conditioning.lookahead if self.conditioning is not None else 0

    @property
    def lookback(self) -> int:
        """How many mel frames before frame f the samples of frame f depend on."""
        return self.lookahead

    @property
    def conditioned(self) -> bool:
        """Whether the model takes conditioning, from a mel or a speaker."""
        return self.config.mel is not None or self.config.speakers > 0

    def shift(self, codes: Tensor, previous: Tensor | None = None) -> Tensor:
        """`codes` (B, T) one sample later, with `previous` (B,), the start code if None, in front: what the network
        sees at each t."""
        if previous is None:
            return torch.nn.functional.pad(codes[:, :-1], (1, 0), value=self.start_code)
        return torch.cat([previous[:, None], codes[:, :-1]], dim=1)

    def condition(
        self, mel: Tensor | None, speaker: Tensor | None = None, *, padded: bool = False
    ) -> Any:
        """One vector per sample from a mel and a speaker.

        Parameters
        ----------
        mel : Tensor, shape (B, M, F), or None for a model without mel conditioning
        speaker : Tensor of int64, shape (B,), or None for a model without speakers
        padded : bool
            `mel` has shape (B, M, lookback + F + lookahead): it carries its own context on both
            sides, as a crop does. Otherwise the first and the last frame are repeated.

        Returns ------- Tensor, shape (B, C, F * hop), or a `FrameConditioning` that stands for one;
        of a speaker alone (B, C, 1), the same for every sample
        """
        if self.conditioning is None:
            raise ValueError("the model is unconditional: it takes neither a mel nor a speaker")
        return self.conditioning(mel, speaker, padded)

    def forward(
        self,
        codes: Tensor,
        cond: Tensor | None = None,
        state: Any = None,
        previous: Tensor | None = None,
    ) -> Tensor:
        """Parameters of the law (B, P, T) of `codes` (B, T): [..., t] is that of codes[:, t] given codes[:, :t].

        Parameters
        ----------
        codes : Tensor of int64, shape (B, T)
        cond : Tensor, shape (B, C, T), or (B, C, 1) the same for every sample, or None
            Of a family that conditions at the frame rate, the `FrameConditioning` that stands for
            it.
        state : what `init_state` returned, optional
            The codes go on from it, and it is brought to where `step` would be after as many calls.
            Gradients do not reach into it. Without one the codes are the beginning of the audio.
        previous : Tensor of int64, shape (B,)
            With a state: the code before codes[:, 0].
        """
        raise NotImplementedError

    def input_noise(
        self, codes: Tensor, amount: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return what `forward` is given in training for `codes` (B, T), with noise on the past that it sees.

        Here the codes are off by a normal number of deviation `amount`; what is to be predicted
        stays clean.
        """
        off = torch.randn(codes.shape, generator=generator, device=codes.device) * amount
        return {"codes": (codes + off.round().long()).clamp(0, self.grid.classes - 1)}

    def init_state(self, batch: int) -> Any:
        """State of `batch` streams before their first sample, preallocated, batch first."""
        raise NotImplementedError

    def step(self, previous: Tensor, state: Any, cond_t: Tensor | None = None) -> Tensor:
        """Parameters of the law (B, P) of the next sample.

        Parameters
        ----------
        previous : Tensor of int64, shape (B,)
            The code of the sample before; `start_code` for the first.
        state : what `init_state` returned; updated in place
        cond_t : Tensor, shape (B, C), or None
        """
        raise NotImplementedError

    def prefill(self, previous: Tensor, state: Any, cond: Tensor | None = None) -> None:
        """Bring the state to where `step` fed with each of `previous` in turn would, if the family can in parallel.

        Parameters
        ----------
        previous : Tensor of int64, shape (B, T)
            The code before each sample: of a recording `shift(codes)`.
        state : what `init_state` returned; updated in place
        cond : Tensor, shape (B, C, T), or (B, C, 1) the same for every sample, or None
        """
        for part, given in in_parts(previous, cond):
            # The last code that `forward` is given counts for the shape alone: it would be consumed
            # by the next call.
            self.forward(torch.cat([part[:, 1:], part[:, :1]], dim=1), given, state, part[:, 0])

    def export_state(self, state: Any) -> dict[str, Tensor]:
        """What the state holds as tensors by name, batch first, in an order that every engine can make and read.

        Copies, on the device and in the precision of the state.
        """
        raise NotImplementedError

    def import_state(self, tensors: dict[str, Tensor]) -> Any:
        """The state that `export_state` gave these tensors of, from any device and precision."""
        raise NotImplementedError

    def compile_layers(self) -> None:
        """Let torch.compile make kernels for `forward`, in place, for the shapes of training."""
        self.compile(dynamic=False)

    def save(
        self, directory: str | Path, *, overwrite: bool = False, training: dict | None = None
    ) -> Path:
        """Write `config.json` and `model.safetensors` to `directory`; see `wavear.models.checkpoint.save`."""
        from wavear.models.saving import save

        return save(self, directory, overwrite=overwrite, training=training)


def in_parts(previous: Tensor, cond: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """`previous` (B, T) and `cond` (B, C, T or 1) of `_PREFILL` samples after the other."""
    for start in range(0, previous.shape[1], _PREFILL):
        part = slice(start, start + _PREFILL)
        yield previous[:, part], cond if cond is None or cond.shape[2] == 1 else cond[:, :, part]


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What the configuration of every network has beside its own fields.

    Raises
    ------
    ValueError
        Naming the field, its value, and what it may be.
    """

    classes: int = 0
    """Codes Q, 2 to 65536; 0: 256 mu-law codes of a categorical law, 65536 linear values (16 bits) of the others."""
    sample_rate: int = 22050
    """Of the audio, in Hz."""
    mel: MelConfig | None = None
    """The mels the model is conditioned on; None: unconditional."""
    speakers: int = 0
    """Speakers the model is conditioned on; 0: none."""
    conditioning_channels: int = 80
    """Channels of the conditioning, one vector per sample."""
    conditioning_context: int = 2
    """Mel frames that the first convolution of the conditioning sees before and after each frame."""
    law: str = "categorical"
    """Of the next sample: categorical, logistic_mixture, gaussian or laplace; see `wavear.models.distributions`."""
    mixtures: int = 10
    """Components of a mixture of logistics."""
    coarse_classes: int = 0
    """For the laws over values: mu-law codes of the embedding beside the value at the input; 0: none."""
    pre_emphasis: float = 0.0
    """a of x[t] - a x[t-1], which the codes are of; 0: of the audio itself. See `wavear.audio.emphasis`."""

    def __post_init__(self):
        if self.law not in LAWS:
            raise ValueError(f"law is {self.law!r}, it must be one of {', '.join(LAWS)}")
        if self.classes == 0:
            object.__setattr__(self, "classes", 256 if self.law == "categorical" else 65536)
        check_whole(
            self,
            mixtures=1,
            coarse_classes=0,
            speakers=0,
            conditioning_channels=1,
            conditioning_context=0,
        )
        law_of(self)  # it checks `classes`
        if self.coarse_classes and self.law == "categorical":
            raise ValueError(
                f"coarse_classes is {self.coarse_classes}: a categorical law embeds its own codes, leave it 0"
            )
        if self.coarse_classes == 1 or self.coarse_classes > 65536:
            raise ValueError(
                f"coarse_classes is {self.coarse_classes}, it must be 0, or 2 to 65536"
            )
        if not isinstance(self.sample_rate, int) or not 1000 <= self.sample_rate <= 384000:
            raise ValueError(f"sample_rate is {self.sample_rate!r}, it must be 1000 to 384000 Hz")
        if self.mel is not None and self.mel.sample_rate != self.sample_rate:
            raise ValueError(
                f"the mel is of {self.mel.sample_rate} Hz audio and the model of {self.sample_rate} Hz: they must agree"
            )
        if not 0 <= self.pre_emphasis < 1:
            raise ValueError(f"pre_emphasis is {self.pre_emphasis!r}, it must be 0 to less than 1")

    @property
    def conditioned(self) -> bool:
        """Whether the model takes conditioning, from a mel or a speaker."""
        return self.mel is not None or self.speakers > 0


def check_whole(config: Any, **least: int) -> None:
    """Check that fields are whole numbers of at least so much.

    Raises
    ------
    ValueError
        Naming the field and its value.
    """
    for name, bound in least.items():
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < bound:
            raise ValueError(f"{name} is {value!r}, it must be a whole number of at least {bound}")
