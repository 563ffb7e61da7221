"""The doctor: each check against a real S3 server (moto), a strict Kubeflow API, and answers of Kubernetes, MLflow and the hub over loopback."""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import kfp_api
import pytest
from moto.server import ThreadedMotoServer
from rich.console import Console

from silotune.components import keys
from silotune.components.federation import Federation
from silotune.components.rounds import Rounds
from silotune.components.store.s3_store import S3Store
from silotune.pipelines.diagnosis import doctor, federation_store, kubernetes_view
from silotune.pipelines.diagnosis.doctor import Finding

IMAGE = "registry.example/silotune-silo@sha256:" + "a" * 64
COORDINATOR_IMAGE = "registry.example/silotune-coordinator@sha256:" + "b" * 64
SILO = """
  - id: {0}
    train: /silo/train.jsonl
    storage: /silo/storage-{0}
    placement: {{namespace: silotune-{0}, image: "{1}", gpus: 1, node_selector: {{pool: gpu}}, tolerations: [{{key: gpu}}]}}"""
FILE = f"""
name: ward
coordinator_image: "{COORDINATOR_IMAGE}"
model: {{base: s3://models/base}}
silos:{SILO.format("north", IMAGE)}{SILO.format("south", IMAGE)}
storage: {{root: s3://store/federations}}
tracking: {{uri: MLFLOW}}
security: {{keys: KEYS}}
"""
NODE = {
    "metadata": {"name": "n1", "labels": {"pool": "gpu"}},
    "spec": {"taints": [{"key": "gpu", "effect": "NoSchedule"}]},
    "status": {"allocatable": {"nvidia.com/gpu": "4"}, "conditions": [{"type": "Ready", "status": "True"}]},
}


class Answers:
    """Path -> (status, JSON); anything else is 404. What was asked is in ``asked``, as (path, headers)."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[int, Any]] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        answers = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                answers.asked.append((self.path, dict(self.headers)))
                status, body = answers.known.get(self.path, (404, {"kind": "Status", "code": 404}))
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_HEAD(self) -> None:
                answers.asked.append((self.path, dict(self.headers)))
                self.send_response(answers.known.get(self.path, (404, None))[0])
                self.end_headers()

            def do_POST(self) -> None:
                self.do_GET()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def answers() -> Iterator[Answers]:
    """MLflow, the hub, a registry of images and a cluster on which all that both silos need stands."""
    found = Answers()
    found.known["/api/2.0/mlflow/experiments/search"] = (200, {})
    found.known["/api/v1/nodes"] = (200, {"items": [NODE]})
    for image in (IMAGE, COORDINATOR_IMAGE):
        found.known[f"/v2/{image.partition('/')[2].replace('@', '/manifests/')}"] = (200, None)
    for silo in ("north", "south"):
        at = f"/api/v1/namespaces/silotune-{silo}"
        found.known |= {
            at: (200, {"status": {"phase": "Active"}}),
            f"{at}/serviceaccounts/silotune-silo": (200, {"imagePullSecrets": [{"name": "silotune-registry"}]}),
            f"{at}/persistentvolumeclaims/silotune-silo": (200, {"status": {"phase": "Bound"}}),
            f"{at}/resourcequotas": (
                200,
                {"items": [{"status": {"hard": {"requests.nvidia.com/gpu": "2", "pods": "3"}, "used": {"pods": "1"}}}]},
            ),
        }
        for name in ("silotune-keys", "silotune-s3", "silotune-registry"):
            found.known[f"{at}/secrets/{name}"] = (200, {"kind": "PartialObjectMetadata"})
    at = "/api/v1/namespaces/kubeflow"
    found.known[f"{at}/configmaps/silotune-store"] = (200, {"data": {"AWS_ENDPOINT_URL": "https://store.example"}})
    for name in ("silotune-keys", "silotune-s3", "silotune-mlflow"):
        found.known[f"{at}/secrets/{name}"] = (200, {"kind": "PartialObjectMetadata"})
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, s3: str) -> Any:
    """Credentials and addresses of the test's own servers, and nothing of this machine's."""
    for name in [
        n
        for n in os.environ
        if n.upper().endswith(("_PROXY", "_CERT", "_BUNDLE", "_CERT_FILE")) or n.startswith(("KFP_", "MLFLOW_", "HF_"))
    ]:
        monkeypatch.delenv(name)
    for name in ("KUBERNETES_SERVICE_HOST", "KF_PIPELINES_ENDPOINT", "SILOTUNE_KEYS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "ACCESS_KEY_ID": "AKIDEXAMPLE",
        "SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
        "DEFAULT_REGION": "us-east-1",
        "ENDPOINT_URL": s3,
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr("kfp.Client._LOCAL_KFP_CONTEXT", str(tmp_path / "no-context.json"))
    client = boto3.client("s3")
    for bucket in ("store", "models"):
        client.create_bucket(Bucket=bucket)
    for name in ("config.json", "model.safetensors"):
        client.put_object(Bucket="models", Key=f"base/{name}", Body=b"{}")
    yield client
    for bucket in ("store", "models"):
        for item in client.list_objects_v2(Bucket=bucket).get("Contents", []):
            client.delete_object(Bucket=bucket, Key=item["Key"])
        client.delete_bucket(Bucket=bucket)


@pytest.fixture
def public(tmp_path: Path) -> dict[str, str]:
    """Public keys; the coordinator's private one lies where it belongs."""
    return {p: keys.new(tmp_path / (".silotune/keys" if p == "coordinator" else p), p) for p in ("coordinator", "north", "south")}


@pytest.fixture
def make(tmp_path: Path, public: dict[str, str], answers: Answers) -> Callable[..., Federation]:
    """The federation, with texts replaced; its config maps hold the same file."""

    def load(*changes: tuple[str, str]) -> Federation:
        text = FILE.replace("MLFLOW", answers.url).replace("KEYS", json.dumps(public))
        text = text.replace("registry.example", answers.url.removeprefix("http://"))
        for namespace in ("silotune-north", "silotune-south", "kubeflow"):
            path = f"/api/v1/namespaces/{namespace}/configmaps/silotune-federation"
            answers.known.setdefault(path, (200, {"data": {"federation.yaml": text}}))
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "ward.yaml").write_text(text)
        return Federation.load(tmp_path / "ward.yaml")

    return load


@contextmanager
def kubernetes(url: str) -> Iterator[Any]:
    from kubernetes import client

    settings = client.Configuration()
    settings.host = url
    with client.ApiClient(settings) as api:
        yield api


def look(federation: Federation, answers: Answers, check: str = "") -> list[Finding]:
    """Findings about the silos; of one check, all levels."""
    with kubernetes(answers.url) as api:
        found = list(doctor.silos(federation, api, None))
    return [f for f in found if check in f.what]


def levels(findings: Iterator[Finding] | list[Finding]) -> list[str]:
    return [f.level for f in findings]


def test_a_federation_that_has_all_it_needs_is_well(make: Callable[..., Federation], answers: Answers, surroundings: Any) -> None:
    surroundings.put_bucket_encryption(
        Bucket="store", ServerSideEncryptionConfiguration={"Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}]}
    )
    with kfp_api.KfpApi() as kfp, kubernetes(answers.url) as api:
        found = doctor.examine(make(), endpoint=kfp.url, kubernetes=api)
    assert [f for f in found if f.level != "ok"] == []
    assert doctor.exit_code(found) == 0
    assert {
        "federation",
        "affinity map",
        "images",
        "keys",
        "store",
        "clock",
        "encryption",
        "base model",
        "mlflow",
        "kubeflow",
        "north",
        "south",
        "coordinator",
    } <= {f.name for f in found}
    assert any("2.17.0" in f.what for f in found)


def test_no_secret_is_read_whole(make: Callable[..., Federation], answers: Answers) -> None:
    look(make(), answers)
    accepted = {headers["Accept"] for path, headers in answers.asked if "/secrets/" in path}
    assert accepted == {kubernetes_view.METADATA}


def test_every_check_runs_whatever_the_others_find(make: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("KUBECONFIG", "/no/such/config")
    found = doctor.examine(make(), endpoint="http://127.0.0.1:9")
    failed = {f.name: f.code for f in found if f.level == "fail"}
    assert failed == {"store": 5, "clock": 5, "encryption": 5, "base model": 5, "kubeflow": 5, "kubernetes": 5}
    assert doctor.exit_code(found) == 5
    assert doctor.exit_code([*found, doctor.fail("x", "wrong", "correct it")]) == 2
    assert "wJalrXUtnFEMI" not in str(found)


# Where the coordinator's tasks run


def look_at_tasks(federation: Federation, answers: Answers, namespace: str | None = None) -> list[Finding]:
    with kubernetes(answers.url) as api:
        return list(doctor.tasks(federation, api, namespace))


@pytest.mark.parametrize(
    ("path", "told", "cure"),
    [
        ("configmaps/silotune-federation", "config map silotune-federation does not exist", "--from-file=federation.yaml=ward.yaml"),
        ("configmaps/silotune-store", "config map silotune-store does not exist", "right where it is there"),
        ("secrets/silotune-s3", "secret silotune-s3 does not exist", "--from-file=AWS_SECRET_ACCESS_KEY"),
        ("secrets/silotune-keys", "secret silotune-keys does not exist", "--from-file=coordinator.pem"),
        ("secrets/silotune-mlflow", "secret silotune-mlflow does not exist", "right where MLflow asks nobody"),
    ],
)
def test_what_the_coordinators_tasks_miss_is_a_warning_by_its_name(
    make: Callable[..., Federation], answers: Answers, path: str, told: str, cure: str
) -> None:
    federation = make()
    assert levels(look_at_tasks(federation, answers)) == ["ok"] * 5
    del answers.known[f"/api/v1/namespaces/kubeflow/{path}"]
    (missing,) = [f for f in look_at_tasks(federation, answers) if f.level != "ok"]
    assert (missing.name, missing.level) == ("coordinator", "warn")
    assert told in missing.what
    assert "kubeflow" in missing.what
    assert cure in missing.cure


def test_they_are_looked_for_under_the_names_that_the_file_gives_and_where_the_profile_is(
    make: Callable[..., Federation], answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "{config_map: w-terms, s3_secret: w-s3, keys_secret: w-keys, claims: [{claim: w-models, mount: /models}]}"
    federation = make(("tracking: {uri: " + answers.url + "}", "tracking: {uri: none}\ncoordinator: " + names))
    monkeypatch.setenv("KFP_NAMESPACE", "ward-profile")
    found = look_at_tasks(federation, answers)
    assert levels(found) == ["warn"] * 5
    asked = {path for path, _ in answers.asked if "ward-profile" in path}
    places = {"configmaps/w-terms", "configmaps/silotune-store", "secrets/w-s3", "secrets/w-keys", "persistentvolumeclaims/w-models"}
    assert asked == {f"/api/v1/namespaces/ward-profile/{place}" for place in places}
    assert "volume claim w-models does not exist in namespace ward-profile" in found[-1].what


@pytest.mark.parametrize(("phase", "level"), [("Bound", "ok"), ("Pending", "warn"), ("Lost", "warn")])
def test_a_claim_of_the_coordinators_is_told_by_its_state(
    make: Callable[..., Federation], answers: Answers, phase: str, level: str
) -> None:
    federation = make(("storage: {", "coordinator: {claims: [{claim: models, mount: /models}]}\nstorage: {"))
    answers.known["/api/v1/namespaces/kubeflow/persistentvolumeclaims/models"] = (200, {"status": {"phase": phase}})
    (claim,) = [f for f in look_at_tasks(federation, answers) if "models" in f.what]
    assert claim.level == level
    assert ("is bound" if phase == "Bound" else phase.lower()) in claim.what


def test_the_coordinators_own_copy_with_other_terms_fails(make: Callable[..., Federation], answers: Answers) -> None:
    path = "/api/v1/namespaces/kubeflow/configmaps/silotune-federation"
    text = make().file.read_text()
    answers.known[path] = (200, {"data": {"federation.yaml": text + "training: {steps: 9}\n"}})
    (other,) = [f for f in look_at_tasks(make(), answers) if f.level == "fail"]
    assert "config map silotune-federation has other terms: training" in other.what


def test_no_secret_of_the_coordinators_is_read_whole(make: Callable[..., Federation], answers: Answers) -> None:
    look_at_tasks(make(), answers)
    accepted = {headers["Accept"] for path, headers in answers.asked if "/secrets/" in path}
    assert accepted == {kubernetes_view.METADATA}


def test_what_the_account_may_not_see_there_is_a_warning_that_names_the_right(make: Callable[..., Federation], answers: Answers) -> None:
    federation = make()
    for name in ("silotune-s3", "silotune-keys", "silotune-mlflow"):
        answers.known[f"/api/v1/namespaces/kubeflow/secrets/{name}"] = (403, {"kind": "Status", "code": 403})
    (unseen,) = [f for f in look_at_tasks(federation, answers) if f.level != "ok"]
    assert unseen.level == "warn"
    assert "secrets: not seen, for lack of the right to get secrets in namespace kubeflow" in unseen.what


# Each silo


@pytest.mark.parametrize(
    ("path", "body", "level", "told"),
    [
        ("", None, "fail", "namespace silotune-north does not exist"),
        ("", {"status": {"phase": "Terminating"}}, "fail", "is being deleted"),
        ("/serviceaccounts/silotune-silo", None, "fail", "service account silotune-silo does not exist"),
        ("/secrets/silotune-registry", None, "fail", "image pull secret silotune-registry"),
        ("/secrets/silotune-keys", None, "fail", "secret silotune-keys does not exist"),
        ("/persistentvolumeclaims/silotune-silo", None, "fail", "volume claim silotune-silo does not exist"),
        ("/persistentvolumeclaims/silotune-silo", {"status": {"phase": "Lost"}}, "fail", "has lost its volume"),
        ("/persistentvolumeclaims/silotune-silo", {"status": {"phase": "Pending"}}, "warn", "is pending"),
        ("/configmaps/silotune-federation", None, "fail", "config map silotune-federation does not exist"),
        ("/configmaps/silotune-federation", {"data": {}}, "fail", "has no key federation.yaml"),
        ("/configmaps/silotune-federation", {"data": {"federation.yaml": "name: ward"}}, "fail", "its federation.yaml is wrong: model: is required"),
        ("/resourcequotas", {"items": [{"spec": {"hard": {"requests.nvidia.com/gpu": "0"}}}]}, "fail", "requests.nvidia.com/gpu: 1 needed, 0 of 0 used"),
        ("/resourcequotas", {"items": [{"status": {"hard": {"limits.memory": "8Gi"}, "used": {"limits.memory": "6Gi"}}}]}, "fail", "limits.memory"),
        ("/resourcequotas", {"items": []}, "ok", "has no quota"),
    ],
)  # fmt: skip
def test_what_a_silo_lacks_is_told_with_its_name(
    make: Callable[..., Federation], answers: Answers, path: str, body: Any, level: str, told: str
) -> None:
    federation = make()
    answers.known[f"/api/v1/namespaces/silotune-north{path}"] = (200, body) if body is not None else (404, {})
    (found,) = look(federation, answers, told)
    assert (found.name, found.level) == ("north", level)
    assert found.cure or level == "ok"
    assert all(f.level == "ok" for f in look(federation, answers) if f.name == "south")


def test_what_several_nodes_need_is_asked_for(make: Callable[..., Federation], answers: Answers) -> None:
    federation = make(("gpus: 1, ", "gpus: 2, nodes: 3, "))
    claims, quotas = (f"/api/v1/namespaces/silotune-north/{what}" for what in ("persistentvolumeclaims/silotune-silo", "resourcequotas"))
    answers.known[claims] = (200, {"spec": {"accessModes": ["ReadWriteOnce"]}, "status": {"phase": "Bound"}})
    (found,) = (f for f in look(federation, answers, "access mode") if f.name == "north")
    assert (found.level, found.what) == ("fail", "volume claim silotune-silo has access mode ReadWriteOnce, and 3 nodes share it")
    answers.known[claims] = (200, {"spec": {"accessModes": ["ReadWriteMany"]}, "status": {"phase": "Bound"}})
    hard = {"pods": "3", "requests.nvidia.com/gpu": "5", "limits.memory": "12Gi", "count/jobs.batch": "1"}
    answers.known[quotas] = (200, {"items": [{"status": {"hard": hard}}]})
    mine = [f for f in look(federation, answers) if f.name == "north"]
    (short,) = (f.what for f in mine if f.level == "fail")
    assert short.endswith("has no room: requests.nvidia.com/gpu: 2 for each of 3 pods needed, 0 of 5 used")


def test_a_silos_copy_with_other_terms_is_found_out(make: Callable[..., Federation], answers: Answers) -> None:
    make()
    federation = make(("tracking:", "training: {steps: 9, learning_rate: 0.5}\ntracking:"))
    assert [f.what.partition("terms: ")[2] for f in look(federation, answers, "other terms")] == [
        "training.learning_rate, training.steps"
    ] * 2


@pytest.mark.parametrize(
    ("change", "level"),
    [
        ({}, "ok"),
        ({"metadata": {"name": "n1", "labels": {"pool": "cpu"}}}, "fail"),
        ({"spec": {"taints": [{"key": "gpu", "effect": "NoSchedule"}, {"key": "maintenance", "effect": "NoExecute"}]}}, "fail"),
        ({"spec": {"taints": [{"key": "busy", "effect": "PreferNoSchedule"}]}}, "ok"),
        ({"status": NODE["status"] | {"allocatable": {"nvidia.com/gpu": "0"}}}, "fail"),
        ({"status": NODE["status"] | {"conditions": [{"type": "Ready", "status": "False"}]}}, "fail"),
    ],
)
def test_a_node_counts_if_it_is_ready_chosen_tolerated_and_has_the_gpus(
    make: Callable[..., Federation], answers: Answers, change: dict[str, Any], level: str
) -> None:
    answers.known["/api/v1/nodes"] = (200, {"items": [NODE | change]})
    assert levels(look(make(), answers, "nodes")) == [level] * 2


@pytest.mark.parametrize(
    ("path", "right"),
    [
        ("/api/v1/namespaces/silotune-north", "get namespaces in namespace silotune-north"),
        ("/api/v1/namespaces/silotune-north/secrets/silotune-keys", "get secrets in namespace silotune-north"),
        ("/api/v1/namespaces/silotune-north/configmaps/silotune-federation", "get configmaps in namespace silotune-north"),
        ("/api/v1/namespaces/silotune-north/resourcequotas", "list resourcequotas in namespace silotune-north"),
        ("/api/v1/nodes", "list nodes"),
    ],
)
def test_what_may_not_be_seen_is_a_warning_that_names_the_right(
    make: Callable[..., Federation], answers: Answers, path: str, right: str
) -> None:
    federation = make()
    answers.known[path] = (403, {"kind": "Status", "code": 403})
    warned = [f for f in look(federation, answers) if f.level != "ok"]
    assert {f.level for f in warned} == {"warn"}
    assert all(right in f.what for f in warned)
    assert doctor.exit_code(warned) == 0


def test_a_silo_with_a_cluster_of_its_own_is_left_to_its_people(make: Callable[..., Federation], answers: Answers) -> None:
    federation = make(("namespace: silotune-south", "kubeconfig_secret: south-cluster, namespace: silotune-south"))
    (south,) = [f for f in look(federation, answers) if f.name == "south"]
    assert (south.level, "not looked at" in south.what) == ("warn", True)
    assert not any("silotune-south" in path for path, _ in answers.asked)


# The file


def test_what_cannot_run_on_a_cluster_fails_line_by_line(make: Callable[..., Federation]) -> None:
    found = list(doctor.fit(make(("silotune-silo@sha256:" + "a" * 64, "image:tag"), ("/silo/storage-north", "./private"))))
    assert levels(found) == ["fail"] * 3
    assert all(f.what for f in found)
    assert doctor.exit_code(found) == 2


@pytest.mark.parametrize(
    ("status", "level", "told"), [(200, "ok", "is in its registry"), (404, "fail", "no such image"), (403, "warn", "does not show it")]
)
def test_an_image_is_asked_for_in_its_registry(
    make: Callable[..., Federation], answers: Answers, status: int, level: str, told: str
) -> None:
    answers.known[f"/v2/silotune-silo/manifests/sha256:{'a' * 64}"] = (status, None)
    ours, theirs = doctor.images(make())
    assert (ours.level, theirs.level) == ("ok", level)
    assert told in theirs.what


def test_an_image_whose_registry_is_away_is_a_warning_and_one_by_tag_is_told_elsewhere(
    make: Callable[..., Federation], answers: Answers
) -> None:
    host = answers.url.removeprefix("http://")
    away = make((f"{host}/silotune-silo", "127.0.0.1:9/silotune-silo"), (f"{host}/silotune-coordinator@sha256:{'b' * 64}", "c:latest"))
    (found,) = doctor.images(away)
    assert (found.level, "127.0.0.1:9 cannot be asked from here" in found.what) == ("warn", True)


def test_a_coordinators_key_must_be_there_registered_and_its_own(
    make: Callable[..., Federation], tmp_path: Path, public: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    federation, file = make(), tmp_path / ".silotune" / "keys" / "coordinator.pem"
    assert levels(doctor.registered_keys(federation)) == ["ok", "ok"]
    file.chmod(0o644)
    assert "warn" in levels(doctor.registered_keys(federation))
    monkeypatch.setenv("SILOTUNE_KEYS", str(tmp_path / "nowhere"))
    assert levels(doctor.registered_keys(federation)) == ["warn", "ok"]
    keys.new(tmp_path / "other", "coordinator")
    monkeypatch.setenv("SILOTUNE_KEYS", str(tmp_path / "other"))
    assert levels(doctor.registered_keys(federation)) == ["fail", "ok"]
    unsigned = make(("security: {", "security: {signing: false, "))
    assert levels(doctor.registered_keys(unsigned)) == ["fail"]


# The store, the base, MLflow, this machine


def test_a_bucket_that_is_missing_fails_without_the_credentials(make: Callable[..., Federation], answers: Answers) -> None:
    with kubernetes(answers.url) as api:
        found = doctor.examine(make(("s3://store/", "s3://nowhere/")), endpoint="http://127.0.0.1:9", kubernetes=api)
    (told,) = [f for f in found if f.name == "store"]
    assert (told.level, told.code) == ("fail", 5)


@pytest.mark.parametrize(("ahead", "level"), [(0, "ok"), (60, "warn"), (-60, "warn"), (1000, "fail"), (-1000, "fail")])
def test_a_clock_that_is_off_is_told_by_how_much(
    make: Callable[..., Federation], ahead: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(federation_store, "time", SimpleNamespace(time=lambda: time.time() + ahead))
    (found,) = federation_store.clock(make())
    assert found.level == level
    if ahead:
        seconds, _, where = found.what.partition(" s ")
        assert abs(int(seconds) - abs(ahead)) <= 2
        assert where.startswith("ahead of" if ahead > 0 else "behind")


def test_sse_kms_is_told_with_the_rights_that_it_takes(make: Callable[..., Federation], surroundings: Any) -> None:
    rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": "arn:key"}}
    surroundings.put_bucket_encryption(Bucket="store", ServerSideEncryptionConfiguration={"Rules": [rule]})
    (found,) = federation_store.encryption(make())
    assert (found.level, "arn:key" in found.what, "kms:Decrypt" in found.what) == ("ok", True, True)
    assert "Contents" not in surroundings.list_objects_v2(Bucket="store"), "the probe is gone"


KEY = "arn:aws:kms:eu-central-1:111122223333:key/0a1b"


def test_the_key_that_the_file_names_is_tried_by_writing_as_everything_is_written(
    make: Callable[..., Federation], surroundings: Any
) -> None:
    named = make(("s3://store/federations", f's3://store/federations, kms_key: "{KEY}"'))
    (found,) = federation_store.encryption(named)
    assert (found.level, KEY in found.what) == ("ok", True)
    store = Rounds.of(named).store
    store.create("ward/a", b"1")
    assert surroundings.head_object(Bucket="store", Key="federations/ward/a")["SSEKMSKeyId"] == KEY


@pytest.mark.parametrize(
    ("told", "level", "what"),
    [
        (("", ""), "fail", "nothing that it tells of"),
        (("AES256", ""), "fail", "AES256"),
        (("aws:kms", "arn:aws:kms:x:1:key/other"), "fail", "key/other"),
    ],
)
def test_a_store_that_encrypts_otherwise_than_the_file_says_fails(
    make: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch, told: tuple[str, str], level: str, what: str
) -> None:
    monkeypatch.setattr(S3Store, "encryption", lambda self: told)
    (found,) = federation_store.encryption(make(("s3://store/federations", f's3://store/federations, kms_key: "{KEY}"')))
    assert (found.level, what in found.what) == (level, True)


def test_a_base_without_weights_fails_and_one_on_the_hub_is_asked_for(
    make: Callable[..., Federation], answers: Answers, surroundings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    surroundings.delete_object(Bucket="models", Key="base/model.safetensors")
    assert levels(doctor.base_model(make())) == ["fail"]
    monkeypatch.setenv("HF_ENDPOINT", answers.url)
    answers.known["/api/models/org/small/revision/main"] = (200, {"sha": "c" * 40})
    (found,) = doctor.base_model(make(("s3://models/base", "org/small")))
    assert (found.level, f"org/small@{'c' * 40}" in found.what) == ("ok", True)
    assert levels(doctor.base_model(make(("s3://models/base", "org/small@v9")))) == ["fail"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert levels(doctor.base_model(make(("s3://models/base", "org/small")))) == ["warn"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert levels(doctor.base_model(make(("s3://models/base", "org/small")))) == ["warn"]


def test_mlflow_is_asked_with_the_sign_in_of_the_environment(
    make: Callable[..., Federation], answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reader")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pass")
    assert levels(doctor.tracking(make())) == ["ok"]
    assert answers.asked[-1][1]["Authorization"] == f"Basic {base64.b64encode(b'reader:pass').decode()}"
    answers.known["/api/2.0/mlflow/experiments/search"] = (401, {})
    (refused,) = doctor.tracking(make())
    assert (refused.level, refused.code, "MLFLOW_TRACKING_TOKEN" in refused.cure) == ("fail", 5, True)
    assert levels(doctor.tracking(make((answers.url, "http://127.0.0.1:9")))) == ["fail"]
    assert levels(doctor.tracking(make((answers.url, "sqlite:///m.db")))) == ["fail"]
    assert levels(doctor.tracking(make((answers.url, "none")))) == ["ok"]


def test_proxies_and_private_authorities_that_miss_a_library_are_told(
    make: Callable[..., Federation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import certifi

    federation = make()
    assert levels(doctor.environment(federation)) == ["ok"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://store.storage.svc:9000")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    (through,) = doctor.environment(federation)
    assert (through.level, "store.storage.svc" in through.what) == ("warn", True)
    monkeypatch.setenv("NO_PROXY", ".svc,127.0.0.1")
    assert levels(doctor.environment(federation)) == ["ok"]
    monkeypatch.setenv("SSL_CERT_FILE", certifi.where())
    assert [f.what for f in doctor.environment(federation) if f.level == "warn"] == [
        "SSL_CERT_FILE set, AWS_CA_BUNDLE not: boto3 reads only that one"
    ]
    (tmp_path / "empty.pem").write_text("")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "empty.pem"))
    assert "fail" in levels(doctor.environment(federation))


def test_a_sign_in_that_would_travel_in_the_clear_is_told(make: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch) -> None:
    federation = make()
    monkeypatch.setenv("KFP_TOKEN", "hush")
    for endpoint, expected in (
        ("http://kubeflow.example", "warn"),
        ("https://kubeflow.example", "ok"),
        ("http://ml-pipeline.kubeflow.svc:8888", "ok"),
    ):
        monkeypatch.setenv("KFP_ENDPOINT", endpoint)
        assert levels(doctor.environment(federation))[0] == expected


def test_the_table_shows_every_finding_and_its_cure_as_text() -> None:
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(doctor.render([doctor.ok("store", "fine [bold]"), doctor.fail("north", "no such thing", "make one")]))
    text = console.export_text()
    assert "fine [bold]" in text
    assert "→ make one" in text
