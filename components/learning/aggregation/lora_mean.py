"""Means of LoRA products: from updates to the next global, module by module, for the strategies that look at pairs.

fedit, ffa, rolora and fed-sb are plain means of what was trained: `mean.weighted_mean`. Memory holds the stacks of one module: K pairs in
float64, and for `fedex_mean` and `flora_mean` a block of the dense matrix.

The global's tensors are ``….lora_A.weight``, ``….lora_B.weight`` and, for fedex and flora, ``….delta.weight`` (out × in), which is cumulative and
already scaled; updates have the pairs only. A global without ``delta`` is one whose deltas are zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from silotune.components.learning.aggregation.factors import DELTA, A, B, LoraPair, modules, stacked
from silotune.components.learning.aggregation.mean import METADATA, ServerState
from silotune.components.learning.aggregation.product import Best, distance, kept_alive, mean_product
from silotune.components.learning.aggregation.side_by_side import SideBySide
from silotune.components.learning.aggregation.spectrum import Spectrum
from silotune.components.learning.aggregation.stacking import added, begun_anew, mean_factors, product_blocks, rows_of
from silotune.components.learning.tensor_file import TensorFile, TensorWriter, tensor_writer, to_bytes
from silotune.components.learning.update import Update

REST = "rest."  # before the names of what `product_mean` carries to the next round


@dataclass(frozen=True)
class LoraMean:
    """What a mean was made of."""

    norms: dict[str, float]  # silo -> L2 norm of its update, over all tensors
    change: float  # Frobenius norm, over all modules, of what the weights that the factors and deltas stand for moved by
    residuals: dict[str, float]  # module -> share of the mean product's energy that a pair does not hold; fedex has folded it into delta
    spectra: dict[str, Spectrum] = field(default_factory=dict)  # module -> spectrum of its mean product; product_mean's only


def product_mean(
    incoming: TensorFile, updates: Mapping[str, Update], weights: Mapping[str, float], out: Path, *, scale: float = 1.0,
    carry: ServerState | None = None,
) -> LoraMean:  # fmt: skip
    """Write the next global: of each module the best pair of the global's rank for the mean of the silos' products (`product.mean_product`).

    Args:
        weights: by silo, in any unit.
        scale: s = alpha / r, by which ``change`` is measured.
        carry: where what the rank does not hold is read and written, as pairs ``rest.…`` of the global's rank; None to drop it.

    Raises:
        ValueError: tensors that are no pairs, or shapes that do not fit.
        UpdateRefused: a tensor of an update is corrupt or not finite, or its norm is not what its header says; nothing was written.
        SilotuneError: the mean overflows float32; nothing was written.
    """
    return pairs_mean(
        incoming, updates, out, scale, lambda _, before, differences, rest: mean_product(before, differences, weights, rest, carry=carry is not None),
        carry,
    )  # fmt: skip


def pairs_mean(
    incoming: TensorFile, updates: Mapping[str, Update], out: Path, scale: float,
    best_of: Callable[[str, LoraPair, Mapping[str, LoraPair], LoraPair | None], Best], carry: ServerState | None = None,
) -> LoraMean:  # fmt: skip
    """Write the next global: of each module the pair that ``best_of`` makes of (module, incoming pair, differences by silo, what was carried).

    Args:
        scale, carry: as `product_mean`.

    Raises:
        ValueError, UpdateRefused, SilotuneError: as `product_mean`.
    """
    reader = _Reader(incoming, updates)
    residuals, spectra, squares = {}, {}, 0.0
    with ExitStack() as files:
        folded = {name: entry.shape for name, entry in incoming.entries.items() if name.endswith(DELTA)}  # by another strategy, earlier
        target = files.enter_context(tensor_writer(out, reader.shapes | folded, "F32", METADATA))
        for name in folded:
            target.write(name, to_bytes(incoming.read(name), "F32"))
        state = None
        if carry:
            shapes = {REST + name: shape for name, shape in reader.shapes.items()}
            state = files.enter_context(tensor_writer(carry.after, shapes, "F32", METADATA))
        for module, before, differences in reader.pairs():
            carried = _pair(carry.before, REST + module) if carry and carry.before else None
            best = best_of(module, before, differences, carried)
            pair = kept_alive(best.pair, before)
            _write(target, module, pair)
            if state and best.rest:
                _write(state, REST + module, best.rest)
            residuals[module], spectra[module] = best.spectrum.residual, best.spectrum
            squares += distance(pair, before) ** 2
        norms = reader.norms()
    return LoraMean(norms, scale * math.sqrt(squares), residuals, spectra)


def fedex_mean(incoming: TensorFile, updates: Mapping[str, Update], weights: Mapping[str, float], out: Path, *, scale: float) -> LoraMean:
    """Write the next global: the factors' means, and delta + s·(Σ wᵢBᵢAᵢ - B̄Ā), where B̄ and Ā are as they stand in the file.

    Args:
        weights: by silo, in any unit.
        scale: s = alpha / r.

    Raises:
        ValueError: as `product_mean`, or silos have other ranks than the global.
        UpdateRefused, SilotuneError: as `product_mean`.
    """
    return _fold(incoming, updates, weights, out, scale, lambda _, before, differences: mean_factors(before, differences, weights), True)


def flora_mean(
    incoming: TensorFile, updates: Mapping[str, Update], weights: Mapping[str, float], out: Path, *, scale: float,
    initial: Mapping[str, np.ndarray],
) -> LoraMean:  # fmt: skip
    """Write the next global: delta + s·Σ wᵢBᵢAᵢ, B = 0, and A as it is given.

    Args:
        weights: by silo, in any unit.
        scale: s = alpha / r.
        initial: A by tensor name, as LoRA begins. New numbers in each round let delta gain ranks that the last round's A could not reach.

    Raises:
        ValueError, UpdateRefused, SilotuneError: as `product_mean`.
    """
    return _fold(incoming, updates, weights, out, scale, lambda module, before, _: begun_anew(before, initial[module + A]), False)


def _fold(
    incoming: TensorFile, updates: Mapping[str, Update], weights: Mapping[str, float], out: Path, scale: float,
    factors: Callable[[str, LoraPair, Mapping[str, LoraPair]], LoraPair], kept: bool,
) -> LoraMean:  # fmt: skip
    """Write new factors, and into delta all of the mean product, less the new factors' own where they are kept."""
    reader = _Reader(incoming, updates)
    shapes = reader.shapes | {m + DELTA: (reader.shapes[m + B][0], reader.shapes[m + A][1]) for m in reader.modules}
    residuals, moved = {}, 0.0
    with tensor_writer(out, shapes, "F32", METADATA) as target:
        for module, before, differences in reader.pairs():
            after = factors(module, before, differences)
            width, energy, missed = before.a.shape[1], 0.0, 0.0
            for rows, block in product_blocks(*stacked(before, differences, weights)):
                energy += float(np.sum(np.square(block)))
                moved += float(np.sum(np.square(block - rows_of(before, rows))))
                if kept:
                    block -= rows_of(after, rows)
                    missed += float(np.sum(np.square(block)))
                old = None
                if module + DELTA in incoming.entries:
                    old = incoming.part(module + DELTA, rows.start * width, rows.stop * width).reshape(-1, width)
                target.write(module + DELTA, to_bytes(added(old, block, scale, module), "F32"))
            if kept:
                residuals[module] = missed / energy if energy else 0.0
            _write(target, module, after)
        norms = reader.norms()
    return LoraMean(norms, scale * math.sqrt(moved), residuals)


class _Reader:
    """The pairs of a global and of updates, module by module."""

    def __init__(self, incoming: TensorFile, updates: Mapping[str, Update]) -> None:
        self._incoming, self._updates = incoming, SideBySide(updates)
        self.modules = modules(incoming.entries)
        self.shapes = {m + ending: incoming.entries[m + ending].shape for m in self.modules for ending in (A, B)}
        for silo in sorted(updates):
            if updates[silo].file.entries.keys() != self.shapes.keys():
                odd = sorted(updates[silo].file.entries.keys() ^ self.shapes.keys())
                raise ValueError(f"silo {silo!r}: its update must have the global's pairs and nothing else; they differ in {odd[0]!r}")
        self.norms = self._updates.norms

    def pairs(self) -> Iterator[tuple[str, LoraPair, dict[str, LoraPair]]]:
        """(module, its incoming pair, the silos' differences)."""
        reading = self._updates.tensors(module + ending for module in self.modules for ending in (A, B))
        for module, (a, b) in zip(self.modules, zip(reading, reading, strict=True), strict=True):
            yield module, _pair(self._incoming, module), {silo: LoraPair(b[silo], a[silo]) for silo in b}


def _pair(file: TensorFile, module: str) -> LoraPair:
    return LoraPair(file.read(module + B), file.read(module + A))


def _write(file: TensorWriter, module: str, pair: LoraPair) -> None:
    file.write(module + B, to_bytes(pair.b, "F32"))
    file.write(module + A, to_bytes(pair.a, "F32"))
