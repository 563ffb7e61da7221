"""The gauge: which of the many pairs B, A that have the same product becomes the global's.

B·A = (B·T⁻¹)·(T·A) for every invertible T, and training does not treat them alike: AdamW moves every number by about as much, whatever its size, so that
after a truncated SVD, whose factors are mixed anew and small where singular values are, silos learn slower in the next round. So the
pair is chosen that is nearest to what silos had: A's rows are orthogonal, all of the incoming rows' root mean square length, and turned towards the
incoming A as far as turning goes (orthogonal Procrustes: Schönemann 1966, doi:10.1007/BF02289451). B takes all the rest. Measured in
docs/benchmarks.md.

Silos of smaller rank get the first columns and rows, which must stay the best product of that rank. So turning is confined to blocks between the
ranks that there are. Only the incoming A counts, and no silo's own: which factors a silo writes its product in changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from silotune.components.learning.aggregation.factors import LoraPair


def aligned(pair: LoraPair, incoming: LoraPair, ranks: Iterable[int] = ()) -> LoraPair:
    """The pair of the same product that is nearest to the incoming one, in float32.

    Directions that the product does not have are rows of A all the same, with zero columns of B: where both are zero no gradient would ever move them.

    Args:
        pair: balanced and ordered, as `product.best_of_rank` makes it.
        incoming: of the same shapes. Where its A is zero, or the pair's product is, its A stays.
        ranks: of the silos: at each of them a truncation stays the best one.
    """
    before = incoming.a.astype(np.float64)
    lengths = np.linalg.norm(pair.a.astype(np.float64), axis=1)  # √ of the singular values, falling
    size = float(np.sqrt(np.mean(np.sum(np.square(before), axis=1))))
    live = int(np.count_nonzero(lengths))
    if live == 0 or size == 0:
        return LoraPair(pair.b, incoming.a if live == 0 else pair.a)
    basis = _completed((pair.a[:live] / lengths[:live, None]).astype(np.float64), before)
    a, b = np.empty_like(before), pair.b.astype(np.float64) * (lengths / size)
    for start, stop in pairwise([0, *sorted({r for r in ranks if 0 < r < pair.rank} | {pair.rank})]):
        x, _, yt = np.linalg.svd(before[start:stop] @ basis[start:stop].T)
        turn = x @ yt
        a[start:stop] = size * (turn @ basis[start:stop])
        b[:, start:stop] = b[:, start:stop] @ turn.T
    return LoraPair(b.astype(np.float32), a.astype(np.float32))


def _completed(rows: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Orthonormal rows, and as many more as ``before`` has, out of its own span as far as that goes."""
    wanted = len(before) - len(rows)
    if wanted == 0:
        return rows
    left = before - (before @ rows.T) @ rows
    more = np.linalg.svd(left, full_matrices=False)[2][:wanted]
    more -= (more @ rows.T) @ rows  # where nothing was left in their span, any rows but these
    return np.vstack([rows, np.linalg.qr(more.T)[0].T])
