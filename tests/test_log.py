"""Logging of the command line: plain lines on stderr."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest

from wavear.common import log


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    logger = logging.getLogger("wavear")
    level, handlers = logger.level, logger.handlers
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield
    logger.level, logger.handlers = level, handlers


@pytest.mark.parametrize("quiet", [False, True])
def test_each_record_is_one_line_on_stderr(capsys: pytest.CaptureFixture, quiet: bool):
    log.setup_logging()
    log.setup_logging(quiet)  # replaces the first handler
    logging.getLogger("wavear.audio").info("a.wav  %.1f s", 2.0)
    logging.getLogger("wavear.audio").warning("clipped")
    warnings.warn_explicit("own\nwarning", UserWarning, log.__file__, 1)
    logging.getLogger("elsewhere").info("not ours")
    out, err = capsys.readouterr()
    info = [] if quiet else ["a.wav  2.0 s"]
    assert err.splitlines() == [*info, "wavear: warning: clipped", "wavear: warning: own warning"]
    assert out == ""


def test_other_packages_warnings_keep_their_form(monkeypatch: pytest.MonkeyPatch):
    shown = []
    monkeypatch.setattr(log, "_python_shows", lambda *arguments: shown.append(arguments[2:4]))
    log.setup_logging()
    warnings.warn_explicit("theirs", UserWarning, "elsewhere.py", 7)
    assert shown == [("elsewhere.py", 7)]


def test_names_that_are_not_unicode_are_escaped_in_records(caplog: pytest.LogCaptureFixture):
    log.get_logger("wavear.test_log").warning("skipped %s", "caf\udce9.wav")
    assert caplog.messages == ["skipped caf\\udce9.wav"]
