"""Sections of a page, each between two comments, that programs write independently."""

from __future__ import annotations

import re
from pathlib import Path

from wavear.common.atomic import replace_file


def write_section(page: Path, name: str, text: str) -> None:
    """Put `text` between `<!-- begin name -->` and `<!-- end name -->`, else at the page's end."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    whole = page.read_text(encoding="utf-8") if page.exists() else ""
    section = f"{begin}\n\n{text.strip()}\n\n{end}"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    found = re.sub(pattern, lambda _: section, whole, count=1, flags=re.DOTALL)
    if found == whole and begin not in whole:
        found = f"{whole.rstrip()}\n\n{section}\n"
    replace_file(page, lambda path: path.write_text(found, encoding="utf-8"))
