"""Stacking: Σ wᵢBᵢAᵢ, all of it, as a dense matrix that silos add to the frozen weight of the base.

    fedex   the global's factors are the means B̄ and Ā, and what they miss, Σ wᵢBᵢAᵢ - B̄Ā, goes into ``delta`` (Singhal, Ponkshe &
            Vepakomma 2024, arXiv:2410.09432)
    flora   all of Σ wᵢBᵢAᵢ goes into ``delta``, and the factors begin anew (Wang et al. 2024, arXiv:2409.05976)

``delta`` is out × in and is made in blocks of rows, in float64 and rounded once, so that memory holds the stacks and one block. It costs
2·out·in·n operations, n the sum of the ranks: some thirty times as much as `product` where out and in are 4096, and as many bytes to send as
the weight itself. That is the price of being exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from silotune.components.errors import SilotuneError
from silotune.components.learning.aggregation.factors import LoraPair, normalised

BLOCK = 1 << 20  # numbers of a delta made at a time, 8 MiB in float64


def mean_factors(incoming: LoraPair, differences: Mapping[str, LoraPair], weights: Mapping[str, float]) -> LoraPair:
    """B̄ and Ā, each the mean of the silos' own, rounded to float32.

    Raises:
        ValueError: a silo's rank is not the incoming one's: factors of unequal ranks have no mean.
    """
    shares = normalised(weights, sorted(differences))
    b, a = incoming.b.astype(np.float64), incoming.a.astype(np.float64)
    for silo, share in shares.items():
        difference = differences[silo]
        if difference.rank != incoming.rank:
            raise ValueError(f"silo {silo!r}: its rank is {difference.rank}, must be the global's {incoming.rank}; or use product or flora")
        b += share * difference.b.astype(np.float64)
        a += share * difference.a.astype(np.float64)
    return LoraPair(_float32(b, "a factor"), _float32(a, "a factor"))


def begun_anew(incoming: LoraPair, initial: np.ndarray) -> LoraPair:
    """B = 0 and A as it is given. Raises ValueError where its shape is another one."""
    if initial.shape != incoming.a.shape:
        raise ValueError(f"initial: must have A's shape {incoming.a.shape}, got {initial.shape}")
    return LoraPair(np.zeros_like(incoming.b), initial.astype(np.float32))


def product_blocks(b: np.ndarray, a: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows, these rows of BA) from first to last, each a new array of some `BLOCK` numbers in float64.

    Args:
        b: (out, n) float64, as `factors.stacked` makes it.
        a: (n, in) float64.
    """
    height = max(1, BLOCK // max(1, a.shape[1]))
    for start in range(0, b.shape[0], height):
        rows = slice(start, min(start + height, b.shape[0]))
        yield rows, b[rows] @ a


def rows_of(pair: LoraPair, rows: slice) -> np.ndarray:
    """Some rows of the pair's product, in float64."""
    return LoraPair(pair.b[rows], pair.a).product()


def added(delta: np.ndarray | None, block: np.ndarray, scale: float, module: str) -> np.ndarray:
    """The next rows of ``delta``, in float32.

    Args:
        delta: the same rows of the incoming global; None where it has none yet.
        scale: s = alpha / r.

    Raises:
        SilotuneError: not finite.
    """
    total = scale * block
    if delta is not None:
        total += delta
    return _float32(total, f"module {module!r}: delta")


def _float32(numbers: np.ndarray, what: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = numbers.astype(np.float32)
    if not np.isfinite(rounded).all():
        raise SilotuneError(f"{what} of the mean product is not finite; lower training.learning_rate", "non-finite mean")
    return rounded
