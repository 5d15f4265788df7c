"""Idx files, which MNIST and its relatives come in."""

import math
import struct

import numpy as np


def decode(content: bytes, *axes: int) -> np.ndarray:
    """The array of an idx file of unsigned bytes, uint8 [as its header says], which has one of these numbers of axes.

    An idx file is 0, 0, the type of the values (8: unsigned byte), the number of axes; the length of each axis as a
    big-endian 32-bit number; the values, last axis fastest. Source: http://yann.lecun.com/exdb/mnist

    Raises ValueError saying what was expected, and what found.
    """
    count = content[3] if content[3:4] and content[3] in axes else axes[0]
    magic, header = bytes((0, 0, 8, count)), struct.Struct(f">4x{count}I")
    if not content.startswith(magic) or len(content) < header.size:
        raise ValueError(f"expected an idx header starting {magic.hex()}, found {content[: header.size].hex()}")
    shape = header.unpack_from(content)
    size = header.size + math.prod(shape)
    if len(content) != size:
        raise ValueError(f"expected {size:,} bytes for {shape}, found {len(content):,}")
    # Copied, because torch warns of memory that it must not write.
    return np.frombuffer(content, np.uint8, offset=header.size).reshape(shape).copy()
