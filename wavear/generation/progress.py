"""Chunks of generation and scoring, under a progress bar where one is wanted."""

from __future__ import annotations

import time
from collections.abc import Iterator

# Samples per call of an engine: a fraction of a second, so that Ctrl-C and the bar are prompt.
CHUNK = 4096


def chunks(
    total: int, progress: bool, rate: int, batch: int, name: str, length: int = CHUNK
) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each chunk of `total` samples; the bar is called `name`."""
    spans = [(start, min(start + length, total)) for start in range(0, total, length)]
    if not progress:
        yield from spans
        return
    from tqdm import tqdm

    began = time.perf_counter()
    with tqdm(
        total=total * batch, unit=" samples", unit_scale=True, desc=name, dynamic_ncols=True
    ) as bar:
        for start, stop in spans:
            yield start, stop
            bar.update((stop - start) * batch)
            speed = stop * batch / rate / (time.perf_counter() - began)
            bar.set_postfix_str(f"{speed:.2f} x real time")
