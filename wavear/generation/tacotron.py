"""torchaudio's Tacotron 2: from a text to the mel of a vocoder. Needs `wavear[tts]`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from wavear.common.errors import WavearError
from wavear.mel.detection import adapt_mel
from wavear.mel.spectrogram import MelConfig
from wavear.models.base import AutoregressiveModel

BUNDLES = {
    "TACOTRON2_GRIFFINLIM_CHAR_LJSPEECH": "torchaudio-tacotron2",
    "TACOTRON2_GRIFFINLIM_PHONE_LJSPEECH": "torchaudio-tacotron2",
    "TACOTRON2_WAVERNN_CHAR_LJSPEECH": "torchaudio-tacotron2-wavernn",
    "TACOTRON2_WAVERNN_PHONE_LJSPEECH": "torchaudio-tacotron2-wavernn",
}
"""Preset of the mels that each bundle of `torchaudio.pipelines` predicts."""


class Tacotron:
    """Tacotron 2 in front of a vocoder.

    Parameters
    ----------
    model : AutoregressiveModel
        The vocoder.
    bundle : str
        One of `BUNDLES`. Its weights are downloaded the first time; those with PHONE need the
        package `deep_phonemizer`.
    processor, network : optional
        The bundle's text processor and Tacotron 2, instead of a download.
    force : bool
        Accept a vocoder that expects other mels than the bundle predicts.

    Raises
    ------
    WavearError
        If there is no such bundle, torchaudio is missing, or the model expects other mels.
    OSError
        If the weights cannot be downloaded.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        bundle: str,
        processor: Any = None,
        network: Any = None,
        force: bool = False,
    ):
        if bundle not in BUNDLES:
            raise WavearError(f"bundle is {bundle!r}; it must be one of {', '.join(BUNDLES)}")
        if not isinstance(model.config.mel, MelConfig):
            raise WavearError("the model takes no mels: it is not a vocoder")
        # Without a recording to stay in step with, where a frame is centred makes no difference.
        source = MelConfig.preset(BUNDLES[bundle])
        self.source = dataclasses.replace(source, centre=model.config.mel.centre)
        self.model, self.force = model, force
        usual = torch.full((self.source.bands, 1), -5.0)  # refuse other mels before any download
        adapt_mel(usual, model, self.source, force=force)
        if processor is None or network is None:
            try:
                from torchaudio import pipelines
            except (ImportError, OSError) as error:
                raise WavearError(
                    "Tacotron 2 needs torchaudio, which cannot be imported"
                    f' ({error}): pip install "wavear[tts]"'
                ) from None
            parts = getattr(pipelines, bundle)
            processor, network = parts.get_text_processor(), parts.get_tacotron2()
        self.processor, self.network = processor, network

    def predict(self, text: str, seed: int = 0) -> Tensor:
        """Return the mel (M, F) of a text, in the bundle's convention.

        Tacotron 2 keeps its dropout when it predicts, so it takes a seed.
        """
        if not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise WavearError(f"seed is {seed!r}; it must be a whole number, 0 to 2**64 - 1")
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tokens, lengths = self.processor(text)
            if not tokens.shape[-1]:
                raise WavearError(f"the text {text!r:.60} has no letters that can be spoken")
            mel, frames, _ = self.network.infer(tokens, lengths)
        return mel[0, :, : int(frames[0])]

    def mel(self, text: str, seed: int = 0) -> Tensor:
        """Return the mel (M, F) of a text, as the vocoder expects it."""
        return adapt_mel(self.predict(text, seed), self.model, self.source, force=self.force)
