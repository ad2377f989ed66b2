"""Progress bars."""

from __future__ import annotations

from typing import Any


def bar(items: Any, total: int | None, description: str) -> Any:
    """Iterate over `items` with a progress bar on stderr, which appears after a second."""
    from tqdm import tqdm

    return tqdm(items, total=total, desc=description, dynamic_ncols=True, leave=False, delay=1.0)
