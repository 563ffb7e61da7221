"""What `kubectl kustomize` makes of the manifests, as objects. No cluster is needed; kubectl is."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "k8s"
Object = dict[str, Any]


@cache
def _build(folder: Path) -> str:
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kustomizations() -> list[Path]:
    """Every folder that can be applied; components cannot by themselves."""
    files = sorted(MANIFESTS.rglob("kustomization.yaml"))
    return [f.parent for f in files if yaml.safe_load(f.read_text())["kind"] == "Kustomization"]


@pytest.fixture(scope="session")
def build() -> Any:
    """The objects of a kustomization."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed; 1.26 or newer is needed")
    version = json.loads(subprocess.run(["kubectl", "version", "--client", "-o", "json"], capture_output=True, timeout=60).stdout)
    if version.get("kustomizeVersion", "v0") < "v4":  # Debian 12's kubectl 1.20 has kustomize 2 and says nothing of it
        pytest.skip(f"kubectl is too old, 1.26 or newer is needed: {version['clientVersion']['gitVersion']}")
    return lambda folder: list(yaml.safe_load_all(_build(Path(folder))))


@pytest.fixture
def job() -> Object:
    """The Job of the example, free to be changed."""
    return copy.deepcopy(yaml.safe_load((Path(__file__).parent / "job.yaml").read_text()))
