"""A silo's folder builds, and grants what its README says and no more."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes.utils.quantity import parse_quantity

from silotune.components.cluster import job_manifest, train_job
from silotune.components.errors import FederationError
from silotune.components.federation import Federation
from silotune.components.steward.policy import Policy
from silotune.pipelines.membership import onboarding
from silotune.pipelines.membership.bucket_policies import silo_policy

sys.path.append(str(Path(__file__).parents[2] / "fakes"))
from kubernetes_api import jobset_job, schema_error
from three_hospitals import FILE, KEYS
from three_hospitals import load as load_hospitals


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"onboarding_{name}", Path(__file__).parents[2] / "k8s" / f"{name}.py")
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rules, reach, admission, shared = (_load(name) for name in ("rules", "reach", "admission", "conftest"))
build, job = shared.build, shared.job  # fixtures
load = load_hospitals
IMAGE = "registry.example/silotune-silo@sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


@pytest.fixture
def onboard(load: Callable[..., Federation], tmp_path: Path) -> Callable[..., Path]:
    def write(silo: str = "north", placement: dict[str, Any] | None = None, **more: Any) -> Path:
        folder = tmp_path / "folder" / silo
        place = f"    placement: {json.dumps({'namespace': 'silotune-north', 'image': IMAGE} | placement)}\n" if placement else ""
        given: dict[str, Any] = {"images": [IMAGE], "store_cidrs": ["10.20.0.0/28"], "endpoint": "https://s3.example"}
        federation = load("    storage: /silo/north\n", f"    storage: /silo/north\n{place}")
        files = onboarding.write_silo(federation, silo, folder, **(given | more))
        assert set(files) == {f for f in folder.rglob("*") if f.is_file()}
        return folder

    return write


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gpu": {"gpus": 2},
    "own-cluster": {"own_cluster": True},
    "bare": {"store_cidrs": [], "endpoint": ""},
    "several": {"gpus": 16, "placement": {"nodes": 2, "gpus": 8, "priority_class": "research"}},
    "trainjob": {"gpus": 16, "placement": {"nodes": 2, "gpus": 8, "trainer": "trainjob"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_builds_and_keeps_to_every_rule(onboard: Callable[..., Path], build: Any, variant: str) -> None:
    objects = build(onboard(**VARIANTS[variant]))
    for o in objects:
        if o["kind"] == "TrainingRuntime":
            assert schema_error(o, "trainingruntime") == ""
        else:
            kubernetes_validate.validate(o, "1.34", strict=True)
    assert all(o["automountServiceAccountToken"] is False for o in objects if o["kind"] == "ServiceAccount")
    assert rules.broken(objects) == []
    assert {o["metadata"].get("namespace", "silotune-north") for o in objects} == {"silotune-north"}


def test_the_production_example_is_what_onboarding_writes(onboard: Callable[..., Path], build: Any) -> None:
    def told(objects: list[Any]) -> dict[tuple[str, str], Any]:
        return {(o["kind"], o["metadata"]["name"]): o for o in objects if o["kind"] != "PersistentVolumeClaim"}

    written = told(build(onboard(gpus=1, endpoint="https://s3.storage.example")))
    assert written.pop(("ConfigMap", "silotune-federation"))
    example = told(build(onboarding.MANIFESTS / "overlays" / "example-production" / "silo-north"))
    example["ConfigMap", "silotune-job-terms"]["data"]["maxSeconds"] = str(1800 + onboarding.MARGIN)
    assert written == example


def test_the_probe_of_the_network_is_a_pod_like_any_job(onboard: Callable[..., Path], build: Any, job: Any) -> None:
    folder = onboard()
    probe = yaml.safe_load((folder / "probe.yaml").read_text())
    kubernetes_validate.validate(probe, "1.34", strict=True)
    assert rules.broken([*build(folder), probe]) == []
    assert probe["metadata"]["labels"] == job["spec"]["template"]["metadata"]["labels"]
    assert "probe.yaml" not in yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]


def test_the_silos_own_people_can_read_its_logs(onboard: Callable[..., Path], build: Any, tmp_path: Path) -> None:
    folder = onboard()
    pod = yaml.safe_load((folder / "logs.yaml").read_text())
    kubernetes_validate.validate(pod, "1.34", strict=True)
    assert rules.broken([*build(folder), pod]) == []
    assert not any(flow.get("spec", {}).get("podSelector", {}).get("matchLabels", {}).items() <= pod["metadata"]["labels"].items()
                   for flow in build(folder) if flow["kind"] == "NetworkPolicy" and flow["metadata"]["name"] != "default-deny")  # fmt: skip
    (container,) = pod["spec"]["containers"]
    (mount,) = container["volumeMounts"]
    *command, script, logs = container["command"]
    assert (container["image"], mount["readOnly"], command, logs) == (IMAGE, True, ["python", "-c"], "/silo/north/trial/logs")

    for age, (name, count) in enumerate([("train", 300), ("preprocess", 1)]):
        log = tmp_path / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        log.write_text("".join(f"{name} {i}\n" for i in range(count)))
        os.utime(log, (1000 - age, 1000 - age))
    said = subprocess.run([sys.executable, "-c", script, str(tmp_path / "logs")], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["--- preprocess.log", "preprocess 0", "--- train.log", *(f"train {i}" for i in range(100, 300))]


def test_its_policy_admits_the_launchers_job_and_not_anothers(onboard: Callable[..., Path], build: Any, job: Any) -> None:
    for silo, refused in (("north", []), ("south", ["args"])):
        objects = build(onboard(silo))
        (policy,) = (o for o in objects if o["kind"] == "ValidatingAdmissionPolicy")
        (terms,) = (o for o in objects if o["metadata"]["name"] == "silotune-job-terms")
        assert policy["metadata"]["name"] == f"silotune-jobs-{silo}"
        assert admission.refusals(policy, terms, job) == refused
    job["spec"]["activeDeadlineSeconds"] = 1800 + onboarding.MARGIN + 1
    assert "deadline" in admission.refusals(policy, terms, job)


PLACEMENTS: dict[str, dict[str, Any]] = {
    "nodes": {
        "node_selector": {"pool": "silo", "topology.kubernetes.io/zone": "a"}, "tolerations": [{"key": "silo", "effect": "NoSchedule"}],
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}},
    },
    "devices": {"gpus": 2, "gpu_type": "amd.com/gpu", "runtime_class": "kata"},
    "large": {"cpu": "64", "memory": "256Gi", "nodes": 2, "gpus": 8, "priority_class": "research"},
    "claims": {"claims": [{"claim": "silotune-silo", "mount": "/silo"}, {"claim": "models", "mount": "/models", "read_only": True}]},
}  # fmt: skip


@pytest.mark.parametrize("name", PLACEMENTS)
def test_what_the_launcher_makes_of_a_placement_is_admitted_by_the_folder_and_has_room(
    onboard: Callable[..., Path], build: Any, tmp_path: Path, name: str
) -> None:
    objects = build(onboard(placement=PLACEMENTS[name]))
    policy, terms = one(objects, "ValidatingAdmissionPolicy", "silotune-jobs-north"), one(objects, "ConfigMap", "silotune-job-terms")
    hard, limits = (one(objects, kind, "silotune")["spec"] for kind in ("ResourceQuota", "LimitRange"))
    federation = Federation.load(tmp_path / "f.yaml")
    for box, turn in (("preprocess", ""), ("train", "round:1 attempt:1"), ("evaluate", "round:1 attempt:1")):
        made = job_manifest.job_of(federation, "north", box, turn, 1_790_000_000)
        assert admission.refusals(policy, terms, made) == []
        asked, pods = made["spec"]["template"]["spec"]["containers"][0]["resources"], made["spec"]["parallelism"]
        for what in ("cpu", "memory"):
            need = parse_quantity(asked["requests"].get(what, "0"))
            assert need <= parse_quantity(limits["limits"][0]["max"][what])
            assert need * pods <= parse_quantity(hard["hard"][f"requests.{what}"])
        for device, count in asked["limits"].items():
            if "/" in device:
                assert int(count) * pods <= int(hard["hard"][f"requests.{device}"])
    kinds = ("node_selector", "tolerations", "affinity", "gpu_type", "runtime_class", "claims")
    for field in (f for f in kinds if f in PLACEMENTS[name]):
        bare = {"data": {k: v for k, v in terms["data"].items() if not k.startswith(TERMS[field])}}
        assert admission.refusals(policy, bare, job_manifest.job_of(federation, "north", "train", "round:1 attempt:1")) != []


TERMS = {
    "node_selector": "node-", "tolerations": "toleration-", "affinity": "affinity", "gpu_type": "gpuType", "runtime_class": "runtimeClass",
    "claims": "claim-",
}  # fmt: skip


@pytest.mark.parametrize(
    ("placement", "problem"),
    [
        ({"service_account": "trainer"}, "service_account: must be silotune-silo"),
        ({"config_map": "terms"}, "config_map: must be silotune-federation"),
        ({"secrets": [{"name": "mine", "mount": "/keys"}]}, "secrets: must be silotune-keys and silotune-s3"),
        ({"claims": [{"claim": "archive", "mount": "/archive"}]}, "claims: must have silotune-silo at /silo"),
        ({"claims": [{"claim": "silotune-silo", "mount": "/silo"}, {"claim": "x", "mount": "/usr/lib"}]}, "claims: must be mounted where"),
    ],
)
def test_a_placement_whose_jobs_no_silo_would_admit_is_refused(
    onboard: Callable[..., Path], tmp_path: Path, placement: dict[str, Any], problem: str
) -> None:
    with pytest.raises(FederationError, match=re.escape(f"silos[0].placement.{problem}")):
        onboard(placement=placement)
    assert not (tmp_path / "folder").exists()


def test_the_jobs_of_the_examples_are_admitted_by_their_silos(build: Any) -> None:
    for overlay in ("kind", "example-production"):
        folder = onboarding.MANIFESTS / "overlays" / overlay
        federation = Federation.load(folder / "federation.yaml")
        for silo in (s for s in federation.silo_ids if (folder / f"silo-{s}").exists()):
            objects = build(folder / f"silo-{silo}")
            (policy,) = (o for o in objects if o["kind"] == "ValidatingAdmissionPolicy")
            made = job_manifest.job_of(federation, silo, "train", "round:1 attempt:1", 1_790_000_000)
            assert admission.refusals(policy, one(objects, "ConfigMap", "silotune-job-terms"), made) == []


def test_records_in_an_s3_of_the_silos_own_are_reached_with_a_secret_of_their_own(
    load: Callable[..., Federation], build: Any, tmp_path: Path
) -> None:
    federation = load("train: /silo/north/train.jsonl ", "train: s3://north-records/train.jsonl ")
    folder = tmp_path / "n"
    onboarding.write_silo(
        federation, "north", folder, images=[IMAGE], store_cidrs=["10.20.0.0/28"], endpoint="https://s3.example",
        own_endpoint="http://minio.north.example:9000", own_cidrs=["10.30.0.0/28"],
    )  # fmt: skip
    objects = build(folder)
    network, pod = reach.Network(objects), reach.End("silotune-north", {"app.kubernetes.io/component": "silo-job"})
    reached = {
        (a, p)
        for a in ("10.20.0.3", "10.30.0.3", "169.254.169.254")
        for p in (80, 443, 9000)
        if network.reaches(pod, reach.End(address=a), p)
    }
    assert reached == {("10.20.0.3", 443), ("10.30.0.3", 9000)}
    store = one(objects, "ConfigMap", "silotune-store")["data"]
    assert store == {"AWS_ENDPOINT_URL": "https://s3.example", "SILO_AWS_ENDPOINT_URL": "http://minio.north.example:9000"}
    assert "silotune-own-s3 --from-file=AWS_ACCESS_KEY_ID" in (folder / "README.md").read_text()


def one(objects: list[Any], kind: str, name: str) -> Any:
    (found,) = (o for o in objects if (o["kind"], o["metadata"]["name"]) == (kind, name))
    return found


def test_a_folder_for_several_nodes_admits_them_and_has_room_for_them(
    onboard: Callable[..., Path], load: Callable[..., Federation], build: Any, tmp_path: Path
) -> None:
    folder = onboard(**VARIANTS["several"], priority_classes=["night"])
    objects = build(folder)
    terms = one(objects, "ConfigMap", "silotune-job-terms")
    assert {k: v for k, v in terms["data"].items() if k.startswith(("maxN", "maxG", "prio"))} == {
        "maxNodes": "2", "maxGpus": "16", "priorityClass-1": "night", "priorityClass-2": "research",
    }  # fmt: skip
    made = job_manifest.job_of(Federation.load(tmp_path / "f.yaml"), "north", "train", "round:1 attempt:1", 1_790_000_000)
    assert admission.refusals(one(objects, "ValidatingAdmissionPolicy", "silotune-jobs-north"), terms, made) == []
    assert one(objects, "PersistentVolumeClaim", "silotune-silo")["spec"]["accessModes"] == ["ReadWriteMany"]
    hard = one(objects, "ResourceQuota", "silotune")["spec"]["hard"]
    assert (hard["pods"], hard["requests.nvidia.com/gpu"], hard["limits.memory"]) == ("4", "16", "128Gi")
    assert "`ReadWriteMany`" in (folder / "README.md").read_text()


def test_a_folder_for_trainjobs_has_a_runtime_of_its_own_and_admits_what_becomes_of_it(
    onboard: Callable[..., Path], build: Any, tmp_path: Path
) -> None:
    jobset = "system:serviceaccount:jobset-system:jobset-controller-manager"
    folder = onboard(**VARIANTS["trainjob"], jobset=jobset)
    objects = build(folder)
    terms, runtime = one(objects, "ConfigMap", "silotune-job-terms"), one(objects, "TrainingRuntime", "silotune")
    pod = rules.pod_of(runtime)
    assert (pod["containers"][0]["image"], pod["runtimeClassName"]) == (IMAGE, "silotune-gpu")
    made = train_job.train_job_of(Federation.load(tmp_path / "f.yaml"), "north", "train", "round:1 attempt:1", 1_790_000_000)
    assert admission.refusals(one(objects, "ValidatingAdmissionPolicy", "silotune-trainjobs-north"), terms, made) == []
    policy = one(objects, "ValidatingAdmissionPolicy", "silotune-jobs-north")
    assert admission.refusals(policy, terms, jobset_job(made, runtime), jobset) == []
    assert admission.refusals(policy, terms, jobset_job(made, runtime)) != []
    granted = {r for rule in one(objects, "Role", "silotune-launcher")["rules"] for r in rule["resources"]}
    assert granted == {"jobs", "trainjobs"}
    assert one(objects, "ResourceQuota", "silotune")["spec"]["hard"]["services"] == "20"
    text = (folder / "README.md").read_text()
    assert "*TrainJobs*" in text
    assert "silotune-trainjobs-north" in text
    assert "*TrainJob" not in (onboard("south") / "README.md").read_text()


def test_its_jobs_reach_the_store_it_was_told_of(onboard: Callable[..., Path], build: Any) -> None:
    labels = {"app.kubernetes.io/component": "silo-job"}
    network = reach.Network(build(onboard(endpoint="http://store.example:8333", store_cidrs=["10.20.0.0/28", "fd00::/64"])))
    pod = reach.End("silotune-north", labels)
    for address in ("10.20.0.3", "fd00::7"):
        assert network.reaches(pod, reach.End(address=address), 8333)
        assert not network.reaches(pod, reach.End(address=address), 443)
    assert not network.reaches(pod, reach.End(address="10.20.1.3"), 8333)


@pytest.mark.parametrize(
    ("more", "subject"),
    [
        ({}, "silotune/silotune-launcher"),
        ({"launcher": "team/runner"}, "team/runner"),
        ({"own_cluster": True}, "silotune-north/silotune-launcher"),
    ],
)
def test_rights_go_to_the_account_that_is_named(onboard: Callable[..., Path], build: Any, more: dict[str, Any], subject: str) -> None:
    folder = onboard(**more)
    (binding,) = (o for o in build(folder) if o["kind"] == "RoleBinding")
    namespace, name = subject.split("/")
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": name, "namespace": namespace}]
    assert f"`system:serviceaccount:{namespace}:{name}`" in (folder / "README.md").read_text()


def test_the_command_hands_the_account_on(silotune: Callable[..., tuple[int, str, str]], build: Any, tmp_path: Path) -> None:
    """On a Kubeflow Pipelines that stands alone, tasks run in kubeflow."""
    (tmp_path / "f.yaml").write_text(FILE)
    words = (
        "onboard",
        tmp_path / "f.yaml",
        "north",
        "-o",
        tmp_path / "north",
        "--image",
        IMAGE,
        "--launcher",
        "kubeflow/silotune-launcher",
    )
    code, _, said = silotune(*words)
    assert code == 0, said
    (binding,) = (o for o in build(tmp_path / "north") if o["kind"] == "RoleBinding")
    assert binding["subjects"][0]["namespace"] == "kubeflow"


def test_the_terms_and_rights_in_the_folder_are_those_of_the_federation(onboard: Callable[..., Path], build: Any, tmp_path: Path) -> None:
    folder = onboard()
    assert (folder / "federation.yaml").read_text() == FILE
    (mounted,) = (o for o in build(folder) if o["metadata"]["name"] == "silotune-federation")
    assert mounted["data"] == {"federation.yaml": FILE, "policy.yaml": (folder / "policy.yaml").read_text()}
    policy = Policy.load(folder / "policy.yaml")
    assert policy.dataset == "north"
    assert policy.images == [IMAGE.rpartition("@")[2]]
    assert json.loads((folder / "iam-policy.json").read_text()) == silo_policy(Federation.load(tmp_path / "f.yaml"), "north", tls_only=True)
    for file in (folder / "base").iterdir():
        assert file.read_bytes() == (onboarding.MANIFESTS / "base" / "silo" / file.name).read_bytes(), (
            "what was reviewed is what is applied"
        )


def test_the_readme_says_what_is_granted_to_whom_and_how_to_revoke_it(onboard: Callable[..., Path]) -> None:
    text = (onboard() / "README.md").read_text()
    for word in (IMAGE, KEYS["coordinator"], KEYS["north"], "10.20.0.0/28", "kubectl delete -k .", "delete rolebinding silotune-launcher"):
        assert word in text
    assert KEYS["south"] not in text
    for secret in ("silotune-s3", "silotune-keys", "silotune-registry"):
        assert re.search(rf"- \[ \] .*{secret}", text)
    assert not re.search(r"[{}]", text), "a place was left unfilled"


def test_without_a_word_the_image_of_the_placement_is_the_one_that_may_run(onboard: Callable[..., Path], build: Any) -> None:
    admitted = [
        o["data"] for o in build(onboard(images=[], placement={"gpus": 0, "cpu": "1"})) if o["metadata"]["name"] == "silotune-job-terms"
    ]
    assert [{k: v for k, v in terms.items() if k.startswith("image-")} for terms in admitted] == [{"image-1": IMAGE}]


def test_a_list_that_would_refuse_every_job_of_the_file_is_refused(onboard: Callable[..., Path]) -> None:
    with pytest.raises(FederationError, match="one of the images that the silo admits"):
        onboard(images=[IMAGE[:-1] + "9"], placement={"cpu": "1"})


def test_what_is_left_to_do_is_told(onboard: Callable[..., Path], load: Callable[..., Federation], tmp_path: Path) -> None:
    assert "create token" not in (onboard() / "README.md").read_text()
    assert "create token" in (onboard("south", own_cluster=True) / "README.md").read_text()
    federation = load("{base: /silo/base}", "{base: org/model}  # ${HERE}")
    onboarding.write_silo(federation, "west", tmp_path / "w", images=[IMAGE])
    text = (tmp_path / "w" / "README.md").read_text()
    assert "`model.base` is `org/model`" in text
    assert "NetworkPolicy `jobs-to-store`" in text
    assert "`${NAME}`" in text


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"images": []}, "image: must name at least one"),
        ({"images": ["registry.example/silotune-silo:1.0"]}, "a tag can change its content"),
        ({"store_cidrs": ["0.0.0.0/0"]}, "must not be everywhere"),
        ({"store_cidrs": ["128.0.0.0/1"]}, "must not be everywhere"),
        ({"store_cidrs": ["::/1"]}, "must not be everywhere"),
        ({"store_cidrs": ["169.254.169.0/24"]}, "or of its cloud's metadata"),
        ({"own_cidrs": ["fd00:ec2::/64"]}, "address of the silo's own S3: must hold no address of the node"),
        ({"own_endpoint": "minio:9000"}, "own endpoint: must be http"),
        ({"store_cidrs": ["store.example"]}, "must be a range"),
        ({"endpoint": "store.example"}, "endpoint: must be http"),
        ({"launcher": "silotune-launcher"}, "launcher: must be namespace/service-account"),
        ({"storage": "much"}, "storage: must be a size"),
        ({"priority_classes": ["system-cluster-critical"]}, "priority class: must be a name"),
        ({"jobset": "jobset-controller-manager"}, "jobset: must be system:serviceaccount:"),
    ],
)
def test_an_argument_of_the_wrong_form_is_refused(onboard: Callable[..., Path], tmp_path: Path, more: dict[str, Any], problem: str) -> None:
    with pytest.raises(FederationError, match=re.escape(problem)):
        onboard(**more)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("train: /silo/north/train.jsonl ", "train: ./train.jsonl ", "silos[0].train: must lie in the silo's volume, under /silo"),
        ("    storage: /silo/north\n", "", "silos[0].storage: must lie in the silo's volume"),
        ("    storage: /silo/north\n", "    storage: s3://north/private\n", "silos[0].storage: must lie in the silo's volume"),
        ("storage: {root", "launcher: pod\nstorage: {root", "launcher: must be job, got 'pod'"),
        (FILE[FILE.index("security:") :], "", "security.keys: must name a key of every party"),
        ('"s3://bucket/team"', "/store", "storage.root: must be s3://bucket/prefix"),
    ],
)
def test_a_file_that_cannot_run_there_is_refused(load: Callable[..., Federation], tmp_path: Path, old: str, new: str, problem: str) -> None:
    with pytest.raises(FederationError, match=re.escape(problem)):
        onboarding.write_silo(load(old, new), "north", tmp_path / "folder", images=[IMAGE])
    assert not (tmp_path / "folder").exists()


def test_a_folder_that_holds_something_is_left_alone(onboard: Callable[..., Path]) -> None:
    folder = onboard()
    (folder / "federation.yaml").write_text("of the silo")
    with pytest.raises(FederationError, match="must be an empty folder"):
        onboard()
    assert (folder / "federation.yaml").read_text() == "of the silo"
