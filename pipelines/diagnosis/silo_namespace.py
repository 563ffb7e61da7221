"""A silo's namespace, as far as this account may see it: does everything stand there that the silo's Jobs need?"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silotune.components.cluster import job_manifest
from silotune.components.errors import FederationError
from silotune.components.federation import Federation, Silo
from silotune.components.terms.placement import Toleration
from silotune.pipelines.diagnosis.findings import Finding, fail, ok, warn
from silotune.pipelines.diagnosis.kubernetes_view import METADATA, Kubernetes, NoRight, reach
from silotune.pipelines.kubeflow import kfp_api


def runs_namespace(namespace: str | None) -> str:
    """Where Kubeflow runs tasks: the profile's, or ``kubeflow`` where Kubeflow Pipelines stands alone."""
    return namespace or os.environ.get(kfp_api.NAMESPACE) or "kubeflow"


def claims_of(federation: Federation, silo: Silo) -> list[Any]:
    return list(silo.placement.claims or (job_manifest.CLAIMS if federation.launcher == "job" else []))


def secrets_of(federation: Federation, silo: Silo) -> list[Any]:
    return list(silo.placement.secrets or (job_manifest.SECRETS if federation.launcher == "job" else []))


def spot(silo: Silo, name: str) -> str:
    """A name in its namespace, and in its cluster where that is another one."""
    place = silo.placement
    return "/".join(filter(None, (place.kubeconfig_secret, place.namespace or "the pipeline's", name)))


def silos(federation: Federation, given: Any, namespace: str | None) -> Iterator[Finding]:
    """Each silo's namespace, as far as this account may see it."""
    near = [s for s in federation.silos if not s.placement.kubeconfig_secret]
    for silo in (s for s in federation.silos if s not in near):
        yield warn(silo.id, "has a cluster of its own, which is not looked at from here", "its people run `silotune doctor` there")
    if not near:
        return
    api = Kubernetes(given) if given is not None else reach()
    pipeline = runs_namespace(namespace)
    for silo in near:
        within = (silo.placement.namespace or "") if federation.launcher == "job" else pipeline
        if not within:
            continue  # told by `fit`
        at = _At(api, federation, silo, within)
        checks = (exists, account, secrets, claims, terms, nodes, quota)
        for check in checks:
            try:
                yield from check(at)
            except NoRight:
                right, scope = RIGHTS[check.__name__], "" if check is nodes else f" in namespace {within}"
                yield warn(
                    silo.id,
                    f"{check.__name__}: not seen, for lack of the right to {right}{scope}",
                    "grant it, or have the silo look itself",
                )


RIGHTS = {
    "exists": "get namespaces",
    "account": "get serviceaccounts",
    "secrets": "get secrets",
    "claims": "get persistentvolumeclaims",
    "terms": "get configmaps",
    "nodes": "list nodes",
    "quota": "list resourcequotas",
}


@dataclass(frozen=True)
class _At:
    """A silo in its namespace."""

    api: Kubernetes
    federation: Federation
    silo: Silo
    namespace: str

    def get(self, kind: str, name: str = "", *, accept: str = "application/json") -> dict[str, Any] | None:
        return self.api.get("/".join(filter(None, (f"/api/v1/namespaces/{self.namespace}", kind, name))), accept=accept)

    def missing(self, what: str) -> Finding:
        cure = f"`silotune onboard {self.federation.file.name} {self.silo.id}` says how to make it"
        return fail(self.silo.id, f"{what} does not exist in namespace {self.namespace}", cure)


def exists(at: _At) -> Iterator[Finding]:
    found = at.get("")
    if found is None:
        yield fail(
            at.silo.id,
            f"namespace {at.namespace} does not exist",
            "have the silo's administrator create it, or correct placement.namespace",
        )
    elif (phase := (found.get("status") or {}).get("phase")) == "Terminating":
        yield fail(at.silo.id, f"namespace {at.namespace} is being deleted", "have it created anew")
    else:
        yield ok(at.silo.id, f"namespace {at.namespace} is {str(phase or 'there').lower()}")


def account(at: _At) -> Iterator[Finding]:
    name = at.silo.placement.service_account or (job_manifest.ACCOUNT if at.federation.launcher == "job" else "")
    if not name:
        return
    found = at.get("serviceaccounts", name)
    if found is None:
        yield at.missing(f"service account {name}")
        return
    yield ok(at.silo.id, f"service account {name}")
    for pull in found.get("imagePullSecrets") or []:
        if at.get("secrets", pull["name"], accept=METADATA) is None:
            yield at.missing(f"image pull secret {pull['name']} of service account {name}")
        else:
            yield ok(at.silo.id, f"images are pulled with secret {pull['name']}")


def secrets(at: _At) -> Iterator[Finding]:
    for use in secrets_of(at.federation, at.silo):
        found = at.get("secrets", use.name, accept=METADATA)
        yield at.missing(f"secret {use.name}") if found is None else ok(at.silo.id, f"secret {use.name}")


def claims(at: _At) -> Iterator[Finding]:
    for claim in claims_of(at.federation, at.silo):
        found = at.get("persistentvolumeclaims", claim.claim)
        phase = ((found or {}).get("status") or {}).get("phase", "Pending")
        if found is None:
            yield at.missing(f"volume claim {claim.claim}")
        elif phase == "Lost":
            yield fail(at.silo.id, f"volume claim {claim.claim} has lost its volume", "restore the volume, or make a new claim")
        elif (
            at.silo.placement.nodes > 1 and not claim.read_only and "ReadWriteMany" not in (found.get("spec") or {}).get("accessModes", [])
        ):
            modes = ", ".join((found.get("spec") or {}).get("accessModes", [])) or "none"
            yield fail(
                at.silo.id,
                f"volume claim {claim.claim} has access mode {modes}, and {at.silo.placement.nodes} nodes share it",
                "make it anew with ReadWriteMany, of a storage class that can; with any other, pods on further nodes never start",
            )
        elif phase == "Bound":
            yield ok(at.silo.id, f"volume claim {claim.claim} is bound")
        else:
            yield warn(at.silo.id, f"volume claim {claim.claim} is {phase.lower()}", "right where its class waits for the first pod")


def terms(at: _At) -> Iterator[Finding]:
    """The silo's own copy of the file must agree with ours, or its updates are refused."""
    name = at.silo.placement.config_map or (job_manifest.CONFIG_MAP if at.federation.launcher == "job" else "")
    if not name:
        return
    found = at.get("configmaps", name)
    text = ((found or {}).get("data") or {}).get("federation.yaml")
    if found is None:
        yield at.missing(f"config map {name}")
    elif text is None:
        yield fail(at.silo.id, f"config map {name} has no key federation.yaml", "put the silo's copy of the file there")
    else:
        yield same_terms(at.federation, at.silo.id, name, text)


def nodes(at: _At) -> Iterator[Finding]:
    place = at.silo.placement
    listed = (at.api.get("/api/v1/nodes") or {}).get("items") or []
    fitting = [n for n in listed if _takes(n, place.node_selector, place.tolerations)]
    able = [n for n in fitting if int((n["status"].get("allocatable") or {}).get(place.gpu_type, 0)) >= place.gpus]
    wanted = f"{place.gpus} × {place.gpu_type}" if place.gpus else "its selector and tolerations"
    if able:
        yield ok(at.silo.id, f"{len(able)} of {len(listed)} nodes have {wanted}" + ("" if place.gpus else " fit"))
    else:
        why = (
            f"{len(fitting)} of {len(listed)} nodes fit its selector and tolerations, none has {wanted}"
            if place.gpus
            else f"no node fits {wanted}"
        )
        yield fail(at.silo.id, why, "add nodes, or correct placement; right only where a pool grows from zero")


def _takes(node: dict[str, Any], selector: dict[str, str], tolerations: list[Toleration]) -> bool:
    labels = node["metadata"].get("labels") or {}
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"].get("conditions") or [])
    taints = [t for t in (node.get("spec") or {}).get("taints") or [] if t["effect"] != "PreferNoSchedule"]
    return ready and selector.items() <= labels.items() and all(any(_tolerates(t, taint) for t in tolerations) for taint in taints)


def _tolerates(toleration: Toleration, taint: dict[str, str]) -> bool:
    key = toleration.key is None or toleration.key == taint["key"]
    value = toleration.operator == "Exists" or toleration.value == taint.get("value")
    return key and value and toleration.effect in (None, taint["effect"])


def quota(at: _At) -> Iterator[Finding]:
    """Whether one more Job of the silo's, with all its pods, fits into what its namespace may use."""
    from kubernetes.utils.quantity import parse_quantity

    place = at.silo.placement
    memory = place.memory or job_manifest.MEMORY
    needs = {"pods": "1", "count/jobs.batch": "1", "requests.memory": memory, "limits.memory": memory, "requests.cpu": place.cpu or "0"}
    needs |= {f"requests.{place.gpu_type}": str(place.gpus)}

    def pods(what: str) -> int:
        return 1 if what == "count/jobs.batch" else place.nodes

    short = []
    listed = (at.get("resourcequotas") or {}).get("items") or []
    for item in listed:
        hard = (item.get("status") or {}).get("hard") or (item.get("spec") or {}).get("hard") or {}
        used = (item.get("status") or {}).get("used") or {}
        for what, need in needs.items():
            if what in hard and parse_quantity(hard[what]) - parse_quantity(used.get(what, "0")) < parse_quantity(need) * pods(what):
                each = f" for each of {pods(what)} pods" if pods(what) > 1 else ""
                short.append(f"{what}: {need}{each} needed, {used.get(what, '0')} of {hard[what]} used")
    if short:
        yield fail(
            at.silo.id, f"quota of namespace {at.namespace} has no room: {'; '.join(short)}", "have it raised, or finished Jobs deleted"
        )
    else:
        yield ok(at.silo.id, "quota has room" if listed else f"namespace {at.namespace} has no quota")


def same_terms(federation: Federation, whose: str, name: str, text: str) -> Finding:
    """Whether the copy of the federation file in a ConfigMap agrees with ours."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "federation.yaml"
        file.write_text(text)
        try:
            theirs = Federation.load(file)
        except FederationError as error:
            lines = str(error).splitlines()
            return fail(
                whose,
                f"config map {name}: its federation.yaml is wrong: {lines[min(1, len(lines) - 1)].strip()}",
                "correct that copy",
            )
    changes = federation.agreement("", "").changes(theirs.agreement("", ""))
    if changes:
        return fail(whose, f"config map {name} has other terms: {', '.join(changes[:5])}", "bring that copy and this file together")
    return ok(whose, f"config map {name} has the same terms as {federation.file.name}")
