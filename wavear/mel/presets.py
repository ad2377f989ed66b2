"""Mels as published: name -> the fields of a `MelConfig` that differ from its defaults.

Where the published code is `center=True` (all but HiFi-GAN's and BigVGAN's), it yields one frame
more than `wavear.log_mel`: the one centred on the last multiple of the hop, where less than a hop
of the waveform is left. Ours are its first T // hop.
"""

from __future__ import annotations

from typing import Any

_TACOTRON2: dict[str, Any] = {"centre": "start"}
_ESPNET: dict[str, Any] = {
    "centre": "start",
    "fmin": 80.0,
    "fmax": 7600.0,
    "log_base": "10",
    "floor": 1e-10,
}
_BIGVGAN: dict[str, Any] = {"fmax": None, "power_offset": 1e-9}

PRESETS: dict[str, dict[str, Any]] = {
    # jik876/hifi-gan, meldataset.py and config_v1.json: centred on the middle of the hop, 1e-9
    # under the root.
    "hifigan": {"power_offset": 1e-9},
    # NVIDIA/tacotron2, stft.py, layers.py, hparams.py (and WaveGlow): centred on the start of the
    # hop, nothing added.
    "nvidia-tacotron2": _TACOTRON2,
    # r9y9/wavenet_vocoder, audio.py `logmelspectrogram` and hparams.py since 2019 (v0.2), before
    # its standardisation.
    "r9y9": _ESPNET | {"fmin": 125.0},
    # ESPnet2, espnet2/tts/feats_extract/log_mel_fbank.py, as egs2/ljspeech/tts1 runs it; a bin is
    # 1e-10 at least.
    "espnet": _ESPNET | {"power_floor": 1e-10},
    # The same for 24 kHz, as its recipes for JSUT, LibriTTS and others run it.
    "espnet-24k": _ESPNET
    | {
        "sample_rate": 24000,
        "n_fft": 2048,
        "window_length": 1200,
        "hop_length": 300,
        "power_floor": 1e-10,
    },
    # kan-bayashi/ParallelWaveGAN, bin/preprocess.py `logmelfilterbank`, egs/ljspeech/voc1: ESPnet's
    # without that floor.
    "parallel-wavegan": _ESPNET,
    # fatchord/WaveRNN, utils/dsp.py and hparams.py: decibels from -100 to 0 become 0 to 1.
    "fatchord": {
        "n_fft": 2048,
        "window_length": 1100,
        "hop_length": 275,
        "centre": "start",
        "fmin": 40.0,
        "fmax": None,
        "log_base": "db",
        "scale": 0.01,
        "shift": 1.0,
        "clip": (0.0, 1.0),
    },
    # torchaudio.pipelines.TACOTRON2_GRIFFINLIM_*: examples/pipeline_tacotron2/train.py of
    # pytorch/audio.
    "torchaudio-tacotron2": _TACOTRON2,
    # torchaudio.pipelines.TACOTRON2_WAVERNN_*: the same program with the settings that their
    # documentation names.
    "torchaudio-tacotron2-wavernn": {
        "n_fft": 2048,
        "window_length": 1100,
        "hop_length": 275,
        "centre": "start",
        "fmin": 40.0,
        "fmax": None,
    },
    # librosa.feature.melspectrogram(y=y, sr=22050) and librosa.power_to_db(..., top_db=None) since
    # librosa 0.10.
    "librosa-default": {
        "n_fft": 2048,
        "window_length": 2048,
        "hop_length": 512,
        "centre": "start",
        "padding": "zeros",
        "bands": 128,
        "fmax": None,
        "power": 2.0,
        "log_base": "db",
        "floor": 1e-10,
    },
    # gemelo-ai/vocos 416f24d, vocos/feature_extractors.py `MelSpectrogramFeatures` (torchaudio's
    # MelSpectrogram with power=1: HTK's scale, no norm) and vocos/modules.py `safe_log`.
    "vocos-24k": {
        "sample_rate": 24000,
        "centre": "start",
        "bands": 100,
        "fmax": None,
        "mel_scale": "htk",
        "norm": None,
        "floor": 1e-7,
    },
    # NVIDIA/BigVGAN 169ffbe, meldataset.py `mel_spectrogram` (HiFi-GAN's), with the values of
    # configs/bigvgan_v2_*.json.
    "bigvgan-v2-24k-100": _BIGVGAN | {"sample_rate": 24000, "bands": 100},
    "bigvgan-v2-22k-80": _BIGVGAN,
    "bigvgan-v2-44k-128": _BIGVGAN
    | {
        "sample_rate": 44100,
        "n_fft": 2048,
        "window_length": 2048,
        "hop_length": 512,
        "bands": 128,
    },
}
