"""Manifests: separators, quotation marks, blanks, and the lists of other projects."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_data import write

from wavear import audio
from wavear.audio.reading import ENDINGS
from wavear.data.corpus import find, open_corpus
from wavear.generation.jobs import plan

ROWS = [
    {"path": "a.wav", "speaker": "ann", "split": "train"},
    {"path": "sub/b.wav", "start": 0.125, "duration": 0.25, "speaker": "bob", "split": "dev"},
]


def manifest_text(separator: str | None) -> str:
    if separator is None:
        return "\n".join(map(json.dumps, ROWS)) + "\n"
    keys = ["path", "start", "duration", "speaker", "split"]
    rows = [separator.join(str(row.get(key, "")) for key in keys) for row in ROWS]
    return "\n".join([separator.join(keys), *rows]) + "\n"


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_manifest_columns(tmp_path, kind):
    write(tmp_path / "a.wav")
    write(tmp_path / "sub/b.wav")
    separator = {"csv": ",", "tsv": "\t"}.get(kind)
    (tmp_path / f"list.{kind}").write_text(manifest_text(separator))
    corpus = open_corpus(tmp_path / f"list.{kind}", sample_rate=8000)
    (a,), (b,) = corpus.train, corpus.validation
    assert (a.name, a.start, a.frames, a.speaker) == ("a.wav", 0, 4000, "ann")
    assert (b.name, b.start, b.frames, b.speaker) == ("sub/b.wav#0.125", 1000, 2000, "bob")
    assert corpus.speakers == ["ann", "bob"]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (
            "path,start\na.wav,-1\n",
            "m.csv",
            r"m\.csv:2: start is '-1', expected seconds, 0 or more",
        ),
        ("path,start\na.wav,soon\n", "m.csv", r"m\.csv:2: start is 'soon'"),
        ("path,split\na.wav,both\n", "m.csv", r"m\.csv:2: split is 'both', expected train"),
        ("file,text\na.wav,x\n", "m.csv", r"m\.csv:2: no path\..* the columns are file, text"),
        ("a.wav\nb.wav\n", "m.txt", r"m\.txt:2: no path\..* a\.wav \(the first line is the header"),
        (
            "path,speaker\n,ann\n",
            "m.csv",
            r"m\.csv:2: path is '', expected the name of an audio file",
        ),
        ("a.wav,hello\nb.wav,x\n", "m.csv", r"m\.csv:2: .* a\.wav, hello \(the first line is the"),
        ("path|text\na.wav|x|y\n", "m.csv", r"m\.csv:2: has 3 values for 2 columns: remove"),
        ('{"path": 3}\n', "m.jsonl", r"m\.jsonl:1: path is 3, expected the name"),
        ("path,text\na.wav,well, no\n", "m.csv", r"m\.csv:2: has 3 values for 2 columns: quote"),
        ("path,path\na.wav,b.wav\n", "m.csv", r"m\.csv:1: the column `path` is there twice"),
        ('{"path": "a.wav"}\nnot json\n', "m.jsonl", r"m\.jsonl:2 is not JSON"),
        ('[{"path": "a.wav"}, 1]', "m.json", r"m\.json:entry 2 is not a JSON object: 1"),
        ('[{"path": "a.wav"}, {"path": 1}]', "m.json", r"m\.json:entry 2: path is 1, expected"),
        ('[{"path": "a.wav"},', "m.json", r"m\.json is not JSON: "),
        ("[]", "m.json", r"m\.json lists no recordings"),
        ("[1]\n", "m.jsonl", r"m\.jsonl:1 is not a JSON object"),
        ("", "m.csv", r"m\.csv lists no recordings"),
        ("path\n\n", "m.csv", r"m\.csv lists no recordings"),
    ],
)
def test_invalid_manifest_is_refused_with_its_line(tmp_path, text, name, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        find(tmp_path / name)


@pytest.mark.parametrize("text", ['[\n {"path": "a.wav"},\n {"path": "b.wav"}\n]',
                                  '{"path": "a.wav"}\n{"path": "b.wav"}\n'])  # fmt: skip
def test_a_json_file_is_an_array_or_has_an_object_in_each_line(tmp_path, text):
    (tmp_path / "m.json").write_text("\ufeff" + text, encoding="utf-8")
    assert [r.name for r in find(tmp_path / "m.json")] == ["a.wav", "b.wav"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_manifest_in_another_encoding_is_refused_with_the_remedy(tmp_path, encoding):
    (tmp_path / "m.csv").write_text("path,text\na.wav,schön\n", encoding=encoding)
    with pytest.raises(ValueError, match=r"m\.csv is not UTF-8 .*: save it as UTF-8"):
        find(tmp_path / "m.csv")


def test_empty_values_after_the_last_column_are_dropped(tmp_path):
    (tmp_path / "m.csv").write_text("path,speaker\na.wav,ann,,\nb.wav\n")
    assert [(r.name, r.speaker) for r in find(tmp_path / "m.csv")] == [
        ("a.wav", "ann"),
        ("b.wav", None),
    ]


def test_missing_files_and_held_out_rows_name_the_manifest(tmp_path):
    manifest = tmp_path / "m.csv"
    manifest.write_text("path\nno/a.wav\n")
    reason = f"the first: no/a.wav: No such file or directory; paths are relative to {tmp_path}"
    with pytest.raises(ValueError, match=re.escape(reason) + "$"):
        open_corpus(manifest, sample_rate=8000)
    manifest.write_text("path\nm.csv\n")
    with pytest.raises(ValueError, match=r"the first: m\.csv: [^;]*$"):
        open_corpus(manifest, sample_rate=8000)
    write(tmp_path / "a.wav")
    for split in ("dev", "test"):
        manifest.write_text(f"path,split\na.wav,{split}\n")
        with pytest.raises(ValueError, match=r"m\.csv: no training recordings"):
            open_corpus(manifest, sample_rate=8000)


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


@pytest.mark.parametrize("header", ["path | speaker", " Path|Speaker ", '"path"|"speaker"'])
def test_blanks_around_bars_are_dropped(tmp_path, header):
    (tmp_path / "list.txt").write_text(f"{header}\na b.wav | ann \n")
    assert [(r.name, r.speaker) for r in find(tmp_path / "list.txt")] == [("a b.wav", "ann")]


def test_the_metadata_of_lj_speech_is_a_manifest(tmp_path):
    (tmp_path / "wavs").mkdir()
    for name in ("LJ001-0001.wav", "LJ001-0002.flac"):
        (tmp_path / "wavs" / name).touch()
    (tmp_path / "metadata.csv").write_text(
        'LJ001-0001|"Printing, in 1|Printing, in one\nLJ001-0002 |b|c\nLJ001-0003|d|e\n'
    )
    names = ["wavs/LJ001-0001.wav", "wavs/LJ001-0002.flac", "LJ001-0003"]
    assert [r.name for r in find(tmp_path / "metadata.csv")] == names


def test_lj_speech_itself(data_dir):
    metadata = data_dir / "ljspeech_mini" / "metadata.csv"
    if not metadata.is_file():
        pytest.skip(f"no {metadata}")
    assert all(Path(str(r.path)).is_file() for r in find(metadata))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nemo.json", '{"audio_filepath": "a.wav", "offset": 1.5, "duration": 2, "text": "x"}'),
        ("metadata.jsonl", '{"file_name": "a.wav", "Start": 1.5, "end": 3.5}'),
        ("metadata.csv", "file_name,start,end,duration\na.wav,1.5,3.5,2.004"),
        ("list.tsv", "Path\tstart\tend\na.wav\t1.5\t3.5"),
    ],
)
def test_columns_of_other_projects(tmp_path, name, text):
    (tmp_path / name).write_text(text + "\n")
    assert [(r.path, r.span) for r in find(tmp_path / name)] == [(tmp_path / "a.wav", (1.5, 2.0))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('"start": 2, "end": 2', "end is 2, expected more than the start, 2 s"),
        ('"start": 1, "end": 3, "duration": 3', "duration is 3 and end 3: keep one"),
        ('"start": 1, "offset": 2', "start is 1 and offset 2: keep one"),
        ('"end": "soon"', "end is 'soon', expected seconds"),
    ],
)
def test_columns_that_contradict_each_other_are_refused(tmp_path, row, message):
    (tmp_path / "list.jsonl").write_text(f'{{"path": "a.wav", {row}}}\n')
    with pytest.raises(ValueError, match=rf"list\.jsonl:1: {message}"):
        find(tmp_path / "list.jsonl")


@pytest.mark.parametrize("ending", audio.SUFFIXES)
def test_every_format_is_found_and_planned_by_its_ending(tmp_path, ending):
    containers = {e: name for name, endings in ENDINGS.items() for e in endings}
    container, subtype = containers[ending], {".opus": "OPUS"}.get(ending)
    file, wave = tmp_path / f"a{ending.upper()}", 0.3 * np.sin(np.arange(8000) / 20)
    soundfile.write(file, wave, 8000, subtype, format=container)
    corpus = open_corpus(tmp_path, sample_rate=8000)
    assert [r.path for r in corpus.train] == [file]
    assert [job.source for job in plan([file, tmp_path], tmp_path / "out", ".npz")] == [file]
    assert audio.read(file, 8000).shape == (8000,)


def test_recordings_shorter_than_in_the_list_are_noted(tmp_path):
    """Durations are rounded, so a tenth of a second less is not noted."""
    for level, name in enumerate(("a", "b", "c"), 1):
        soundfile.write(tmp_path / f"{name}.wav", np.full(1000, 0.1 * level), 8000)
    path = tmp_path / "list.csv"
    path.write_text("path,start,duration\na.wav,0,0.2\nb.wav,0.02,1\nc.wav,,\n")
    (note,) = open_corpus(path, sample_rate=8000).notes
    assert note == f"{path}: 1 recording shorter than it states; the first: b.wav#0.02"
