"""Federations whose silos' updates a test can look into, or write and sign itself without any training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from silotune.components.aggregate import step as aggregate
from silotune.components.federation import Federation
from silotune.components.initialize import step as initialize
from silotune.components.learning.aggregation.factors import A, B
from silotune.components.learning.tensor_file import open_tensor_file
from silotune.components.learning.update import Codec, Header, write_update
from silotune.components.protocol import Commit, Turn
from silotune.components.rounds import Rounds
from silotune.components.terms.strategies import STRATEGIES
from silotune.components.train import step as train

SILOS = ("east", "north", "south")
Arrays = dict[str, np.ndarray]
LORA = {"r": 2, "alpha": 4, "target_modules": ["q_proj", "down_proj"]}
SCALE = 2.0  # alpha / r


def terms(base: Path, strategy: str, aggregation: Mapping[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    """Sections of a federation with a strategy; few modules, so that a round takes a moment."""
    lora = LORA | sections.pop("lora", {})
    return {
        "model": {"base": str(base), "lora": lora}, "aggregation": {"strategy": strategy, **(aggregation or {})},
        "export": {"merge": STRATEGIES[strategy].folds}, "rounds": {"total": 3, "quorum": 1},
        "training": {"steps": 2, "batch_size": 3, "learning_rate": 0.02},
    } | sections  # fmt: skip


def edit(file: Path, **sections: Any) -> None:
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | sections))


def edit_silo(file: Path, silo: str, **sections: Any) -> None:
    raw = yaml.safe_load(file.read_text())
    next(s for s in raw["silos"] if s["id"] == silo).update(sections)
    file.write_text(yaml.safe_dump(raw))


def rounds_of(file: Path) -> Rounds:
    return Rounds.of(Federation.load(file))


def begin(file: Path) -> Turn:
    return Turn.parse(initialize.work(str(file)))


def state(rounds: Rounds, digest: str, folder: Path, silo: str | None = None) -> Arrays:
    return open_tensor_file(rounds.fetch_object(digest, folder / f"{digest}.safetensors", silo)).read_all()


def updates(rounds: Rounds, commit: Commit, folder: Path) -> dict[str, Arrays]:
    """What the silos of a commit have sent, as it is stored."""
    return {silo: state(rounds, part.object, folder, silo) for silo, part in commit.contributions.items()}


def shares(commit: Commit) -> dict[str, float]:
    """Of the examples."""
    total = sum(c.examples for c in commit.contributions.values())
    return {silo: c.examples / total for silo, c in commit.contributions.items()}


def modules(arrays: Mapping[str, Any]) -> list[str]:
    return sorted(n.removesuffix(A) for n in arrays if n.endswith(A))


def product(arrays: Mapping[str, np.ndarray], module: str) -> np.ndarray:
    return np.asarray(arrays[module + B].astype(np.float64) @ arrays[module + A].astype(np.float64))


def send(rounds: Rounds, silo: str, tensors: Arrays, folder: Path, number: int, *, examples: int = 6, steps: int = 2) -> None:
    """Deliver an update as the silo itself would have written and signed it."""
    plan = rounds.plan(number)
    assert plan is not None
    header = Header(
        federation=rounds.federation, agreement=plan.agreement, round=plan.round, silo=silo, plan=plan.digest, base=plan.base,
        incoming=plan.incoming, examples=examples, tokens=10 * examples, steps=steps, cursor=plan.participants[silo].cursor + examples,
        loss=1.0, norm=0.0, codec=Codec(name="float32"), tensors={},
    )  # fmt: skip
    path = folder / f"sent-{silo}.safetensors"
    header = write_update(path, header, tensors, lambda message: rounds.sign(silo, plan.round, message))
    rounds.write_update(train._manifest(rounds, plan, header, path))


def close(file: Path, turn: Turn, *statuses: str) -> Commit:
    """Aggregate the open round."""
    aggregate.work(str(file), turn.text, *statuses)
    return rounds_of(file).commit(turn.round)


def made_up(rounds: Rounds, number: int, silo: str, seed: int, size: float = 0.01) -> Arrays:
    """Random differences of what the plan asks of a silo: a part common to all silos, and a smaller one of its own."""
    plan = rounds.plan(number)
    assert plan is not None
    schema = rounds.json_object(plan.participants[silo].tensors)
    common, own = np.random.default_rng(7), np.random.default_rng(seed)
    return {
        name: (size * (common.standard_normal(shape) + 0.3 * own.standard_normal(shape))).astype(np.float32)
        for name, shape in sorted(schema.items())
    }
