"""What an audio file's header says about its length, against the bytes that are there.

libsndfile believes headers, so it drops the end of a file whose header promises too little (a WAV
from a pipe says 0), and takes a WAV or OGG file that was cut off for a shorter one. `examine` looks
at the bytes and tells these apart:

- *cut off inside* is refused: the file ends in the middle of a unit (an Ogg page, an MP3 frame),
  or, where there are no
  units, before what all its headers agree on;
- *a header that lies* is put right in a copy in memory, which libsndfile then reads to the real
  end: lengths that stand
  for "unknown" in streams, lengths shorter than the audio, and those that contradict the length of
  the whole file.

Formats that libsndfile knows beyond WAV, AIFF, FLAC, OGG and MP3 are left to it.
"""

from __future__ import annotations

import functools
import mmap
import os
import zlib
from dataclasses import dataclass

Bytes = bytes | mmap.mmap


@dataclass(frozen=True)
class Findings:
    """What has to be known before libsndfile opens a file."""

    splice: tuple[int, int, bytes] | None = None
    """Offset, number of bytes there, and what to put in their place, so that the header says the truth."""
    is_mp3: bool = False
    last_seek: int | None = None
    """Latest sample where a seek arrives exactly; None: every one."""


def examine(path: str | os.PathLike[str], stretch: tuple[int, int] | None = None) -> Findings:
    """Compare a file's header with its bytes. Costs some reads; the result is kept while the file stays as it is.

    With a `stretch` (offset, length in bytes) the file is what lies there, a member of an archive
    say.

    Raises
    ------
    ValueError
        If the file ends before its audio does. The message gives the reason, and leaves the file's
        name to the caller.
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
    if magic == b"fLaC":
        return _examine_flac(data, start)
    if magic == b"OggS":
        return _examine_ogg(data, start)
    if start > 0 or _Mp3Frame.parse(magic):
        return _examine_mp3(data, start)
    return Findings()


# --- WAV and AIFF: chunks of four letters, a length, and that many bytes
# ----------------------------------------------

# Lengths from here on mean "unknown" where the file has less: ffmpeg and others write 2**32 - 1,
# sox 0x7FFFF000.
_UNKNOWN_LENGTH = 0x7FFF0000


def _examine_chunks(data: Bytes, magic: bytes) -> Findings:
    order = "little" if magic in (b"RIFF", b"RF64") else "big"
    audio = b"SSND" if magic == b"FORM" else b"data"
    whole = int.from_bytes(data[4:8], order) + 8
    position = 12
    while data[position : position + 4] != audio:
        if position + 8 > len(data):
            return Findings()  # no audio in there: libsndfile has the words for it
        length = int.from_bytes(data[position + 4 : position + 8], order)
        position += 8 + length + length % 2
    claimed = int.from_bytes(data[position + 4 : position + 8], order)
    first = position + 8
    there = len(data) - first
    if magic == b"RF64" and data[12:16] == b"ds64":
        whole, claimed = (
            int.from_bytes(data[20:28], "little") + 8,
            int.from_bytes(data[28:36], "little"),
        )
    if claimed > there:
        if claimed >= _UNKNOWN_LENGTH and magic != b"RF64":
            return Findings()  # libsndfile takes what there is
        if abs(whole - len(data)) <= 1:
            return (
                Findings()
            )  # so the file as a whole is complete, and the length of this chunk is wrong
        raise ValueError(
            f"truncated inside: its header promises {claimed} bytes of audio, {there} are there"
        )
    end = first + claimed
    if claimed == there or any(_is_no_audio(data, at, claimed) for at in (end, end + end % 2)):
        return Findings()
    if magic == b"RF64":
        return Findings()
    return Findings(splice=(position + 4, 4, b"\xff\xff\xff\xff"))


def _is_no_audio(data: Bytes, position: int, claimed: int) -> bool:
    """Whether what follows the audio chunk is something else: another chunk, a tag, or filling."""
    rest = len(data) - position
    if rest < 8:
        return claimed > 0
    name = data[position : position + 8]
    if name.startswith((b"TAG", b"ID3", b"APETAGEX")):
        return True
    if name[:4].isascii() and name[:4].decode().isprintable():
        return True
    return claimed > 0 and not any(data[position : position + 65536])


# --- FLAC: frames that begin with a synchronisation code and their own number
# -----------------------------------------


def _examine_flac(data: Bytes, start: int) -> Findings:
    # STREAMINFO is the first block: its last 36 bits before the checksum are the number of samples,
    # 0 if unknown.
    position = start + 8
    block = int.from_bytes(data[position + 2 : position + 4], "big")
    claimed = int.from_bytes(data[position + 10 : position + 18], "big") & (2**36 - 1)
    ends = _flac_frame_ends(data, position, block)
    if not ends or claimed in ends:
        return Findings()
    # A synchronisation code can occur by chance; a frame that follows another (ends one block
    # later) cannot.
    sure = [
        end for end in ends if len(ends) == 1 or any(0 < end - other <= block for other in ends)
    ]
    if not sure:
        return Findings()
    total = max(sure)
    if claimed > total:
        raise ValueError(
            f"truncated inside: its header promises {claimed} samples, {total} are there"
        )
    truth = int.from_bytes(data[position + 10 : position + 18], "big") & ~(2**36 - 1) | total
    return Findings(splice=(position + 10, 8, truth.to_bytes(8, "big")))


def _flac_frame_ends(data: Bytes, streaminfo: int, block: int) -> set[int]:
    """The sample where each of the last frames ends."""
    largest = int.from_bytes(data[streaminfo + 7 : streaminfo + 10], "big") or 65536
    first = max(len(data) - 4 * largest, streaminfo)
    tail = data[first:]
    ends = set()
    for sync in (
        b"\xff\xf8",
        b"\xff\xf9",
    ):  # blocks of fixed size (numbered), of variable size (by their first sample)
        at = tail.find(sync)
        while at >= 0:
            if header := _flac_frame_header(tail[at : at + 16]):
                number, length = header
                ends.add((number if sync[1] & 1 else number * block) + length)
            at = tail.find(sync, at + 1)
    return ends


def _flac_frame_header(header: bytes) -> tuple[int, int] | None:
    """Number and length in samples of a frame, or None if this is no frame header (RFC 9639, section 9.1)."""
    header = header.ljust(16, b"\0")  # the last frame can be shorter than the longest header
    if header[3] & 1:
        return None
    # The number is coded as in UTF-8, up to seven bytes: as many leading ones as bytes, then six
    # bits in each.
    ones = 8 - (header[4] ^ 0xFF).bit_length()
    if ones in (1, 8):
        return None
    number = header[4] & (0x7F >> ones)
    position = 5
    for _ in range(ones - 1):
        number = number << 6 | header[position] & 0x3F
        position += 1
    size_code, rate_code = header[2] >> 4, header[2] & 0x0F
    if size_code == 0 or rate_code == 15:
        return None
    if size_code in (6, 7):
        width = size_code - 5
        length = int.from_bytes(header[position : position + width], "big") + 1
        position += width
    else:
        length = (
            192
            if size_code == 1
            else 576 << size_code - 2
            if size_code < 6
            else 256 << size_code - 8
        )
    position += {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    checksum = 0
    for byte in header[:position]:
        checksum ^= byte
        for _ in range(8):
            checksum = (checksum << 1 ^ (0x107 if checksum & 0x80 else 0)) & 0xFF
    return (number, length) if checksum == header[position] else None


# --- Ogg: pages
# -------------------------------------------------------------------------------------------------------


def _examine_ogg(data: Bytes, start: int) -> Findings:
    position, samples, end_of_stream = start, [0], False
    while data[position : position + 4] == b"OggS":
        end = _ogg_page_end(data, position)
        if end > len(data):
            raise ValueError("truncated inside: it ends in the middle of an Ogg page")
        page = data[position:end]
        if int.from_bytes(page[22:26], "little") != _ogg_checksum(page):
            raise ValueError(
                f"damaged inside: the checksum of the Ogg page at byte {position} is wrong"
            )
        # The sample at which the last packet that ends on this page ends; -1 if none does.
        samples.append(int.from_bytes(page[6:14], "little", signed=True))
        end_of_stream = bool(page[5] & 4)
        position = end
    if not end_of_stream and position < len(data):
        raise ValueError(f"damaged or truncated inside: no Ogg page at byte {position}")
    # libsndfile (1.2.2) counts back from the sample at which a page says it ends, but the last page
    # says where the audio ends, not its blocks: a seek into it arrives at other samples. So seeks
    # have to stop short of that page.
    return Findings(last_seek=max(samples[:-1]))


def _ogg_page_end(data: Bytes, page: int) -> int:
    lengths = data[page + 27 : page + 27 + data[page + 26]] if page + 26 < len(data) else b""
    whole = page + 26 < len(data) and len(lengths) == data[page + 26]
    return page + 27 + len(lengths) + sum(lengths) if whole else len(data) + 1


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_checksum(page: bytes) -> int:
    """CRC-32 with the highest bit first, from 0, over the page with a checksum of 0 (RFC 3533, section 6).

    zlib's is the same with the lowest bit first, and complemented before and after.
    """
    mirrored = (page[:22] + bytes(4) + page[26:]).translate(_REVERSED)
    return int(f"{zlib.crc32(mirrored, 0xFFFFFFFF) ^ 0xFFFFFFFF:032b}"[::-1], 2)


# --- MP3: frames that begin with their own length
# ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Mp3Frame:
    """The header of a frame of MPEG 1, 2 or 2.5, layer III."""

    kind: tuple[int, int]  # version and sample rate, which do not change within a file
    length: int  # bytes
    side_info: int  # bytes

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def parse(header: bytes) -> _Mp3Frame | None:
        if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
            return None
        version, layer = header[1] >> 3 & 3, header[1] >> 1 & 3  # 0: 2.5, 2: 2, 3: 1
        bitrate, rate, padding = header[2] >> 4, header[2] >> 2 & 3, header[2] >> 1 & 1
        if version == 1 or layer != 1 or bitrate in (0, 15) or rate == 3:
            return None
        mono = header[3] >> 6 == 3
        sample_rate = (44100, 48000, 32000)[rate] // {3: 1, 2: 2, 0: 4}[version]
        if version == 3:
            kbit = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)[bitrate]
            return _Mp3Frame(
                (version, rate), 144_000 * kbit // sample_rate + padding, 17 if mono else 32
            )
        kbit = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)[bitrate]
        return _Mp3Frame((version, rate), 72_000 * kbit // sample_rate + padding, 9 if mono else 17)


def _examine_mp3(data: Bytes, start: int) -> Findings:
    first = _next_mp3_frame(data, start, None)
    if first is None:
        return Findings(is_mp3=True)  # not MP3 after all, or another layer: left to libsndfile
    position, head = first
    info = data[position : position + head.length]
    at = 4 + head.side_info
    has_info = info[at : at + 4] in (b"Xing", b"Info") and bool(info[at + 7] & 1)
    count, position = 0, position + (head.length if has_info else 0)
    while True:
        frame = _Mp3Frame.parse(data[position : position + 4])
        if frame is None or frame.kind != head.kind:
            following = _next_mp3_frame(data, position, head.kind)
            if following is None:
                break
            position, frame = following
        if position + frame.length > len(data):
            raise ValueError(f"truncated inside: it ends in the middle of MP3 frame {count + 1}")
        count += 1
        position += frame.length
    number = count.to_bytes(4, "big")
    if has_info:
        at += first[0] + 8
        return Findings(
            is_mp3=True, splice=None if data[at : at + 4] == number else (at, 4, number)
        )
    # Without that header the decoder guesses the length from the first frame's bit rate. So put one
    # in front, and behind it a frame of silence: once it knows the length, the decoder (mpg123)
    # drops the encoder's delay, as the header gives it, and 529 samples of its own from the
    # beginning. Here that is just the frame of silence.
    samples = 1152 if head.kind[0] == 3 else 576
    delay = (samples - 529) << 12  # 12 bits of delay, 12 of padding at the end
    made = b"Xing" + (1).to_bytes(4, "big") + (count + 1).to_bytes(4, "big")
    made += b"LAME3.100".ljust(21, b"\0") + delay.to_bytes(3, "big") + bytes(12)
    header = bytes(data[first[0] : first[0] + 4])
    for bitrate in range(1, 15):
        header = bytes(
            [0xFF, header[1] | 1, bitrate << 4 | header[2] & 0x0C, header[3]]
        )  # no checksum, no padding
        frame = _Mp3Frame.parse(header)
        if frame and frame.length >= 4 + frame.side_info + len(made):
            silence = header.ljust(frame.length, b"\0")
            at = 4 + frame.side_info
            return Findings(
                is_mp3=True,
                splice=(first[0], 0, silence[:at] + made + silence[at + len(made) :] + silence),
            )
    raise AssertionError("every kind of MP3 has a frame of 100 bytes")


def _next_mp3_frame(
    data: Bytes, position: int, kind: tuple[int, int] | None
) -> tuple[int, _Mp3Frame] | None:
    """The next place where two frames of a kind follow each other, or one ends the file."""
    while (position := data.find(b"\xff", position)) >= 0:
        frame = _Mp3Frame.parse(data[position : position + 4])
        if frame and kind in (None, frame.kind):
            after = data[position + frame.length : position + frame.length + 4]
            following = _Mp3Frame.parse(after)
            if (following and following.kind == frame.kind) or not after:
                return position, frame
        position += 1
    return None


def _after_id3(data: Bytes) -> int:
    """Where the audio begins: ID3v2 tags say their length in four times seven bits."""
    position = 0
    while data[position : position + 3] == b"ID3" and position + 10 <= len(data):
        length = 0
        for byte in data[position + 6 : position + 10]:
            length = length << 7 | byte & 0x7F
        position += 10 + length + (10 if data[position + 5] & 0x10 else 0)
    return position
