"""Rounds of aggregation alone: silos in numpy, whose updates are real files, combined as the aggregate box combines them.

A *model* here is what a global does: weights by name. Plain tensors are their own weights; of LoRA's it is delta + s·B·A, or s·B·R·A with a core.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from silotune.components.learning.aggregation.combination import OUTGOING, Carried, Combined, Round, combine
from silotune.components.learning.aggregation.factors import CORE, DELTA, A, B
from silotune.components.learning.aggregation.summation import MEMORY
from silotune.components.learning.exchange import trained_names
from silotune.components.learning.tensor_file import open_tensor_file, to_bytes, write_tensor_file
from silotune.components.learning.update import Codec, Header, Update, write_update
from silotune.components.terms.strategies import Aggregation
from silotune.components.terms.training import Training

Arrays = dict[str, np.ndarray]
OUT, IN, RANK, SCALE = 9, 11, 3, 2.0
MODULES = ("m", "n")


def first_global(kind: str) -> Arrays:
    """Of ``plain`` tensors, of ``lora`` pairs as peft begins them (B of zeros), or of ``core`` with fixed bases."""
    rng = np.random.default_rng(5)
    if kind == "plain":
        return {n: rng.standard_normal((OUT, IN)).astype(np.float32) for n in MODULES}
    made: Arrays = {}
    for module in MODULES:
        made[module + A] = (rng.standard_normal((RANK, IN)) / np.sqrt(IN)).astype(np.float32)
        made[module + B] = np.zeros((OUT, RANK), np.float32)
        if kind == "core":
            made[module + B] = np.linalg.qr(rng.standard_normal((OUT, RANK)))[0].astype(np.float32)
            made[module + CORE] = np.zeros((RANK, RANK), np.float32)
    return made


def weights_of(state: Mapping[str, np.ndarray]) -> Arrays:
    """What the base's weights are moved to, in float64."""
    wide = {name: array.astype(np.float64) for name, array in state.items()}
    if not any(name.endswith(A) for name in wide):
        return wide
    found = {}
    for module in MODULES:
        inner = wide.get(module + CORE, np.eye(wide[module + A].shape[0]))
        found[module] = SCALE * wide[module + B] @ inner @ wide[module + A] + wide.get(module + DELTA, 0.0)
    return found


def distance(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """In parts of the second one's size."""
    return float(np.sqrt(sum(np.sum(np.square(one[n] - other[n])) for n in other) / sum(np.sum(np.square(w)) for w in other.values())))


@dataclass
class Course:
    """A federation of silos, round by round."""

    folder: Path
    terms: Aggregation
    state: Arrays
    silos: int
    carried: Carried = field(default_factory=Carried)
    round: int = 0
    made: Combined | None = None
    parts: dict[str, float] = field(default_factory=dict)
    training_of: Callable[[str], Training] | None = None

    @property
    def names(self) -> list[str]:
        """What is trained in the round to come."""
        return trained_names(self.terms.traits, self.round + 1, self.state)

    def close(self, sent: Mapping[str, Arrays], examples: Mapping[str, int] | None = None, steps: Mapping[str, int] | None = None) -> bytes:
        """Combine what silos send, in the order they stand in; returns all bytes that came of it.

        ``memory.…`` is added where the strategy has one and it is not there.
        """
        self.round += 1
        folder = self.folder / f"{self.round}"
        folder.mkdir(parents=True)
        updates = {}
        for silo, tensors in sent.items():
            memory = (
                {MEMORY + n: 0.1 * a for n, a in tensors.items()}
                if self.terms.traits.local == "control" and not _has_memory(tensors)
                else {}
            )
            count, done = (examples or {}).get(silo, 1), (steps or {}).get(silo, 1)
            updates[silo] = written(folder / silo, silo, {**tensors, **memory}, count, done)
        incoming = folder / "incoming"
        encoded = ((n, to_bytes(a, "F32")) for n, a in sorted(self.state.items()))
        write_tensor_file(incoming, {n: a.shape for n, a in self.state.items()}, "F32", encoded, {"format": "pt"})
        initial = {}
        if self.terms.traits.combine == "stack":
            rng = np.random.default_rng(self.round)
            initial = {n: (rng.standard_normal(a.shape) / np.sqrt(IN)).astype(np.float32) for n, a in self.state.items() if n.endswith(A)}
        given = Round(self.terms, open_tensor_file(incoming), self.silos, self.parts, self.training_of, SCALE, self.carried, initial)
        self.made = combine(given, updates, folder)
        self.state = open_tensor_file(folder / OUTGOING).read_all()
        self.carried = Carried({name: open_tensor_file(path) for name, path in self.made.files.items()}, self.made.numbers)
        return b"".join(path.read_bytes() for path in [folder / OUTGOING, *self.made.files.values()]) + repr(self.made.numbers).encode()


def _has_memory(tensors: Mapping[str, Any]) -> bool:
    return any(name.startswith(MEMORY) for name in tensors)


def written(path: Path, silo: str, tensors: Arrays, examples: int, steps: int) -> Update:
    header = Header(
        federation="f", agreement="a", round=1, silo=silo, plan="p", base="b", incoming="i", examples=examples, tokens=7 * examples, steps=steps,
        cursor=1, loss=1.0, norm=0.0, codec=Codec(name="float32"), tensors={},
    )  # fmt: skip
    return Update(write_update(path, header, tensors), open_tensor_file(path))


def random_updates(course: Course, seeds: Mapping[str, int], size: float = 0.1) -> dict[str, Arrays]:
    """A part that is common to all, and a smaller one of each silo's own."""

    def draw(seed: int) -> Arrays:
        rng = np.random.default_rng(seed)
        return {n: (size * rng.standard_normal(course.state[n].shape)).astype(np.float32) for n in course.names}

    common = draw(1000)
    return {silo: {n: common[n] + np.float32(0.5) * a for n, a in draw(seed).items()} for silo, seed in seeds.items()}


@dataclass
class QuadraticSilo:
    """Its loss is ½ Σ h(W - W*)², with the curvature h of its own, trained by steps of gradient descent with the strategy's local term."""

    target: Arrays
    curvature: float
    own: Arrays = field(default_factory=dict)  # feddyn: Σ of its differences; scaffold: its control variate

    def train(self, course: Course, steps: int, rate: float) -> Arrays:
        local, mu = course.terms.traits.local, course.terms.mu if course.terms.traits.local in ("proximal", "dynamic") else 0.0
        start = {n: course.state[n].astype(np.float64) for n in course.names}
        now, seen = {n: a.copy() for n, a in start.items()}, {n: np.zeros(a.shape) for n, a in start.items()}
        common: Arrays = {}
        if local == "control" and (file := course.carried.files.get("optimizer")):
            common = {n: file.read(f"control.{n}").astype(np.float64) for n in course.names}
        for _ in range(steps):
            for name, gradient in self._gradients({**course.state, **now}).items():
                if name in now:
                    seen[name] += gradient / steps
                    more = mu * self.own.get(name, 0.0) if local == "dynamic" else common.get(name, 0.0) - self.own.get(name, 0.0)
                    now[name] = now[name] - rate * (gradient + more + mu * (now[name] - start[name]))
        delta = {n: (now[n] - start[n]).astype(np.float32) for n in start}
        if local == "dynamic":
            self.own = {n: self.own.get(n, 0.0) + a for n, a in delta.items()}
        if local == "control":
            memory = {MEMORY + n: (g - self.own.get(n, 0.0)).astype(np.float32) for n, g in seen.items()}
            self.own = seen
            return delta | memory
        return delta

    def _gradients(self, state: Mapping[str, np.ndarray]) -> Arrays:
        off = {n: self.curvature * (w - self.target[n]) for n, w in weights_of(state).items()}
        if not any(n.endswith(A) for n in state):
            return off
        found: Arrays = {}
        for module, d in off.items():
            b, a = state[module + B].astype(np.float64), state[module + A].astype(np.float64)
            inner = state.get(module + CORE, np.eye(a.shape[0]))
            found |= {module + B: SCALE * d @ (inner @ a).T, module + A: SCALE * (b @ inner).T @ d, module + CORE: SCALE * b.T @ d @ a.T}
        return found


Make = Callable[..., Course]
