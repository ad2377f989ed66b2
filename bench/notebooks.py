"""Execute the notebooks of docs/notebooks and store them with their outputs.

    python bench/notebooks.py [NAME...]     # make notebooks

Each runs in an empty folder. In the stored outputs sounds are MP3 instead of FLAC and pictures have
64 colours, a third of the bytes.
"""

from __future__ import annotations

import base64
import io
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import soundfile
from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"
_MP3 = {"format": "MP3", "bitrate_mode": "VARIABLE", "compression_level": 0.6}
_COLOURS = 64


def execute(name: str, folder: str | Path) -> Any:
    """Return a notebook of docs/notebooks, run in a folder."""
    notebook: Any = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    metadata = notebook.metadata.copy()
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(
        notebook, timeout=1800, resources=resources, record_timing=False
    )
    client.execute()
    notebook.metadata = metadata  # without the version of Python
    return notebook


def _mp3(match: re.Match[str]) -> str:
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(match[1])))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **_MP3)
    return f"data:audio/mpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _palette(match: re.Match[str]) -> str:
    file = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(match[1]))).convert("RGB")
    picture.quantize(_COLOURS).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def reduced(html: str) -> str:
    """Return the HTML of `wavear.display` with smaller sounds and pictures."""
    html = re.sub(r'data:audio/flac;base64,([^"]+)', _mp3, html)
    return re.sub(r'data:image/png;base64,([^"]+)', _palette, html)


def main() -> None:
    """Execute the notebooks of the command line, or all."""
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(name, folder)
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                if "text/html" in output.get("data", {}):
                    output.data["text/html"] = reduced(output.data["text/html"])
        path = FOLDER / f"{name}.ipynb"
        nbformat.write(notebook, path)
        print(f"{path.name}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
