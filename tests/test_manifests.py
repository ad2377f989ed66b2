"""Manifests: separators, quotation marks, blanks, and the lists of other projects."""

from __future__ import annotations

import pytest

from wavear.data.corpus import find

LINES = [f"{n}.wav@{text}@ann" for n, text in enumerate(["a", '"b', "c", 'd"', '"e" f', "g", '"h'])]


@pytest.mark.parametrize("separator", ["\t", "|"])
def test_quotation_marks_in_a_text_column_are_characters(tmp_path, separator):
    text = "\n".join(["path@text@speaker", *LINES]) + "\n"
    (tmp_path / "list.csv").write_text(text.replace("@", separator))
    assert [(r.name, r.speaker) for r in find(tmp_path / "list.csv")] == [
        (f"{n}.wav", "ann") for n in range(len(LINES))
    ]


def test_quoted_values_of_a_tab_separated_list_are_unquoted(tmp_path):
    (tmp_path / "list.tsv").write_text('"path"\t"speaker"\n"my ""a"".wav"\t"ann b"\n')
    assert [(r.name, r.speaker) for r in find(tmp_path / "list.tsv")] == [('my "a".wav', "ann b")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a.wav,"x\nb.wav,y\nc.wav,z\n', r"list\.csv:2: unexpected end of data, up to line 4\."),
        ('a.wav,x\nb.wav,"y\nc.wav,"z"\n', r"list\.csv:3: ',' expected .* up to line 4\. Balance"),
    ],
)
def test_an_unbalanced_quotation_mark_between_commas_is_refused(tmp_path, text, message):
    (tmp_path / "list.csv").write_text("path,text\n" + text)
    with pytest.raises(ValueError, match=message):
        find(tmp_path / "list.csv")


def test_a_quoted_text_of_several_lines_is_one_value(tmp_path):
    (tmp_path / "list.csv").write_text('path,text\na.wav,"x, ""y""\nz"\nb.wav,w\n')
    assert [r.name for r in find(tmp_path / "list.csv")] == ["a.wav", "b.wav"]
