"""Train codes of speech, and the voice that decodes them. Every value below is a flag too."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import CONFIG, VOICE, CodesConfig, CodesModel, nats, refuse_existing
from recordings import Clip, Crops, listed, read

from wavear import MelConfig, PredictiveWaveNet, TrainConfig, WavearError, load, train
from wavear.cli import recipe


@dataclass(frozen=True)
class Train:
    """A run: codes by the mel, codes by what the voice makes of them, then the voice."""

    data: str = "data"
    """A folder with a sub-folder per speaker, or a CSV table: path, speaker, split."""
    out: Path = Path("runs/vqvae")
    """Folder to write to."""
    voice: str = "voice"
    """The predictive WaveNet to start from: a checkpoint, or the voice that comes with wavear."""
    steps: int = 2400
    """Steps by the mel only."""
    joint_steps: int = 400
    """Steps after them in which the waveform's likelihood, by the voice, joins the loss."""
    voice_minutes: float = 8.0
    """Minutes in which the voice then learns the decoded mels, by the free run."""
    frames: int = 2
    """Mel frames per code: 1, 2, 4..."""
    codes: int = 512
    """Size of the codebook."""
    decay: float = 0.97
    """Decay of the codebook's moving averages per step: an unused code restarts after 76 steps."""
    channels: int = 192
    """Channels of the encoder and the decoder."""
    seconds: float = 400.0
    """Seconds of each speaker to train on, at most."""
    batch_size: int = 16
    """Crops per step."""
    crop: int = 64
    """Mel frames of a crop."""
    waveforms: int = 2
    """Crops per step whose waveforms count."""
    commitment: float = 0.25
    """Weight of the distance of the encoder's vectors from their codes."""
    likelihood: float = 0.3
    """Weight of nats per sample, next to the mean absolute error of normalised mels."""
    learning_rate: float = 1e-3
    """Learning rate of the codes; it falls to a tenth by half a cosine."""
    seed: int = 0
    """Seed of first weights and crops."""
    overwrite: bool = False
    """Replace an earlier run."""


VALUES = Train()
MELS = "mels"
"""Folder of decoded mels."""


def new_model(config: Train, clips: list[Clip], voice: PredictiveWaveNet) -> CodesModel:
    """Return untrained codes with the means of the speakers' mels."""
    names = tuple(sorted({clip.recording.speaker for clip in clips}))
    bands = voice.conditioning.bands
    model = CodesModel(
        CodesConfig(
            names,
            bands,
            config.frames,
            config.codes,
            channels=config.channels,
            decay=config.decay,
        )
    )
    model.deviation.copy_(voice.conditioning.mel_deviation)
    model.floor.fill_(min(float(clip.mel.min()) for clip in clips))
    with torch.no_grad():
        for number, name in enumerate(names):
            own = [clip for clip in clips if clip.recording.speaker == name]
            total = sum(clip.mean * clip.frames for clip in own)
            model.means.weight[number] = total / sum(clip.frames for clip in own)
    return model


def losses(
    model: CodesModel,
    voice: PredictiveWaveNet,
    batch: dict[str, Any],
    waveforms: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the error of the mel, the commitment, and nats per sample of the first crops.

    The likelihood's gradient reaches the decoder through the voice's conditioning, and the encoder
    through the codes.
    """
    mel, _, commitment = model(batch["mel"], batch["mean"], batch["speaker"])
    error = ((mel - batch["mel"]).abs() / model.deviation[:, None]).mean()
    if not waveforms:
        return error, commitment, torch.zeros(())
    hop, before, after = voice.conditioning.hop, voice.lookback, voice.lookahead
    waveform = batch["waveform"][:waveforms, before * hop : -after * hop]
    context = min(voice.receptive_field or 0, waveform.shape[1] // 2)
    return error, commitment, nats(voice, waveform, mel[:waveforms], context)


def fit(
    config: Train, model: CodesModel, voice: PredictiveWaveNet, crops: Crops
) -> Iterator[dict[str, float]]:
    """Take all steps; yield the means of the losses now and then, and after the last."""
    voice.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    model.train()
    weights = torch.tensor([1.0, config.commitment, config.likelihood])
    began, spent = time.monotonic(), time.process_time()
    total, recent = config.steps + config.joint_steps, []
    for step in range(1, total + 1):
        waveforms = config.waveforms if step > config.steps else 0
        batch = crops.draw(config.batch_size)
        parts = torch.stack(losses(model, voice, batch, waveforms))
        if not parts.isfinite().all():
            raise WavearError(f"the loss of step {step} is {parts.tolist()}: lower --learning-rate")
        optimizer.zero_grad()
        (weights * parts).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = 0.55 + 0.45 * math.cos(math.pi * (step - 1) / total)
        optimizer.param_groups[0]["lr"] = config.learning_rate * share
        optimizer.step()
        recent.append(parts.detach())
        if step % max(total // 24, 1) == 0 or step in (config.steps, total):
            means, recent = torch.stack(recent).mean(0).tolist(), []
            with torch.no_grad():
                codes = model.quantizer.nearest(model.latent(batch["mel"], batch["mean"]))
            yield {
                "step": step,
                "seconds": time.monotonic() - began,
                "processor_seconds": time.process_time() - spent,
                **dict(zip(("mel_error", "commitment", "nats"), means, strict=True)),
                "codes_of_a_batch": len(codes.unique()),
            }


def teach(config: Train, model: CodesModel, mels: MelConfig, clips: list[Clip]) -> None:
    """Train the voice on the decoded mels of recordings; the run is in `voice/`."""
    (config.out / MELS).mkdir(exist_ok=True)
    rows, settings = [], json.dumps(mels.to_dict())
    for clip in clips:
        path, mel = clip.recording.path, torch.from_numpy(clip.mel).float()
        decoded = model.decode(model.encode(mel), clip.recording.speaker)[:, : clip.frames]
        name = config.out / MELS / f"{path.stem}.npz"
        np.savez(name, mel=decoded.numpy(), config=settings)  # with it the mel is taken as it is
        rows.append([path.resolve(), "dev" if clip.recording.held_out else "train"])
    with open(config.out / "recordings.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["path", "split"], *rows])
    train(
        TrainConfig(
            data=str(config.out / "recordings.csv"),
            mels=str(config.out / MELS),
            out=str(config.out / "voice"),
            from_checkpoint=config.voice,
            free_run=1.0,
            max_steps=None,
            max_minutes=config.voice_minutes,
            seed=config.seed,
            overwrite=config.overwrite,
        )
    )


def run(config: Train) -> int:
    """Train, and write `codes.safetensors`, `codes.json`, `voice/` and `train.json`."""
    refuse_existing(config.out / CONFIG, config.overwrite)
    torch.manual_seed(config.seed)
    voice = load(config.voice)
    if not isinstance(voice, PredictiveWaveNet):
        raise WavearError(f"{config.voice} is a {type(voice).__name__}: give a predictive WaveNet")
    if config.steps < 1 or min(config.joint_steps, config.voice_minutes) < 0:
        raise WavearError(
            f"steps is {config.steps}, joint_steps {config.joint_steps}, voice_minutes"
            f" {config.voice_minutes:g}: expected at least 1, 0 and 0"
        )
    least = voice.lookback + voice.lookahead + 1
    if config.crop % config.frames or config.crop <= least or config.waveforms > config.batch_size:
        raise WavearError(
            f"crop is {config.crop} and waveforms is {config.waveforms}: expected a multiple of"
            f" {config.frames} above {least}, and at most {config.batch_size}"
        )
    recordings = listed(config.data)
    mels = voice.config.mel
    assert isinstance(mels, MelConfig)
    clips = list(read([each for each in recordings if not each.held_out], mels, config.seconds))
    model = new_model(config, clips, voice)
    names = model.config.speakers
    crops = Crops(clips, names, config.crop, config.seed)
    minutes = sum(len(clip.waveform) for clip in clips) / voice.config.sample_rate / 60
    print(f"{len(clips)} recordings, {minutes:.1f} minutes, {len(names)} speakers", flush=True)
    values = {name: str(value) for name, value in dataclasses.asdict(config).items()}
    record: dict[str, Any] = {"config": values, "minutes_of_audio": minutes, "log": []}
    for row in fit(config, model, voice, crops):
        print(", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
        record["log"].append(row)
        model.save(config.out)
        text = json.dumps(record, indent=1) + "\n"
        (config.out / "train.json").write_text(text, encoding="utf-8")
    if config.voice_minutes:
        held_out = read([each for each in recordings if each.held_out], mels)
        teach(config, model.eval(), mels, [*clips, *held_out])
    else:
        voice.save(config.out / VOICE, overwrite=config.overwrite)
    return 0


if __name__ == "__main__":
    recipe(VALUES, __doc__, run=run)
