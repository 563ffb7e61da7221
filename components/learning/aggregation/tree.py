"""A tree of aggregators: each adds up one group, and sends on one sum.

    leaf      partial_sum of up to `fan_in` updates, in the sorted order of all silos' ids
    inner     combine_partials of up to `fan_in` partial sums
    root      mean_of_partials: the next global, from any number of them

Groups are those that `summation` cuts the silos into, so a tree gives the same bytes as one aggregator that adds all updates: how the work is
spread is nobody's concern but the machines'. A partial sum is a tensor file with Σ wᵢΔᵢ in float32, and its `Partial`; both are as trustworthy
as whoever made them, and travel under the digest of their bytes. `grouped_mean` is the root that makes do with what leaves there are: it reads
a group's stored sum where it has one, and the group's updates where it has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from silotune.components.errors import RefusedError, SilotuneError
from silotune.components.learning.aggregation.mean import ALIKE, FEDAVG, METADATA, Mean, ServerState, divisor_of, finish
from silotune.components.learning.aggregation.server_optimizer import ServerOptimizer
from silotune.components.learning.aggregation.summation import FAN_IN, Check, Term, WholeCheck, sums, term_of, verify_norms, windows
from silotune.components.learning.tensor_file import TensorFile, tensor_writer
from silotune.components.learning.update import Update


@dataclass(frozen=True)
class Partial:
    """What is known of a partial sum: by silo, of each update in it."""

    weights: dict[str, float]
    norms: dict[str, float]  # L2 norm over all tensors


@dataclass(frozen=True)
class Stored:
    """A partial sum in a store."""

    partial: Partial
    file: TensorFile
    digest: str  # SHA-256 of the file, which nobody has compared yet


def partial_sum(
    updates: Mapping[str, Update], weights: Mapping[str, float], out: Path, *, fan_in: int = FAN_IN, memory: Mapping[str, float] = ALIKE
) -> Partial:  # fmt: skip
    """Verify the updates of one group and write their weighted sum.

    Raises:
        ValueError: there is none, or more than ``fan_in``.
        UpdateRefused: as `weighted_mean`; nothing was written.
    """
    silos = sorted(updates)
    terms = [term_of(updates[silo], weights[silo], memory.get(silo, 1.0)) for silo in silos]
    norms: dict[str, float] = {}
    checks = [(updates[silo], term.check) for silo, term in zip(silos, terms, strict=True) if isinstance(term.check, Check)]
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


def grouped_mean(
    incoming: TensorFile, groups: Sequence[Sequence[str]], updates: Mapping[str, Update], weights: Mapping[str, float],
    stored: Sequence[Stored], out: Path, *, total: float | None = None, optimizer: ServerOptimizer = FEDAVG, state: ServerState | None = None,
    fan_in: int = FAN_IN, memory: Mapping[str, float] = ALIKE,
) -> Mean:  # fmt: skip
    """As `mean.weighted_mean`, in given groups: the same bytes, whichever of the groups' sums are stored.

    Args:
        groups: consecutive silos in sorted order, up to ``fan_in`` in each; those without an update are passed over.
        stored: sums of all updates of a group, each with its weight.

    Raises:
        UpdateRefused: as `mean.weighted_mean`.
        SumDamaged: a stored sum does not have its digest; nothing was written.
        SilotuneError: the mean overflows float32; nothing was written.
    """
    by_silos = {tuple(sorted(s.partial.weights)): s for s in stored}
    terms: list[Term] = []
    sizes, used = [], []
    for group in groups:
        if not (silos := tuple(silo for silo in group if silo in updates)):
            continue
        if found := by_silos.get(silos):
            if found.partial.weights != {silo: weights[silo] for silo in silos}:
                raise ValueError(f"stored: the sum of {', '.join(silos)} must be of the weights at hand")
            terms.append(Term(found.file, 1.0, WholeCheck(found.file, found.digest)))
            sizes.append(1)
            used.append(found)
        else:
            terms += [term_of(updates[silo], weights[silo], memory.get(silo, 1.0)) for silo in silos]
            sizes.append(len(silos))
    if len(used) < len(stored) or not updates.keys() <= {silo for group in groups for silo in group}:
        raise ValueError("groups: must hold all silos, and each stored sum must be of one of them")
    norms = {silo: norm for s in used for silo, norm in s.partial.norms.items()}

    def check() -> None:
        for term in terms:
            if isinstance(term.check, WholeCheck):
                term.check.end()
        read = [(updates[term.check.header.silo], term.check) for term in terms if isinstance(term.check, Check)]
        norms.update(verify_norms(read))

    divisor = divisor_of(weights) if total is None else total
    try:
        change = finish(incoming, terms, divisor, len(updates), out, optimizer, state, fan_in, check, sizes)
    except RefusedError:
        raise
    except SilotuneError:  # a result that is not finite: of what the silos sent, unless a stored sum is not what it was
        for found in used:
            _require_whole(found)
        raise
    return Mean({silo: norms[silo] for silo in sorted(norms)}, change)


def _require_whole(stored: Stored) -> None:
    """Raises SumDamaged where the file does not have its digest."""
    check = WholeCheck(stored.file, stored.digest)
    for window in windows(stored.file):
        check.read(memoryview(Term(stored.file, 1.0, check).read(window)))
    check.end()


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
