"""Submitting: the compiled pipeline goes to Kubeflow as a version of its own where it is new, and a run of it is started."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from silotune.components.errors import RefusedError
from silotune.components.federation import Federation, canonical_json
from silotune.pipelines.kubeflow.cluster_fit import FEDERATION_PATH, PINNED, require_fit
from silotune.pipelines.kubeflow.kfp_api import PAGE, Cluster, make_experiment, named, speaking
from silotune.pipelines.kubeflow.runs import going_on

COMPILING = threading.Lock()  # kfp keeps the pipeline that is being built in a global


@dataclass(frozen=True)
class Submission:
    """A run that was started."""

    run: str
    url: str
    pipeline: str
    version: str  # name of the pipeline version; the same for the same terms and tasks
    notes: tuple[str, ...] = ()


def submit(
    cluster: Cluster, federation: Federation, rounds: int, *, path: str = FEDERATION_PATH, service_account: str | None = None
) -> Submission:
    """Start a run of ``rounds`` rounds.

    Args:
        path: where a task finds the federation file, in its own pod.
        service_account: instead of KFP_SERVICE_ACCOUNT.

    Raises:
        FederationError: the federation cannot run on a cluster as it stands, with every reason.
        RefusedError: a run of it is going on; two would work on the same round.
        UnreachableError: Kubeflow Pipelines.
    """
    require_fit(federation, path)
    with speaking(cluster.endpoint):
        experiment = make_experiment(cluster, federation)
        latest = cluster.client.list_runs(page_size=PAGE, experiment_id=experiment, sort_by="created_at desc").runs or []
        if going := next((r for r in latest if going_on(r)), None):
            raise RefusedError(f"{federation.name}: run {going.run_id} is going on; wait for its end, or `silotune cancel` it")
        reference = upload(cluster, federation, rounds)
        started = cluster.client.run_pipeline(
            experiment_id=experiment,
            job_name=f"{federation.name} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}",
            pipeline_id=reference.pipeline,
            version_id=reference.version,
            params={"federation": path},
            service_account=service_account or os.environ.get("KFP_SERVICE_ACCOUNT") or None,
        )
    return Submission(started.run_id, cluster.url("runs", started.run_id), reference.pipeline, reference.name, reference.notes)


@dataclass(frozen=True)
class Reference:
    """A pipeline version on Kubeflow, as runs name it."""

    pipeline: str
    version: str
    name: str
    notes: tuple[str, ...]


def upload(cluster: Cluster, federation: Federation, rounds: int) -> Reference:
    """The pipeline and the version of exactly these tasks; both are made where they are missing."""
    import tempfile

    import kfp_server_api

    client, title = cluster.client, f"silotune-{federation.name}"
    found = named(client.list_pipelines, "pipelines", title, namespace=cluster.namespace)
    if not found:  # without a version: the first one that `upload_pipeline` makes has the pipeline's name, not ours
        wanted = kfp_server_api.V2beta1Pipeline(display_name=title, name=title, namespace=cluster.namespace)
        with _taken():  # somebody else made it in between
            client.pipelines.pipeline_service_create_pipeline(pipeline=wanted)
        found = named(client.list_pipelines, "pipelines", title, namespace=cluster.namespace)
    pipeline = found[0].pipeline_id
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / f"{title}.yaml"
        name, notes = versioned(federation, rounds, package)
        versions = named(client.list_pipeline_versions, "pipeline_versions", name, pipeline_id=pipeline)
        if not versions:
            with _taken():
                client.upload_pipeline_version(str(package), name, pipeline_id=pipeline, description=f"{rounds} rounds per run")
            versions = named(client.list_pipeline_versions, "pipeline_versions", name, pipeline_id=pipeline)
    return Reference(pipeline, versions[0].pipeline_version_id, name, notes)


@contextmanager
def _taken() -> Iterator[None]:
    """Creating what exists is fine."""
    from kfp_server_api import ApiException

    try:
        yield
    except ApiException as error:
        if error.status != 409:
            raise


def versioned(federation: Federation, rounds: int, package: Path) -> tuple[str, tuple[str, ...]]:
    """Compile the pipeline to ``package``; returns the version's name, and what to tell about it.

    The name is ``<terms>-<tasks>``: digests of what the silos agree on (but for the base model's digest, which is taken where the pipeline
    runs) and of the compiled pipeline. Same terms and same tasks are the same version.
    """
    import yaml
    from kfp import compiler

    from silotune.pipelines.federated_finetuning import federated_finetuning

    with COMPILING:
        compiler.Compiler().compile(federated_finetuning(federation, rounds, placed=True), str(package))
    documents = list(yaml.safe_load_all(package.read_text()))
    executors = documents[0]["deploymentSpec"]["executors"].values()
    loose = sorted({e["container"]["image"] for e in executors if not PINNED.search(e["container"]["image"])})
    notes = tuple(f"image {image} is not named by digest; what runs can change under a run" for image in loose)
    tasks = hashlib.sha256(canonical_json(documents)).hexdigest()
    return f"{federation.name}-{federation.agreement('', '').digest[:12]}-{tasks[:12]}", notes
