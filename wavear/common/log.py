"""Set up logging for the command line; modules log through `get_logger(__name__)`."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

_PACKAGE = str(Path(__file__).resolve().parents[1])
_python_shows = warnings.showwarning


class _AboveBars:
    """Writes to the current stderr, above any progress bar."""

    def write(self, text: str) -> None:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr, end="")


class _Lines(logging.StreamHandler):
    def format(self, record: logging.LogRecord) -> str:
        plain = record.levelno < logging.WARNING
        return ("" if plain else f"wavear: {record.levelname.lower()}: ") + super().format(record)


def _show_warning(message: Any, category: Any, filename: str, *rest: Any) -> None:
    if filename.startswith(_PACKAGE) and issubclass(category, UserWarning):
        logging.getLogger("wavear").warning("%s", " ".join(str(message).split()))
    else:
        _python_shows(message, category, filename, *rest)


def get_logger(name: str) -> logging.Logger:
    """Return a module's logger; names of files that are not Unicode are escaped in its lines."""
    logger = logging.getLogger(name)
    logger.addFilter(_escaped)
    return logger


def _escaped(record: logging.LogRecord) -> bool:
    line = record.getMessage()
    record.msg, record.args = line.encode("utf-8", "backslashreplace").decode("utf-8"), None
    return True


def setup_logging(quiet: bool = False) -> None:
    """Print what wavear logs as plain lines on stderr, its warnings among them.

    Lines of level INFO appear as they are; others begin with "wavear: warning: " or "wavear:
    error: ". A `UserWarning` issued from wavear's own code becomes such a line; those of other
    packages keep Python's form. A second call replaces the first.

    Parameters
    ----------
    quiet : bool
        Print warnings and errors only.
    """
    logger = logging.getLogger("wavear")
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.handlers = [kept for kept in logger.handlers if not isinstance(kept, _Lines)]
    logger.addHandler(_Lines(_AboveBars()))
    warnings.showwarning = _show_warning
