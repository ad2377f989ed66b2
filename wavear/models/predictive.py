"""The predictive WaveNet: a small network that only has to learn what a mel and a period do not already say.

    mel --Envelope, Levinson--> prediction p and scale s of every sample          (`wavear.models.prediction`)
    mel --PeriodNetwork------> lag and voicing of every sample                    (`wavear.models.period`)
    mel --convolutions-------> gate biases of every layer, at the frame rate
    e = (x - p) / s of the past, p, s, lag --gated layers--> mixture of logistics in units of e --> law of x

The layers are WaveNet's (van den Oord et al., 2016), but for the last, whose dilation is the
period, as in the quasi-periodic WaveNet (Wu et al., 2019, https://arxiv.org/abs/1907.00797).
Prediction in front of a network is LPCNet's idea (Valin and Skoglund, 2019,
https://arxiv.org/abs/1810.11846); here it needs no analysis of the waveform.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wavear.models.base import AutoregressiveModel, CommonConfig, check_whole
from wavear.models.frames import FrameConditioning, interpolated, interpolation_weights
from wavear.models.period import PeriodNetwork
from wavear.models.prediction import Envelope, predictor

_REFERENCE_RATE = 22050  # Hz, at which the lengths below were tuned
LARGEST_RESIDUAL = 15.0
"""Where residuals are clipped at the input, in units of their scale."""
_LOG_SCALES = (-7.0, 5.0)  # of the mixture, in units of e
_INITIAL_SPREAD, _INITIAL_SCALE = 0.3, 0.45  # of the mixture, in units of e


@dataclass(frozen=True, kw_only=True)
class PredictiveWaveNetConfig(CommonConfig):
    """What a predictive WaveNet is made of; saved with its weights. A length of 0 follows the sample rate."""

    law: str = "logistic_mixture"
    """The distribution of the next sample; only logistic_mixture."""
    mixtures: int = 5
    """Components of the mixture of logistics."""
    conditioning_channels: int = 96
    """Channels of the convolutions over mel frames."""
    layers: int = 4
    """Gated layers of fixed dilation: 1, 3, 9 and so on."""
    period_layers: int = 1
    """Gated layers behind them whose dilation is the period."""
    kernel_size: int = 3
    """Taps of each layer, 2 or more."""
    residual_channels: int = 48
    """Channels of the signal that runs through the layers, and of each half of the gate."""
    skip_channels: int = 64
    """Channels of the sum over layers that the head reads."""
    head_channels: int = 64
    """Channels between the two 1x1 convolutions of the head."""
    prediction_order: int = 0
    """Past samples of the linear prediction; 0: 32 at 22.05 kHz, in proportion to the rate."""
    sub_frames: int = 0
    """Predictors per mel frame; 0: one per 64 samples at 22.05 kHz (2.9 ms)."""
    shortest_period: int = 0
    """Least lag in samples; 0: that of 550 Hz."""
    longest_period: int = 0
    """Largest lag in samples; 0: that of 50 Hz."""
    recent_residuals: int = 16
    """Residuals of the last samples at the input."""
    period_residuals: int = 4
    """Residuals at the input on each side of one period ago."""
    period_channels: int = 64
    """Channels of the network for lag and voicing."""
    causal: bool = False
    """Condition the samples of a frame on that frame and those before it, without look-ahead."""

    def __post_init__(self) -> None:
        scale = self.sample_rate / _REFERENCE_RATE if isinstance(self.sample_rate, int) else 1.0
        hop = self.mel.hop_length if self.mel is not None else 256
        automatic = {
            "prediction_order": max(2 * round(16 * scale), 8),
            "sub_frames": max(round(hop / (64 * scale)), 1),
            "shortest_period": max(round(self.sample_rate / 550), self.period_residuals + 4),
            "longest_period": round(self.sample_rate / 50),
        }
        for name, value in automatic.items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
        check_whole(
            self, layers=1, period_layers=0, kernel_size=2, residual_channels=1, skip_channels=1, head_channels=1,
            prediction_order=1, sub_frames=1, shortest_period=self.period_residuals + 4,
            longest_period=self.shortest_period + 1, recent_residuals=1, period_residuals=1, period_channels=1,
        )  # fmt: skip
        super().__post_init__()
        if self.mel is None:
            raise ValueError(
                "a predictive WaveNet takes its prediction from a mel: give one, or choose a wavenet"
            )
        fixed = {
            "law": "logistic_mixture",
            "classes": 65536,
            "coarse_classes": 0,
            "pre_emphasis": 0.0,
        }
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: a predictive WaveNet has {value!r}"
                )
        if self.layers > 12:
            raise ValueError(
                f"layers is {self.layers}: the dilation triples from layer to layer, at most 12"
            )
        if self.longest_period > self.sample_rate:
            raise ValueError(
                f"longest_period is {self.longest_period} samples, expected a second at most"
            )
        if self.sub_frames > self.mel.hop_length:
            raise ValueError(
                f"sub_frames is {self.sub_frames}, and a frame has {self.mel.hop_length} samples"
            )

    @property
    def dilations(self) -> tuple[int, ...]:
        """Of each layer, in samples; 0 stands for the period."""
        return (*(3**layer for layer in range(self.layers)), *(0,) * self.period_layers)

    @property
    def queue_lengths(self) -> tuple[int, ...]:
        """Past inputs that each layer keeps, in samples."""
        return tuple((self.kernel_size - 1) * (d or self.longest_period) for d in self.dilations)

    @property
    def history(self) -> int:
        """Past samples and residuals that are kept: what prediction and features reach back to, beyond the last one."""
        reach = self.longest_period + self.period_residuals + 2
        return max(self.prediction_order, self.recent_residuals, reach)

    @property
    def lag_history(self) -> int:
        """Whole lags that are kept: a period layer steps back by the lag at each of its taps but the oldest."""
        return max(self.kernel_size - 2, 1) * self.longest_period + 1

    @property
    def features(self) -> int:
        """Numbers at the input for each sample."""
        return self.recent_residuals + 3 + 2 * self.period_residuals + 1 + 2

    @property
    def gates(self) -> int:
        """Gate biases of all layers, and the bias of the skip."""
        return 2 * self.residual_channels * len(self.dilations) + self.skip_channels

    @property
    def receptive_field(self) -> int:
        """Past samples that the law of the next one depends on: the layers', the input's, and a residual's own."""
        return sum(self.queue_lengths) + self.history + self.prediction_order + 1


class PredictiveConditioning(nn.Module):
    """Mel frames (B, M, F) and speakers (B,) -> `FrameConditioning`.

    Two convolutions over frames, the speaker's vector, and one matrix to the gate biases of all
    layers and the skip; the prediction and the period of the mel.
    """

    mel_mean: Tensor
    mel_deviation: Tensor
    gain: Tensor

    def __init__(self, config: PredictiveWaveNetConfig):
        super().__init__()
        mel: Any = config.mel
        self.config = config
        self.hop, self.bands = mel.hop_length, mel.bands
        channels = config.conditioning_channels
        # Mean and deviation of each band over the training data: the networks see numbers near one.
        self.register_buffer("mel_mean", torch.zeros(mel.bands))
        self.register_buffer("mel_deviation", torch.ones(mel.bands))
        # Factor on the scale of the residual, fitted to the training data: its mean absolute value
        # is then 0.6.
        self.register_buffer("gain", torch.ones(1))
        self.first = nn.Conv1d(mel.bands, channels, 2 * config.conditioning_context + 1)
        self.second = nn.Conv1d(channels, channels, 3)
        self.projection = nn.Linear(channels, config.gates)
        self.speakers = nn.Embedding(config.speakers, channels) if config.speakers else None
        self.period = PeriodNetwork(
            mel.bands,
            config.shortest_period,
            config.longest_period,
            config.period_channels,
            config.causal,
        ).requires_grad_(False)  # trained on its own, before the rest
        self.envelope = Envelope(mel, config.prediction_order)
        self.hop_weights = interpolation_weights(mel.hop_length, config.causal)
        self.sub_weights = interpolation_weights(config.sub_frames, config.causal)

    @property
    def context(self) -> int:
        """Frames that the convolutions are shorter than their input."""
        return max(2 * self.config.conditioning_context + 2, self.period.context)

    @property
    def lookahead(self) -> int:
        """Frames after its own that a sample depends on: half of the convolutions' context, one to interpolate."""
        return 0 if self.config.causal else self.context // 2 + 1

    @property
    def lookback(self) -> int:
        """Frames before its own that a sample depends on."""
        return self.context + 1 if self.config.causal else self.lookahead

    def forward(
        self, mel: Tensor | None, speaker: Tensor | None = None, padded: bool = False
    ) -> FrameConditioning:
        """See `AutoregressiveModel.condition`."""
        assert mel is not None
        config = self.config
        mel = mel if padded else F.pad(mel, (self.lookback, self.lookahead), "replicate")
        frames = mel.shape[2] - self.lookback - self.lookahead
        offset = torch.zeros(len(mel), dtype=torch.long, device=mel.device)
        weights = self.hop_weights.to(mel.device)
        from wavear.models import (
            frame_kernel,
        )  # not before it is needed: Numba takes its time to import

        if frame_kernel.usable(self, mel):
            gates, coefficients, scale, lag, voicing = frame_kernel.condition(
                self, mel, speaker, frames
            )
            gates = gates.unfold(1, 3, 1)
            return FrameConditioning(
                gates, coefficients, scale, lag, voicing, offset, frames * self.hop, weights
            )
        gates = self._around(self.gate_biases(self.normalised(mel), speaker), frames)
        log_lag, voicing = self._around_period(mel, frames)
        with torch.no_grad():
            r = self.envelope.autocorrelation(self._neighbours(mel))
            r = interpolated(r, self.sub_weights.to(mel.device))
            coefficients, scale = predictor(r, self.gain.double())
            lag = (
                interpolated(log_lag, weights)
                .exp()
                .clamp(config.shortest_period, config.longest_period)
            )
            voicing = interpolated(voicing, weights)
        return FrameConditioning(
            gates=gates.unfold(1, 3, 1),
            coefficients=coefficients,
            scale=scale,
            lag=lag.float(),
            voicing=voicing.float(),
            offset=offset,
            samples=frames * self.hop,
            weights=weights,
        )

    def normalised(self, mel: Tensor) -> Tensor:
        """Bring each band to mean 0 and deviation 1 over the training data."""
        return (mel - self.mel_mean[:, None]) / self.mel_deviation[:, None]

    def gate_biases(self, mel: Tensor, speaker: Tensor | None = None) -> Tensor:
        """Normalised mels (B, M, F) -> (B, F - 2 * conditioning_context - 2, G)."""
        h = F.relu(self.second(F.relu(self.first(mel))))
        if self.speakers is not None:
            assert speaker is not None
            h = h + self.speakers(speaker)[:, :, None]
        return self.projection(h.transpose(1, 2))

    def period_of(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Mels (B, M, F) -> logarithm of the lag and voicing, (B, F) each; the ends are repeated as in `forward`."""
        before = self.period.context if self.config.causal else self.period.context // 2
        return self.period.track(
            self.normalised(F.pad(mel, (before, self.period.context - before), "replicate"))
        )

    @torch.no_grad()
    def _around_period(self, mel: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        log_lag, voicing = self.period.track(self.normalised(mel))
        return tuple(self._around(each[:, :, None], frames)[:, :, 0] for each in (log_lag, voicing))  # type: ignore

    def _around(self, x: Tensor, frames: int) -> Tensor:
        """Cut (B, n, C), made of all frames, to the frames asked for and one on each side: (B, frames + 2, C)."""
        if (
            self.config.causal
        ):  # the outputs end with the last frame; the one after it has the weight zero
            x = x[:, x.shape[1] - frames - 1 :]
            return torch.cat([x, x[:, -1:]], dim=1)
        surplus = (x.shape[1] - frames - 2) // 2
        return x[:, surplus : x.shape[1] - surplus]

    def _neighbours(self, mel: Tensor) -> Tensor:
        """The frames asked for and one on each side, (B, M, frames + 2)."""
        mel = mel[:, :, self.lookback - 1 :]
        if self.config.causal:
            return torch.cat([mel, mel[:, :, -1:]], dim=2)
        return mel[:, :, : mel.shape[2] - self.lookahead + 1]


class PredictiveBlock(nn.Module):
    """One layer: a matrix over the taps side by side, oldest first, its gate biases, and a 1x1 output to the next."""

    def __init__(self, config: PredictiveWaveNetConfig, last: bool):
        super().__init__()
        r = config.residual_channels
        self.taps = nn.Linear(config.kernel_size * r, 2 * r, bias=False)
        self.residual = None if last else nn.Linear(r, r)

    def forward(self, taps: list[Tensor], gates: Tensor) -> tuple[Tensor, Tensor]:
        """Taps (..., R), the current one last, and gate biases (..., 2 R) -> the next layer's input, gated units."""
        tanh, sigmoid = (self.taps(torch.cat(taps, dim=-1)) + gates).chunk(2, dim=-1)
        gated = torch.tanh(tanh) * torch.sigmoid(sigmoid)
        return taps[-1] if self.residual is None else taps[-1] + self.residual(gated), gated


@dataclass
class PredictiveState:
    """The past of B streams, in rings: what belongs to time t lies at t modulo the length."""

    samples: Tensor
    """(B, H), float32: at t the sample before t."""
    residuals: Tensor
    """(B, H), float32: at t the residual of the sample before t."""
    lags: Tensor
    """(B, lag history), int64: whole lags."""
    queues: list[Tensor]
    """Per layer, (B, queue length, R): its inputs."""
    pending: Tensor
    """(B, 2), float64: prediction and scale of the sample stepped last, whose value is not known yet."""
    time: Tensor
    """Samples stepped; int64 scalar on the device, so that a captured graph can advance it."""


@dataclass(frozen=True)
class _Past:
    """What features are made of, gathered from the past, float64: (..., n) or (...)."""

    recent: Tensor
    """Residuals of the last samples, the newest last."""
    around: Tensor
    """Residuals around one period ago, two more than features at one end and one at the other."""
    last: Tensor
    """The sample before."""
    period_ago: Tensor
    """The sample one period ago."""


class PredictiveWaveNet(AutoregressiveModel):
    """Gated layers over the residual of a prediction that is known from the mel; see the module.

    Parameters
    ----------
    config : PredictiveWaveNetConfig

    Examples
    --------
    >>> from wavear import MelConfig
    >>> model = PredictiveWaveNet(PredictiveWaveNetConfig(mel=MelConfig(), residual_channels=8, skip_channels=8))
    >>> cond = model.condition(torch.zeros(1, 80, 3))
    >>> model(torch.full((1, 768), 32768), cond).shape  # 5 logits, 5 means, 5 log-scales of each sample
    torch.Size([1, 15, 768])
    """

    family = "predictive"

    config: PredictiveWaveNetConfig
    conditioning: PredictiveConditioning
    blocks: Any  # nn.ModuleList of PredictiveBlock
    frames_are_exact = True
    bf16 = True  # features, prediction and loss have a precision of their own

    def __init__(self, config: PredictiveWaveNetConfig):
        super().__init__()
        self.config = config
        self.input = nn.Linear(config.features, config.residual_channels)
        last = len(config.dilations) - 1
        self.blocks = nn.ModuleList(
            PredictiveBlock(config, last=layer == last) for layer in range(last + 1)
        )
        self.skip = nn.Linear(config.residual_channels * (last + 1), config.skip_channels)
        self.hidden = nn.Linear(config.skip_channels, config.head_channels)
        self.output = nn.Linear(config.head_channels, 3 * config.mixtures)
        self.conditioning = PredictiveConditioning(config)
        with torch.no_grad():
            self.output.weight.mul_(0.1)
            weights, means, scales = self.output.bias.view(3, config.mixtures)
            weights.zero_()
            means.copy_(torch.linspace(-_INITIAL_SPREAD, _INITIAL_SPREAD, config.mixtures))
            scales.fill_(math.log(_INITIAL_SCALE))

    @property
    def receptive_field(self) -> int:
        """Past samples that the law of the next one depends on."""
        return self.config.receptive_field

    @property
    def lookback(self) -> int:
        """See `AutoregressiveModel.lookback`."""
        return self.conditioning.lookback

    @property
    def multiply_adds(self) -> int:
        """See `AutoregressiveModel.multiply_adds`: each weight of each matrix once, and the prediction."""
        parts = (self.input, self.blocks, self.skip, self.hidden, self.output)
        matrices = (
            module for part in parts for module in part.modules() if isinstance(module, nn.Linear)
        )
        return sum(matrix.weight.numel() for matrix in matrices) + self.config.prediction_order

    def muon_parameters(self) -> list[nn.Parameter]:
        """Return the matrices inside the network, which Muon trains."""
        blocks = [m for block in self.blocks for m in (block.taps, block.residual) if m is not None]
        matrices: list[Any] = [*blocks, self.skip, self.hidden]
        return [matrix.weight for matrix in matrices]

    def input_noise(
        self, codes: Tensor, amount: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return noise (B, T) on the residuals at the input: Gaussian, of a level drawn from 0 to `amount` per row.

        Prediction and target stay clean. The network learns not to trust every detail of a past
        that it made itself.
        """
        level = torch.rand(len(codes), 1, generator=generator, device=codes.device) * amount
        noise = torch.randn(codes.shape, generator=generator, device=codes.device)
        return {"codes": codes, "noise": level * noise}

    # --- all samples in parallel

    def forward(
        self,
        codes: Tensor,
        cond: FrameConditioning | None = None,
        state: PredictiveState | None = None,
        previous: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """See `AutoregressiveModel.forward`; `noise` (B, T) is added to the residuals at the input."""
        assert cond is not None, "a predictive WaveNet is conditioned on mels"
        config = self.config
        batch, total = codes.shape
        tensors = self._fresh(batch) if state is None else self.export_state(state)
        coefficients, scale, lag, voicing = cond.per_sample()
        x = self._value(codes)
        s = scale.double()
        # The past: kept samples, the one before codes[:, 0], and the codes; time t lies at `now` +
        # t.
        if previous is None:
            before = x.new_zeros(batch, 1)
            before_residual = before
        else:
            before = self._value(previous)[:, None]
            before_residual = _residual(before, *tensors["pending"].double().split(1, dim=1))
        now = config.history + 1
        xs = torch.cat([tensors["samples"].float(), before, x], dim=1)
        p = self._predicted(xs[:, now - config.prediction_order :], coefficients)
        clean = torch.cat(
            [tensors["residuals"].float(), before_residual, _residual(x, p, s)], dim=1
        )
        es = clean if noise is None else torch.cat([clean[:, :now], clean[:, now:] + noise], dim=1)
        whole = torch.cat([tensors["lags"], lag.round().long()], dim=1)
        features = _features(self._past_of(xs, es, lag, now), p, s, lag, voicing)
        h = self.input(features.to(self.input.weight.dtype))
        if state is None and h.dtype == torch.bfloat16 and fused_layers().usable(h, cond):
            fused = fused_layers()
            gates = fused.gated_layers(self, h, cond, lag.round().long())
            skip = self.skip(torch.cat(gates, dim=-1))
            skip = fused.interpolated_onto(skip, cond, *self.gate_span(len(gates)))
        else:
            gates = self._layers(h, cond, whole, tensors)
            skip = self.skip(torch.cat(gates, dim=-1)) + cond.gates_at(
                *self.gate_span(len(gates))
            ).to(h.dtype)
        found = self._mixture(self._read(skip), p, s)
        if state is not None:
            kept = slice(total, total + config.history)
            tensors |= {
                "samples": xs[:, kept],
                "residuals": clean[:, kept],
                "lags": whole[:, total:],
            }
            tensors["pending"] = torch.stack([p[:, -1], s[:, -1]], dim=1)
            self._store(tensors, state)
        return found.transpose(1, 2)

    def _layers(
        self, h: Tensor, cond: FrameConditioning, whole: Tensor, tensors: dict[str, Tensor]
    ) -> list[Tensor]:
        """Gated units (B, T, R) of each layer; its queue in `tensors` becomes what it is after the last sample."""
        gates, total = [], h.shape[1]
        for i, (block, dilation) in enumerate(zip(self.blocks, self.config.dilations, strict=True)):
            queue = tensors[f"queue.{i}"]
            full = torch.cat([queue.to(h.dtype), h], dim=1)
            tensors[f"queue.{i}"] = full[:, total:]
            taps = self._taps(full, dilation, whole, queue.shape[1], total)
            h, gated = block([*taps, h], cond.gates_at(*self.gate_span(i)).to(h.dtype))
            gates.append(gated)
        return gates

    @torch.no_grad()
    def residuals(self, codes: Tensor, cond: FrameConditioning) -> tuple[Tensor, Tensor]:
        """Return the residuals of codes (B, T) that begin a recording, and their scales, (B, T) each."""
        coefficients, scale, _, _ = cond.per_sample()
        x = self._value(codes)
        p = self._predicted(F.pad(x, (self.config.prediction_order, 0)), coefficients)
        return _residual(x, p, scale.double()), scale

    def _predicted(self, xs: Tensor, coefficients: Tensor) -> Tensor:
        """Prediction (B, T), float64, from samples (B, order + T) and coefficients (B, T, order)."""
        windows = xs[:, :-1].unfold(1, self.config.prediction_order, 1)
        return -(windows.double() * coefficients.flip(2).double()).sum(2)

    def _value(self, codes: Tensor) -> Tensor:
        """The samples of codes, float32."""
        half = self.config.classes // 2
        return (codes - half).float() / half

    def _past_of(self, xs: Tensor, es: Tensor, lag: Tensor, now: int) -> _Past:
        """What each time's features are made of, from the whole past (B, now + T)."""
        config, total = self.config, lag.shape[1]
        recent = es[:, now - config.recent_residuals : now + total - 1].unfold(
            1, config.recent_residuals, 1
        )
        back = torch.arange(total, device=xs.device) + now - lag.ceil().long()
        around = back[:, :, None] + self._around(xs.device)
        return _Past(
            recent.double(),
            es.gather(1, around.flatten(1)).view(around.shape).double(),
            xs[:, now - 1 : now + total - 1].double(),
            xs.gather(1, back).double(),
        )

    def _around(self, device: torch.device) -> Tensor:
        near = self.config.period_residuals
        return torch.arange(-near - 1, near + 3, device=device)

    def _taps(
        self, full: Tensor, dilation: int, whole: Tensor, kept: int, total: int
    ) -> list[Tensor]:
        """The past inputs of a layer (B, T, R) at each tap but the current one, the oldest first."""
        before = self.config.kernel_size - 1
        if dilation:
            return [full[:, k * dilation : k * dilation + total] for k in range(before)]
        lags = self.config.lag_history
        at = torch.arange(total, device=full.device).expand(len(full), -1)
        taps = []
        for _ in range(before):  # `whole` begins so many samples before the codes, a queue `kept`
            at = at - whole.gather(1, at + lags)
            rows = (at + kept)[:, :, None].expand(-1, -1, full.shape[2])
            taps.insert(0, full.gather(1, rows))
        return taps

    def gate_span(self, layer: int) -> tuple[int, int]:
        """Return which of the gate biases are a layer's, or the skip's behind the last layer."""
        width = 2 * self.config.residual_channels
        return layer * width, (layer + 1) * width if layer < len(self.blocks) else self.config.gates

    def _read(self, skip: Tensor) -> Tensor:
        """The sum over layers (..., skip channels) -> the mixture's numbers (..., 3 K), in units of e."""
        return self.output(F.relu(self.hidden(F.relu(skip))))

    def _mixture(self, raw: Tensor, p: Tensor, s: Tensor) -> Tensor:
        """From units of e to those of samples: (..., 3 K) logits, means and log-scales."""
        dtype = torch.promote_types(raw.dtype, torch.float32)
        logits, means, scales = raw.to(dtype).chunk(3, dim=-1)
        means = (p[..., None] + s[..., None] * means).to(dtype)
        scales = (s.log()[..., None] + scales.clamp(*_LOG_SCALES)).to(dtype)
        return torch.cat([logits, means, scales], dim=-1)

    # --- one sample at a time

    def init_state(self, batch: int) -> PredictiveState:
        """See `AutoregressiveModel.init_state`."""
        return self.import_state(self._fresh(batch))

    def _fresh(self, batch: int) -> dict[str, Tensor]:
        """The state before the first sample: silence, whose residuals are zero."""
        config, weight = self.config, self.input.weight
        pending = torch.tensor([0.0, 1.0], dtype=torch.float64, device=weight.device).repeat(
            batch, 1
        )
        zeros = functools.partial(torch.zeros, device=weight.device)
        found = {
            "samples": zeros(batch, config.history),
            "residuals": zeros(batch, config.history),
            "lags": zeros(batch, config.lag_history, dtype=torch.long),
            "pending": pending,
        }
        queues = {f"queue.{i}": weight.new_zeros(batch, n, config.residual_channels)
                  for i, n in enumerate(config.queue_lengths)}  # fmt: skip
        return found | queues

    def _queues(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        return [tensors[f"queue.{i}"] for i in range(len(self.blocks))]

    def step(
        self, previous: Tensor, state: PredictiveState, cond_t: Tensor | None = None
    ) -> Tensor:
        """See `AutoregressiveModel.step`; `cond_t` (B, C) is a column of `FrameConditioning.dense`."""
        assert cond_t is not None, "a predictive WaveNet is conditioned on mels"
        config, time = self.config, state.time
        gates_t, coefficients, scale, lag, voicing = cond_t.split(
            [config.gates, config.prediction_order, 1, 1, 1], dim=1
        )
        s, lag, voicing = scale[:, 0].double(), lag[:, 0], voicing[:, 0]
        # The value of the sample before is known now, and with it its residual.
        x = self._value(previous)
        at = (time % config.history)[None]
        state.samples.index_copy_(1, at, x[:, None])
        state.residuals.index_copy_(1, at, _residual(x, *state.pending.unbind(1))[:, None])
        newest = torch.arange(config.prediction_order - 1, -1, -1, device=x.device)
        window = state.samples.index_select(1, (time - newest) % config.history)
        p = -(window.double() * coefficients.flip(1).double()).sum(1)
        state.pending.copy_(torch.stack([p, s], dim=1))
        back = (
            time + 1 - lag.ceil().long()
        )  # slots hold the sample before: that of time t lies at t + 1
        newest = torch.arange(config.recent_residuals - 1, -1, -1, device=x.device)
        past = _Past(
            state.residuals.index_select(1, (time - newest) % config.history).double(),
            state.residuals.gather(
                1, (back[:, None] + self._around(x.device)) % config.history
            ).double(),
            x.double(),
            state.samples.gather(1, back[:, None] % config.history)[:, 0].double(),
        )
        whole = lag.round().long()
        ring = config.lag_history
        state.lags.index_copy_(1, (time % ring)[None], whole[:, None])
        h = self.input(_features(past, p, s, lag, voicing).to(self.input.weight.dtype))
        gates = []
        for i, (block, dilation, queue) in enumerate(
            zip(self.blocks, config.dilations, state.queues, strict=True)
        ):
            length = queue.shape[1]
            taps: list[Tensor] = []
            where = time.expand(len(x))
            for _ in range(config.kernel_size - 1):
                where = where - (dilation or state.lags.gather(1, where[:, None] % ring)[:, 0])
                rows = (where % length)[:, None, None].expand(-1, 1, queue.shape[2])
                taps.insert(0, queue.gather(1, rows)[:, 0])
            queue.index_copy_(1, (time % length)[None], h[:, None])
            first, last = self.gate_span(i)
            h, gated = block([*taps, h], gates_t[:, first:last].to(h.dtype))
            gates.append(gated)
        first, last = self.gate_span(len(gates))
        state.time += 1
        skip = self.skip(torch.cat(gates, dim=-1)) + gates_t[:, first:last].to(h.dtype)
        return self._mixture(self._read(skip), p, s)

    def export_state(self, state: PredictiveState) -> dict[str, Tensor]:
        """See `AutoregressiveModel.export_state`: every ring with the oldest first.

        `samples` and `residuals` (B, H) end with those before the last code; `lags` (B, lag
        history) and `queue.0`, `queue.1`... (B, queue length, R) end with the last code's;
        `pending` (B, 2) are the prediction and the scale of the last code.
        """
        time = int(state.time)

        def unrolled(ring: Tensor) -> Tensor:
            return ring.roll(-(time % ring.shape[1]), dims=1)

        named = {"samples": state.samples, "residuals": state.residuals, "lags": state.lags}
        named |= {f"queue.{i}": queue for i, queue in enumerate(state.queues)}
        return {name: unrolled(ring) for name, ring in named.items()} | {
            "pending": state.pending.clone()
        }

    def import_state(self, tensors: dict[str, Tensor]) -> PredictiveState:
        """See `AutoregressiveModel.import_state`."""
        weight = self.input.weight
        dtypes = {
            "lags": torch.long,
            "pending": torch.float64,
            "samples": torch.float32,
            "residuals": torch.float32,
        }
        mine = {
            name: t.to(weight.device, dtypes.get(name, weight.dtype), copy=True)
            for name, t in tensors.items()
        }
        return PredictiveState(
            queues=self._queues(mine),
            time=torch.zeros((), dtype=torch.long, device=weight.device),
            **{name: mine[name] for name in dtypes},
        )

    @torch.no_grad()
    def _store(self, tensors: dict[str, Tensor], state: PredictiveState) -> None:
        for i, queue in enumerate(state.queues):
            queue.copy_(tensors[f"queue.{i}"])
        for name in ("samples", "residuals", "lags", "pending"):
            getattr(state, name).copy_(tensors[name])
        state.time.zero_()


def fused_layers() -> Any:
    """Return the module of the fused layers, imported when it is needed: Numba takes its time."""
    from wavear.models import fused

    return fused


def _residual(x: Tensor, p: Tensor, s: Tensor) -> Tensor:
    """(x - p) / s, in float64 rounded to float32: every engine has the same bits."""
    return ((x.double() - p) / s).float()


def _features(past: _Past, p: Tensor, s: Tensor, lag: Tensor, voicing: Tensor) -> Tensor:
    """What the network sees at a sample, (..., features), float32, computed in float64."""
    v, w = voicing.double()[..., None], (lag.ceil() - lag).double()[..., None]
    recent = past.recent.clamp(-LARGEST_RESIDUAL, LARGEST_RESIDUAL) * 0.7
    around = past.around.clamp(-LARGEST_RESIDUAL, LARGEST_RESIDUAL) * 0.7
    a, b, c, d = around[..., :-3], around[..., 1:-2], around[..., 2:-1], around[..., 3:]
    # Catmull-Rom: the cubic between b and c with the slopes of their neighbours.
    period = (
        b + 0.5 * w * (c - a + w * (2 * a - 5 * b + 4 * c - d + w * (3 * (b - c) + d - a)))
    ) * v
    levels = torch.stack([p / s, past.last / s, past.period_ago / s], dim=-1).asinh() * 0.3
    log_scale = (s.log()[..., None] + 6) * 0.5
    return torch.cat(
        [recent, levels[..., :2], log_scale, period, levels[..., 2:], v * 2 - 1], dim=-1
    ).float()
