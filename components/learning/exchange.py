"""What of a global a silo gets, trains and sends, by its strategy, the round and its rank.

A silo of rank rᵢ below the global's holds the first rᵢ columns of B and rows of A: of a pair as `aggregation.product` makes it, the best product
of that rank. ``delta`` tensors are what aggregation has added to the base's own weights: silos get them, and never send them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from silotune.components.learning.aggregation.factors import CORE, DELTA, A, B
from silotune.components.learning.aggregation.summation import MEMORY
from silotune.components.terms.strategies import Strategy

Schema = dict[str, list[int]]  # tensor name -> shape


def trained_names(strategy: Strategy, turn: int, names: Iterable[str]) -> list[str]:
    """Tensors that silos train and send in a round, sorted.

    Args:
        turn: from 1, of the rounds that have made a global. rolora trains B in odd ones and A in even ones: B is zero at first, and as long as
            it is, A's gradient is zero, too.
        names: of all tensors of the global.
    """
    endings: tuple[str, ...] = ("",)
    if strategy.sends == "b":
        endings = (B,)
    elif strategy.sends == "alternate":
        endings = (B,) if turn % 2 else (A,)
    elif strategy.sends == "core":
        endings = (CORE,)
    return sorted(name for name in names if name.endswith(endings) and not name.endswith(DELTA))


def held_shape(name: str, shape: Sequence[int], rank: int) -> list[int]:
    """Of what a silo of that rank holds of a tensor; rank 0: all of it."""
    if rank and name.endswith(A):
        return [min(rank, shape[0]), *shape[1:]]
    if rank and name.endswith(B):
        return [shape[0], min(rank, shape[1])]
    return list(shape)


def held(state: Mapping[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    """What a silo of that rank holds of a global."""
    return {name: array[tuple(slice(n) for n in held_shape(name, array.shape, rank))] for name, array in state.items()}


def update_schema(shapes: Mapping[str, Sequence[int]], strategy: Strategy, turn: int, rank: int) -> Schema:
    """The tensors of a silo's update.

    Args:
        shapes: of the global's tensors.
        turn: as in `trained_names`.
        rank: that the silo trains; 0 for full fine-tuning.
    """
    sent = {name: held_shape(name, shapes[name], rank) for name in trained_names(strategy, turn, shapes)}
    return sent | ({MEMORY + name: shape for name, shape in sent.items()} if strategy.local == "control" else {})
