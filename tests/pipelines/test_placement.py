"""A silo's placement is in the compiled pipeline word for word, as constants, or it is refused; nothing is dropped."""

# No postponed annotations here: kfp reads a pipeline's types at run time.
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp import compiler, dsl
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from silotune.components.errors import FederationError
from silotune.components.federation import Federation
from silotune.components.train.component import train
from silotune.pipelines.kubeflow import submission
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


TERMS = {
    ("config map", "silotune-federation", "/federation"),
    ("config map", "silotune-store", "AWS_ENDPOINT_URL"),
    *(("config map", "silotune-store", key) for key in ("AWS_REGION", "AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")),
    *(("config map", "silotune-store", key) for key in ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")),
    ("config map", "silotune-ca", "/ca"),
    ("empty folder", "scratch", "/tmp"),
}
S3 = {("secret", "silotune-s3", "AWS_ACCESS_KEY_ID"), ("secret", "silotune-s3", "AWS_SECRET_ACCESS_KEY")}
KEYS = {("secret", "silotune-keys", "/keys")}
MLFLOW = {("secret", "silotune-mlflow", "MLFLOW_TRACKING_USERNAME"), ("secret", "silotune-mlflow", "MLFLOW_TRACKING_PASSWORD")}


def given(settings: dict[str, Any]) -> set[tuple[str, str, str]]:
    """(what, its name, the folder or the variable that it appears as)"""
    kinds = {"configMap": "config map", "secret": "secret"}
    found = {("empty folder", e["volumeName"], e["mountPath"]) for e in settings.get("emptyDirMounts", [])}
    for key, kind in kinds.items():
        found |= {(kind, v[f"{key}Name"], v["mountPath"]) for v in settings.get(f"{key}AsVolume", [])}
        found |= {(kind, v[f"{key}Name"], k["envVar"]) for v in settings.get(f"{key}AsEnv", []) for k in v["keyToEnv"]}
    return found


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {e["name"]: e["value"] for e in container["env"]}


def test_a_launcher_is_light_and_runs_the_coordinators_image(tmp_path: Path) -> None:
    federation = load(tmp_path, "job", namespace="north", image=IMAGE, gpus=1, memory="64Gi", node_selector={"pool": "gpu"})
    container, settings, task = compiled(tmp_path, federation, coordinator_image=COORDINATOR)
    assert container["image"] == COORDINATOR
    assert container["resources"]["resourceMemoryLimit"] == "512Mi"
    assert "accelerator" not in container["resources"]
    assert given(settings) == TERMS | S3  # the silo's nodes, claims and secrets are its Job's, and the signing key is the coordinator's
    assert not {"pvcMount", "nodeSelector", "tolerations"} & settings.keys()
    assert environment(container) == {"SILOTUNE_LAUNCHER": "job", "HOME": "/tmp/home"}
    assert task["retryPolicy"]["maxRetryCount"] == 3


def test_a_launcher_for_another_cluster_gets_its_kubeconfig_as_a_file(tmp_path: Path) -> None:
    container, settings, _ = compiled(tmp_path, load(tmp_path, "job", namespace="n", image=IMAGE, kubeconfig_secret="north-cluster"))
    assert given(settings) == TERMS | S3 | {("secret", "north-cluster", "/kubeconfig")}
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
    assert [(c["configMapName"], c["mountPath"]) for c in settings["configMapAsVolume"]] == [
        ("terms", "/federation"),
        ("silotune-ca", "/ca"),
    ]
    pairs = [(s["secretName"], k["secretKey"], k["envVar"]) for s in settings["secretAsEnv"] for k in s["keyToEnv"]]
    assert pairs == [("north-s3", "key", "A"), ("north-s3", "key", "B")]
    assert not any(use.get("optional") for kind in ("secretAsVolume", "secretAsEnv") for use in settings[kind]), "the file names them"
    assert [(s["secretName"], s["mountPath"]) for s in settings["secretAsVolume"]] == [("north-keys", "/keys")]
    assert environment(container) == {"SILOTUNE_LAUNCHER": "pod", "HOME": "/tmp/home", "SILOTUNE_KEYS": "/keys"}


def test_a_pod_that_asks_for_nothing_has_the_terms_the_store_and_what_a_job_would_have(tmp_path: Path) -> None:
    container, settings, _ = compiled(tmp_path, load(tmp_path, "pod"))
    assert given(settings) == TERMS | S3 | KEYS
    assert all(use["optional"] for kind in ("secretAsVolume", "secretAsEnv", "configMapAsVolume") for use in settings[kind])
    assert environment(container) == {"SILOTUNE_LAUNCHER": "pod", "HOME": "/tmp/home", "SILOTUNE_KEYS": "/keys"}
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
        ("pod", {"nodes": 2}, "nodes"),
        ("job", {"image": IMAGE}, "namespace"),
        ("job", {"namespace": "n"}, "image"),
        ("pod", {"trainer": "trainjob"}, "trainer"),
    ],
)
def test_what_cannot_be_had_is_refused_with_a_cure(tmp_path: Path, launcher: str, wish: dict[str, Any], field: str) -> None:
    with pytest.raises(FederationError, match=rf"silo 'north': placement\.{field}: .+, got|silo 'north': placement\.{field}: is required"):
        compiled(tmp_path, load(tmp_path, launcher, **wish))


def test_all_that_is_refused_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(FederationError) as error:
        compiled(tmp_path, load(tmp_path, "pod", namespace="n", runtime_class="kata", nodes=4))
    assert len(str(error.value).splitlines()) == 3


def test_a_coordinators_image_by_tag_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="by digest"):
        compiled(tmp_path, load(tmp_path, "job", namespace="n", image=IMAGE), coordinator_image="coordinator:latest")


# The coordinator's own boxes, in a whole pipeline and as KFP's backend parses it

FEDERATION = """
name: ward
coordinator_image: "{coordinator}"
model_image: "{image}"
model: {{base: /models/base}}
silos:
  - {{id: north, train: /silo/t.jsonl, placement: {{namespace: n, image: "{image}", claims: [{{claim: base, mount: /models}}]}}}}
coordinator: {{{place}}}
storage: {{root: s3://store/federations}}
tracking: {{uri: {tracking}}}
"""


def boxes(folder: Path, tracking: str = "https://mlflow.example", more: str = "") -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Box -> (its container, its Kubernetes settings), from KFP's protos."""
    place = more if "claims" in more else f"{more}claims: [{{claim: base-models, mount: /models}}]"
    (folder / "ward.yaml").write_text(FEDERATION.format(coordinator=COORDINATOR, image=IMAGE, tracking=tracking, place=place))
    package = folder / "package.yaml"
    submission.versioned(Federation.load(folder / "ward.yaml"), 1, package)
    spec, platform = yaml.safe_load_all(package.read_text())
    parsed = json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    settings = json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec()).platforms["kubernetes"].deployment_spec.executors
    containers = json_format.MessageToDict(parsed.deployment_spec)["executors"]
    found = {}
    for name, its in settings.items():
        exact = json_format.ParseDict(json_format.MessageToDict(its), kubernetes_executor_config_pb2.KubernetesExecutorConfig())
        found[name.removeprefix("exec-")] = (containers[name]["container"], json_format.MessageToDict(exact))
    assert found.keys() == {e.removeprefix("exec-") for e in containers}, "every task of a placed pipeline is placed"
    return found


def test_each_box_of_the_coordinator_is_given_what_it_needs_and_no_more(tmp_path: Path) -> None:
    found = boxes(tmp_path)
    everyone = TERMS | S3
    assert {box: given(settings) for box, (_, settings) in found.items()} == {
        **dict.fromkeys(("preprocess", "train", "evaluate"), everyone),  # launchers: no key, no MLflow
        **dict.fromkeys(("initialize", "aggregate", "export"), everyone | KEYS | MLFLOW),
    }
    claims = {box: [(c["constant"], c["mountPath"]) for c in s.get("pvcMount", [])] for box, (_, s) in found.items()}
    assert {box for box, its in claims.items() if its} == {"initialize", "export"}  # aggregate never holds the base
    assert claims["initialize"] == [("base-models", "/models")]
    assert {box for box, (_, s) in found.items() if s.get("podMetadata")} == {"export"}
    assert found["export"][1]["podMetadata"]["labels"] == {"access-ml-pipeline": "true"}


def test_a_combine_task_has_what_it_needs_and_no_more_and_is_tried_again(tmp_path: Path) -> None:
    terms = yaml.safe_load(FEDERATION.format(coordinator=COORDINATOR, image=IMAGE, tracking="https://mlflow.example", place="cpu: '2'"))
    silo = terms["silos"][0]
    terms |= {"silos": [silo | {"id": s} for s in ("east", "north", "south")], "aggregation": {"fan_in": 2}}
    (folder := tmp_path / "three").mkdir()
    (folder / "ward.yaml").write_text(yaml.safe_dump(terms))
    submission.versioned(Federation.load(folder / "ward.yaml"), 1, folder / "package.yaml")
    spec, platform = yaml.safe_load_all((folder / "package.yaml").read_text())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    container = spec["deploymentSpec"]["executors"]["exec-combine"]["container"]
    assert container["image"] == COORDINATOR
    assert container["resources"]["resourceCpuLimit"] == "2"
    assert environment(container)["SILOTUNE_KEYS"] == "/keys"
    assert given(executors["exec-combine"]) == TERMS | S3 | KEYS, "no MLflow"
    assert "pvcMount" not in executors["exec-combine"], "no base model"
    inner = next(c for n, c in spec["components"].items() if n.startswith("comp-federated-round"))["dag"]["tasks"]
    retries = {t["taskInfo"]["name"]: t.get("retryPolicy", {}).get("maxRetryCount") for t in inner.values()}
    assert (retries["combine 1"], retries["combine 2"], retries["aggregate"]) == (3, 3, None)


def test_the_coordinators_boxes_have_a_place_to_write_their_images_and_bounds(tmp_path: Path) -> None:
    found = boxes(tmp_path, more="cpu: 2500m, memory: 24Gi, node_selector: {pool: cpu}, tolerations: [{key: batch}], ")
    assert {box: container["image"] for box, (container, _) in found.items()} == {
        "initialize": IMAGE, "export": IMAGE, **dict.fromkeys(("preprocess", "train", "evaluate", "aggregate"), COORDINATOR)
    }  # fmt: skip
    for box in ("initialize", "aggregate", "export"):
        container, _ = found[box]
        resources = container["resources"]
        assert (resources["resourceCpuRequest"], resources["resourceCpuLimit"]) == ("2500m", "2500m")
        assert (resources["resourceMemoryRequest"], resources["resourceMemoryLimit"]) == ("24Gi", "24Gi")
        its = {"HOME": "/tmp/home", "SILOTUNE_WORK": "/tmp/silotune", "SILOTUNE_KEYS": "/keys", "OMP_NUM_THREADS": "2"}
        api = {"SILOTUNE_KFP_API": "http://ml-pipeline.kubeflow.svc.cluster.local:8888"} if box == "export" else {}
        assert environment(container) == its | api
    assert all(s["nodeSelector"] == {"labels": {"pool": "cpu"}} for _, s in found.values())
    assert all(s["tolerations"] == [{"key": "batch", "operator": "Exists"}] for _, s in found.values())


def test_a_box_without_bounds_in_the_file_has_some(tmp_path: Path) -> None:
    resources = [container["resources"] for container, _ in boxes(tmp_path).values()]
    assert all({"resourceCpuRequest", "resourceCpuLimit", "resourceMemoryRequest", "resourceMemoryLimit"} <= r.keys() for r in resources)


def test_without_a_tracking_server_nobody_gets_its_password(tmp_path: Path) -> None:
    assert not any(given(settings) & MLFLOW for _, settings in boxes(tmp_path, tracking="none").values())


def test_what_the_coordinator_misses_ends_its_box_with_a_word_instead_of_waiting(tmp_path: Path) -> None:
    for box, (_, settings) in boxes(tmp_path).items():
        for kind in ("configMapAsVolume", "configMapAsEnv", "secretAsVolume", "secretAsEnv"):
            assert all(use.get("optional") for use in settings.get(kind, [])), (box, kind)


def test_other_names_and_another_kubeflow_are_the_files_to_say(tmp_path: Path) -> None:
    more = (
        "config_map: ward-terms, keys_secret: ward-keys, s3_secret: ward-s3, mlflow_secret: ward-mlflow, kfp_api: 'https://kfp.example', "
    )
    found = boxes(tmp_path, more=more)
    assert {name for _, name, _ in given(found["aggregate"][1])} == {
        "ward-terms",
        "ward-keys",
        "ward-s3",
        "ward-mlflow",
        "silotune-store",
        "silotune-ca",
        "scratch",
    }
    assert environment(found["export"][0])["SILOTUNE_KFP_API"] == "https://kfp.example"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("memory: 1.5Gi, ", "coordinator.memory: KFP wants a whole number"),
        ("cpu: 2Gi, ", "coordinator.cpu: KFP wants 4 or 500m"),
        ("claims: [{claim: c, mount: /c, read_only: true}]", "coordinator: claims must not be read_only"),
        ("kfp_api: 'http://me:word@kfp', ", "coordinator.kfp_api: must be an address of http:// or https://"),
        ("gpus: 1, ", "coordinator.gpus: unknown key"),
    ],
)
def test_what_the_coordinator_cannot_have_is_refused_by_its_name(tmp_path: Path, more: str, told: str) -> None:
    with pytest.raises(FederationError) as refused:
        boxes(tmp_path, more=more)
    assert told in str(refused.value)
