"""Data: recordings are found, split and levelled; a crop's loss is a slice of the whole loss."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wavear import MelConfig, WaveNet, WaveNetConfig, audio, log_mel, mulaw_encode
from wavear.data.corpus import Recording, find, open_corpus, split
from wavear.data.crops import Layout, Order, Segments, collate, read_crop, read_span
from wavear.data.recordings import Builder, Recordings
from wavear.models.crop_loss import crop_loss, layout_of

RATE = 8000
MEL: Any = {"sample_rate": RATE, "n_fft": 256, "window_length": 256, "hop_length": 64, "bands": 8}


def noise(samples: int, seed: int = 0) -> np.ndarray:
    """Return low-passed noise, whose mel is not flat."""
    white = np.random.default_rng(seed).standard_normal(samples + 8)
    return (0.3 * np.convolve(white, np.ones(9) / 9, "valid")).astype(np.float32).clip(-1, 1)


def write(path, samples: int = 4000, seed: int = 0, rate: int = RATE, waveform=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    audio.write(path, noise(samples, seed) if waveform is None else waveform, rate)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("recordings")
    for number in range(12):
        write(root / f"speaker{number % 2}" / f"{number:02}.wav", 2000 + 600 * number, seed=number)
    return root


def make_layout(segment: int = 512, **settings) -> tuple[WaveNet, Layout]:
    torch.manual_seed(0)
    channels = dict.fromkeys(("residual_channels", "skip_channels"), 6)
    base: dict[str, Any] = {
        "layers": 4, "stacks": 2, **channels, "head_channels": 8, "classes": 32,
        "conditioning_channels": 5, "sample_rate": RATE, "mel": MelConfig(**MEL, fmax=4000),
    }  # fmt: skip
    model = WaveNet(WaveNetConfig(**(base | settings))).double()
    return model, layout_of(model, segment)


# --- finding


def test_folders_are_searched_at_any_depth(tmp_path):
    for name in ("b.wav", "a/deep/er/y.wav", "a/x.flac"):
        write(tmp_path / name)
    (tmp_path / "a/x.flac").rename(tmp_path / "a/x.FLAC")
    for other in ("notes.txt", ".hidden.wav", ".trash/z.wav", "a/wav"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text("not audio")
    assert [r.name for r in find(tmp_path)] == ["a/deep/er/y.wav", "a/x.FLAC", "b.wav"]


def test_first_folder_level_names_speakers(folder, tmp_path):
    assert {r.speaker for r in find(folder)} == {None}
    assert all(r.speaker == r.name.split("/")[0] for r in find(folder, speakers=True))
    write(tmp_path / "lone.wav")
    with pytest.raises(ValueError, match=r"lone\.wav has no speaker\. Put it into a sub-folder"):
        find(tmp_path, speakers=True)


def test_missing_data_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder or manifest"):
        find(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no audio files"):
        find(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match="neither an audio file"):
        find(tmp_path / "picture.png")


def test_unusable_files_are_named_and_skipped(tmp_path):
    (tmp_path / "bad.wav").write_text("this is text")
    with pytest.raises(
        ValueError, match=r"none of the files can be used; the first: bad\.wav: is not"
    ):
        open_corpus(tmp_path, sample_rate=RATE)
    for number in range(4):
        write(tmp_path / f"good{number}.wav", seed=number)
    (tmp_path / "empty.flac").write_bytes(b"")
    write(tmp_path / "short.wav", 10)
    corpus = open_corpus(tmp_path, sample_rate=RATE, least_samples=64)
    assert len(corpus.train) + len(corpus.validation) == 4
    reasons = dict(corpus.bad)
    assert set(reasons) == {"bad.wav", "empty.flac", "short.wav"}
    assert reasons["short.wav"] == "has 10 samples at 8000 Hz, fewer than 64"
    assert str(tmp_path) not in reasons["bad.wav"]


def test_other_rates_are_resampled_with_one_note(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.wav", 4000, number, rate=RATE if number else 16000)
    corpus = open_corpus(tmp_path, sample_rate=RATE)
    assert corpus.notes == ["1 of 3 files are resampled to 8000 Hz (from 16000 Hz)"]
    found = {r.name: r.frames for r in corpus.train + corpus.validation}
    assert found == {"0.wav": 2000, "1.wav": 4000, "2.wav": 4000}


# --- splitting


def named(*names: str, splits: dict[str, str] | None = None) -> Recordings:
    """Return recordings of 1000 samples; `a.wav#2.5` starts at 2.5 seconds of the file."""
    builder = Builder(Path())
    for name in names:
        file, _, start = name.partition("#")
        builder.add(file, split=(splits or {}).get(name), start=float(start or 0))
    found = builder.done()
    return dataclasses.replace(found, frames=np.full(len(found), 1000))


def names_of(recordings) -> list[str]:
    return [r.name for r in recordings]


def test_split_of_a_file_is_independent_of_the_others():
    names = [f"{n}.wav" for n in range(200)]
    held = set(names_of(split(named(*names), 0.1)[1]))
    assert 10 <= len(held) <= 32  # 20 expected, within three standard deviations of 4.2
    more = names_of(split(named(*names, *(f"new{n}.wav" for n in range(200))), 0.1)[1])
    assert {name for name in more if not name.startswith("new")} == held
    assert set(names_of(split(named(*names[:50]), 0.1)[1])) == held & set(names[:50])
    assert names_of(split(named(*names[:40]), 0.1)[1]) == ["26.wav"]  # the same on every machine


@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_at_least_one_file_is_on_each_side(count, fraction):
    train, held = split(named(*(f"{n}.wav" for n in range(count))), fraction)
    assert len(train)
    assert len(held)
    assert len(train) + len(held) == count


def test_stretches_of_a_file_stay_together():
    """A name may contain `#`, which also marks the start of a stretch."""
    names = [f"take #{n}.wav{start}" for n in range(40) for start in ("", "#1", "#2.5")]
    builder = Builder(Path())
    for name in names:
        file, _, start = name.partition(".wav#")
        builder.add(file.removesuffix(".wav") + ".wav", start=float(start or 0))
    train, held = split(builder.done(), 0.2)
    assert names_of(builder.done()) == names
    assert len(held) >= 3
    assert not {r.path for r in train} & {r.path for r in held}


def test_column_split_decides():
    given = named("a", "b", "c", "d", splits={"c": "validation", "d": "test"})
    train, held = split(given, 0.9)
    assert (names_of(train), names_of(held)) == (["a", "b"], ["c"])
    with pytest.raises(ValueError, match="no training recordings"):
        split(given.take(slice(2, None)), 0.5)


def test_single_file_is_cut(tmp_path):
    (train,), (held,) = split(named("a.wav"), 0.25)
    assert (train.start, train.frames, held.start, held.frames) == (0, 750, 750, 250)
    assert held.name == "a.wav#end"
    path = write(tmp_path / "a.wav", 4000)
    corpus = open_corpus(path, sample_rate=RATE, validation_fraction=0.02, least_samples=128)
    assert (corpus.train[0].frames, corpus.validation[0].frames) == (3872, 128)
    with pytest.raises(ValueError, match=r"a\.wav is the only recording, and too short"):
        open_corpus(path, sample_rate=RATE, least_samples=2001)


def test_second_folder_is_held_out_and_not_trained_on(tmp_path):
    for seed, name in enumerate(("dev/a.wav", "dev/b.wav", "c.wav", "d.wav")):
        write(tmp_path / "all" / name, seed=seed)
    corpus = open_corpus(tmp_path / "all", sample_rate=RATE, validation=tmp_path / "all" / "dev")
    assert names_of(corpus.train) == ["c.wav", "d.wav"]
    assert names_of(corpus.validation) == ["a.wav", "b.wav"]
    assert any("2 recordings of" in note and "held out" in note for note in corpus.notes)


def test_only_overlapping_stretches_are_held_out(tmp_path):
    write(tmp_path / "long.wav", 8000)
    (tmp_path / "train.csv").write_text("path,start,duration\nlong.wav,0,0.5\nlong.wav,0.4,0.2\n")
    (tmp_path / "dev.csv").write_text("path,start,duration\nlong.wav,0.5,0.5\n")
    corpus = open_corpus(tmp_path / "train.csv", sample_rate=RATE, validation=tmp_path / "dev.csv")
    assert [(r.start, r.frames) for r in corpus.train] == [(0, 4000)]


def test_some_recordings_without_speaker_are_refused(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.wav", 500)
    (tmp_path / "m.csv").write_text("path,speaker\na.wav,ann\nb.wav,\nc.wav,bob\n")
    with pytest.raises(ValueError, match=r"b\.wav has no speaker, and others have"):
        open_corpus(tmp_path / "m.csv", sample_rate=RATE)


# --- levels and silence


def test_levels_are_equalised(tmp_path):
    for number, level in enumerate((0.02, 0.3, 1.0)):
        write(
            tmp_path / f"s{number // 2}" / f"{number}.wav",
            waveform=level * noise(4000) / np.abs(noise(4000)).max(),
        )
    keywords = {"sample_rate": RATE, "speakers": True}

    def peaks(**settings) -> dict[str, float]:
        corpus = open_corpus(tmp_path, **keywords, **settings)
        loaded = {r.name: read_span(r, RATE, 0, 4000) for r in corpus.train + corpus.validation}
        return {name: float(np.abs(waveform).max()) for name, waveform in sorted(loaded.items())}

    assert list(peaks().values()) == pytest.approx([0.02, 0.3, 1.0], abs=1e-3)
    assert list(peaks(normalize="peak").values()) == pytest.approx([0.9, 0.9, 0.9], abs=1e-3)
    by_speaker = peaks(normalize="peak", normalize_by="speaker")
    assert list(by_speaker.values()) == pytest.approx([0.06, 0.9, 0.9], abs=2e-3)
    corpus = open_corpus(tmp_path, normalize="rms", **keywords)
    for recording in corpus.train + corpus.validation:
        rms = np.sqrt(np.mean(read_span(recording, RATE, 0, 4000).astype(np.float64) ** 2))
        assert 20 * np.log10(rms) == pytest.approx(-23, abs=0.05)


def test_silent_ends_are_cut(tmp_path):
    waveform = np.concatenate([np.zeros(8000), noise(4000), np.zeros(8000)]).astype(np.float32)
    write(tmp_path / "a.wav", waveform=waveform)
    write(tmp_path / "b.wav", waveform=waveform)
    for recording in open_corpus(tmp_path, sample_rate=RATE, trim_silence=40).train:
        # The margin is 50 ms, and a frame of the level meter (2048 samples) extends it.
        assert 8000 - 400 - 2048 <= recording.start <= 7600
        assert 4000 + 800 <= recording.frames <= 4000 + 800 + 2 * 2048
        assert np.array_equal(
            read_span(recording, RATE, 0, recording.frames),
            audio.read(recording.path).numpy()[
                recording.start : recording.start + recording.frames
            ],
        )


def test_quiet_segments_are_redrawn(tmp_path):
    waveform = np.concatenate([np.zeros(30000), noise(6000)]).astype(np.float32)
    write(tmp_path / "a.wav", waveform=waveform)
    recordings = [Recording(tmp_path / "a.wav", "a.wav", 0, 36000, RATE)]
    _, layout = make_layout(256)

    def silent(redraw_below) -> float:
        stream = Segments(recordings, layout, redraw_below=redraw_below)
        return float(np.mean([stream[i]["waveform"].any() == 0 for i in range(300)]))

    assert silent(None) > 0.7
    assert silent(-60.0) < 0.5  # 0.83 ** 5 = 0.4


# --- crops


MELS = {
    "middle-reflect": {},
    "start-reflect": {"centre": "start"},
    "middle-zeros": {"padding": "zeros"},
    "start-zeros": {"centre": "start", "padding": "zeros"},
    "odd-hop": {"hop_length": 75, "n_fft": 256, "window_length": 200},
    "hop-is-window": {"hop_length": 256},
}


@pytest.mark.parametrize("samples", [4037, 700, 130], ids=lambda n: f"{n}samples")
@pytest.mark.parametrize("mel", [*MELS, "none"])
def test_crop_loss_equals_slice_of_whole_loss(tmp_path, mel, samples):
    """Crops lie at the start, inside, at the end, or exceed the file; 1e-9 covers float64 sums."""
    config = None if mel == "none" else MelConfig(**(MEL | {"fmax": 4000} | MELS[mel]))
    model, layout = make_layout(300, mel=config, kernel_size=3, speakers=2)
    if samples < layout.hop:
        samples = layout.hop + 1
    write(tmp_path / "a.wav", samples)
    recording = Recording(tmp_path / "a.wav", "a.wav", 0, samples, RATE, speaker="b")
    whole = audio.read(recording.path)[None]
    total = samples // layout.hop * layout.hop
    with torch.no_grad():
        codes = mulaw_encode(whole[:, :total], 32)
        cond = model.condition(
            None if config is None else log_mel(whole, config), torch.tensor([1])
        )
        expected = torch.nn.functional.cross_entropy(model(codes, cond), codes, reduction="none")[0]
    segments = Segments([recording], layout, ["a", "b"])
    starts = sorted({max(start, 0) for start in layout.starts(recording)})
    assert starts[0] == 0
    assert starts[-1] == max(total - layout.window, 0)
    scored = np.zeros(total, dtype=int)
    for start in [*starts[:: max(layout.segment // layout.hop, 1)], starts[-1]]:
        first, last = 0 if start == 0 else layout.receptive_field, min(layout.window, total - start)
        item = segments.item(recording, 0, start, first, last, read_crop(recording, layout, start))
        with torch.no_grad():
            loss, mask = crop_loss(model, collate([item]), layout)
        assert mask[0].nonzero()[[0, -1], 0].tolist() == [first, last - 1]
        torch.testing.assert_close(
            loss[0, first:last], expected[start + first : start + last], atol=1e-9, rtol=0
        )
        assert (loss[0, :first] == 0).all()
        assert (loss[0, last:] == 0).all()
        scored[start + first : start + last] += 1
    assert (scored > 0).all()  # every sample is scored in one of these crops


@pytest.mark.parametrize("samples", [64, 831, 832, 833, 4099])
def test_cover_scores_every_sample_once(samples):
    _, layout = make_layout(256)
    recording = Recording(None, "a", 0, samples, RATE)  # type: ignore[arg-type]
    scored = np.zeros(samples // 64 * 64, dtype=int)
    for start, first, last in layout.cover(recording):
        assert start % layout.hop == 0
        assert start == 0 or first >= layout.receptive_field
        assert last <= layout.window
        scored[start + first : start + last] += 1
    assert (scored == 1).all()


def test_resampled_crop_equals_crop_of_resampled_whole(tmp_path):
    write(tmp_path / "a.wav", 20000, rate=11025)
    whole = audio.read(tmp_path / "a.wav", RATE).numpy()
    recording = open_corpus(tmp_path / "a.wav", sample_rate=RATE).train[0]
    _, layout = make_layout(512)
    for start in (0, 64, 6400):
        crop = read_crop(recording, layout, start).waveform[
            layout.margin : layout.margin + layout.window
        ]
        np.testing.assert_allclose(crop, whole[start : start + layout.window], atol=1e-5)


def test_only_the_needed_part_is_read(tmp_path, monkeypatch):
    write(tmp_path / "a.wav", 200000)
    recording = Recording(tmp_path / "a.wav", "a.wav", 0, 200000, RATE)
    asked = []
    real = audio.read
    monkeypatch.setattr(audio, "read", lambda *a: asked.append(a) or real(*a))
    _, layout = make_layout(512)
    stream = Segments([recording], layout)
    for index in range(20):
        stream[index]
    assert len(asked) == 20
    assert max(frames for *_, frames in asked) <= layout.window + 2 * layout.margin < 3000


# --- the stream


def items_equal(a: dict, b: dict) -> bool:
    return (
        a["span"] == b["span"]
        and a["source"] == b["source"]
        and np.array_equal(a["waveform"], b["waveform"])
    )


def test_item_depends_on_seed_and_number_only(folder):
    recordings = open_corpus(folder, sample_rate=RATE).train
    _, layout = make_layout(512)
    first = [Segments(recordings, layout, seed=3)[i] for i in range(20)]
    stream = Segments(recordings, layout, seed=3)
    for index in np.random.default_rng(0).permutation(20):
        assert items_equal(stream[int(index)], first[int(index)])
    other = Segments(recordings, layout, seed=4)
    assert not any(items_equal(other[i], first[i]) for i in range(20))
    assert len({item["waveform"].tobytes() for item in first}) > 15


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_independent_of_workers(folder, workers):
    recordings = open_corpus(folder, sample_rate=RATE).train
    _, layout = make_layout(512)
    stream = Segments(recordings, layout, seed=1)
    loader = torch.utils.data.DataLoader(
        stream, batch_sampler=Order(4, first_step=7), collate_fn=collate, num_workers=workers
    )
    batches = iter(loader)
    for step in (7, 8, 9):
        batch = next(batches)
        expected = collate([stream[i] for i in range(4 * step, 4 * step + 4)])
        assert torch.equal(batch.waveform, expected.waveform)
        assert torch.equal(batch.span, expected.span)
        assert torch.equal(batch.source, expected.source)


def test_processes_share_a_step():
    steps = [iter(Order(6, 2, rank, 3)) for rank in range(3)]
    assert [i for s in steps for i in next(s)] == list(range(12, 18))
    assert [i for s in steps for i in next(s)] == list(range(18, 24))
    with pytest.raises(ValueError, match="7 crops cannot be shared by 3"):
        Order(7, 0, 0, 3)


def test_loss_starts_after_the_receptive_field(tmp_path):
    """It starts at the first sample if the crop begins the file."""
    write(tmp_path / "a.wav", 5000)
    whole = audio.read(tmp_path / "a.wav").numpy()
    _, layout = make_layout(256)
    stream = Segments([Recording(tmp_path / "a.wav", "a.wav", 0, 5000, RATE)], layout)
    firsts = set()
    for index in range(200):
        item = stream[index]
        window = item["waveform"][layout.margin : layout.margin + layout.window]
        (start,) = [
            s for s in range(0, 5000, 64) if np.array_equal(whole[s : s + layout.window], window)
        ]
        first = 0 if start == 0 else layout.receptive_field
        assert item["span"] == (first, layout.window)
        firsts.add(first)
    assert firsts == {0, layout.receptive_field}


def test_files_are_drawn_by_length_and_crops_uniformly(folder):
    """Tolerance: five standard deviations of the counts."""
    recordings = open_corpus(folder, sample_rate=RATE).train
    _, layout = make_layout(256)
    stream = Segments(recordings, layout)
    items = [stream[i] for i in range(2000)]
    lengths = np.array([layout.length(r) for r in recordings])
    expected = 2000 * lengths / lengths.sum()
    counts = np.bincount([item["source"] for item in items], minlength=len(recordings))
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
    first = np.mean([item["span"][0] == 0 for item in items])
    per_file = np.array(
        [(layout.context // layout.hop + 1) / len(layout.starts(r)) for r in recordings]
    )
    chance = (per_file * lengths / lengths.sum()).sum()
    assert first == pytest.approx(chance, abs=5 * np.sqrt(chance / 2000))


def test_unreadable_file_is_skipped_and_reported(folder, tmp_path):
    recordings = open_corpus(folder, sample_rate=RATE).train
    gone = Recording(tmp_path / "gone.wav", "gone.wav", 0, 50000, RATE)
    _, layout = make_layout(512)
    stream = Segments([*recordings, gone], layout)
    batch = collate([stream[i] for i in range(30)])
    assert {name for name, _ in batch.skipped} == {"gone.wav"}
    assert (batch.source < len(recordings)).all()
    for index in range(30):  # as in a worker that has not drawn the file yet
        assert items_equal(Segments([*recordings, gone], layout)[index], stream[index])
    with pytest.raises(ValueError, match="none of 1000 files drawn could be read"):
        Segments([gone], layout)[0]


def test_stretch_is_read_from_its_start(tmp_path):
    write(tmp_path / "a.wav")
    recording = Recording(tmp_path / "a.wav", "a.wav", 1000, 2000, RATE)
    whole = audio.read(tmp_path / "a.wav").numpy()
    assert np.array_equal(read_span(recording, RATE, 10, 500), whole[1010:1500])
    doubled = dataclasses.replace(recording, gain=2.0)
    assert np.array_equal(read_span(doubled, RATE, 10, 500), (2 * whole[1010:1500]).clip(-1, 1))
