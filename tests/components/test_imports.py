"""Heavy packages are imported only where they are used: every task of a run pays for what its box imports."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

HEAVY = ("torch", "transformers", "peft", "accelerate", "mlflow", "boto3", "pyarrow")


def imported(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has after running some code."""
    ask = f"{code}\nimport sys\nprint(*(p for p in {HEAVY!r} if p in sys.modules))"
    return set(subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.split("\n")[-2].split())


@pytest.mark.parametrize(
    "box",
    ["preprocess", "initialize", "train", "share", "mask", "confirm", "unmask", "muster", "combine", "aggregate", "evaluate", "export"],
)
def test_a_box_that_has_nothing_to_do_costs_no_import(box: str) -> None:
    assert imported(f"import silotune.components.{box}.step, silotune.components.{box}.component") == set()


def test_aggregating_needs_numpy_only(make_federation: Any) -> None:
    from silotune.components.initialize import step as initialize
    from silotune.components.preprocess import step as preprocess
    from silotune.components.train import step as train

    file, silos = str(make_federation()), ("east", "north", "south")
    turn = initialize.work(file, *(preprocess.work(file, s) for s in silos))
    statuses = [train.work(file, s, turn) for s in silos]
    code = f"from silotune.components.aggregate.step import work\nprint(work(*{(file, turn, *statuses)!r}))"
    assert imported(code) == set()
