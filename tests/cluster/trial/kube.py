"""The cluster of a trial, through the real client and kubectl, as its administrator: what is made, looked at, disturbed and taken away again."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trial.place import LABEL, Place
from trial.waiting import Hopeless, wait_for

Object = dict[str, Any]
TAIL = 60  # lines of a log that a message shows
# What a trial makes outside of its own namespaces, and where: everywhere, or in the tasks' namespace.
CLUSTER_KINDS = "validatingadmissionpolicybindings,validatingadmissionpolicies,namespaces"
TASKS_KINDS = "pods,configmaps,secrets,serviceaccounts,rolebindings,roles"


class Kube:
    """One cluster.

    Args:
        kubeconfig: file; default: the one that KUBECONFIG names.
    """

    def __init__(self, place: Place, kubeconfig: Path | None = None) -> None:
        from kubernetes import client, config

        self.place, self.kubeconfig = place, kubeconfig
        settings = client.Configuration()
        config.load_kube_config(str(kubeconfig) if kubeconfig else None, client_configuration=settings, persist_config=False)
        self.settings = settings
        self.api = client.ApiClient(settings)
        self.core, self.batch = client.CoreV1Api(self.api), client.BatchV1Api(self.api)

    def kubectl(self, *words: str, seconds: float = 120, check: bool = True) -> str:
        """Its output. Raises AssertionError with what it says where it fails."""
        environment = os.environ | ({"KUBECONFIG": str(self.kubeconfig)} if self.kubeconfig else {})
        done = subprocess.run(["kubectl", *words], capture_output=True, text=True, timeout=seconds, env=environment, check=False)
        if check and done.returncode:
            raise AssertionError(f"kubectl {' '.join(words)}: {done.stderr.strip()[-2000:]}")
        return done.stdout

    # Making

    def require_free(self) -> None:
        """Raises AssertionError where the one name that a trial cannot choose is taken."""
        from kubernetes.client import ApiException

        name = "silotune-store"
        try:
            found = self.core.read_namespaced_config_map(name, self.place.tasks)
        except ApiException as error:
            if error.status != 404:
                raise
            return
        whose = (found.metadata.labels or {}).get(LABEL)
        cure = (
            f"another trial is going on or was killed; `make test-cluster-clean TRIAL={whose}` takes away all that it made" if whose
            else "the tasks of another federation look for it; run the trial on a cluster of its own"
        )  # fmt: skip
        raise AssertionError(f"ConfigMap {name} of namespace {self.place.tasks} is there already: {cure}")

    def apply(self, folder: Path) -> None:
        self.kubectl("apply", "-k", str(folder), seconds=180)

    def create(self, thing: Object) -> None:
        """A Secret, ConfigMap or pod; a Secret or ConfigMap that is there is replaced."""
        from kubernetes.client import ApiException

        meta, kind = thing["metadata"], {"ConfigMap": "config_map", "Secret": "secret", "Pod": "pod"}[thing["kind"]]
        try:
            getattr(self.core, f"create_namespaced_{kind}")(meta["namespace"], thing)
        except ApiException as error:
            if error.status != 409 or kind == "pod":
                raise
            getattr(self.core, f"replace_namespaced_{kind}")(meta["name"], meta["namespace"], thing)

    def put_config(self, namespace: str, name: str, data: dict[str, str]) -> None:
        self.create({
            "apiVersion": "v1", "kind": "ConfigMap", "data": data,
            "metadata": {"name": name, "namespace": namespace, "labels": dict(self.place.labels)},
        })  # fmt: skip

    def patch_config(self, namespace: str, name: str, data: dict[str, str | None]) -> None:
        """Change keys of a ConfigMap of the trial's; None takes one away."""
        self.core.patch_namespaced_config_map(name, namespace, {"data": data})

    # Looking

    def jobs(self, silo: str, **marks: str) -> list[Any]:
        """A silo's Jobs, by what their labels ``silotune.dev/…`` say."""
        selector = ",".join(f"silotune.dev/{key}={value}" for key, value in marks.items())
        return list(self.batch.list_namespaced_job(self.place.namespace(silo), label_selector=selector).items)

    def pods_of(self, job: Any) -> list[Any]:
        selector = f"batch.kubernetes.io/controller-uid={job.metadata.uid}"
        return list(self.core.list_namespaced_pod(job.metadata.namespace, label_selector=selector).items)

    def pods(self, namespace: str, selector: str) -> list[Any]:
        return list(self.core.list_namespaced_pod(namespace, label_selector=selector).items)

    def log(self, namespace: str, pod: str) -> str:
        """Empty while there is none."""
        from kubernetes.client import ApiException

        try:
            return str(self.core.read_namespaced_pod_log(pod, namespace, tail_lines=500))
        except ApiException as error:
            if error.status in (400, 404):  # its container has not started, or the pod is gone
                return ""
            raise

    def finished(self, namespace: str, pod: str, seconds: float) -> str:
        """The log of a pod that has ended well. Raises NotSeen, with what the pod says."""

        def phase() -> str:
            found = self.core.read_namespaced_pod(pod, namespace).status
            if found.phase == "Failed":
                raise Hopeless(f"it failed: {self.log(namespace, pod)[-1500:]}")
            return str(found.phase)

        def seen() -> str:
            status = self.core.read_namespaced_pod(pod, namespace).status
            waiting = [c.state.waiting.message or c.state.waiting.reason for c in status.container_statuses or [] if c.state.waiting]
            placed = [c.message for c in status.conditions or [] if c.status == "False" and c.message]
            return f"{status.phase} {waiting or placed}"

        wait_for(f"pod {namespace}/{pod} to end well", lambda: phase() == "Succeeded", seconds, seen=seen)
        return self.log(namespace, pod)

    def nodes(self) -> list[Any]:
        return list(self.core.list_node().items)

    def kubeflows_store(self) -> tuple[Forward, str, str] | None:
        """A way to where Kubeflow keeps artefacts, with its keys; None where it is not that of the standalone manifests."""
        from kubernetes.client import ApiException

        try:
            secret = self.core.read_namespaced_secret("mlpipeline-minio-artifact", self.place.tasks).data
            service = self.core.read_namespaced_service("minio-service", "kubeflow")
        except ApiException as error:
            if error.status in (403, 404):
                return None
            raise
        access, key = (base64.b64decode(secret[k]).decode() for k in ("accesskey", "secretkey"))
        return self.forward("kubeflow", service.metadata.name, service.spec.ports[0].port), access, key

    def forward(self, namespace: str, service: str, port: int) -> Forward:
        """A way to a Service; to be opened."""
        return Forward(self, namespace, service, port)

    # As somebody else

    def try_job(self, user: str, namespace: str, job: Object) -> str:
        """What the API server says to ``user`` who would create a Job; empty if it admits it. Nothing is created."""
        from kubernetes import client

        api = client.ApiClient(self.settings)
        api.set_default_header("Impersonate-User", user)
        try:
            client.BatchV1Api(api).create_namespaced_job(namespace, job, dry_run="All")
        except client.ApiException as error:
            return str(json.loads(error.body or "{}").get("message", error.reason)) or "refused"
        return ""

    def may(self, user: str, verb: str, resource: str, namespace: str, group: str = "", name: str = "") -> bool:
        """What the API server would say, by its own review of access."""
        from kubernetes import client

        resource, _, part = resource.partition("/")
        review = {
            "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
            "spec": {"user": user, "resourceAttributes": {
                "verb": verb, "resource": resource, "subresource": part, "namespace": namespace, "group": group, "name": name}},
        }  # fmt: skip
        return bool(client.AuthorizationV1Api(self.api).create_subject_access_review(review).status.allowed)

    # Disturbing

    def evict(self, pod: Any) -> None:
        """As a drain does. Only a pod of the trial."""
        self._require_ours(pod.metadata.namespace)
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod.metadata.name, "namespace": pod.metadata.namespace}}
        self.core.create_namespaced_pod_eviction(pod.metadata.name, pod.metadata.namespace, body)

    @contextmanager
    def cordoned(self, node: str) -> Iterator[bool]:
        """Nothing new comes onto the node meanwhile; of a cluster's only node nothing is asked. Gives whether it is cordoned."""
        others = [n for n in self.nodes() if n.metadata.name != node and not n.spec.unschedulable]
        if not others or self.core.read_node(node).spec.unschedulable:  # one that somebody else has cordoned stays as it is
            yield False
            return
        self.core.patch_node(node, {"spec": {"unschedulable": True}})
        try:
            yield True
        finally:
            self.core.patch_node(node, {"spec": {"unschedulable": None}})

    def delete_pod(self, namespace: str, name: str) -> None:
        self.core.delete_namespaced_pod(name, namespace)

    def _require_ours(self, namespace: str) -> None:
        assert namespace in self.place.namespaces, f"{namespace} is none of this trial's namespaces"

    # Telling, and taking away

    def picture(self) -> str:
        """Jobs, pods and events of the trial's namespaces, and its pods among Kubeflow's: what one looks at when something went wrong."""
        parts = []
        for namespace in self.place.namespaces:
            for words in (("get", "jobs,pods", "-o", "wide"), ("get", "events", "--sort-by=.lastTimestamp")):
                told = self.kubectl("--namespace", namespace, *words, check=False)
                parts.append(f"$ kubectl --namespace {namespace} {' '.join(words)}\n" + "\n".join(told.splitlines()[-TAIL:]))
        told = self.kubectl(
            "--namespace", self.place.tasks, "get", "pods", "--sort-by=.metadata.creationTimestamp", "-o", "wide", check=False
        )
        parts.append(f"$ kubectl --namespace {self.place.tasks} get pods\n" + "\n".join(told.splitlines()[-TAIL:]))
        return "\n\n".join(parts)

    def clean_up(self) -> None:
        """Delete what bears the trial's label, and nothing else; a second call finds nothing."""
        selector = f"{LABEL}={self.place.identity}"
        self.kubectl("--namespace", self.place.tasks, "delete", TASKS_KINDS, "--selector", selector, "--wait=false", check=False)
        with suppress(subprocess.TimeoutExpired):
            self.kubectl("delete", CLUSTER_KINDS, "--selector", selector, "--timeout=240s", seconds=300, check=False)


class Forward:
    """A port of this machine that leads to a Service, kept open by kubectl; begun anew where it breaks."""

    def __init__(self, kube: Kube, namespace: str, service: str, port: int) -> None:
        self.kube, self.namespace, self.service, self.port = kube, namespace, service, port
        self.local = _free_port()
        self.process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.local}"

    def open(self) -> Forward:
        """Raises NotSeen where nothing answers."""
        wait_for(f"port-forward to {self.service} of {self.namespace}", self.alive, 120, every=0.5)
        return self

    def alive(self) -> bool:
        """Whether something listens; a forward that has ended is begun anew, to be asked again."""
        import socket

        if self.process is None or self.process.poll() is not None:
            environment = os.environ | ({"KUBECONFIG": str(self.kube.kubeconfig)} if self.kube.kubeconfig else {})
            words = ["kubectl", "--namespace", self.namespace, "port-forward", f"service/{self.service}", f"{self.local}:{self.port}"]
            self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True, env=environment)
            return False
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.local), timeout=2):
            return True
        return False

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(10)


def _free_port() -> int:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def require_kubectl() -> str:
    """Why kubectl cannot be used; empty if it can."""
    return "" if shutil.which("kubectl") else "kubectl is not installed; 1.28 or newer is needed"


if __name__ == "__main__":  # python -m trial.kube IDENTITY: what a trial that was killed has left
    from trial.place import of

    stale = {"SILOTUNE_SILO_IMAGE": "", "SILOTUNE_COORDINATOR_IMAGE": ""} | os.environ
    place = of(stale)
    Kube(Place(place.silo_image, place.coordinator_image, tasks=place.tasks, identity=sys.argv[1])).clean_up()
