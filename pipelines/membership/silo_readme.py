"""The README of a silo's folder: what it grants, to whom, what is left to do before the first run, and how to revoke it.

silo_readme(federation, silo, …)     its text
handout(name)                        a text of ``k8s/handout``, to be filled in
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from silotune.components.federation import Federation, Silo
from silotune.components.federation_file import COORDINATOR, is_remote
from silotune.pipelines.membership.job_terms import MOUNT

MANIFESTS = Path(__file__).parents[2] / "k8s"


def handout(name: str) -> str:
    return (MANIFESTS / "handout" / name).read_text(encoding="utf-8")


def silo_readme(
    federation: Federation, silo: Silo, account: str, images: Sequence[str], cidrs: Sequence[str], endpoint: str, own_cluster: bool
) -> str:
    """
    Args:
        account: ``namespace/name`` of the coordinator's service account.
        images: what may run on the silo's records.
        cidrs, endpoint: the store's addresses and URL.
        own_cluster: the coordinator has no account of its own in the silo's cluster.
    """
    namespace = f"silotune-{silo.id}"
    secret = f"kubectl --namespace {namespace} create secret generic"
    keys = "\n".join(
        f"| {party} | `{key.public}` | {key.since} to {'the end' if key.until is None else key.until} |"
        for party, its in federation.public_keys.items()
        if party in (COORDINATOR, silo.id)
        for key in its
    )
    base = federation.model.base
    todo = [
        f"Apply: `kubectl apply -k .` as a cluster administrator; the admission policy is cluster-scoped. Then `kubectl label namespace {namespace} "
        "--list` must show `enforce=restricted`.",
        "Give the silo's user or role in the store the rights in `iam-policy.json`, and nothing else.",
        f"Its credentials, from files so that they stand in no history: `{secret} silotune-s3 --from-file=AWS_ACCESS_KEY_ID "
        "--from-file=AWS_SECRET_ACCESS_KEY` (no line break at the end of the files)",
        f"The silo's private key, made by `silotune keys new {silo.id}` on the silo's side: `{secret} silotune-keys --from-file={silo.id}.pem`. "
        "Its public half must be the one above.",
        f"Only if the registry asks who pulls: a secret `silotune-registry` of type `kubernetes.io/dockerconfigjson` in `{namespace}`.",
        _records(silo, secret),
        "Read `federation.yaml`. It is the silo's own copy of the terms: paths may be changed, terms may not, and every change is applied "
        "with `kubectl apply -k .`.",
        f"Read `policy.yaml`, tighten it, and look at the result: `silotune review federation.yaml --policy policy.yaml --silo {silo.id}`. It is the "
        "silo's own, which every Job of its insists on before it reads a record; delete what you do not want to rule.",
        "Check that the network plug-in enforces policies; many do not: `probe.yaml` says how.",
    ]
    if not base.startswith(f"{MOUNT}/") and not is_remote(base):
        todo.append(
            f"Put the base model in the volume and name its folder in `federation.yaml`: `model.base` is `{base}`, which no Job can reach from here."
        )
    if "${" in federation.file.read_text(encoding="utf-8"):
        todo.append("`federation.yaml` has `${NAME}` in it, and Jobs have no such variables: write the values.")
    if not cidrs:
        todo.append(
            "Name the store's address range in `kustomization.yaml` (NetworkPolicy `jobs-to-store`): until then Jobs reach no store."
        )
    if not silo.placement.node_selector and not own_cluster:
        todo.append(
            "Where others have root on nodes of this cluster, pin Jobs to the silo's own: `node-1: LABEL=VALUE` in `silotune-job-terms`, the same in "
            "`placement.node_selector` of the federation file, and a taint that keeps others away (`toleration-1: KEY`)."
        )
    if silo.placement.nodes > 1:
        todo.append(
            f"Have a storage class that several nodes can mount at once: a training has {silo.placement.nodes}, and the claim `silotune-silo` asks for "
            "`ReadWriteMany` (NFS, CephFS, FSx, Filestore, Azure Files; name it in `kustomization.yaml`). With any other the pods wait for ever."
        )
    if silo.placement.trainer == "trainjob":
        todo.append(
            "Kubeflow Trainer 2.0 or newer must run in this cluster. `jobsetController` in `kustomization.yaml` is the account that JobSet's "
            "controller runs as: `kubectl get pods --all-namespaces --selector control-plane=controller-manager "
            "--output=custom-columns=NS:.metadata.namespace,ACCOUNT:.spec.serviceAccountName` shows it. The runtime `silotune` there is what runs; "
            "write a new folder after a change of image or placement."
        )
    todo.append(
        "Behind a proxy, or with an authority of the silo's own: `silotune-store` and the ConfigMap `silotune-ca` take them (`base/settings.yaml` "
        "says which words). Jobs reach a proxy only where `jobs-to-store` names it."
    )
    if own_cluster:
        todo.append(
            f"Hand the coordinator a kubeconfig with a token that ends: `kubectl --namespace {namespace} create token silotune-launcher "
            "--duration=720h`. Send it encrypted, and make a new one in time."
        )
    by_trainer = silo.placement.trainer == "trainjob"
    together = f"The pods of a training (at most {silo.placement.nodes}) reach each other; " if silo.placement.nodes > 1 else ""
    runtime = (
        " A *TrainJob* may name the runtime `silotune` of this folder, plain words, how many nodes and what each needs, and nothing else "
        f"(policy `silotune-trainjobs-{silo.id}`); the Job that becomes of it is held to the same rules."
    )
    return handout("README.md").format(
        kinds="*Jobs* and *TrainJobs*" if by_trainer else "*Jobs*",
        runtime=runtime if by_trainer else "",
        together=f"{together}no other way out, none in." if together else "No other way out, none in.",
        silo=silo.id,
        federation=federation.name,
        namespace=namespace,
        account=account.replace("/", ":"),
        images="\n".join(f"- `{image}`" for image in images),
        store=f"{', '.join(cidrs) or 'nothing yet'}; `{endpoint or 'AWS'}`",
        root=federation.storage.root,
        keys=keys,
        todo="\n".join(f"- [ ] {line}" for line in todo),
    )


def _records(silo: Silo, secret: str) -> str:
    """How the records get to where Jobs read them."""
    if not is_remote(silo.train):
        return (
            f"Put the records in the volume (claim `silotune-silo`), where `federation.yaml` names them: `{silo.train}`. A pod that copies them must "
            "meet the restricted Pod Security Standard; delete it afterwards."
        )
    return (
        f"The records lie in `{silo.train}`. Where a user of their own reads them, its credentials are a Secret of its own, "
        f"`{secret} silotune-own-s3 --from-file=AWS_ACCESS_KEY_ID --from-file=AWS_SECRET_ACCESS_KEY`; else `silotune-s3` is used. Their S3, where "
        "it is another one than the store, is `SILO_AWS_ENDPOINT_URL` of `silotune-store`, and `jobs-to-store` must let Jobs reach it."
    )
