"""A strict stand-in for a silo's cluster: the part of a Kubernetes API server that Jobs and pods need, over real HTTP on a loopback port.

What comes in is checked as a server of version 1.33 checks it: paths, query words, tokens and their rights per namespace, media types, bodies
against Kubernetes' own OpenAPI schemas (unknown fields are errors), the rules between fields that a Job's validation has, quota, admission.
What goes out is checked against the same schemas. Objects have versions; watches stream them, with bookmarks, from a version on, or say 410.

`Cluster` also plays the Job controller and the kubelet: its verbs (`run`, `exit`, `disrupt`, …) move a Job's pods on, all of them or one by its
index, and the Job's conditions follow by its own podFailurePolicy, with the controller's texts
(kubernetes/pkg/controller/job/pod_failure_policy.go). ``faults`` spoil the next request of a kind, `away` takes the server down.

Where ``runtimes`` names the TrainingRuntime of a namespace, it plays Kubeflow Trainer and JobSet, too: a TrainJob becomes a Job of that runtime's
template, as their source has it (trainer/pkg/runtime/framework/plugins/{torch,jobset}, jobset/pkg/controllers/jobset_controller.go), and its
conditions follow those of the Job. TrainJobs are checked against ``trainjob_schema.yaml``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jsonschema
import kubernetes_validate
import yaml
from referencing import Registry, Resource

SCHEMAS = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / "v1.33.0-local-strict"
PATH = re.compile(
    r"(?:/apis/(?P<group>batch/v1|trainer\.kubeflow\.org/v1alpha1)|/api/v1)"
    r"/namespaces/(?P<namespace>[^/]+)/(?P<resource>jobs|pods|trainjobs)(?:/(?P<name>[^/]+))?"
)
GROUPS = {"jobs": "batch/v1", "trainjobs": "trainer.kubeflow.org/v1alpha1", "pods": None}
SCHEMA = {"jobs": "job-batch-v1", "trainjobs": "trainjob", "pods": "pod-v1"}
KINDS = {"jobs": ("JobList", "batch/v1"), "trainjobs": ("TrainJobList", GROUPS["trainjobs"]), "pods": ("PodList", "v1")}
QUERY = {
    "list": {"fieldSelector", "labelSelector", "limit"},
    "watch": {"fieldSelector", "labelSelector", "watch", "allowWatchBookmarks", "resourceVersion", "timeoutSeconds"},
    "create": {"fieldManager", "dryRun"},
    "delete": {"propagationPolicy", "gracePeriodSeconds"},
    "get": set(),
    "update": {"fieldManager"},
}
NAMES = {"jobs": "jobs.batch", "trainjobs": "trainjobs.trainer.kubeflow.org", "pods": "pods"}
DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9])?")
Thing = dict[str, Any]
Rights = dict[str, set[str]]  # resource -> verbs
ALL_JOB_VERBS = {"create", "get", "list", "watch", "delete"}


class Problem(Exception):
    """An answer other than success, as a Status."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        self.code = code
        self.status = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "code": code,
        }


@dataclass
class Fault:
    """Spoils one request: ``how`` is an HTTP code, ``cut`` (no answer), ``hang`` (for some seconds, then cut) or, for a watch, ``gone`` (410 in the
    stream), ``midline`` (half of the next event, then cut), ``short`` (ends well at once) and ``after`` (served, and the answer lost)."""

    verb: str
    how: str
    seconds: float = 0.0
    times: int = 1


@functools.cache
def _validator(kind: str) -> Any:
    if kind in ("trainjob", "trainingruntime"):
        text = (Path(__file__).parent / "trainjob_schema.yaml").read_text()
        return jsonschema.Draft202012Validator(yaml.safe_load(text)[kind])
    schema, definitions = (json.loads((SCHEMAS / f"{name}.json").read_text()) for name in (kind, "_definitions"))
    registry = Resource.from_contents(definitions) @ (Resource.from_contents(schema) @ Registry())
    return jsonschema.Draft202012Validator(schema, registry=registry)


def schema_error(thing: Thing, kind: str) -> str:
    """What is wrong with an object of a kind such as ``job-batch-v1``; empty if nothing is."""
    error = next(iter(sorted(_validator(kind).iter_errors(thing), key=lambda e: -len(e.path))), None)
    return f"{'.'.join(map(str, error.path))}: {error.message[:200]}" if error else ""


@dataclass
class Cluster:
    """The cluster. ``rights`` are by token, then namespace."""

    rights: dict[str, dict[str, Rights]]
    namespaces: set[str]
    quota: int | None = None  # of Jobs in a namespace, finished ones included
    admission: Callable[[Thing], str | tuple[int, str]] = lambda job: ""  # message of a denial, or (code, text) of a webhook's
    runtimes: dict[str, Thing] = field(default_factory=dict)  # namespace -> its TrainingRuntime
    course: list[tuple[float, str, dict[str, Any]]] = field(
        default_factory=list
    )  # what happens to a Job: seconds after the last, verb, arguments
    skew: float = 0.0  # seconds that the server's clock is ahead
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)  # (verb, resource) in order
    violations: list[str] = field(default_factory=list)  # what no correct client sends

    def __post_init__(self) -> None:
        self.things: dict[tuple[str, str, str], Thing] = {}  # (resource, namespace, name)
        self.history: list[tuple[int, str, str, Thing]] = []  # (version, resource, type, object)
        self.version, self.floor, self.epoch, self.back_at = 1000, 0, 0, 0.0
        self.changed = threading.Condition()
        cluster = self

        class Handler(_Handler):
            pass

        Handler.cluster = cluster
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        with self.changed:
            self.epoch += 1
            self.changed.notify_all()
        self.server.shutdown()
        self.server.server_close()

    def kubeconfig(self, path: Path, token: str) -> Path:
        entry = {"cluster": {"server": self.url}, "name": "silo"}
        user = {"user": {"token": token}, "name": "launcher"}
        context = {"context": {"cluster": "silo", "user": "launcher"}, "name": "silo"}
        whole = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [entry],
            "users": [user],
            "contexts": [context],
            "current-context": "silo",
        }
        scratch = path.with_name(f"{path.name}.{threading.get_ident()}")
        scratch.write_text(json.dumps(whole))
        return scratch.replace(path)  # at once, as a mounted Secret changes

    # What a person or the network does

    def away(self, seconds: float) -> None:
        """The server answers nothing for a while, and what is open breaks."""
        with self.changed:
            self.back_at = time.monotonic() + seconds
            self.epoch += 1
            self.changed.notify_all()

    def cut_watches(self) -> None:
        with self.changed:
            self.epoch += 1
            self.changed.notify_all()

    def compact(self) -> None:
        """Forget all versions before now: watches from them are 410."""
        with self.changed:
            self.floor = self.version = self.version + 1

    def jobs(self) -> list[Thing]:
        with self.changed:
            return [t for (resource, _, _), t in self.things.items() if resource == "jobs"]

    def erase(self, job: Thing) -> None:
        """Delete a Job and its pods, as a person does, or its ttl; of a TrainJob, all that was made of it."""
        with self.changed:
            name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
            if job["kind"] == "TrainJob":
                self._forget(("trainjobs", namespace, name))
                name = f"{name}-node-0"
            if (key := ("jobs", namespace, name)) in self.things:
                self._forget(key)
            for pod_key in [k for k, t in self.things.items() if k[0] == "pods" and t["metadata"]["labels"].get("job-name") == name]:
                self._forget(pod_key)

    # What the scheduler, the kubelet and the Job controller do

    def pending(
        self, job: Thing, message: str = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", index: int | None = None
    ) -> None:
        """The pod stands in the queue."""
        no = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        self._pods(job, index, {"phase": "Pending", "conditions": [no]})
        self._count(job)

    def waiting(self, job: Thing, reason: str = "ImagePullBackOff", index: int | None = None) -> None:
        """The pod has a node, and its container does not start."""
        state = {"waiting": {"reason": reason, "message": 'Back-off pulling image "registry.example/…"'}}
        self._pods(job, index, {"phase": "Pending", "conditions": [], "containerStatuses": [self._container(job, state)]})
        self._count(job)

    def run(self, job: Thing, index: int | None = None) -> None:
        state = {"running": {"startedAt": self.stamp()}}
        self._pods(job, index, {"phase": "Running", "conditions": [], "containerStatuses": [self._container(job, state)]})
        self._count(job)

    def exit(self, job: Thing, code: int = 0, reason: str = "", message: str = "", index: int | None = None) -> None:
        """The container ends by itself or is killed."""
        ended = {"exitCode": code, "reason": reason or ("Completed" if code == 0 else "Error")} | ({"message": message} if message else {})
        phase = "Failed" if code else "Succeeded"
        self._pods(job, index, {"phase": phase, "conditions": [], "containerStatuses": [self._container(job, {"terminated": ended})]})
        if code:
            return self._pod_failed(job, index or 0)
        if self._count(job) < job["spec"]["completions"]:
            return None
        text = {"reason": "CompletionsReached", "message": "Reached expected number of succeeded pods"}
        self._status(job, {"conditions": [self._condition("SuccessCriteriaMet", **text)]})
        self._status(
            job, {"completionTime": self.stamp(), "conditions": [self._condition(t, **text) for t in ("SuccessCriteriaMet", "Complete")]}
        )
        return None

    def disrupt(self, job: Thing, reason: str = "DeletionByTaintManager", index: int | None = None) -> None:
        """The pod is taken away: evicted, preempted, or its node is lost."""
        target = {"type": "DisruptionTarget", "status": "True", "reason": reason}
        self._pods(job, index, {"phase": "Failed", "conditions": [target]})
        self._pod_failed(job, index or 0)

    def exceed_deadline(self, job: Thing) -> None:
        self._fail(job, "DeadlineExceeded", "Job was active longer than specified deadline")

    def exceed_backoff(self, job: Thing) -> None:
        self._fail(job, "BackoffLimitExceeded", "Job has reached the specified backoff limit")

    def _pod_failed(self, job: Thing, index: int) -> None:
        """As matchPodFailurePolicy of the Job controller."""
        namespace, name = job["metadata"]["namespace"], pod_name(job, index)
        pod = self.things["pods", namespace, name]
        for number, rule in enumerate(job["spec"].get("podFailurePolicy", {}).get("rules", [])):
            if codes := rule.get("onExitCodes"):
                for c in pod["status"].get("containerStatuses", []):
                    code = c["state"].get("terminated", {}).get("exitCode", 0)
                    if (
                        code
                        and codes.get("containerName", c["name"]) == c["name"]
                        and (code in codes["values"]) == (codes["operator"] == "In")
                    ):
                        text = f"Container {c['name']} for pod {namespace}/{name} failed with exit code {code} matching FailJob rule at index {number}"
                        return self._fail(job, "PodFailurePolicy", text)
            for pattern in rule.get("onPodConditions", []):
                if any((c["type"], c["status"]) == (pattern["type"], pattern["status"]) for c in pod["status"].get("conditions", [])):
                    text = f"Pod {namespace}/{name} has condition {pattern['type']} matching FailJob rule at index {number}"
                    return self._fail(job, "PodFailurePolicy", text)
        return self.exceed_backoff(job)

    def _fail(self, job: Thing, reason: str, message: str) -> None:
        conditions = [self._condition(t, reason=reason, message=message) for t in ("FailureTarget", "Failed")]
        self._status(job, {"active": 1, "ready": 0, "conditions": conditions[:1]})
        self._status(job, {"active": 0, "ready": 0, "failed": 1, "conditions": conditions})

    def _condition(self, kind: str, **more: str) -> Thing:
        return {"type": kind, "status": "True", "lastProbeTime": self.stamp(), "lastTransitionTime": self.stamp(), **more}

    def _container(self, job: Thing, state: Thing) -> Thing:
        c = job["spec"]["template"]["spec"]["containers"][0]
        return {"name": c["name"], "image": c["image"], "imageID": "", "ready": "running" in state, "restartCount": 0, "state": state}

    def _status(self, job: Thing, status: Thing) -> None:
        with self.changed:
            if stored := self.things.get(("jobs", job["metadata"]["namespace"], job["metadata"]["name"])):
                self._mirror(self.put("jobs", stored | {"status": stored.get("status", {}) | status}, "MODIFIED"))

    def _count(self, job: Thing) -> int:
        """Put the numbers of a Job's pods into its status; returns how many have succeeded."""
        with self.changed:
            namespace = job["metadata"]["namespace"]
            pods = [self.things.get(("pods", namespace, pod_name(job, i))) for i in range(job["spec"]["completions"])]
            phases = [p["status"]["phase"] for p in pods if p]
            done = phases.count("Succeeded")
            self._status(
                job,
                {"active": len(phases) - done, "ready": phases.count("Running"), "succeeded": done, "startTime": self.stamp()},
            )  # fmt: skip
            return done

    def _mirror(self, job: Thing) -> None:
        """A TrainJob's status, as JobSet and Kubeflow Trainer derive it from that of its Job."""
        namespace, name = job["metadata"]["namespace"], job["metadata"]["name"].removesuffix("-node-0")
        trainjob = self.things.get(("trainjobs", namespace, name))
        if trainjob is None or job["metadata"]["name"] == name:
            return
        known, status = job["status"], dict(trainjob["status"])
        enough = known.get("ready", 0) + known.get("succeeded", 0) >= job["spec"]["completions"]
        over = {c["type"] for c in known.get("conditions", []) if c["status"] == "True"}
        counts = {"ready": enough, "succeeded": "Complete" in over, "failed": "Failed" in over, "active": known.get("active", 0) > 0}
        status["jobsStatus"] = [{"name": "node", "suspended": 0} | {k: int(v) for k, v in counts.items()}]
        said = {
            "Complete": ("AllJobsCompleted", "jobset completed successfully"),
            "Failed": ("FailedJobs", f"jobset failed due to one or more job failures (first failed job: {job['metadata']['name']})"),
        }
        status["conditions"] = [
            {"type": t, "status": "True", "reason": reason, "message": text, "lastTransitionTime": self.stamp()}
            for t, (reason, text) in said.items() if t in over
        ]  # fmt: skip
        self.put("trainjobs", trainjob | {"status": status}, "MODIFIED")

    def _pods(self, job: Thing, index: int | None, status: Thing) -> None:
        for i in range(job["spec"]["completions"]) if index is None else (index,):
            self._pod(job, i, status)

    def _pod(self, job: Thing, index: int, status: Thing) -> None:
        with self.changed:
            namespace, name = job["metadata"]["namespace"], pod_name(job, index)
            if ("jobs", namespace, job["metadata"]["name"]) not in self.things:
                return
            known = self.things.get(("pods", namespace, name))
            template = job["spec"]["template"]
            meta = {"name": name, "namespace": namespace, "uid": str(uuid.uuid4()), "labels": template["metadata"]["labels"]}
            if job["spec"].get("completionMode") == "Indexed":
                meta["annotations"] = {"batch.kubernetes.io/job-completion-index": str(index)}
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": known["metadata"] if known else meta,
                "spec": template["spec"],
                "status": status,
            }
            self.put("pods", pod, "MODIFIED" if known else "ADDED")

    # Storage

    def stamp(self) -> str:
        return datetime.fromtimestamp(time.time() + self.skew, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def put(self, resource: str, thing: Thing, kind: str) -> Thing:
        with self.changed:
            self.version += 1
            thing = thing | {"metadata": thing["metadata"] | {"resourceVersion": str(self.version)}}
            if error := schema_error(thing, SCHEMA[resource]):
                self.violations.append(f"the fake's own {resource[:-1]} is wrong: {error}")
            self.things[resource, thing["metadata"]["namespace"], thing["metadata"]["name"]] = thing
            self.history.append((self.version, resource, kind, thing))
            self.changed.notify_all()
            return thing

    def _forget(self, key: tuple[str, str, str]) -> None:
        self.version += 1
        thing = self.things.pop(key)
        thing = thing | {"metadata": thing["metadata"] | {"resourceVersion": str(self.version)}}
        self.history.append((self.version, key[0], "DELETED", thing))
        self.changed.notify_all()

    # Verbs of the API

    def create(self, namespace: str, body: Thing, resource: str = "jobs") -> Thing:
        if namespace not in self.namespaces:
            raise Problem(404, "NotFound", f'namespaces "{namespace}" not found')
        if resource == "trainjobs":
            return self._create_trainjob(namespace, body)
        if error := schema_error(body, "job-batch-v1"):
            self.violations.append(error)
            raise Problem(400, "BadRequest", f'Job in version "v1" cannot be handled as a Job: strict decoding error: {error}')
        name = body["metadata"].get("name", "")
        if body["metadata"].get("namespace", namespace) != namespace:
            raise Problem(400, "BadRequest", "the namespace of the provided object does not match the namespace sent on the request")
        if denied := self.admission(body):
            code, text = (422, denied) if isinstance(denied, str) else denied
            if code == 422:
                text = f"ValidatingAdmissionPolicy 'silotune-jobs' with binding 'silotune-jobs' denied request: {text}"
            raise Problem(code, {422: "Invalid", 403: "Forbidden"}.get(code, ""), f'jobs.batch "{name}" is forbidden: {text}')
        if wrong := invalid_job(body):
            raise Problem(422, "Invalid", f'Job.batch "{name}" is invalid: {"; ".join(wrong)}')
        with self.changed:
            used = sum(k[0] == "jobs" and k[1] == namespace for k in self.things)
            if ("jobs", namespace, name) in self.things:
                raise Problem(409, "AlreadyExists", f'jobs.batch "{name}" already exists')
            if self.quota is not None and used >= self.quota:
                what = f"requested: count/jobs.batch=1, used: count/jobs.batch={used}, limited: count/jobs.batch={self.quota}"
                raise Problem(403, "Forbidden", f'jobs.batch "{name}" is forbidden: exceeded quota: silotune, {what}')
            job = self.put("jobs", _with_defaults(body, namespace, self.stamp()), "ADDED")
        if self.course:
            threading.Thread(target=self._go, args=(job, list(self.course)), daemon=True).start()
        return job

    def _create_trainjob(self, namespace: str, body: Thing) -> Thing:
        if error := schema_error(body, "trainjob"):
            self.violations.append(error)
            raise Problem(400, "BadRequest", f'TrainJob in version "v1alpha1" cannot be handled as a TrainJob: {error}')
        name, reference = body["metadata"].get("name", ""), body["spec"]["runtimeRef"]
        what = f'trainjobs.trainer.kubeflow.org "{name}" is forbidden:'
        if denied := self.admission(body):
            policy = "ValidatingAdmissionPolicy 'silotune-trainjobs' with binding 'silotune-trainjobs' denied request:"
            raise Problem(422, "Invalid", f"{what} {policy} {denied}")
        runtime = self.runtimes.get(namespace)
        if not runtime or (reference.get("kind"), reference["name"]) != ("TrainingRuntime", runtime["metadata"]["name"]):
            webhook = 'admission webhook "validator.trainjob.trainer.kubeflow.org" denied the request:'
            raise Problem(403, "Forbidden", f"{webhook} spec.runtimeRef: Invalid value: not found: it must be created before the TrainJob")
        if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(f"{name}-node-0-0") > 63:
            raise Problem(422, "Invalid", f'TrainJob "{name}" is invalid: metadata.name must match RFC 1035 DNS label format')
        with self.changed:
            if ("trainjobs", namespace, name) in self.things:
                raise Problem(409, "AlreadyExists", f'trainjobs.trainer.kubeflow.org "{name}" already exists')
            meta = body["metadata"] | {"namespace": namespace, "uid": str(uuid.uuid4()), "creationTimestamp": self.stamp(), "generation": 1}
            spec = {"suspend": False, "managedBy": "trainer.kubeflow.org/trainjob-controller"} | body["spec"]
            made = self.put("trainjobs", body | {"metadata": meta, "spec": spec, "status": {}}, "ADDED")
            job = self.put("jobs", _with_defaults(jobset_job(made, runtime), namespace, self.stamp()), "ADDED")
        if wrong := invalid_job(job):
            self.violations.append(f"the Job of a TrainJob is invalid: {'; '.join(wrong)}")
        if self.course:
            threading.Thread(target=self._go, args=(job, list(self.course)), daemon=True).start()
        return made

    def suspend(self, job: Thing) -> None:
        """A queue keeps the TrainJob of this Job back."""
        with self.changed:
            key = ("trainjobs", job["metadata"]["namespace"], job["metadata"]["name"].removesuffix("-node-0"))
            held = {"type": "Suspended", "status": "True", "reason": "Suspended", "message": "TrainJob is suspended"}
            self.put("trainjobs", self.things[key] | {"status": {"conditions": [held | {"lastTransitionTime": self.stamp()}]}}, "MODIFIED")

    def _go(self, job: Thing, course: list[tuple[float, str, dict[str, Any]]]) -> None:
        for seconds, verb, arguments in course:
            time.sleep(seconds)
            getattr(self, verb)(job, **arguments)

    def delete(self, namespace: str, name: str, options: Thing, resource: str = "jobs") -> Thing:
        if options and (error := schema_error(options, "deleteoptions-meta-v1")):
            self.violations.append(error)
            raise Problem(400, "BadRequest", error)
        with self.changed:
            job = self._found(resource, namespace, name)
            for what, wanted in (options.get("preconditions") or {}).items():
                if job["metadata"][what] != wanted:
                    text = f'Operation cannot be fulfilled on jobs.batch "{name}": Precondition failed: {what} in precondition: {wanted}'
                    raise Problem(409, "Conflict", text)
            if options.get("propagationPolicy") not in ("Background", "Foreground"):
                self.violations.append("a Job deleted without propagationPolicy leaves its pod running")
            self.erase(job)
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Success",
            "details": {"name": name, "uid": job["metadata"]["uid"]},
        }

    def update(self, namespace: str, name: str, body: Thing) -> Thing:
        with self.changed:
            job = self._found("jobs", namespace, name)
            if body["metadata"].get("resourceVersion") not in (None, job["metadata"]["resourceVersion"]):
                raise Problem(409, "Conflict", f'Operation cannot be fulfilled on jobs.batch "{name}": the object has been modified')
            if body["spec"]["template"] != job["spec"]["template"]:
                raise Problem(422, "Invalid", f'Job.batch "{name}" is invalid: spec.template: field is immutable')
            return self.put("jobs", job | {"metadata": job["metadata"] | {"labels": body["metadata"].get("labels", {})}}, "MODIFIED")

    def get(self, resource: str, namespace: str, name: str) -> Thing:
        with self.changed:
            return self._found(resource, namespace, name)

    def _found(self, resource: str, namespace: str, name: str) -> Thing:
        if (thing := self.things.get((resource, namespace, name))) is None:
            raise Problem(404, "NotFound", f'{NAMES[resource]} "{name}" not found')
        return thing

    def list(self, resource: str, namespace: str, query: dict[str, str]) -> Thing:
        chosen = selector(query)
        with self.changed:
            items = [t for (r, n, _), t in self.things.items() if (r, n) == (resource, namespace) and chosen(t)]
            bare = [{k: v for k, v in t.items() if k not in ("kind", "apiVersion")} for t in items]  # as a server does
            kind, group = KINDS[resource]
            return {"kind": kind, "apiVersion": group, "metadata": {"resourceVersion": str(self.version)}, "items": bare}


def _with_defaults(body: Thing, namespace: str, stamp: str) -> Thing:
    """What the server adds to a new Job."""
    uid, name = str(uuid.uuid4()), body["metadata"]["name"]
    marks = {"batch.kubernetes.io/controller-uid": uid, "batch.kubernetes.io/job-name": name, "controller-uid": uid, "job-name": name}
    template = body["spec"]["template"]
    template = template | {"metadata": template.get("metadata", {}) | {"labels": template.get("metadata", {}).get("labels", {}) | marks}}
    meta = body["metadata"] | {"namespace": namespace, "uid": uid, "creationTimestamp": stamp, "generation": 1}
    defaults = {"completionMode": "NonIndexed", "suspend": False, "podReplacementPolicy": "Failed", "backoffLimit": 6}
    selector = {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}
    return body | {"metadata": meta, "spec": defaults | body["spec"] | {"template": template, "selector": selector}, "status": {}}


def pod_name(job: Thing, index: int) -> str:
    of_several = job["spec"].get("completionMode") == "Indexed"
    return f"{job['metadata']['name']}-{index}-x7k2p" if of_several else f"{job['metadata']['name']}-x7k2p"


def jobset_job(trainjob: Thing, runtime: Thing) -> Thing:
    """The Job that becomes of a TrainJob with a runtime of one replicated Job, ``node``, and the torch policy."""
    trainer, name = trainjob["spec"].get("trainer", {}), trainjob["metadata"]["name"]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    template = json.loads(json.dumps(replicated["template"]))
    spec, child = template["spec"], f"{name}-node-0"
    nodes = trainer.get("numNodes", runtime["spec"]["mlPolicy"].get("numNodes", 1))
    (container,) = spec["template"]["spec"]["containers"]
    container |= {k: trainer[k] for k in ("image", "command", "args") if k in trainer}
    container["resources"] = trainer.get("resourcesPerNode", container.get("resources", {}))
    rank = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    told = {
        "PET_NNODES": {"value": str(nodes)}, "PET_NPROC_PER_NODE": {"value": str(trainer.get("numProcPerNode", "auto"))},
        "PET_NODE_RANK": {"valueFrom": rank}, "PET_MASTER_ADDR": {"value": f"{child}-0.{name}"}, "PET_MASTER_PORT": {"value": "29400"},
    }  # fmt: skip
    mine = trainer.get("env", [])
    container["env"] = [*container.get("env", []), *mine, *({"name": n, **how} for n, how in told.items())]
    container["ports"] = [{"containerPort": 29400, "protocol": "TCP"}]
    marks = {
        "jobset.sigs.k8s.io/jobset-name": name, "jobset.sigs.k8s.io/replicatedjob-name": "node", "jobset.sigs.k8s.io/restart-attempt": "0",
        "jobset.sigs.k8s.io/replicatedjob-replicas": "1", "jobset.sigs.k8s.io/global-replicas": "1", "jobset.sigs.k8s.io/job-index": "0",
        "jobset.sigs.k8s.io/job-key": "ab12", "jobset.sigs.k8s.io/job-global-index": "0", "jobset.sigs.k8s.io/jobset-uid": str(uuid.uuid4()),
    }  # fmt: skip
    meta = spec["template"].setdefault("metadata", {})
    meta |= {"labels": meta.get("labels", {}) | marks, "annotations": meta.get("annotations", {}) | marks}
    spec["template"]["spec"]["subdomain"] = name
    spec |= {"completions": nodes, "parallelism": nodes, "completionMode": "Indexed", "suspend": False}
    owner = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "name": name, "uid": marks["jobset.sigs.k8s.io/jobset-uid"]}
    head = {
        "name": child, "namespace": trainjob["metadata"]["namespace"], "labels": template.get("metadata", {}).get("labels", {}) | marks,
        "annotations": marks, "ownerReferences": [owner | {"controller": True, "blockOwnerDeletion": True}],
    }  # fmt: skip
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": head, "spec": spec}


def invalid_job(job: Thing) -> list[str]:
    """Rules of a Job's validation that its schema cannot say."""
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    wrong = []
    if not DNS_LABEL.fullmatch(job["metadata"].get("name", "")):
        wrong.append("metadata.name: Invalid value: must be no more than 63 characters of a-z, 0-9 and -")
    if pod.get("restartPolicy") not in ("Never", "OnFailure"):
        wrong.append('spec.template.spec.restartPolicy: Required value: valid values: "OnFailure", "Never"')
    if spec.get("completionMode") == "Indexed" and len(f"{job['metadata'].get('name', '')}-{spec['completions'] - 1}") > 63:
        wrong.append("metadata.name: Invalid value: will not able to create pod with invalid DNS label")
    if (spec.get("completions", 1) > 1 or pod.get("subdomain")) and spec.get("completionMode") != "Indexed":
        wrong.append("spec.completionMode: pods of a NonIndexed Job have no host names")  # the fake's own: nothing could find pod 0
    if spec.get("podFailurePolicy") and pod.get("restartPolicy") != "Never":
        wrong.append('spec.template.spec.restartPolicy: Invalid value: only "Never" is supported when podFailurePolicy is specified')
    for where, labels in (
        ("metadata", job["metadata"].get("labels", {})),
        ("spec.template", spec["template"].get("metadata", {}).get("labels", {})),
    ):
        wrong += [f"{where}.labels: Invalid value: {v!r}" for v in labels.values() if not LABEL_VALUE.fullmatch(v)]
    containers = {c["name"] for c in pod["containers"]}
    for rule in spec.get("podFailurePolicy", {}).get("rules", []):
        codes = rule.get("onExitCodes")
        if bool(codes) == bool(rule.get("onPodConditions")):
            wrong.append("spec.podFailurePolicy.rules: Invalid value: specifying one of OnExitCodes and OnPodConditions is required")
        elif codes and (codes["values"] != sorted(set(codes["values"])) or (codes["operator"] == "In" and 0 in codes["values"])):
            wrong.append(
                "spec.podFailurePolicy.rules.onExitCodes.values: Invalid value: must be ordered, and not hold 0 for the In operator"
            )
        elif codes and codes.get("containerName", next(iter(containers))) not in containers:
            wrong.append("spec.podFailurePolicy.rules.onExitCodes.containerName: Invalid value: must be one of the containers")
    volumes = [v["name"] for v in pod.get("volumes", [])]
    wrong += [f"spec.template.spec.volumes: Duplicate value: {v}" for v in set(volumes) if volumes.count(v) > 1]
    wrong += [f"spec.template.spec.volumes.name: Invalid value: {v!r}" for v in volumes if not DNS_LABEL.fullmatch(v)]
    for c in pod["containers"]:
        paths = [m["mountPath"] for m in c.get("volumeMounts", [])]
        wrong += [f"volumeMounts.name: Not found: {m['name']}" for m in c.get("volumeMounts", []) if m["name"] not in volumes]
        wrong += [f"volumeMounts.mountPath: must be unique: {p}" for p in set(paths) if paths.count(p) > 1]
        limits, requests = c.get("resources", {}).get("limits", {}), c.get("resources", {}).get("requests", {})
        wrong += [f"resources.requests: must be equal to {k} limit" for k in requests if "/" in k and requests[k] != limits.get(k)]
    return wrong


def selector(query: dict[str, str]) -> Callable[[Thing], bool]:
    """What a field selector on the name and a label selector of equalities let through."""
    tests = []
    if fields := query.get("fieldSelector"):
        name, _, value = fields.partition("=")
        if name not in ("metadata.name", "metadata.namespace") or not value:
            raise Problem(400, "BadRequest", f'field label not supported: "{name}"')
        tests.append(lambda t: t["metadata"][name.split(".")[1]] == value)
    for pair in filter(None, query.get("labelSelector", "").split(",")):
        label, _, wanted = pair.partition("=")
        wanted = wanted.removeprefix("=")
        tests.append(lambda t, label=label, wanted=wanted: t["metadata"].get("labels", {}).get(label) == wanted)
    return lambda thing: all(test(thing) for test in tests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the tests look at ``requests``."""

    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate(time.time() + self.cluster.skew, usegmt=True)

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_DELETE = do_PUT = do_PATCH = do_GET  # noqa: N815

    def _serve(self) -> None:
        cluster = self.cluster
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if time.monotonic() < cluster.back_at:
            return self._cut()
        try:
            self._answer(200 if self.command != "POST" else 201, self._do(body))
        except Problem as problem:
            self._answer(problem.code, problem.status)
        except _Cut:
            self._cut()
        except _Done:
            pass
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        return None

    def _do(self, raw: bytes) -> Thing:
        cluster, url = self.cluster, urlsplit(self.path)
        query = {k: v[-1] for k, v in parse_qs(url.query).items()}
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in cluster.rights:
            raise Problem(401, "Unauthorized", "Unauthorized")
        found = PATH.fullmatch(url.path)
        if not found or found["group"] != GROUPS[found["resource"]]:
            cluster.violations.append(f"{self.command} {url.path}")
            raise Problem(404, "NotFound", "the server could not find the requested resource")
        namespace, resource, name = found["namespace"], found["resource"], found["name"]
        watching = query.get("watch", "").lower() in ("true", "1")
        verbs = {
            "GET": "get" if name else "watch" if watching else "list",
            "POST": "create",
            "DELETE": "delete",
            "PUT": "update",
            "PATCH": "patch",
        }
        verb = verbs[self.command]
        cluster.requests.append((verb, resource))
        if verb not in cluster.rights[token].get(namespace, {}).get(resource, set()):
            group = NAMES[resource].partition(".")[2]
            text = f'cannot {verb} resource "{resource}" in API group "{group}" in the namespace "{namespace}"'
            user = "system:serviceaccount:silotune:silotune-launcher"
            raise Problem(403, "Forbidden", f'{NAMES[resource]} is forbidden: User "{user}" {text}')
        if odd := set(query) - QUERY.get(verb, set()):
            cluster.violations.append(f"{verb} with {', '.join(sorted(odd))}")
            raise Problem(400, "BadRequest", f"unknown query parameters: {odd}")
        if raw and self.headers.get_content_type() != "application/json":
            raise Problem(415, "UnsupportedMediaType", "the body of the request was in an unknown format")
        try:
            body = json.loads(raw) if raw else {}
        except ValueError:
            raise Problem(400, "BadRequest", "the object provided is unrecognized") from None
        fault = self._fault(verb)
        if verb == "watch":
            self._watch(resource, namespace, query, fault)
        if verb == "list":
            return cluster.list(resource, namespace, query)
        if verb == "get":
            return cluster.get(resource, namespace, name)
        if resource == "pods" or verb == "patch" or (resource, verb) == ("trainjobs", "update"):
            raise Problem(405, "MethodNotAllowed", "the fake has it for Jobs only")
        act = {"create": lambda: cluster.create(namespace, body, resource), "delete": lambda: cluster.delete(namespace, name, body, resource),
               "update": lambda: cluster.update(namespace, name, body)}[verb]  # fmt: skip
        answer = act()
        if fault == "after":
            raise _Cut
        return answer

    def _fault(self, verb: str) -> str:
        """Suffers the next fault meant for this verb; returns one that has to be suffered later."""
        cluster = self.cluster
        with cluster.changed:
            fault = next((f for f in cluster.faults if f.verb in (verb, "any")), None)
            if fault is None:
                return ""
            fault.times -= 1
            if fault.times == 0:
                cluster.faults.remove(fault)
        if fault.how == "hang":
            time.sleep(fault.seconds)
        if fault.how in ("cut", "hang"):
            raise _Cut
        if fault.how.isdigit():
            reason = {"429": "TooManyRequests", "500": "InternalError", "503": "ServiceUnavailable", "504": "Timeout"}.get(fault.how, "")
            raise Problem(int(fault.how), reason, "the fake was told to say so")
        return fault.how

    def _watch(self, resource: str, namespace: str, query: dict[str, str], fault: str) -> None:
        cluster, chosen = self.cluster, selector(query)
        at = int(query.get("resourceVersion") or cluster.version)
        end = time.monotonic() + int(query.get("timeoutSeconds") or 1800)
        bookmarks = query.get("allowWatchBookmarks", "").lower() in ("true", "1")
        epoch = cluster.epoch
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if fault == "gone" or at < cluster.floor:
            gone = Problem(410, "Expired", f"too old resource version: {at} ({cluster.floor})").status
            self._chunk(json.dumps({"type": "ERROR", "object": gone}) + "\n")
            end = 0
        if fault == "short":
            end = 0
        marked = time.monotonic()
        while True:
            with cluster.changed:
                news = [] if end == 0 else [h for h in cluster.history if h[0] > at and h[1] == resource]
                if not news and cluster.epoch == epoch and (left := end - time.monotonic()) > 0:
                    cluster.changed.wait(min(left, 0.2))
            if cluster.epoch != epoch:
                raise _Cut
            for version, _, kind, thing in news:
                at = version
                if thing["metadata"]["namespace"] == namespace and chosen(thing):
                    line = json.dumps({"type": kind, "object": thing}) + "\n"
                    if fault == "midline":
                        self._chunk(line[: len(line) // 2])
                        raise _Cut
                    self._chunk(line)
            if bookmarks and time.monotonic() - marked > 0.2:
                marked = time.monotonic()
                kind, version = KINDS[resource]
                mark = {"kind": kind[:-4], "apiVersion": version, "metadata": {"resourceVersion": str(at)}, "spec": {"template": {}}}
                self._chunk(json.dumps({"type": "BOOKMARK", "object": mark}) + "\n")
            if not news and time.monotonic() >= end:
                break
        self.wfile.write(b"0\r\n\r\n")
        raise _Done

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _answer(self, code: int, thing: Thing) -> None:
        data = json.dumps(thing).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class _Cut(Exception):
    """The connection breaks here."""


class _Done(Exception):
    """The answer has been streamed."""
