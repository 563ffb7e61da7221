"""Aggregation: from updates to the next global model. FedAvg, tensor by tensor, in numpy.

Memory holds one tensor of one update and one accumulator, however many silos there are. Sums run over silos in the order of their ids, in
float64, so that the same updates give the same bytes in whatever order they came.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from silotune.components.errors import SilotuneError
from silotune.components.learning.tensor_file import TensorFile, to_bytes, write_tensor_file
from silotune.components.learning.update import Update


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


def weighted_mean(incoming: TensorFile, updates: Mapping[str, Update], weights: Mapping[str, float], out: Path) -> None:
    """Write incoming + Σ wᵢ Δᵢ, the FedAvg step (arXiv:1602.05629, Algorithm 1), as the next global.

    Raises:
        UpdateRefused: a tensor of an update is corrupt or not finite; nothing was written.
        SilotuneError: the mean overflows float32; nothing was written.
    """

    def tensors() -> Iterator[tuple[str, bytes]]:
        for name in incoming.entries:
            total = incoming.read(name).astype(np.float64)
            for silo in sorted(updates):
                total += weights[silo] * updates[silo].tensor(name).astype(np.float64)
            mean = total.astype(np.float32)
            if not np.isfinite(mean).all():
                raise SilotuneError(
                    f"tensor {name!r}: the mean of the updates is not finite; lower training.learning_rate", "non-finite mean"
                )
            yield name, to_bytes(mean, "F32")

    write_tensor_file(out, {n: e.shape for n, e in incoming.entries.items()}, "F32", tensors(), {"format": "pt"})
