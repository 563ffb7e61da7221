"""A tree of aggregators: each adds up one group, and sends on one sum.

    leaf      partial_sum of up to `fan_in` updates, in the sorted order of all silos' ids
    inner     combine_partials of up to `fan_in` partial sums
    root      mean_of_partials: the next global, from any number of them

Groups are those that `summation` cuts the silos into, so a tree gives the same bytes as one aggregator that adds all updates: how the work is
spread is nobody's concern but the machines'. A partial sum is a tensor file with Σ wᵢΔᵢ in float32, and its `Partial`; both are as trustworthy
as whoever made them, and travel under the digest of their bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from silotune.components.learning.aggregation.mean import FEDAVG, METADATA, Mean, ServerState, divisor_of, finish
from silotune.components.learning.aggregation.server_optimizer import ServerOptimizer
from silotune.components.learning.aggregation.summation import FAN_IN, Term, sums, term_of, verify_norms
from silotune.components.learning.tensor_file import TensorFile, tensor_writer
from silotune.components.learning.update import Update


@dataclass(frozen=True)
class Partial:
    """What is known of a partial sum: by silo, of each update in it."""

    weights: dict[str, float]
    norms: dict[str, float]  # L2 norm over all tensors


def partial_sum(updates: Mapping[str, Update], weights: Mapping[str, float], out: Path, *, fan_in: int = FAN_IN) -> Partial:
    """Verify the updates of one group and write their weighted sum.

    Raises:
        ValueError: there is none, or more than ``fan_in``.
        UpdateRefused: as `weighted_mean`; nothing was written.
    """
    silos = sorted(updates)
    terms = [term_of(updates[silo], weights[silo]) for silo in silos]
    norms: dict[str, float] = {}
    checks = [(updates[silo], term.check) for silo, term in zip(silos, terms, strict=True) if term.check]
    _write_sum(terms, out, fan_in, lambda: norms.update(verify_norms(checks)))
    return Partial({silo: weights[silo] for silo in silos}, norms)


def combine_partials(partials: Sequence[tuple[Partial, TensorFile]], out: Path, *, fan_in: int = FAN_IN) -> Partial:
    """Write the sum of partial sums of one level, as a partial sum of the next one.

    Raises:
        ValueError: there is none, or more than ``fan_in``, or they are not of consecutive groups.
    """
    ordered = _in_order(partials)
    _write_sum([Term(file, 1.0) for _, file in ordered], out, fan_in, lambda: None)
    return _union(ordered)


def mean_of_partials(
    incoming: TensorFile, partials: Sequence[tuple[Partial, TensorFile]], out: Path, *, total: float | None = None,
    optimizer: ServerOptimizer = FEDAVG, state: ServerState | None = None, fan_in: int = FAN_IN,
) -> Mean:  # fmt: skip
    """As `mean.weighted_mean` of all updates in partial sums of one level: the same bytes.

    Raises:
        ValueError: there is none, or they are not of consecutive groups.
        SilotuneError: the mean overflows float32; nothing was written.
    """
    ordered = _in_order(partials)
    every = _union(ordered)
    terms = [Term(file, 1.0) for _, file in ordered]
    divisor = divisor_of(every.weights) if total is None else total
    return Mean(every.norms, finish(incoming, terms, divisor, len(every.weights), out, optimizer, state, fan_in, lambda: None))


def _write_sum(terms: Sequence[Term], out: Path, fan_in: int, check: Callable[[], None]) -> None:
    if not 1 <= len(terms) <= fan_in:
        raise ValueError(f"a group: must have from 1 to {fan_in} members, has {len(terms)}")
    shapes = {name: entry.shape for name, entry in terms[0].file.entries.items()}
    with tensor_writer(out, shapes, "F32", METADATA) as writer:
        for piece, block in sums(terms, fan_in):
            writer.write(piece.name, block)
        check()


def _in_order(partials: Sequence[tuple[Partial, TensorFile]]) -> list[tuple[Partial, TensorFile]]:
    if not partials or any(not p.weights for p, _ in partials):
        raise ValueError("partials: must be one or more, each of one silo or more")
    ordered = sorted(partials, key=lambda pair: min(pair[0].weights))
    for (one, _), (other, _) in pairwise(ordered):
        if max(one.weights) >= min(other.weights):
            raise ValueError(f"partials: must be of consecutive groups of silos, {min(other.weights)!r} comes before {max(one.weights)!r}")
    return ordered


def _union(partials: Sequence[tuple[Partial, TensorFile]]) -> Partial:
    return Partial({s: w for p, _ in partials for s, w in p.weights.items()}, {s: n for p, _ in partials for s, n in p.norms.items()})
