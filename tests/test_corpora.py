"""Published corpora in miniature, read through torchaudio's data sets."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

import wavear
from wavear import TrainConfig, audio, cli, corpora
from wavear.data.corpus import open_corpus
from wavear.training import corpus_run


def clip(path: Path, rate: int, seconds: float = 0.3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    audio.write(
        path, np.random.default_rng(0).normal(0, 0.1, int(seconds * rate)).astype(np.float32), rate
    )


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def ljspeech(data: Path) -> None:
    names = ["LJ001-0001", "LJ001-0026", "LJ002-0025", "LJ050-0001"]
    for name in names:
        clip(data / "LJSpeech-1.1" / "wavs" / f"{name}.wav", 22050)
    text(
        data / "LJSpeech-1.1" / "metadata.csv",
        "".join(f'{name}|A "text, of sorts|a text\n' for name in names),
    )


def cmu_arctic(data: Path, voices: tuple[str, ...] = ("slt",)) -> None:
    for voice in voices:
        folder = data / "ARCTIC" / f"cmu_us_{voice}_arctic"
        names = ["arctic_a0019", "arctic_a0020", "arctic_b0001", "arctic_b0540"]
        for name in names:
            clip(folder / "wav" / f"{name}.wav", 16000)
        text(
            folder / "etc" / "txt.done.data",
            "".join(f"( {name} \"Not at this, 'Tom'.\" )\n" for name in names),
        )


def vctk(data: Path) -> None:
    folder = data / "VCTK-Corpus-0.92"
    for speaker, numbers in {
        "p225": (1, 20, 366),
        "p226": (1, 40),
        "p280": (1,),
        "s5": (1, 2),
    }.items():
        for number in numbers:
            name = f"{speaker}_{number:03d}"
            text(folder / "txt" / speaker / f"{name}.txt", "Please call Stella.\n")
            for microphone in ("mic1", "mic2") if speaker != "p280" else ("mic1",):
                clip(
                    folder / "wav48_silence_trimmed" / speaker / f"{name}_{microphone}.flac", 48000
                )
    text(folder / "speaker-info.txt", "ID  AGE  GENDER  ACCENTS  REGION COMMENTS\n")


def yesno(data: Path) -> None:
    for number in range(11):
        clip(data / "waves_yesno" / ("_".join(f"{number:08b}") + ".wav"), 8000)
    text(data / "waves_yesno" / "README", "Sixty recordings, of which these are eleven.\n")


def libritts(data: Path) -> None:
    for subset, readers in {"train-clean-100": ("103", "1034"), "dev-clean": ("84",)}.items():
        for reader in readers:
            for utterance in ("000001_000000", "000003_000002"):
                name = data / "LibriTTS" / subset / reader / "1241" / f"{reader}_1241_{utterance}"
                clip(Path(f"{name}.wav"), 24000)
                text(Path(f"{name}.original.txt"), "matter")
                text(Path(f"{name}.normalized.txt"), "matter")


def digits(data: Path) -> None:
    for speaker in ("george", "jackson"):
        for digit in (0, 7):
            for index in (0, 4, 5, 9, 10, 49):
                clip(data / "recordings" / f"{digit}_{speaker}_{index}.wav", 8000, 0.25)


MINIATURES = {
    "ljspeech": ljspeech,
    "tts": ljspeech,
    "cmu_arctic": cmu_arctic,
    "vctk": vctk,
    "yesno": yesno,
    "libritts": libritts,
    "digits": digits,
}

# By corpus: the ends of the held-out names, the number of clips trained on, and the speakers.
EXPECTED = {
    corpora.LJSpeech(): ("ljspeech", {"LJ001-0001.wav", "LJ002-0025.wav"}, 2, []),
    corpora.CMUArctic(): ("cmu_arctic", {"arctic_a0020.wav", "arctic_b0540.wav"}, 2, ["slt"]),
    corpora.VCTK(): (
        "vctk",
        {"p225_020_mic1.flac", "p226_040_mic1.flac"},
        6,
        ["p225", "p226", "p280", "s5"],
    ),
    corpora.VCTK("mic2"): (
        "vctk",
        {"p225_020_mic2.flac", "p226_040_mic2.flac"},
        5,
        ["p225", "p226", "s5"],
    ),
    corpora.YesNo(): ("yesno", {"0_0_0_0_1_0_0_1.wav"}, 10, []),
    corpora.LibriTTS(): (
        "libritts",
        {"84_1241_000001_000000.wav", "84_1241_000003_000002.wav"},
        4,
        ["103", "1034", "84"],
    ),
    corpora.Digits(): (
        "digits",
        {
            f"{digit}_{speaker}_{index}.wav"
            for digit in (0, 7)
            for speaker in ("george", "jackson")
            for index in (5, 9)
        },
        8,
        ["george", "jackson"],
    ),
}


def config(data: Path, out: Path, **settings) -> TrainConfig:
    return TrainConfig(data=str(data), out=str(out), **settings)


@pytest.mark.parametrize("corpus", EXPECTED, ids=str)
def test_corpus_is_listed(tmp_path: Path, corpus: corpora.PublishedCorpus):
    """Every clip has its split and speaker; the data stay unchanged."""
    miniature, held_out, trained_on, speakers = EXPECTED[corpus]
    MINIATURES[miniature](tmp_path / "data")
    before = sorted((tmp_path / "data").rglob("*"))
    listed = corpus_run.listed(corpus, config(tmp_path / "data", tmp_path / "runs" / "x"))
    assert listed.data == str(tmp_path / "runs" / "x.csv")
    assert listed.out == str(tmp_path / "runs" / "x")
    opened = open_corpus(listed.data, sample_rate=16000)
    assert opened.bad == []
    assert {Path(recording.name).name for recording in opened.validation} == held_out
    assert len(opened.train) == trained_on
    assert opened.speakers == speakers
    for recording in opened.train + opened.validation:
        assert recording.speaker is None or recording.speaker in str(recording.path).replace(
            os.sep, "/"
        )
    assert sorted((tmp_path / "data").rglob("*")) == before


def test_arctic_voices_hold_out_the_same_sentences(tmp_path: Path):
    cmu_arctic(tmp_path, ("bdl", "slt"))
    clips = corpora.CMUArctic(("slt", "bdl")).clips(tmp_path)
    assert {(clip.speaker, clip.path.stem) for clip in clips if clip.split == "validation"} == {
        (voice, name) for voice in ("slt", "bdl") for name in ("arctic_a0020", "arctic_b0540")
    }
    assert len(clips) == 8


def test_digits_keep_their_test_set(tmp_path: Path):
    digits(tmp_path)
    clips = corpora.Digits().clips(tmp_path)
    tested = {int(clip.path.stem.split("_")[2]) for clip in clips if clip.split == "test"}
    assert tested == {0, 4}
    clip(tmp_path / "recordings" / "seven.wav", 8000)
    with pytest.raises(
        ValueError, match=r"seven\.wav has another form than DIGIT_SPEAKER_INDEX\.wav"
    ):
        corpora.Digits().clips(tmp_path)


@pytest.mark.parametrize("corpus", EXPECTED, ids=str)
def test_missing_corpus_is_refused_with_its_source(tmp_path: Path, corpus: corpora.PublishedCorpus):
    with pytest.raises(FileNotFoundError) as refusal:
        corpus_run.listed(corpus, config(tmp_path / "data", tmp_path / "runs" / "x"))
    message = str(refusal.value)
    assert f"{tmp_path / 'data'} has no folder {corpus.folder(corpus.parts()[0])}" in message
    assert corpus.size(corpus.parts()) in message
    assert ("--download" in message) is (corpus.get is None)
    assert list(tmp_path.iterdir()) == []


def test_missing_part_is_named_with_its_size(tmp_path: Path):
    libritts(tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match=r"no folder LibriTTS/train-clean-360 \(LibriTTS\): get it with --download, 28 GB",
    ):
        corpora.LibriTTS(("train-clean-100", "train-clean-360")).clips(tmp_path)


@pytest.mark.parametrize(
    ("miniature", "corpus", "lost"),
    [
        (ljspeech, corpora.LJSpeech(), "LJSpeech-1.1/metadata.csv"),
        (cmu_arctic, corpora.CMUArctic(), "ARCTIC/cmu_us_slt_arctic/etc/txt.done.data"),
    ],
)
def test_corpus_without_its_list_is_refused(
    tmp_path: Path, miniature, corpus: corpora.PublishedCorpus, lost: str
):
    miniature(tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(FileNotFoundError, match="is not a complete") as refusal:
        corpus.clips(tmp_path)
    assert str(tmp_path / lost) in str(refusal.value)


def test_empty_corpus_is_refused(tmp_path: Path):
    (tmp_path / "waves_yesno").mkdir()
    with pytest.raises(ValueError, match="lists no recordings"):
        corpora.YesNo().clips(tmp_path)


def test_unknown_parts_are_refused():
    with pytest.raises(ValueError, match="voices has 'xyz', expected one of aew, "):
        corpora.CMUArctic(("slt", "xyz"))
    with pytest.raises(
        ValueError,
        match="'dev-clean', expected one of train-clean-100, train-clean-360, train-other-500",
    ):
        corpora.LibriTTS(("dev-clean",))
    with pytest.raises(ValueError, match="subsets is empty"):
        corpora.LibriTTS(())
    with pytest.raises(ValueError, match="microphone has 'mic3'"):
        corpora.VCTK("mic3")


def test_untrained_speakers_are_refused(tmp_path: Path):
    libritts(tmp_path / "data")
    with pytest.raises(ValueError, match=r"not trained on, such as 84: drop --speakers"):
        corpus_run.listed(
            corpora.LibriTTS(), config(tmp_path / "data", tmp_path / "x", speakers=True)
        )
    vctk(tmp_path / "data")
    corpus_run.listed(corpora.VCTK(), config(tmp_path / "data", tmp_path / "x", speakers=True))


def test_manifest_is_replaced_only_with_overwrite(tmp_path: Path):
    """An equal one stays; another is refused, kept by `resume`, replaced by `overwrite`."""
    yesno(tmp_path / "data")
    given = config(tmp_path / "data", tmp_path / "x")
    manifest = tmp_path / "x.csv"
    corpus_run.listed(corpora.YesNo(), given)
    written = manifest.read_bytes()
    os.utime(manifest, (1, 1))
    corpus_run.listed(corpora.YesNo(), given)
    assert manifest.stat().st_mtime == 1
    manifest.write_text("path\nmine.wav\n")
    with pytest.raises(FileExistsError, match=r"x\.csv exists with other contents"):
        corpus_run.listed(corpora.YesNo(), given)
    resumed = corpus_run.listed(
        corpora.YesNo(), config(tmp_path / "data", tmp_path / "x", resume=True)
    )
    assert resumed.data == str(manifest)
    assert manifest.read_text() == "path\nmine.wav\n"
    corpus_run.listed(corpora.YesNo(), config(tmp_path / "data", tmp_path / "x", overwrite=True))
    assert manifest.read_bytes() == written


def test_a_manifest_given_as_data_is_unchanged(tmp_path: Path):
    (tmp_path / "mine.csv").write_text("path\nmine.wav\n")
    given = config(tmp_path / "mine.csv", tmp_path / "x")
    assert corpus_run.listed(corpora.YesNo(), given) == given
    assert not (tmp_path / "x.csv").exists()


def test_manifest_paths_work_through_links(tmp_path: Path):
    """Data and runs are links to other disks, where `..` leads elsewhere."""
    yesno(tmp_path / "disk" / "a" / "b" / "data")
    (tmp_path / "scratch" / "runs").mkdir(parents=True)
    (tmp_path / "data").symlink_to(tmp_path / "disk" / "a" / "b" / "data")
    (tmp_path / "runs").symlink_to(tmp_path / "scratch" / "runs")
    listed = corpus_run.listed(corpora.YesNo(), config(tmp_path / "data", tmp_path / "runs" / "x"))
    assert open_corpus(listed.data, sample_rate=8000).bad == []
    assert not any(line.startswith("/") for line in Path(listed.data).read_text().splitlines())


class Fetched(corpora.YesNo):
    """Stand-in that writes its downloads here; torchaudio tests its own class."""

    breaks: BaseException | None = None

    def dataset(self, data: Path, part: str, download: bool = False):
        if download:
            yesno(data)
            if self.breaks is not None:
                raise self.breaks
        return super().dataset(data, part)


def test_download_gets_missing_parts_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = tmp_path / "new" / "data"
    assert Fetched().download(data) == [data / "waves_yesno"]
    assert len(Fetched().clips(data)) == 11
    monkeypatch.setattr(Fetched, "breaks", RuntimeError("must not be called"))
    assert Fetched().download(data) == [data / "waves_yesno"]


@pytest.mark.parametrize(
    ("broken", "raised", "message"),
    [
        (
            RuntimeError("invalid hash value"),
            OSError,
            "YesNo cannot be downloaded to .*: invalid hash value",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
)
def test_failed_download_leaves_no_part(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: BaseException,
    raised: type[BaseException],
    message: str,
):
    monkeypatch.setattr(Fetched, "breaks", broken)
    (tmp_path / "mine.wav").touch()
    with pytest.raises(raised, match=message):
        Fetched().download(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.wav"]


def test_download_is_a_flag_of_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """It refuses several processes; corpora that torchaudio cannot download lack the flag."""

    def status(corpus: corpora.PublishedCorpus, *flags: str) -> int:
        monkeypatch.setattr("sys.argv", ["train.py", *flags])
        with pytest.raises(SystemExit) as stop:
            cli.recipe(config(tmp_path / "data", tmp_path / "x"), "Train.", corpus)
        assert isinstance(stop.value.code, int)
        return stop.value.code

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert status(Fetched(), "--download") == 1
    assert "without torchrun" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    assert list(tmp_path.iterdir()) == []
    assert status(Fetched(), "--download") == 0
    assert f"{tmp_path / 'data' / 'waves_yesno'} is there" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert status(corpora.Digits(), "--download") == 2


def test_missing_torchaudio_is_one_line_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ljspeech(tmp_path)
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    with pytest.raises(wavear.WavearError, match=r'pip install "wavear\[corpora\]"'):
        corpora.LJSpeech().clips(tmp_path)
