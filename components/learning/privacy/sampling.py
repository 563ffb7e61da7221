"""Which units a step of private training sees: every one with the same probability, by itself, in every step anew.

This is the sampling that the accounting is made for (Abadi et al. 2016, arXiv:1607.00133, section 3.1). A shuffled order, or batches of a fixed size, is
not: their ε is another, and mostly larger one (Chua et al. 2024, arXiv:2403.17673). So a step's sample may be empty, and now and then it is large; what
memory must hold at a time is bounded by `groups`.

Whether a unit is drawn follows from the silo's own secret. If it followed from a public seed, everyone would know who was in a step, and nothing
would be gained by sampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from silotune.components.learning.batches import pack
from silotune.components.learning.privacy.noise import BLOCK, Bits
from silotune.components.learning.privacy.own_secret import subkey
from silotune.components.learning.tokens import Shard


def sample(key: bytes, step: int, units: int, probability: float) -> np.ndarray:
    """The units of a step, in ascending order; (drawn,) int64."""
    if probability >= 1:
        return np.arange(units)
    stream, least = Bits(subkey(key, "sample", step)), np.uint64(math.floor(probability * 2.0**64))
    drawn = [start + np.flatnonzero(stream.take(min(BLOCK, units - start)) < least) for start in range(0, units, BLOCK)]
    return np.concatenate(drawn) if drawn else np.empty(0, np.int64)


@dataclass(frozen=True)
class Units:
    """Which examples are whose: the examples of unit u are ``examples[starts[u] : starts[u + 1]]``."""

    examples: np.ndarray  # (examples,) int64
    starts: np.ndarray  # (units + 1,) int64

    @classmethod
    def of(cls, shard: Shard) -> Units:
        counts = np.bincount(shard.units)
        return cls(np.argsort(shard.units, kind="stable"), np.concatenate([[0], np.cumsum(counts)]))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def of_unit(self, unit: int) -> np.ndarray:
        return self.examples[self.starts[unit] : self.starts[unit + 1]]


@dataclass(frozen=True)
class Group:
    """Units whose gradients are held at the same time: one part after the other is computed, then all are clipped and added up."""

    units: tuple[int, ...]
    parts: tuple[tuple[tuple[int, ...], ...], ...]  # of rows of examples


def groups(shard: Shard, units: Units, drawn: np.ndarray, rows: int, capacity: int, packing: bool) -> Iterator[Group]:
    """A step's sample in groups that memory can hold: virtual batches.

    Args:
        drawn: units of the step.
        rows: of a part at most, and units of a group at most. A unit with more rows than that has a group of its own, of several parts.
        capacity: tokens of a row.
        packing: lay examples side by side in a row, of several units, too: they cannot see each other, and each unit's gradient is taken
            from its own stretches.
    """

    def laid(chosen: list[int]) -> list[tuple[int, ...]]:
        indices = np.concatenate([units.of_unit(u) for u in chosen])
        placed = pack(shard.lengths(indices), capacity if packing else 0)
        return [tuple(int(indices[i]) for i in row) for row in placed]

    def made(chosen: list[int], lines: list[tuple[int, ...]]) -> Group:
        return Group(tuple(chosen), tuple(tuple(lines[at : at + rows]) for at in range(0, len(lines), rows)))

    held: list[int] = []
    lines: list[tuple[int, ...]] = []
    for unit in drawn.tolist():
        longer = laid([*held, unit])
        if held and (len(longer) > rows or len(held) >= rows):
            yield made(held, lines)
            held, longer = [], laid([unit])
        held, lines = [*held, unit], longer
    if held:
        yield made(held, lines)
