"""What every object of silotune's must keep to. A rule takes one object and all of its build, and yields what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

Object = dict[str, Any]
Rule = Callable[[Object, list[Object]], Iterator[str]]
RULES: dict[str, Rule] = {}
CLUSTER_SCOPED = {"Namespace", "RuntimeClass", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}
# Pods that the launcher makes, which are in no build: those of a training find each other by a Service.
TRAINING = {"app.kubernetes.io/name": "silotune", "app.kubernetes.io/component": "silo-job", "silotune.dev/box": "train"}
# Whose pods use the Kubernetes API: the tasks of a pipeline, through KFP and as launchers.
NEEDS_TOKEN = {"silotune-launcher"}


def rule(check: Rule) -> Rule:
    RULES[check.__name__] = check
    return check


def broken(objects: list[Object]) -> list[str]:
    """``rule: kind/name: what`` for everything that is wrong."""
    return [
        f"{name}: {o['kind']}/{o['metadata']['name']}: {text}"
        for o in objects
        for name, check in RULES.items()
        for text in check(o, objects)
    ]


def pod_of(o: Object) -> Object:
    """The pod's specification of a workload; empty for anything else."""
    if o["kind"] == "Pod":
        return dict(o["spec"])
    if o["kind"] == "CronJob":
        return dict(o["spec"]["jobTemplate"]["spec"]["template"]["spec"])
    if o["kind"] == "TrainingRuntime":
        return dict(o["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"])
    template = o.get("spec", {}).get("template", {}) if o["kind"] in ("Deployment", "StatefulSet", "DaemonSet", "Job") else {}
    return dict(template.get("spec", {}))


def containers_of(o: Object) -> list[Object]:
    pod = pod_of(o)
    return [*pod.get("initContainers", []), *pod.get("containers", [])]


@rule
def images_are_pinned(o: Object, _: list[Object]) -> Iterator[str]:
    for c in containers_of(o):
        if not re.search(r"@sha256:[0-9a-f]{64}$|:v?\d+\.\d+[\w.-]*$", c["image"]):
            yield f"{c['image']} is neither a digest nor a version"


@rule
def requests_and_limits(o: Object, _: list[Object]) -> Iterator[str]:
    for c in containers_of(o):
        resources = c.get("resources", {})
        whole = ("memory",) if o["kind"] == "TrainingRuntime" else ("cpu", "memory")  # its TrainJobs say what they need
        for what, names in (("requests", whole), ("limits", ("memory",))):
            for name in names:
                if name not in resources.get(what, {}):
                    yield f"{c['name']} has no {what}.{name}"


@rule
def never_root(o: Object, _: list[Object]) -> Iterator[str]:
    for c in containers_of(o):
        context = pod_of(o).get("securityContext", {}) | c.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or not isinstance(context.get("runAsUser"), int) or context["runAsUser"] == 0:
            yield f"{c['name']} needs runAsNonRoot and a numeric runAsUser above 0"


@rule
def root_file_system_is_read_only(o: Object, _: list[Object]) -> Iterator[str]:
    yield from (c["name"] for c in containers_of(o) if c.get("securityContext", {}).get("readOnlyRootFilesystem") is not True)


@rule
def no_capabilities(o: Object, _: list[Object]) -> Iterator[str]:
    for c in containers_of(o):
        context = c.get("securityContext", {})
        if context.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{c['name']} must drop ALL and add none"
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            yield f"{c['name']} may get privileges"


@rule
def seccomp_is_on(o: Object, _: list[Object]) -> Iterator[str]:
    for c in containers_of(o):
        context = pod_of(o).get("securityContext", {}) | c.get("securityContext", {})
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{c['name']} needs seccompProfile RuntimeDefault"


@rule
def nothing_of_the_host(o: Object, _: list[Object]) -> Iterator[str]:
    pod = pod_of(o)
    yield from (name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name))
    yield from (f"volume {v['name']}" for v in pod.get("volumes", []) if "hostPath" in v)
    yield from (f"port {p}" for c in containers_of(o) for p in c.get("ports", []) if "hostPort" in p)


@rule
def no_secret_stands_in_the_text(o: Object, _: list[Object]) -> Iterator[str]:
    if o["kind"] == "Secret":
        yield "secrets are made by hand; name them only"
    for c in containers_of(o):
        for e in c.get("env", []):
            if "value" in e and re.search(r"PASSWORD|SECRET|TOKEN|_KEY(_|$)|CREDENTIAL", e["name"], re.I):
                yield f"{e['name']} has a value"
    if re.search(r"://[^/\s'\"<@]+:[^/\s'\"<@]+@|-----BEGIN|AKIA[0-9A-Z]{16}", str(o)):
        yield "holds what looks like a credential"


@rule
def tokens_only_where_the_api_is_used(o: Object, _: list[Object]) -> Iterator[str]:
    pod = pod_of(o)
    if pod and pod.get("serviceAccountName") not in NEEDS_TOKEN and pod.get("automountServiceAccountToken") is not False:
        yield "pod mounts a token"
    if pod and pod.get("serviceAccountName", "default") == "default":
        yield "pod runs as the default account"
    if o["kind"] == "ServiceAccount" and o["metadata"]["name"] not in NEEDS_TOKEN and o.get("automountServiceAccountToken") is not False:
        yield "account mounts a token"


@rule
def least_privilege(o: Object, _: list[Object]) -> Iterator[str]:
    if o["kind"] in ("ClusterRole", "ClusterRoleBinding"):
        yield "rights must end at the namespace"
    for r in o.get("rules", []) if o["kind"] == "Role" else []:
        words = {*r["apiGroups"], *r["resources"], *r["verbs"]}
        if "*" in words:
            yield f"a wildcard in {r}"
        if bad := words & {
            "impersonate",
            "escalate",
            "bind",
            "deletecollection",
            "pods/exec",
            "pods/attach",
            "serviceaccounts/token",
            "roles",
        }:
            yield f"{sorted(bad)}"
        if "secrets" in words and (not r.get("resourceNames") or r["verbs"] != ["get"]):
            yield "secrets other than by name, to read"
        if words & {"pods", "pods/log", "pods/ephemeralcontainers"}:
            yield "pods"


@rule
def namespaces_are_closed(o: Object, everything: list[Object]) -> Iterator[str]:
    if o["kind"] != "Namespace":
        return
    name, labels = o["metadata"]["name"], o["metadata"].get("labels", {})
    if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
        yield "Pod Security is not restricted"
    inside = [x for x in everything if x["metadata"].get("namespace") == name]
    yield from (f"has no {kind}" for kind in ("ResourceQuota", "LimitRange") if not any(x["kind"] == kind for x in inside))
    closed = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    if not any(x["kind"] == "NetworkPolicy" and x["spec"] == closed for x in inside):
        yield "has no network policy that denies all"


@rule
def flows_are_named(o: Object, _: list[Object]) -> Iterator[str]:
    """No policy opens everything: each rule names its peers and its ports, and no address range is the internet."""
    for direction, peers in (("ingress", "from"), ("egress", "to")) if o["kind"] == "NetworkPolicy" else ():
        for r in o["spec"].get(direction, []):
            if not r.get(peers) or not r.get("ports"):
                yield f"{direction} without {peers} or ports"
            for peer in r.get(peers) or []:
                if any(selector == {} for selector in peer.values()) or peer.get("ipBlock", {}).get("cidr", "").endswith("/0"):
                    yield f"{direction} {peers} everywhere"


@rule
def servers_are_probed(o: Object, _: list[Object]) -> Iterator[str]:
    if o["kind"] in ("Deployment", "StatefulSet", "DaemonSet"):
        for c in pod_of(o)["containers"]:
            yield from (f"{c['name']} has no {p}" for p in ("startupProbe", "readinessProbe", "livenessProbe") if p not in c)


@rule
def names_are_met(o: Object, everything: list[Object]) -> Iterator[str]:
    """Services, disruption budgets, accounts and bindings name what is there."""
    namespace = o["metadata"].get("namespace")

    def there(kind: str, name: str, where: str | None) -> bool:
        return any(x["kind"] == kind and x["metadata"]["name"] == name and x["metadata"].get("namespace") == where for x in everything)

    workloads = [x for x in everything if x["metadata"].get("namespace") == namespace and x["kind"] in ("Deployment", "StatefulSet")]
    selector = o["spec"].get("selector", {}) if o["kind"] in ("Service", "PodDisruptionBudget") else None
    if selector is not None:
        wanted = selector.get("matchLabels", selector)
        met = [w for w in workloads if wanted.items() <= w["spec"]["template"]["metadata"]["labels"].items()]
        headless = o["spec"].get("clusterIP") == "None" and wanted.items() <= TRAINING.items()
        if not met and not headless:
            yield f"selects nothing: {wanted}"
        if o["kind"] == "PodDisruptionBudget" and any(o["spec"].get("minAvailable", 0) >= w["spec"]["replicas"] for w in met):
            yield "no drain could ever end"
    if (account := pod_of(o).get("serviceAccountName")) and not there("ServiceAccount", account, namespace):
        yield f"there is no account {account}"
    if o["kind"] == "RoleBinding" and not there("Role", o["roleRef"]["name"], namespace):
        yield f"there is no role {o['roleRef']['name']}"
    if o["kind"] == "ValidatingAdmissionPolicyBinding":
        reference = o["spec"]["paramRef"]
        if not there("ValidatingAdmissionPolicy", o["spec"]["policyName"], None):
            yield "there is no such policy"
        if not there("ConfigMap", reference["name"], reference["namespace"]):
            yield "there are no such parameters"
        if o["spec"]["matchResources"]["namespaceSelector"]["matchLabels"] != {"kubernetes.io/metadata.name": reference["namespace"]}:
            yield "holds for another namespace than its parameters"
        if "Deny" not in o["spec"]["validationActions"] or reference["parameterNotFoundAction"] != "Deny":
            yield "does not deny"


@rule
def scoped_as_its_kind(o: Object, _: list[Object]) -> Iterator[str]:
    if ("namespace" in o["metadata"]) == (o["kind"] in CLUSTER_SCOPED):
        yield "has a namespace" if "namespace" in o["metadata"] else "has no namespace"


def _settings(everything: list[Object]) -> dict[str, str]:
    return {k: v for x in everything if x["kind"] == "ConfigMap" for k, v in x.get("data", {}).items()}


@rule
def mlflow_asks_who_it_is(o: Object, everything: list[Object]) -> Iterator[str]:
    for c in containers_of(o):
        if "mlflow" in c.get("command", []):
            command = " ".join(c["command"])
            if "--app-name basic-auth" not in command:
                yield "anybody may write"
            values = _settings(everything) | {e["name"]: e.get("value") for e in c.get("env", [])}
            if values.get("MLFLOW_SERVER_ENABLE_JOB_EXECUTION") != "false":
                yield "runs job workers"
