"""The exception with which wavear refuses an input."""

from __future__ import annotations


class WavearError(ValueError):
    """An input that wavear refuses: a file, a value, a combination of options.

    The message is one line: what is wrong, the value, the remedy. It is raised at the public edge;
    the command line prints it without a traceback. Any other exception is a bug in wavear.
    """


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line; of an `OSError`, the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return "not enough memory for it"
    return " ".join(str(error).split()) or type(error).__name__
