"""Settings of a training run, `TrainConfig`. No torch here: the command line reads it."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from wavear.common.errors import WavearError
from wavear.data.gains import Normalize
from wavear.mel.config import MelConfig
from wavear.training.combinations import refuse_contradictions
from wavear.training.field_types import described, fits
from wavear.training.mel_settings import MEL_FIELDS, MelSettings
from wavear.training.result import TrainResult

if TYPE_CHECKING:
    from wavear.mel.conventions import Frames

__all__ = ["TRAINING_DEFAULTS", "OutputSettings", "TrainConfig", "TrainResult"]


@dataclass(frozen=True)
class TrainingDefaults:
    """Values of the fields of `TrainConfig` that are None because they differ between families."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 2e-3
    hold: float = 0.0
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    segment: int | None = 8192
    segment_frames: int = 0
    """Mel frames, used where `segment` is None."""
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
    )
}
"""By family; other families use the defaults of the class."""

FREE_RUN_DEFAULTS = dataclasses.replace(
    TRAINING_DEFAULTS["predictive"],
    optimizer="adamw",
    learning_rate=3e-4,
    hold=0.4,
    ema_decay=0.99,
    segment_frames=4,
    batch_size=32,
)
"""For a training by the free run."""

FREE_RUN_SHARE = 0.6
"""The part of `max_minutes` for the free run, on one process."""
FREE_RUN_LEAST_MINUTES = 10.0
"""Runs of less `max_minutes` have time for one part: from scratch the other, fine-tuning this."""


def family_defaults() -> dict[str, str]:
    """Return the text of each field's defaults, for the help.

    Examples
    --------
    >>> family_defaults()["batch_size"]
    '2; predictive: 3; with --free-run 1: 32'
    >>> family_defaults()["segment"]
    '8192; predictive: 32 frames; with --free-run 1: 4 frames'
    """

    def text(values: TrainingDefaults, name: str) -> str:
        value = getattr(values, name)
        if value is None:
            return f"{values.segment_frames} frames"
        return value if isinstance(value, str) else f"{value:g}"

    families = {"": TrainingDefaults()} | {f"{f}: ": v for f, v in TRAINING_DEFAULTS.items()}
    families["with --free-run 1: "] = FREE_RUN_DEFAULTS
    names = [f.name for f in dataclasses.fields(TrainingDefaults) if f.name != "segment_frames"]
    return {name: "; ".join(f + text(v, name) for f, v in families.items()) for name in names}


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Recordings and how they are read."""

    data: str = field(kw_only=False)
    """Recordings: a folder (WAV, FLAC, OGG, MP3, AIFF..., at any depth), tar shards, or a manifest
    (docs/data.md): a table or JSON lines with `path`, `audio_filepath` or `file_name`, optionally
    `start` or `offset`, `duration` or `end` in seconds, `speaker`, `split`; or `path|text`."""
    validation: str | None = None
    """A second folder or manifest, held out as a whole. None: a part of `data` is held out."""
    validation_fraction: float = 0.05
    """Share of the files to hold out, chosen by the hash of their names; at least one file."""
    sample_rate: int = 22050
    """Rate of the model, in Hz; recordings at other rates are resampled when they are read."""
    speakers: bool = False
    """Use speaker labels: first-level sub-folders of `data`, or a manifest's column `speaker`."""
    normalize: Normalize = "none"
    """none, or a gain to a peak of 0.9 or an rms of -23 dB of full scale; held-out audio too."""
    normalize_by: Literal["file", "speaker"] = "file"
    """One gain per file, or one per speaker."""
    trim_silence: float | None = None
    """Cut the ends of files this many dB below their peak (such as 40), except 50 ms; None: no."""
    pre_emphasis: float = 0.0
    """a in x[t] - a x[t-1] (such as 0.85), whose codes are modelled; softens their noise at high
    frequencies. Generated audio is de-emphasised. Bits cannot be compared with those of 0."""
    mels: str | None = None
    """Folder of mels to condition on (predicted ones, say), named after the recordings: the mel of
    sub/x.wav is sub/x.npy. None: mels are computed from the recordings."""
    features: str | None = None
    """Folder of features (.npy of channels x frames, ...) to condition on instead of mels, named
    after the recordings: numbers such as loudness, F0 or a mask, or codes. Not predictive."""
    feature_hop: int | None = None
    """Samples per frame of `features`; None: as for mels."""
    feature_classes: int = 0
    """Codes that the integers of `features` may be, 0 to this less 1; 0: they are numbers."""
    redraw_below: float | None = None
    """Draw segments quieter than this many dB of full scale (such as -60) again, up to 4 times, so
    that pauses do not fill the batches. None: never."""
    workers: int | None = None
    """Processes that read audio; None: 4 with a GPU, otherwise none. Batches are the same."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model. None is the family's own default; a field that the family lacks is rejected."""

    from_checkpoint: str | None = None
    """Fine-tune this model: voice (the one that comes with wavear), a checkpoint's folder, or
    hf:owner/name on the hub. It sets the model, its sample rate and its mels; with `speakers`,
    those that it lacks are added."""
    family: str | None = None
    """predictive, wavenet, gru, transformer or linear; None: predictive, wavenet without mels."""
    layers: int | None = None
    """predictive: layers of fixed dilation (4). wavenet: dilated convolutions (20), a multiple of
    `stacks`. gru: recurrent layers (1). transformer: layers."""
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
    """predictive: past samples of the linear prediction (32 at 22.05 kHz, scaled by the rate)."""
    sub_frames: int | None = None
    """predictive: predictors per mel frame (one per 2.9 ms)."""
    shortest_period: int | None = None
    """predictive: shortest period, in samples (that of 550 Hz)."""
    longest_period: int | None = None
    """predictive: longest period, in samples (that of 50 Hz)."""
    period_residuals: int | None = None
    """predictive: residuals at the input on each side of one period ago (4)."""
    causal: bool | None = None
    """predictive: condition a frame on itself and earlier frames, without look-ahead (False)."""
    channels: int | None = None
    """gru: hidden units of each layer (352). transformer: channels (256), of 2 * `heads`."""
    input_channels: int | None = None
    """gru: channels in which the previous sample and the conditioning are added (128)."""
    heads: int | None = None
    """transformer: attention heads (4)."""
    window: int | None = None
    """transformer: positions that a position attends to in each layer (128)."""
    patch: int | None = None
    """transformer: samples per position (8)."""
    hidden_channels: int | None = None
    """transformer: channels between the two matrices of a layer (four times `channels`)."""
    sample_channels: int | None = None
    """transformer: channels of the embedding of a past sample (64)."""
    head_channels: int | None = None
    """Channels between the two layers of the head (256; predictive: 64)."""
    conditioning_channels: int | None = None
    """Channels of the conditioning (80; predictive: 96)."""
    classes: int | None = None
    """Codes: 256 of mu-law for a categorical law (2 to 65536), 65536 linear ones for others."""
    law: str | None = None
    """Output distribution: categorical, logistic_mixture, gaussian, laplace; see docs/laws.md."""
    mixtures: int | None = None
    """Components of a mixture of logistics (10; predictive: 5)."""
    order: int | None = None
    """linear: lags (32); with a `criterion` the highest order tried."""
    differencing: int | None = None
    """linear: order of the differences that are predicted (0)."""
    grid: str | None = None
    """linear: grid of the codes, mulaw (256 codes) or linear (16 bits)."""
    domain: str | None = None
    """linear: predicts samples (linear) or mu-law companded values (companded)."""
    coarse_classes: int | None = None
    """For laws over values: mu-law codes embedded next to the value at the input (0: none)."""
    criterion: Literal["aic", "bic"] | None = None
    """linear: choose the order by this information criterion."""
    stabilise: bool = False
    """linear: move poles outside the unit circle inside."""
    unconditional: bool = False
    """Train without mels: the model then generates freely."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The optimizer step. None is the family's default (`TRAINING_DEFAULTS`)."""

    conditioning_dropout: float = 0.0
    """Share of mel frames (such as 0.1) that training replaces by the bands' means, at random."""
    input_noise: float | None = None
    """Noise on the past in training (targets stay clean), so that the model bears its own errors.
    wavenet, gru, transformer: standard deviation in codes (such as 2). predictive:
    largest standard deviation, in units of the residual's scale."""
    free_run: float | None = None
    """predictive: share of the run, at its end, that trains by the free run too: stretches that the
    model generates from its own past get the recordings' spectra (docs/training.md). The settings
    below are those of the part before."""
    segment: int | None = None
    """Samples of loss per crop, rounded up to mel frames; the receptive field is added to it."""
    batch_size: int | None = None
    """Crops per step, over all processes and all parts of `accumulate`."""
    accumulate: int = 1
    """Parts that a process divides its share of a batch into, to save memory."""
    optimizer: Literal["adamw", "muon"] | None = None
    """adamw for all weights, or muon for the matrices inside the network and adamw for the rest."""
    learning_rate: float | None = None
    """Peak of AdamW. Rule of thumb: scale it with the square root of `batch_size`."""
    muon_learning_rate: float = 1e-2
    """Peak of Muon, if `optimizer` is muon."""
    weight_decay: float | None = None
    """Weight decay of both optimizers, on matrices."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient; 0: no limit."""
    ema_decay: float | None = None
    """Decay of the moving average of the weights, which is validated and saved; less at first."""
    precision: Literal["auto", "32", "bf16"] = "auto"
    """Arithmetic of the steps; the weights are float32. auto: bf16 where the hardware gains by it;
    a resumed run keeps its precision."""
    compile: bool = False
    """Compile the layers with torch.compile, which needs a C++ compiler; see docs/benchmarks.md."""
    activation_checkpointing: bool = False
    """Recompute the layers in the backward pass instead of storing them: less memory, more time."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps. Under torchrun or srun every process uses its own."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Length of the run and learning-rate schedule."""

    max_steps: int | None = 200_000
    """Steps of the run, with resumed parts; the learning rate falls along a cosine until then."""
    max_minutes: float | None = None
    """Minutes of the run, with resumed parts and validations, without final scores; likewise."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    hold: float | None = None
    """Share of the run before the learning rate begins to fall, 0 to less than 1."""


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """Measurements, output and files."""

    out: str = field(kw_only=False)
    """Directory of the run: best/, last/ (checkpoints), states/, train.json, metrics.csv, ..."""
    validate_every: int | None = None
    """Steps between validations; None: by `validate_seconds`."""
    validate_seconds: float = 120.0
    """Seconds between validations, more if they would take over 5 % of the time."""
    validation_seconds: float = 10.0
    """Seconds of held-out audio for each validation."""
    final_seconds: float = 600.0
    """Seconds of held-out audio for the final scores."""
    baseline_seconds: float = 600.0
    """Seconds of training audio that the baselines are fitted to."""
    sample_seconds: float = 2.0
    """Seconds to synthesize of each of four held-out recordings at every validation, into samples/;
    their score selects the best model of mels, bits that of features. Without either: of one
    recording, to hear. 0: none."""
    wandb: str | None = None
    """Weights & Biases project to log to as well (needs `pip install wandb`)."""
    checkpoint_every: int = 1000
    """Steps between saved states; every validation saves one too."""
    keep_last: int = 3
    """Saved states to keep: a damaged one then costs some steps, not the run."""
    resume: bool = False
    """Resume the run in `out` from its last good state."""
    extend_speakers: bool = False
    """Resume although speakers were added or removed; the others keep their numbers."""
    overwrite: bool = False
    """Replace the run in `out`."""
    progress: bool = True
    """Progress bar and messages; `--no-progress` leaves them out."""


_AT_LEAST_1 = (
    "feature_hop segment batch_size accumulate checkpoint_every keep_last validate_every max_steps"
)
_AT_LEAST_0 = (
    "feature_classes warmup_steps weight_decay gradient_clip sample_seconds input_noise workers"
    " seed"
)
_ABOVE_0 = (
    "learning_rate muon_learning_rate max_minutes validate_seconds validation_seconds"
    " final_seconds baseline_seconds"
)
_SHARES = "ema_decay hold conditioning_dropout"


# Fields come in the order of the last base first.
@dataclass(frozen=True)
class TrainConfig(
    OutputSettings, ScheduleSettings, OptimizerSettings, MelSettings, ModelSettings, DataSettings
):
    """Settings of a training run: the fields of six groups, all of them keyword arguments.

    The groups are `DataSettings`, `ModelSettings`, `MelSettings`, `OptimizerSettings`,
    `ScheduleSettings` and `OutputSettings`; each field has its unit in its own text.
    `dataclasses.replace` changes some.

    Raises
    ------
    WavearError
        If a value has the wrong type or is out of range; the message has the field, the value and
        what is expected.

    Examples
    --------
    >>> config = TrainConfig(data="recordings", out="runs/mine", max_steps=1000)
    >>> config.family, dataclasses.replace(config, unconditional=True, family="gru").mel
    ('predictive', None)
    """

    def __post_init__(self) -> None:
        for name in ("data", "out", "validation", "mels", "features"):
            if isinstance(value := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
        for name, hint in _field_types().items():
            if not fits(value := getattr(self, name), hint):
                raise WavearError(f"{name} is {value!r}, expected {described(hint)}")
        if self.from_checkpoint is not None:
            self._follow_checkpoint()
        elif self.family is None:
            without = self.unconditional or self.features is not None
            object.__setattr__(self, "family", "wavenet" if without else "predictive")
        self._check_ranges()
        refuse_contradictions(self)
        self.model_config()

    @functools.cached_property
    def _start(self) -> tuple[str, Any]:
        """Family and configuration of the checkpoint to fine-tune."""
        from wavear.models.checkpoint import saved_config

        return saved_config(str(self.from_checkpoint))

    def _follow_checkpoint(self) -> None:
        """Take what the checkpoint to fine-tune sets, and refuse other values."""
        from wavear.mel.features import FeatureConfig

        family, own = self._start
        if family == "linear":
            raise WavearError(
                f"{self.from_checkpoint} is a linear model, which is fitted in closed form: fit it"
                " again, without from_checkpoint"
            )
        set_by_it = {
            "family": family,
            "sample_rate": own.sample_rate,
            "unconditional": own.mel is None,
            "pre_emphasis": getattr(own, "pre_emphasis", 0.0),
        }
        set_by_it |= {name: getattr(own.mel, key, None) for name, key in MEL_FIELDS.items()}
        set_by_it |= {name: getattr(own, name, None) for name in _MODEL_FIELDS}
        if getattr(own.mel, "norm", "none") is None:
            set_by_it["mel_norm"] = "none"
        set_by_it["feature_classes"] = getattr(own.mel, "classes", 0)
        if isinstance(own.mel, FeatureConfig) != (self.features is not None):
            takes = "features: pass" if self.features is None else "no features: drop"
            raise WavearError(f"{self.from_checkpoint} takes {takes} --features")
        if self.features is not None:
            set_by_it["feature_hop"] = own.mel.hop_length
        if self.mel_preset is not None and MelConfig.preset(self.mel_preset) == own.mel:
            set_by_it["mel_preset"] = self.mel_preset
        else:
            set_by_it["mel_preset"] = None
        for name, value in set_by_it.items():
            if (given := getattr(self, name)) not in (getattr(type(self), name), value):
                raise WavearError(
                    f"{name} is {given!r}, and {self.from_checkpoint} has {value!r}: drop {name},"
                    " or train without from_checkpoint"
                )
        for name in ("family", "sample_rate", "unconditional", "pre_emphasis"):
            object.__setattr__(self, name, set_by_it[name])
        if own.speakers and not self.speakers:
            raise WavearError(f"{self.from_checkpoint} has {own.speakers} speakers: set speakers")
        if self.speakers and own.mel is None and not own.speakers:
            raise WavearError(
                f"{self.from_checkpoint} has neither mels nor speakers, so its network cannot be"
                " given speakers: drop speakers"
            )

    def _check_ranges(self) -> None:
        for names, good, expected in (
            (_AT_LEAST_1, lambda v: 1 <= v < math.inf, "1 or more"),
            (_AT_LEAST_0, lambda v: 0 <= v < math.inf, "0 or more"),
            (_ABOVE_0, lambda v: 0 < v < math.inf, "more than 0"),
            (_SHARES, lambda v: 0 <= v < 1, "0 to less than 1"),
            ("free_run", lambda v: 0 <= v <= 1, "0 to 1"),
            ("validation_fraction", lambda v: 0 < v < 1, "between 0 and 1"),
        ):
            for name in names.split():
                if (value := getattr(self, name)) is not None and not good(value):
                    raise WavearError(f"{name} is {value!r}, expected {expected}")

    @property
    def defaults(self) -> TrainingDefaults:
        """Return the family's values for fields that are None."""
        if self.free_run == 1:
            return FREE_RUN_DEFAULTS
        return TRAINING_DEFAULTS.get(str(self.family), TrainingDefaults())

    def resolved(self) -> TrainConfig:
        """Return the configuration with `defaults` in place of None, except the model's fields."""
        defaults = dataclasses.asdict(self.defaults)
        frames = defaults.pop("segment_frames")
        if defaults["segment"] is None:
            hop = self.mel.hop_length if self.mel else round(256 * self.sample_rate / 22050)
            defaults["segment"] = frames * hop
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing) if missing else self

    @property
    def frames(self) -> str | None:
        """Return the folder of mels or features to condition on; None: mels of the recordings."""
        return self.mels if self.features is None else self.features

    @property
    def mel(self) -> Frames | None:
        """Return the mels or features to condition on, or None."""
        if self.from_checkpoint is not None:
            return self._start[1].mel
        if self.unconditional or self.family == "linear":
            return None
        if self.features is not None:
            from wavear.data.file_mels import folder_features

            hop = self.feature_hop or self.mel_of(self.sample_rate).hop_length
            return folder_features(self.features, self.sample_rate, hop, self.feature_classes)
        return self.mel_of(self.sample_rate)

    def model_config(self, speakers: int = 0) -> Any:
        """Return the configuration of the family's model."""
        from wavear.models.families import FAMILIES

        if self.family not in FAMILIES:
            raise WavearError(f"family is {self.family!r}, it must be one of {', '.join(FAMILIES)}")
        if self.from_checkpoint is not None:
            return dataclasses.replace(self._start[1], speakers=speakers)
        config_class = FAMILIES[self.family][1]
        own = config_class.__dataclass_fields__
        given = {name: getattr(self, name) for name in _MODEL_FIELDS}
        given = {name: value for name, value in given.items() if value is not None}
        if self.pre_emphasis:
            given["pre_emphasis"] = self.pre_emphasis
        if foreign := [name for name in given if name not in own]:
            has = ", ".join(name for name in _MODEL_FIELDS if name in own)
            others = [f for f, (_, c) in FAMILIES.items() if foreign[0] in c.__dataclass_fields__]
            hint = f"; --family {' or '.join(others)} has {foreign[0]}" if others else ""
            raise WavearError(f"the family {self.family} has no {foreign[0]}: it has {has}{hint}")
        return config_class(**given, sample_rate=self.sample_rate, mel=self.mel, speakers=speakers)


_MODEL_FIELDS = [f.name for f in dataclasses.fields(ModelSettings)]
_MODEL_FIELDS = _MODEL_FIELDS[
    _MODEL_FIELDS.index("layers") : _MODEL_FIELDS.index("coarse_classes") + 1
]


@functools.cache
def _field_types() -> dict[str, Any]:
    hints = get_type_hints(TrainConfig)
    return {f.name: hints[f.name] for f in dataclasses.fields(TrainConfig)}
