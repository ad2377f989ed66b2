"""The exception with which wavear refuses an input."""

from __future__ import annotations

import os
from typing import Any

_LONGEST = 4000  # characters of a message


class WavearError(ValueError):
    """An input that wavear refuses: a file, a value, a combination of options.

    The message is one line: what is wrong, the value, the remedy. It is raised at the public edge;
    the command line prints it without a traceback. Any other exception is a bug in wavear.
    """

    def __init__(self, message: object = ""):
        # Values that are quoted, such as arrays, may have several lines, or thousands of numbers.
        text = " ".join(str(message).splitlines())
        super().__init__(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line; of an `OSError`, the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return "not enough memory for it"
    return " ".join(str(error).split()) or type(error).__name__


def require(value: Any, kind: type | tuple[type, ...], name: str, expected: str) -> None:
    """Refuse an argument that is not of a type.

    Examples
    --------
    >>> require("a.wav", int, "samples", "a whole number")
    Traceback (most recent call last):
    wavear.common.errors.WavearError: samples is a str ('a.wav'), expected a whole number
    """
    if not isinstance(value, kind):
        shown = f" ({value!r:.60})" if isinstance(value, str | int | float | os.PathLike) else ""
        raise WavearError(f"{name} is a {type(value).__name__}{shown}, expected {expected}")
