"""Guards: what a round's updates must look like beside those of recent rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

LEAST_NORMS = 3  # fewer have no median to speak of


def norm_outliers(norms: Mapping[str, float], recent: Sequence[float], band: float) -> dict[str, str]:
    """Silos whose update is far larger or smaller than is usual, and by how much.

    Args:
        norms: L2 norms of this round's updates, each divided by its learning rate, by which AdamW's steps scale.
        recent: the same of updates in recent rounds.
        band: how many times above or below the median of both is still usual.
    """
    known = [*recent, *norms.values()]
    if len(known) < LEAST_NORMS:
        return {}
    median = float(np.median(known))
    return {
        silo: f"its norm is {norm / median:.2g} times the median of recent updates, {1 / band:.2g} to {band:g} times are allowed"
        for silo, norm in norms.items()
        if not median / band <= norm <= median * band
    }
