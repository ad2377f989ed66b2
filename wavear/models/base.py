"""The contract of an autoregressive model: P(x) = product over t of P(x_t | x_<t, c)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wavear.audio.grid import Grid
from wavear.common.errors import WavearError, require
from wavear.models.distributions import Law, law_of
from wavear.models.saving import save

_PREFILL = 4096  # samples that `prefill` computes at once, so that its memory stays bounded


class AutoregressiveModel(nn.Module):
    """Base of every family: the interface that training, scoring and generation rely on.

    Letters: B batch, T samples, F mel frames, M mel bands, C conditioning channels, Q code classes,
    P parameters of the output distribution for each sample (`model.law.channels`; of a categorical
    one its Q logits).

    A subclass defines `forward` (all samples in parallel) and `init_state` with `step` (one sample
    at a time). The two agree: `step` fed with `codes` one by one returns the columns of
    `forward(codes)`. State is an argument, never an attribute; nothing is cached besides the
    weights.
    """

    family: ClassVar[str | None] = None
    """Name of the family in checkpoints and on the command line; None: it cannot be saved."""
    config: Any
    """Frozen dataclass, saved with the weights; of a network a `CommonConfig`."""
    conditioning: Any
    """Module that computes the conditioning (see `make_conditioning`), with `hop`, `lookahead` and
    `lookback`; None without."""

    speaker_names: tuple[str, ...] = ()
    """Names of the speakers in the order of their numbers, of a checkpoint that has them."""
    frames_are_exact: bool = False
    """True if `condition` returns the same bits for a frame on the CPU, however many frames it
    computes at once."""
    bf16: bool | None = None
    """True if the layers can be trained in bfloat16; None: if the distribution is categorical,
    whose input is a look-up."""
    activation_checkpointing: bool | None = None
    """True if `forward` keeps only the inputs of its layers for the backward pass; None: not
    supported."""

    @property
    def receptive_field(self) -> int | None:
        """Number of past samples that the next one depends on; None: unbounded."""
        return self.config.receptive_field

    @property
    def span(self) -> str:
        """The receptive field in words, in samples and milliseconds."""
        field = self.receptive_field
        if field is None:
            return "unbounded"
        return f"{field:,} samples ({1000 * field / self.config.sample_rate:.0f} ms)"

    @property
    def carries(self) -> bool:
        """True if training carries the state from segment to segment of a recording.

        True for models with unbounded (or very long) context. Otherwise training cuts random crops,
        each with the receptive field before it.
        """
        return self.receptive_field is None

    @property
    def law(self) -> Law:
        """Output distribution: the probability of every code, and how a code is drawn."""
        return law_of(self.config)

    @property
    def grid(self) -> Grid:
        """Values and intervals that the codes stand for."""
        return self.law.grid

    @property
    def start_code(self) -> int:
        """The code that stands before the first sample: silence."""
        return self.grid.silence

    @property
    def multiply_adds(self) -> int:
        """Multiplications and additions, a pair counted once, of the network per generated sample.

        Without the conditioning, which runs once per utterance
        (`wavear.models.info.multiply_adds`).
        """
        raise NotImplementedError

    @property
    def weight_bytes(self) -> int:
        """Bytes of float32 weights that one sample of one stream needs."""
        return 4 * self.multiply_adds

    @property
    def lookahead(self) -> int:
        """Number of mel frames after its own that a sample depends on."""
        return self.conditioning.lookahead if self.conditioning is not None else 0

    @property
    def lookback(self) -> int:
        """Number of mel frames before its own that a sample depends on."""
        return self.conditioning.lookback if self.conditioning is not None else 0

    @property
    def conditioned(self) -> bool:
        """True if the model takes conditioning, from a mel or a speaker."""
        return self.config.mel is not None or self.config.speakers > 0

    def shift(self, codes: Tensor, previous: Tensor | None = None) -> Tensor:
        """Return the code before each of `codes` (B, T), the network's input.

        Before the first one lies `previous` (B,), or the start code if None.
        """
        if previous is None:
            return torch.nn.functional.pad(codes[:, :-1], (1, 0), value=self.start_code)
        return torch.cat([previous[:, None], codes[:, :-1]], dim=1)

    def condition(
        self, mel: Tensor | None, speaker: Tensor | None = None, *, padded: bool = False
    ) -> Any:
        """Return one vector per sample, from a mel and a speaker.

        Parameters
        ----------
        mel : Tensor, shape (B, M, F), or None for a model without mel conditioning
        speaker : Tensor of int64, shape (B,), or None for a model without speakers
        padded : bool
            `mel` has shape (B, M, lookback + F + lookahead): it includes the context on both
            sides, as a crop does. Otherwise the first and the last frame are repeated.

        Returns
        -------
        Tensor, shape (B, C, F * hop), or a `FrameConditioning` that stands for one; of a speaker
        without a mel (B, C, 1), the same for every sample
        """
        if self.conditioning is None:
            raise WavearError("the model is unconditional: it takes neither a mel nor a speaker")
        return self.conditioning(mel, speaker, padded)

    def forward(
        self,
        codes: Tensor,
        cond: Any = None,
        state: Any = None,
        previous: Tensor | None = None,
    ) -> Tensor:
        """Return the parameters of the distribution of each code given those before it.

        Parameters
        ----------
        codes : Tensor of int64, shape (B, T)
        cond : Tensor, shape (B, C, T), or (B, C, 1) the same for every sample, or None
            Of a family that conditions at the frame rate, a `FrameConditioning`.
        state : optional
            From `init_state`: the codes continue from it, and it is advanced as by T calls of
            `step`. Gradients do not reach into it. Without one the codes begin the audio.
        previous : Tensor of int64, shape (B,)
            With a state: the code before codes[:, 0].

        Returns
        -------
        Tensor, shape (B, P, T): [..., t] from codes[:, :t]
        """
        raise NotImplementedError

    def input_noise(
        self, codes: Tensor, amount: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return the arguments of `forward` in training for `codes` (B, T), with noise on the past.

        The default adds a normal number of deviation `amount` to each code; targets stay clean.
        """
        off = torch.randn(codes.shape, generator=generator, device=codes.device) * amount
        return {"codes": (codes + off.round().long()).clamp(0, self.grid.classes - 1)}

    def init_state(self, batch: int) -> Any:
        """Return the state of `batch` streams before their first sample, preallocated."""
        raise NotImplementedError

    def step(self, previous: Tensor, state: Any, cond_t: Tensor | None = None) -> Tensor:
        """Return the parameters (B, P) of the distribution of the next sample.

        Parameters
        ----------
        previous : Tensor of int64, shape (B,)
            The code of the sample before; `start_code` for the first.
        state : from `init_state`; updated in place
        cond_t : Tensor, shape (B, C), or None
        """
        raise NotImplementedError

    def advance(self, previous: Tensor, state: Any, cond: Any = None) -> Any:
        """Advance the state past `previous` (B, T); families override it to skip the output."""
        # The last code that `forward` gets matters for the shape only: the next call consumes it.
        codes = torch.cat([previous[:, 1:], previous[:, :1]], dim=1)
        self.forward(codes, cond, state, previous[:, 0])

    def prefill(self, previous: Tensor, state: Any, cond: Any = None) -> None:
        """Advance the state as `step` fed with each of `previous` in turn does, but in parallel.

        Parameters
        ----------
        previous : Tensor of int64, shape (B, T)
            The code before each sample: of a recording `shift(codes)`.
        state : from `init_state`; updated in place
        cond : Tensor, shape (B, C, T), or (B, C, 1) the same for every sample, or None
        """
        for part, given in _parts(previous, cond):
            self.advance(part, state, given)

    def export_state(self, state: Any) -> dict[str, Tensor]:
        """Return copies of the state's tensors by name, batch first, in a form all engines share.

        On the device and in the precision of the state.
        """
        raise NotImplementedError

    def import_state(self, tensors: dict[str, Tensor]) -> Any:
        """Return the state that `export_state` made tensors of, from any device and precision."""
        raise NotImplementedError

    def compile_layers(self) -> None:
        """Compile `forward` with torch.compile, in place, for the fixed shapes of training."""
        self.compile(dynamic=False)

    def save(
        self, directory: str | Path, *, overwrite: bool = False, training: dict | None = None
    ) -> Path:
        """Write `config.json` and `model.safetensors` to `directory`, for `wavear.load`.

        Parameters
        ----------
        directory : str or Path
            Created where it is missing.
        overwrite : bool
            Replace an existing checkpoint.
        training : dict, optional
            A record of the training (steps, bits per sample...), as JSON.

        Returns
        -------
        Path: the directory

        Raises
        ------
        FileExistsError
            If there is a checkpoint already and `overwrite` is false.
        WavearError
            If the class has no `family` of its own, as a subclass of a family has not.
        """
        family = vars(type(self)).get("family")
        if family is None:
            raise WavearError(
                f"{type(self).__name__} cannot be saved: its class has no `family` of its own"
            )
        weights = self.state_dict()
        return save(directory, family, self.config, weights, overwrite=overwrite, training=training)


def check_model(model: Any) -> None:
    """Refuse what is not a model, such as the path of one."""
    expected = "a model: load the checkpoint first, with wavear.load"
    require(model, AutoregressiveModel, "model", expected)


def matrix_entries(*modules: nn.Module) -> int:
    """Return the number of weights of all linear layers in `modules`, biases excluded."""
    inside = (module for part in modules for module in part.modules())
    return sum(module.weight.numel() for module in inside if isinstance(module, nn.Linear))


def _parts(previous: Tensor, cond: Any) -> Iterator[tuple[Tensor, Any]]:
    """Yield `previous` (B, T) and `cond` in blocks of `_PREFILL` samples."""
    for start in range(0, previous.shape[1], _PREFILL):
        part = slice(start, start + _PREFILL)
        yield previous[:, part], cond if cond is None or cond.shape[2] == 1 else cond[:, :, part]
