"""Weighted sums of tensor files: in one order, in few passes, in memory that does not grow with the number of files.

**The order of summation.** Silos are taken in the sorted order of their ids and cut into consecutive groups of ``fan_in``. Where a plan asks
more than that, all whom it asks are cut so, whether they deliver or not: who is missing leaves a gap and moves nobody to another group. Within a
group, terms wᵢxᵢ are added one after the other in float32: the weight is rounded to float32, the product is rounded, the sum is rounded. The
groups' sums are cut into consecutive groups and added the same way, level by level, until one is left. Weights are counts and come in as they
are; what they must be divided by is divided out once, in float64, of the last sum (`mean`). So the same updates give the same bytes, whatever
order they came in, and whether one process adds them all or one for each group of a tree (`tree`).

The error of a number is at most (2 + (fan_in - 1)·levels)·2⁻²⁴·Σ|wᵢxᵢ|, to first order: a product's two roundings, and a sum's for each
addition that a term goes through.

**The passes.** All files hold the same tensors in the same order, so they are read side by side in windows of some megabytes, which run
across the borders of tensors. Of each window one file after the other is read, and of that, block by block while the block lies in the
processor's cache: hashed, decoded, added, squared for the norm. Memory holds one accumulator of a window for every level, and as many windows
as are read ahead: some 8 · (2 + levels + ahead) MiB, however many files there are and however large.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from silotune.components.errors import SilotuneError
from silotune.components.learning.blob import read_ahead
from silotune.components.learning.tensor_file import WIDTH, MalformedFile, TensorFile
from silotune.components.learning.update import Header, Update, UpdateRefused, norm_matches, sum_of_squares

FAN_IN = 16
WINDOW = 1 << 21  # numbers read from one file at a time, 8 MiB of float32
BLOCK = 1 << 19  # numbers worked on at a time
ROW = 1 << 13  # numbers whose squares are added up in float32
SAFE = (1e-20, 1e30)  # a block's sum of squares, if nothing in it has overflowed, and nothing that counts has vanished
MEMORY = "memory."  # tensors of an update that are no part of the model, but what a silo's method carries on


@dataclass(frozen=True)
class Piece:
    """A stretch of a tensor's numbers, by index into its flat form."""

    name: str
    start: int
    stop: int
    whole: int  # numbers in the tensor


@dataclass
class Check:
    """Of one update: whether what is read of it is what its header says, piece by piece in the file's order."""

    header: Header
    squares: float = 0.0
    hash: Any = field(default_factory=hashlib.sha256)  # of the tensor at hand

    def read(self, data: memoryview) -> None:
        self.hash.update(data)

    def numbers(self, name: str, x: np.ndarray) -> None:
        """Raises UpdateRefused where one is not finite."""
        found = squares(x)
        if not math.isfinite(found):
            raise UpdateRefused(self.header.silo, f"tensor {name!r} is not finite", "lower the learning rate or check the records")
        self.squares += found

    def end_tensor(self, name: str) -> None:
        """Raises UpdateRefused where the tensor does not have the digest in the header."""
        if self.hash.hexdigest() != self.header.tensors[name]:
            raise UpdateRefused(self.header.silo, f"tensor {name!r} does not have the digest in the header", "send the update again")
        self.hash = hashlib.sha256()


class SumDamaged(SilotuneError):
    """A stored sum that is not what it was when it was stored. Its updates are there to be added again."""

    def __init__(self, digest: str) -> None:
        super().__init__(
            f"the stored sum {digest[:12]}… does not have its digest; it was damaged in the store, and its updates are added again",
            "object corrupt",
        )
        self.digest = digest


class WholeCheck:
    """Of a stored sum: whether all that is read of it, its header and then its tensors in order, has the digest that it is stored under."""

    def __init__(self, file: TensorFile, digest: str) -> None:
        self.digest = digest
        start = min((entry.start for entry in file.entries.values()), default=file.blob.size)
        self._hash = hashlib.sha256(file.blob.read(0, start))

    def read(self, data: memoryview) -> None:
        self._hash.update(data)

    def numbers(self, name: str, x: np.ndarray) -> None:
        """Nothing: what is not finite is found in the sum."""

    def end_tensor(self, name: str) -> None:
        """Nothing: the digest is of the whole file."""

    def end(self) -> None:
        """After all was read. Raises SumDamaged where it was something else than was stored."""
        if self._hash.hexdigest() != self.digest:
            raise SumDamaged(self.digest)


@dataclass
class Term:
    """One summand: a file, the weight of its tensors, and what there is to check of it; None for a file of this process's own."""

    file: TensorFile
    weight: float
    check: Check | WholeCheck | None = None
    memory_weight: float = 1.0  # of tensors named `MEMORY` and something

    def weight_of(self, name: str) -> np.float32:
        return np.float32(self.memory_weight if name.startswith(MEMORY) else self.weight)

    def read(self, window: Sequence[Piece]) -> bytes | memoryview:
        """The bytes of a window. Raises UpdateRefused, or SumDamaged, where the file ends inside it."""
        first, last = self.file.entries[window[0].name], self.file.entries[window[-1].name]
        start = first.start + window[0].start * WIDTH[first.dtype]
        try:
            return self.file.span(window[-1].name, start, last.start + window[-1].stop * WIDTH[last.dtype])
        except MalformedFile as error:
            if self.check is None:
                raise
            if isinstance(self.check, WholeCheck):
                raise SumDamaged(self.check.digest) from None
            raise UpdateRefused(self.check.header.silo, str(error), "send the update again") from None


def term_of(update: Update, weight: float, memory_weight: float = 1.0) -> Term:
    return Term(update.file, weight, Check(update.header), memory_weight)


def verify_norms(updates: Sequence[tuple[Update, Check]]) -> dict[str, float]:
    """L2 norms by silo, after all was read.

    Raises:
        UpdateRefused: a norm is not what its header says.
    """
    norms = {}
    for update, check in updates:
        # What was added up on the way is in float32 for a few thousand numbers at a time. None is called a liar for that.
        if norm_matches(check.header.norm, check.squares, check.header.codec.name):
            norms[check.header.silo] = math.sqrt(check.squares)
        else:
            norms[check.header.silo] = update.verify()
    return norms


def sums(terms: Sequence[Term], fan_in: int = FAN_IN, groups: Sequence[int] = ()) -> Iterator[tuple[Piece, np.ndarray]]:
    """Σ wᵢxᵢ in the order that is described above, piece by piece in the file's order.

    Args:
        terms: of files with the same tensors, in order; at least one.
        groups: how many terms each of the first level's groups has, in order; default: ``fan_in`` each.

    Yields:
        (piece, its sum in float32, of which the caller may do what it likes, until the next one).

    Raises:
        UpdateRefused: a tensor of an update is cut short, does not have its digest, or is not finite.
        SumDamaged: a stored sum is cut short.
    """
    if groups and (sum(groups) != len(terms) or not all(1 <= count <= fan_in for count in groups)):
        raise ValueError(f"groups: must have from 1 to {fan_in} of the {len(terms)} terms each, got {list(groups)}")
    if fan_in < 2:
        raise ValueError(f"fan_in: must be 2 or more, got {fan_in}")
    shapes = {n: e.shape for n, e in terms[0].file.entries.items()}
    if any({n: e.shape for n, e in term.file.entries.items()} != shapes for term in terms):
        raise ValueError("terms: must be of the same tensors")
    longest = min(WINDOW, sum(math.prod(shape) for shape in shapes.values()))
    levels, ends = Levels(fan_in, longest), set(accumulate(groups))
    block = min(BLOCK, longest)
    scratch = np.empty(block, np.float32), np.empty(block, np.uint32)
    wanted = (partial(term.read, window) for window in windows(terms[0].file) for term in terms)
    reading = read_ahead(wanted, max(term.file.blob.ahead for term in terms))
    try:
        for window in windows(terms[0].file):
            for number, term in enumerate(terms, 1):
                into, fresh = levels.slot()
                _add(term, next(reading), window, into, fresh, scratch)
                levels.added()
                if number in ends:
                    levels.end_group()
            total, at = levels.total(), 0
            for piece in window:
                yield piece, total[at : (at := at + piece.stop - piece.start)]
    finally:
        reading.close()


def windows(file: TensorFile) -> Iterator[list[Piece]]:
    """All numbers of a file, in its order, in runs of `WINDOW`."""
    window: list[Piece] = []
    room = WINDOW
    for name, entry in file.entries.items():
        whole = math.prod(entry.shape)
        start = 0
        while True:  # an empty tensor is a piece, too: it has a digest
            stop = min(whole, start + room)
            window.append(Piece(name, start, stop, whole))
            room -= stop - start
            start = stop
            if room == 0:
                yield window
                window, room = [], WINDOW
            if start == whole:
                break
    if window:
        yield window


class Levels:
    """Accumulators of one window, of ``size`` numbers: one for the group at hand, one for each level above."""

    def __init__(self, fan_in: int, size: int) -> None:
        self._fan_in = fan_in
        self._size = size
        self._sums: list[np.ndarray] = []
        self._counts: list[int] = []

    def slot(self) -> tuple[np.ndarray, bool]:
        """Where the next term goes, and whether it is the first of its group, over whatever stands there."""
        self._reach(0)
        return self._sums[0], self._counts[0] == 0

    def added(self) -> None:
        """A term has been added: full groups go up."""
        self._counts[0] += 1
        self._settle(0)

    def end_group(self) -> None:
        """No more terms come to the group at hand, full or not."""
        if self._counts[0]:
            self._up(0)
            self._settle(1)

    def total(self) -> np.ndarray:
        """The sum of all; the levels begin anew."""
        level = next(n for n, count in enumerate(self._counts) if count)
        while level + 1 < len(self._counts):
            self._up(level)
            level += 1
        self._counts[level] = 0
        return self._sums[level]

    def _settle(self, level: int) -> None:
        while self._counts[level] == self._fan_in:
            self._up(level)
            level += 1

    def _reach(self, level: int) -> None:
        if level == len(self._sums):
            self._sums.append(np.empty(self._size, np.float32))
            self._counts.append(0)

    def _up(self, level: int) -> None:
        self._reach(level + 1)
        s = self._sums
        if self._counts[level + 1] == 0:
            s[level], s[level + 1] = s[level + 1], s[level]
        else:
            with np.errstate(over="ignore", invalid="ignore"):  # a sum that is not finite is found where it is used
                np.add(s[level + 1], s[level], out=s[level + 1])
        self._counts[level + 1] += 1
        self._counts[level] = 0


def _add(
    term: Term, data: bytes | memoryview, window: Sequence[Piece], into: np.ndarray, fresh: bool, scratch: tuple[np.ndarray, np.ndarray]
) -> None:
    """Check a window of one term and add it to an accumulator, over what stands there if that is ``fresh``."""
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found where it is used
        _add_quietly(term, memoryview(data), window, into, fresh, scratch)


def _add_quietly(
    term: Term, view: memoryview, window: Sequence[Piece], into: np.ndarray, fresh: bool, scratch: tuple[np.ndarray, np.ndarray]
) -> None:
    check, dtype = term.check, term.file.entries[window[0].name].dtype
    width, at = WIDTH[dtype], 0
    product, bits = scratch
    for piece in window:
        weight = term.weight_of(piece.name)
        for start in range(at, end := at + piece.stop - piece.start, BLOCK):
            stop = min(end, start + BLOCK)
            block = view[start * width : stop * width]
            x, accumulator = _decoded(block, dtype, bits), into[start:stop]
            if check is not None:
                check.read(block)
                check.numbers(piece.name, x)
            if fresh:
                np.multiply(x, weight, out=accumulator)
            elif weight == 1:
                np.add(accumulator, x, out=accumulator)
            else:
                np.multiply(x, weight, out=product[: len(x)])
                np.add(accumulator, product[: len(x)], out=accumulator)
        at = end
        if check is not None and piece.stop == piece.whole:
            check.end_tensor(piece.name)


def _decoded(block: memoryview, dtype: str, bits: np.ndarray) -> np.ndarray:
    """Numbers of some bytes, as float32; of BF16 in ``bits``."""
    if dtype == "F32":
        return np.frombuffer(block, "<f4")
    half = np.frombuffer(block, "<u2")
    wide = bits[: len(half)]
    np.copyto(wide, half)
    np.left_shift(wide, 16, out=wide)
    return wide.view(np.float32)


def squares(x: np.ndarray) -> float:
    """Sum of the squares of a few float32 numbers, right to some 1e-7; inf or NaN if, and only if, one of them is not finite."""
    rows = len(x) // ROW * ROW
    with np.errstate(over="ignore", invalid="ignore"):
        found = float(np.dot(x[rows:], x[rows:]))
        if rows:  # row by row, of fewer numbers than BLAS would give to threads, and few enough for a sum in float32
            table = x[:rows].reshape(-1, ROW)
            found += float(np.vecdot(table, table).sum(dtype=np.float64))
    if SAFE[0] < found < SAFE[1]:
        return found
    return sum_of_squares(x) if np.isfinite(x).all() else math.inf
