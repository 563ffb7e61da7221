"""Robust rules that work number by number: medians and trimmed means over the silos.

A tensor of all K silos is worked on in blocks that fit the processor's cache. Of a block, silos' rows are ordered number by number with a
sorting network (Batcher 1968, doi:10.1145/1468075.1468121): a fixed list of exchanges of two rows, each a minimum and a maximum of whole rows,
from which those that do not reach a wanted row are struck out. That is several times faster than sorting columns of K numbers one after the
other, and gives the same bytes on every processor. Numbers must be finite.

These rules need one coordinate system for all silos. LoRA's factors have none; see `robust_product`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

BLOCK = 1 << 18  # numbers of all silos together that are ordered at a time: 1 MiB of float32
NARROW, WIDE = 1 << 12, 1 << 14  # numbers of one silo at a time; fewer leave numpy more overhead than work

Rule = Callable[[np.ndarray], np.ndarray]  # (K, n) block, which may be overwritten -> (n,)
Exchange = tuple[int, int, bool, bool]  # rows a < b; whether the lesser is needed, in a, and the greater, in b


def combine(rows: Sequence[np.ndarray], rule: Rule, factors: Sequence[float] | None = None) -> np.ndarray:
    """A rule over one tensor of all silos: float32, of their shape.

    Args:
        rows: the silos' differences, float32, of one shape.
        factors: by which each is multiplied before (`bounds`).
    """
    if len({row.shape for row in rows}) != 1:
        raise ValueError(f"rows: must be of one shape, got {sorted({row.shape for row in rows})}")
    flat = [row.reshape(-1) for row in rows]
    size = flat[0].size
    width = min(WIDE, max(NARROW, BLOCK // len(flat)))
    out = np.empty(size, np.float32)
    scratch = np.empty((len(flat), width), np.float32)
    for start in range(0, size, width):
        block = scratch[:, : min(width, size - start)]
        for i, row in enumerate(flat):
            np.multiply(row[start : start + width], np.float32(1 if factors is None else factors[i]), out=block[i])
        out[start : start + width] = rule(block)
    return out.reshape(rows[0].shape)


def median(weights: Sequence[float] | None = None) -> Rule:
    """The middle number, or the mean of the two in the middle (Yin et al. 2018, arXiv:1803.01498, Definition 1).

    Args:
        weights: where given, the number at which half of the weight is reached, or the mean of it and the next where it is reached exactly.
            Hostile silos then need half of the *weight*, not of the number, to set the result.
    """
    if weights is not None:
        return _weighted_median(np.asarray(weights, np.float64))

    def rule(block: np.ndarray) -> np.ndarray:
        low, high = (len(block) - 1) // 2, len(block) // 2
        rows = _ordered(block, low, high + 1)
        return rows[low] if low == high else rows[low] * 0.5 + rows[high] * 0.5

    return rule


def trimmed_mean(trim: int, weights: Sequence[float] | None = None) -> Rule:
    """The mean without the ``trim`` least and greatest numbers (arXiv:1803.01498, Definition 2, with β = trim / K).

    Args:
        weights: of the silos in the mean of what is left. Trimming goes by number all the same, so that no claim of weight is a way around it.

    Raises:
        ValueError: from the rule, if nothing is left.
    """

    def rule(block: np.ndarray) -> np.ndarray:
        if len(block) <= 2 * trim:
            raise ValueError(f"trim: must be less than half of the {len(block)} silos, got {trim}")
        if weights is not None:
            order = np.argsort(block, axis=0, kind="stable")[trim : len(block) - trim]
            shares = np.asarray(weights, np.float64)[order]
            return np.asarray((np.take_along_axis(block, order, 0) * shares).sum(axis=0) / shares.sum(axis=0))
        # The rest is added up, not the trimmed taken from the sum: beside one huge number all others would be lost.
        return _mean(_ordered(block, trim, len(block) - trim, apart=True)[trim : len(block) - trim])

    return rule


def mean_around_median(keep: int) -> Rule:
    """The mean of the ``keep`` numbers nearest to the median: Bulyan's second half (El Mhamdi et al. 2018, arXiv:1802.07927, section 4).

    In order, those numbers are neighbours: of all windows of that many, the one whose farthest end is nearest; of equals, the lowest.
    """

    def rule(block: np.ndarray) -> np.ndarray:
        count = len(block)
        if not 1 <= keep <= count:
            raise ValueError(f"keep: must be from 1 to {count}, got {keep}")
        rows = _ordered(block, 0, count)
        middle = rows[(count - 1) // 2] * 0.5 + rows[count // 2] * 0.5
        best, nearest = _mean(rows[:keep]), np.maximum(middle - rows[0], rows[keep - 1] - middle)
        for start in range(1, count - keep + 1):
            farthest = np.maximum(middle - rows[start], rows[start + keep - 1] - middle)
            better = farthest < nearest
            np.copyto(best, _mean(rows[start : start + keep]), where=better)
            np.copyto(nearest, farthest, where=better)
        return best

    return rule


def _weighted_median(weights: np.ndarray) -> Rule:
    def rule(block: np.ndarray) -> np.ndarray:
        order = np.argsort(block, axis=0, kind="stable")
        rows = np.take_along_axis(block, order, 0)
        reached = np.cumsum(weights[order], axis=0) / weights.sum()
        low = (reached < 0.5 - 1e-12).sum(axis=0)[None]
        high = (reached <= 0.5 + 1e-12).sum(axis=0)[None]
        return np.asarray(np.take_along_axis(rows, low, 0)[0] * 0.5 + np.take_along_axis(rows, high, 0)[0] * 0.5)

    return rule


def _mean(rows: Sequence[np.ndarray]) -> np.ndarray:
    total = rows[0].copy()
    for row in rows[1:]:
        total += row
    total /= len(rows)
    return total


def _ordered(block: np.ndarray, start: int, stop: int, apart: bool = False) -> list[np.ndarray]:
    """Rows of a block, overwritten, of which `exchanges` has put those from ``start`` up to ``stop`` in their places."""
    rows, spare = list(block), np.empty_like(block[0])
    for a, b, low, high in exchanges(len(block), start, stop, apart):
        if low and high:
            np.minimum(rows[a], rows[b], out=spare)
            np.maximum(rows[a], rows[b], out=rows[b])
            rows[a], spare = spare, rows[a]
        elif low:
            np.minimum(rows[a], rows[b], out=rows[a])
        else:
            np.maximum(rows[a], rows[b], out=rows[b])
    return rows


@lru_cache
def exchanges(count: int, start: int, stop: int, apart: bool = False) -> tuple[Exchange, ...]:
    """What puts the numbers from ``start`` up to ``stop`` in their places.

    Args:
        apart: those between may stand in any order, with the lesser ones before them and the greater ones behind. Where few are to be kept
            apart, carrying each extreme to its end takes fewer exchanges.
    """
    wanted = range(start, stop)
    found = [_needed(_merge_exchange(count), set(wanted))]
    if apart:
        found.append(_needed(_extremes(count, start, count - stop), set(wanted)))
    return min(found, key=lambda some: sum(low + high for *_, low, high in some))


def _merge_exchange(count: int) -> list[tuple[int, int]]:
    """Batcher's odd-even merge sort for any count (Knuth, The Art of Computer Programming 3, 5.2.2, Algorithm M)."""
    found, p = [], 1
    while p < count:
        k = p
        while k >= 1:
            for j in range(k % p, count - k, 2 * k):
                found += [(i, i + k) for i in range(j, min(j + k, count - k)) if i // (2 * p) == (i + k) // (2 * p)]
            k //= 2
        p *= 2
    return found


def _extremes(count: int, least: int, greatest: int) -> list[tuple[int, int]]:
    """The least numbers to the bottom and the greatest to the top, one after the other."""
    found: list[tuple[int, int]] = []
    for top in range(count - 1, count - 1 - greatest, -1):
        found += [(i, i + 1) for i in range(top)]
    for bottom in range(least):
        found += [(i, i + 1) for i in range(count - greatest - 2, bottom - 1, -1)]
    return found


def _needed(pairs: Sequence[tuple[int, int]], wanted: set[int]) -> tuple[Exchange, ...]:
    found: list[Exchange] = []
    for a, b in reversed(pairs):
        if a in wanted or b in wanted:
            found.append((a, b, a in wanted, b in wanted))
            wanted |= {a, b}
    return tuple(reversed(found))
