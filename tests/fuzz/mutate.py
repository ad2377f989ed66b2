"""Change bytes and JSON at random; every change follows from a seed."""

from __future__ import annotations

import copy
import random
from typing import Any

_NUMBERS = [0, 1, 2, 3, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
_NUMBERS += [2**33, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
_VALUES: list[Any] = [
    *_NUMBERS, -1, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), True, False,
    None,
    "", "x", "0", "\0", "../x", "pipe:touch ran", "é" * 50, [], {}, [1, 2], [[]], {"a": 1},
]  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Change one to four places, the beginning and the end more often than the middle."""
    content = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        size = len(content)
        if not size:
            break
        window = rng.choice([size, size, min(size, 64), min(size, 512)])
        at = rng.randrange(window) if rng.random() < 0.8 else size - 1 - rng.randrange(window)
        length = rng.choice([1, 2, 4, 8, 64, 1000])
        kind = rng.randrange(8)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at : at + length] = rng.randbytes(length)
        elif kind in (2, 3):
            width = rng.choice([1, 2, 4, 8])
            value = rng.choice(_NUMBERS) % 256**width
            content[at : at + width] = value.to_bytes(width, rng.choice(["little", "big"]))
        elif kind == 4:
            del content[at : at + length]
        elif kind == 5:
            content[at:at] = content[at : at + length]
        elif kind == 6:
            content[at:at] = rng.choice([bytes(length), b"\xff" * length, rng.randbytes(length)])
        else:
            del content[at:]
    return bytes(content)


def mutated_json(value: Any, rng: random.Random) -> Any:
    """Change one to three values of a nest: replaced, removed, added, or nested too deep."""
    changed = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2, 3])):
        where: Any = changed
        while isinstance(where, dict | list) and where:
            key = rng.choice(list(where) if isinstance(where, dict) else range(len(where)))
            inside = isinstance(where[key], dict | list) and where[key]
            if inside and rng.random() < 0.8:
                where = where[key]
                continue
            kind = rng.randrange(6)
            if kind == 0:
                del where[key]
            elif kind == 1 and isinstance(where, dict):
                where[rng.choice(["x", "mel", "path", ""])] = rng.choice(_VALUES)
            elif kind == 2 and type(where[key]) in (int, float):
                where[key] = where[key] * rng.choice([-1, 0, 2, 1000, 10**9])
            elif kind == 3 and rng.random() < 0.1:
                for _ in range(200):
                    where[key] = [where[key]]
            else:
                where[key] = copy.deepcopy(rng.choice(_VALUES))
            break
    return changed
