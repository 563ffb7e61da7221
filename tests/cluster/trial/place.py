"""Where a trial goes, and what it is called there.

KUBECONFIG                    a cluster, as somebody who may administer it
KFP_ENDPOINT                  its Kubeflow Pipelines, as `silotune` itself is told (see `pipelines.kfp_api`)
SILOTUNE_SILO_IMAGE           by digest, as the cluster pulls them
SILOTUNE_COORDINATOR_IMAGE
KFP_NAMESPACE                 where Kubeflow runs tasks; default: kubeflow, as where Kubeflow Pipelines stands alone
SILOTUNE_TRIAL_MLFLOW         address of an MLflow in the cluster, http://<service>.<namespace>.svc:<port>; its user from MLFLOW_TRACKING_*
SILOTUNE_TRIAL_KEEP           set, nothing is cleaned up, to be looked at
"""

from __future__ import annotations

import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

VERSION = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]["version"]
DIGEST = re.compile(r"[a-z0-9./:_-]+@sha256:[0-9a-f]{64}")
LABEL = "silotune.dev/trial"  # on all that a trial makes
HOSPITALS = ("north", "harbour", "valley")  # of examples/hospitals
IMAGES = f"""make images REGISTRY=localhost:5001/ PUSH=1
  export SILOTUNE_SILO_IMAGE=$(docker inspect --format '{{{{index .RepoDigests 0}}}}' localhost:5001/silotune-silo:{VERSION})
  export SILOTUNE_COORDINATOR_IMAGE=$(docker inspect --format '{{{{index .RepoDigests 0}}}}' localhost:5001/silotune-coordinator:{VERSION})"""


@dataclass(frozen=True)
class Place:
    """A cluster, and the names that one trial has there; ``identity`` is in each of them, but for the one ConfigMap that tasks look for."""

    silo_image: str
    coordinator_image: str
    tasks: str = "kubeflow"  # the namespace where Kubeflow runs tasks
    mlflow: str = ""
    keep: bool = False
    identity: str = field(default_factory=lambda: f"t{secrets.token_hex(2)}")

    @cached_property
    def silos(self) -> tuple[str, ...]:
        """Ids; `silotune onboard` names a silo's namespace after it."""
        return tuple(f"{self.identity}-{hospital}" for hospital in HOSPITALS)

    def namespace(self, silo: str) -> str:
        return f"silotune-{silo}"

    @property
    def namespaces(self) -> tuple[str, ...]:
        """Those that the trial makes."""
        return (*map(self.namespace, self.silos), self.store)

    @property
    def store(self) -> str:
        return f"silotune-{self.identity}-store"

    @property
    def endpoint(self) -> str:
        """The store's, in the cluster."""
        return f"http://seaweedfs.{self.store}.svc:8333"

    @property
    def ours(self) -> str:
        """Of the coordinator's account, ConfigMap and, with something behind it, Secrets."""
        return f"silotune-{self.identity}"

    @property
    def labels(self) -> dict[str, str]:
        return {LABEL: self.identity}

    @property
    def launcher(self) -> str:
        """As the API server knows the account of the coordinator's tasks."""
        return f"system:serviceaccount:{self.tasks}:{self.ours}"


def missing(environ: Mapping[str, str]) -> str:
    """Why no trial can begin here, with what to do; empty if one can."""
    for name, what in (("KUBECONFIG", "the kubeconfig of a cluster"), ("KFP_ENDPOINT", "the address of Kubeflow Pipelines on it")):
        if not environ.get(name):
            return f"{name} is not set: {what} that the trial may use; docs/kubernetes.md, 'A trial on kind', makes one from nothing"
    for name in ("SILOTUNE_SILO_IMAGE", "SILOTUNE_COORDINATOR_IMAGE"):
        if not DIGEST.fullmatch(environ.get(name, "")):
            return f"{name}: must name an image by digest, registry/name@sha256:…, got {environ.get(name, '')!r}; for a registry on localhost:\n  {IMAGES}"
    return ""


def of(environ: Mapping[str, str]) -> Place:
    """The place that the environment names."""
    return Place(
        environ["SILOTUNE_SILO_IMAGE"],
        environ["SILOTUNE_COORDINATOR_IMAGE"],
        tasks=environ.get("KFP_NAMESPACE") or "kubeflow",
        mlflow=environ.get("SILOTUNE_TRIAL_MLFLOW", ""),
        keep=bool(environ.get("SILOTUNE_TRIAL_KEEP")),
    )
