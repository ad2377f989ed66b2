"""Measure streaming: bits, memory, latency, one core's time; batches; the pass over a prime.

    python bench/streaming.py                       # all of it, on a random mel, some minutes
    python bench/streaming.py live --weights bfloat16 --seconds 10
    python bench/streaming.py whole --recording speech.wav

The network has the usual 20 layers and random weights; it runs on one core. Run it on a machine
that does nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import torch

import wavear
from wavear import MelConfig, Stream, StreamBatch, WaveNet, WaveNetConfig
from wavear.generation.conditioner import UtteranceConditioner
from wavear.generation.engines import make_engine
from wavear.generation.priming import encode_prime, fill

MEL = MelConfig()  # 22050 Hz, 80 bands, hop 256
FRAME = MEL.hop_length / MEL.sample_rate


def resident() -> float:
    """MiB of this process that lie in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def make_mel(recording: Path | None, seconds: float) -> torch.Tensor:
    """(M, F) of about so many seconds: of the recording, repeated, or noise."""
    frames = int(seconds / FRAME)
    if recording is None:
        return torch.randn(MEL.bands, frames, generator=torch.Generator().manual_seed(0)) * 2 - 5
    mel = wavear.log_mel(wavear.audio.read(recording, MEL.sample_rate)[None], MEL)[0]
    return mel.repeat(1, -(-frames // mel.shape[1]))[:, :frames]


def whole(model: WaveNet, mel: torch.Tensor, weights: str) -> None:
    """Random chunks against `generate`; memory at the start, in the middle, at the end."""
    given = {"seed": 1, "weights": weights, "threads": 1}
    rng = np.random.default_rng(0)
    cuts = [0, *np.cumsum(rng.integers(1, 30, mel.shape[1])).tolist()]
    bounds = [cut for cut in cuts if cut < mel.shape[1]] + [mel.shape[1]]
    expected = wavear.generate(model, mel, **given)[0]
    stream, memory, wrong, at = Stream(model, **given), [], 0, 0
    for a, b in [*itertools.pairwise(bounds), (0, 0)]:
        part = stream.push(mel[:, a:b]) if b else stream.flush()
        wrong += int((part != expected[at : at + len(part)]).sum())
        at += len(part)
        memory.append((at / MEL.sample_rate, resident()))
    assert at == len(expected)
    marks = [memory[0], memory[len(memory) // 2], memory[-1]]
    print(
        f"whole, {weights}: {at / MEL.sample_rate:.1f} s in {len(bounds) - 1} chunks,"
        f" {wrong} of {at} samples differ; memory "
        + ", ".join(f"{mib:.1f} MiB after {at:.1f} s" for at, mib in marks)
    )


def live(model: WaveNet, mel: torch.Tensor, weights: str) -> None:
    """Latency, and the share of a core that a live stream needs."""
    mel = mel[:, : int(10 / FRAME)]
    stream = Stream(model, weights=weights, threads=1)
    stream.fork().push(mel[:, :10])  # what only a first call costs
    first, began, cpu = None, time.perf_counter(), time.process_time()
    for frame in range(mel.shape[1]):
        start = time.perf_counter()
        if len(stream.push(mel[:, frame])) and first is None:
            first = time.perf_counter() - start
    stream.flush()
    spent, cpu = time.perf_counter() - began, time.process_time() - cpu
    seconds = stream.position / MEL.sample_rate
    assert first is not None
    print(
        f"live, {weights}: first sound {stream.latency} frames "
        f"({stream.latency * FRAME * 1000:.1f} ms) after the first"
        f" frame begins, {first * 1000:.1f} ms after the last of them is there; frame by frame"
        f" {seconds / spent:.2f} x real time, {cpu / seconds:.0%} of a core"
    )


def members(model: WaveNet, mel: torch.Tensor, weights: str, count: int = 12) -> None:
    """Streams side by side against as many apart, on one core, a frame for each at a time."""
    frames = int(1.5 / FRAME)
    streams = [Stream(model, seed=k, weights=weights, threads=1) for k in range(count)]
    batch = StreamBatch(model, weights=weights, threads=1)
    numbers = [batch.add(seed=k) for k in range(count)]
    apart: list[list[torch.Tensor]] = [[] for _ in range(count)]
    together: list[list[torch.Tensor]] = [[] for _ in range(count)]
    seconds = [0.0, 0.0]
    for frame in range(frames):
        columns = [mel[:, 50 * k + frame] for k in range(count)]
        start = time.perf_counter()
        for k, column in enumerate(columns):
            apart[k].append(streams[k].push(column))
        middle = time.perf_counter()
        for k, column in enumerate(columns):
            batch.push(numbers[k], column)
        for number, audio in batch.step().items():
            together[number].append(audio)
        if frame >= 10:  # the first ones make the engines
            seconds[0] += middle - start
            seconds[1] += time.perf_counter() - middle
    samples = count * (frames - 10) * MEL.hop_length
    same = all(
        torch.equal(torch.cat(a), torch.cat(b)) for a, b in zip(apart, together, strict=True)
    )
    print(
        f"members, {weights}: {count} streams on one core, apart {samples / seconds[0]:.0f} "
        "samples/s, together"
        f" {samples / seconds[1]:.0f}, {seconds[0] / seconds[1]:.1f} times; the same bits: {same}"
    )
    start = time.perf_counter()
    rounds = 10
    for k in range(rounds):  # one comes, one goes
        batch.remove(numbers[k])
        numbers[k] = batch.add(seed=k)
        batch.push(numbers[k], mel[:, :5])
        for number in numbers:
            if number != numbers[k]:
                batch.push(number, mel[:, 0])
        batch.step()
    each = (time.perf_counter() - start) / rounds - count * MEL.hop_length * seconds[1] / samples
    print(f"members, {weights}: a change of members costs {each * 1000:.1f} ms")


def prime(model: WaveNet, mel: torch.Tensor, weights: str) -> None:
    """Compare the parallel pass over 10 s with stepping through it."""
    samples = 10 * MEL.sample_rate
    t = torch.arange(samples) / MEL.sample_rate
    codes = encode_prime(0.5 * torch.sin(2 * torch.pi * 150 * t)[None], model)
    conditioner = UtteranceConditioner(model)
    conditioner.push(mel.repeat(1, -(-2 * samples // MEL.hop_length // mel.shape[1]) + 1))
    with torch.inference_mode():
        engines = [make_engine(model, 1, "numba", weights=weights, threads=1)[1] for _ in range(2)]
        fill(engines[0], 0, model, codes[0, :100], conditioner)  # what only a first call costs
        engines[0] = make_engine(model, 1, "numba", weights=weights, threads=1)[1]
        start = time.perf_counter()
        fill(engines[0], 0, model, codes[0], conditioner)
        filled = time.perf_counter() - start
        start = time.perf_counter()
        for at in range(0, samples, 2048):
            engines[1].score(
                codes[:, at : at + 2048], conditioner.span(at, min(at + 2048, samples))
            )
        stepped = time.perf_counter() - start
        states = [engine.state(0) for engine in engines]
        apart = max(
            float((states[0][name] - tensor).abs().max()) for name, tensor in states[1].items()
        )
        size = max(
            float(tensor.abs().max()) for name, tensor in states[1].items() if name != "previous"
        )
        later = [
            e.score(codes[:, :2000], conditioner.span(samples, samples + 2000)) for e in engines
        ]
    print(
        f"prime, {weights}: 10 s filled in {filled * 1000:.0f} ms, stepped in {stepped:.1f} s; "
        "the states differ by"
        f" {apart:.1e} at most (their numbers reach {size:.1f}), log-probabilities of the next "
        "2000 samples by"
        f" {np.abs(later[0] - later[1]).max():.1e} nats"
    )


PARTS = {"whole": whole, "live": live, "members": members, "prime": prime}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what streaming costs.")
    parser.add_argument("part", nargs="*", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--weights", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of mel for the part `whole` (default 60)"
    )
    parser.add_argument("--recording", type=Path, help="take its mel, repeated; by default noise")
    arguments = parser.parse_args()
    if unknown := set(arguments.part) - set(PARTS):
        sys.exit(f"no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = WaveNet(WaveNetConfig(mel=MEL)).eval()
    mel = make_mel(arguments.recording, arguments.seconds)
    for name in arguments.part or PARTS:
        for weights in arguments.weights:
            PARTS[name](model, mel, weights)


if __name__ == "__main__":
    main()
