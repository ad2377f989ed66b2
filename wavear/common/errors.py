"""The exception with which wavear refuses an input."""

from __future__ import annotations


class WavearError(ValueError):
    """An input that wavear refuses: a file, a value, a combination of options.

    The message is one line: what is wrong, the value, the remedy. It is raised at the public edge;
    the command line prints it without a traceback. Any other exception is a bug in wavear.
    """
