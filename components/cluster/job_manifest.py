"""A silo's work as a Kubernetes Job, written down: what a placement asks of the cluster, in the one shape that a silo admits.

The shape is pinned by the silo's own admission policy (``k8s/base/silo/admission.yaml``): one container, ``python -m
silotune.components.silo_job BOX FILE SILO [TURN] [until:TIME]``, an image by digest, the silo's claim at /silo, its signing key at /keys, its
copy of the federation file at /federation, no account token, a read-only root, a deadline, one try. Nothing else that a coordinator could
choose reaches the silo's records.

A Job's name follows from federation, silo, box and turn, so that whoever launches the same work a second time finds the first one. The time
``until`` which the silo may work, in Unix seconds, is no part of it: a Job that is found keeps the time it was made with.

Only the train box uses more than one GPU or pod. On several nodes it is an Indexed Job: pod 0 is found under the name of the headless Service
`SERVICE`, which the silo has set up, and what torchrun would say stands in its environment (see `nodes`).
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any

from silotune.components.errors import FederationError
from silotune.components.federation import Federation, Silo, canonical_json
from silotune.components.protocol import Turn
from silotune.components.store.object_store import OWN
from silotune.components.terms.placement import Claim, Placement, SecretUse

FEDERATION_FILE = "/federation/federation.yaml"
COMMAND = ["python", "-m", "silotune.components.silo_job"]
CONTAINER = "silo"
ACCOUNT = "silotune-silo"  # has no rights, and its token is in no pod
CONFIG_MAP = "silotune-federation"
CLAIMS = [Claim(claim="silotune-silo", mount="/silo")]
KEYS = {"AWS_ACCESS_KEY_ID": "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY": "AWS_SECRET_ACCESS_KEY"}
SECRETS = [SecretUse(name="silotune-keys", mount="/keys"), SecretUse(name="silotune-s3", env=KEYS)]
# Of buckets of the silo's own, for its records and its ledger, where they are not reached as the store is; the Secret need not be there.
OWN_S3 = SecretUse(name="silotune-own-s3", env={OWN + name: key for name, key in KEYS.items()})
# ConfigMap of the silo that says where the store is, and where such buckets are.
STORE = ("silotune-store", ("AWS_ENDPOINT_URL", "AWS_REGION"))
OWN_STORE = tuple(OWN + key for key in STORE[1])
# And, in the same ConfigMap, how the store is reached in a network with proxies and an authority of its own, whose file lies in `AUTHORITY`.
WAY = ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")
AUTHORITY = ("silotune-ca", "/ca")  # ConfigMap, which need not be there, and its folder
SERVICE = "silotune-nodes"  # headless, of the silo: gives the pods of a training on several nodes their names
USER = 1000
MEMORY = "4Gi"  # where the placement says nothing: a silo admits no Job without a limit
MARGIN = 60  # seconds that a Job may live past the round's deadline, to start and to say that it was late
LONGEST = 86_400  # seconds a Job may take where the federation has no deadline; also the most that a silo admits by default
KEPT = 1_800  # seconds a finished Job can be looked at, by its silo and by a launcher that was away

Manifest = dict[str, Any]


def longest(federation: Federation) -> int:
    """Seconds from its creation after which a Job is ended, Pending included."""
    deadline = federation.deadline_seconds
    return LONGEST if deadline is None else math.ceil(deadline) + MARGIN


def require_possible(silo: Silo) -> None:
    """Raises FederationError, with every problem, where a silo's placement cannot become a Job."""
    p, where = silo.placement, f"silo {silo.id!r}: placement"
    problems = []
    if not p.namespace:
        problems.append(f"{where}.namespace: is required with launcher: job; give the silo's own namespace")
    if p.image is None or not re.fullmatch(r"[a-z0-9./:_-]+@sha256:[0-9a-f]{64}", p.image):
        problems.append(f"{where}.image: must name an image by digest, registry/name@sha256:…, got {p.image!r}; a tag can be moved")
    if problems:
        raise FederationError("\n".join(problems))


def one_pod(silo: Silo) -> list[str]:
    """What a placement asks for that a pipeline's own task, which is one pod, cannot give."""
    p, where, cure = silo.placement, f"silo {silo.id!r}: placement", "use launcher: job, or leave it out"
    problems = []
    if p.nodes > 1:
        problems.append(f"{where}.nodes: must be 1 with launcher: pod, where a task is one pod, got {p.nodes}; {cure}")
    if p.trainer != "job":
        problems.append(f"{where}.trainer: must be job with launcher: pod, where the task itself trains, got {p.trainer!r}; {cure}")
    return problems


def job_name(federation: str, silo: str, box: str, turn_text: str) -> str:
    """At most 63 characters; the same for the same work, another one for any other."""
    turn = Turn.parse(turn_text) if turn_text else Turn()
    digest = hashlib.sha256(canonical_json([federation, silo, box, turn_text])).hexdigest()[:10]
    words = f"{federation[:14]}-{silo[:14]}-{box}" + (f"-r{turn.round}a{turn.attempt}" if turn.round else "")
    return f"{words[:52].rstrip('-')}-{digest}"


def labels(federation: str, silo: str, box: str, turn_text: str) -> dict[str, str]:
    """On the Job and on its pod; the silo's network policies go by ``app.kubernetes.io/component``."""
    turn = Turn.parse(turn_text) if turn_text else Turn()
    return {
        "app.kubernetes.io/name": "silotune",
        "app.kubernetes.io/component": "silo-job",
        "app.kubernetes.io/managed-by": "silotune",
        "silotune.dev/federation": federation,
        "silotune.dev/silo": silo,
        "silotune.dev/box": box,
        "silotune.dev/round": str(turn.round),
        "silotune.dev/attempt": str(turn.attempt),
    }


def job_of(federation: Federation, silo_id: str, box: str, turn_text: str = "", until: int | None = None) -> Manifest:
    """The Job of one box of one silo in one turn, ready to be created.

    Args:
        until: Unix time in seconds at which the silo's time for it is over, Pending included.

    Raises:
        FederationError: the silo's placement cannot become one.
    """
    silo = federation.silo(silo_id)
    require_possible(silo)
    p, name = silo.placement, job_name(federation.name, silo_id, box, turn_text)
    marks = labels(federation.name, silo_id, box, turn_text)
    gpus, nodes = share(p, box)
    pod = pod_of(p, gpus)
    pod["containers"][0] |= {"args": words(box, silo_id, turn_text, until)}
    pod["containers"][0]["env"] += [{"name": n, "value": v} for n, v in _together(name, gpus, nodes).items()]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": p.namespace, "labels": marks, "annotations": {"silotune.dev/turn": turn_text}},
        "spec": {
            "completions": nodes,
            "parallelism": nodes,
            **({"completionMode": "Indexed"} if nodes > 1 else {}),
            "backoffLimit": 0,  # another try is another attempt, which the coordinator opens
            "activeDeadlineSeconds": longest(federation),
            "ttlSecondsAfterFinished": KEPT,
            "podFailurePolicy": {"rules": rules(CONTAINER)},
            "template": {"metadata": {"labels": marks}, "spec": pod | ({"subdomain": SERVICE} if nodes > 1 else {})},
        },
    }


WITHOUT_GPU = ("share", "mask", "confirm", "unmask")  # the boxes of a secure sum


def share(p: Placement, box: str) -> tuple[int, int]:
    """(GPUs per pod, pods) of a box: one process on one GPU does all but training, and no GPU is of use to a secure sum."""
    if box in WITHOUT_GPU:
        return 0, 1
    return (p.gpus, p.nodes) if box == "train" else (min(p.gpus, 1), 1)


def words(box: str, silo_id: str, turn_text: str, until: int | None) -> list[str]:
    """The arguments of `COMMAND`."""
    return [box, FEDERATION_FILE, silo_id, *([turn_text] if turn_text else []), *([] if until is None else [f"until:{until}"])]


def _together(name: str, gpus: int, nodes: int) -> dict[str, str]:
    """What torchrun would tell each pod; which one it is, the Job's controller says (JOB_COMPLETION_INDEX)."""
    processes = {"PET_NPROC_PER_NODE": str(gpus)} if gpus > 1 else {}
    return processes | ({"PET_NNODES": str(nodes), "PET_MASTER_ADDR": f"{name}-0.{SERVICE}"} if nodes > 1 else {})


def rules(container: str) -> list[dict[str, Any]]:
    """Makes the Job's own condition say how its pod failed, for a launcher that may not see pods: which of the two, and the exit code. The end
    of one of several pods ends all.
    """
    return [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": container, "operator": "NotIn", "values": [0]}},
    ]


def pod_of(p: Placement, gpus: int, container: str = CONTAINER) -> dict[str, Any]:
    """The pod, but for its arguments."""
    volumes, mounts = _storage(p)
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "serviceAccountName": p.service_account or ACCOUNT,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",  # else every start walks through all of the silo's storage
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": container,
                "image": p.image,
                "command": COMMAND,
                "env": _environment(p),
                "resources": resources(p, gpus),
                "volumeMounts": mounts,
                "terminationMessagePolicy": "File",
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
            }
        ],
        "volumes": volumes,
    }
    wishes = {
        "nodeSelector": p.node_selector,
        "tolerations": [t.model_dump(exclude_none=True) for t in p.tolerations],
        "affinity": p.affinity,
        "runtimeClassName": p.runtime_class,
        "priorityClassName": p.priority_class,
    }
    return pod | {name: wish for name, wish in wishes.items() if wish}


def _environment(p: Placement) -> list[dict[str, Any]]:
    secrets = p.secrets or SECRETS
    fixed = {"HOME": "/tmp/home", "HF_HUB_OFFLINE": "1"}  # noqa: S108 (the container's own, an empty folder)
    if any(s.mount == "/keys" for s in secrets):
        fixed["SILOTUNE_KEYS"] = "/keys"
    if p.cpu:
        fixed["OMP_NUM_THREADS"] = str(whole_cpus(p.cpu))
    name, keys = STORE
    return [
        *({"name": n, "value": v} for n, v in fixed.items()),
        *({"name": n, "valueFrom": {"secretKeyRef": {"name": s.name, "key": k}}} for s in secrets for n, k in s.env.items()),
        *({"name": n, "valueFrom": {"secretKeyRef": {"name": OWN_S3.name, "key": k, "optional": True}}} for n, k in OWN_S3.env.items()),
        *({"name": k, "valueFrom": {"configMapKeyRef": {"name": name, "key": k, "optional": True}}} for k in (*keys, *OWN_STORE, *WAY)),
    ]


def whole_cpus(quantity: str) -> int:
    """Threads that fit: ``500m`` is 1, ``4`` is 4, ``2500m`` is 2."""
    cpus = float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(re.sub(r"[A-Za-z]+$", "", quantity))
    return max(1, int(cpus))


def resources(p: Placement, gpus: int) -> dict[str, Any]:
    """Requests and limits of one pod."""
    memory = {"memory": p.memory or MEMORY} | ({"ephemeral-storage": p.ephemeral_storage} if p.ephemeral_storage else {})
    devices = {p.gpu_type: str(gpus)} if gpus else {}
    return {"requests": memory | ({"cpu": p.cpu} if p.cpu else {}) | devices, "limits": memory | devices}


def _storage(p: Placement) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(volumes, mounts); a volume bears the name of its folder, as the silo's policy wants it."""
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []

    def add(folder: str, source: dict[str, Any], *, read_only: bool, name: str = "") -> None:
        name = name or re.sub(r"[^a-z0-9]+", "-", folder.lower()).strip("-")[:63]
        volumes.append({"name": name, **source})
        mounts.append({"name": name, "mountPath": folder} | ({"readOnly": True} if read_only else {}))

    for c in p.claims or CLAIMS:
        add(c.mount, {"persistentVolumeClaim": {"claimName": c.claim}}, read_only=c.read_only)
    for s in p.secrets or SECRETS:
        if s.mount:
            add(s.mount, {"secret": {"secretName": s.name, "defaultMode": 0o440}}, read_only=True)
    add("/federation", {"configMap": {"name": p.config_map or CONFIG_MAP}}, read_only=True)
    name, folder = AUTHORITY
    add(folder, {"configMap": {"name": name, "optional": True}}, read_only=True)
    add("/tmp", {"emptyDir": {}}, read_only=False, name="scratch")  # noqa: S108
    add("/dev/shm", {"emptyDir": {"medium": "Memory"}}, read_only=False, name="shm")  # noqa: S108
    return volumes, mounts
