"""A trial: three hospitals, an S3 and the coordinator's things on a cluster, made at its beginning and taken away at its end.

with Trial(place, kube, cluster, folder) as trial:
    federation = trial.begin("first")          the scenario's federation file, in all parties' hands
    run = trial.submit(federation)
    assert trial.ended(run) == "SUCCEEDED"
    trial.course(federation)                   what `silotune status --json` prints
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from silotune.components import keys
from silotune.components.cluster import job_manifest
from silotune.components.errors import SilotuneError
from silotune.components.federation import Federation
from silotune.components.federation_file import COORDINATOR
from silotune.components.rounds import Rounds
from silotune.pipelines import status
from silotune.pipelines.kubeflow import runs, schedules, submission
from silotune.pipelines.kubeflow.kfp_api import Cluster, speaking
from trial import manifests, terms
from trial.kube import Forward, Kube
from trial.place import Place
from trial.waiting import Hopeless, wait_for

START = 600.0  # seconds that images may take to be pulled, and pods to start
BOX = 600.0  # seconds one box of the pipeline may take on a small cluster, Kubeflow's own pods included
RUN = 2700.0  # seconds a whole run may take


class Trial:
    """What the tests hold.

    Args:
        cluster: Kubeflow Pipelines.
        folder: on this machine, for keys and federation files.
    """

    def __init__(self, place: Place, kube: Kube, cluster: Cluster, folder: Path) -> None:
        self.place, self.kube, self.cluster, self.folder = place, kube, cluster, folder
        parties = (COORDINATOR, *place.silos)
        self.public = {party: keys.new(folder / "keys", party) for party in parties}
        self.credentials = {party: (secrets.token_hex(10), secrets.token_hex(20)) for party in (*parties, "admin")}
        self.federations: list[Federation] = []
        self.forwards: list[Forward] = []
        self._environment: dict[str, str | None] = {}

    # From beginning to end

    def __enter__(self) -> Trial:
        try:
            self.set_up()
        except BaseException:
            self.clean_up()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.clean_up()

    def set_up(self) -> None:
        """Make everything, and wait until the records and the base model are where they belong."""
        place, kube = self.place, self.kube
        kube.require_free()
        federation = self.load("setup")
        kube.apply(manifests.write(place, federation, self.folder / "manifests"))
        for secret in self.secrets():
            kube.create(secret)
        for scripts, pod in manifests.seeds(place, federation):
            kube.create(scripts)
            kube.create(pod)
        name = f"{place.ours}-seed"
        for namespace in (place.tasks, *map(place.namespace, place.silos)):
            kube.finished(namespace, name, START)
            kube.delete_pod(namespace, name)  # a silo's quota counts it
        self.reach_store(self.forward(place.store, "seaweedfs", 8333).url)

    def secrets(self) -> list[manifests.Object]:
        private = {party: (self.folder / "keys" / f"{party}.pem").read_bytes() for party in self.public}
        mlflow = (os.environ.get("MLFLOW_TRACKING_USERNAME", ""), os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
        return manifests.secrets_of(self.place, private, self.credentials, mlflow if self.place.mlflow else ("", ""))

    def forward(self, namespace: str, service: str, port: int) -> Forward:
        """A way to a Service, open to the trial's end."""
        return self.keep(self.kube.forward(namespace, service, port))

    def keep(self, forward: Forward) -> Forward:
        self.forwards.append(forward)
        return forward.open()

    def reach_store(self, url: str) -> None:
        """From here on this process is the coordinator to the store, which it only reads."""
        access, secret = self.credentials[COORDINATOR]
        wanted = {
            "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": access, "AWS_SECRET_ACCESS_KEY": secret, "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": None, "AWS_PROFILE": None, "AWS_SESSION_TOKEN": None,
        }  # fmt: skip
        for name, value in wanted.items():
            self._environment.setdefault(name, os.environ.get(name))
            _set(name, value)

    def clean_up(self) -> None:
        """Stop runs and schedules, delete all that the trial has made, once; what cannot be deleted is named."""
        if self.place.keep:
            print(f"kept: everything with the label silotune.dev/trial={self.place.identity}", file=sys.stderr)
        else:
            steps: list[Callable[[], object]] = [lambda f=f: self._forget(f) for f in self.federations]  # type: ignore[misc]
            for step in [*steps, self.kube.clean_up]:
                try:
                    step()
                except (SilotuneError, OSError, AssertionError) as error:
                    print(f"not cleaned up: {error}", file=sys.stderr)
        for forward in self.forwards:
            forward.close()
        for name, value in self._environment.items():
            _set(name, value)
        self.federations, self.forwards, self._environment = [], [], {}

    def _forget(self, federation: Federation) -> None:
        from kfp_server_api import ApiException

        schedules.unschedule(self.cluster, federation)
        runs.cancel(self.cluster, federation)
        client, title = self.cluster.client, f"silotune-{federation.name}"
        with speaking(self.cluster.endpoint), suppress(ApiException):
            from silotune.pipelines.kubeflow.kfp_api import named, pages

            for pipeline in named(client.list_pipelines, "pipelines", title, namespace=self.cluster.namespace):
                for version in list(pages(client.list_pipeline_versions, "pipeline_versions", pipeline_id=pipeline.pipeline_id)):
                    client.delete_pipeline_version(pipeline.pipeline_id, version.pipeline_version_id)
                client.delete_pipeline(pipeline.pipeline_id)

    # A scenario

    def load(self, scenario: str, **changes: Any) -> Federation:
        """The scenario's federation file, on this machine; see `terms.text` for ``changes``."""
        file = self.folder / scenario / terms.FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(terms.text(self.place, scenario, self.public, **changes))
        return Federation.load(file)

    def begin(self, scenario: str, **changes: Any) -> Federation:
        """The same, and every party's copy of it; a second call changes it."""
        federation = self.load(scenario, **changes)
        copy = {terms.FILE: federation.file.read_text()}
        self.kube.put_config(self.place.tasks, self.place.ours, copy)
        for silo in self.place.silos:
            self.kube.put_config(self.place.namespace(silo), job_manifest.CONFIG_MAP, copy)
        self.federations = [*(f for f in self.federations if f.name != federation.name), federation]
        return federation

    def submit(self, federation: Federation, rounds: int | None = None) -> str:
        """The id of a new run."""
        wanted = rounds or federation.rounds.per_run or federation.rounds.total
        return submission.submit(self.cluster, federation, wanted, service_account=self.place.ours).run

    def run_object(self, run: str) -> Any:
        """The run as Kubeflow's API gives it."""
        with speaking(self.cluster.endpoint):
            return self.cluster.client.get_run(run)

    def ended(self, run: str, seconds: float = RUN) -> str:
        """The state that a run ends in. Raises NotSeen, with how its tasks stand."""
        wait_for(f"run {run} to end", lambda: not runs.going_on(self.run_object(run)), seconds, seen=lambda: self.tasks(run), every=5)
        return str(self.run_object(run).state)

    def tasks(self, run: str) -> dict[str, str]:
        """Box and silo -> state, of the tasks that Kubeflow tells of."""
        details = self.run_object(run).run_details
        return {d.display_name: d.state for d in (details.task_details if details else None) or [] if d.display_name}

    def rounds(self, federation: Federation) -> Rounds:
        for forward in self.forwards:
            if not forward.alive():
                forward.open()
        return Rounds.of(federation)

    def course(self, federation: Federation) -> dict[str, Any]:
        """What `silotune status --json` prints."""
        return dict(json.loads(json.dumps(status.status(federation, self.rounds(federation)).as_json())))

    def committed(self, federation: Federation) -> int:
        """The highest round that is committed; -1 before the first."""
        latest = self.rounds(federation).latest()
        return latest.round if latest else -1

    # What goes on in a silo

    def job(self, federation: Federation, silo: str, box: str, seconds: float = 2 * BOX, **marks: str) -> Any:
        """The silo's Job of a box, once it is there.

        Args:
            marks: ``round`` and ``attempt``, as its labels have them.
        """

        def look() -> Any:
            found = self.kube.jobs(silo, federation=federation.name, box=box, **marks)
            return found[0] if found else None

        return wait_for(f"a Job of {box} in {silo} ({marks or 'any round'})", look, seconds)

    def at_work(self, job: Any, seconds: float = START) -> Any:
        """The pod of a training that has begun, which its log says: from then on it minds signals."""

        def look() -> Any:
            for pod in self.kube.pods_of(job):
                if pod.status.phase in ("Failed", "Succeeded"):
                    raise Hopeless(f"pod {pod.metadata.name} has ended: {pod.status.phase}")
                if pod.status.phase == "Running" and " started" in self.kube.log(pod.metadata.namespace, pod.metadata.name):
                    return pod
            return None

        return wait_for(f"Job {job.metadata.name} to be at work", look, seconds, every=0.5)

    def launcher_pod(self, run: str, silo: str) -> Any:
        """The running pod of Kubeflow's that follows the silo's Job; the silo's id stands in what its task is given."""

        def look() -> Any:
            for pod in self.kube.pods(self.place.tasks, f"pipeline/runid={run}"):
                if pod.status.phase != "Running" or pod.metadata.deletion_timestamp:
                    continue
                spec = json.dumps(self.kube.api.sanitize_for_serialization(pod.spec))
                if '"SILOTUNE_LAUNCHER"' in spec and silo in spec:
                    return pod
            return None

        return wait_for(f"the launcher of {silo} in run {run}", look, BOX, every=1)

    def refusal(self, federation: Federation, silo: str, change: Callable[[Any], object] | None = None) -> str:
        """What the API server says to the launcher's account that would create a silo's Job; empty if it admits it. Nothing is created.

        Args:
            change: to the Job that a launcher makes.
        """
        job = job_manifest.job_of(federation, silo, "train", "round:1 attempt:1")
        job["metadata"]["name"] += "-t"  # none that a launcher has made
        if change:
            change(job)
        return self.kube.try_job(self.place.launcher, self.place.namespace(silo), job)

    def picture(self) -> str:
        """How the cluster stands, and what the coordinator's tasks of the last scenario wrote."""
        parts = [self.kube.picture()]
        if self.federations:
            with suppress(SilotuneError):
                parts += [
                    f"--- {log.task} ({log.state})\n{log.text or log.problem}" for log in runs.logs(self.cluster, self.federations[-1])
                ]
        return "\n\n".join(parts)

    def mlflow(self) -> str:
        """An address of MLflow for this machine; empty where the trial has none."""
        if not self.place.mlflow:
            return ""
        parts = urlsplit(self.place.mlflow)
        service, namespace = (parts.hostname or "").split(".")[:2]
        return f"http://localhost:{self.forward(namespace, service, parts.port or 80).local}"


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
