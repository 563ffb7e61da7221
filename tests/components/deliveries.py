"""A federation whose silos deliver updates that are made up in numpy: signed, checked and combined as real ones are, in a moment."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from silotune.components import keys, opening
from silotune.components.aggregate import step as aggregate
from silotune.components.combine import step as combine
from silotune.components.federation import Federation
from silotune.components.learning.tensor_file import to_bytes, write_tensor_file
from silotune.components.learning.update import Codec, Header, write_update
from silotune.components.protocol import Commit, Turn, UpdateManifest
from silotune.components.rounds import Rounds

SHAPES = {"a.weight": (6, 4), "b.weight": (5,), "c.weight": (3, 0)}
SILOS = ("ada", "bo", "cy", "di", "ed")
STEPS, BATCH = 8, 4


def tensor_file(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    encoded = ((name, to_bytes(array, "F32")) for name, array in sorted(tensors.items()))
    write_tensor_file(path, {n: a.shape for n, a in tensors.items()}, "F32", encoded, {"format": "pt"})
    return path


class Deliveries:
    """A federation with round 1 open."""

    def __init__(
        self, folder: Path, silos: tuple[str, ...] = SILOS, shapes: dict[str, tuple[int, ...]] | None = None,
        own: dict[str, dict[str, Any]] | None = None, **sections: Any,
    ) -> None:  # fmt: skip
        self.folder, self.shapes = folder, shapes or SHAPES
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "f.yaml"
        terms = {
            "name": "fed", "model": {"base": "./base", "method": "full"}, "silos": [{"id": s, "train": f"./{s}.jsonl"} | (own or {}).get(s, {}) for s in silos],
            "rounds": {"total": 9, "quorum": 1}, "training": {"steps": STEPS, "batch_size": BATCH}, "tracking": {"uri": "none"},
        }  # fmt: skip
        self.file.write_text(yaml.safe_dump(terms | sections))
        self.federation = Federation.load(self.file)
        keys.ensure(self.federation)
        self.rounds = Rounds.of(self.federation)
        self.agreement = self.federation.agreement("b" * 64, "t" * 64)
        self.rounds.put_agreement(self.agreement)
        rng = np.random.default_rng(7)
        made = {n: rng.standard_normal(s).astype(np.float32) for n, s in self.shapes.items()}
        initial = self.rounds.put_object(tensor_file(folder / "initial", made))
        self.rounds.write_commit(
            Commit(
                round=0, outcome="initialized", custody=self.federation.custody, best=0, agreement=self.agreement.digest, plan=None, attempt=0,
                contributions={}, missing={}, previous=None, incoming=None, outgoing=initial, started=1.0, at=1.0,
            )
        )  # fmt: skip
        self.turn = ""
        self.open()

    def open(self) -> str:
        """The next round, or the next attempt at the open one."""
        latest = self.rounds.latest()
        assert latest is not None
        self.turn = opening.open_next(self.federation, self.rounds, latest, self.agreement, {}).text
        return self.turn

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        return self.agreement.aggregation.groups(self.federation.silo_ids)

    def deliver(self, *silos: str, scale: float = 1.0) -> dict[str, UpdateManifest]:
        return {silo: self._deliver(silo, scale) for silo in silos}

    def _deliver(self, silo: str, scale: float) -> UpdateManifest:
        """Sizes, steps and examples differ, so that another order, weight or silo shows in the bytes."""
        turn = Turn.parse(self.turn)
        plan = self.rounds.plan(turn.round)
        assert plan is not None
        seed = [turn.round, *silo.encode()]
        rng = np.random.default_rng(seed)
        examples, steps = int(rng.integers(3, STEPS * BATCH)), int(rng.integers(1, STEPS))
        schema = self.rounds.json_object(plan.participants[silo].tensors)
        tensors = {n: (scale * rng.uniform(0.5, 2) * rng.standard_normal(s)).astype(np.float32) for n, s in sorted(schema.items())}
        cursor = plan.participants[silo].cursor + examples
        header = Header(
            federation="fed", agreement=plan.agreement, round=turn.round, silo=silo, plan=plan.digest, base=plan.base, incoming=plan.incoming,
            examples=examples, tokens=7 * examples, steps=steps, cursor=cursor, loss=1.0, norm=0.0, codec=Codec(name="float32"), tensors={},
        )  # fmt: skip
        path = self.folder / f"{silo}.update"
        sign = (lambda message: self.rounds.sign(silo, turn.round, message)) if self.agreement.custody != "none" else None
        header = write_update(path, header, tensors, sign)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        data = path.read_bytes()
        manifest = UpdateManifest(
            round=turn.round, silo=silo, agreement=plan.agreement, plan=plan.digest, incoming=plan.incoming,
            object=self.rounds.put_object(path, silo), header=hashlib.sha256(data[: 8 + length]).hexdigest(), bytes=len(data),
            examples=examples, tokens=7 * examples, steps=steps, cursor=cursor, codec="float32", norm=header.norm, loss=1.0,
        )  # fmt: skip
        path.unlink()
        return self.rounds.write_update(manifest)

    def combine(self, *numbers: int) -> list[str]:
        """The boxes of these groups; of all, if none is named."""
        return [combine.work(str(self.file), self.turn, str(n)) for n in numbers or range(1, len(self.groups) + 1)]

    def aggregate(self) -> Commit:
        """The round's commit; the next round is open then."""
        number, statuses = Turn.parse(self.turn).round, [f"{s} ok" for s in self.federation.silo_ids]
        self.turn = aggregate.work(str(self.file), self.turn, *statuses)
        return self.rounds.commit(number)

    def path(self, key: str) -> Path:
        """Where a key of the store lies on this disk."""
        return Path(self.rounds.store.url(key))

    def records(self) -> list[str]:
        return sorted(self.rounds.store.list(self.rounds.key("rounds", f"{Turn.parse(self.turn).round:05d}", "partials") + "/"))

    def sums(self) -> list[str]:
        return sorted(self.rounds.store.list(self.rounds.key("partials") + "/"))
