"""What a training run is told: `TrainConfig`, and what it came to: `TrainResult`."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from wavear.data.corpus import Normalise
from wavear.mel.spectrogram import MelConfig
from wavear.models.families import FAMILIES


@dataclass(frozen=True)
class TrainingDefaults:
    """Values of the fields of `TrainConfig` that are None: those whose defaults differ between families."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 2e-3
    hold: float = 0.0
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    segment: int | None = 8192
    segment_frames: int = 0
    """Instead of `segment`, where it is None: mel frames."""
    batch_size: int = 2
    input_noise: float = 0.0


TRAINING_DEFAULTS: dict[str, TrainingDefaults] = {
    "predictive": TrainingDefaults(
        optimizer="muon",
        learning_rate=4e-3,
        hold=0.3,
        weight_decay=0.0,
        ema_decay=0.9,  # the rates fall to almost nothing: a long average adds nothing
        segment=None,
        segment_frames=32,  # 8192 samples at 22.05 kHz
        batch_size=3,
        input_noise=0.5,
    ),
}
"""By family; the families that are not here have those of the class."""


def family_defaults() -> dict[str, str]:
    """Return the text of each field's defaults, for the help.

    Examples
    --------
    >>> family_defaults()["batch_size"], family_defaults()["segment"]
    ('2; predictive: 3', '8192; predictive: 32 frames')
    """

    def text(values: TrainingDefaults, name: str) -> str:
        value = getattr(values, name)
        return (
            f"{values.segment_frames} frames"
            if value is None
            else f"{value:g}"
            if name != "optimizer"
            else value
        )

    names = [f.name for f in dataclasses.fields(TrainingDefaults) if f.name != "segment_frames"]
    told = {
        "": TrainingDefaults(),
        **{f"{family}: ": values for family, values in TRAINING_DEFAULTS.items()},
    }
    return {
        name: "; ".join(family + text(values, name) for family, values in told.items())
        for name in names
    }


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Times are in the unit the name or the text says; rates are in Hz.

    Raises
    ------
    ValueError
        If a value makes no sense, with the field, the value and what would work.
    """

    data: str
    """Recordings: a folder (WAV, FLAC, OGG, MP3, AIFF, at any depth), or a manifest (CSV or JSON lines with `path`, and
    optionally `start` and `duration` in seconds, `speaker`, `split`)."""
    out: str
    """Directory of the run: best/, last/ (checkpoints), states/, train.json, metrics.csv, tensorboard/"""
    validation: str | None = None
    """A second folder or manifest, all of it held out; None: a part of `data` is."""
    validation_fraction: float = 0.05
    """Share of the files to hold out, chosen by the hash of their names; at least one file."""

    # The model
    family: str | None = None
    """predictive, wavenet, gru, transformer or linear; see docs/families.md. None: predictive with mels, wavenet
    without. The settings up to `coarse_classes` are of the model: None is the family's own default,
    and one that the family does not have is refused."""
    layers: int | None = None
    """predictive: layers of fixed dilation (4). wavenet: dilated convolutions (20), a multiple of `stacks`. gru:
    recurrent layers (1). transformer: layers."""
    period_layers: int | None = None
    """predictive: layers whose dilation is the period (1)."""
    stacks: int | None = None
    """wavenet: the dilation doubles from layer to layer and restarts at 1 in each stack (2)."""
    kernel_size: int | None = None
    """wavenet: taps of each dilated convolution (2). predictive: of each layer (3)."""
    residual_channels: int | None = None
    """wavenet, predictive: channels of the signal that runs through the layers (64, 48)."""
    skip_channels: int | None = None
    """wavenet, predictive: channels of the sum over layers that the head reads (128, 64)."""
    prediction_order: int | None = None
    """predictive: past samples of the linear prediction (32 at 22.05 kHz, in proportion to the rate)."""
    sub_frames: int | None = None
    """predictive: predictors per mel frame (one per 2.9 ms)."""
    shortest_period: int | None = None
    """predictive: least period, in samples (that of 550 Hz)."""
    longest_period: int | None = None
    """predictive: largest period, in samples (that of 50 Hz)."""
    causal: bool | None = None
    """predictive: condition a frame on itself and those before it, without look-ahead (False)."""
    channels: int | None = None
    """gru: hidden units of each layer (352). transformer: channels of a position (256), a multiple of 2 * `heads`."""
    input_channels: int | None = None
    """gru: channels in which the sample before and the conditioning are added (128)."""
    heads: int | None = None
    """transformer: of the attention (4)."""
    window: int | None = None
    """transformer: positions that a position attends to in each layer (128)."""
    patch: int | None = None
    """transformer: samples that a position stands for (8)."""
    hidden_channels: int | None = None
    """transformer: channels between the two matrices of a layer (four times `channels`)."""
    sample_channels: int | None = None
    """transformer: channels of the vector that a past sample becomes (64)."""
    head_channels: int | None = None
    """Channels between the two layers of the head (256; predictive: 64)."""
    conditioning_channels: int | None = None
    """Channels of the conditioning (80; predictive: 96)."""
    classes: int | None = None
    """Codes: 256 of mu-law for a categorical law (2 to 65536), 65536 even ones, 16 bits, for the others."""
    law: str | None = None
    """Of the next sample: categorical, logistic_mixture, gaussian, laplace; see docs/laws.md."""
    mixtures: int | None = None
    """Components of a mixture of logistics (10; predictive: 5)."""
    order: int | None = None
    """linear: lags (32); with a `criterion` the most of them."""
    differencing: int | None = None
    """linear: order of the differences that are predicted (0)."""
    grid: str | None = None
    """linear: of the codes, mulaw (256 codes) or linear (16 bits)."""
    domain: str | None = None
    """linear: predicts samples (linear) or mu-law companded values (companded)."""
    coarse_classes: int | None = None
    """For laws over values: mu-law codes embedded beside the value at the input (0: none)."""
    criterion: Literal["aic", "bic"] | None = None
    """linear: choose the order by this information criterion."""
    stabilise: bool = False
    """linear: move poles outside the unit circle inside."""
    sample_rate: int = 22050
    """Of the model, in Hz; recordings of another rate are resampled as they are read."""
    unconditional: bool = False
    """Train without mels: the model then makes sound of its own."""
    speakers: bool = False
    """Tell speakers apart: by the first level of sub-folders of `data`, or by the column `speaker` of a manifest."""
    mel_preset: str | None = None
    """Mels as a project publishes them (torchaudio-tacotron2, r9y9...: see docs/mels.md), so that its text-to-speech
    models speak through this one; the settings of mels below then say nothing."""
    mel_bands: int = 80
    """Mel bands."""
    mel_hop_length: int | None = None
    """Samples per mel frame; None: 256 at 22050 Hz, and the power of two that fits other rates."""
    mel_n_fft: int | None = None
    """Samples of the mel's Fourier transform and window; None: four hops."""
    mel_fmin: float = 0.0
    """Lower end of the lowest mel band, Hz."""
    mel_fmax: float | None = None
    """Upper end of the highest mel band, Hz; None: 8000 up to a sample rate of 24000, half of the sample rate else."""

    # The audio
    normalise: Normalise = "none"
    """Level: none, or a gain that brings the peak to 0.9, or the RMS to -23 dB of full scale. Held-out audio too."""
    normalise_by: Literal["file", "speaker"] = "file"
    """One gain per file, or one per speaker."""
    trim_silence: float | None = None
    """Cut the ends of files that are this many dB below their peak (40, say), but for 50 ms. None: keep them."""
    pre_emphasis: float = 0.0
    """a of x[t] - a x[t-1], which the model's codes are of (0.85, say); what it makes is de-emphasised. Softens the
    codes' noise at high frequencies. Bits are then of other codes, and not to be compared with
    those of 0."""
    redraw_below: float | None = None
    """Draw a segment again, up to 4 times, if it is quieter than this many dB of full scale (-60, say), so that pauses
    do not fill the batches. None: take it."""

    conditioning_dropout: float = 0.0
    """Share of the mel frames, each by chance, that the model does not see in training (0.1, say): their place takes
    the mean of each band. Held-out bits are without."""
    input_noise: float | None = None
    """Noise on the past that the model sees in training; what it predicts stays clean. It then sees through its own
    errors when it generates, and heeds the conditioning. Held-out bits are without. wavenet, gru,
    transformer: its deviation in codes (2, say). predictive: the largest deviation, in units of the
    residual's scale."""

    # The steps. Where the default is None it is the family's (`TRAINING_DEFAULTS`).
    segment: int | None = None
    """Samples of loss per crop, rounded up to mel frames; the receptive field comes on top."""
    batch_size: int | None = None
    """Crops per step, over all processes and all parts of `accumulate`."""
    accumulate: int = 1
    """Parts that a process divides its share of a batch into, one after the other, to save memory."""
    optimizer: Literal["adamw", "muon"] | None = None
    """adamw for all weights, or muon for the matrices inside the network and adamw for the rest."""
    learning_rate: float | None = None
    """AdamW's at its highest. A rule of thumb for other batches: with the square root of `batch_size`."""
    muon_learning_rate: float = 1e-2
    """Muon's at its highest, where `optimizer` is muon."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    hold: float | None = None
    """Share of the run before the learning rate begins to fall along its cosine, 0 to less than 1."""
    weight_decay: float | None = None
    """Of both optimizers, on matrices."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient; 0: no limit."""
    ema_decay: float | None = None
    """Of the moving average of the weights that is validated, sampled and saved; less in the first steps."""
    max_steps: int | None = 200_000
    """Steps of the run, resumed parts included; the learning rate falls along a cosine until then."""
    max_minutes: float | None = None
    """Minutes of the run, resumed parts and validations included (the last scoring comes on top); likewise."""
    precision: Literal["auto", "32", "bf16"] = "auto"
    """Arithmetic of the steps; auto: bf16 where a GPU has it in hardware, or a CPU is measured to gain by it; a resumed
    run keeps what it took. Weights are float32 always."""
    compile: bool = False
    """Let torch.compile (which needs a C++ compiler) make the layers' kernels: see docs/benchmarks.md for where it
    pays."""
    activation_checkpointing: bool = False
    """Compute the layers anew in the backward pass instead of keeping what is inside them: less memory, more time."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps. Under torchrun or srun every process takes its own."""
    workers: int | None = None
    """Processes that read audio; None: 4 beside a GPU, none on the CPU. The data are the same with any number."""
    seed: int = 0
    """Of the first weights and of the order of the data."""

    # What is shown and kept
    validate_every: int | None = None
    """Steps between validations; None: by `validate_seconds`."""
    validate_seconds: float = 120.0
    """Seconds between validations, and more if these would take over 5 % of the time."""
    validation_seconds: float = 10.0
    """Seconds of held-out audio for the validations on the way."""
    final_seconds: float = 600.0
    """Seconds of held-out audio for the scores at the end."""
    baseline_seconds: float = 600.0
    """Seconds of training audio that the baselines are fitted to."""
    sample_seconds: float = 2.0
    """Seconds of free-running audio to hear and to measure. With mels: of each of four held-out recordings, at every
    validation; it chooses the best model, and its clips lie in samples/. 0: none, the bits
    choose."""
    wandb: str | None = None
    """Project at Weights & Biases to log to as well (which needs `pip install wandb`)."""
    checkpoint_every: int = 1000
    """Steps between checkpoints of the whole state; every validation writes one too."""
    keep_last: int = 3
    """States to keep, so that a damaged one costs some steps and not the run."""
    resume: bool = False
    """Go on with the run in `out`, from its last good state."""
    overwrite: bool = False
    """Replace the run in `out`."""
    progress: bool = True
    """Show a progress bar and say what is done."""

    def __post_init__(self) -> None:
        if self.family is None:
            object.__setattr__(self, "family", "wavenet" if self.unconditional else "predictive")
        if self.family == "predictive" and self.unconditional:
            raise ValueError(
                "a predictive model takes its prediction from mels: drop --unconditional or --family"
            )
        object.__setattr__(self, "data", os.fspath(self.data))
        object.__setattr__(self, "out", os.fspath(self.out))
        if self.validation is not None:
            object.__setattr__(self, "validation", os.fspath(self.validation))
        least: dict[str, float] = dict.fromkeys(
            ("segment", "batch_size", "accumulate", "checkpoint_every", "keep_last"), 1
        )
        least |= dict.fromkeys(
            (
                "warmup_steps",
                "weight_decay",
                "gradient_clip",
                "ema_decay",
                "hold",
                "sample_seconds",
                "input_noise",
            ),
            0,
        )
        least |= {"workers": 0, "seed": 0, "validate_every": 1, "max_steps": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not bound <= value < float("inf"):
                raise ValueError(f"{name} is {value!r}, expected {bound:g} or more")
        positive = (
            "learning_rate",
            "muon_learning_rate",
            "max_minutes",
            "validate_seconds",
            "validation_seconds",
        )
        for name in (*positive, "final_seconds", "baseline_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value!r}, expected more than 0")
        for name in ("ema_decay", "hold", "conditioning_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} is {value!r}, expected 0 to less than 1")
        if self.conditioning_dropout and self.unconditional:
            raise ValueError(
                "conditioning_dropout hides mel frames, and the model is unconditional: choose one"
            )
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction is {self.validation_fraction!r}, expected between 0 and 1"
            )
        if self.optimizer not in (None, "adamw", "muon"):
            raise ValueError(f"optimizer is {self.optimizer!r}, expected adamw or muon")
        if self.max_steps is None and self.max_minutes is None:
            raise ValueError("the run needs an end: max_steps, max_minutes, or both")
        if self.resume and self.overwrite:
            raise ValueError("resume goes on with a run and overwrite replaces it: choose one")
        if self.precision not in ("auto", "32", "bf16"):
            raise ValueError(f"precision is {self.precision!r}, expected auto, 32 or bf16")
        if self.normalise not in ("none", "peak", "rms"):
            raise ValueError(f"normalise is {self.normalise!r}, expected none, peak or rms")
        if self.criterion not in (None, "aic", "bic"):
            raise ValueError(f"criterion is {self.criterion!r}, expected aic or bic")
        for name in ("criterion", "stabilise"):
            if self.family != "linear" and getattr(self, name):
                raise ValueError(
                    f"{name} is of the family linear, and this one is {self.family}: leave it away"
                )
        if self.family == "linear" and self.resume:
            raise ValueError(
                "a linear model is fitted in one pass, there is nothing to resume: overwrite it instead"
            )
        if self.family == "linear" and self.mel_preset is not None:
            raise ValueError(
                f"mel_preset is {self.mel_preset!r}, and a linear model takes no mels: leave it away"
            )
        own = [
            f
            for f in dataclasses.fields(self)
            if f.name.startswith("mel_") and f.name != "mel_preset"
        ]
        if self.mel_preset is not None and (
            given := [f.name for f in own if getattr(self, f.name) != f.default]
        ):
            raise ValueError(
                f"mel_preset is {self.mel_preset!r} and says what the mels are: leave {given[0]} away"
            )
        batch = self.defaults.batch_size if self.batch_size is None else self.batch_size
        if batch % self.accumulate:
            raise ValueError(f"a batch of {batch} does not divide into {self.accumulate} parts")
        self.model_config()

    @property
    def defaults(self) -> TrainingDefaults:
        """What the family's training takes where a field is None."""
        return TRAINING_DEFAULTS.get(str(self.family), TrainingDefaults())

    def resolved(self) -> TrainConfig:
        """Return the configuration with `defaults` in place of None; None of the model's fields stays."""
        defaults = dataclasses.asdict(self.defaults)
        frames = defaults.pop("segment_frames")
        if defaults["segment"] is None:
            hop = self.mel.hop_length if self.mel else round(256 * self.sample_rate / 22050)
            defaults["segment"] = frames * hop
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing) if missing else self

    @property
    def mel(self) -> MelConfig | None:
        """The mels to condition on, or None."""
        if self.unconditional or self.family == "linear":
            return None
        if self.mel_preset is not None:
            return MelConfig.preset(self.mel_preset)
        octave = max(self.sample_rate / 22050, 1 / 16)
        hop = self.mel_hop_length or 2 ** round(torch.log2(torch.tensor(256 * octave)).item())
        n_fft = self.mel_n_fft or 4 * hop
        fmax = self.mel_fmax or (
            min(8000.0, self.sample_rate / 2) if self.sample_rate <= 24000 else None
        )
        return MelConfig(
            sample_rate=self.sample_rate,
            n_fft=n_fft,
            window_length=n_fft,
            hop_length=hop,
            bands=self.mel_bands,
            fmin=self.mel_fmin,
            fmax=fmax,
        )

    def model_config(self, speakers: int = 0) -> Any:
        """What the model is built from: the configuration of its family."""
        if self.family not in FAMILIES:
            raise ValueError(f"family is {self.family!r}, it must be one of {', '.join(FAMILIES)}")
        config_class = FAMILIES[self.family][1]
        own = {f.name for f in dataclasses.fields(config_class)}
        given = {
            name: value for name in _MODEL_FIELDS if (value := getattr(self, name)) is not None
        }
        if self.pre_emphasis:
            given["pre_emphasis"] = self.pre_emphasis
        if foreign := [name for name in given if name not in own]:
            has = ", ".join(name for name in _MODEL_FIELDS if name in own)
            others = [
                name for name, (_, c) in FAMILIES.items() if foreign[0] in c.__dataclass_fields__
            ]
            hint = f"; --family {' or '.join(others)} has {foreign[0]}" if others else ""
            raise ValueError(f"{foreign[0]} is not of the family {self.family}: it has {has}{hint}")
        return config_class(**given, sample_rate=self.sample_rate, mel=self.mel, speakers=speakers)


_MODEL_FIELDS = [f.name for f in dataclasses.fields(TrainConfig)]
_MODEL_FIELDS = _MODEL_FIELDS[
    _MODEL_FIELDS.index("family") + 1 : _MODEL_FIELDS.index("coarse_classes") + 1
]


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. Bits are per sample; those of the curve are all of the same held-out files."""

    bits_before: float
    """Of the model at its first step."""
    bits_best: float
    """The least on the curve."""
    bits_final: float
    """The last on the curve."""
    held_out: dict[str, float]
    """On all held-out files (up to `final_seconds`): "model" (that of `best`), "uniform", "unigram", "markov"."""
    steps: int
    seconds: float
    """Of training and validations, resumed runs included."""
    stopped_by: str
    """"steps", "time" or "interrupt"; "fit" of a linear model, which is fitted in closed form."""
    best: Path
    """Checkpoint directory."""
    last: Path
    """Checkpoint directory."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Files that could not be used, and why."""
