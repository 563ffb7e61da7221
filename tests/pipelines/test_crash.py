"""A process killed at any moment of any write costs work, never a result: the next run ends in the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BOXES = {"preprocess", "initialize", "train", "aggregate", "evaluate", "export"}
SCRIPT = Path(__file__).with_name("crashing.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # a fork must not inherit a pool of threads


def lives(*scenarios: tuple[Path, int | None]) -> list[dict[str, Any]]:
    lines = "".join(json.dumps({"file": str(file), "event": event}) + "\n" for file, event in scenarios)
    done = subprocess.run([sys.executable, SCRIPT], input=lines, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def undisturbed(make_federation: Any, tmp_path: Path) -> dict[str, Any]:
    return lives((make_federation(tmp_path / "undisturbed", silos=("east", "north")), None))[0]


def moments(undisturbed: dict[str, Any]) -> dict[tuple[str, str], list[int]]:
    """(box, moment) -> numbers of the events that are one."""
    found: dict[tuple[str, str], list[int]] = {}
    for number, (box, moment, _) in enumerate(undisturbed["seen"], 1):
        found.setdefault((box, moment), []).append(number)
    return found


def check(events: list[int], undisturbed: dict[str, Any], make_federation: Any, folder: Path) -> None:
    files = [make_federation(folder / f"killed-{event}", silos=("east", "north")) for event in events]
    results = lives(*zip(files, events, strict=True))
    assert len(results) == len(events)
    for event, result in zip(events, results, strict=True):
        where = undisturbed["seen"][event - 1]
        assert result["killed"], f"event {event} never came: {where}"
        assert result["globals"] == undisturbed["globals"], f"killed at {where}: another result"
        assert result["chained"], f"killed at {where}: the chain of commits is broken"


def test_killed_in_every_box_before_during_and_after_a_write(undisturbed: dict[str, Any], make_federation: Any, tmp_path: Path) -> None:
    found = moments(undisturbed)
    writing = BOXES - {"preprocess"}  # it writes to the silo's own storage only: shards by rename, seen as "during"
    assert set(found) >= {(box, moment) for box in writing for moment in ("before", "during", "after")}
    assert ("preprocess", "during") in found
    events = sorted(numbers[len(numbers) // 2] for (box, _), numbers in found.items() if box in BOXES)
    check(events, undisturbed, make_federation, tmp_path)


@pytest.mark.slow
def test_killed_at_every_moment(undisturbed: dict[str, Any], make_federation: Any, tmp_path: Path) -> None:
    numbers = [n for (box, _), events in moments(undisturbed).items() if box in BOXES for n in events]
    check(sorted(numbers), undisturbed, make_federation, tmp_path)
