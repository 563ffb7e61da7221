"""Placement: what a task needs from the cluster, said to KFP when the pipeline is compiled, as constants.

    place(task, federation, silo)                  a silo's task: with launcher: pod, it trains; with launcher: job, it launches and watches
    place_coordinator(task, federation, box)       initialize, muster, combine, aggregate, export

With ``launcher: job`` a placement is about the silo's Job, and goes to the silo's cluster (`job_manifest`); the task here is small, runs the
coordinator's image, and gets the silo's kubeconfig where it names one. With ``launcher: pod`` the same words are about the task's own pod.
KFP 2.17 has no word for some of them: these are refused, never dropped, since a pod without its runtime class or its priority would run, and
run otherwise than was agreed.

Who gets what, of what lies in the namespace of the pipeline's runs (`k8s/base/coordinator`):

    all tasks                         the federation file; where the store is
    launchers                         S3 credentials
    initialize, aggregate, export     S3 credentials, the signing key, MLflow's user where tracking.uri is a server
    muster, combine                   S3 credentials, the signing key
    initialize, export                the coordinator's claims
    export                            a token for Kubeflow's API, where its namespace hands one out

What the coordinator's tasks get, and what a silo's gets by default, is mounted as optional: a pod that waits for a ConfigMap or Secret waits
without end, and no timeout of KFP's counts that time, while a step that misses one says at once which. A Secret of S3 is not there, either,
where pods are known by their account.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from silotune.components.cluster import job_manifest
from silotune.components.cluster.jobs_api import KUBECONFIG_VARIABLE
from silotune.components.errors import FederationError
from silotune.components.federation import WORK_VARIABLE, Federation, Silo
from silotune.components.keys import FOLDER_VARIABLE
from silotune.components.launcher import LAUNCHER_VARIABLE
from silotune.components.recurrence import API_VARIABLE
from silotune.components.terms.placement import Claim, SecretUse, Toleration

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kfp.dsl import PipelineTask

KUBECONFIG_FOLDER = "/kubeconfig"
KUBECONFIG_KEY = "kubeconfig"
FEDERATION_FOLDER = "/federation"
KEYS_FOLDER = "/keys"
SCRATCH = "/tmp"  # noqa: S108 (the container's own, an empty folder)
LAUNCHER_CPU, LAUNCHER_MEMORY = ("50m", "1"), ("192Mi", "512Mi")  # request, limit
RETRIES = 3  # of a task whose own pod was lost: a launcher's next one finds the Job by its name, combine's next one what is stored
MLFLOW = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
KFP_TOKEN = ("access-ml-pipeline", "true")  # label that Kubeflow's PodDefault, where a profile has one, mounts a token into


def place(
    task: PipelineTask, federation: Federation, silo_id: str, box: str = "train", *, coordinator_image: str | None = None
) -> PipelineTask:  # fmt: skip
    """Place one silo's task.

    Args:
        box: what it does; the boxes of a secure sum have no use for GPUs.
        coordinator_image: of the launcher, by digest; default: the one the component names.

    Raises:
        FederationError: the placement asks for what this launcher cannot give; with every such field.
    """
    silo = federation.silo(silo_id)
    task.set_env_variable(LAUNCHER_VARIABLE, federation.launcher)
    return place_launcher(task, federation, silo, coordinator_image) if federation.launcher == "job" else place_work(task, silo, box)


def place_launcher(task: PipelineTask, federation: Federation, silo: Silo, image: str | None) -> PipelineTask:
    """A light task in the coordinator's namespace; the silo's node pools, secrets and claims are its Job's."""
    from kfp import kubernetes

    job_manifest.require_possible(silo)
    if image:
        _require_digest(f"silo {silo.id!r}: the coordinator's image", image)
        task.set_container_image(image)
    task.set_cpu_request(LAUNCHER_CPU[0]).set_cpu_limit(LAUNCHER_CPU[1])
    task.set_memory_request(LAUNCHER_MEMORY[0]).set_memory_limit(LAUNCHER_MEMORY[1])
    _retry(task)
    place = federation.coordinator
    _choose_nodes(task, place.node_selector, place.tolerations)
    _give_terms(task, place.config_map)
    _give_credentials(task, place.s3_secret, tuple(job_manifest.KEYS))
    if secret := silo.placement.kubeconfig_secret:
        kubernetes.use_secret_as_volume(task, secret_name=secret, mount_path=KUBECONFIG_FOLDER)
        task.set_env_variable(KUBECONFIG_VARIABLE, f"{KUBECONFIG_FOLDER}/{KUBECONFIG_KEY}")
    return task


def place_coordinator(task: PipelineTask, federation: Federation, box: str, *, image: str | None = None) -> PipelineTask:
    """Place one of the coordinator's own tasks.

    Args:
        box: ``initialize``, ``muster``, ``combine``, ``aggregate`` or ``export``.
        image: of the task, by digest; default: the one the component names.

    Raises:
        FederationError: the image is named by a tag, or a quantity is not one that KFP takes.
    """
    from kfp import kubernetes

    place, who = federation.coordinator, "coordinator"
    if image:
        _require_digest(f"{who}: the image of {box}", image)
        task.set_container_image(image)
    _set_cpu(task, f"{who}.cpu", place.cpu)
    task.set_cpu_limit(place.cpu)
    _set_memory(task, f"{who}.memory", place.memory)
    _choose_nodes(task, place.node_selector, place.tolerations)
    _give_terms(task, place.config_map)
    task.set_env_variable(WORK_VARIABLE, f"{SCRATCH}/silotune")
    task.set_env_variable("OMP_NUM_THREADS", str(job_manifest.whole_cpus(place.cpu)))
    _give_credentials(task, place.s3_secret, tuple(job_manifest.KEYS))
    kubernetes.use_secret_as_volume(task, secret_name=place.keys_secret, mount_path=KEYS_FOLDER, optional=True)
    task.set_env_variable(FOLDER_VARIABLE, KEYS_FOLDER)
    if box not in ("muster", "combine") and federation.tracking.uri.startswith(("http://", "https://")):
        _give_credentials(task, place.mlflow_secret, MLFLOW)
    if box in ("initialize", "export"):
        _mount_claims(task, place.claims)
    if box in ("muster", "combine"):  # a round must not fail for want of it
        _retry(task)
    if box == "export":
        task.set_env_variable(API_VARIABLE, place.kfp_api)
        kubernetes.add_pod_label(task, *KFP_TOKEN)
    return task


def place_work(task: PipelineTask, silo: Silo, box: str = "train") -> PipelineTask:
    """The task does the silo's work: on its nodes, with its image, volumes and secrets."""
    _refuse_what_a_task_cannot_have(silo)
    who, place = f"silo {silo.id!r}: placement", silo.placement
    if place.image:
        _require_digest(f"{who}.image", place.image)
        task.set_container_image(place.image)
    _choose_nodes(task, place.node_selector, place.tolerations)
    _choose_by_affinity(task, silo)
    gpus = 0 if box in job_manifest.WITHOUT_GPU else place.gpus
    if gpus:
        task.set_accelerator_type(place.gpu_type).set_accelerator_limit(gpus)
    if gpus > 1:
        task.set_env_variable("PET_NPROC_PER_NODE", str(gpus))  # train's alone to heed
    if place.cpu:
        _set_cpu(task, f"{who}.cpu", place.cpu)
    if place.memory:
        _set_memory(task, f"{who}.memory", place.memory)
    _give_terms(task, place.config_map or job_manifest.CONFIG_MAP)
    _mount_claims(task, place.claims)
    _give_secrets(task, place.secrets or job_manifest.SECRETS, optional=not place.secrets)
    return task


def _refuse_what_a_task_cannot_have(silo: Silo) -> None:
    p = silo.placement
    cure = "use launcher: job, or leave it out"
    lost = "launcher: pod runs all silos in the namespace and cluster of the pipeline"
    without = "KFP 2.17 cannot set it on a task"
    other = sorted(set(p.affinity) - {"nodeAffinity"})
    refused = {
        "namespace": (p.namespace, lost, cure),
        "kubeconfig_secret": (p.kubeconfig_secret, lost, cure),
        "service_account": (p.service_account, without, "use launcher: job, or name it for the whole run at submission"),
        "runtime_class": (p.runtime_class, without, cure),
        "priority_class": (p.priority_class, without, cure),
        "ephemeral_storage": (p.ephemeral_storage, without, cure),
        "affinity": (other, "KFP 2.17 knows nodeAffinity only", "use launcher: job, or keep nodeAffinity only"),
        "claims.read_only": ([c.claim for c in p.claims if c.read_only], "KFP 2.17 mounts claims for writing", "use launcher: job"),
    }
    problems = [
        f"silo {silo.id!r}: placement.{field}: {why}, got {got!r}; {what_to_do}" for field, (got, why, what_to_do) in refused.items() if got
    ]
    problems += job_manifest.one_pod(silo)
    if problems:
        raise FederationError("\n".join(problems))


def _retry(task: PipelineTask) -> None:
    task.set_retry(RETRIES, backoff_duration="10s", backoff_factor=2.0, backoff_max_duration="120s")


def _require_digest(what: str, image: str) -> None:
    if "@sha256:" not in image:
        raise FederationError(f"{what}: must be named by digest, registry/name@sha256:…, got {image!r}; a tag can be moved")


def _choose_nodes(task: PipelineTask, labels: dict[str, str], tolerations: Iterable[Toleration]) -> None:
    from kfp import kubernetes

    for label, value in labels.items():
        kubernetes.add_node_selector(task, label_key=label, label_value=value)
    for t in tolerations:
        kubernetes.add_toleration(task, key=t.key, operator=t.operator, value=t.value, effect=t.effect)


def _choose_by_affinity(task: PipelineTask, silo: Silo) -> None:
    from kfp import kubernetes

    if nodes := silo.placement.affinity.get("nodeAffinity"):
        try:
            kubernetes.add_node_affinity_json(task, nodes)
        except ValueError as error:
            raise FederationError(f"silo {silo.id!r}: placement.affinity.nodeAffinity: {error}; write it as in a pod") from None


def _set_cpu(task: PipelineTask, where: str, quantity: str) -> None:
    try:
        task.set_cpu_request(quantity)
    except ValueError:
        raise FederationError(f"{where}: KFP wants 4 or 500m, got {quantity!r}; write it so") from None


def _set_memory(task: PipelineTask, where: str, quantity: str) -> None:
    try:
        task.set_memory_request(quantity).set_memory_limit(quantity)
    except ValueError:
        rule = "KFP wants a whole number of bytes with Ki, Mi, Gi, Ti, K, M, G or T"
        raise FederationError(f"{where}: {rule}, got {quantity!r}; write it so") from None


def _give_terms(task: PipelineTask, config_map: str) -> None:
    """The federation file, where the store is and how it is reached, and a folder to write to: the container's own need not be writable."""
    from kfp import kubernetes

    kubernetes.use_config_map_as_volume(task, config_map_name=config_map, mount_path=FEDERATION_FOLDER, optional=True)
    name, keys = job_manifest.STORE
    for key in (*keys, *job_manifest.WAY):
        kubernetes.use_config_map_as_env(task, config_map_name=name, config_map_key_to_env={key: key}, optional=True)
    authority, folder = job_manifest.AUTHORITY
    kubernetes.use_config_map_as_volume(task, config_map_name=authority, mount_path=folder, optional=True)
    kubernetes.empty_dir_mount(task, volume_name="scratch", mount_path=SCRATCH)
    task.set_env_variable("HOME", f"{SCRATCH}/home")


def _give_credentials(task: PipelineTask, secret: str, keys: tuple[str, ...]) -> None:
    from kfp import kubernetes

    kubernetes.use_secret_as_env(task, secret_name=secret, secret_key_to_env={k: k for k in keys}, optional=True)


def _mount_claims(task: PipelineTask, claims: Iterable[Claim]) -> None:
    from kfp import kubernetes

    for c in claims:
        kubernetes.mount_pvc(task, pvc_name=c.claim, mount_path=c.mount)


def _give_secrets(task: PipelineTask, secrets: Iterable[SecretUse], *, optional: bool) -> None:
    from kfp import kubernetes

    for secret in secrets:
        for variable, key in secret.env.items():  # one by one: a key may be wanted under two names
            kubernetes.use_secret_as_env(task, secret_name=secret.name, secret_key_to_env={key: variable}, optional=optional)
        if secret.mount:
            kubernetes.use_secret_as_volume(task, secret_name=secret.name, mount_path=secret.mount, optional=optional)
        if secret.mount == KEYS_FOLDER:
            task.set_env_variable(FOLDER_VARIABLE, KEYS_FOLDER)
