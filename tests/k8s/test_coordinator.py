"""What a submitted pipeline's tasks look for is what the manifests put there, under these names, in the namespace that they run in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from silotune.components.federation import Federation
from silotune.pipelines.kubeflow.submission import versioned

K8S = Path(__file__).parents[2] / "k8s"
OVERLAYS = {"kind": "kubeflow", "example-production": "silotune"}  # overlay -> where KFP runs its tasks there
Object = dict[str, Any]


def uses(overlay: str, folder: Path) -> dict[str, set[str]]:
    """ConfigMaps and Secrets that the overlay's federation, submitted, asks for: kind -> names."""
    from silotune.pipelines.kubeflow.cluster_fit import require_fit

    federation = Federation.load(K8S / "overlays" / overlay / "federation.yaml")
    require_fit(federation)
    versioned(federation, 1, folder / "package.yaml")
    _, platform = yaml.safe_load_all((folder / "package.yaml").read_text())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    found: dict[str, set[str]] = {"configMap": set(), "secret": set()}
    for executor in executors:
        for kind, names in found.items():
            names |= {use[f"{kind}Name"] for how in ("AsVolume", "AsEnv") for use in executor.get(f"{kind}{how}", [])}
    return found


@pytest.mark.parametrize(("overlay", "namespace"), OVERLAYS.items())
def test_a_task_finds_its_terms_and_the_store_where_it_runs(build: Any, tmp_path: Path, overlay: str, namespace: str) -> None:
    there = {
        o["metadata"]["name"]: o["data"]
        for o in build(K8S / "overlays" / overlay)
        if o["kind"] == "ConfigMap" and o["metadata"]["namespace"] == namespace
    }
    assert uses(overlay, tmp_path)["configMap"] - {"silotune-ca"} <= there.keys()  # which only some need, and make themselves
    assert "federation.yaml" in there["silotune-federation"]
    assert there["silotune-store"]["AWS_ENDPOINT_URL"] != "https://store.example", "the stand-in of the base"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_secret_of_a_task_is_one_that_people_are_told_to_make(tmp_path: Path, overlay: str) -> None:
    told = set(re.findall(r"^\| `([a-z0-9-]+)` \|", (K8S / "README.md").read_text(), re.MULTILINE))
    told |= set(re.findall(r"Secret ([a-z0-9-]+), key kubeconfig", (K8S / "overlays" / overlay / "federation.yaml").read_text()))
    assert uses(overlay, tmp_path)["secret"] <= told


def test_the_account_of_a_run_may_end_its_schedule_and_change_nothing_else_on_kubeflow(build: Any) -> None:
    roles = {o["metadata"]["name"]: o["rules"] for o in build(K8S / "base" / "coordinator") if o["kind"] == "Role"}
    on_kubeflow = {(r, v) for rules in roles.values() for rule in rules if "pipelines.kubeflow.org" in rule["apiGroups"]
                   for r in rule["resources"] for v in rule["verbs"]}  # fmt: skip
    assert on_kubeflow == {("experiments", "list"), ("jobs", "list"), ("jobs", "disable")}
