"""Character vectors out of R data files (``Rdata.rdb``), for the one corpus that comes as an R package. No R needed.

An .rdb file is a row of blocks: a 4-byte big-endian length of what is inside, then a zlib stream. Inside is R's XDR
serialisation (``X`` and a line feed, version 2 or 3), of which only plain character vectors are read here.
"""

from __future__ import annotations

import struct
import zlib

from dmtd_models.data.errors import DataError

_VERSION_WITH_ENCODING = 3
_CHARACTER_VECTOR = 16
_CHARACTER = 9
_MAX_BLOCK_BYTES = 64 << 20


def read_vectors(data: bytes) -> list[list[str]]:
    """Every character vector of an .rdb file, in the file's order; a missing value (NA) is an empty text.

    Raises:
        DataError: another structure.
    """
    vectors, start = [], 0
    while start < len(data):
        try:
            stream = zlib.decompressobj()
            block = stream.decompress(data[start + 4 :], _MAX_BLOCK_BYTES)
            (length,) = struct.unpack_from(">I", data, start)
            if len(block) != length or not stream.eof:
                raise DataError(f"R data: block at byte {start}: got {len(block)} bytes, expected {length}")
            vectors.append(_vector(block))
        except (struct.error, zlib.error, UnicodeDecodeError) as error:
            raise DataError(f"R data: block at byte {start}: not as expected ({error})") from error
        start = len(data) - len(stream.unused_data)
    return vectors


def _vector(block: bytes) -> list[str]:
    magic, version = struct.unpack_from(">2si", block)
    if magic != b"X\n":
        raise DataError(f"R data: got {magic!r}, expected XDR serialisation")
    at = 2 + 3 * 4
    if version == _VERSION_WITH_ENCODING:
        (encoding_bytes,) = struct.unpack_from(">i", block, at)
        at += 4 + encoding_bytes
    flags, count = struct.unpack_from(">ii", block, at)
    if flags & 0xFF != _CHARACTER_VECTOR:
        raise DataError(f"R data: got an object of type {flags & 0xFF}, expected a character vector")
    at += 8
    texts = []
    for _ in range(count):
        flags, size = struct.unpack_from(">ii", block, at)
        if flags & 0xFF != _CHARACTER or at + 8 + size > len(block):
            raise DataError(f"R data: got an element of type {flags & 0xFF} and {size} bytes, expected text")
        at += 8
        texts.append(block[at : at + max(size, 0)].decode("utf-8"))
        at += max(size, 0)
    return texts
