"""A trial without a cluster: the same code, on the fakes of tests/fakes, with the silos' real work behind them.

What is real: `silotune onboard`'s output and what kustomize makes of it, the seeds' scripts, the launchers, the silos' admission policy (evaluated
in Python), the command of each Job, the store (moto, over S3), the submission through kfp's client. What is played: Kubernetes' and Kubeflow's
servers (`kubernetes_api`, `kfp_api`), the kubelet, that runs a Job's command as a process here, and Kubeflow, that runs the boxes of a run in
their order.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kfp_api
import kubernetes_api
import yaml

from silotune.components import keys, recurrence, round_page
from silotune.components.aggregate import step as aggregate
from silotune.components.cluster import cluster_job
from silotune.components.errors import SilotuneError
from silotune.components.export import step as export
from silotune.components.federation import Federation
from silotune.components.initialize import step as initialize
from silotune.components.protocol import Turn
from silotune.pipelines.kubeflow import runs
from trial.kube import Forward, Kube
from trial.place import Place
from trial.trial import Trial
from trial.waiting import wait_for

Object = dict[str, Any]
READS = {"get", "list", "watch"}
SMALLEST = 256  # MiB, below which the played kernel ends a container


@dataclass(frozen=True)
class Open(Forward):  # type: ignore[misc]
    """A way that needs no forwarding."""

    address: str

    @property
    def url(self) -> str:
        return self.address

    def open(self) -> Open:
        return self

    def alive(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing was opened."""


class Rehearsed(Kube):
    """A cluster that is played.

    Args:
        denials: the policies' verdict on a Job, given the objects that stand: (job, objects, terms) -> first words of refusals.
        s3: address of the store.
    """

    def __init__(self, place: Place, folder: Path, s3: str, denials: Callable[[Object, Object, Object], list[str]]) -> None:
        silos = {place.namespace(s): {"jobs": kubernetes_api.ALL_JOB_VERBS} for s in place.silos}
        everything = {n: {"jobs": kubernetes_api.ALL_JOB_VERBS, "pods": READS} for n in (*silos, place.tasks)}
        self.cluster = kubernetes_api.Cluster(
            rights={"admin": everything, "launcher": silos}, namespaces=set(silos), admission=lambda job: self._denied(job)
        )
        super().__init__(place, self.cluster.kubeconfig(folder / "admin.kubeconfig", "admin"))
        self.folder, self.s3, self.denials = folder, s3, denials
        self.objects: list[Object] = []  # of kustomize
        self.made: dict[tuple[str, str, str], Object] = {}  # (kind, namespace, name), through the API
        self.launcher = self.cluster.kubeconfig(folder / "launcher.kubeconfig", "launcher")
        self.processes: dict[str, subprocess.Popen[str]] = {}  # by the Job's uid
        self.evicted: set[str] = set()

    def require_free(self) -> None:
        """Nobody else is here."""

    def apply(self, folder: Path) -> None:
        self.objects = list(yaml.safe_load_all(self.kubectl("kustomize", str(folder))))
        for o in self.objects:
            if o["kind"] == "ConfigMap":
                self.made["ConfigMap", o["metadata"]["namespace"], o["metadata"]["name"]] = o

    def create(self, thing: Object) -> None:
        meta = thing["metadata"]
        self.made[thing["kind"], meta["namespace"], meta["name"]] = thing

    def config(self, namespace: str, name: str) -> dict[str, str]:
        return dict(self.made["ConfigMap", namespace, name]["data"])

    def patch_config(self, namespace: str, name: str, data: dict[str, str | None]) -> None:
        known = self.config(namespace, name) | data
        self.put_config(namespace, name, {k: v for k, v in known.items() if v is not None})

    def delete_pod(self, namespace: str, name: str) -> None:
        del self.made["Pod", namespace, name]

    def forward(self, namespace: str, service: str, port: int) -> Forward:
        return Open(self.s3)

    def kubeflows_store(self) -> tuple[Forward, str, str]:
        return Open(self.s3), "a", "s"

    def picture(self) -> str:
        return "\n".join(f"{j['metadata']['name']} {j.get('status')}" for j in self.cluster.jobs())

    def clean_up(self) -> None:
        self.cluster.close()
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()

    def log(self, namespace: str, pod: str) -> str:
        """Of a pod that runs; when its own words come is not played."""
        return "train started"

    def evict(self, pod: Any) -> None:
        """SIGTERM, as a kubelet sends it; how the Job ends then is said once the process has gone."""
        self._require_ours(pod.metadata.namespace)
        (job,) = (j for j in self.cluster.jobs() if j["metadata"]["name"] == pod.metadata.labels["job-name"])
        self.evicted.add(job["metadata"]["uid"])
        wait_for("the Job's process to begin", lambda: job["metadata"]["uid"] in self.processes, 20, every=0.05)
        self.processes[job["metadata"]["uid"]].terminate()

    @contextmanager
    def cordoned(self, node: str) -> Iterator[bool]:
        yield False

    def try_job(self, user: str, namespace: str, job: Object) -> str:
        return f"denied request: {denied}" if (denied := self._denied(job)) else ""

    def _denied(self, job: Object) -> str:
        at = job["metadata"]["namespace"]
        (policy,) = (
            o for o in self.objects
            if o["kind"] == "ValidatingAdmissionPolicy" and o["metadata"]["name"] == f"silotune-jobs-{at.removeprefix('silotune-')}"
        )  # fmt: skip
        words = self.denials(job, policy, self.made["ConfigMap", at, "silotune-job-terms"])
        return f"{words[0]}: of the policy" if words else ""

    # The kubelet

    def home(self, silo: str) -> Path:
        """What is /silo in the silo's pods."""
        return self.folder / "volumes" / silo

    def finished(self, namespace: str, pod: str, seconds: float) -> str:
        """Run the pod's own command, with its ConfigMap's scripts, its words, and its variables as they are referred to."""
        spec = self.made["Pod", namespace, pod]["spec"]
        (container,) = spec["containers"]
        scripts = self.folder / "scripts" / namespace
        scripts.mkdir(parents=True)
        for name, text in self.config(namespace, pod).items():
            (scripts / name).write_text(text)
        silo = namespace.removeprefix("silotune-")
        words = [w.replace("/silo/", f"{self.home(silo)}/") for w in container["args"]]
        variables = {e["name"]: e["value"] if "value" in e else self._referred(namespace, e["valueFrom"]) for e in container["env"]}
        variables.pop("HOME")
        environment = os.environ | variables | ({"AWS_ENDPOINT_URL": self.s3} if "AWS_ENDPOINT_URL" in variables else {})
        command = [sys.executable, str(scripts / "seed.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _referred(self, namespace: str, source: Object) -> str:
        import base64

        reference = source["secretKeyRef"]
        return base64.b64decode(self.made["Secret", namespace, reference["name"]]["data"][reference["key"]]).decode()

    def work(self, job: Object) -> None:
        """Run a Job's command to its end, as its silo: with the silo's own copy of the terms, its key, its credentials and its volume."""
        at = job["metadata"]["namespace"]
        silo = at.removeprefix("silotune-")
        (container,) = job["spec"]["template"]["spec"]["containers"]
        self.cluster.run(job)
        if container["resources"]["limits"]["memory"].endswith("Mi") and int(container["resources"]["limits"]["memory"][:-2]) < SMALLEST:
            return self.cluster.exit(job, 137, "OOMKilled")
        place, home = self.folder / "silos" / silo / job["metadata"]["uid"], self.home(silo)
        (place / "keys").mkdir(parents=True)
        terms = self.config(at, "silotune-federation")["federation.yaml"].replace("/silo/", f"{home}/")
        (place / "federation.yaml").write_text(terms)
        import base64

        for name, encoded in self.made["Secret", at, "silotune-keys"]["data"].items():
            (place / "keys" / name).write_bytes(base64.b64decode(encoded))
        referred = {e["name"]: e["valueFrom"] for e in container["env"] if "secretKeyRef" in e.get("valueFrom", {})}
        missing = {n for n, source in referred.items() if ("Secret", at, source["secretKeyRef"]["name"]) not in self.made}
        assert all(referred[n]["secretKeyRef"].get("optional") for n in missing), f"a kubelet would wait without end for {missing}"
        credentials = {n: self._referred(at, source) for n, source in referred.items() if n not in missing}
        environment = os.environ | credentials | {"SILOTUNE_KEYS": str(place / "keys"), "OMP_NUM_THREADS": "1"}
        words = [w.replace("/federation/federation.yaml", str(place / "federation.yaml")) for w in container["args"]]
        process = subprocess.Popen(
            [sys.executable, *container["command"][1:], *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.processes[job["metadata"]["uid"]] = process
        said, _ = process.communicate(timeout=300)
        if job["metadata"]["uid"] in self.evicted:
            return self.cluster.disrupt(job, "EvictionByEvictionAPI")
        return self.cluster.exit(job, process.returncode, message=said.strip().splitlines()[-1] if said.strip() else "")


class Kubeflow:
    """Runs what is submitted: the boxes in the pipeline's order, a silo's by its launcher."""

    def __init__(self, api: kfp_api.KfpApi, kube: Rehearsed) -> None:
        self.api, self.kube = api, kube
        self.threads = ThreadPoolExecutor(12)
        self.ended = threading.Event()
        self.seen: set[str] = set()
        self.broken: list[BaseException] = []
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def close(self) -> None:
        self.ended.set()
        self.watcher.join(5)
        self.threads.shutdown(wait=False, cancel_futures=True)

    def _watch(self) -> None:
        """Take up every new run and every new Job."""
        while not self.ended.wait(0.05):
            for recurring, its in list(self.api.recurring.items()):
                if its["status"] == "ENABLED" and not any(runs.going_on(SimpleNamespace(**r)) for r in self.api.runs.values()):
                    self.api.fire(recurring)
            for run in [r for r, its in self.api.runs.items() if its["state"] == "PENDING" and r not in self.seen]:
                self.seen.add(run)
                self.threads.submit(self._guarded, self._run, run)
            for job in [j for j in self.kube.cluster.jobs() if j["metadata"]["uid"] not in self.seen]:
                self.seen.add(job["metadata"]["uid"])
                self.threads.submit(self._guarded, self.kube.work, job)

    def _guarded(self, act: Callable[[Any], None], on: Any) -> None:
        try:
            act(on)
        except BaseException as error:
            self.broken.append(error)
            raise

    def _run(self, run: str) -> None:
        tasks: list[Object] = []

        def box(name: str, act: Callable[[], str]) -> str:
            task = {"run_id": run, "task_id": f"{run}-{name}", "display_name": name, "state": "RUNNING"}
            tasks.append(task)
            self.api.advance(run, "RUNNING", tasks)
            try:
                said = act()
            except (SystemExit, SilotuneError):
                task["state"] = "FAILED"
                raise
            finally:
                task["state"] = "SUCCEEDED" if task["state"] == "RUNNING" else "FAILED"
                self.api.advance(run, "RUNNING", tasks)
            return said

        try:
            self._boxes(run, box)
            self.api.advance(run, "SUCCEEDED", tasks)
        except (SystemExit, SilotuneError):
            self.api.advance(run, "FAILED", tasks)

    def _boxes(self, run: str, box: Callable[[str, Callable[[], str]], str]) -> None:
        place, folder = self.kube.place, self.kube.folder / "tasks" / run
        folder.mkdir(parents=True)
        file = folder / "federation.yaml"
        file.write_text(self.kube.config(place.tasks, place.ours)["federation.yaml"])
        federation = Federation.load(file)

        def in_silos(name: str, turn: str = "") -> list[str]:
            def one(silo: str) -> str:
                return cluster_job.run(federation, silo, name, turn, kubeconfig=self.kube.launcher, watch=1)

            with ThreadPoolExecutor(len(place.silos)) as pool:
                return list(pool.map(lambda s: box(f"{name} {s}", lambda: one(s)), place.silos))

        ready = in_silos("preprocess")
        turn = box("initialize", lambda: initialize.run(str(file), ready))
        for slot in range(self._slots(run)):
            asked, statuses = turn, in_silos("train", turn)
            turn = box(f"aggregate {slot + 1}", lambda asked=asked, statuses=statuses: aggregate.run(str(file), asked, statuses))  # type: ignore[misc]
            page = folder / f"page-{slot + 1}"
            round_page.write(str(file), asked, str(page))
            self._keep(f"v2/artifacts/{run}/aggregate-{slot + 1}/page", page.read_bytes())
        scored = in_silos("evaluate", turn)
        box("export", lambda: export.run(str(file), turn, scored))
        if Turn.parse(turn).done:
            recurrence.disable(self.api.url, federation.name)

    def _slots(self, run: str) -> int:
        """Rounds that the submitted pipeline has boxes for."""
        version = self.api.versions[self.api.runs[run]["pipeline_version_reference"]["pipeline_version_id"]]
        return sum(
            "round slot" in t["taskInfo"]["name"] for t in version["pipeline_spec"]["pipeline_spec"]["root"]["dag"]["tasks"].values()
        )

    def _keep(self, key: str, data: bytes) -> None:
        import boto3

        s3 = boto3.client("s3", endpoint_url=self.kube.s3, aws_access_key_id="a", aws_secret_access_key="s", region_name="us-east-1")
        s3.create_bucket(Bucket="mlpipeline")
        s3.put_object(Bucket="mlpipeline", Key=key, Body=data)


@contextmanager
def warm(folder: Path) -> Iterator[None]:
    """Steps start from one process that has the imports behind it."""
    from silotune.components.process.child import WARM_VARIABLE

    address = folder / "warm"
    process = subprocess.Popen([sys.executable, "-m", "silotune.components.process.warm_parent", str(address)], stdin=subprocess.PIPE)
    while not address.exists() and process.poll() is None:
        time.sleep(0.02)
    before = os.environ.get(WARM_VARIABLE)
    os.environ[WARM_VARIABLE] = str(address)
    try:
        yield
    finally:
        os.environ.pop(WARM_VARIABLE) if before is None else os.environ.update({WARM_VARIABLE: before})
        process.kill()
        process.wait()


@contextmanager
def rehearsal(
    place: Place, folder: Path, s3: str, denials: Callable[[Object, Object, Object], list[str]]
) -> Iterator[tuple[Trial, Rehearsed]]:
    """A trial whose cluster is played."""
    from silotune.pipelines.kubeflow.kfp_api import connect

    kube = Rehearsed(place, folder, s3, denials)
    with kfp_api.KfpApi() as api, warm(folder):
        kubeflow = Kubeflow(api, kube)
        before = os.environ.get(keys.FOLDER_VARIABLE)
        os.environ[keys.FOLDER_VARIABLE] = str(folder / "trial" / "keys")
        try:
            with Trial(place, kube, connect(api.url), folder / "trial") as trial:
                yield trial, kube
            assert kubeflow.broken == []
        finally:
            os.environ.pop(keys.FOLDER_VARIABLE) if before is None else os.environ.update({keys.FOLDER_VARIABLE: before})
            kubeflow.close()
    assert kube.cluster.violations == []
