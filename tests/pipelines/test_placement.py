"""A silo's placement is in the compiled pipeline word for word, as constants, or it is refused; nothing is dropped."""

# No postponed annotations here: kfp reads a pipeline's types at run time.
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler, dsl

from silotune.components.errors import FederationError
from silotune.components.federation import Federation
from silotune.components.train.component import train
from silotune.pipelines.placement import place

IMAGE = "registry.example/silotune-silo@sha256:" + "a" * 64
COORDINATOR = "registry.example/silotune-coordinator@sha256:" + "c" * 64
NODES = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
    {"matchExpressions": [{"key": "gpu.nvidia.com/class", "operator": "In", "values": ["A100"]}]}]}}  # fmt: skip


def load(folder: Path, launcher: str, **placement: Any) -> Federation:
    silos = [{"id": "north", "train": "./n.jsonl", "placement": placement}]
    terms = {"name": "fed", "model": {"base": "./base"}, "silos": silos, "launcher": launcher, "tracking": {"uri": "none"}}
    (folder / "f.yaml").write_text(yaml.safe_dump(terms))
    return Federation.load(folder / "f.yaml")


def compiled(folder: Path, federation: Federation, **more: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(the container, its Kubernetes settings, the task) of a silo's placed task, as KFP's backend gets them."""

    @dsl.pipeline(name="placed")
    def pipeline() -> None:
        place(train(federation="f", silo="north", turn="round:1 attempt:1"), federation, "north", **more)

    compiler.Compiler().compile(pipeline, str(folder / "pipeline.yaml"))
    spec, *platform = yaml.safe_load_all((folder / "pipeline.yaml").read_text())
    executor = "exec-train"
    settings = platform[0]["platforms"]["kubernetes"]["deploymentSpec"]["executors"][executor] if platform else {}
    return spec["deploymentSpec"]["executors"][executor]["container"], settings, spec["root"]["dag"]["tasks"]["train"]


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {e["name"]: e["value"] for e in container["env"]}


def test_a_launcher_is_light_and_runs_the_coordinators_image(tmp_path: Path) -> None:
    federation = load(tmp_path, "job", namespace="north", image=IMAGE, gpus=1, memory="64Gi", node_selector={"pool": "gpu"})
    container, settings, task = compiled(tmp_path, federation, coordinator_image=COORDINATOR)
    assert container["image"] == COORDINATOR
    assert container["resources"]["resourceMemoryLimit"] == "512Mi"
    assert "accelerator" not in container["resources"]
    assert settings == {}  # the silo's nodes, claims and secrets are its Job's
    assert environment(container) == {"SILOTUNE_LAUNCHER": "job"}
    assert task["retryPolicy"]["maxRetryCount"] == 3


def test_a_launcher_for_another_cluster_gets_its_kubeconfig_as_a_file(tmp_path: Path) -> None:
    container, settings, _ = compiled(tmp_path, load(tmp_path, "job", namespace="n", image=IMAGE, kubeconfig_secret="north-cluster"))
    (secret,) = settings["secretAsVolume"]
    assert (secret["secretName"], secret["mountPath"]) == ("north-cluster", "/kubeconfig")
    assert environment(container)["SILOTUNE_KUBECONFIG"] == "/kubeconfig/kubeconfig"


def test_a_pod_is_placed_word_for_word(tmp_path: Path) -> None:
    federation = load(
        tmp_path, "pod", image=IMAGE, node_selector={"pool": "gpu"}, gpus=1, cpu="4", memory="16Gi", affinity={"nodeAffinity": NODES},
        tolerations=[{"key": "gpu", "effect": "NoSchedule"}, {"operator": "Equal", "key": "team", "value": "north"}],
        claims=[{"claim": "north-data", "mount": "/silo"}], config_map="terms",
        secrets=[{"name": "north-s3", "env": {"A": "key", "B": "key"}}, {"name": "north-keys", "mount": "/keys"}],
    )  # fmt: skip
    container, settings, _ = compiled(tmp_path, federation)
    assert container["image"] == IMAGE
    resources = container["resources"]
    assert resources["accelerator"] == {"count": "1", "resourceCount": "1", "type": "nvidia.com/gpu", "resourceType": "nvidia.com/gpu"}
    assert (resources["resourceCpuRequest"], resources["resourceMemoryLimit"], resources["resourceMemoryRequest"]) == ("4", "16Gi", "16Gi")
    assert settings["nodeSelector"] == {"labels": {"pool": "gpu"}}
    assert settings["tolerations"] == [
        {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "team", "operator": "Equal", "value": "north"},
    ]
    assert settings["nodeAffinity"][0]["nodeAffinityJson"]["runtimeValue"]["constant"] == NODES
    assert [(p["constant"], p["mountPath"]) for p in settings["pvcMount"]] == [("north-data", "/silo")]
    assert [(c["configMapName"], c["mountPath"]) for c in settings["configMapAsVolume"]] == [("terms", "/federation")]
    pairs = [(s["secretName"], k["secretKey"], k["envVar"]) for s in settings["secretAsEnv"] for k in s["keyToEnv"]]
    assert pairs == [("north-s3", "key", "A"), ("north-s3", "key", "B")]
    assert [(s["secretName"], s["mountPath"]) for s in settings["secretAsVolume"]] == [("north-keys", "/keys")]
    assert environment(container) == {"SILOTUNE_LAUNCHER": "pod"}


def test_an_empty_placement_changes_nothing_of_a_pod(tmp_path: Path) -> None:
    container, settings, _ = compiled(tmp_path, load(tmp_path, "pod"))
    assert settings == {}
    assert container["image"] == "python:3.11-slim"
    assert "resources" not in container


@pytest.mark.parametrize(
    ("launcher", "wish", "field"),
    [
        ("pod", {"namespace": "north"}, "namespace"),
        ("pod", {"kubeconfig_secret": "s"}, "kubeconfig_secret"),
        ("pod", {"service_account": "a"}, "service_account"),
        ("pod", {"runtime_class": "kata"}, "runtime_class"),
        ("pod", {"priority_class": "low"}, "priority_class"),
        ("pod", {"ephemeral_storage": "20Gi"}, "ephemeral_storage"),
        ("pod", {"affinity": {"podAntiAffinity": {}}}, "affinity"),
        ("pod", {"claims": [{"claim": "c", "mount": "/c", "read_only": True}]}, "claims.read_only"),
        ("pod", {"image": "silo:latest"}, "image"),
        ("pod", {"memory": "1.5Gi"}, "memory"),
        ("pod", {"gpus": 2}, "gpus"),
        ("pod", {"nodes": 2}, "nodes"),
        ("job", {"image": IMAGE}, "namespace"),
        ("job", {"namespace": "n"}, "image"),
        ("job", {"namespace": "n", "image": IMAGE, "trainer": "trainjob"}, "trainer"),
    ],
)
def test_what_cannot_be_had_is_refused_with_a_cure(tmp_path: Path, launcher: str, wish: dict[str, Any], field: str) -> None:
    with pytest.raises(FederationError, match=rf"silo 'north': placement\.{field}: .+, got|silo 'north': placement\.{field}: is required"):
        compiled(tmp_path, load(tmp_path, launcher, **wish))


def test_all_that_is_refused_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(FederationError) as error:
        compiled(tmp_path, load(tmp_path, "pod", namespace="n", runtime_class="kata", gpus=4))
    assert len(str(error.value).splitlines()) == 3


def test_a_coordinators_image_by_tag_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="by digest"):
        compiled(tmp_path, load(tmp_path, "job", namespace="n", image=IMAGE), coordinator_image="coordinator:latest")
