"""What a round asks of the store and of the disk, by the number of silos: so much for each silo, and nothing more for there being others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from deliveries import Deliveries

from silotune.components.protocol import Evaluation, Plan, Report
from silotune.components.store.directory_store import DirectoryStore

MOST = 5  # requests for each silo: its manifest, its score, and of its update the size, the header and the tensors


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Requests to the store by kind, public keys that were read, and plans that were encoded."""
    found: Counter[str] = Counter()

    def counted(owner: Any, name: str, what: str) -> None:
        plain = getattr(owner, name)

        def call(self: Any, *given: Any, **named: Any) -> Any:
            found[what] += 1
            return plain(self, *given, **named)

        monkeypatch.setattr(owner, name, call)

    for name in ("get", "get_range", "size", "create", "put_file", "fetch_file", "list", "delete"):
        counted(DirectoryStore, name, name)
    counted(Path, "read_text", "keys")
    counted(Plan, "encode", "plans")
    return found


def cost(folder: Path, count: int, asked: Counter[str]) -> Counter[str]:
    silos = tuple(f"s{n:02d}" for n in range(count))
    course = Deliveries(folder, silos, security={})
    course.deliver(*silos)
    incoming = course.rounds.commit(0).outgoing
    for silo in silos:
        course.rounds.write_report(Report(round=1, attempt=1, silo=silo, status="ok"))
        course.rounds.write_evaluation(
            Evaluation(
                outgoing=incoming, silo=silo, round=1, split="valid", split_digest="d" * 64, examples=1, tokens=2, loss_sum=1.0, correct=1, at=1.0
            )
        )  # fmt: skip
    asked.clear()
    assert course.aggregate().contributions.keys() == set(silos)
    return Counter(asked)


def test_a_round_costs_so_much_for_each_silo_however_many_there_are(tmp_path: Path, asked: Counter[str]) -> None:
    few, some, many = (cost(tmp_path / str(count), count, asked) for count in (4, 8, 12))
    assert many - some == some - few, "as much again for as many silos more"
    each = {what: (some[what] - few[what]) / 4 for what in some}
    assert each["create"] == each["list"] == each["put_file"] == 0, "what a coordinator writes is one record each, whoever takes part"
    assert each["plans"] == 0, "a plan is as long as its silos are many: encoded for each of them, it would cost their square"
    assert each["keys"] <= 2, "of whoever has signed a manifest, and a score"
    assert sum(each[what] for what in ("get", "get_range", "size", "fetch_file")) <= MOST, each
