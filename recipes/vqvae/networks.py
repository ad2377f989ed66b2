"""A VQ-VAE of mel frames: encoder, quantiser and decoder (van den Oord et al., 2017).

    mel less its mean --convolutions, down--> z --nearest vector--> codes
    codes, speaker    --convolutions, up----> mel --> a predictive WaveNet

Letters: B batch, M mel bands, F mel frames, N codes of a clip (F / `frames`), D channels of a
code's vector, K codes. The codebook is a moving average of what each code stands for (appendix A.1
of https://arxiv.org/abs/1711.00937); the gradient passes the quantiser straight through.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from wavear import PredictiveWaveNet, WavearError, load

CONFIG, WEIGHTS, VOICE = "codes.json", "codes.safetensors", "voice/best"


@dataclass(frozen=True)
class CodesConfig:
    """Configuration of a `CodesModel`; saved with its weights."""

    speakers: tuple[str, ...]
    """Names, in the order of their numbers."""
    bands: int = 80
    """Mel bands M."""
    frames: int = 2
    """Mel frames per code: a power of two."""
    codes: int = 512
    """Size K of the codebook."""
    dimension: int = 64
    """Channels D of a code's vector."""
    channels: int = 192
    """Channels of the convolutions."""
    blocks: int = 3
    """Residual blocks of the encoder, and of the decoder."""
    decay: float = 0.97
    """Decay of the codebook's moving averages, per batch."""
    restart_below: float = 0.1
    """A code used less than this share of an even use restarts at a vector of the batch."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "speakers", tuple(map(str, self.speakers)))
        limits = {"bands": 512, "frames": 16, "codes": 65536, "dimension": 1024, "channels": 4096}
        for name, most in (limits | {"blocks": 64}).items():
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise WavearError(f"{name} is {value!r}: expected a whole number of 1 to {most}")
        if self.frames & (self.frames - 1) or self.codes < 2 or not self.speakers:
            raise WavearError(
                f"frames is {self.frames}, codes is {self.codes} and there are"
                f" {len(self.speakers)} speakers: expected a power of two, at least 2, at least 1"
            )
        for name in ("decay", "restart_below"):
            if not 0 <= getattr(self, name) < 1:
                raise WavearError(f"{name} is {getattr(self, name)!r}: expected 0 to less than 1")


class Quantizer(nn.Module):
    """Replace vectors by the nearest of a codebook."""

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, config: CodesConfig):
        super().__init__()
        self.decay, self.restart_below = config.decay, config.restart_below
        # Without counts every code is dead: the first batch of training fills the codebook.
        self.register_buffer("codebook", torch.zeros(config.codes, config.dimension))
        self.register_buffer("counts", torch.zeros(config.codes))
        self.register_buffer("sums", torch.zeros(config.codes, config.dimension))

    def nearest(self, z: Tensor) -> Tensor:
        """Return the code (..., ) nearest to each vector (..., D)."""
        return (self.codebook.square().sum(1) - 2 * z @ self.codebook.T).argmin(-1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise vectors (B, N, D); in training, move the codebook.

        Returns
        -------
        Tensor, shape (B, N, D): the codes' vectors, whose gradient is that of `z`
        Tensor, shape (B, N), int64: the codes
        Tensor: the mean squared distance of `z` from the vectors
        """
        flat = z.detach().flatten(0, 1)
        if self.training:
            self._restart(flat)
        codes = self.nearest(z.detach())
        chosen = self.codebook[codes]
        if self.training:
            self._follow(flat, codes.flatten())
        return z + (chosen - z).detach(), codes, F.mse_loss(z, chosen)

    @torch.no_grad()
    def _restart(self, z: Tensor) -> None:
        """Put dead codes on random vectors of a batch (n, D), as if used evenly so far."""
        dead = (self.counts <= self.restart_below * self.counts.mean()).nonzero()[:, 0]
        enough = len(z) >= len(dead)
        rows = torch.randperm(len(z)) if enough else torch.randint(len(z), (len(dead),))
        even = len(z) / len(self.counts)
        self.codebook[dead] = z[rows[: len(dead)]]
        self.counts[dead] = even
        self.sums[dead] = even * self.codebook[dead]

    @torch.no_grad()
    def _follow(self, z: Tensor, codes: Tensor) -> None:
        """Move each code's vector to the moving average of the vectors that it stands for."""
        used = F.one_hot(codes, len(self.counts)).to(z.dtype)
        self.counts.lerp_(used.sum(0), 1 - self.decay)
        self.sums.lerp_(used.T @ z, 1 - self.decay)
        self.codebook.copy_(self.sums / self.counts.clamp(min=1e-8)[:, None])


class Block(nn.Module):
    """Residual block of two convolutions; a speaker's vector scales and shifts its middle."""

    def __init__(self, channels: int, voice: int = 0):
        super().__init__()
        self.wide = nn.Conv1d(channels, channels, 3, padding=1)
        self.narrow = nn.Conv1d(channels, channels, 1)
        self.voice = nn.Linear(voice, 2 * channels) if voice else None

    def forward(self, x: Tensor, voice: Tensor | None = None) -> Tensor:
        """Map (B, C, N) to the next block's input."""
        h = self.wide(F.relu(x))
        if self.voice is not None:
            scale, shift = self.voice(voice)[:, :, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return x + self.narrow(F.relu(h))


class CodesModel(nn.Module):
    """Mels to codes, and codes with a speaker to mels.

    The encoder sees a mel less its mean over the recording, so neither the level nor the long-term
    spectrum of the voice; the decoder adds the mean of the speaker's mels.
    """

    deviation: Tensor
    floor: Tensor

    def __init__(self, config: CodesConfig):
        super().__init__()
        self.config = config
        c, d, stages = config.channels, config.dimension, config.frames.bit_length() - 1
        self.register_buffer("deviation", torch.ones(config.bands))
        self.register_buffer("floor", torch.tensor(-20.0))
        down = [nn.Conv1d(c, c, 4, stride=2, padding=1) for _ in range(stages)]
        up = [nn.ConvTranspose1d(c, c, 4, stride=2, padding=1) for _ in range(stages)]
        self.enter, self.down = nn.Conv1d(config.bands, c, 5, padding=2), nn.ModuleList(down)
        self.encoder = nn.ModuleList(Block(c) for _ in range(config.blocks))
        self.to_code = nn.Conv1d(c, d, 1)
        self.quantizer = Quantizer(config)
        self.from_code, self.up = nn.Conv1d(d, c, 3, padding=1), nn.ModuleList(up)
        self.decoder = nn.ModuleList(Block(c, d) for _ in range(config.blocks))
        self.leave = nn.Conv1d(c, config.bands, 5, padding=2)
        self.voices = nn.Embedding(len(config.speakers), d)
        self.means = nn.Embedding(len(config.speakers), config.bands)

    def latent(self, mel: Tensor, mean: Tensor) -> Tensor:
        """Encode mels (B, M, F) with their recordings' means (B, M) as vectors (B, N, D)."""
        x = (mel - mean[:, :, None]) / self.deviation[:, None]
        x = F.pad(x, (0, -x.shape[2] % self.config.frames), "replicate")
        x = self.enter(x)
        for stage in self.down:
            x = stage(F.relu(x))
        for block in self.encoder:
            x = block(x)
        return self.to_code(F.relu(x)).transpose(1, 2)

    def render(self, vectors: Tensor, speaker: Tensor, mean: Tensor | None = None) -> Tensor:
        """Decode vectors (B, N, D) as mels (B, M, N * frames) of speakers (B,).

        `mean` (B, M) replaces the mean of a speaker's mels.
        """
        middle: Tensor = self.means(speaker) if mean is None else mean
        x, voice = self.from_code(vectors.transpose(1, 2)), self.voices(speaker)
        for block in self.decoder:
            x = block(x, voice)
        for stage in self.up:
            x = stage(F.relu(x))
        x = self.leave(F.relu(x)) * self.deviation[:, None]
        return torch.maximum(x + middle[:, :, None], self.floor)

    def forward(self, mel: Tensor, mean: Tensor, speaker: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the decoded mels (B, M, F), the codes (B, N), and the commitment loss."""
        vectors, codes, commitment = self.quantizer(self.latent(mel, mean))
        return self.render(vectors, speaker)[:, :, : mel.shape[2]], codes, commitment

    @torch.inference_mode()
    def encode(self, mel: Tensor) -> Tensor:
        """Return the codes (N,) of the mel (M, F) of a whole recording."""
        return self.quantizer.nearest(self.latent(mel[None], mel.mean(1)[None]))[0]

    @torch.inference_mode()
    def decode(self, codes: Tensor, speaker: str, mean: Tensor | None = None) -> Tensor:
        """Return the mel (M, N * frames) of codes (N,) in a speaker's voice.

        `mean` (M,) is that of the recording which the codes continue; by default the speaker's.
        """
        number = torch.tensor([self.number(speaker)])
        vectors = self.quantizer.codebook[codes][None]
        return self.render(vectors, number, None if mean is None else mean[None])[0]

    def number(self, speaker: str) -> int:
        """Return the number of a speaker."""
        names = self.config.speakers
        if speaker not in names:
            raise WavearError(f"speaker is {speaker!r}: choose one of {', '.join(names)}")
        return names.index(speaker)

    def save(self, folder: Path) -> None:
        """Write the configuration and the weights, each file whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        parts = {folder / name: folder / f"{name}.part" for name in (WEIGHTS, CONFIG)}
        save_file(self.state_dict(), parts[folder / WEIGHTS])
        text = json.dumps(dataclasses.asdict(self.config), indent=2) + "\n"
        parts[folder / CONFIG].write_text(text, encoding="utf-8")
        for path, part in parts.items():
            os.replace(part, path)


def load_codes(folder: Path) -> tuple[CodesModel, Any]:
    """Return the model of the codes and the voice that `train.py` wrote, ready to generate."""
    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        model = CodesModel(CodesConfig(**fields))
        model.load_state_dict(load_file(folder / WEIGHTS))
    except FileNotFoundError as error:
        raise WavearError(
            f"{error.filename or folder / WEIGHTS} is missing: run train.py"
        ) from None
    except (ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise WavearError(f"{folder} holds no codes of this recipe: {error}") from None
    return model.eval(), load(folder / VOICE)


def nats(voice: PredictiveWaveNet, waveform: Tensor, mel: Tensor, context: int) -> Tensor:
    """Return the mean negative log-likelihood per sample, differentiable in the mel.

    Parameters
    ----------
    waveform : Tensor, shape (B, T)
    mel : Tensor, shape (B, M, lookback + T / hop + lookahead)
    context : int
        First samples that count only as context.
    """
    codes = voice.grid.encode(waveform)
    parameters = voice(codes, voice.condition(mel, padded=True))
    return -voice.law.log_prob(parameters, codes)[:, context:].mean()


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise an error if a file exists that may not be replaced."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another name, or pass --overwrite")
