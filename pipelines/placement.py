"""Placement: what a silo's task needs from the cluster, said to KFP when the pipeline is compiled, as constants.

    place(task, federation, silo)      with launcher: pod, the task itself trains; with launcher: job, it only launches and watches

With ``launcher: job`` a placement is about the silo's Job, and goes to the silo's cluster (`job_manifest`); the task here is small, runs the
coordinator's image, and gets the silo's kubeconfig where it names one. With ``launcher: pod`` the same words are about the task's own pod.
KFP 2.17 has no word for some of them: these are refused, never dropped, since a pod without its runtime class or its priority would run, and
run otherwise than was agreed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from silotune.components import job_manifest
from silotune.components.errors import FederationError
from silotune.components.federation import Federation, Silo
from silotune.components.jobs_api import KUBECONFIG_VARIABLE
from silotune.components.launcher import LAUNCHER_VARIABLE

if TYPE_CHECKING:
    from kfp.dsl import PipelineTask

KUBECONFIG_FOLDER = "/kubeconfig"
KUBECONFIG_KEY = "kubeconfig"
FEDERATION_FOLDER = "/federation"
LAUNCHER_CPU, LAUNCHER_MEMORY = ("50m", "1"), ("192Mi", "512Mi")  # request, limit
RETRIES = 3  # of a launcher whose own pod was lost: the next one finds the Job by its name


def place(task: PipelineTask, federation: Federation, silo_id: str, *, coordinator_image: str | None = None) -> PipelineTask:
    """Place one silo's task (preprocess, train or evaluate).

    Args:
        coordinator_image: of the launcher, by digest; default: the one the component names.

    Raises:
        FederationError: the placement asks for what this launcher cannot give; with every such field.
    """
    silo = federation.silo(silo_id)
    task.set_env_variable(LAUNCHER_VARIABLE, federation.launcher)
    return place_launcher(task, silo, coordinator_image) if federation.launcher == "job" else place_work(task, silo)


def place_launcher(task: PipelineTask, silo: Silo, image: str | None) -> PipelineTask:
    """A light task in the coordinator's namespace; the silo's node pools, secrets and claims are its Job's."""
    from kfp import kubernetes

    job_manifest.require_possible(silo)
    if image:
        _require_digest(silo, "the coordinator's image", image)
        task.set_container_image(image)
    task.set_cpu_request(LAUNCHER_CPU[0]).set_cpu_limit(LAUNCHER_CPU[1])
    task.set_memory_request(LAUNCHER_MEMORY[0]).set_memory_limit(LAUNCHER_MEMORY[1])
    task.set_retry(RETRIES, backoff_duration="10s", backoff_factor=2.0, backoff_max_duration="120s")
    if secret := silo.placement.kubeconfig_secret:
        kubernetes.use_secret_as_volume(task, secret_name=secret, mount_path=KUBECONFIG_FOLDER)
        task.set_env_variable(KUBECONFIG_VARIABLE, f"{KUBECONFIG_FOLDER}/{KUBECONFIG_KEY}")
    return task


def place_work(task: PipelineTask, silo: Silo) -> PipelineTask:
    """The task does the silo's work: on its nodes, with its image, volumes and secrets."""
    _refuse_what_a_task_cannot_have(silo)
    _use_image(task, silo)
    _choose_nodes(task, silo)
    _ask_for_resources(task, silo)
    _mount_storage(task, silo)
    _give_secrets(task, silo)
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
    problems += job_manifest.several_processes(silo)
    if problems:
        raise FederationError("\n".join(problems))


def _require_digest(silo: Silo, what: str, image: str) -> None:
    if "@sha256:" not in image:
        raise FederationError(
            f"silo {silo.id!r}: {what}: must be named by digest, registry/name@sha256:…, got {image!r}; a tag can be moved"
        )


def _use_image(task: PipelineTask, silo: Silo) -> None:
    if image := silo.placement.image:
        _require_digest(silo, "placement.image", image)
        task.set_container_image(image)


def _choose_nodes(task: PipelineTask, silo: Silo) -> None:
    from kfp import kubernetes

    p = silo.placement
    for label, value in p.node_selector.items():
        kubernetes.add_node_selector(task, label_key=label, label_value=value)
    for t in p.tolerations:
        kubernetes.add_toleration(task, key=t.key, operator=t.operator, value=t.value, effect=t.effect)
    if nodes := p.affinity.get("nodeAffinity"):
        try:
            kubernetes.add_node_affinity_json(task, nodes)
        except ValueError as error:
            raise FederationError(f"silo {silo.id!r}: placement.affinity.nodeAffinity: {error}; write it as in a pod") from None


def _ask_for_resources(task: PipelineTask, silo: Silo) -> None:
    p = silo.placement
    if p.gpus:
        task.set_accelerator_type(p.gpu_type).set_accelerator_limit(p.gpus)
    settings = [("cpu", p.cpu, (task.set_cpu_request,)), ("memory", p.memory, (task.set_memory_request, task.set_memory_limit))]
    for field, quantity, setters in settings:
        for setter in setters if quantity else ():
            try:
                setter(quantity)
            except ValueError:
                rule = "KFP wants a whole number of bytes with Ki, Mi, Gi, Ti, K, M, G or T" if field == "memory" else "KFP wants 4 or 500m"
                raise FederationError(f"silo {silo.id!r}: placement.{field}: {rule}, got {quantity!r}; write it so") from None


def _mount_storage(task: PipelineTask, silo: Silo) -> None:
    from kfp import kubernetes

    for c in silo.placement.claims:
        kubernetes.mount_pvc(task, pvc_name=c.claim, mount_path=c.mount)
    if name := silo.placement.config_map:
        kubernetes.use_config_map_as_volume(task, config_map_name=name, mount_path=FEDERATION_FOLDER)


def _give_secrets(task: PipelineTask, silo: Silo) -> None:
    from kfp import kubernetes

    for secret in silo.placement.secrets:
        for variable, key in secret.env.items():  # one by one: a key may be wanted under two names
            kubernetes.use_secret_as_env(task, secret_name=secret.name, secret_key_to_env={key: variable})
        if secret.mount:
            kubernetes.use_secret_as_volume(task, secret_name=secret.name, mount_path=secret.mount)
