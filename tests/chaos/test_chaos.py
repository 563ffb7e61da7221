"""Federations that are killed, starved, cut off, damaged and doubled come to the same globals as undisturbed ones, and lose no round."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

spec = importlib.util.spec_from_file_location("stores_of_chaos", Path(__file__).parents[1] / "components" / "conftest.py")
stores = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stores)
gateway = stores.gateway  # a fixture

RUN = Path(__file__).with_name("run.py")
ALL, SOME = 200, 10


def chaos(folder: Path, scenarios: int, **environment: str) -> dict[str, Any]:
    """The numbers of the first so many scenarios, none of which may break."""
    numbers = folder / "numbers.json"
    command = [sys.executable, RUN, "--scenarios", str(scenarios), "--folder", folder / "federations", "--json", numbers]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(numbers.read_text()))


def test_some_scenarios(tmp_path: Path) -> None:
    numbers = chaos(tmp_path, SOME)
    assert numbers["scenarios"] == SOME
    assert numbers["fault: kill -9"] > 0
    assert numbers["fault: no room on disk"] > 0
    assert any(name.startswith("fault: store") for name in numbers)
    assert numbers["secure sums opened"] > 0


@pytest.mark.ceph
def test_some_scenarios_on_a_real_s3(tmp_path: Path, gateway: Any) -> None:
    bucket = f"chaos-{uuid.uuid4().hex[:8]}"
    gateway.client().create_bucket(Bucket=bucket)
    keys = {"AWS_ACCESS_KEY_ID": gateway.access_key, "AWS_SECRET_ACCESS_KEY": gateway.secret_key, "AWS_DEFAULT_REGION": "us-east-1"}
    numbers = chaos(tmp_path, 4, SILOTUNE_CHAOS_S3=gateway.endpoint, SILOTUNE_CHAOS_BUCKET=bucket, **keys)
    assert numbers["fault: kill -9"] > 0
    kept = gateway.client().list_objects_v2(Bucket=bucket, MaxKeys=1)
    assert kept["KeyCount"] == 1, "the federations were there"


@pytest.mark.chaos
def test_all_scenarios(tmp_path: Path) -> None:
    numbers = chaos(tmp_path, ALL)
    for kind in (
        "kill -9",
        "kill -9 of a whole run",
        "no room on disk",
        "altered update",
        "altered global",
        "altered record",
        "withheld record of a sum",
    ):
        assert numbers[f"fault: {kind}"] > 0, kind
    for stage in ("train", "share", "mask", "confirm", "unmask"):
        assert numbers[f"fault: silo dead before {stage}"] > 0, stage
    for kind in ("drop-before", "drop-after", "delay", "truncate", "duplicate", "flip"):
        assert numbers[f"fault: store {kind}"] > 0, kind
    assert any(name.startswith("fault: network") for name in numbers)


@pytest.mark.chaos
def test_some_scenarios_where_there_is_no_strace(tmp_path: Path) -> None:
    numbers = chaos(tmp_path, SOME, SILOTUNE_CHAOS_TRAPS="hooks")
    assert "hooks" in numbers["traps"]
    assert numbers["fault: kill -9"] > 0
