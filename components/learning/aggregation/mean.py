"""The mean: from updates to the next global model, in one pass over their bytes, in numpy.

`summation` says in which order updates are added and what memory that takes. Here the last sum is divided by what the weights add up to, a
`ServerOptimizer` turns the mean into a step, and the step is added to the incoming global: all this in float64, of which the next global and
the optimiser's state are rounded to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from silotune.components.errors import SilotuneError
from silotune.components.learning.aggregation.factors import DELTA
from silotune.components.learning.aggregation.server_optimizer import CONTROL, ServerOptimizer, fedavg, state_shapes
from silotune.components.learning.aggregation.summation import FAN_IN, MEMORY, Check, Piece, Term, squares, sums, term_of, verify_norms
from silotune.components.learning.privacy.silo_noise import SumNoise
from silotune.components.learning.tensor_file import TensorFile, TensorWriter, tensor_writer, to_bytes
from silotune.components.learning.update import Update

BLOCK = 1 << 15  # numbers worked on at a time in float64, so that all that is made of them stays in the processor's cache
FEDAVG = fedavg()
METADATA = {"format": "pt"}
ALIKE: Mapping[str, float] = {}  # every silo's memory counts as one


def weigh(updates: Mapping[str, Update], by: str) -> dict[str, float]:
    """What each silo counts for: the examples or tokens it has seen (McMahan et al. 2017, arXiv:1602.05629, Eq. 1), or one.

    Args:
        by: ``examples``, ``tokens`` or ``uniform``.

    Raises:
        ValueError: there is no update.
    """
    if not updates:
        raise ValueError("there is no update to weigh")
    return {silo: 1.0 if by == "uniform" else float(getattr(update.header, by)) for silo, update in sorted(updates.items())}


@dataclass(frozen=True)
class Mean:
    """What a mean was made of. L2 norms over all tensors."""

    norms: dict[str, float]  # silo -> norm of its update
    change: float  # norm of what the global moved by


@dataclass(frozen=True)
class ServerState:
    """Where a server optimiser's state is read and written."""

    before: TensorFile | None  # None in a first round
    after: Path


def weighted_mean(
    incoming: TensorFile, updates: Mapping[str, Update], weights: Mapping[str, float], out: Path, *, total: float | None = None,
    optimizer: ServerOptimizer = FEDAVG, state: ServerState | None = None, fan_in: int = FAN_IN, noise: SumNoise | None = None,
    memory: Mapping[str, float] = ALIKE,
) -> Mean:  # fmt: skip
    """Write the next global: incoming plus the server's step along Σ wᵢΔᵢ / Σ wᵢ.

    Args:
        weights: by silo, in any unit.
        total: what the weighted sum is divided by, where that is not the weights' own sum.
        state: must be given where the optimiser carries any.
        noise: added to the sum before it is divided.
        memory: by silo, what its memory counts for; 1 where it is not named.

    Raises:
        UpdateRefused: a tensor of an update is corrupt or not finite, or its norm is not what its header says; nothing was written.
        SilotuneError: the mean overflows float32; nothing was written.
    """
    silos = sorted(updates)
    terms = [term_of(updates[silo], weights[silo], memory.get(silo, 1.0)) for silo in silos]
    found: dict[str, float] = {}

    def check() -> None:
        checks = [(updates[silo], term.check) for silo, term in zip(silos, terms, strict=True) if isinstance(term.check, Check)]
        found.update(verify_norms(checks))

    divisor = divisor_of(weights) if total is None else total
    change = finish(incoming, terms, divisor, len(silos), out, optimizer, state, fan_in, check, noise=noise)
    return Mean(found, change)


def divisor_of(weights: Mapping[str, float]) -> float:
    """What weights add up to, each as `summation` rounds it."""
    return math.fsum(float(np.float32(weight)) for weight in weights.values())


def finish(
    incoming: TensorFile, terms: Sequence[Term], total: float, silos: int, out: Path, optimizer: ServerOptimizer, state: ServerState | None,
    fan_in: int, check: Callable[[], None], groups: Sequence[int] = (), noise: SumNoise | None = None,
) -> float:  # fmt: skip
    """Write the next global and the optimiser's state; returns the norm of what the global moved by.

    Args:
        terms: sums, or updates with their weights.
        total: what the sum of the terms is divided by.
        silos: how many updates there are: what their memories' sum is divided by.
        check: raises what would keep the files from being written, when all has been read.
        groups: as `summation.sums` has them.
        noise: of the sum.
    """
    if optimizer.initial and state is None:
        raise ValueError(f"state: must be given, the optimiser carries {', '.join(optimizer.initial)}")
    if not total > 0:
        raise ValueError(f"total: must be positive, got {total}")
    shapes = {name: entry.shape for name, entry in incoming.entries.items()}
    if odd := sorted(n for n in terms[0].file.entries if n.removeprefix(MEMORY) not in shapes):
        raise ValueError(f"updates: must hold tensors of the global only, got {odd[0]!r}")
    square = 0.0
    with ExitStack() as files:
        target = files.enter_context(tensor_writer(out, shapes, "F32", METADATA))
        carried = _Carried(files, optimizer, state, {name: shape for name, shape in shapes.items() if not name.endswith(DELTA)})
        for piece, block in sums(terms, fan_in, groups):
            if not piece.name.startswith(MEMORY):
                before = incoming.part(piece.name, piece.start, piece.stop)
                square += _move(piece, before, block, total, optimizer, carried, noise)
                target.write(piece.name, block)
            elif optimizer.memory:
                name = f"{CONTROL}." + piece.name.removeprefix(MEMORY)
                control = carried.part(name, piece.start, piece.stop)
                carried.write(name, optimizer.memory(block.astype(np.float64) / silos, control))
        for name in sorted(shapes.keys() - terms[0].file.entries.keys()):  # not trained in this round
            target.write(name, to_bytes(incoming.read(name), "F32"))
        carried.keep_the_rest()
        check()
    return math.sqrt(square)


def _move(
    piece: Piece, before: np.ndarray, block: np.ndarray, total: float, optimizer: ServerOptimizer, carried: _Carried, noise: SumNoise | None
) -> float:  # fmt: skip
    """Turn a sum into the next global's numbers, in its place; returns the sum of the squares of what they moved by."""
    square, inverse = 0.0, 1 / total
    for start in range(0, len(block), BLOCK):
        part, old = block[start : start + BLOCK], before[start : start + BLOCK]
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found below
            at = piece.start + start
            delta = part.astype(np.float64) if noise is None else noise.added(piece.name, at, piece.whole, part)
            delta *= inverse
            step, state = optimizer.step(
                delta, {kind: carried.part(f"{kind}.{piece.name}", at, at + len(part)) for kind in carried.stepped}
            )
            np.add(old, step, out=part, dtype=np.float64, casting="same_kind")
            found = squares(part - old)
        if not math.isfinite(found) and not np.isfinite(part).all():
            raise SilotuneError(
                f"tensor {piece.name!r}: the mean of the updates is not finite; lower training.learning_rate", "non-finite mean"
            )
        square += found
        for kind, numbers in state.items():
            carried.write(f"{kind}.{piece.name}", numbers)
    return square


class _Carried:
    """The optimiser's state, read from one file and written to another, as the tensors of the global go by."""

    def __init__(
        self, files: ExitStack, optimizer: ServerOptimizer, state: ServerState | None, shapes: Mapping[str, Sequence[int]]
    ) -> None:
        self.stepped = [kind for kind in optimizer.initial if not (optimizer.memory and kind == CONTROL)]
        self._initial = optimizer.initial
        self._before = state.before if state else None
        self._shapes = state_shapes(optimizer, shapes)
        self._written: set[str] = set()
        self._target: TensorWriter | None = None
        if self._before is not None and {n: e.shape for n, e in self._before.entries.items()} != self._shapes:
            raise ValueError(
                "state: must be of the global's tensors and this optimiser's kinds; begin without one where either has changed"
            )
        if state is not None and self._shapes:
            self._target = files.enter_context(tensor_writer(state.after, self._shapes, "F32", METADATA))

    def part(self, name: str, start: int, stop: int) -> np.ndarray:
        if self._before is None:
            return np.full(stop - start, self._initial[name.split(".", 1)[0]])
        return self._before.part(name, start, stop).astype(np.float64)

    def write(self, name: str, numbers: np.ndarray) -> None:
        """Raises SilotuneError where they overflow float32."""
        with np.errstate(over="ignore"):
            rounded = numbers.astype(np.float32)
        if not np.isfinite(rounded).all():
            raise SilotuneError(
                f"tensor {name!r}: the server's state is not finite; lower the server's learning rate", "non-finite server state"
            )
        self._written.add(name)
        assert self._target is not None
        self._target.write(name, rounded)

    def keep_the_rest(self) -> None:
        """Of tensors that were not trained in this round, the state stays."""
        for name in sorted(self._shapes.keys() - self._written):
            size = math.prod(self._shapes[name])
            for start in range(0, size, BLOCK):
                self.write(name, self.part(name, start, min(size, start + BLOCK)))
