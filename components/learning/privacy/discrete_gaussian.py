"""The distributed discrete Gaussian: each silo adds whole-numbered noise of its own, and only the sum has enough of it (Kairouz, Liu &
Steinke 2021, arXiv:2102.06387).

Silos' updates are whole numbers already (`fixed_point`), so that the noise must be, too. Of n silos each adds N_Z(0, s²) to every number. Where one
silo's vector has at most norm Δ, the sum satisfies ½ε²-concentrated differential privacy with (their section 4, Theorem 1, both bounds)

    ε = min( sqrt(Δ²/(n s²) + τd/2),  Δ/(s sqrt n) + τ sqrt d ),    τ = 10 Σ_{k=1}^{n-1} exp(-2π² s² k/(k+1))

n is the least number of silos that a sum can have: noise of more only adds to it. Their random rotation and randomised rounding are for rings of few
bits. Here the ring has room for any vector within the clip, and a quantum is so small a part of the clip that rounding to the nearest, which
moves d numbers by half a quantum each, lengthens the vector by sqrt(d)/2 quanta at most: that is part of Δ.

The sampler is exact (Canonne, Kamath & Steinke 2020, arXiv:2004.00010, Algorithms 1 to 3): no floating-point number stands between its random
bits and what it draws. Its bits come from AES-256 in counter mode, under a key that the silo keeps to itself.
"""

from __future__ import annotations

import math

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

SLACK = 1e-6  # relative: more than floating-point numbers can have been wrong in the clipped norm
MOST_SCALE = 1 << 26  # so that squares of what is drawn have room in 64 bits
FAR = 31  # scales: beyond, which one draw in 10^13 is, arithmetic is Python's
BATCH = 1 << 16  # numbers drawn at a time
MOST_ORDER = 1 << 20  # of Rényi divergences that are looked at


def concentrated_epsilon(rho: float, delta: float) -> float:
    """ε at δ of ρ-concentrated differential privacy: the least of ρα + ln((α-1)/α) - ln(δα)/(α-1) over orders α > 1 (Canonne et al. 2020,
    Proposition 12, after Mironov 2017)."""
    if rho <= 0:
        return 0.0

    def at(log: float) -> float:
        alpha = 1 + math.exp(log)
        return rho * alpha + math.log1p(-1 / alpha) - math.log(delta * alpha) / (alpha - 1)

    low, high = math.log(1e-6), math.log(MOST_ORDER)
    grid = [low + (high - low) * i / 400 for i in range(401)]
    return max(0.0, min(map(at, grid)))  # any order bounds ε, so that the grid need not hit the best one


def rho_for(epsilon: float, delta: float) -> float:
    """The most ρ whose ε at δ is no more than this."""
    low, high = 0.0, 1.0
    while concentrated_epsilon(high, delta) <= epsilon:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if concentrated_epsilon(middle, delta) <= epsilon else (low, middle)
    return low


def sensitivity(bits: int, numbers: int) -> float:
    """Δ: L2 norm of one silo's whole numbers at most, where 2^bits of them are the clip."""
    return (1 << bits) * (1 + SLACK) + math.sqrt(numbers) / 2


def concentrated_rho(bits: int, numbers: int, silos: int, scale: int) -> float:
    """½ε² of one sum, ε as above.

    Args:
        numbers: d, in the vector.
        silos: n, that add noise.
        scale: s, in quanta.
    """
    return rho_of(sensitivity(bits, numbers), numbers, silos, scale)


def rho_of(norm: float, numbers: int, silos: int, scale: int) -> float:
    """The same, of vectors whose L2 norm is at most ``norm``."""
    reach = norm / (scale * math.sqrt(silos))
    tau = 10 * math.fsum(math.exp(-2 * (math.pi * scale) ** 2 * k / (k + 1)) for k in range(1, silos))
    return 0.5 * min(reach**2 + tau * numbers / 2, (reach + tau * math.sqrt(numbers)) ** 2)


def scale_for(epsilon: float, delta: float, rounds: int, bits: int, numbers: int, silos: int) -> int:
    """The least scale of each silo's noise, in quanta, with which so many sums stay within ε at δ.

    Raises:
        ValueError: none does that this sampler can draw.
    """
    allowed = rho_for(epsilon, delta) / rounds
    scale = max(1, math.ceil(sensitivity(bits, numbers) / math.sqrt(2 * allowed * silos)))
    while scale <= MOST_SCALE and concentrated_rho(bits, numbers, silos, scale) > allowed:
        scale += max(1, scale // 1000)
    if scale > MOST_SCALE:
        raise ValueError(
            f"noise: would need a scale of {scale} quanta, at most {MOST_SCALE} can be drawn; lower privacy.secure_aggregation.bits"
        )
    return scale


class Noise:
    """Draws of N_Z(0, scale²) without end, one after the other; the same ones for the same key."""

    def __init__(self, key: bytes, scale: int) -> None:
        """
        Args:
            key: 32 bytes.
            scale: s, in quanta; at most `MOST_SCALE`.
        """
        if not 1 <= scale <= MOST_SCALE:
            raise ValueError(f"scale: must be from 1 to {MOST_SCALE}, got {scale}")
        self._words, self._scale, self._rest = Words(key), scale, np.empty(0, np.int64)

    def take(self, count: int) -> np.ndarray:
        """The next ones, int64. How they are taken in parts changes nothing about them."""
        batches = [self._rest]
        have = len(self._rest)
        while have < count:
            batches.append(_gaussian(self._words, self._scale, BATCH))
            have += BATCH
        found = np.concatenate(batches)
        self._rest = found[count:]
        return found[:count]


class Words:
    """Random bits, 64 at a time."""

    def __init__(self, key: bytes) -> None:
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def take(self, count: int) -> np.ndarray:
        return np.frombuffer(self._stream.update(bytes(8 * count)), "<u8")

    def below(self, limits: np.ndarray) -> np.ndarray:
        """One uniform number from 0 to before each limit, uint64, by rejection of the uneven end."""
        words = self.take(len(limits))
        found = words % limits
        near = np.flatnonzero(
            words >= -limits
        )  # of the last ``limit`` words, some are the uneven end, of 2^64 mod limit; -limit is 2^64 - limit
        left = near[words[near] > ~(-limits[near] % limits[near])]
        if len(left):
            found[left] = self.below(limits[left])
        return found


def _exp_small(words: Words, above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """True with probability exp(-above/below), each, for fractions from 0 to 1 (Algorithm 1)."""
    result = np.zeros(len(above), bool)
    left, k = np.arange(len(above)), 1
    while len(left):
        goes_on = words.below(below[left] * np.uint64(k)) < above[left]
        result[left[~goes_on]] = k % 2 == 1
        left, k = left[goes_on], k + 1
    return result


def _exp(words: Words, above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The same for any fraction: exp(-1) as often as it is whole, and the rest."""
    times, result = above // below, np.ones(len(above), bool)
    left, done = np.flatnonzero(times > 0), 0
    while len(left):
        one = np.ones(len(left), np.uint64)
        result[left[~_exp_small(words, one, one)]] = False
        done += 1
        left = left[result[left] & (times[left] > done)]
    left = np.flatnonzero(result)
    result[left] = _exp_small(words, above[left] % below[left], below[left])
    return result


def _laplace(words: Words, scale: int, count: int) -> np.ndarray:
    """About ``count`` draws of the discrete Laplace distribution, or fewer, int64 (Algorithm 2)."""
    limits = np.full(count, scale, np.uint64)
    low = words.below(limits)
    low = low[_exp_small(words, low, limits)]
    high = np.zeros(len(low), np.int64)
    left = np.arange(len(low))
    while len(left):
        one = np.ones(len(left), np.uint64)
        left = left[_exp_small(words, one, one)]
        high[left] += 1
    found = low.astype(np.int64) + scale * high
    negative = words.below(np.full(len(found), 2, np.uint64)) == 1
    found = np.where(negative, -found, found)
    return found[~(negative & (found == 0))]


def _gaussian(words: Words, scale: int, count: int) -> np.ndarray:
    """``count`` draws of N_Z(0, scale²), int64 (Algorithm 3, from a Laplace distribution of the same scale)."""
    batches: list[np.ndarray] = []
    have = 0
    while have < count:
        y = _laplace(words, scale, 2 * (count - have) + 64)
        off = np.abs(y) - scale  # accepted with probability exp(-(|y| - scale)² / (2 scale²))
        near = np.abs(off) < FAR * scale
        squares = np.where(near, off, 0).astype(np.int64) ** 2
        keep = _exp(words, squares.astype(np.uint64), np.full(len(y), 2 * scale * scale, np.uint64)) & near
        for i in np.flatnonzero(~near):
            keep[i] = _exp_far(words, int(off[i]) ** 2, 2 * scale * scale)
        batches.append(y[keep])
        have += int(keep.sum())
    return np.concatenate(batches)[:count]


def _exp_far(words: Words, above: int, below: int) -> bool:
    """As `_exp`, of one fraction whose numerator may need more than 64 bits."""
    one = np.ones(1, np.uint64)
    for _ in range(above // below):
        if not _exp_small(words, one, one)[0]:
            return False
    return bool(_exp_small(words, np.array([above % below], np.uint64), np.array([below], np.uint64))[0])
