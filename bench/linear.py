"""Measure the fit of a linear model: seconds, memory, and its distance from others' coefficients.

    python bench/linear.py my/recordings    # 22.05 kHz, order 32, the order chosen, 16 bits
    python bench/linear.py my/recordings --rate 16000 --fits order-32 order-1024

Besides the seconds by the clock there are those of the processor, which other work on the machine
changes little. Files are read and resampled as `wavear train` does, on two threads; that is most of
the time, and is told apart. The memory is the most that this process ever held, less what it held
before. Needs statsmodels (extra `dev`).
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from pathlib import Path

import librosa
import numpy as np
import torch

import wavear
from wavear.audio.grid import Grid
from wavear.benchmark.speed import machine
from wavear.data.corpus import Recording, open_corpus
from wavear.generation.cpu.linear import NumbaLinearEngine
from wavear.models import lpc
from wavear.models.fitting import Fitter
from wavear.models.linear import Linear
from wavear.models.sampling import uniforms
from wavear.training.linear_run import add_recordings

_COMPARED = 2**18  # samples of the longest recording that the others are given
_ORDER = 32
FITS = {
    "order-32": (_ORDER, Grid("mulaw", 256), False),
    "16-bits": (_ORDER, Grid("linear", 65536), False),
    "bic": (64, Grid("mulaw", 256), True),
    "order-1024": (1024, Grid("mulaw", 256), False),
}


def peak() -> float:
    """Return the peak memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Timed(Fitter):
    """Counts the seconds that are spent on the codes, so that the rest is reading them."""

    seconds = 0.0
    samples = 0

    def push(self, codes: np.ndarray | torch.Tensor) -> None:
        """See `Fitter.push`."""
        began = time.thread_time()
        super().push(codes)
        self.seconds += time.thread_time() - began
        self.samples += len(codes)


def fit(
    recordings: list[Recording], rate: int, order: int, grid: Grid, criterion: bool
) -> tuple[Linear, str]:
    """Return a model of all recordings, and a row of the table."""
    before, began, spent = peak(), time.perf_counter(), time.process_time()
    if criterion:
        fitter = Timed(grid, order="bic", max_order=order, method="silence")
    else:
        fitter = Timed(grid, order=order, method="silence")
    passed = list(add_recordings(fitter, recordings, rate))
    read = time.thread_time()
    fitted = fitter.fit(rate)
    scaled = time.thread_time() - read
    ended, spent = time.perf_counter(), time.process_time() - spent
    model, bits = fitted.model, fitted.nats / np.log(2)
    name = f"BIC up to {order}: {model.config.order}" if criterion else f"{order}"
    print(f"skipped: {passed}" if passed else f"{len(recordings)} recordings", flush=True)
    return model, (
        f"| {name} | {grid} | {fitter.samples / rate / 60:.1f} | {ended - began:.1f} | {spent:.1f} "
        f"| {fitter.seconds:.1f} "
        f"| {scaled:.1f} | {peak() - before:.0f} | {bits:.3f} | {model.config.law} |"
    )


def compare(recording: Recording, rate: int) -> None:
    """Compare the coefficients of one recording with those of statsmodels and librosa."""
    from statsmodels.tsa.ar_model import AutoReg

    x = wavear.audio.read(recording.path, rate).numpy()[:_COMPARED].astype(np.float64)
    print(
        f"\n{recording.name}, {len(x):,} samples, order {_ORDER}, the larger of each "
        "coefficient's differences:\n"
    )
    print("| | ours, s | theirs, s | difference | largest coefficient |")
    print("|---|---:|---:|---:|---:|")

    def least_squares() -> np.ndarray:
        sums = lpc.Statistics(_ORDER)
        sums.add(x)
        return sums.solve(_ORDER, ridge=0.0)[0]

    pairs = [
        (
            "statsmodels AutoReg",
            least_squares,
            lambda: np.asarray(AutoReg(x, _ORDER, trend="n").fit().params),
        ),
        ("librosa.lpc", lambda: lpc.burg(x, _ORDER)[0], lambda: -librosa.lpc(x, order=_ORDER)[1:]),
    ]
    for name, ours, theirs in pairs:
        theirs()  # librosa compiles at its first call
        began = time.perf_counter()
        own = ours()
        middle = time.perf_counter()
        other = theirs()
        ended = time.perf_counter()
        print(
            f"| {name} | {middle - began:.3f} | {ended - middle:.3f} | "
            f"{np.abs(own - other).max():.1e} "
            f"| {np.abs(other).max():.2f} |"
        )


def speed(model: Linear, seconds: float = 1.0) -> str:
    """Return the samples per second of one stream on the CPU engine, the best of several calls."""
    engine, samples, best = NumbaLinearEngine(model, 1, threads=1), 2048, 0.0
    draws = uniforms(0, 0, samples)[None]
    engine.generate(draws, None)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        engine.generate(draws, None)
        best = max(best, samples / (time.perf_counter() - began))
    config = model.config
    return f"order {config.order}, {config.law}, {model.grid}: {best / 1e6:.1f} M samples/s"


def main() -> None:
    """Print all of it."""
    parser = argparse.ArgumentParser(description="Time the fit of linear models.")
    parser.add_argument("data", type=Path, help="folder of recordings, or a manifest")
    parser.add_argument("--rate", type=int, default=22050, help="Hz, of the model (default 22050)")
    parser.add_argument(
        "--fits", nargs="*", default=list(FITS), choices=list(FITS), help="which (default all)"
    )
    arguments = parser.parse_args()
    print(f"{machine()}\n")
    corpus = open_corpus(arguments.data, sample_rate=arguments.rate, validation_fraction=1e-9)
    recordings = corpus.train + corpus.validation
    print(f"{peak():.0f} MiB before the first file")
    made = [fit(recordings, arguments.rate, *FITS[name]) for name in arguments.fits]
    print(
        "\n| order | codes | minutes | s | processor s | of it sums | of it scale | MiB more | "
        "bits | law |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---|")
    print("\n".join(row for _, row in made))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        compare(max(recordings, key=lambda r: r.frames), arguments.rate)
    print()
    print("\n".join(speed(model) for model, _ in made))


if __name__ == "__main__":
    main()
