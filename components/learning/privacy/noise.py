"""Gaussian noise that nobody can foresee: normal numbers from a key, by step and tensor.

A place (step, tensor) has a key of its own, whose ChaCha20 stream (RFC 8439) is turned into pairs of normal numbers by Box & Muller 1958,
doi:10.1214/aoms/1177706645, in float64 from 53 random bits. So any step's noise can be made at any time, in any order and again. The greatest number
that can come is 8.57; a true normal one passes it with probability 1e-17.

Floating point. Numbers of a computer are no real ones: sums and noise that are merely rounded leave gaps that tell them apart (Mironov 2012,
doi:10.1145/2382196.2382264). So noise is added on a grid, in the manner of Canonne et al. 2020 (arXiv:2004.00010): the sum is rounded to
multiples of g, and so is the noise, where g is a power of 2 of some 2⁻²⁴ of the noise's deviation, and both are added exactly. What comes out
is a multiple of g whatever the data, and every multiple within reach can come. For real normal numbers that would be rounding after the
noise, hence no loss: round(x + n) = x + round(n) for x on the grid. What is added up comes on the grid already (`clipping`), so that sums are exact;
what that rounding adds to a unit's part, g/2 a number, is taken off the clip by `clip_left`. What is left is that the noise's own numbers have
53 bits.
"""

from __future__ import annotations

import math

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from silotune.components.learning.privacy.own_secret import subkey

BLOCK = 1 << 15  # normal numbers made at a time: what is made of them stays in the processor's cache
GRID_BITS = 24
_ZEROS = bytes(8 * BLOCK)
_UNIT = 2.0**-53


class Noise:
    """The normal numbers of one key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def normals(self, count: int, *place: str | int) -> np.ndarray:
        """Standard normal numbers for one place; (count,) float64."""
        stream = Bits(subkey(self._key, *place))
        found = np.empty(count + count % 2)
        for start in range(0, len(found), BLOCK):
            _box_muller(stream.take(min(BLOCK, len(found) - start)), found[start : start + BLOCK])
        return found[:count]


class Bits:
    """The random 64-bit numbers of a key, one after the other."""

    def __init__(self, key: bytes) -> None:
        self._stream = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()  # the nonce may be 0: the key has no second use
        self._room = bytearray(len(_ZEROS))

    def take(self, count: int) -> np.ndarray:
        """The next ones, (count,) uint64, at most `BLOCK`; good until the next call."""
        self._stream.update_into(memoryview(_ZEROS)[: 8 * count], self._room)
        return np.frombuffer(self._room, "<u8", count)


def grid_of(deviation: float) -> float:
    """The grid that noise of a standard deviation is added on."""
    return math.ldexp(1.0, math.floor(math.log2(deviation)) - GRID_BITS)


def clip_left(clip: float, deviation: float, numbers: int) -> float:
    """The norm to clip a unit to, so that its part of so many numbers, each rounded to the grid, has a norm of ``clip`` at most.

    Raises:
        ValueError: nothing is left, with more numbers than any model has.
    """
    left = clip * (1 - 1e-12) - grid_of(deviation) * math.sqrt(numbers) / 2
    if left <= 0:
        raise ValueError(f"a clip of {clip:g} leaves nothing beside the rounding of {numbers} numbers under noise of {deviation:g}")
    return left


def add_noise(total: np.ndarray, deviation: float, normals: np.ndarray) -> np.ndarray:
    """A sum with noise: both on the grid, float64.

    Args:
        total: any shape.
        normals: as many standard normal numbers, used up.
    """
    grid = grid_of(deviation)
    normals *= deviation / grid
    np.rint(normals, out=normals)
    found = np.rint(total.astype(np.float64).reshape(-1) / grid)  # a power of 2: exact
    found += normals
    found *= grid
    return found.reshape(total.shape)


def _box_muller(bits: np.ndarray, out: np.ndarray) -> None:
    half = len(bits) // 2
    radius = (bits[:half] >> np.uint64(11)).astype(np.float64)
    radius += 1.0
    radius *= _UNIT  # in (0, 1]
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    angle = (bits[half:] >> np.uint64(11)).astype(np.float64)
    angle *= 2 * np.pi * _UNIT
    np.multiply(radius, np.cos(angle), out=out[:half])
    np.multiply(radius, np.sin(angle), out=out[half:])
