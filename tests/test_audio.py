"""Audio files: read whole or in part, to their end; written atomically."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator

import numpy as np
import pytest
import soundfile
import torch
from audio_files import KINDS, LOSSLESS, RATE, encode, nobody, sound

from wavear import audio
from wavear.audio import reading

# --- reading


@pytest.mark.parametrize("kind", KINDS)
def test_reads_every_format(tmp_path, kind):
    path = encode(tmp_path / f"a.{kind}")
    waveform = audio.read(path)
    assert waveform.dtype == torch.float32
    assert waveform.shape == (40_000,)
    assert audio.info(str(path)) == audio.AudioInfo(24000 if kind == "opus" else RATE, 40_000, 1)
    if kind in LOSSLESS:
        np.testing.assert_array_equal(waveform.numpy(), sound())
    else:
        # The decoder's own arithmetic varies by a bit with the alignment of its buffers.
        np.testing.assert_allclose(
            waveform.numpy(), soundfile.read(path, dtype="float32")[0], rtol=0, atol=1e-6
        )
        # libsndfile's Opus comes back one sample early, which costs 0.19 of a sweep up to 3.5 kHz.
        assert np.corrcoef(waveform.numpy(), sound())[0, 1] > (0.7 if kind == "opus" else 0.97)


@pytest.mark.parametrize(
    "subtype", ["PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM"]
)
def test_reads_every_kind_of_wav(tmp_path, subtype):
    path = encode(tmp_path / "a.wav", subtype=subtype)
    tolerance = {"PCM_U8": 1 / 128, "ULAW": 0.03, "IMA_ADPCM": 0.3}.get(subtype, 0)
    np.testing.assert_allclose(audio.read(path)[:40_000].numpy(), sound(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_averages_channels(tmp_path, kind):
    left, right = sound(seed=1), sound(seed=2)[::-1]
    path = encode(tmp_path / f"a.{kind}", np.stack([left, right], axis=1))
    assert audio.info(path).channels == 2
    tolerance = 1e-7 if kind in LOSSLESS else 0.3
    np.testing.assert_allclose(audio.read(path).numpy(), (left + right) / 2, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "rate"),
    [(kind, rate) for kind in KINDS for rate in (None, RATE)]
    + [("wav", 16000), ("mp3", 44100), ("ogg", 8000)],
)
def test_a_part_equals_the_slice_of_the_whole(tmp_path, kind, rate):
    path = encode(tmp_path / f"a.{kind}", sound(60_000))
    whole = audio.read(path, rate)
    starts = [
        0,
        1,
        500,
        5000,
        len(whole) // 2,
        len(whole) - 9000,
        len(whole) - 4001,
        len(whole) - 77,
        len(whole) - 1,
    ]
    for start in starts:
        for frames in (1, 3000, None):
            part = audio.read(path, rate, start=start, frames=frames)
            expected = whole[start : None if frames is None else start + frames]
            # MP3 and resampling: float32 rounding, in another order. The rest is exact.
            exact = kind != "mp3" and rate in (None, RATE)
            torch.testing.assert_close(part, expected, rtol=0, atol=0 if exact else 1e-6)


@pytest.mark.parametrize(
    ("kind", "samples", "options"),
    [
        ("ogg", 55_555, {}),
        ("ogg", 200_000, {}),
        ("mp3", 200_000, {"bitrate_mode": "VARIABLE", "compression_level": 0.9}),
        ("mp3", 200_000, {"bitrate_mode": "CONSTANT", "compression_level": 0.9}),
    ],
)
def test_parts_are_exact_where_libsndfile_seeks_wrongly(tmp_path, kind, samples, options):
    # Pins a bug of libsndfile 1.2.2: seeking misses the sample in the last page of an Ogg file, and
    # leaves the decoder of an MP3 file in a wrong state.
    path = encode(tmp_path / f"a.{kind}", sound(samples), **options)
    whole = audio.read(path).numpy()
    wrong = 0
    for start in range(samples - 30_000, samples, 700):
        expected = whole[start : start + 500]
        np.testing.assert_allclose(
            audio.read(path, start=start, frames=500).numpy(), expected, rtol=0, atol=1e-6
        )
        with soundfile.SoundFile(path) as file:
            file.seek(start)
            wrong += not np.allclose(file.read(500), expected, rtol=0, atol=1e-6)
    assert wrong > 0, "libsndfile now seeks correctly: simplify audio._decode"


@pytest.mark.parametrize(
    ("ending", "subtype"),
    [("wav", "GSM610"), ("wav", "G721_32"), ("wav", "NMS_ADPCM_24"), ("au", "G723_40")],
)
@pytest.mark.parametrize("rate", [None, 11025])
def test_parts_of_files_without_seeking_are_exact_and_decoded_once(
    tmp_path, monkeypatch, ending, subtype, rate
):
    path = encode(tmp_path / f"a.{ending}", rate=8000, subtype=subtype)
    with soundfile.SoundFile(path) as file:
        count = file.frames
        expected = file.read(count, dtype="float32")
    np.testing.assert_array_equal(audio.read(path).numpy(), expected)
    whole, reads = audio.read(path, rate), []
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: reads.append(1))
    for start in (1, 5000, len(whole) - 500):
        part = audio.read(path, rate, start=start, frames=500)
        torch.testing.assert_close(part, whole[start : start + 500], rtol=0, atol=1e-6)
    assert not reads


def test_only_the_part_is_decoded(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.flac", sound(200_000))
    decoded = []
    original = soundfile.SoundFile.read

    def read(self, frames=-1, *arguments, **options):
        decoded.append(frames)
        return original(self, frames, *arguments, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    audio.read(path, start=100_000, frames=1000)
    audio.read(path, sample_rate=16000, start=100_000, frames=1000)
    assert decoded[0] == 1000
    # 1378 samples at the file's rate, the resampler's margin of 353 on each side, and up to one
    # step of 441, since reading starts on a multiple of it.
    assert 1378 + 2 * 353 <= decoded[1] <= 1378 + 2 * 353 + 441 + 3


@pytest.mark.parametrize(
    ("from_rate", "to_rate"), [(48000, 22050), (44100, 16000), (8000, 22050), (22050, 22051)]
)
def test_a_resampled_file_has_the_rounded_number_of_samples(tmp_path, from_rate, to_rate):
    for samples in (2, 3, 147, 9999, 33_744, 48_160):
        path = encode(tmp_path / "a.wav", sound(samples), from_rate)
        whole = audio.read(path, to_rate)
        assert len(whole) == (2 * samples * to_rate + from_rate) // (2 * from_rate)
        assert whole[-1] != 0  # no padding


def test_a_part_ends_at_the_end_of_the_file(tmp_path):
    path = encode(tmp_path / "a.wav")
    assert len(audio.read(path, start=39_990, frames=1000)) == 10
    with pytest.raises(
        audio.AudioError,
        match=r"a\.wav: start 40000 lies beyond its end \(40000 samples at 22050 Hz\)",
    ):
        audio.read(path, start=40_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": -1}, "start is -1, expected 0 or more"),
        ({"frames": 0}, "frames is 0, expected 1 or more"),
        ({"start": 1.5}, r"start is 1\.5, expected an integer"),
        ({"sample_rate": 999}, "sample rate is 999 Hz, expected 1000 to 384000"),
        ({"sample_rate": 400_000}, "sample rate is 400000 Hz, expected 1000 to 384000"),
    ],
    ids=str,
)
def test_invalid_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        audio.read(encode(tmp_path / "a.wav"), **options)


def test_real_files_equal_those_of_libsndfile(data_dir):
    for folder in sorted(data_dir.iterdir()):
        paths = [
            path
            for path in sorted(folder.rglob("*"))
            if path.suffix in (".wav", ".flac", ".mp3", ".ogg")
        ]
        for path in paths[:: max(len(paths) // 2, 1)]:
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
            found = audio.info(path)
            assert (found.sample_rate, found.frames, found.channels) == (rate, *samples.shape), path
            start = len(samples) // 3
            part = audio.read(path, start=start, frames=2000).numpy()
            np.testing.assert_allclose(
                part, samples[start : start + 2000].mean(axis=1), rtol=0, atol=1e-6
            )


# --- messages of the MP3 decoder


def test_the_decoder_prints_nothing(tmp_path, capfd):
    path = encode(tmp_path / "a.mp3", sound(200_000), bitrate_mode="CONSTANT")
    # Without the filter it prints, or this test would show nothing.
    for start in range(30_000, 150_000, 7000):
        with soundfile.SoundFile(path) as file:
            file.seek(start)
            file.read(10)
    assert "mpg123" in capfd.readouterr().err
    for start in range(30_000, 150_000, 7000):
        audio.read(path, start=start, frames=10)
    assert capfd.readouterr().err == ""


def test_other_messages_pass_while_the_decoder_is_silenced(capfd):
    with reading._decoder_quiet():
        os.write(2, b"[src/libmpg123/layer3.c:1] error: nonsense\nsomebody else\n")
    assert capfd.readouterr().err == "somebody else\n"
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "afterwards\n"


def test_the_decoder_works_without_stderr(tmp_path):
    path = encode(tmp_path / "a.mp3")
    terminal = os.dup(2)
    os.close(2)
    try:
        waveform = audio.read(path)
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
    assert len(waveform) == 40_000


# --- writing


@pytest.mark.parametrize("kind", ["wav", "flac"])
@pytest.mark.parametrize(
    "make", [np.asarray, torch.from_numpy, lambda x: torch.from_numpy(x)[None], lambda x: x[::-1]]
)
def test_written_audio_reads_back(tmp_path, kind, make):
    path = tmp_path / f"a.{kind}"
    waveform = make(sound())
    audio.write(path, waveform, RATE)
    assert soundfile.info(path).subtype == "PCM_16"
    assert audio.info(path) == audio.AudioInfo(RATE, 40_000, 1)
    np.testing.assert_array_equal(audio.read(path).numpy(), np.asarray(waveform).reshape(-1))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_all_16_bit_values_survive(tmp_path):
    values = np.arange(-32768, 32768) / 32768
    audio.write(tmp_path / "a.wav", values, RATE)
    np.testing.assert_array_equal(audio.read(tmp_path / "a.wav").numpy(), values)


def test_samples_are_rounded_to_the_nearest_value_and_clipped(tmp_path):
    waveform = np.random.default_rng(0).uniform(-1.5, 1.5, 10_000).astype(np.float32)
    audio.write(tmp_path / "a.wav", waveform, RATE)
    expected = waveform.clip(-1, 32767 / 32768)
    np.testing.assert_allclose(
        audio.read(tmp_path / "a.wav").numpy(), expected, rtol=0, atol=0.5 / 32768
    )


@pytest.mark.parametrize(
    ("waveform", "rate", "name", "message"),
    [
        (np.array([0.0, np.nan]), RATE, "a.wav", "NaN or infinity"),
        (torch.tensor([0.0, torch.inf]), RATE, "a.wav", "NaN or infinity"),
        (np.zeros((2, 100)), RATE, "a.wav", r"shape \(2, 100\), expected \(T,\) or \(1, T\)"),
        (np.zeros((100, 1)), RATE, "a.wav", r"shape \(100, 1\)"),
        (np.zeros(0), RATE, "a.wav", r"shape \(0,\)"),
        (np.float32(0), RATE, "a.wav", r"shape \(\)"),
        (np.zeros(100, dtype=np.int16), RATE, "a.wav", "int16, expected floating point"),
        (np.zeros(100), 0, "a.wav", "sample_rate is 0"),
        (np.zeros(100), 22050.5, "a.wav", r"sample_rate is 22050\.5, expected an integer"),
        (np.zeros(100), 500_000, "a.wav", "sample rate is 500000 Hz, expected 1000 to 384000"),
        (
            np.zeros(100),
            RATE,
            "a.mp3",
            r"can only write \.wav, \.flac, \.ogg and \.opus, not \.mp3",
        ),
        (np.zeros(100), RATE, "a.opus", r"Opus has no sample rate of 22050 Hz, only 8000, 12000"),
        (np.zeros(100), RATE, "a", "not a name without ending"),
    ],
)
def test_unwritable_audio_is_refused(tmp_path, waveform, rate, name, message):
    with pytest.raises(ValueError, match=message):
        audio.write(tmp_path / name, waveform, rate)
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Limit the size of files, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over-another"])
def test_a_failed_write_changes_nothing(tmp_path, existing):
    path = tmp_path / "a.wav"
    if existing:
        audio.write(path, sound(1000), RATE)
    before = path.read_bytes() if existing else None
    with files_end_at(5000), pytest.raises(OSError, match=r"cannot write .*a\.wav: File too large"):
        audio.write(path, sound(), RATE)
    assert [entry.name for entry in tmp_path.iterdir()] == (["a.wav"] if existing else [])
    if before is not None:
        assert path.read_bytes() == before


def test_only_regular_files_are_overwritten(tmp_path):
    path = tmp_path / "a.wav"
    audio.write(path, sound(1000), RATE)
    audio.write(path, sound(2000), RATE)
    assert audio.info(path).frames == 2000
    (tmp_path / "b.wav").mkdir()
    with pytest.raises(OSError, match=r"b\.wav: exists and is not a file, not overwritten"):
        audio.write(tmp_path / "b.wav", sound(), RATE)
    with pytest.raises(
        FileNotFoundError, match=r"cannot write .*nowhere/a\.wav: No such file or directory"
    ):
        audio.write(tmp_path / "nowhere" / "a.wav", sound(), RATE)


def test_a_folder_without_write_permission_is_refused(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with (
        nobody(),
        pytest.raises(PermissionError, match=r"cannot write .*a\.wav: Permission denied"),
    ):
        audio.write(folder / "a.wav", sound(), RATE)


ENCODED = {
    ("a.wav", None): ("WAV", "PCM_16", 2**-16),
    ("a.wav", "pcm24"): ("WAV", "PCM_24", 2**-24),
    ("a.wav", "float32"): ("WAV", "FLOAT", 0.0),
    ("a.flac", None): ("FLAC", "PCM_16", 2**-16),
    ("a.flac", "pcm24"): ("FLAC", "PCM_24", 2**-24),
    ("a.ogg", None): ("OGG", "VORBIS", 0.05),
    ("a.ogg", "opus"): ("OGG", "OPUS", 0.05),
    ("a.opus", None): ("OGG", "OPUS", 0.05),
}


@pytest.mark.parametrize(("name", "encoding"), ENCODED, ids=str)
def test_encodings_keep_format_level_and_samples(tmp_path, name, encoding):
    """Samples agree to half a step; those of lossy codecs, of a tone, to 0.05."""
    container, subtype, error = ENCODED[name, encoding]
    time = np.arange(200_000) / 24_000  # longer than a block of the writer
    waveform = (0.25 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    assert audio.write(tmp_path / name, waveform, 24_000, encoding) == 0
    info = soundfile.info(tmp_path / name)
    assert (info.format, info.subtype, info.samplerate, info.frames) == (
        container,
        subtype,
        24_000,
        200_000,
    )
    again = audio.read(tmp_path / name).numpy()
    np.testing.assert_allclose(again[2000:-2000], waveform[2000:-2000], rtol=0, atol=error)
    assert abs(np.std(again) / np.std(waveform) - 1) < 0.01


@pytest.mark.parametrize(
    ("name", "encoding", "message"),
    [
        ("a.wav", "pcm32", "encoding is 'pcm32', a .wav file has pcm16 or pcm24 or float32"),
        ("a.flac", "float32", "a .flac file has pcm16 or pcm24"),
        ("a.ogg", "pcm16", "a .ogg file has vorbis or opus"),
    ],
)
def test_encodings_that_a_format_lacks_are_refused(tmp_path, name, encoding, message):
    with pytest.raises(ValueError, match=message):
        audio.write(tmp_path / name, np.zeros(100), 24_000, encoding)
    assert list(tmp_path.iterdir()) == []


def test_clipping_is_counted(tmp_path):
    waveform = np.array([0.0, 1.0, -1.0, 1.001, -3.0, 0.5], dtype=np.float32)
    assert audio.write(tmp_path / "a.wav", waveform, RATE) == 2
    assert audio.write(tmp_path / "b.wav", waveform, RATE, "pcm24") == 2
    assert audio.write(tmp_path / "c.wav", waveform, RATE, "float32") == 0
    np.testing.assert_allclose(
        audio.read(tmp_path / "b.wav"), waveform.clip(-1, 1), rtol=0, atol=2**-23
    )
    assert audio.read(tmp_path / "c.wav").tolist() == waveform.tolist()
