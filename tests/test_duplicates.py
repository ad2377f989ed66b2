"""A recording and its links or copies stay on one side: in training, or held out."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from wavear import audio
from wavear.data.corpus import open_corpus
from wavear.data.duplicates import numbered, overlapping

RATE = 8000


def write(path, seed: int, samples: int = 4000):
    path.parent.mkdir(parents=True, exist_ok=True)
    audio.write(path, 0.1 * np.random.default_rng(seed).standard_normal(samples).clip(-9, 9), RATE)
    return path


def contents(recordings) -> set[bytes]:
    return {r.path.read_bytes() for r in recordings}


MAKE = {
    "symlink": lambda source, target: target.symlink_to(source),
    "hard link": lambda source, target: os.link(source, target),
    "copy": lambda source, target: shutil.copyfile(source, target),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())
def test_links_and_copies_stay_on_the_side_of_their_file(tmp_path, make):
    data = tmp_path / "data"
    (data / "b").mkdir(parents=True)
    for n in range(30):  # all of one size
        make(write(data / f"a/{n}.wav", n), data / f"b/other{n}.wav")
    corpus = open_corpus(data, sample_rate=RATE, validation_fraction=0.3)
    assert len(corpus.train) + len(corpus.validation) == 60
    assert len(contents(corpus.validation)) * 2 == len(corpus.validation) > 4
    assert not contents(corpus.train) & contents(corpus.validation)
    assert any("30 of 60 files are links to others or copies" in note for note in corpus.notes)


def test_a_linked_folder_is_found_in_the_second_folder(tmp_path):
    for n in range(4):
        write(tmp_path / f"data/{n}.wav", n)
    (tmp_path / "dev").mkdir()
    shutil.copyfile(tmp_path / "data/1.wav", tmp_path / "dev/renamed.wav")
    (tmp_path / "dev/link.wav").symlink_to(tmp_path / "data/2.wav")
    corpus = open_corpus(tmp_path / "data", sample_rate=RATE, validation=tmp_path / "dev")
    assert [r.name for r in corpus.train] == ["0.wav", "3.wav"]
    assert any("2 recordings of" in note for note in corpus.notes)


def test_the_column_split_keeps_repeats_and_drops_copies_of_what_is_held_out(tmp_path):
    for n in range(3):
        write(tmp_path / f"{n}.wav", n)
    for n in (1, 2):
        shutil.copyfile(tmp_path / f"{n}.wav", tmp_path / f"copy{n}.wav")
    rows = "0.wav,train\n" * 3 + "copy1.wav,train\ncopy2.wav,\n1.wav,dev\n2.wav,test\n"
    (tmp_path / "list.csv").write_text("path,split\n" + rows)
    corpus = open_corpus(tmp_path / "list.csv", sample_rate=RATE)
    assert [r.name for r in corpus.train] == ["0.wav"] * 3  # listed several times on purpose
    assert [r.name for r in corpus.validation] == ["1.wav"]


def test_repeats_without_a_split_stay_together(tmp_path):
    for n in range(6):
        write(tmp_path / f"{n}.wav", n)
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"{n % 6}.wav\n" for n in range(24)))
    corpus = open_corpus(tmp_path / "list.csv", sample_rate=RATE, validation_fraction=0.4)
    assert len(corpus.train) + len(corpus.validation) == 24
    assert not contents(corpus.train) & contents(corpus.validation)


def test_copies_of_one_recording_are_cut(tmp_path):
    write(tmp_path / "a.wav", 0)
    (tmp_path / "b.wav").symlink_to(tmp_path / "a.wav")
    corpus = open_corpus(tmp_path, sample_rate=RATE, validation_fraction=0.25)
    (train,), (held,) = corpus.train, corpus.validation
    assert (train.name, held.name) == ("a.wav", "b.wav#end")
    assert (train.start, train.frames, held.start, held.frames) == (0, 3000, 3000, 1000)


def test_files_that_differ_in_one_byte_are_different(tmp_path):
    paths = [write(tmp_path / f"{n}.wav", 0, 40_000) for n in range(4)]
    for path, at in zip(paths[1:3], (1000, 40_000), strict=True):
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
    missing = [tmp_path / "gone.wav", tmp_path / "lost.wav"]
    numbers = numbered([*paths, *missing]).tolist()
    assert numbers[0] == numbers[3]
    assert len(set(numbers)) == 5


def test_a_copy_of_a_training_clip_is_not_held_out_for_an_evaluation(tmp_path):
    for n in range(2):
        write(tmp_path / f"data/{n}.wav", n)
    write(tmp_path / "clips/new.wav", 9)
    shutil.copyfile(tmp_path / "data/0.wav", tmp_path / "clips/old.wav")
    opened = [open_corpus(tmp_path / name, sample_rate=RATE) for name in ("data", "clips")]
    data, clips = ([*corpus.train, *corpus.validation] for corpus in opened)
    found = {r.name for r, same in zip(clips, overlapping(clips, data), strict=True) if same}
    assert found == {"old.wav"}


def test_validation_on_a_copy_of_all_training_data_is_noted(tmp_path):
    for n in range(2):
        write(tmp_path / f"data/{n}.wav", n)
    shutil.copytree(tmp_path / "data", tmp_path / "dev")
    corpus = open_corpus(tmp_path / "data", sample_rate=RATE, validation=tmp_path / "dev")
    assert (len(corpus.train), len(corpus.validation)) == (2, 2)
    assert any("held-out scores are those of the training data" in note for note in corpus.notes)
