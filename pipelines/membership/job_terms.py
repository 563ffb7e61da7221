"""A silo's terms for Jobs, from its placement: what its admission policy lets in, and the room that its namespace has.

    not_admitted(place)                what of a placement no silo lets in, whatever its terms
    admitted(place, gpus, classes)     patches of the ConfigMap ``silotune-job-terms``
    room(place, gpus)                  patches of quota, limits and volume

The policy is ``k8s/base/silo/admission.yaml``; ``k8s/base/silo/settings.yaml`` says what each term means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

from silotune.components.cluster import job_manifest
from silotune.components.terms.placement import Placement

MOUNT = "/silo"  # where a Job has the silo's volume
GPU_TYPE = "nvidia.com/gpu"
BASE_CPU, BASE_MEMORY = "16", "64Gi"  # of one pod, in k8s/base/silo/limits.yaml
TAKEN = (
    "",
    "bin",
    "ca",
    "dev",
    "etc",
    "federation",
    "keys",
    "lib",
    "lib64",
    "opt",
    "proc",
    "root",
    "run",
    "sbin",
    "sys",
    "tmp",
    "usr",
    "var",
)
Patch = tuple[dict[str, str], list[dict[str, Any]]]  # target, JSON patch


def put(path: str, value: Any) -> dict[str, Any]:
    """An operation of a JSON patch; `add` also replaces what is there."""
    return {"op": "add", "path": path, "value": value}


def not_admitted(place: Placement) -> Iterator[str]:
    """What of a placement no silo's admission policy lets in, as field, rule, value and cure."""
    for field, name in (("service_account", job_manifest.ACCOUNT), ("config_map", job_manifest.CONFIG_MAP)):
        if (got := getattr(place, field)) not in (None, name):
            yield f"{field}: must be {name}, which a silo's Jobs are admitted with, got {got!r}; leave it out"
    for secret in place.secrets:
        if secret not in job_manifest.SECRETS:
            known = " and ".join(s.name for s in job_manifest.SECRETS)
            yield f"secrets: must be {known} as Jobs have them by default, got {secret.name!r}; give it that name, and leave this out"
    own = job_manifest.CLAIMS[0]
    if place.claims and own not in place.claims:
        yield f"claims: must have {own.claim} at {own.mount} among them, for writing; add it"
    for claim in place.claims:
        if claim.mount.strip("/").partition("/")[0] in TAKEN or (claim.mount.strip("/") == own.mount.strip("/") and claim != own):
            yield f"claims: must be mounted where neither the image nor a Job has anything, got {claim.mount!r}; choose another folder"


def admitted(place: Placement, gpus: int, classes: Sequence[str]) -> list[Patch]:
    """What the Jobs of a placement need of the terms.

    Args:
        gpus: that they may use together.
        classes: priority classes that they may name.
    """
    labels = sorted(f"{label}={value}" for label, value in place.node_selector.items())
    taints = sorted({t.key for t in place.tolerations if t.key})
    claims = [f"{c.claim} {c.mount}{' read-only' if c.read_only else ''}" for c in place.claims if c not in job_manifest.CLAIMS]
    terms = {
        **{f"priorityClass-{i}": name for i, name in enumerate(classes, 1)},
        **{f"node-{i}": label for i, label in enumerate(labels, 1)},
        **{f"toleration-{i}": key for i, key in enumerate(taints, 1)},
        **{f"claim-{i}": claim for i, claim in enumerate(claims, 1)},
        **({"affinity": "any"} if place.affinity else {}),
        **({"maxNodes": str(place.nodes)} if place.nodes > 1 else {}),
        **({"maxGpus": str(gpus)} if gpus else {}),
        **({"gpuType": place.gpu_type} if gpus and place.gpu_type != GPU_TYPE else {}),
        **({"runtimeClass": place.runtime_class} if place.runtime_class else {}),
    }
    operations = [put(f"/data/{name}", value) for name, value in terms.items()]
    return [({"kind": "ConfigMap", "name": "silotune-job-terms"}, operations)] if operations else []


def room(place: Placement, gpus: int) -> list[Patch]:
    """Room for the pods of a training, and a volume that all of them can mount."""
    cpu, memory = _larger(place.cpu or "0", BASE_CPU), _larger(place.memory or "0", BASE_MEMORY)
    hard: dict[str, str] = {f"requests.{place.gpu_type}": str(gpus)} if gpus else {}
    if place.nodes > 1 or (cpu, memory) != (BASE_CPU, BASE_MEMORY):
        hard |= {"pods": str(place.nodes + 2), "requests.cpu": _times(cpu, place.nodes)}
        hard |= {f"{what}.memory": _times(memory, place.nodes) for what in ("requests", "limits")}
    patches: list[Patch] = []
    if hard:
        operations = [put(f"/spec/hard/{what.replace('/', '~1')}", much) for what, much in hard.items()]
        patches.append(({"kind": "ResourceQuota", "name": "silotune"}, operations))
    if (cpu, memory) != (BASE_CPU, BASE_MEMORY):
        patches.append(({"kind": "LimitRange", "name": "silotune"}, [put("/spec/limits/0/max", {"memory": memory, "cpu": cpu})]))
    if place.nodes > 1:
        patches.append(({"kind": "PersistentVolumeClaim"}, [put("/spec/accessModes", ["ReadWriteMany"])]))
    return patches


def _larger(one: str, other: str) -> str:
    from kubernetes.utils.quantity import parse_quantity

    return one if parse_quantity(one) > parse_quantity(other) else other


def _times(quantity: str, count: int) -> str:
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", quantity).groups()  # type: ignore[union-attr]
    return f"{Decimal(number) * count:f}{unit}"
