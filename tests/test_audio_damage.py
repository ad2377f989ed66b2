"""Audio files with wrong headers are read to their end; damaged ones are refused with a reason."""

from __future__ import annotations

import os
import re
import struct

import numpy as np
import pytest
import soundfile
import torch
from audio_files import KINDS, damage, encode, nobody, put, sound

from wavear import audio
from wavear.audio import headers, reading

# --- wrong headers

FORMATS = [endings[0] for endings in reading.ENDINGS.values()]
LENGTHS = {
    "wav-pipe-0": (
        "wav",
        lambda d: (put(b"RIFF", 4, bytes(4))(d), put(b"data", 4, bytes(4))(d))[0],
    ),
    "wav-interrupted": (
        "wav",
        lambda d: (put(b"RIFF", 4, struct.pack("<I", 36))(d), put(b"data", 4, bytes(4))(d))[0],
    ),
    "wav-ffmpeg": (
        "wav",
        lambda d: (put(b"RIFF", 4, b"\xff" * 4)(d), put(b"data", 4, b"\xff" * 4)(d))[0],
    ),
    "wav-sox": (
        "wav",
        lambda d: (put(b"RIFF", 4, b"\x24\xf0\xff\x7f")(d), put(b"data", 4, b"\0\xf0\xff\x7f")(d))[
            0
        ],
    ),
    "wav-too-long": ("wav", put(b"data", 4, struct.pack("<I", 160_000))),
    "wav-too-short": ("wav", put(b"data", 4, struct.pack("<I", 20_000))),
    "wav-both-too-short": (
        "wav",
        lambda d: (
            put(b"RIFF", 4, struct.pack("<I", 20_036))(d),
            put(b"data", 4, struct.pack("<I", 20_000))(d),
        )[0],
    ),
    "aiff-pipe-0": (
        "aiff",
        lambda d: (put(b"FORM", 4, bytes(4))(d), put(b"SSND", 4, bytes(4))(d))[0],
    ),
    "aiff-unknown": (
        "aiff",
        lambda d: (put(b"FORM", 4, b"\xff" * 4)(d), put(b"SSND", 4, b"\xff" * 4)(d))[0],
    ),
    "aiff-too-short": ("aiff", put(b"SSND", 4, struct.pack(">I", 20_000))),
    "flac-unknown": ("flac", put(b"fLaC", 22, bytes(4))),
    "flac-too-short": ("flac", put(b"fLaC", 22, struct.pack(">I", 20_000))),
    "mp3-too-short": ("mp3", put(b"Xing", 8, struct.pack(">I", 10))),
    "mp3-too-long": ("mp3", put(b"Xing", 8, struct.pack(">I", 1000))),
    "mp3-0": ("mp3", put(b"Xing", 8, bytes(4))),
}


@pytest.mark.parametrize(("kind", "lie"), LENGTHS.values(), ids=LENGTHS.keys())
def test_a_file_with_a_wrong_length_is_read_to_its_real_end(tmp_path, kind, lie):
    honest = encode(tmp_path / f"a.{kind}")
    liar = damage(honest, lie)
    whole = audio.read(honest)
    assert audio.info(liar).frames == len(whole) == 40_000
    torch.testing.assert_close(audio.read(liar), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(audio.read(liar, start=35_000), whole[35_000:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["wav", "flac"])
@pytest.mark.parametrize("samples", [1, 100, 4096, 4097, 9000], ids=str)
def test_a_stream_of_any_length_is_read_to_its_end(tmp_path, kind, samples):
    change = put(b"fLaC", 22, bytes(4)) if kind == "flac" else put(b"data", 4, bytes(4))
    path = damage(encode(tmp_path / f"a.{kind}", sound(samples)), change)
    np.testing.assert_array_equal(audio.read(path).numpy(), sound(samples))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE", "AVERAGE"])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100], ids=str)
def test_an_mp3_without_a_length_is_read_to_its_end(tmp_path, rate, mode, channels):
    waveform = sound() if channels == 1 else np.stack([sound(seed=1), sound(seed=2)], axis=1)
    tagged = encode(tmp_path / "a.mp3", waveform, rate, bitrate_mode=mode)
    first = headers._Mp3Frame.parse(tagged.read_bytes()[:4])
    assert first is not None
    path = damage(tagged, lambda data: data[first.length :])
    samples_per_frame = 1152 if rate >= 32000 else 576
    ours = audio.read(path)
    assert len(ours) % samples_per_frame == 0
    assert 40_000 <= len(ours) <= 40_000 + 3 * samples_per_frame
    assert audio.info(path).frames == len(ours)
    # Equals libsndfile's, which stops too early, and the file with a length, except for the delay.
    theirs = soundfile.read(path, dtype="float32", always_2d=True)[0].mean(axis=1)
    both = min(len(ours), len(theirs))
    np.testing.assert_allclose(ours[:both].numpy(), theirs[:both], rtol=0, atol=1e-6)
    delay = 529 + 576  # of decoder and encoder
    np.testing.assert_allclose(
        ours[delay:][3000:38_000].numpy(), audio.read(tagged)[3000:38_000].numpy(), atol=1e-6
    )


@pytest.mark.parametrize(
    "tail", [b"TAG" + b"x" * 125, bytes(5000), b"LIST" + struct.pack("<I", 4) + b"abcd"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_after_the_audio_are_ignored(tmp_path, kind, tail):
    honest = encode(tmp_path / f"a.{kind}")
    path = damage(honest, lambda data: data + tail)
    torch.testing.assert_close(audio.read(path), audio.read(honest), rtol=0, atol=1e-6)


GARBAGE = {
    "random": np.random.default_rng(0).bytes(19_999),
    "long": np.random.default_rng(1).bytes(300_000),
    "text": b"<html>\xe9 no audio\n" * 700,
    "steps": bytes(range(4)) * 3000,
    "ones": b"\xff" * 5000,
}


@pytest.mark.parametrize("tail", GARBAGE.values(), ids=GARBAGE.keys())
@pytest.mark.parametrize("ending", FORMATS)
def test_garbage_after_the_audio_is_not_played(tmp_path, ending, tail):
    honest = encode(tmp_path / f"a{ending}")
    path = damage(honest, lambda data: data + tail)
    assert audio.info(path).frames == audio.info(honest).frames
    torch.testing.assert_close(audio.read(path), audio.read(honest), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        audio.read(path, start=39_000), audio.read(honest, start=39_000), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("ending", ["w64", "sph", "au"])
def test_truncated_w64_sphere_and_au_files_are_refused(tmp_path, ending):
    honest = encode(tmp_path / f"a.{ending}")
    path = damage(honest, lambda data: data[:-1000])
    with pytest.raises(audio.AudioError, match="truncated inside: its header promises 80000 bytes"):
        audio.read(path)


def test_a_changed_file_is_read_again(tmp_path):
    path = encode(tmp_path / "a.wav")
    assert audio.info(path).frames == 40_000
    put_zero = put(b"data", 4, bytes(4))
    path.write_bytes(damage(encode(tmp_path / "b.wav", sound(30_000)), put_zero).read_bytes())
    assert audio.info(path).frames == 30_000


# --- refused


@pytest.mark.parametrize("share", [0.3, 0.67, 0.999])
@pytest.mark.parametrize("kind", sorted({*KINDS, *(ending[1:] for ending in FORMATS)}))
def test_truncated_files_are_refused(tmp_path, kind, share):
    path = damage(encode(tmp_path / f"a.{kind}"), lambda data: data[: int(len(data) * share)])
    with pytest.raises(audio.AudioError, match=rf"damaged\.{kind}: .*truncated inside"):
        audio.read(path)
    if kind != "flac" or share < 0.9:  # decoding finds a cut in the last frame of a FLAC
        with pytest.raises(audio.AudioError, match=rf"damaged\.{kind}: .*truncated inside"):
            audio.info(path)


@pytest.mark.parametrize("ending", sorted({*FORMATS, ".opus"} - {".rf64"}))
def test_files_cut_within_their_header_are_refused(tmp_path, ending):
    """An MP3 cut between the name and the flags of its information frame raised an IndexError."""
    whole = encode(tmp_path / f"a{ending}").read_bytes()
    path = tmp_path / f"b{ending}"
    first = max(whole.find(b"Xing"), whole.find(b"Info"), 0)
    for size in (*range(1, 40), *range(first, first + 16)):
        path.write_bytes(whole[:size])
        with pytest.raises(audio.AudioError, match=re.escape(str(path))):
            audio.read(path)


@pytest.mark.parametrize("kind", ["flac", "ogg"])
def test_damaged_files_are_refused(tmp_path, kind):
    def change(data: bytearray) -> None:
        middle = len(data) // 2
        data[middle : middle + 300] = np.random.default_rng(0).bytes(300)

    with pytest.raises(audio.AudioError, match=rf"damaged\.{kind}: .*(damaged|truncated) inside"):
        audio.read(damage(encode(tmp_path / f"a.{kind}"), change))


def test_a_decoder_that_ends_early_is_an_error(tmp_path, monkeypatch):
    original = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile,
        "read",
        lambda *arguments, **options: original(*arguments, **options)[:-10],
    )
    with pytest.raises(
        audio.AudioError, match=r"truncated inside \(audio ends at sample 39990 of 40000\)"
    ):
        audio.read(encode(tmp_path / "a.wav"))


@pytest.mark.parametrize("samples", [5000, 4000, 100], ids=str)
def test_damaged_headers_of_flac_frames_are_rejected(tmp_path, samples):
    data = encode(tmp_path / "a.flac", sound(samples)).read_bytes()
    at = data.index(b"\xff\xf8")
    header = data[at : at + 16]
    assert headers._flac_frame_header(header) == (0, min(samples, 4096))
    for bit in range(16, 40):  # from the synchronisation code to the frame's number
        broken = bytearray(header)
        broken[bit // 8] ^= 1 << bit % 8
        assert headers._flac_frame_header(bytes(broken)) is None


def test_a_flac_cut_between_frames_is_truncated(tmp_path):
    def change(data: bytearray) -> bytearray:
        sync = data.rindex(b"\xff\xf8")
        while headers._flac_frame_header(bytes(data[sync : sync + 16])) is None:
            sync = data.rindex(b"\xff\xf8", 0, sync)
        return data[:sync]

    path = damage(encode(tmp_path / "a.flac"), change)
    with pytest.raises(
        audio.AudioError,
        match=r"truncated inside: its header promises 40000 samples, 36864 are there",
    ):
        audio.info(path)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3", ".aiff"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"This is text, not audio.\n" * 30, "is not audio"),
        (b"x", "is not audio"),
        (bytes(1000), "is not audio"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4, "is not audio"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "is not audio"),
        (b"ID3\x04\0\0\0\0\0\x10" + bytes(100), "is not audio"),
        (b"fLaC", "is not audio"),
        (b"OggS", "truncated inside"),
        (b"OggS" + bytes(1000), "damaged inside"),
    ],
    ids=[
        "empty",
        "text",
        "one-byte",
        "zeros",
        "picture",
        "wav-header",
        "only-a-tag",
        "flac-magic",
        "ogg-magic",
        "ogg-zeros",
    ],
)
def test_files_without_audio_are_refused(tmp_path, capfd, suffix, content, message):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    for function in (audio.read, audio.info):
        with pytest.raises(audio.AudioError, match=message) as caught:
            function(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["wav", "aiff", "ogg"])
def test_empty_audio_is_refused(tmp_path, kind):
    with pytest.raises(audio.AudioError, match=rf"a\.{kind}: holds no audio \(0 samples\)"):
        audio.read(encode(tmp_path / f"a.{kind}", sound(0)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_samples_are_refused(tmp_path, value):
    waveform = sound()
    waveform[12_345] = value
    path = encode(tmp_path / "a.wav", waveform, subtype="FLOAT")
    with pytest.raises(
        audio.AudioError, match=r"a\.wav: holds NaN or infinity \(at sample 12345\)"
    ):
        audio.read(path)
    with pytest.raises(audio.AudioError, match=r"\(at sample 12345\)"):
        audio.read(path, start=10_000)
    assert len(audio.read(path, start=20_000)) == 20_000  # this part is valid


@pytest.mark.parametrize("rate", [1, 999, 384_001, 4_000_000])
def test_a_sample_rate_out_of_range_is_refused(tmp_path, rate):
    path = damage(encode(tmp_path / "a.wav"), put(b"fmt ", 12, struct.pack("<I", rate)))
    with pytest.raises(
        audio.AudioError, match=rf"has a sample rate of {rate} Hz, expected 1000 to 384000"
    ):
        audio.info(path)


@pytest.mark.parametrize("rate", [1000, 384_000])
def test_the_lowest_and_highest_sample_rates_are_read(tmp_path, rate):
    assert audio.info(encode(tmp_path / "a.wav", rate=rate)).sample_rate == rate


def test_paths_that_are_not_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot read .*missing\.wav: No such file"):
        audio.read(tmp_path / "missing.wav")
    with pytest.raises(IsADirectoryError, match="is a folder, expected an audio file"):
        audio.read(tmp_path)
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(OSError, match=r"pipe\.wav: is not a regular file"):
        audio.read(tmp_path / "pipe.wav")


def test_a_file_without_read_permission_is_refused(tmp_path):
    path = encode(tmp_path / "a.wav")
    path.chmod(0)
    with nobody(), pytest.raises(PermissionError, match=r"cannot read .*a\.wav: Permission denied"):
        audio.read(path)
