"""Build the wheel, install it into an empty environment, and synthesize from another directory.

    python tests/wheel.py [OPTIONS OF PIP]

`make wheel-test` runs it. For the CPU build of torch:
ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
"""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
import tempfile
import time
import venv
import wave
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 2_500_000  # bytes: the voice has 0.55 million
NEEDED = {
    *(f"voices/voice/{name}" for name in ("config.json", "model.safetensors", "sentence.npz")),
    *(f"evaluation/templates/{p.name}" for p in (ROOT / "wavear/evaluation/templates").iterdir()),
    *(f"serving/page/{p.name}" for p in (ROOT / "wavear/serving/page").iterdir()),
    "__init__.pyi",
    "py.typed",
}


def run(*command: str | Path, cwd: Path) -> str:
    """Run a program without the settings of this one; return what it prints."""
    surroundings = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=surroundings, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout}")
    return done.stdout


def check_content(wheel: Path) -> None:
    """Stop if the wheel lacks data, holds anything besides the package, or is too large."""
    names = set(zipfile.ZipFile(wheel).namelist())
    missing = {name for name in NEEDED if f"wavear/{name}" not in names}
    foreign = {
        n for n in names if n.split("/")[0] not in ("wavear", f"{wheel.name[:12]}.dist-info")
    }
    size = wheel.stat().st_size
    if missing or foreign or size > LARGEST:
        sys.exit(f"{wheel.name}: lacks {missing}; foreign {foreign}; {size:,} bytes of {LARGEST:,}")
    print(f"{wheel.name}: {len(names)} files, {size / 1e6:.2f} MB")


def write_tone(path: Path) -> None:
    """Write two seconds of a gliding tone with overtones."""
    rate = 16000
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        for t in range(2 * rate):
            phase = 2 * math.pi * (120 * t / rate + 20 * (t / rate) ** 2)
            value = sum(math.sin(n * phase) / n for n in range(1, 9))
            file.writeframes(struct.pack("<h", round(8000 * value)))


def main() -> None:
    """Do all of it in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="wavear-wheel-") as name:
        here = Path(name)
        run(sys.executable, "-m", "build", "--outdir", here / "dist", ROOT, cwd=here)
        (wheel,) = (here / "dist").glob("*.whl")
        check_content(wheel)
        began = time.perf_counter()
        venv.create(here / "venv", with_pip=True)
        scripts = here / "venv" / ("Scripts" if os.name == "nt" else "bin")
        run(scripts / "python", "-m", "pip", "install", "-q", *sys.argv[1:], wheel, cwd=here)
        taken = time.perf_counter() - began
        size = sum(p.stat().st_size for p in (here / "venv").rglob("*") if p.is_file())
        print(f"installed in {taken:.0f} s, {size / 1e9:.2f} GB")
        (here / "work").mkdir()
        write_tone(here / "work" / "tone.wav")
        print(run(scripts / "wavear", "synthesize", "tone.wav", cwd=here / "work").strip())
        with wave.open(str(here / "work" / "tone-synthesized.wav")) as file:
            frames = file.readframes(file.getnframes())
            values = struct.unpack(f"<{len(frames) // 2}h", frames)
            # 2 s in frames of 256 samples
            assert (file.getframerate(), len(values)) == (22050, 44100 // 256 * 256), (
                file.getparams()
            )
        level = math.sqrt(sum(value**2 for value in values) / len(values))
        assert level > 300, f"the level is {level:.0f} of 32768: silence"
        print(f"tone-synthesized.wav: {len(values)} samples, level {level:.0f} of 32768")


if __name__ == "__main__":
    main()
