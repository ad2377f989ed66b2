"""Fine-tune the voice as `wavear demo` does, on generated notes. Every value is a flag too."""

import dataclasses
from pathlib import Path

from wavear.cli import recipe
from wavear.demo import VALUES, write_notes

if __name__ == "__main__":
    folder = Path("data/demo")
    write_notes(folder)
    paths = {
        "data": str(folder / "sounds"),
        "validation": str(folder / "held_out"),
        "out": "runs/demo",
    }
    recipe(dataclasses.replace(VALUES, **paths), __doc__)
