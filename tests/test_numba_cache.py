"""The cache of compiled code, with functions that compile in an instant."""

# Numba's settings have no types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numba
import pytest

import wavear
from wavear.common import compiled as compiled_module
from wavear.common.compiled import compiled, source_key


def _double(x):
    return 2 * x


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled_module, "_warned", False)
    return tmp_path / "cache"


def stored(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.nbc"))


def test_compiled_code_is_cached_and_found_again(cache):
    before = numba.config.CACHE_DIR
    first = compiled(_double, "int64(int64)")
    assert first(4) == 8
    assert len(stored(cache)) == 1
    assert sum(first.stats.cache_hits.values()) == 0
    again = compiled(_double, "int64(int64)")
    assert again(4) == 8
    assert sum(again.stats.cache_hits.values()) == 1
    assert before == numba.config.CACHE_DIR


def test_one_line_announces_that_kernels_compile(cache, caplog):
    """One for each process, and none where the code is kept and intact."""
    compiled_module._announce.cache_clear()
    caplog.set_level("INFO", "wavear")
    compiled(_double, "int64(int64)")
    compiled(_double, "float64(float64)")
    assert [record.getMessage()[:37] for record in caplog.records] == [
        "compiling kernels, once per machine: "
    ]
    compiled_module._announce.cache_clear()
    compiled(_double, "int64(int64)")
    assert len(caplog.records) == 1
    stored(cache)[0].write_bytes(b"damaged")
    assert compiled(_double, "int64(int64)")(4) == 8
    assert len(caplog.records) == 2


def test_a_changed_source_recompiles(cache, monkeypatch):
    compiled(_double, "int64(int64)")
    monkeypatch.setattr(compiled_module, "source_key", lambda path: "other")
    assert sum(compiled(_double, "int64(int64)").stats.cache_hits.values()) == 0


def test_the_key_covers_the_kernels_sources_and_the_compiler_only(tmp_path, monkeypatch):
    package = tmp_path / "wavear"
    shutil.copytree(
        Path(wavear.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    engines = package / "generation" / "cpu"
    monkeypatch.setattr(compiled_module, "__file__", str(package / "common" / "compiled.py"))
    loop, ceiling = engines / "wavenet_loop.py", package / "benchmark" / "ceiling.py"
    before = source_key(loop)
    read = ("simd.py", "emitter.py", "../../common/compiled.py", "wavenet_loop.py", "products.py")
    not_read = ("__init__.py", "wavenet.py", "wavenet_plan.py", "packing.py", "../streams.py")
    for name in (*read, *not_read):
        text = (engines / name).read_bytes()
        (engines / name).write_bytes(text + b"# changed\n")
        assert (source_key(loop) != before) == (name in read), name
        (engines / name).write_bytes(text)
    assert source_key(loop) == before != source_key(ceiling)
    before = source_key(ceiling)
    (package / "models" / "wavenet.py").write_text("")
    assert source_key(ceiling) != before  # also in other directories
    before = source_key(loop)
    monkeypatch.setattr(numba, "__version__", "0.0.0")
    assert source_key(loop) != before


_CHANGES = """
import sys
from wavear.generation.cpu import kernel_of_a_test
print(kernel_of_a_test.outer(4), sum(kernel_of_a_test.outer.stats.cache_hits.values()))
"""


def test_a_change_in_a_called_file_recompiles_and_another_does_not(tmp_path):
    package = tmp_path / "wavear"
    shutil.copytree(
        Path(wavear.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    inner = package / "generation" / "cpu" / "part_of_a_test.py"
    (package / "generation" / "cpu" / "kernel_of_a_test.py").write_text(
        "from wavear.common.compiled import compiled\n"
        "from wavear.generation.cpu.part_of_a_test import inner\n"
        "def _outer(x):\n    return inner(x)\n"
        "outer = compiled(_outer, 'int64(int64)')\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
    }
    found = []
    for factor, comment in ((2, ""), (2, "# another"), (3, "# another")):
        inner.write_text(f"import numba\n@numba.njit\ndef inner(x):\n    return {factor} * x\n")
        (package / "generation" / "cpu" / "wavenet.py").write_text(comment)
        command = [sys.executable, "-c", _CHANGES]
        result = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
        )
        found.append(result.stdout.split())
    assert found == [["8", "0"], ["8", "1"], ["12", "0"]]


@pytest.mark.slow
def test_another_processor_recompiles(cache, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from wavear.common.compiled import compiled\n"
        "def double(x):\n    return 2 * x\n"
        "assert compiled(double, 'int64(int64)')(4) == 8\n"
    )
    for processor in ({}, {"NUMBA_CPU_NAME": "generic"}):
        subprocess.run([sys.executable, program], check=True, env={**os.environ, **processor})
    assert len(stored(cache)) == 2


@pytest.mark.slow
def test_symbols_of_two_processes_differ(tmp_path):
    """Else a function for the records of one kernel would serve those of another."""
    program = (
        "import os\n"
        "from wavear.common.compiled import compiled\n"
        "def double(x): return 2 * x\n"
        "compiled(double, 'float64(float64)')\n"
        "child = os.fork()\n"
        "code = next(iter(compiled(double, 'int64(int64)').overloads.values()))\n"
        "print(code.fndesc.mangled_name, flush=True)\n"
        "child and os.wait()"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    names = {
        name
        for _ in range(2)
        for name in subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, check=True
        ).stdout.split()
    }
    assert len(names) == 4


def test_an_unwritable_cache_warns_once_and_compiles(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(compiled_module, "_warned", False)
    with pytest.warns(UserWarning, match="NUMBA_CACHE_DIR"):
        assert compiled(_double, "int64(int64)")(4) == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled(_double, "int64(int64)")(4) == 8


@pytest.mark.parametrize("kind", ["nbi", "nbc", "sums"])
@pytest.mark.parametrize("damage", ["empty", "short", "flipped", "other"])
def test_a_damaged_cache_is_repaired(cache, kind, damage):
    """Numba detects few of these: changed machine code would run."""
    compiled(_double, "int64(int64)")
    (path,) = cache.rglob(f"*.{kind}")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    made = {"empty": b"", "short": whole[:-9], "flipped": bytes(flipped), "other": b"damaged"}
    path.write_bytes(made[damage])
    hits = []
    for _ in range(2):
        again = compiled(_double, "int64(int64)")
        assert again(4) == 8
        hits.append(sum(again.stats.cache_hits.values()))
    assert hits == [0, 1]


def test_a_cache_of_a_version_without_checksums_is_compiled_once(cache):
    compiled(_double, "int64(int64)")
    next(cache.rglob("*.sums")).unlink()
    hits = [sum(compiled(_double, "int64(int64)").stats.cache_hits.values()) for _ in range(2)]
    assert hits == [0, 1]
