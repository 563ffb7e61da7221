"""A silo's training as a TrainJob of Kubeflow Trainer (``trainer.kubeflow.org/v1alpha1``), for silos whose nodes are in its hands.

The silo holds a TrainingRuntime named `RUNTIME` in its namespace, which says all that touches its records: image, command, volumes, secrets,
security. The launcher's TrainJob names that runtime and says no more than the box's words, how many nodes, and what each needs; the silo's
admission policy (``k8s/components/trainjob``) refuses one that says more. preprocess and evaluate stay Jobs.

The fields used are the same in Kubeflow Trainer 2.0, 2.1, 2.2 and 2.3 (pkg/apis/trainer/v1alpha1/trainjob_types.go); what pods may be given by
a TrainJob has changed its name with each (podSpecOverrides, podTemplateOverrides, runtimePatches), and none of it is used. A TrainJob has a
deadline of its own (activeDeadlineSeconds) only from 2.2 on, so that the runtime's Job has one, and the launcher deletes what is overdue.
"""

from __future__ import annotations

import hashlib
from typing import Any

from silotune.components.cluster import job_manifest
from silotune.components.cluster.job_manifest import Manifest
from silotune.components.federation import Federation, Silo, canonical_json
from silotune.components.terms.placement import Placement

API = ("trainer.kubeflow.org", "v1alpha1", "trainjobs")  # group, version, plural
RUNTIME = "silotune"
JOB = "node"  # the runtime's one replicated Job, and its container: names that Kubeflow Trainer gives a meaning
TRAINER = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}


def wanted(silo: Silo, box: str) -> bool:
    return box == "train" and silo.placement.trainer == "trainjob"


def name_of(federation: str, silo: str, box: str, turn_text: str) -> str:
    """As `job_manifest.job_name`, but for what Kubeflow Trainer appends and asks: it begins with a letter, and is 51 characters long at most."""
    digest = hashlib.sha256(canonical_json([federation, silo, box, turn_text])).hexdigest()[:10]
    words = job_manifest.job_name(federation, silo, box, turn_text).rpartition("-")[0]
    return f"{words if words[0].isalpha() else f'f{words}'}"[:40].rstrip("-") + f"-{digest}"


def child_name(name: str) -> str:
    """The Job that JobSet makes of a TrainJob."""
    return f"{name}-{JOB}-0"


def pods_of(name: str) -> str:
    """Label selector of a TrainJob's pods."""
    return f"jobset.sigs.k8s.io/jobset-name={name}"


def train_job_of(federation: Federation, silo_id: str, box: str, turn_text: str, until: int | None = None) -> Manifest:
    """The TrainJob of one training, ready to be created.

    Args:
        until: as in `job_manifest.job_of`.

    Raises:
        FederationError: the silo's placement cannot become one.
    """
    silo = federation.silo(silo_id)
    job_manifest.require_possible(silo)
    gpus, nodes = job_manifest.share(silo.placement, box)
    return {
        "apiVersion": "/".join(API[:2]),
        "kind": "TrainJob",
        "metadata": {
            "name": name_of(federation.name, silo_id, box, turn_text),
            "namespace": silo.placement.namespace,
            "labels": job_manifest.labels(federation.name, silo_id, box, turn_text),
            "annotations": {"silotune.dev/turn": turn_text},
        },
        "spec": {
            "runtimeRef": {"apiGroup": API[0], "kind": "TrainingRuntime", "name": RUNTIME},
            "trainer": {
                "args": job_manifest.words(box, silo_id, turn_text, until),
                "numNodes": nodes,
                "numProcPerNode": max(1, gpus),  # else as many as CPUs, where there is no GPU
                "resourcesPerNode": job_manifest.resources(silo.placement, gpus),
            },
        },
    }


def runtime_of(p: Placement, silo_id: str, seconds: int) -> Manifest:
    """The silo's TrainingRuntime, made when the silo is onboarded; a later change of its placement has no effect before it is made anew.

    Args:
        seconds: after which its Job is ended, Pending included.
    """
    marks = {
        "app.kubernetes.io/name": "silotune",
        "app.kubernetes.io/component": "silo-job",
        "app.kubernetes.io/managed-by": "silotune",
        "silotune.dev/silo": silo_id,
        "silotune.dev/box": "train",
    }
    job: dict[str, Any] = {
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "activeDeadlineSeconds": seconds,
        "ttlSecondsAfterFinished": job_manifest.KEPT,
        "podFailurePolicy": {"rules": job_manifest.rules(JOB)},
        "template": {"metadata": {"labels": marks}, "spec": job_manifest.pod_of(p, p.gpus, JOB)},
    }
    return {
        "apiVersion": "/".join(API[:2]),
        "kind": "TrainingRuntime",
        "metadata": {"name": RUNTIME, "namespace": p.namespace},
        "spec": {
            "mlPolicy": {"numNodes": 1, "torch": {"numProcPerNode": 1}},
            "template": {
                "spec": {
                    "failurePolicy": {"maxRestarts": 0},
                    "replicatedJobs": [{"name": JOB, "replicas": 1, "template": {"metadata": {"labels": TRAINER}, "spec": job}}],
                }
            },
        },
    }


def as_job(thing: Manifest) -> Manifest:
    """A TrainJob in the shape of a Job: its conditions bear the same names, and it is ready when all of its pods are."""
    status = thing.get("status") or {}
    ready = sum(j.get("ready", 0) for j in status.get("jobsStatus") or [])
    nodes = ((thing.get("spec") or {}).get("trainer") or {}).get("numNodes", 1)
    return thing | {"status": {**status, "ready": nodes if ready else 0}}


def is_over(thing: Manifest) -> bool:
    conditions = (thing.get("status") or {}).get("conditions") or []
    return any(c["type"] in ("Complete", "Failed") and c["status"] == "True" for c in conditions)
