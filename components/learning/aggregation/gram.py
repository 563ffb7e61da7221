"""The Gram matrix of a round's updates: all that distances, angles and norms between silos are made of, K × K numbers for K silos.

Plain tensors are read one by one from every silo and multiplied in blocks that fit the processor's cache: float32 within a block, float64
across blocks, so that memory holds K times one tensor.

LoRA's factors have no meaning of their own: A→cA, B→B/c is the same model, and a hostile silo may choose any c. What counts is the change of
the product, ΔPᵢ = (B₀+ΔBᵢ)(A₀+ΔAᵢ) - B₀A₀, which never stands in memory. In

    ΔPᵢ = [ΔBᵢ  B₀] · [A₀+ΔAᵢ; ΔAᵢ]        (out × 2rᵢ) · (2rᵢ × in)

nothing nearly equal is subtracted, however small the change is beside the product. With ⟨XY, X'Y'⟩ = tr(XᵀX' Y'Yᵀ), all inner products come
from two small Gram matrices, of the columns of [ΔB₁ … ΔB_K B₀] and of the rows of [ΔA₁; …; ΔA_K; A₀]. Of unequal ranks, silo i's B₀ and A₀
are what it was given: the first rᵢ columns and rows.

Silos always stand in the sorted order of their ids, so that the order of arrival changes no bit. The last bits depend on how the BLAS at hand
adds; a rule's coefficients can differ by as much between kinds of processors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import numpy as np

from silotune.components.learning.aggregation.factors import A, B, LoraPair

BLOCK = 1 << 18  # numbers of all silos together that are multiplied at a time: 1 MiB of float32
LEAST_SQUARE = 1e-20  # of a silo's block; below, squares of float32 may have vanished

Rows = Callable[[Sequence[str]], Iterable[Mapping[str, np.ndarray]]]  # names -> of each in turn, by silo, the float32 differences


@dataclass(frozen=True)
class Gram:
    """⟨Δᵢ, Δⱼ⟩ of all pairs of updates."""

    silos: tuple[str, ...]  # sorted
    matrix: np.ndarray  # (K, K), float64

    def __post_init__(self) -> None:
        if list(self.silos) != sorted(set(self.silos)) or not self.silos:
            raise ValueError(f"silos: must be sorted, different and at least one, got {list(self.silos)}")
        if self.matrix.shape != (len(self.silos),) * 2:
            raise ValueError(f"matrix: must be {len(self.silos)} × {len(self.silos)}, is {self.matrix.shape}")

    @property
    def lengths(self) -> np.ndarray:
        """L2 norms of the updates, (K,)."""
        return np.sqrt(np.maximum(np.diagonal(self.matrix), 0))

    @property
    def norms(self) -> dict[str, float]:
        return dict(zip(self.silos, self.lengths.tolist(), strict=True))

    @property
    def distances(self) -> np.ndarray:
        """Squared distances ‖Δᵢ - Δⱼ‖², (K, K). Less than some 1e-6 of the squared norms is rounding."""
        squares = np.diagonal(self.matrix)
        found = np.maximum(squares[:, None] + squares[None, :] - 2 * self.matrix, 0)
        np.fill_diagonal(found, 0)
        return found

    @property
    def cosines(self) -> np.ndarray:
        """Cosines of the angles between updates, (K, K); 0 where one of the two is 0."""
        lengths = self.lengths
        product = np.outer(lengths, lengths)
        found = np.divide(self.matrix, product, out=np.zeros_like(self.matrix), where=product > 0)
        return np.clip(found, -1, 1)

    def scaled(self, factors: Mapping[str, float]) -> Gram:
        """Of the updates fᵢΔᵢ."""
        by = np.array([factors[silo] for silo in self.silos])
        return Gram(self.silos, self.matrix * np.outer(by, by))


def updates_gram(silos: Iterable[str], names: Iterable[str], rows: Rows, incoming: Callable[[str], np.ndarray] | None = None) -> Gram:
    """Of whole updates.

    Args:
        names: tensors that were trained.
        rows: the silos' differences.
        incoming: a tensor of the incoming global, by name. Where it is given, LoRA's factors count by their product; where not, as tensors.
    """
    order, trained = sorted(silos), sorted(names)
    factors = sorted((n for n in trained if incoming is not None and n.endswith((A, B))), key=lambda n: (_module(n), n))
    total = np.zeros((len(order), len(order)))
    reading = iter(rows([*factors, *(n for n in trained if n not in set(factors))]))
    if incoming is not None:
        for module, parts in groupby(factors, _module):
            sent = {name: next(reading) for name in parts}
            pair = LoraPair(incoming(module + B), incoming(module + A))
            total += product_gram(
                pair, [_difference(sent.get(module + B, {}).get(s), sent.get(module + A, {}).get(s), pair) for s in order]
            )
    for found in reading:
        total += tensor_gram([found[silo] for silo in order])
    return Gram(tuple(order), total)


def _module(name: str) -> str:
    return name.removesuffix(A).removesuffix(B)


def _difference(b: np.ndarray | None, a: np.ndarray | None, incoming: LoraPair) -> LoraPair:
    """What a silo changed in a module's factors; zeros stand for the one that was not trained."""
    rank = b.shape[1] if b is not None else a.shape[0] if a is not None else incoming.rank
    zero_b, zero_a = np.zeros((len(incoming.b), rank), np.float32), np.zeros((rank, incoming.a.shape[1]), np.float32)
    return LoraPair(zero_b if b is None else b, zero_a if a is None else a)


def tensor_gram(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Of one tensor, (K, K).

    Args:
        rows: the silos' differences, float32, of one shape.
    """
    if len({row.shape for row in rows}) != 1:
        raise ValueError(f"rows: must be of one shape, got {sorted({row.shape for row in rows})}")
    flat = [row.reshape(-1) for row in rows]
    width = max(1, BLOCK // len(flat))
    scratch = np.empty((len(flat), min(width, flat[0].size)), np.float32)
    total = np.zeros((len(flat), len(flat)))
    for start in range(0, flat[0].size, width):
        block = scratch[:, : min(width, flat[0].size - start)]
        for into, row in zip(block, flat, strict=True):
            into[:] = row[start : start + width]
        total += _block_gram(block)
    return total


def _block_gram(block: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # looked at below
        found = block @ block.T
    small = np.diagonal(found) < LEAST_SQUARE
    if np.isfinite(found).all() and not (small.any() and block[small].any()):
        return found.astype(np.float64)
    wide = block.astype(np.float64)  # a silo may send numbers whose squares float32 cannot hold
    return np.asarray(wide @ wide.T)


def product_gram(incoming: LoraPair, differences: Sequence[LoraPair]) -> np.ndarray:
    """Of the changes of one module's product BA, (K, K), without the scale of LoRA.

    Float64 throughout: a silo's choice of c puts terms into ΔBᵢ and ΔAᵢ that cancel.

    Args:
        differences: of ranks rᵢ up to the incoming pair's.
    """
    own, base = places([pair.rank for pair in differences], incoming.rank)
    left = _wide_gram([*(pair.b.T for pair in differences), incoming.b.T])
    right = _wide_gram([*(pair.a for pair in differences), incoming.a])
    in_left = np.concatenate([part for both in zip(own, base, strict=True) for part in both])  # silo by silo: ΔBᵢ, B₀
    products = left[np.ix_(in_left, in_left)] * _both(_both(right, own, base).T, own, base)
    starts = [2 * int(o[0]) for o in own]
    return np.asarray(np.add.reduceat(np.add.reduceat(products, starts, axis=0), starts, axis=1))


def _both(rows: np.ndarray, own: Sequence[np.ndarray], base: Sequence[np.ndarray]) -> np.ndarray:
    """Silo by silo: rows of A₀+ΔAᵢ, rows of ΔAᵢ."""
    return np.concatenate([part for o, b in zip(own, base, strict=True) for part in (rows[b] + rows[o], rows[o])])


def places(ranks: Sequence[int], most: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Where the silos' own columns, and the incoming ones they were given, stand among [ΔB₁ … ΔB_K B₀]."""
    if not ranks or not all(1 <= rank <= most for rank in ranks):
        raise ValueError(f"ranks: must be from 1 to that of the global, {most}, got {list(ranks)}")
    ends = [0, *accumulate(ranks)]
    own = [np.arange(start, stop) for start, stop in pairwise(ends)]
    return own, [np.arange(ends[-1], ends[-1] + rank) for rank in ranks]


def _wide_gram(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Of the rows of some matrices of equal width, in float64."""
    count, width = sum(len(p) for p in parts), parts[0].shape[1]
    total = np.zeros((count, count))
    for block in _blocks(parts, width, max(64, BLOCK // count)):
        total += block @ block.T
    return total


def _blocks(parts: Sequence[np.ndarray], width: int, step: int) -> Iterator[np.ndarray]:
    for start in range(0, width, step):
        yield np.concatenate([part[:, start : start + step].astype(np.float64) for part in parts])
