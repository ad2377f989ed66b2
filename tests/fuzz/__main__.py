"""Run cases of all targets for some minutes; keep what violates the invariant in a folder.

The cases run in a child process, which may crash: then its last case is kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Return 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="make fuzz")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--target", default="")
    parser.add_argument("--found", type=Path, default=HERE / "found")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child(given.child, given.seed, given.target, given.found)
    end, failed, cases, seed = time.time() + 60 * given.minutes, 0, 0, given.seed
    while (left := end - time.time()) > 0:
        command = [
            sys.executable,
            "-m",
            "fuzz",
            "--child",
            str(min(left, 120)),
            "--seed",
            str(seed),
        ]
        command += ["--target", given.target, "--found", str(given.found)]
        environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        count, bad = [*map(int, done.stdout.split()[-2:]), 0, 0][:2]
        if done.returncode:
            failed += 1
            print(f"the process ended with {done.returncode}: see {given.found}", flush=True)
        cases, failed, seed = cases + count, failed + bad, seed + 1_000_000
        print(f"{cases} cases, {failed} failed, {max(end - time.time(), 0):.0f} s left", flush=True)
    return int(failed > 0)


def child(seconds: float, seed: int, target: str, found: Path) -> int:
    """Run cases, and print how many ran and failed."""
    from fuzz.harness import Fuzzer
    from fuzz.targets import TARGETS

    names = [target] if target else list(TARGETS)
    end, count, kinds = time.time() + seconds, 0, Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        fuzzers = {name: Fuzzer(TARGETS[name], Path(folder) / name) for name in names}
        found.mkdir(parents=True, exist_ok=True)
        while time.time() < end:
            name = names[count % len(names)]
            (found / f"running-{os.getpid()}").write_text(f"{name} {seed + count}\n")
            try:
                fuzzers[name].run(seed + count)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                frame = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{name}-{type(error).__name__}-{Path(frame.filename).stem}-{frame.lineno}"
                kinds[kind] += 1
                if kinds[kind] == 1:
                    keep(found, kind, seed + count, fuzzers[name], error)
            count += 1
    (found / f"running-{os.getpid()}").unlink()
    print(count, sum(kinds.values()))
    return 0


def keep(found: Path, kind: str, seed: int, fuzzer: object, error: BaseException) -> None:
    """Write a case that failed: its seed, its files and the traceback."""
    text = "".join(traceback.format_exception(error))
    (found / f"{kind}.txt").write_text(f"seed {seed}\n{text}")
    print(f"{kind}: seed {seed}: {text.splitlines()[-1][:200]}", file=sys.stderr, flush=True)
    folder = fuzzer.folder / f"case-{fuzzer.number % 2}"  # type: ignore[attr-defined]
    shutil.copytree(folder, found / kind, dirs_exist_ok=True)


if __name__ == "__main__":
    sys.exit(main())
