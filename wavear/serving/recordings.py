"""Recordings that clients upload, and their resynthesis."""

from __future__ import annotations

import base64
import secrets
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wavear import audio
from wavear.audio.scale import limited
from wavear.common.errors import WavearError, one_line
from wavear.common.log import get_logger
from wavear.common.memory import memory_errors
from wavear.evaluation.pictures import spectrogram
from wavear.generation.defects import watch
from wavear.generation.pipes import pcm16
from wavear.generation.sampler import generate_with
from wavear.generation.settings import Sampling
from wavear.mel.spectrogram import log_mel
from wavear.models.base import AutoregressiveModel

logger = get_logger(__name__)


class Recordings:
    """The newest recordings, by a random key; uploads are not trusted.

    Parameters
    ----------
    rate : int
        Hz, of the waveforms.
    seconds : float
        Longest recording.
    most : int
        Number of recordings to keep.
    """

    def __init__(self, rate: int, seconds: float, most: int):
        self.rate, self.seconds, self.most = rate, seconds, most
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def add(self, content: bytes, name: str) -> tuple[str, Tensor]:
        """Decode an audio file; return its key, and the waveform (T,) in [-1, 1].

        Of the name only the ending counts. A `WavearError` names what is wrong with the file.
        """
        suffix = Path(name).suffix.lower()
        with tempfile.TemporaryDirectory(prefix="wavear-") as folder, memory_errors():
            path = Path(folder) / f"recording{suffix if suffix in audio.SUFFIXES else '.wav'}"
            path.write_bytes(content)
            try:
                info = audio.info(path)
                if info.seconds > self.seconds:
                    raise WavearError(
                        f"{path} has {info.seconds:.1f} s, at most {self.seconds:g} s can be used"
                    )
                waveform = audio.read(path, sample_rate=self.rate)
                waveform = limited(waveform, path, logger.warning, info.floating)
            except (WavearError, OSError) as error:
                reason = one_line(error).replace(str(path), Path(name).name or "the recording")
                raise WavearError(reason) from None
        key = secrets.token_urlsafe(12)
        self._kept[key] = waveform
        while len(self._kept) > self.most:
            self._kept.popitem(last=False)
        return key, waveform

    def get(self, key: object) -> Tensor:
        """Return the waveform of a key."""
        if not isinstance(key, str):
            raise WavearError(
                f"the recording is {key!r:.60}; it must be the id that uploading gave"
            )
        if key not in self._kept:
            raise WavearError(
                f"the recording is not here any more, the newest {self.most} are kept: upload it"
                " again"
            )
        return self._kept[key]


def shown(waveform: Tensor, rate: int, top: float | None = None) -> dict[str, Any]:
    """Return a waveform (T,) for the page: 16-bit PCM and its spectrogram, in base64."""
    picture, top = spectrogram(waveform.numpy(), rate, top)
    return {
        "pcm": base64.b64encode(pcm16(waveform.numpy())).decode(),
        "spectrogram": base64.b64encode(picture).decode(),
        "top": top,
    }


def mel_of(model: AutoregressiveModel, waveform: Tensor) -> Tensor:
    """Return the mel (M, F) of a recording, as the model expects it."""
    config = model.config.mel
    if len(waveform) < config.hop_length:
        raise WavearError(
            f"the recording has {len(waveform)} samples at {config.sample_rate} Hz, less than one"
            f" frame ({config.hop_length})"
        )
    return log_mel(waveform[None], config)[0]


def resynthesize(
    model: AutoregressiveModel, waveform: Tensor, sampling: Sampling, top: float | None = None
) -> dict[str, Any]:
    """Synthesize a recording (T,) from its mel; return the audio, its speed and its defects."""
    if model.config.mel is None:
        raise WavearError("the model is not conditioned on mels: it cannot follow a recording")
    began = time.perf_counter()
    mel, rate = mel_of(model, waveform), model.config.sample_rate
    made = generate_with(model, sampling, mel)[0][0]
    factor = len(made) / rate / (time.perf_counter() - began)
    found = watch(made, rate, mel=mel, config=model.config.mel)
    return shown(torch.as_tensor(made), rate, top) | {
        "real_time_factor": factor,
        "findings": [str(finding) for finding in found],
    }
