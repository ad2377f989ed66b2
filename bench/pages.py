"""Sections of a page that programs write, each between two comments, so that one does not lose what another wrote."""

from __future__ import annotations

import re
from pathlib import Path

from wavear.common.atomic import replace_file


def write_section(page: Path, name: str, text: str) -> None:
    """Put `text` between `<!-- begin name -->` and `<!-- end name -->` of a page; without these, at its end."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    whole = page.read_text(encoding="utf-8") if page.exists() else ""
    section = f"{begin}\n\n{text.strip()}\n\n{end}"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    found = re.sub(pattern, lambda _: section, whole, count=1, flags=re.DOTALL)
    if found == whole and begin not in whole:
        found = f"{whole.rstrip()}\n\n{section}\n"
    replace_file(page, lambda path: path.write_text(found, encoding="utf-8"))
