"""The example federation, from nothing, with `silotune run --engine docker`: its notes, its base model, all of its rounds, its export."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from silotune.components.federation import Federation
from silotune.components.rounds import Rounds
from silotune.components.store.content import file_digest

pytestmark = pytest.mark.images

EXAMPLE = Path(__file__).parents[2] / "examples" / "hospitals"


def silotune(*words: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "silotune.pipelines.cli", *map(str, words)], capture_output=True, text=True, check=False, timeout=3000
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.usefixtures("silo_image", "coordinator_image")
def test_the_hospitals_train_together_in_containers(tmp_path: Path) -> None:
    for name in ("notes.py", "base.py", "federation.yaml"):
        shutil.copy(EXAMPLE / name, tmp_path)
    for script, *words in (["notes.py", "data"], ["base.py", "data/public.txt", "base"]):
        subprocess.run([sys.executable, tmp_path / script, *(tmp_path / word for word in words)], check=True, capture_output=True)
    file = tmp_path / "federation.yaml"
    silotune("run", file, "--engine", "docker")

    federation = Federation.load(file)
    course: dict[str, Any] = json.loads(silotune("status", file, "--json"))
    rounds = course["rounds"]
    assert [r["round"] for r in rounds] == list(range(federation.rounds.total + 1))
    assert all(r["committed"] and r["participants"] == sorted(federation.silo_ids) and not r["missing"] for r in rounds[1:])
    assert rounds[-1]["global"]["loss"] < 0.5 * rounds[0]["global"]["loss"], "six rounds teach it the letters"
    exported = next(iter(Rounds.of(federation).exports()))
    assert {name: file_digest(Path(course["export"]) / name) for name in exported.files} == exported.files
    silotune("verify", file)
