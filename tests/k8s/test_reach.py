"""Who may talk to whom: a silo's training pod reaches the store and the cluster's DNS, and nothing and nobody else."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

spec = importlib.util.spec_from_file_location("k8s_reach", Path(__file__).parent / "reach.py")
assert spec
assert spec.loader
reach = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reach)
End, Network = reach.End, reach.Network

K8S = Path(__file__).parents[2] / "k8s"
JOB_LABELS = yaml.safe_load((Path(__file__).parent / "job.yaml").read_text())["spec"]["template"]["metadata"]["labels"]
TASK = {"pipelines.kubeflow.org/v2_component": "true"}
NORTH, SOUTH = End("silotune-north", JOB_LABELS), End("silotune-south", JOB_LABELS)
TASKS, KIND_TASKS, KFP_OTHER = End("silotune", TASK), End("kubeflow", TASK), End("kubeflow", {"app": "ml-pipeline-ui"})
MLFLOW = End("silotune", {"app.kubernetes.io/name": "mlflow"})
POSTGRES = End("silotune", {"app.kubernetes.io/name": "mlflow-postgres"})
SEAWEED = End("silotune-store", {"app.kubernetes.io/name": "seaweedfs"})
DNS, KUBE_SYSTEM = End("kube-system", {"k8s-app": "kube-dns"}), End("kube-system", {"k8s-app": "metrics-server"})
KFP_API, KFP_STORE = End("kubeflow", {"app": "ml-pipeline"}), End("kubeflow", {"app": "seaweedfs"})
S3, API, SILO_API = End(address="10.20.0.5"), End(address="10.10.0.10"), End(address="10.30.0.10")
INTERNET, METADATA = End(address="93.184.215.14"), End(address="169.254.169.254")  # the second: cloud credentials of the node
STRANGER = End("default", {"app": "anything"})
PORTS = (53, 80, 443, 5000, 5432, 6443, 8080, 8333, 8887, 8888, 9000)
Reached = set[tuple[str, int]]


@pytest.fixture(scope="module")
def trial(build: Any) -> Any:
    """The kind overlay: everything on one cluster."""
    return Network(build(K8S / "overlays/kind"))


@pytest.fixture(scope="module")
def production(build: Any) -> Any:
    """Coordinator and one silo, on one cluster, the store outside."""
    return Network(build(K8S / "overlays/example-production"), build(K8S / "overlays/example-production/silo-north"))


ALL = {
    "north": NORTH, "south": SOUTH, "tasks": TASKS, "kind tasks": KIND_TASKS, "mlflow": MLFLOW, "postgres": POSTGRES, "seaweedfs": SEAWEED,
    "dns": DNS, "kube-system": KUBE_SYSTEM, "kfp api": KFP_API, "kfp store": KFP_STORE, "s3": S3, "api": API, "silo api": SILO_API,
    "internet": INTERNET, "metadata": METADATA, "stranger": STRANGER, "kfp ui": KFP_OTHER,
}  # fmt: skip


def out(network: Any, source: Any) -> Reached:
    return {(name, port) for name, end in ALL.items() for port in PORTS if end is not source and network.reaches(source, end, port)}


def into(network: Any, target: Any) -> Reached:
    return {(name, port) for name, end in ALL.items() for port in PORTS if end is not target and network.reaches(end, target, port)}


def test_in_production_a_silo_reaches_the_store_and_names_only(production: Any) -> None:
    assert out(production, NORTH) == {("s3", 443), ("dns", 53)}
    assert production.reaches(NORTH, DNS, 53, "UDP")


def test_in_the_trial_a_silo_reaches_the_store_and_names_only(trial: Any) -> None:
    for silo in (NORTH, SOUTH):
        assert out(trial, silo) == {("seaweedfs", 8333), ("dns", 53)}


def test_a_silo_reaches_neither_mlflow_nor_the_kubernetes_api(production: Any, trial: Any) -> None:
    for network in (production, trial):
        assert not network.reaches(NORTH, MLFLOW, 5000)
        assert not any(network.reaches(NORTH, end, port) for end in (API, SILO_API) for port in (443, 6443))


def test_nothing_comes_into_a_silo(production: Any, trial: Any) -> None:
    assert into(production, NORTH) == set()
    assert into(trial, NORTH) == into(trial, SOUTH) == set()


def test_any_other_pod_in_a_silo_reaches_nothing(production: Any) -> None:
    assert out(production, End("silotune-north", {"app": "other"})) == set()


def test_a_task_reaches_what_it_needs_by_name(production: Any) -> None:
    assert out(production, TASKS) == {
        ("s3", 443), ("dns", 53), ("mlflow", 5000), ("kfp api", 8887), ("kfp api", 8888), ("kfp store", 8333), ("api", 6443), ("silo api", 6443),
    }  # fmt: skip


def test_mlflow_reaches_its_database_and_artifacts_and_is_reached_by_tasks(production: Any, trial: Any) -> None:
    assert out(production, MLFLOW) == {("postgres", 5432), ("s3", 443), ("dns", 53)}
    assert into(production, MLFLOW) == {("tasks", 5000)}
    assert {name for name, _ in into(trial, MLFLOW)} == {"kind tasks"}
    assert into(trial, POSTGRES) == into(production, POSTGRES) == {("mlflow", 5432)}
    assert out(production, POSTGRES) == {("dns", 53)}


def test_the_trial_store_is_reached_by_the_parties_on_its_s3_port_only(trial: Any) -> None:
    assert into(trial, SEAWEED) == {(name, 8333) for name in ("north", "south", "tasks", "kind tasks", "mlflow")}
    assert out(trial, SEAWEED) == set()


def test_a_base_by_itself_reaches_no_store(build: Any) -> None:
    """Until an overlay says where it is: the addresses of the bases answer nobody."""
    silo = Network(build(K8S / "base/silo"))
    assert out(silo, End("silotune-silo", JOB_LABELS)) == {("dns", 53)}


def test_the_computation_knows_open_from_closed(production: Any) -> None:
    """A pod that nothing selects is open; one whose target refuses does not get through; selectors bind namespace and pod together."""
    assert production.reaches(STRANGER, INTERNET, 443)
    assert not production.reaches(STRANGER, NORTH, 443)
    assert not production.reaches(NORTH, KUBE_SYSTEM, 53)
    assert not production.reaches(NORTH, End("default", {"k8s-app": "kube-dns"}), 53)
    open_ = Network(
        [{"kind": "NetworkPolicy", "metadata": {"namespace": "a"}, "spec": {"podSelector": {}, "policyTypes": ["Egress"], "egress": [{}]}}]
    )
    assert open_.reaches(End("a"), INTERNET, 443)


def test_pods_that_train_together_reach_each_other_and_no_other_pod_does(trial: Any) -> None:
    training = JOB_LABELS | {"silotune.dev/box": "train"}
    one, other, elsewhere = (End(n, training) for n in ("silotune-north", "silotune-north", "silotune-south"))
    for port in (29400, 29500, 32768, 60999):
        assert trial.reaches(one, other, port)
        for stranger in (elsewhere, NORTH, STRANGER, TASKS):  # NORTH: a Job of another box
            assert not trial.reaches(one, stranger, port)
            assert not trial.reaches(stranger, one, port)
    for port in (22, 443, 8080, 29399, 61000):
        assert not trial.reaches(one, other, port)
