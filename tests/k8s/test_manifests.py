"""The manifests build, are valid Kubernetes, and keep to the rules of `rules`; and each rule refuses what it is there to refuse."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

HERE = Path(__file__).parent


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"k8s_{name}", HERE / f"{name}.py")
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rules, shared = _load("rules"), _load("conftest")
Object = dict[str, Any]
VERSIONS = ("1.30", "1.34")  # the oldest that the admission policy needs, and a recent one
FOLDERS = shared.kustomizations()


@pytest.fixture(params=FOLDERS, ids=lambda f: str(f.relative_to(shared.MANIFESTS)))
def objects(request: pytest.FixtureRequest, build: Any) -> list[Object]:
    return list(build(request.param))


def test_all_of_the_manifests_are_looked_at() -> None:
    used = {file for f in FOLDERS for file in f.rglob("*.yaml")} | set((shared.MANIFESTS / "components").rglob("*.yaml"))
    assert set(shared.MANIFESTS.rglob("*.yaml")) - used == set((shared.MANIFESTS / "handout").glob("*.yaml"))
    for folder in FOLDERS:
        kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
        listed = {*kustomization["resources"], *(f for g in kustomization.get("configMapGenerator", []) for f in g["files"])}
        assert {f.name for f in folder.glob("*.yaml")} - {"kustomization.yaml"} <= listed, f"{folder} has a file that nothing names"


def test_every_object_is_valid(objects: list[Object]) -> None:
    for version in VERSIONS:
        for o in objects:
            kubernetes_validate.validate(o, version, strict=True)


def test_a_word_that_kubernetes_does_not_know_is_invalid(build: Any) -> None:
    o = copy.deepcopy(workload(build(shared.MANIFESTS / "overlays" / "kind")))
    pod(o)["containers"][0]["readOnlyRootFilesystem"] = True  # in the wrong place
    with pytest.raises(kubernetes_validate.ValidationError, match="readOnlyRootFilesystem"):
        kubernetes_validate.validate(o, VERSIONS[0], strict=True)


def test_every_rule_is_kept(objects: list[Object]) -> None:
    assert rules.broken(objects) == []


def test_the_job_of_the_example_is_valid_and_keeps_to_the_rules(job: Object) -> None:
    for version in VERSIONS:
        kubernetes_validate.validate(job, version, strict=True)
    assert [b for b in rules.broken([job]) if not b.startswith("names_are_met")] == []


def test_nothing_stands_twice(objects: list[Object]) -> None:
    names = [(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in objects]
    assert len(set(names)) == len(names)


# --- each rule, broken once ---


def workload(objects: list[Object]) -> Object:
    return next(o for o in objects if o["kind"] == "Deployment" and o["metadata"]["name"] == "mlflow")


def pod(o: Object) -> Object:
    return o["spec"]["template"]["spec"]  # type: ignore[no-any-return]


def first(kind: str, name: str | None = None) -> Callable[[list[Object]], Object]:
    return lambda objects: next(o for o in objects if o["kind"] == kind and name in (None, o["metadata"]["name"]))


def container(**more: Any) -> Callable[[list[Object]], None]:
    return lambda objects: pod(workload(objects))["containers"][0].update(more)


def inside(*path: Any, value: Any) -> Callable[[list[Object]], None]:
    """Put a value in the MLflow deployment's pod."""

    def change(objects: list[Object]) -> None:
        place = pod(workload(objects))
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return change


def put(kind: str, *path: Any, value: Any, name: str | None = None) -> Callable[[list[Object]], None]:
    def change(objects: list[Object]) -> None:
        place = first(kind, name)(objects)
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return change


def drop(kind: str, name: str | None = None, namespace: str = "silotune") -> Callable[[list[Object]], None]:
    def change(objects: list[Object]) -> None:
        objects[:] = [
            o for o in objects
            if not (o["kind"] == kind and name in (None, o["metadata"]["name"]) and o["metadata"].get("namespace") == namespace)
        ]  # fmt: skip

    return change


def add(kind: str, **more: Any) -> Callable[[list[Object]], None]:
    return lambda objects: objects.append({"kind": kind, "metadata": {"name": "x", "namespace": "silotune"}, **more})


def grant(*resources: str, verbs: tuple[str, ...] = ("get",)) -> Callable[[list[Object]], None]:
    return add("Role", rules=[{"apiGroups": [""], "resources": list(resources), "verbs": list(verbs)}])


C = ("containers", 0)
FAULTS: list[tuple[str, Callable[[list[Object]], None]]] = [
    ("images_are_pinned", container(image="ghcr.io/mlflow/mlflow:latest")),
    ("images_are_pinned", container(image="ghcr.io/mlflow/mlflow")),
    ("requests_and_limits", inside(*C, "resources", "limits", value={"cpu": "1"})),
    ("requests_and_limits", inside(*C, "resources", value={})),
    ("never_root", inside("securityContext", "runAsUser", value=0)),
    ("never_root", inside("securityContext", "runAsNonRoot", value=False)),
    ("never_root", inside(*C, "securityContext", "runAsNonRoot", value=False)),
    ("root_file_system_is_read_only", inside(*C, "securityContext", "readOnlyRootFilesystem", value=False)),
    ("no_capabilities", inside(*C, "securityContext", "capabilities", value={"drop": ["ALL"], "add": ["NET_ADMIN"]})),
    ("no_capabilities", inside(*C, "securityContext", "allowPrivilegeEscalation", value=True)),
    ("no_capabilities", inside(*C, "securityContext", "privileged", value=True)),
    ("seccomp_is_on", inside("securityContext", "seccompProfile", value={"type": "Unconfined"})),
    ("nothing_of_the_host", inside("hostNetwork", value=True)),
    ("nothing_of_the_host", inside("volumes", 0, value={"name": "x", "hostPath": {"path": "/"}})),
    ("nothing_of_the_host", inside(*C, "ports", 0, value={"containerPort": 5000, "hostPort": 5000})),
    ("no_secret_stands_in_the_text", add("Secret", stringData={"a": "b"})),
    ("no_secret_stands_in_the_text", inside(*C, "env", 0, value={"name": "AWS_SECRET_ACCESS_KEY", "value": "x"})),
    ("no_secret_stands_in_the_text", put("ConfigMap", "data", "uri", value="postgresql://u:p@mlflow-postgres/mlflow")),
    ("tokens_only_where_the_api_is_used", inside("automountServiceAccountToken", value=True)),
    ("tokens_only_where_the_api_is_used", inside("serviceAccountName", value="default")),
    ("tokens_only_where_the_api_is_used", put("ServiceAccount", "automountServiceAccountToken", value=True, name="mlflow")),
    ("least_privilege", add("ClusterRole", rules=[])),
    ("least_privilege", grant("configmaps", verbs=("*",))),
    ("least_privilege", grant("secrets")),
    ("least_privilege", grant("pods/exec", verbs=("create",))),
    ("least_privilege", grant("pods/log")),
    ("least_privilege", grant("users", verbs=("impersonate",))),
    ("namespaces_are_closed", drop("NetworkPolicy", "default-deny")),
    ("namespaces_are_closed", drop("ResourceQuota")),
    ("namespaces_are_closed", put("Namespace", "metadata", "labels", value={"pod-security.kubernetes.io/enforce": "baseline"})),
    ("flows_are_named", put("NetworkPolicy", "spec", "egress", value=[{}], name="tasks-to-store")),
    ("flows_are_named", put("NetworkPolicy", "spec", "egress", 0, "to", 0, "ipBlock", "cidr", value="0.0.0.0/0", name="tasks-to-store")),
    ("flows_are_named", put("NetworkPolicy", "spec", "ingress", 0, "from", 0, value={"namespaceSelector": {}}, name="mlflow-from-tasks")),
    ("servers_are_probed", inside(*C, value={"name": "mlflow", "image": "m:1.0"})),
    ("names_are_met", put("Service", "spec", "selector", value={"app": "other"}, name="mlflow")),
    ("names_are_met", add("Service", spec={"clusterIP": "None", "selector": {"app": "other"}})),
    ("names_are_met", put("PodDisruptionBudget", "spec", "minAvailable", value=2)),
    ("names_are_met", inside("serviceAccountName", value="nobody")),
    ("names_are_met", put("RoleBinding", "roleRef", "name", value="other")),
    ("scoped_as_its_kind", put("Namespace", "metadata", "namespace", value="silotune")),
    ("scoped_as_its_kind", put("ConfigMap", "metadata", value={"name": "silotune-store"})),
    ("mlflow_asks_who_it_is", inside(*C, "command", value=["mlflow", "server"])),
    ("mlflow_asks_who_it_is", put("ConfigMap", "data", value={}, name="mlflow")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=[f"{i}-{n}" for i, (n, _) in enumerate(FAULTS)])
def test_a_rule_refuses_its_fault(build: Any, name: str, fault: Callable[[list[Object]], None]) -> None:
    objects = copy.deepcopy(build(shared.MANIFESTS / "overlays" / "example-production"))
    fault(objects)
    assert name in {b.split(":")[0] for b in rules.broken(objects)}


def test_every_rule_has_a_fault() -> None:
    assert {name for name, _ in FAULTS} == set(rules.RULES)


@pytest.mark.parametrize(
    "change",
    [
        {"policyName": "other"},
        {"validationActions": ["Audit"]},
        {"paramRef": {"name": "x", "namespace": "y", "parameterNotFoundAction": "Allow"}},
    ],
)
def test_a_policy_that_is_not_bound_is_found(build: Any, change: Object) -> None:
    objects = copy.deepcopy(build(shared.MANIFESTS / "base" / "silo"))
    first("ValidatingAdmissionPolicyBinding")(objects)["spec"].update(change)
    assert {b.split(":")[0] for b in rules.broken(objects)} == {"names_are_met"}


def test_what_the_launcher_may_in_a_silo_is_jobs_only(build: Any) -> None:
    for folder in ("base/silo", "overlays/example-production/silo-north", "overlays/kind/silo-south"):
        objects = build(shared.MANIFESTS / folder)
        (role,) = (o for o in objects if o["kind"] == "Role")
        assert role["rules"] == [{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "get", "list", "watch", "delete"]}]
        (binding,) = (o for o in objects if o["kind"] == "RoleBinding")
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "silotune-launcher", "namespace": "silotune"}]
