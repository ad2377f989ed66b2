"""Write the sound samples of README.md: recordings, and copies of them by the voice of wavear.

    python bench/samples.py german=de_rhasspy-0228.flac english=LJ001-0029.wav --recordings german

writes docs/sounds/german-recording.mp3, german-copy.mp3 and english-copy.mp3: MP3, which every
browser plays. Both recordings were held out: Kerstin (CC0 1.0) and LJ Speech (public domain).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import soundfile

import wavear

QUALITY = {"format": "MP3", "bitrate_mode": "VARIABLE", "compression_level": 0.5}


def main() -> None:
    """Parse the command line, and write the samples."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("files", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--recordings", nargs="*", default=[], metavar="NAME", help="to keep, too")
    parser.add_argument("--out", type=Path, default=Path("docs/sounds"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = wavear.load()
    rate = model.config.sample_rate
    options.out.mkdir(parents=True, exist_ok=True)
    for entry in options.files:
        name, equals, file = entry.partition("=")
        if not equals:
            sys.exit(f"{entry}: expected NAME=FILE")
        recording = wavear.audio.read(file, rate)
        mel = wavear.log_mel(recording, model.config.mel)
        copy = wavear.generate(model, mel, seed=options.seed)[0]
        made = {"copy": copy} | ({"recording": recording} if name in options.recordings else {})
        for kind, waveform in made.items():
            path = options.out / f"{name}-{kind}.mp3"
            soundfile.write(path, waveform.numpy(), rate, **QUALITY)
            print(f"{path}  {len(waveform) / rate:.2f} s, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
