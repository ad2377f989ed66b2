"""Files are replaced whole or not at all; locks hold between processes; caches find a folder."""

import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from wavear.common import compiled
from wavear.common.atomic import locked, replace_file


def test_a_new_file_has_the_usual_permissions(tmp_path: Path):
    def write(path: Path) -> None:
        path.write_text("new")
        path.chmod(0o600)

    replace_file(tmp_path / "a", write)
    (tmp_path / "b").write_text("plain")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"]
    assert (tmp_path / "a").read_text() == "new"
    assert modes[0] == modes[1]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_only_the_old_file(tmp_path: Path, error: type[BaseException]):
    (tmp_path / "a").write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise error

    with pytest.raises(error):
        replace_file(tmp_path / "a", fail)
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_only_one_holder_has_a_lock(tmp_path: Path):
    waiting, order = threading.Event(), []

    def second() -> None:
        with locked(tmp_path / "lock", waiting.set):
            order.append("second")

    with locked(tmp_path / "lock", lambda: order.append("waited")):
        other = threading.Thread(target=second)
        other.start()
        assert waiting.wait(10)
        order.append("first")
    other.join(10)
    assert order == ["first", "second"]


def test_without_a_lock_file_the_work_proceeds_unlocked(tmp_path: Path):
    (tmp_path / "file").touch()
    with locked(tmp_path / "file" / "lock"):
        assert os.listdir(tmp_path) == ["file"]


# --- the cache of compiled code


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make the home unwritable; return a private folder for temporary files."""
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    compiled._temporary_directory.cache_clear()
    return tmp_path


def test_without_a_writable_home_the_cache_is_temporary(no_home: Path, monkeypatch):
    folder = no_home / f"wavear-{os.getuid()}"
    assert compiled.cache_directory() == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    compiled.prepare_numba()
    assert os.environ.pop("NUMBA_CACHE_DIR") == str(folder)
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/elsewhere")
    assert compiled.cache_directory() == Path("/elsewhere")


def test_an_unknown_user_without_a_home_has_a_temporary_cache(no_home: Path, monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for an unknown user id
    monkeypatch.chdir(no_home)
    assert compiled.cache_directory() == no_home / f"wavear-{os.getuid()}"
    assert not (no_home / "~").exists()


def test_a_temporary_folder_that_others_can_write_is_not_used(no_home: Path):
    planted = no_home / f"wavear-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    found = compiled.cache_directory()
    assert found != planted
    assert found.parent == no_home


def test_a_writable_home_leaves_the_environment_unchanged(no_home: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(no_home))
    compiled.prepare_numba()
    assert "NUMBA_CACHE_DIR" not in os.environ


@pytest.mark.slow
@pytest.mark.parametrize("prepare", ["", "compiled.prepare_numba();"], ids=["bare", "prepared"])
def test_librosa_imports_without_a_home_once_numba_is_prepared(no_home: Path, prepare: str):
    program = (
        "from numba.core import caching\n"
        "for name in [name for name in dir(caching) if 'InTree' in name]:\n"
        "    getattr(caching, name).from_function = lambda *_: None  # a read-only installation\n"
        f"from wavear.common import compiled; {prepare}\n"
        "import librosa; librosa.effects.trim"
    )
    environment = os.environ | {"TMPDIR": str(no_home)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert (done.returncode == 0) == bool(prepare), done.stderr
    assert prepare or "cannot cache" in done.stderr
