"""Train an instrument that follows loudness and pitch, and play it.

    python recipes/music/features.py my/sounds --out my/features --rate 22050
    python recipes/music/instrument.py train my/sounds --features my/features --out runs/instrument
    python recipes/music/instrument.py play runs/instrument new.npy --out new.wav

A small network makes a mel of the features, and a predictive WaveNet plays the mel. The network
corrects what is known: the mel of a series of equal harmonics of the pitch, or of noise where there
is none, at the loudness.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import wavear
from wavear import MelConfig, PredictiveWaveNet, WavearError, audio, log_mel

CONFIG, WEIGHTS = "instrument.json", "instrument.safetensors"
LOWEST, HIGHEST, STEPS = 0.0, 4.3, 60  # octaves above 55 Hz, as in features.py; steps of 20 cents
NATS = math.log(10) / 20  # of a dB
CROP, BATCH, RATE = 64, 16, 2e-3  # frames, crops per step, the highest learning rate


@dataclass(frozen=True)
class Settings:
    """Settings of an instrument."""

    channels: int
    """Channels of the features: loudness, pitch, voiced, and one for each label."""
    voice: str
    """Checkpoint of the predictive WaveNet that plays it."""
    width: int = 128
    """Width of the network, in channels."""


def plain(config: MelConfig) -> tuple[Tensor, Tensor]:
    """Return log-mels of harmonics at each pitch (P, M), and of noise (M,), both at 0 dB."""
    time_axis = torch.arange(config.n_fft + 8 * config.hop_length) / config.sample_rate
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(round((HIGHEST - LOWEST) * STEPS) + 1):
        hertz = 55 * 2 ** (LOWEST + number / STEPS)
        k = torch.arange(1, max(int(config.sample_rate / 2 / hertz), 1) + 1)
        phases = (
            2
            * math.pi
            * (hertz * k[:, None] * time_axis + torch.rand(len(k), 1, generator=generator))
        )
        rows.append(phases.cos().sum(0))
    rows.append(torch.randn(16 * config.n_fft, generator=generator))
    mels = [log_mel((x / x.square().mean().sqrt())[None], config)[0].mean(1) for x in rows]
    return torch.stack(mels[:-1]), mels[-1]


class Instrument(nn.Module):
    """Features (B, C, F) to mels (B, M, F)."""

    harmonics: Tensor
    noise: Tensor

    def __init__(self, settings: Settings, plain_mels: tuple[Tensor, Tensor], floor: float):
        super().__init__()
        self.settings, self.floor = settings, math.log(floor)
        for name, mel in zip(("harmonics", "noise"), plain_mels, strict=True):
            self.register_buffer(name, mel)
        width, bands = settings.width, len(self.noise)
        self.network = nn.Sequential(
            nn.Conv1d(settings.channels + bands, width, 5, padding=2), nn.ReLU(),
            nn.Conv1d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv1d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv1d(width, bands, 1),
        )  # fmt: skip
        nn.init.zeros_(self.network[-1].weight)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """Return the mel: that of plain harmonics or noise, corrected."""
        loudness, octaves, voiced = features[:, :3].unbind(1)
        place = ((octaves - LOWEST) * STEPS).clamp(0, len(self.harmonics) - 1.001)
        below = place.long()
        pitched = torch.lerp(
            self.harmonics[below], self.harmonics[below + 1], (place - below)[..., None]
        )
        spectrum = torch.where(voiced[..., None] > 0, pitched, self.noise).transpose(1, 2)
        scaled = torch.cat([loudness[:, None] / 40 + 1, octaves[:, None] - 2, features[:, 2:]], 1)
        correction = self.network(torch.cat([scaled, spectrum - spectrum.mean(1, keepdim=True)], 1))
        return (spectrum + NATS * loudness[:, None] + correction).clamp(min=self.floor)

    def save(self, folder: Path) -> None:
        """Write the settings and the weights, each file whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / f"{WEIGHTS}.part")
        text = json.dumps(dataclasses.asdict(self.settings), indent=2) + "\n"
        (folder / f"{CONFIG}.part").write_text(text, encoding="utf-8")
        for name in (WEIGHTS, CONFIG):
            os.replace(folder / f"{name}.part", folder / name)


def voice_of(name: str) -> PredictiveWaveNet:
    """Load the model that plays the mels."""
    voice = wavear.load(name)
    mel = voice.config.mel
    if not isinstance(voice, PredictiveWaveNet) or not isinstance(mel, MelConfig):
        raise WavearError(f"{name} is a {type(voice).__name__}: give a predictive WaveNet")
    if mel.log_base != "e" or mel.power != 1:
        raise WavearError(f"{name} takes mels of another kind: natural logarithms are needed")
    return voice


def load(folder: Path, voice: str | None = None) -> tuple[Instrument, PredictiveWaveNet]:
    """Return the instrument in a folder, and the model that plays it."""
    try:
        settings = Settings(**json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        weights = load_file(folder / WEIGHTS)
        plain_mels = weights["harmonics"], weights["noise"]
    except FileNotFoundError as error:
        raise WavearError(f"{error.filename or folder / WEIGHTS} is missing: run train") from None
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise WavearError(f"{folder} holds no instrument: {error}") from None
    if voice is None and str(settings.voice).startswith("hf:"):
        raise WavearError(f"{folder / CONFIG} names {settings.voice}: pass it with --voice")
    player = voice_of(voice or settings.voice)
    config: Any = player.config.mel
    if len(plain_mels[1]) != config.bands:
        raise WavearError(f"{folder} and its voice have different mels: choose another --voice")
    try:
        made = Instrument(settings, plain_mels, config.floor)
        made.load_state_dict(weights)
    except (TypeError, RuntimeError) as error:
        raise WavearError(f"{folder} holds no instrument that fits: {error}") from None
    return made.eval(), player


def read_features(path: Path, channels: int | None = None) -> Tensor:
    """Return the features (C, F) in a file."""
    try:
        values = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise WavearError(f"{path} holds no features: {error}") from None
    expected = "3 or more" if channels is None else str(channels)
    fits = values.ndim == 2 and values.shape[1] and values.dtype.kind in "fiu"
    if not fits or (len(values) < 3 if channels is None else len(values) != channels):
        raise WavearError(f"{path} has shape {values.shape}: expected ({expected}, frames)")
    if not np.isfinite(values).all():
        raise WavearError(f"{path} holds NaN or infinity")
    return torch.from_numpy(values.astype(np.float32))


def labelled(features: Tensor, channels: int, label: int | None, path: Path) -> Tensor:
    """Return features with a label, where they have none and the instrument was trained with some.

    `label` is the channel that gets ones, as `features.py` counts them.
    """
    if len(features) != 3 or channels == 3:
        if label is not None:
            raise WavearError("--label is for features without labels: drop it")
        return features
    if label is None or not 3 <= label < channels:
        raise WavearError(
            f"{path} has no label, and the instrument has {channels - 3}: pass --label 3 to"
            f" {channels - 1}, the channels that features.py printed"
        )
    ones = torch.zeros(channels - 3, features.shape[1])
    ones[label - 3] = 1
    return torch.cat([features, ones])


def pairs(data: Path, folder: Path, config: MelConfig) -> list[tuple[Tensor, Tensor]]:
    """Return features and mel, of the same number of frames, of each recording of a folder."""
    paths = sorted(p for p in data.rglob("*") if p.suffix.lower() in audio.SUFFIXES)
    if not paths:
        raise WavearError(f"{data} has no recordings")
    found = []
    for path in paths:
        own = (folder / path.relative_to(data)).with_suffix(".npy")
        features = read_features(own, len(found[0][0]) if found else None)
        mel = log_mel(audio.read(path, config.sample_rate)[None], config)[0]
        if abs(features.shape[1] - mel.shape[1]) > 1:
            raise WavearError(
                f"{own} has {features.shape[1]} frames, the mel of {path} {mel.shape[1]}: run"
                f" features.py with --rate {config.sample_rate} --hop {config.hop_length}"
            )
        frames = min(features.shape[1], mel.shape[1])
        found.append((features[:, :frames], mel[:, :frames]))
    return found


def error(made: Instrument, held: list[tuple[Tensor, Tensor]]) -> float:
    """Return the mean absolute error of mels, nats."""
    with torch.inference_mode():
        parts = [(made(features[None])[0] - mel).abs() for features, mel in held]
    return float(torch.cat([part.flatten() for part in parts]).mean())


def train(data: Path, features: Path, out: Path, voice: str, steps: int, seed: int) -> None:
    """Train the network; every tenth recording is held out, and the least error there is kept."""
    if steps < 1:
        raise WavearError(f"--steps is {steps}: expected at least 1")
    config: Any = voice_of(voice).config.mel
    every = pairs(data, features, config)
    held = every[::10] if len(every) >= 10 else []
    learned = [pair for n, pair in enumerate(every) if n % 10 or not held]
    torch.manual_seed(seed)
    made = Instrument(Settings(len(every[0][0]), voice), plain(config), config.floor)
    optimizer = torch.optim.AdamW(made.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    usable = [p for p in learned if p[0].shape[1] >= CROP]
    if not usable:
        raise WavearError(f"no recording of {data} has {CROP} frames: give longer ones")
    weights = torch.tensor([float(features.shape[1]) for features, _ in usable])
    best, least, began = made.state_dict(), math.inf, time.monotonic()
    for step in range(1, steps + 1):
        rows = []
        for n in torch.multinomial(weights, BATCH, replacement=True).tolist():
            first = int(torch.randint(usable[n][0].shape[1] - CROP + 1, ()))
            rows.append([part[:, first : first + CROP] for part in usable[n]])
        given, wanted = (torch.stack(part) for part in zip(*rows, strict=True))
        loss = (made(given) - wanted).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(steps // 8, 1) == 0 or step == steps:
            now = error(made, held) if held else loss.item()
            if now < least or not held:
                least, best = now, {name: x.clone() for name, x in made.state_dict().items()}
            more = f", held out {now:.3f}" if held else ""
            print(
                f"{time.monotonic() - began:.0f} s, step {step}: {loss.item():.3f}{more}",
                flush=True,
            )
    made.load_state_dict(best)
    made.save(out)
    print(f"{out}  {len(learned)} recordings; the error is in nats of the mel")


@torch.inference_mode()
def play(made: Instrument, voice: PredictiveWaveNet, features: Tensor, **settings: Any) -> Tensor:
    """Return the sound (T,) of features (C, F)."""
    return wavear.generate(voice, made(features[None])[0], **settings)[0]


def main() -> int:
    """Train an instrument, or play one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    each = commands.add_parser("train", help="learn the sounds")
    each.add_argument("data", type=Path, help="folder of recordings")
    each.add_argument("--features", type=Path, required=True, help="folder that features.py wrote")
    each.add_argument("--out", type=Path, required=True, help="folder to write to")
    each.add_argument("--voice", default="voice", help="checkpoint that plays the mels (voice)")
    each.add_argument("--steps", type=int, default=800, help="of training (800)")
    each.add_argument("--seed", type=int, default=0)
    each.add_argument("--overwrite", action="store_true", help="replace an instrument")
    each = commands.add_parser("play", help="make sound of features")
    each.add_argument("instrument", type=Path, help="folder that train wrote")
    each.add_argument("features", type=Path, help=".npy, (channels, frames)")
    each.add_argument("--out", type=Path, required=True, help="file to write")
    each.add_argument("--voice", help="another checkpoint that plays the mels")
    each.add_argument(
        "--label", type=int, help="channel of the sound to play, as features.py counts"
    )
    each.add_argument("--seed", type=int, default=0)
    each.add_argument("--overwrite", action="store_true", help="replace the file")
    given = parser.parse_args()
    try:
        target = given.out / CONFIG if given.command == "train" else given.out
        if target.exists() and not given.overwrite:
            raise WavearError(f"{target} exists: choose another --out, or pass --overwrite")
        if given.command == "train":
            train(given.data, given.features, given.out, given.voice, given.steps, given.seed)
            return 0
        made, voice = load(given.instrument, given.voice)
        channels = made.settings.channels
        features = read_features(given.features)
        if len(features) not in (3, channels):
            raise WavearError(
                f"{given.features} has {len(features)} channels: expected {channels}, as in"
                " training"
            )
        features = labelled(features, channels, given.label, given.features)
        sound = play(made, voice, features, seed=given.seed)
        audio.write(given.out, sound, voice.config.sample_rate)
        print(f"{given.out}  {len(sound) / voice.config.sample_rate:.2f} s")
    except (WavearError, OSError) as problem:
        print(f"{Path(sys.argv[0]).name}: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
