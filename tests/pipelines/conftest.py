"""A small federation whose store is written by hand: two rounds committed by records alone, no model anywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from silotune.components import keys
from silotune.components.federation import Federation
from silotune.components.protocol import Commit, Contribution, Evaluation, Exported, Participant, Plan
from silotune.components.rounds import Rounds

FILE = """
name: hand
model: {base: ./base, lora: {r: 2, target_modules: [q_proj]}}
silos:
  - {id: north, train: ./north.jsonl}
  - {id: south, train: ./south.jsonl}
  - {id: west, train: ./west.jsonl}
rounds: {total: 3}
training: {steps: 4, batch_size: 2}
"""
SILOS = ("north", "south", "west")
AT = 1_000_000.0


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """On disk, with a base folder and records that pass `check --data`."""
    (tmp_path / "base").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "base" / name).write_text("{}")
    for silo in SILOS:
        (tmp_path / f"{silo}.jsonl").write_text("".join(f'{{"prompt": "a{i}", "response": "b"}}\n' for i in range(3)))
    (tmp_path / "f.yaml").write_text(FILE)
    return Federation.load(tmp_path / "f.yaml", check_files=True)


@pytest.fixture
def rounds(federation: Federation) -> Rounds:
    keys.ensure(federation)
    return Rounds.of(federation)


class Hand:
    """Writes the records of a course."""

    def __init__(self, federation: Federation, rounds: Rounds) -> None:
        from silotune.components.base_model import resolve

        base = resolve(federation.model.base, federation.work / "base")
        self.rounds = rounds
        self.agreement = federation.agreement(base.digest, base.tokenizer)
        rounds.put_agreement(self.agreement)
        self.last: Commit | None = None

    def commit(self, number: int, contributors: tuple[str, ...] = SILOS, **more: Any) -> Commit:
        contribution = Contribution(manifest="m", object="o", bytes=100, weight=1.0, examples=8, tokens=80, steps=4, cursor=8, norm=0.5)
        missing = {s: "failed: disk full" for s in SILOS if number and s not in contributors}
        known: dict[str, Any] = {
            "round": number, "outcome": "aggregated" if number else "initialized", "agreement": self.agreement.digest, "plan": None,
            "attempt": 1, "contributions": dict.fromkeys(contributors, contribution) if number else {}, "missing": missing,
            "previous": self.last.digest if self.last else None, "incoming": None, "outgoing": f"{number:064d}",
            "custody": "local", "best": 0,
            "bytes_up": 100 * len(contributors) if number else 0, "bytes_down": 70 if number else 0, "started": AT, "at": AT + 9,
        }  # fmt: skip
        self.last = self.rounds.write_commit(Commit(**(known | more)))
        return self.last

    def evaluate(self, number: int, losses: dict[str, float], split: str = "valid", tokens: int = 10) -> None:
        """``losses`` in nats per token; every silo has ``tokens`` of them, the first one thrice as many."""
        for i, (silo, loss) in enumerate(losses.items()):
            n = tokens * (1 if i else 3)
            self.rounds.write_evaluation(
                Evaluation(round=number + 1, outgoing=f"{number:064d}", silo=silo, split=split, split_digest="d" * 64, examples=2, tokens=n,
                           loss_sum=loss * n, correct=1, at=AT)
            )  # fmt: skip

    def open(self, number: int) -> Plan:
        assert self.last
        object_ = self.rounds.put_json_object({"w": [2, 2]})
        return self.rounds.open_round(
            Plan(round=number, agreement=self.agreement.digest, base=self.agreement.base, incoming=object_, tensors=object_, accepted=[(number, object_)],
                 participants={s: Participant(tensors=object_, cursor=0) for s in SILOS}, learning_rate=0.1, code="0")
        )  # fmt: skip

    def export(self, commit: Commit, suffix: str = "") -> Exported:
        name = commit.digest + suffix
        return self.rounds.write_export(
            Exported(commit=name, round=commit.round, outgoing=commit.outgoing, location=f"/models/{commit.round}{suffix}", files={})
        )


@pytest.fixture
def hand(federation: Federation, rounds: Rounds) -> Hand:
    return Hand(federation, rounds)


@pytest.fixture
def two_rounds(hand: Hand) -> Hand:
    """Round 2 is the best and is exported; west was missing in it."""
    hand.commit(0)
    hand.evaluate(0, {"north": 5.0, "south": 6.0, "west": 7.0})
    hand.commit(1)
    hand.evaluate(1, {"north": 4.0, "south": 5.0, "west": 6.0})
    second = hand.commit(2, ("north", "south"))
    hand.evaluate(2, {"north": 3.0, "south": 4.0})
    hand.export(second)
    return hand


@pytest.fixture
def silotune(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: object) -> tuple[int, str, str]:
        from silotune.pipelines import cli

        monkeypatch.setattr("sys.argv", ["silotune", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        return (int(left.value.code or 0), *capfd.readouterr())

    return call
