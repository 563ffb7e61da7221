"""A federation of three silos whose signed records are written without training: a course of any length in a moment."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import yaml

from silotune.components import keys
from silotune.components.federation import Federation
from silotune.components.protocol import Commit, Contribution, Exported, Participant, Plan, UpdateManifest
from silotune.components.provenance import audit
from silotune.components.rounds import Rounds
from silotune.components.store.directory_store import DirectoryStore

SILOS = ("east", "north", "south")
LEFT = {"total": 100}


def load(folder: Path, silos: tuple[str, ...] = SILOS, **sections: Any) -> Federation:
    entries = [{"id": s, "train": f"./{s}.jsonl"} for s in silos]
    terms = {"name": "fed", "model": {"base": "./base"}, "silos": entries, "rounds": LEFT} | sections
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "f.yaml").write_text(yaml.safe_dump(terms))
    return Federation.load(folder / "f.yaml")


class Course:
    """Writes the records of rounds, signed by whom they are of, and takes them away again."""

    def __init__(self, folder: Path, store: Any = None, **sections: Any) -> None:
        self.folder, self._store = folder, store
        self.federation = load(folder, **sections)
        keys.ensure(self.federation)
        self.rounds = self.reader()
        self.amend(self.federation)
        self.last: Commit | None = None

    def reader(self) -> Rounds:
        """As another process reads it."""
        if self._store is None:
            return Rounds.of(self.federation)
        return Rounds(self._store, self.federation.name, keys.Keyring(self.federation))

    @property
    def store(self) -> DirectoryStore:
        return self.rounds.store  # type: ignore[return-value]

    def amend(self, federation: Federation) -> None:
        self.federation = federation
        self.agreement = federation.agreement("b" * 64, "t" * 64)
        self.rounds.put_agreement(self.agreement)

    def object(self, content: str, silo: str | None = None) -> str:
        path = self.folder / "object"
        path.write_text(content)
        return self.rounds.put_object(path, silo)

    def run(self, count: int, *, logged: bool = True, **more: Any) -> Course:
        """Round 0 first, where there is none; then so many aggregated rounds."""
        if self.last is None:
            self._commit("initialized", 0, outgoing=self.object("global 0"), logged=logged)
        for number in range(self.last.round + 1, self.last.round + 1 + count):
            plan = self.open(number)
            parts = {s: self.contribution(plan, s) for s in plan.participants}
            self._commit(
                "aggregated", number, plan=plan, contributions=parts, outgoing=self.object(f"global {number}"), logged=logged, **more
            )
        return self

    def end(self, outcome: str, **more: Any) -> Course:
        """A round that ends without a new global."""
        number = self.last.round + 1
        self._commit(outcome, number, plan=self.open(number), **{"outgoing": self.last.outgoing, **more})
        return self

    def open(self, number: int) -> Plan:
        tensors = self.rounds.put_json_object({"w": [2, 2]})
        return self.rounds.open_round(
            Plan(
                round=number, agreement=self.agreement.digest, base="b" * 64, incoming=self.last.outgoing, tensors=tensors, learning_rate=0.1, code="0",
                accepted=[(number, self.last.outgoing)],
                participants={s: Participant(tensors=tensors, cursor=8 * (number - 1)) for s in sorted(self.agreement.silos)},
            )
        )  # fmt: skip

    def manifest(self, plan: Plan, silo: str, content: str = "") -> UpdateManifest:
        digest = self.object(content or f"update of {silo} in {plan.round}", silo)
        return self.rounds.write_update(
            UpdateManifest(
                round=plan.round, silo=silo, agreement=plan.agreement, plan=plan.digest, incoming=plan.incoming, object=digest, header="h" * 64, bytes=9,
                examples=8, tokens=80, steps=4, cursor=8 * plan.round, codec="float32", norm=1.0, loss=1.0,
            )
        )  # fmt: skip

    def contribution(self, plan: Plan, silo: str) -> Contribution:
        m = self.manifest(plan, silo)
        return Contribution(
            manifest=m.digest, object=m.object, bytes=9, weight=1 / 3, examples=8, tokens=80, steps=4, cursor=m.cursor, norm=1.0
        )

    def _commit(self, outcome: str, number: int, *, plan: Plan | None = None, logged: bool = True, **more: Any) -> Commit:
        terms = {
            "round": number, "outcome": outcome, "custody": self.federation.custody, "agreement": self.agreement.digest,
            "plan": plan.digest if plan else None, "attempt": 1, "contributions": {}, "missing": {}, "best": 0, "started": 1.0,
            "previous": self.last.digest if self.last else None, "incoming": self.last.outgoing if self.last else None, "at": 2.0 + number,
        }  # fmt: skip
        self.last = self.rounds.write_commit(Commit(**(terms | more)))
        if logged:
            audit.sync(self.rounds)
        return self.last

    def export(self, number: int) -> Exported:
        commit = self.rounds.commit(number)
        exported = Exported(commit=commit.digest, round=number, outgoing=commit.outgoing, location=f"/models/{number}", files={})
        audit.record_export(self.rounds, self.rounds.write_export(exported), commit.at)
        return exported

    # Whoever may do anything in the store, but has no key

    def key(self, *parts: str) -> str:
        return self.rounds.key(*parts)

    def of_round(self, number: int, *parts: str) -> str:
        return self.key("rounds", f"{number:05d}", *parts)

    def replace(self, key: str, data: bytes) -> None:
        self.store.delete(key)
        assert self.store.create(key, data)

    def swap(self, one: str, other: str) -> None:
        first, second = self.store.get(one), self.store.get(other)
        self.replace(one, second)
        self.replace(other, first)

    def copy(self, folder: Path) -> Course:
        """All of it, elsewhere."""
        shutil.copytree(self.folder, folder)
        other = Course(folder)
        other.last = self.last
        return other


def digest_of(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()
