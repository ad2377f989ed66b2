"""A file appears whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from wavear.common.atomic import replace_file


def test_a_file_has_the_rights_of_any_other_whatever_its_writer_gave_it(tmp_path: Path):
    def write(path: Path) -> None:
        path.write_text("new")
        path.chmod(0o600)

    replace_file(tmp_path / "a", write)
    (tmp_path / "b").write_text("plain")
    assert (tmp_path / "a").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "b").stat().st_mode
    )


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_goes_wrong_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
):
    (tmp_path / "a").write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise error

    with pytest.raises(error):
        replace_file(tmp_path / "a", fail)
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]
