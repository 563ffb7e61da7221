"""Federations that sum securely, whose silos' updates are made up in numpy; all else is done by the boxes' own steps."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from deliveries import BATCH, SHAPES, STEPS, Deliveries

from silotune.components.aggregate import step as aggregate
from silotune.components.confirm import step as confirm
from silotune.components.errors import SilotuneError
from silotune.components.federation import Federation
from silotune.components.learning.update import Codec, Header, write_update
from silotune.components.mask import step as mask
from silotune.components.muster import step as muster
from silotune.components.protocol import Commit, Turn
from silotune.components.rounds import Rounds
from silotune.components.secure_sum.records import SecureRound
from silotune.components.secure_sum.silo import UPDATE, SiloPart
from silotune.components.share import step as share
from silotune.components.silo_job import silo_home, status_text
from silotune.components.unmask import step as unmask

CLIP = 2.0
BOXES = {"share": share, "mask": mask, "confirm": confirm, "unmask": unmask}
TERMS: dict[str, Any] = {
    "aggregation": {"clip": {"norm": CLIP}, "weights": "uniform"},
    "privacy": {"secure_aggregation": {}},
}


class SecureCourse(Deliveries):
    """A federation with round 1 open."""

    def __init__(
        self, folder: Path, silos: tuple[str, ...] = ("ada", "bo", "cy", "di"), shapes: dict[str, tuple[int, ...]] = SHAPES, **sections: Any
    ) -> None:
        super().__init__(folder, silos, shapes, **(TERMS | sections))

    @property
    def number(self) -> int:
        return Turn.parse(self.turn).round

    def home(self, silo: str) -> Path:
        return silo_home(self.federation, self.federation.silo(silo))

    def tensors(self, silo: str, scale: float = 1.0) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self.number, *silo.encode()])
        plan = self.rounds.plan(self.number)
        assert plan is not None
        schema = self.rounds.json_object(plan.participants[silo].tensors)
        return {n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in sorted(schema.items())}

    def part(self, silo: str) -> SiloPart:
        turn = Turn.parse(self.turn)
        plan = self.rounds.plan(turn.round)
        assert plan is not None
        return SiloPart.of(self.federation, Rounds.of(self.federation), plan, turn, silo, self.home(silo))

    def train(self, silo: str, scale: float = 1.0) -> str:
        """What the train box leaves: an update in the silo's folder, and keys in the store."""
        part = self.part(silo)
        if part.kept() is None:
            plan = part.view.plan
            cursor = plan.participants[silo].cursor + STEPS * BATCH
            header = Header(
                federation="fed", agreement=plan.agreement, round=plan.round, silo=silo, plan=plan.digest, base=plan.base, loss=1.0, norm=0.0,
                incoming=plan.incoming, examples=STEPS * BATCH, tokens=9, steps=STEPS, cursor=cursor, codec=Codec(name="float32"), tensors={},
            )  # fmt: skip
            write_update(self.home(silo) / UPDATE, header, self.tensors(silo, scale))
        part.advertise()
        return f"{silo} ok"

    def stage(self, name: str, without: Collection[str] = (), statuses: Collection[str] = ()) -> list[str]:
        """The muster and the silos' boxes of a stage; a silo ``without`` is dead."""
        turn = muster.work(str(self.file), self.turn, name, *statuses)
        if Turn.parse(turn).done:
            return []
        return [self.box(name, silo, turn) for silo in self.federation.silo_ids if silo not in without]

    def box(self, name: str, silo: str, turn: str = "") -> str:
        try:
            return BOXES[name].work(str(self.file), silo, turn or self.turn)
        except SilotuneError as error:
            return status_text(silo, "refused" if error.exit_code == 4 else "failed", error.reason)

    def try_round(self, dead: dict[str, Collection[str]] | None = None, scale: float = 1.0) -> Commit:
        """One attempt; ``dead`` says who dies before a stage, and stays so to its end. Raises where the round is not committed."""
        dead, gone, statuses = dead or {}, set(), []
        for name in ("train", "share", "mask", "confirm", "unmask"):
            gone |= set(dead.get(name, ()))
            statuses += [f"{silo} failed: killed by signal 9" for silo in sorted(gone)]
            if name == "train":
                statuses += [self.train(s, scale) for s in self.federation.silo_ids if s not in gone]
            else:
                statuses += self.stage(name, gone, statuses)
        number = self.number
        self.turn = aggregate.work(str(self.file), self.turn, *statuses)
        return self.rounds.commit(number)

    @property
    def secure(self) -> SecureRound:
        plan = self.rounds.plan(self.number)
        assert plan is not None
        return SecureRound.of(Rounds.of(self.federation), Turn.parse(self.turn), plan.digest)

    def edit(self, **sections: Any) -> None:
        """The file, for all parties."""
        import yaml

        self.file.write_text(yaml.safe_dump(yaml.safe_load(self.file.read_text()) | sections))
        self.federation = Federation.load(self.file)

    def amend(self, **sections: Any) -> None:
        """The terms, from the next round on."""
        self.edit(**sections)
        self.agreement = self.federation.agreement("b" * 64, "t" * 64)
        self.rounds.put_agreement(self.agreement)
        self.open()


def clipped(tensors: dict[str, np.ndarray], clip: float = CLIP) -> dict[str, np.ndarray]:
    """In float64."""
    norm = np.sqrt(sum((t.astype(np.float64) ** 2).sum() for t in tensors.values()))
    return {n: t.astype(np.float64) * min(1.0, clip / norm) for n, t in tensors.items()}


def quantised_mean(
    updates: dict[str, dict[str, np.ndarray]], weights: dict[str, float], bits: int = 24, clip: float = CLIP
) -> dict[str, np.ndarray]:
    """What comes out where every silo clips and rounds, and nothing is masked: whole numbers, their sum in Python, then the mean."""
    quantum, total = clip / 2**bits, sum(weights.values())
    found = {}
    for name in next(iter(updates.values())):
        whole = sum(np.rint(clipped(u, clip)[name] * weights[s] / quantum).astype(np.int64) for s, u in updates.items())
        found[name] = (whole * quantum).astype(np.float32).astype(np.float64) / total
    return found
