"""Damage done to bytes: what disks, cables and enemies do to a file."""

from __future__ import annotations

import struct
import zlib

import numpy as np

_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def random_of(kind: str, number: int) -> np.random.Generator:
    """Return the random numbers of one input."""
    return np.random.default_rng([zlib.crc32(kind.encode()), number])


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Damage bytes in one to three ways."""
    damage = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        if damage:
            _WAYS[rng.integers(len(_WAYS))](damage, rng)
    return bytes(damage)


def _place(data: bytearray, rng: np.random.Generator) -> int:
    """Half of the damage is done to the beginning, where headers are."""
    end = min(len(data), 128) if rng.integers(2) else len(data)
    return int(rng.integers(end))


def _flip(data: bytearray, rng: np.random.Generator) -> None:
    for _ in range(rng.integers(1, 9)):
        data[_place(data, rng)] ^= 1 << int(rng.integers(8))


def _overwrite(data: bytearray, rng: np.random.Generator) -> None:
    number = _NUMBERS[rng.integers(len(_NUMBERS))]
    size = int(rng.choice([1, 2, 4, 8]))
    order = "little" if rng.integers(2) else "big"
    at = _place(data, rng)
    data[at : at + size] = (number & (256**size - 1)).to_bytes(size, order)


def _truncate(data: bytearray, rng: np.random.Generator) -> None:
    del data[int(rng.integers(len(data))) :]


def _cut_out(data: bytearray, rng: np.random.Generator) -> None:
    at = _place(data, rng)
    del data[at : at + int(rng.integers(1, 64))]


def _repeat(data: bytearray, rng: np.random.Generator) -> None:
    at = _place(data, rng)
    piece = bytes(data[at : at + int(rng.integers(1, 256))])
    data[at:at] = piece * int(rng.integers(1, 20))


def _noise(data: bytearray, rng: np.random.Generator) -> None:
    at = _place(data, rng)
    size = min(int(rng.integers(1, 200)), len(data) - at)
    data[at : at + size] = rng.bytes(size)


_WAYS = (_flip, _flip, _overwrite, _overwrite, _truncate, _cut_out, _repeat, _noise)


def png_with_right_sums(data: bytes) -> bytes:
    """Return a damaged PNG whose checksums are right, so that the damage reaches the decoder."""
    mended, at = bytearray(data), 8
    while at + 12 <= len(mended):
        (size,) = struct.unpack(">I", mended[at : at + 4])
        if at + 12 + size > len(mended):
            break
        body = mended[at + 4 : at + 8 + size]
        mended[at + 8 + size : at + 12 + size] = struct.pack(">I", zlib.crc32(body))
        at += 12 + size
    return bytes(mended)


def png_of(width: int, height: int, *, depth: int = 8, colour: int = 0) -> bytes:
    """Return a black PNG of any size, of few bytes.

    Args:
        width: pixels.
        height: pixels.
        depth: bits per channel.
        colour: PNG's colour type: 0 grey, 2 RGB, 6 RGBA.
    """
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    row_bytes = 1 + (width * channels * depth + 7) // 8
    packer = zlib.compressobj(9)
    left, packed = row_bytes * height, b""
    while left:
        size = min(left, 1 << 20)
        packed += packer.compress(bytes(size))
        left -= size
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", packed + packer.flush()), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
