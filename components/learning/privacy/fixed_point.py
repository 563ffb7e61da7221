"""Fixed point: a clipped update as whole numbers whose sum over all silos is exact.

A number x of an update is sent as round(w·x / q), where the quantum q is the clip divided by 2^bits and w, at most one, is the silo's weight.
|x| is at most the update's norm, which is at most the clip: so every whole number lies within ±2^bits, and the sum of n silos' within ±n·2^bits.
They are added modulo 2^32 or 2^64, as unsigned numbers. The sum is read as a signed one, and is the true one, if n·2^bits < 2^31 or 2^63: the
narrower ring is taken where that holds.

The error of a silo's number is at most half a quantum, of the sum's n halves. Where silos add noise (`discrete_gaussian`), the ring also holds
`TAILS` standard deviations of the sum's noise, beyond which no draw will ever be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

WIDTHS = (32, 64)
SLACK = 1e-6  # relative: more than floating-point numbers can have been wrong in the norms
TAILS = 12  # a normal number is further off with probability 2^-108
BLOCK = 1 << 15  # numbers worked on at a time, so that all that is made of them stays in the processor's cache


@dataclass(frozen=True)
class FixedPoint:
    """How numbers become whole ones.

    Raises:
        ValueError: no ring holds the sum, or the clip or the weights make no sense.
    """

    clip: float  # L2 norm of an update at most
    bits: int  # the clip is 2^bits quanta
    silos: int  # whose numbers are added at most
    noise: int = 0  # standard deviation of the noise that each silo adds, in quanta

    def __post_init__(self) -> None:
        if not (self.clip > 0 and self.bits >= 1 and self.silos >= 1):
            raise ValueError(f"clip, bits and silos: must be positive, got {self.clip}, {self.bits}, {self.silos}")
        if self.reach >= 1 << (WIDTHS[-1] - 1):
            raise ValueError(f"bits: the sum of {self.silos} silos' numbers of {self.bits} bits does not fit into 64 bits; lower bits")

    @property
    def quantum(self) -> float:
        return self.clip / (1 << self.bits)

    @property
    def reach(self) -> int:
        """What the sum's numbers lie within, either side of zero."""
        return (self.silos << self.bits) + math.ceil(TAILS * math.sqrt(self.silos) * self.noise)

    @property
    def width(self) -> int:
        """Bits of the ring's numbers."""
        return next(width for width in WIDTHS if self.reach < 1 << (width - 1))

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Of the ring's numbers as they are stored: little-endian, unsigned."""
        return np.dtype(f"<u{self.width // 8}")

    def most(self, weight: float, silos: int, numbers: int) -> float:
        """L2 norm that a sum has at most: the clips by their weights, half a quantum of rounding in every number of every silo, and noise.

        Args:
            weight: that of all silos in the sum together.
            silos: in the sum.
            numbers: of the vector.
        """
        rounding, noise = silos * math.sqrt(numbers) / 2, self.noise * math.sqrt(silos) * (math.sqrt(numbers) + TAILS)
        return weight * self.clip * (1 + SLACK) + self.quantum * (rounding + noise)

    def encode(self, x: np.ndarray, factor: float) -> np.ndarray:
        """round(x · factor / q), ties to even, as numbers of the ring.

        Args:
            x: float32, flat.
            factor: what clips the update, times the silo's weight; from 0 to 1.
        """
        if not 0 <= factor <= 1:
            raise ValueError(f"factor: must be from 0 to 1, got {factor}")
        found = np.empty(len(x), self.dtype)
        most, scale = float(1 << self.bits), factor / self.quantum
        for start in range(0, len(x), BLOCK):
            part = x[start : start + BLOCK].astype(np.float64)
            part *= scale
            np.rint(part, out=part)
            np.clip(part, -most, most, out=part)  # rounding in the norm or the factor can only have gone this far by an ulp
            found[start : start + BLOCK] = part.astype(np.int64).astype(self.dtype)
        return found

    def decode(self, total: np.ndarray) -> np.ndarray:
        """The sum's numbers as float64, from those of the ring."""
        signed = total.view(np.dtype(f"<i{self.width // 8}"))
        return signed.astype(np.float64) * self.quantum


def clipping_factor(norm: float, clip: float) -> float:
    """What an update is multiplied by so that its L2 norm is at most the clip (McMahan et al. 2018, arXiv:1710.06963)."""
    return 1.0 if norm <= clip else clip / norm
