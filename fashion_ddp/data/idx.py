"""Decode idx files, the format of MNIST and its relatives."""

import math
import struct

import numpy as np

LONGEST_HEADER = 4 + 4 * 4  # bytes, of four axes


def size(content: bytes) -> int:
    """Return how many values an idx file says that it has, by the beginning of its content; 0 where it has no header.

    Its reader then knows how much memory it takes; `decode` says what is wrong.
    """
    count = content[3] if content[3:4] else 0
    lengths = content[4 : 4 + 4 * count]
    return math.prod(struct.unpack(f">{count}I", lengths)) if count and len(lengths) == 4 * count else 0


def decode(content: bytes, *axes: int) -> np.ndarray:
    """Return the array in an idx file of unsigned bytes: uint8, of the shape in its header.

    `axes` are the numbers of axes to accept. An idx file is 0, 0, the type of the values (8: unsigned byte), the number
    of axes; the length of each axis as a big-endian 32-bit number; the values, last axis fastest. Source:
    http://yann.lecun.com/exdb/mnist

    Raises ValueError, which says what was expected and what was found.
    """
    count = content[3] if content[3:4] and content[3] in axes else axes[0]
    magic, header = bytes((0, 0, 8, count)), struct.Struct(f">4x{count}I")
    if not content.startswith(magic) or len(content) < header.size:
        raise ValueError(f"expected an idx header starting {magic.hex()}, found {content[: header.size].hex()}")
    shape = header.unpack_from(content)
    size = header.size + math.prod(shape)
    if len(content) != size:
        raise ValueError(f"expected {size:,} bytes for {shape}, found {len(content):,}")
    # A copy, because torch warns about memory that is read-only.
    return np.frombuffer(content, np.uint8, offset=header.size).reshape(shape).copy()
