"""What Kubeflow shows of a round: numbers and a page, from the commit and the scores alone."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from courses import Course

from silotune.components import round_page
from silotune.components.protocol import Evaluation, TrackingRun

SERVER = {"uri": "https://mlflow.example/base"}


def course(folder: Path, **more: Any) -> Course:
    """Three rounds; round 2 began from a global that all have scored."""
    made = Course(folder, **more).run(3)
    for i, silo in enumerate(("east", "north", "south")):
        score(made, silo, loss=1.0 + i)
    return made


def score(made: Course, silo: str, loss: float | None) -> None:
    incoming = made.rounds.commit(2).incoming
    made.rounds.write_evaluation(
        Evaluation(round=2, outgoing=incoming, silo=silo, split="valid", split_digest="d" * 64, examples=2, tokens=10,
                   loss_sum=None if loss is None else loss * 10, correct=1, at=1.0)
    )  # fmt: skip


def write(made: Course, turn: str = "round:2 attempt:1") -> tuple[dict[str, float], str]:
    page = made.folder / "artefacts" / "page"
    return round_page.write(str(made.federation.file), turn, str(page)), page.read_text()


def test_the_page_tells_the_round_and_every_silos_part(tmp_path: Path) -> None:
    made = course(tmp_path)
    commit = made.rounds.commit(2)
    numbers, page = write(made)
    assert numbers["incoming/loss"] == pytest.approx(2.0)
    assert numbers["incoming/perplexity"] == pytest.approx(math.exp(2.0))
    assert {n: numbers[n] for n in ("round", "participants", "missing", "bytes/up", "seconds")} == {
        "round": 2, "participants": 3, "missing": 0, "bytes/up": commit.bytes_up, "seconds": commit.at - commit.started
    }  # fmt: skip
    assert f"# {made.federation.name}, round 2" in page
    for digest in (commit.incoming, commit.outgoing, commit.digest):
        assert f"`{digest}`" in page
    north = next(line for line in page.splitlines() if line.startswith("| north |"))
    c = commit.contributions["north"]
    assert [cell.strip() for cell in north.strip("|").split("|")] == [
        "north", "ok", f"{c.examples:,}", f"{c.tokens:,}", f"{c.norm:.4g}", "2.0000"
    ]  # fmt: skip


def test_a_round_that_stands_already_has_the_same_page_again(tmp_path: Path) -> None:
    made = course(tmp_path)
    assert write(made) == write(made)


def test_where_nothing_was_open_the_page_says_why(tmp_path: Path) -> None:
    assert write(course(tmp_path), "done:converged at round 3") == ({}, "Nothing to do: converged at round 3\n")


def test_who_is_missing_is_told_with_the_reason_as_plain_characters(tmp_path: Path) -> None:
    made = course(tmp_path)
    evil = "failed: <img src=x onerror=alert(1)> [here](javascript:x) | a `b`\n# c"
    made.end("skipped", missing={"north": evil, "south": "late"})
    numbers, page = write(made, "round:4 attempt:1")
    assert (numbers["participants"], numbers["missing"]) == (0, 2)
    assert "| south | late |" in page
    row = next(line for line in page.splitlines() if line.startswith("| north |"))
    assert "<img" not in page
    assert not re.search(r"(?<!\\)[\[\]`#<>]", row)
    assert len(re.findall(r"(?<!\\)\|", row)) == 7, "six cells, whatever the reason holds"


def test_numbers_that_are_not_finite_stay_off_kubeflows_json(tmp_path: Path) -> None:
    made = Course(tmp_path).run(3)
    score(made, "east", loss=None)
    numbers, page = write(made)
    json.dumps(numbers, allow_nan=False)
    assert "incoming/loss" not in numbers
    assert "inf" in page


def test_the_link_goes_to_the_federations_run_on_a_server_only(tmp_path: Path) -> None:
    made = course(tmp_path / "a", tracking=SERVER)
    assert "MLflow" not in write(made)[1]  # no run yet
    made.rounds.write_tracking_run(TrackingRun(experiment="7", run="ab)> <c"))
    assert "[MLflow run](<https://mlflow.example/base/#/experiments/7/runs/ab%29%3E%20%3Cc>)" in write(made)[1]
    local = course(tmp_path / "b")
    local.rounds.write_tracking_run(TrackingRun(experiment="7", run="x"))
    assert "MLflow" not in write(local)[1]


def test_a_page_that_cannot_be_made_fails_no_round(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = course(tmp_path)
    numbers, page = write(made, "round:9 attempt:1")
    assert numbers == {}
    assert "has no page" in page
    assert "aggregate warned" in capfd.readouterr().out
