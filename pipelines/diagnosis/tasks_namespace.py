"""The namespace that Kubeflow runs a federation's tasks in: does everything stand there that the coordinator's boxes and the launchers look for?

None of it keeps a pod waiting (see `placement`), so that a run would start and its first task fail; and some of it need not be there. So what
is missing is a warning, by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from silotune.components.cluster import job_manifest
from silotune.components.errors import UnreachableError
from silotune.components.federation import Federation
from silotune.components.federation_file import COORDINATOR
from silotune.pipelines.diagnosis.findings import Finding, ok, warn
from silotune.pipelines.diagnosis.kubernetes_view import METADATA, Kubernetes, NoRight, reach
from silotune.pipelines.diagnosis.silo_namespace import runs_namespace, same_terms


@dataclass(frozen=True)
class _At:
    """A federation in the namespace of its runs."""

    api: Kubernetes
    federation: Federation
    namespace: str

    def get(self, kind: str, name: str, *, accept: str = "application/json") -> dict[str, Any] | None:
        return self.api.get(f"/api/v1/namespaces/{self.namespace}/{kind}/{name}", accept=accept)

    def create(self, what: str) -> str:
        return f"`kubectl --namespace {self.namespace} create {what}`"


def tasks(federation: Federation, given: Any, namespace: str | None) -> Iterator[Finding]:
    """What the `coordinator` section names, and where the store is.

    Args:
        given: an `ApiClient`; default: that of this pod, or of the kubeconfig.
        namespace: of Kubeflow Pipelines, as in `kfp_api.connect`.
    """
    within = runs_namespace(namespace)
    try:
        at = _At(Kubernetes(given) if given is not None else reach(), federation, within)
        checks: tuple[tuple[str, Callable[[_At], Iterator[Finding]]], ...] = (
            ("configmaps", terms), ("configmaps", whereabouts), ("secrets", secrets), ("persistentvolumeclaims", claims),
        )  # fmt: skip
        for kind, check in checks:
            try:
                yield from check(at)
            except NoRight:
                what = f"{check.__name__}: not seen, for lack of the right to get {kind} in namespace {within}"
                yield warn(COORDINATOR, what, "grant it, or look with an account that may")
    except UnreachableError as error:
        what, _, cure = str(error).rpartition("; ")
        yield warn(COORDINATOR, f"what its tasks need in namespace {within} was not looked at: {what or error}", cure if what else "")


def terms(at: _At) -> Iterator[Finding]:
    name = at.federation.coordinator.config_map
    found = at.get("configmaps", name)
    text = ((found or {}).get("data") or {}).get("federation.yaml")
    if text is None:
        lacks = "does not exist" if found is None else "has no key federation.yaml"
        cure = at.create(f"configmap {name} --from-file=federation.yaml={at.federation.file.name}")
        yield warn(COORDINATOR, f"config map {name} {lacks} in namespace {at.namespace}", cure)
    else:
        yield same_terms(at.federation, COORDINATOR, name, text)


def whereabouts(at: _At) -> Iterator[Finding]:
    """Where the store is; AWS itself needs no word."""
    name, keys = job_manifest.STORE
    found = at.get("configmaps", name)
    if found is None or not (found.get("data") or {}).get(keys[0]):
        lacks = f"does not exist in namespace {at.namespace}" if found is None else f"of namespace {at.namespace} has no {keys[0]}"
        yield warn(
            COORDINATOR, f"config map {name} {lacks}: tasks look for the store at AWS", "right where it is there; else name its address"
        )
    else:
        yield ok(COORDINATOR, f"config map {name} says where the store is")


def secrets(at: _At) -> Iterator[Finding]:
    place, key = at.federation.coordinator, f"{COORDINATOR}.pem"
    wanted = {place.s3_secret: "right where pods are known to S3 by their account; else "}
    if at.federation.privacy.silo is not None:
        key = f"{key} {COORDINATOR}.noise"
    if at.federation.custody == "parties" or at.federation.privacy.silo is not None:
        wanted[place.keys_secret] = ""
    if at.federation.tracking.uri.startswith(("http://", "https://")):
        wanted[place.mlflow_secret] = "right where MLflow asks nobody; else "
    for name, unless in wanted.items():
        if at.get("secrets", name, accept=METADATA) is None:
            files = {place.s3_secret: "AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY", place.keys_secret: key}.get(
                name, "MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD"
            )
            making = " ".join(f"--from-file={file}" for file in files.split())
            yield warn(
                COORDINATOR,
                f"secret {name} does not exist in namespace {at.namespace}",
                f"{unless}{at.create(f'secret generic {name} {making}')}",
            )
        else:
            yield ok(COORDINATOR, f"secret {name}")


def claims(at: _At) -> Iterator[Finding]:
    for claim in at.federation.coordinator.claims:
        found = at.get("persistentvolumeclaims", claim.claim)
        phase = ((found or {}).get("status") or {}).get("phase", "Pending")
        if found is None:
            cure = "make it, or correct coordinator.claims: initialize and export never start without it"
            yield warn(COORDINATOR, f"volume claim {claim.claim} does not exist in namespace {at.namespace}", cure)
        elif phase == "Bound":
            yield ok(COORDINATOR, f"volume claim {claim.claim} is bound")
        else:
            cure = "restore the volume, or make a new claim" if phase == "Lost" else "right where its class waits for the first pod"
            yield warn(COORDINATOR, f"volume claim {claim.claim} is {phase.lower()}", cure)
