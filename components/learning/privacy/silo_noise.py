"""Noise on what the silos' clipped updates add up to, so that a global says almost nothing about whether a silo took part.

Neighbours are two courses of a federation that differ in one silo: in one of them nothing of it is added, to no round's sum and to no count
(zero-out, Kairouz et al. 2021, arXiv:2103.00039, Definition 1.1). Who took part is public, since commits name it; so a sum may be divided by the
number of silos that delivered, after the noise. A sum is moved by at most the clip; the rounding of a sum in float32, and of sum and noise to the
grid that noise is added on, is part of the sensitivity here.

Adaptive clipping publishes one more number a round: how many norms lie within the bound. Centred, a silo moves it by ½ (Andrew et al. 2021,
arXiv:1905.03871, Theorem 1). Sum and count are one release of noise multiplier z, with 1/z² = 1/z_Δ² + 1/(2σ_b)², of which the count has `SHARE`.
The paper's own choice, σ_b = silos/20, is for thousands of them. `count_tells` is what to expect of fewer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from silotune.components.learning.privacy.noise import BLOCK, GRID_BITS, Noise, add_noise, grid_of

SHARE = 0.1  # of 1/z²: what the count is allotted
UNIT = 2.0**-24  # of a rounding in float32
WORTH = 2.5  # standard deviations from which on a count is worth following


@dataclass(frozen=True)
class Layer:
    """One noise of several that are added or taken away together."""

    sign: int
    noise: Noise


@dataclass
class SumNoise:
    """Noise for one sum. Made anew whenever it is asked for, block by block, so that any window of a tensor can have its own."""

    deviation: float  # standard deviation of each layer
    layers: Sequence[Layer]
    _made: dict[int, tuple[str, int, np.ndarray]] = field(default_factory=dict, init=False)

    def added(self, name: str, start: int, whole: int, total: np.ndarray) -> np.ndarray:
        """Numbers ``start`` … of a tensor's sum with their noise; float64.

        Args:
            whole: numbers in the tensor.
            total: (count,).
        """
        grid, stop = grid_of(self.deviation), start + len(total)
        found = np.rint(total.astype(np.float64) / grid)
        for number, layer in enumerate(self.layers):
            for block in range(start // BLOCK, -(-stop // BLOCK)):
                first = max(start, block * BLOCK)
                last = min(stop, (block + 1) * BLOCK)
                units = self._units(number, layer, name, block, whole)[first - block * BLOCK : last - block * BLOCK]
                found[first - start : last - start] += layer.sign * units
        found *= grid
        return found

    def _units(self, number: int, layer: Layer, name: str, block: int, whole: int) -> np.ndarray:
        """A block's noise as multiples of the grid; the last one made is kept, since windows begin where others end."""
        known = self._made.get(number)
        if known is None or known[:2] != (name, block):
            units = layer.noise.normals(min(BLOCK, whole - block * BLOCK), name, block)
            units *= self.deviation / grid_of(self.deviation)
            self._made[number] = known = (name, block, np.rint(units))
        return known[2]


@dataclass(frozen=True)
class SiloNoise:
    """What one round's sum is published with."""

    multiplier: float  # z of sum and count together; of a tree, of each node
    layers: Sequence[Layer]
    numbers: int  # in the global at most
    silos: int  # in the federation
    fan_in: int
    count: Noise | None = None  # adaptive clipping: noise of the count

    @property
    def of_sum(self) -> float:
        """z_Δ."""
        return self.multiplier / math.sqrt(1 - SHARE) if self.count else self.multiplier

    @property
    def of_count(self) -> float:
        """σ_b."""
        return self.multiplier / (2 * math.sqrt(SHARE))

    def for_bound(self, bound: float) -> SumNoise:
        """Noise for a sum of updates clipped to ``bound``.

        Raises:
            ValueError: the model has so many numbers that their rounding to the grid counts for as much as the clip.
        """
        # What float32 makes of the sum: `summation` bounds the error of a number by (2 + (fan_in - 1)·levels)·2⁻²⁴·Σ|wᵢxᵢ|, on either side. The
        # factors are rounded as well.
        levels = max(1, math.ceil(math.log(max(self.silos, 2), self.fan_in) - 1e-9))
        sensitivity = bound * (1 + 2 * (3 + (self.fan_in - 1) * levels) * UNIT * self.silos)
        rounding = self.of_sum * math.sqrt(self.numbers) * 2.0**-GRID_BITS  # the grid is at most 2^-GRID_BITS of the deviation
        if rounding >= 0.5:
            raise ValueError(
                f"a noise multiplier of {self.of_sum:g} is too large for {self.numbers} numbers: their rounding tells too much"
            )
        return SumNoise(self.of_sum * sensitivity / (1 - rounding), self.layers)

    def share(self, within: Sequence[bool]) -> float:
        """Of the norms within the bound, with noise: also below 0 and above 1, and right on average."""
        assert self.count is not None
        centred = np.array([sum(0.5 if one else -0.5 for one in within)])
        noisy = float(add_noise(centred, self.of_count * (1 + 2 * 2.0**-GRID_BITS * self.of_count), self.count.normals(1, "count"))[0])
        return noisy / len(within) + 0.5


def count_tells(silos: int, mu: float) -> float:
    """By how many of their noise's standard deviations all rounds' counts together tell a bound above all norms from one amid them.

    A round's count differs by silos/2 then, against σ_b = √rounds / (2 μ √SHARE): the number of rounds cancels. Below `WORTH` the bound goes where
    chance takes it. (Simulated: begun ten times off and followed for 20 rounds, it ends 0.5 from the median, as a logarithm, where this is 7, 1.1 where
    it is 2.5, and as far off as it began, 2, where it is 0.7.)

    Args:
        mu: of all releases together (see `gaussian.mu_of`).
    """
    return silos * mu * math.sqrt(SHARE)
