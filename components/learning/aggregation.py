"""Aggregation: from updates to the next global model. FedAvg, tensor by tensor, in numpy.

Memory holds one tensor of one update and one accumulator, however many silos there are. Sums run over silos in the order of their ids, in
float64, so that the same updates give the same bytes in whatever order they came.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from silotune.components.errors import SilotuneError
from silotune.components.learning.tensor_file import TensorFile, to_bytes, write_tensor_file
from silotune.components.learning.update import Update, UpdateRefused, norm_matches

LEAST_NORMS = 3  # fewer have no median to speak of


def weigh(updates: Mapping[str, Update], by: str) -> dict[str, float]:
    """Weights by silo that sum to 1, in proportion to the examples or tokens each has seen (McMahan et al. 2017, arXiv:1602.05629, Eq. 1).

    Raises:
        ValueError: there is no update.
    """
    if not updates:
        raise ValueError("there is no update to weigh")
    seen = {silo: getattr(update.header, by) for silo, update in sorted(updates.items())}
    total = sum(seen.values())
    return {silo: count / total for silo, count in seen.items()}


@dataclass(frozen=True)
class Mean:
    """What a mean was made of. L2 norms over all tensors."""

    norms: dict[str, float]  # silo -> norm of its update
    change: float  # norm of what the global moved by


def weighted_mean(incoming: TensorFile, updates: Mapping[str, Update], weights: Mapping[str, float], out: Path) -> Mean:
    """Write incoming + Σ wᵢ Δᵢ, the FedAvg step (arXiv:1602.05629, Algorithm 1), as the next global.

    Raises:
        UpdateRefused: a tensor of an update is corrupt or not finite, or its norm is not what its header says; nothing was written.
        SilotuneError: the mean overflows float32; nothing was written.
    """
    squares = dict.fromkeys(sorted(updates), 0.0)
    change = 0.0

    def tensors() -> Iterator[tuple[str, bytes]]:
        nonlocal change
        for name in incoming.entries:
            before = incoming.read(name)
            total = before.astype(np.float64)
            for silo in squares:
                delta = updates[silo].tensor(name).astype(np.float64)
                squares[silo] += float(np.vdot(delta, delta))
                total += weights[silo] * delta
            mean = total.astype(np.float32)
            if not np.isfinite(mean).all():
                raise SilotuneError(
                    f"tensor {name!r}: the mean of the updates is not finite; lower training.learning_rate", "non-finite mean"
                )
            moved = mean.astype(np.float64) - before
            change += float(np.vdot(moved, moved))
            yield name, to_bytes(mean, "F32")
        for silo, square in squares.items():
            header = updates[silo].header
            if not norm_matches(header.norm, square, header.codec.name):
                raise UpdateRefused(
                    silo, f"its norm is {math.sqrt(square):.4g}, its header says {header.norm:.4g}", "send the update again"
                )

    write_tensor_file(out, {n: e.shape for n, e in incoming.entries.items()}, "F32", tensors(), {"format": "pt"})
    return Mean({silo: math.sqrt(square) for silo, square in squares.items()}, math.sqrt(change))


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
