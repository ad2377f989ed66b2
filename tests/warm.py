"""Compile the kernels of the CPU engines into the user's cache, in one process per core.

`make test` runs this first. Otherwise every worker of pytest would compile the same kernels; and
two processes that compile librosa's at the same time can leave a cache that crashes when loaded.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor

FAMILIES = ("WaveNet", "PredictiveWaveNet", "Transformer", "GRU", "Linear")  # the slowest first


def compile_kernels(family: str) -> None:
    """Generate one sample, or one frame, with an untrained model."""
    import torch

    import wavear

    mel = wavear.MelConfig.preset("hifigan") if family == "PredictiveWaveNet" else None
    config = getattr(wavear, f"{family}Config")(**({} if mel is None else {"mel": mel}))
    model = getattr(wavear, family)(config)
    if mel is None:
        wavear.generate(model, samples=1, engine="numba")
    else:
        wavear.generate(model, torch.zeros(1, mel.bands, 1), engine="numba")


def compile_librosa() -> None:
    """Measure a pitch, which imports librosa and compiles its kernels."""
    import numpy as np

    from wavear.evaluation.metrics import pitch

    tone = np.sin(np.arange(8000) * 0.2)
    pitch(tone, 8000)
    from librosa import yin

    yin(tone, fmin=100, fmax=500, sr=8000)


def main() -> None:
    with ProcessPoolExecutor(1) as alone:
        alone.submit(compile_librosa).result()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_kernels, FAMILIES))


if __name__ == "__main__":
    main()
