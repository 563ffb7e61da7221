"""How a silo's Job ended: in its own words, and in those of its pods where they may be seen. Pure functions of Kubernetes' objects.

A status of Kubernetes holds names of nodes and texts of others; what comes out of here is from a fixed vocabulary (see `cluster_job`), or what
the silo itself has put into its pod's termination message as its status.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from silotune.components.cluster.job_manifest import Manifest
from silotune.components.errors import RefusedError
from silotune.components.process.nodes import NodeLost
from silotune.components.protocol import Status
from silotune.components.silo_job import PAST_DEADLINE, parse_status

NO_IMAGE = "image cannot be pulled"
NEVER_STARTED = "never started"
SOME_NEVER_STARTED = "not all nodes started"
SUSPENDED = "suspended"


@dataclass(frozen=True)
class End:
    """How a silo's work ended; ``detail`` is for the coordinator's own log."""

    status: Status
    reason: str = ""
    detail: str = ""


def condition_of(job: Manifest) -> dict[str, Any] | None:
    """The condition that says how a Job ended; None while its pod may still run."""
    conditions = (job.get("status") or {}).get("conditions") or []
    return next((c for c in conditions if c["type"] in ("Complete", "Failed") and c["status"] == "True"), None)


def is_suspended(job: Manifest) -> bool:
    """Whether a queue keeps it back."""
    conditions = (job.get("status") or {}).get("conditions") or []
    return any(c["type"] == "Suspended" and c["status"] == "True" for c in conditions)


BY_CODE = {
    1: End("failed", "see the log of the silo"),
    2: End("failed", "data or settings are wrong"),
    4: End("refused", "by the silo"),
    5: End("failed", "store unreachable or full"),
    6: End("late", PAST_DEADLINE),
    137: End("failed", "out of memory or killed"),
    143: End("failed", "stopped"),
}


def failure(condition: dict[str, Any]) -> End:
    """What a Job's own Failed condition says. The message is Kubernetes' own, made by the rules of `job_manifest`."""
    reason, message = str(condition.get("reason", "")), str(condition.get("message", ""))
    if reason == "DeadlineExceeded":
        return End("late", PAST_DEADLINE)
    if reason == "PodFailurePolicy":
        if "condition DisruptionTarget" in message:
            return End("failed", "evicted or node lost")
        if match := re.search(r"exit code (\d{1,3})\b", message):
            return BY_CODE.get(int(match[1]), End("failed", f"exit code {match[1]}"))
    return End("failed", "its pod failed")


# What pods say, where they may be seen

NO_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError", "RegistryUnavailable")
DISRUPTED = {
    "PreemptionByScheduler": "preempted", "EvictionByEvictionAPI": "evicted", "TerminationByKubelet": "evicted",
    "DeletionByTaintManager": "node lost", "DeletionByPodGC": "node lost",
}  # fmt: skip


def _container(pod: Manifest) -> dict[str, Any]:
    """The state of the pod's container: one of waiting, running and terminated."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or [{}]
    return dict(statuses[0].get("state") or {})


def _index(pod: Manifest) -> int:
    """Which of a Job's pods it is."""
    return int((pod["metadata"].get("annotations") or {}).get("batch.kubernetes.io/job-completion-index", 0))


def is_running(pod: Manifest) -> bool:
    return "running" in _container(pod)


def is_terminated(pod: Manifest) -> bool:
    return "terminated" in _container(pod)


def told_by(pod: Manifest, silo: str) -> End | None:
    """The status that the silo left in its pod, if it is one and its own."""
    message = (_container(pod).get("terminated") or {}).get("message") or ""
    try:
        whose, status, reason = parse_status(message)
    except RefusedError:
        return None
    return End(status, reason) if whose == silo else None


def why_failed(pod: Manifest) -> str:
    status = pod.get("status") or {}
    if (_container(pod).get("terminated") or {}).get("reason") == "OOMKilled":
        return "out of memory"
    for condition in status.get("conditions") or []:
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            return DISRUPTED.get(condition.get("reason", ""), "")
    return {"Evicted": "evicted", "NodeLost": "node lost", "Preempting": "preempted"}.get(status.get("reason", ""), "")


def why_pending(pod: Manifest) -> str:
    """Why a pod does not start: the class of the scheduler's reason, never its text, which names nodes."""
    waiting = _container(pod).get("waiting") or {}
    if waiting.get("reason") in NO_IMAGE_REASONS:
        return NO_IMAGE
    if waiting.get("reason") == "CreateContainerConfigError":
        return "Secret or ConfigMap missing"
    for condition in (pod.get("status") or {}).get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"unschedulable: {_scheduling(str(condition.get('message', '')))}"
    return ""


def _scheduling(message: str) -> str:
    if match := re.search(r"Insufficient ([a-z0-9./-]{0,60}[a-z0-9])", message):
        return f"insufficient {match[1].replace('/', '_')}"
    classes = {"untolerated taint": "taint", "affinity/selector": "node selector", "volume": "volume", "persistentvolumeclaim": "volume"}
    return next((name for words, name in classes.items() if words in message.lower()), "other")


def verdict(condition: dict[str, Any], pods: list[Manifest], silo: str) -> End:
    """How a Job with this condition ended.

    Args:
        pods: those of the Job that may be seen; without any, the reason is coarser.
    """
    pods = sorted(pods, key=_index)  # the first of several nodes speaks for all
    tellings = [t for p in pods if (t := told_by(p, silo))]
    if condition["type"] == "Complete":
        return tellings[0] if tellings else End("ok")
    end = failure(condition)
    if end.status == "late" and (waiting := [p for p in pods if not is_running(p) and not is_terminated(p)]):
        return End("late", pending(waiting))
    # Of several nodes, one that has ended well, or only for the loss of another, does not say why.
    if told := next((t for t in tellings if t.status != "ok" and t.reason != NodeLost.REASON), None):
        return told
    reasons = [why for p in pods if (why := why_failed(p))]
    finer = next((why for why in reasons if why == "out of memory"), next(iter(reasons), ""))
    return End("failed", finer) if finer and end.status == "failed" else end


def pending(pods: list[Manifest]) -> str:
    """Why a Job has not started."""
    return next((why for p in pods if (why := why_pending(p))), NEVER_STARTED)
