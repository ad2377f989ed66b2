"""Compare the length in an audio file's header with the bytes that are there.

libsndfile trusts headers: it drops the end of a file whose header gives too small a length (a WAV
from a pipe gives 0), and reads a WAV or OGG file that was cut off as a shorter one. `examine` reads
the bytes and distinguishes two cases:

- A truncated file is refused: it ends in the middle of a unit (an Ogg page, an MP3 frame), or,
  where there are no units, before the length on which all its headers agree.
- A wrong header is corrected in a copy in memory, which libsndfile then reads to the real end:
  lengths that mean "unknown" in streams, lengths shorter than the audio, and lengths that
  contradict the length of the whole file. Other bytes after the audio are not played.

Formats other than WAV, AIFF, W64, NIST, AU, CAF, FLAC, OGG and MP3 are left to libsndfile.
"""

from __future__ import annotations

import functools
import itertools
import math
import mmap
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from wavear.common.errors import WavearError

Bytes = bytes | mmap.mmap
_MOST_PARTS = 4096  # chunks before the audio: bounds the time to walk through them
_MOST_TAGS = 17  # where a file begins; libsndfile's time grows with their square
_MOST_CANDIDATES = 100_000  # places that look like a frame of FLAC or MP3, and are none


class HeaderError(WavearError):
    """A file that is truncated or damaged; the message gives the reason but not the file's name."""


class Splice(NamedTuple):
    """A change to the bytes of a file."""

    offset: int
    removed: int
    """Number of bytes to remove at the offset."""
    inserted: bytes


@dataclass(frozen=True)
class Findings:
    """Facts that are needed before libsndfile opens a file."""

    splice: Splice | None = None
    """The correction of the header."""
    is_mp3: bool = False
    last_seek: int | None = None
    """Latest sample that a seek reaches exactly; None: every one."""


def examine(path: str | os.PathLike[str], stretch: tuple[int, int] | None = None) -> Findings:
    """Compare a file's header with its bytes; cached until the file changes.

    With a `stretch` (offset, length in bytes), examine only these bytes, such as a member of an
    archive.

    Raises
    ------
    HeaderError
        If the file ends before its audio does.
    OSError
        If it cannot be read.
    """
    status = os.stat(path)
    return _examine(os.fspath(path), status.st_size, status.st_mtime_ns, stretch)


@functools.lru_cache(maxsize=65536)
def _examine(path: str, size: int, modified: int, stretch: tuple[int, int] | None) -> Findings:
    with open(path, "rb") as file:
        if stretch is not None:
            file.seek(stretch[0])
            return _examine_bytes(file.read(stretch[1]))
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _examine_bytes(data)


def _examine_bytes(data: Bytes) -> Findings:
    start = _after_id3(data)
    magic = data[start : start + 4]
    if magic in (b"RIFF", b"RIFX", b"RF64", b"FORM"):
        return _examine_chunks(data, magic)
    if data[:16] == _W64:
        return _examine_w64(data)
    if data[:8] == b"NIST_1A\n":
        return _examine_nist(data)
    if magic in (b".snd", b"dns."):
        return _examine_au(data, "big" if magic == b".snd" else "little")
    if magic == b"caff":
        return _examine_caf(data)
    if magic == b"fLaC":
        return _examine_flac(data, start)
    if magic == b"OggS":
        return _examine_ogg(data, start)
    if start > 0 or _Mp3Frame.parse(magic):
        return _examine_mp3(data, start)
    return Findings()


def _after_id3(data: Bytes) -> int:
    """Return where the audio begins: ID3v2 tags give their length in four times seven bits."""
    position = 0
    for _ in range(_MOST_TAGS):
        if data[position : position + 3] != b"ID3" or position + 10 > len(data):
            return position
        length = 0
        for byte in data[position + 6 : position + 10]:
            length = length << 7 | byte & 0x7F
        position += 10 + length + (10 if data[position + 5] & 0x10 else 0)
    raise HeaderError(f"begins with more than {_MOST_TAGS - 1} ID3 tags")


def _big(data: Bytes, position: int, count: int) -> int:
    return int.from_bytes(data[position : position + count], "big")


# --- WAV and AIFF: chunks of four letters, a length, and that many bytes

# From here on, a length beyond the end of the file means "unknown": ffmpeg writes 2**32 - 1, sox
# 0x7FFFF000.
_UNKNOWN_LENGTH = 0x7FFF0000
_ALIKE = 0.5  # correlation of neighbouring samples: about 0 for other bytes, 0.9 for speech


def _examine_chunks(data: Bytes, magic: bytes) -> Findings:
    order = "little" if magic in (b"RIFF", b"RF64") else "big"
    audio = b"SSND" if magic == b"FORM" else b"data"
    whole = int.from_bytes(data[4:8], order) + 8

    def size(position: int) -> int:
        length = int.from_bytes(data[position + 4 : position + 8], order)
        return 8 + length + length % 2

    position = _find_chunk(data, 12, audio, size)
    if position is None:
        return Findings()
    claimed = int.from_bytes(data[position + 4 : position + 8], order)
    first = position + 8
    there = len(data) - first
    if magic == b"RF64" and data[12:16] == b"ds64":
        whole = int.from_bytes(data[20:28], order) + 8
        claimed = int.from_bytes(data[28:36], order)
    if claimed > there:
        unknown = claimed >= _UNKNOWN_LENGTH and magic != b"RF64"
        # If the length of the whole file is right, only that of this chunk is wrong. libsndfile
        # reads to the end in both cases.
        if unknown or abs(whole - len(data)) <= 1:
            return Findings()
        raise HeaderError(
            f"truncated inside: its header promises {claimed} bytes of audio, {there} are there"
        )
    end = first + claimed
    complete = claimed == there or any(_no_audio(data, at, claimed) for at in (end, end + end % 2))
    if complete or magic == b"RF64":
        return Findings()
    # Where both lengths agree, what follows is garbage, unless it continues the samples: the file
    # grew after its header was written. Lengths of 32 bits wrap at 4 GiB.
    agree = claimed > 0 and whole in (end, end + end % 2) and (there - claimed) % 2**32 > 1
    if agree and not _continues(data, data.rfind(b"fmt ", 0, position), end):
        return Findings()
    return Findings(Splice(position + 4, 4, b"\xff\xff\xff\xff"))


def _find_chunk(data: Bytes, position: int, audio: bytes, size: Callable[[int], int]) -> int | None:
    """Return where the chunk `audio` begins; None without one, which libsndfile reports.

    `size` gives the bytes of the chunk at a position, with its header.
    """
    for _ in range(_MOST_PARTS):
        name = data[position : position + 4]
        if name == audio:
            return position
        if not (len(name) == 4 and name.isascii() and name.decode().isprintable()):
            return None
        position += size(position)
    raise HeaderError(f"holds no audio among its first {_MOST_PARTS} chunks")


def _continues(data: Bytes, layout: int, position: int) -> bool:
    """Return whether 16-bit samples of a WAV file continue at a position: neighbours are alike."""
    if layout < 0 or int.from_bytes(data[layout + 22 : layout + 24], "little") != 16:
        return False
    channels = max(int.from_bytes(data[layout + 10 : layout + 12], "little"), 1)
    tail = data[position : position + 65536]
    x = np.frombuffer(tail[: len(tail) // 2 * 2], "<i2").astype(np.float64)
    x -= x.mean() if x.size else 0.0
    power = float(np.square(x).sum())
    return bool(x[channels:] @ x[:-channels] > _ALIKE * power) if x.size > channels else False


def _no_audio(data: Bytes, position: int, claimed: int) -> bool:
    """Return whether another chunk, a tag, or padding follows the audio chunk."""
    if len(data) - position < 8:
        return claimed > 0
    name = data[position : position + 8]
    if name.startswith((b"TAG", b"ID3", b"APETAGEX")):
        return True
    if name[:4].isascii() and name[:4].decode().isprintable():
        return True
    return claimed > 0 and not any(data[position : position + 65536])


# --- W64, NIST SPHERE, AU, CAF: libsndfile reads to the end of the file, whatever the header gives

_W64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"


def _examine_w64(data: Bytes) -> Findings:
    # Chunks: 16 bytes that begin with a name, a length with these 24, multiples of 8.
    def length(position: int) -> int:
        return int.from_bytes(data[position + 16 : position + 24], "little")

    position = _find_chunk(data, 40, b"data", lambda at: max(length(at) + -length(at) % 8, 24))
    if position is None:
        return Findings()
    return _cut(data, position + 24, length(position) - 24)


def _examine_nist(data: Bytes) -> Findings:
    first = int(data[8:16]) if data[8:16].strip().isdigit() else 0
    fields = (b"sample_count", b"channel_count", b"sample_n_bytes")
    found = [re.search(field + rb" -i (\d{1,18})\s", data[:first]) for field in fields]
    return _cut(data, first, math.prod(int(match[1]) if match else 0 for match in found))


def _examine_au(data: Bytes, order: Literal["big", "little"]) -> Findings:
    first, claimed = (int.from_bytes(data[at : at + 4], order) for at in (4, 8))
    return _cut(data, first, claimed)


def _examine_caf(data: Bytes) -> Findings:
    # Chunks: a name of 4 bytes, a length of 8.
    position = _find_chunk(data, 8, b"data", lambda at: 12 + _big(data, at + 4, 8))
    if position is not None:
        _cut(data, position + 12, _big(data, position + 4, 8))
    return Findings()  # chunks that belong to the audio can follow it


def _cut(data: Bytes, first: int, claimed: int) -> Findings:
    """Return the removal of what follows the audio, or raise if the audio is cut off."""
    there = len(data) - first
    if claimed <= 0 or claimed >= max(_UNKNOWN_LENGTH, there) or claimed == there:
        return Findings()
    if claimed > there:
        raise HeaderError(
            f"truncated inside: its header promises {claimed} bytes of audio,"
            f" {max(there, 0)} are there"
        )
    return Findings(Splice(first + claimed, there - claimed, b""))


# --- FLAC: frames that begin with a synchronisation code and their own number


def _examine_flac(data: Bytes, start: int) -> Findings:
    # STREAMINFO is the first block: the last 36 bits before the checksum are the number of samples,
    # 0 if unknown.
    position = start + 8
    block = _big(data, position + 2, 2)
    field = _big(data, position + 10, 8)
    claimed = field & (2**36 - 1)
    ends = _flac_frame_ends(data, position, block)
    if not ends or claimed in ends:
        return Findings()
    # A synchronisation code can occur by chance; one that follows another by one block cannot.
    sure = [
        end for end in ends if len(ends) == 1 or any(0 < end - other <= block for other in ends)
    ]
    if not sure:
        return Findings()
    total = max(sure)
    if claimed > total:
        raise HeaderError(
            f"truncated inside: its header promises {claimed} samples, {total} are there"
        )
    return Findings(Splice(position + 10, 8, (field - claimed | total).to_bytes(8, "big")))


def _flac_frame_ends(data: Bytes, streaminfo: int, block: int) -> set[int]:
    """Return the sample where each of the last frames ends."""
    # A frame is at most 65535 samples of 8 channels of 32 bits, whatever the header promises.
    largest = min(_big(data, streaminfo + 7, 3) or 65536, 2**21)
    tail = data[max(len(data) - 4 * largest, streaminfo) :]
    ends = set()
    for sync, fixed_size in ((b"\xff\xf8", True), (b"\xff\xf9", False)):
        at = tail.find(sync)
        for _ in range(_MOST_CANDIDATES):
            if at < 0:
                break
            if header := _flac_frame_header(tail[at : at + 16]):
                number, length = header  # of the block, or of its first sample
                ends.add((number * block if fixed_size else number) + length)
            at = tail.find(sync, at + 1)
    return ends


def _flac_frame_header(header: bytes) -> tuple[int, int] | None:
    """Return a frame's number and length in samples; None if this is not a frame header.

    RFC 9639, section 9.1.
    """
    header = header.ljust(16, b"\0")  # the last frame can be shorter than the longest header
    # The number is coded as in UTF-8, up to seven bytes: as many leading ones as bytes, then six
    # bits in each.
    ones = 8 - (header[4] ^ 0xFF).bit_length()
    size_code, rate_code = header[2] >> 4, header[2] & 0x0F
    if header[3] & 1 or ones in (1, 8) or size_code == 0 or rate_code == 15:
        return None
    number = header[4] & (0x7F >> ones)
    position = 4 + max(ones, 1)
    for byte in header[5:position]:
        number = number << 6 | byte & 0x3F
    if size_code in (6, 7):
        width = size_code - 5
        length = _big(header, position, width) + 1
        position += width
    elif size_code == 1:
        length = 192
    else:
        length = 576 << size_code - 2 if size_code < 6 else 256 << size_code - 8
    position += {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    checksum = 0
    for byte in header[:position]:
        checksum ^= byte
        for _ in range(8):
            checksum = (checksum << 1 ^ (0x107 if checksum & 0x80 else 0)) & 0xFF
    return (number, length) if checksum == header[position] else None


# --- Ogg: pages


def _examine_ogg(data: Bytes, start: int) -> Findings:
    position, samples, end_of_stream = start, [0], False
    while data[position : position + 4] == b"OggS":
        end = _ogg_page_end(data, position)
        if end > len(data):
            raise HeaderError("truncated inside: it ends in the middle of an Ogg page")
        page = data[position:end]
        if int.from_bytes(page[22:26], "little") != _ogg_checksum(page):
            raise HeaderError(
                f"damaged inside: the checksum of the Ogg page at byte {position} is wrong"
            )
        # The sample at which the last packet that ends on this page ends; -1 if none does.
        samples.append(int.from_bytes(page[6:14], "little", signed=True))
        end_of_stream = bool(page[5] & 4)
        position = end
    if not end_of_stream and position < len(data):
        raise HeaderError(f"damaged or truncated inside: no Ogg page at byte {position}")
    # libsndfile (1.2.2) counts back from the sample at which a page ends, but the last page gives
    # the end of the audio, not of its blocks: a seek into it reaches other samples. So seeks have
    # to stop before that page.
    return Findings(last_seek=max(samples[:-1]))


def _ogg_page_end(data: Bytes, page: int) -> int:
    lengths = data[page + 27 : page + 27 + data[page + 26]] if page + 26 < len(data) else b""
    whole = page + 26 < len(data) and len(lengths) == data[page + 26]
    return page + 27 + len(lengths) + sum(lengths) if whole else len(data) + 1


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_checksum(page: bytes) -> int:
    """Return CRC-32 with the highest bit first, from 0, over the page with a checksum of 0.

    RFC 3533, section 6. zlib's has the lowest bit first, and is complemented before and after.
    """
    mirrored = (page[:22] + bytes(4) + page[26:]).translate(_REVERSED)
    return int(f"{zlib.crc32(mirrored, 0xFFFFFFFF) ^ 0xFFFFFFFF:032b}"[::-1], 2)


# --- MP3: frames that begin with their own length

_MP3_KBITS = (
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),  # MPEG 1
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),  # MPEG 2 and 2.5
)


_MP3_SYNC = re.compile(rb"\xff(?=[\xe2\xe3\xf2\xf3\xfa\xfb][^\xf0-\xff])")  # layer III


class _Mp3Frame(NamedTuple):
    """The header of a frame of MPEG 1, 2 or 2.5, layer III."""

    kind: tuple[int, int]  # version and sample rate, which do not change within a file
    length: int  # bytes
    side_info: int  # bytes

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def parse(header: bytes) -> _Mp3Frame | None:
        if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
            return None
        version, layer = header[1] >> 3 & 3, header[1] >> 1 & 3  # version 0: 2.5, 2: 2, 3: 1
        bitrate, rate, padding = header[2] >> 4, header[2] >> 2 & 3, header[2] >> 1 & 1
        if version == 1 or layer != 1 or bitrate in (0, 15) or rate == 3:
            return None
        first, mono = version == 3, header[3] >> 6 == 3
        sample_rate = (44100, 48000, 32000)[rate] // {3: 1, 2: 2, 0: 4}[version]
        bytes_per_kbit = 144_000 if first else 72_000
        length = bytes_per_kbit * _MP3_KBITS[not first][bitrate] // sample_rate + padding
        return _Mp3Frame(
            (version, rate), length, (17 if mono else 32) if first else 9 if mono else 17
        )


def _examine_mp3(data: Bytes, start: int) -> Findings:
    found = _next_mp3_frame(data, start, None)
    if found is None:
        return Findings(is_mp3=True)  # not MP3 after all, or another layer: left to libsndfile
    first, head = found
    info = data[first : first + head.length]
    at = 4 + head.side_info
    has_count = len(info) >= at + 12 and bool(info[at + 7] & 1)
    has_info = has_count and info[at : at + 4] in (b"Xing", b"Info")
    count, position = 0, first + (head.length if has_info else 0)
    while True:
        frame = _Mp3Frame.parse(data[position : position + 4])
        if frame is None or frame.kind != head.kind:
            found = _next_mp3_frame(data, position, head.kind)
            if found is None:
                break
            position, frame = found
        if position + frame.length > len(data):
            raise HeaderError(f"truncated inside: it ends in the middle of MP3 frame {count + 1}")
        count += 1
        position += frame.length
    if not has_info:
        inserted = _mp3_info(data[first : first + 4], head, count)
        return Findings(Splice(first, 0, inserted), is_mp3=True)
    number, at = count.to_bytes(4, "big"), first + at + 8
    right = data[at : at + 4] == number
    return Findings(None if right else Splice(at, 4, number), is_mp3=True)


def _mp3_info(header: bytes, head: _Mp3Frame, count: int) -> bytes:
    """Return an information frame for a file of `count` frames, and a frame of silence.

    Without the former, the decoder guesses the length from the first frame's bit rate. With it, the
    decoder (mpg123) drops the encoder's delay as given there, and its own 529 samples, from the
    beginning: here exactly the frame of silence.
    """
    delay = ((1152 if head.kind[0] == 3 else 576) - 529) << 12  # 12 bits; 12 of padding at the end
    info = b"Xing" + (1).to_bytes(4, "big") + (count + 1).to_bytes(4, "big")
    info += b"LAME3.100".ljust(21, b"\0") + delay.to_bytes(3, "big") + bytes(12)
    for bitrate in range(1, 15):  # without checksum and padding
        header = bytes([0xFF, header[1] | 1, bitrate << 4 | header[2] & 0x0C, header[3]])
        frame = _Mp3Frame.parse(header)
        if frame and frame.length >= 4 + frame.side_info + len(info):
            silence, at = header.ljust(frame.length, b"\0"), 4 + frame.side_info
            return silence[:at] + info + silence[at + len(info) :] + silence
    raise AssertionError("every kind of MP3 has a frame of 100 bytes")


def _next_mp3_frame(
    data: Bytes, position: int, kind: tuple[int, int] | None
) -> tuple[int, _Mp3Frame] | None:
    """Return the next place where two frames of a kind are adjacent, or one ends the file."""
    for match in itertools.islice(_MP3_SYNC.finditer(data, position), _MOST_CANDIDATES):
        position = match.start()
        frame = _Mp3Frame.parse(data[position : position + 4])
        if frame and kind in (None, frame.kind):
            after = data[position + frame.length : position + frame.length + 4]
            following = _Mp3Frame.parse(after)
            if (following and following.kind == frame.kind) or not after:
                return position, frame
    return None
