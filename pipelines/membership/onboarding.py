"""Onboarding: the folder that a silo applies to its cluster.

    write_silo(federation, silo, folder, images=…)     kustomize files, IAM policy, the silo's copy of the terms, and a README.md

The manifests are those of ``k8s/base/silo``, copied, not generated: what a platform engineer has read there is what is applied, and all
that is the silo's own stands as patches in one `kustomization.yaml`. They are found beside this package (``../k8s``), which is the repository's
root in a checkout and ``site-packages/silotune`` where silotune is installed.

Secrets are never written: README.md lists the commands with which the silo makes them, on its side.
"""

from __future__ import annotations

import ipaddress
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from silotune.components.cluster import train_job
from silotune.components.errors import FederationError
from silotune.components.federation import Federation, Silo
from silotune.components.federation_file import is_remote
from silotune.pipelines.membership.bucket_policies import silo_policy
from silotune.pipelines.membership.job_terms import MOUNT, Patch, admitted, not_admitted, put, room
from silotune.pipelines.membership.silo_readme import MANIFESTS, handout, silo_readme
from silotune.pipelines.steward import policy_starter

NAMESPACE = "silotune-silo"  # in k8s/base/silo
IMAGE = r"[a-z0-9./:_-]+@sha256:[0-9a-f]{64}"  # as the admission policy asks for it
ACCOUNT = "silotune/silotune-launcher"  # namespace and name of the coordinator's service account
MARGIN = 1800  # seconds that a Job may have beyond the deadline: to be scheduled, pull its image, tell its end
JOBSET = "system:serviceaccount:kubeflow-system:jobset-controller-manager"  # as Kubeflow Trainer's own manifests install it
GPU_CLASS = "silotune-gpu"  # in k8s/components/gpu
LONGEST = 86400  # seconds a Job may have where the federation has no deadline
WIDEST = {4: 8, 6: 16}  # bits that a range of addresses has at least, by version of IP
# A node itself, and where clouds hand out its credentials.
NEVER = [ipaddress.ip_network(net) for net in ("127.0.0.0/8", "169.254.0.0/16", "::1/128", "fe80::/10", "fd00:ec2::/32")]


def write_silo(
    federation: Federation,
    silo_id: str,
    folder: Path,
    *,
    images: Sequence[str] = (),
    store_cidrs: Sequence[str] = (),
    endpoint: str = "",
    launcher: str = ACCOUNT,
    own_cluster: bool = False,
    own_endpoint: str = "",
    own_cidrs: Sequence[str] = (),
    gpus: int | None = None,
    storage: str = "50Gi",
    priority_classes: Sequence[str] = (),
    jobset: str = JOBSET,
) -> list[Path]:
    """Write a silo's folder, ready for ``kubectl apply -k`` or GitOps; returns its files. Namespace and policy bear the silo's id.

    Args:
        folder: is made; must be absent or empty, since a silo may have edited an older one.
        images: what may run on the silo's records, each as ``registry/name@sha256:…``; default: the image of its placement, which must be among
            them.
        store_cidrs: address ranges of the store, the only ones that Jobs can reach. Without any they reach nothing, until one is put in.
        endpoint: the store's URL; empty for AWS.
        launcher: ``namespace/name`` of the coordinator's service account in the silo's cluster.
        own_cluster: the coordinator has no account in the silo's cluster; one is made in the silo's namespace, and its token handed over.
        own_endpoint: URL of the S3 that holds the silo's own buckets (records, ledger), where that is another one than the store.
        own_cidrs: its address ranges.
        gpus: how many the silo's Jobs may use together; default: those of one training. Above 0 adds the runtime class of ``k8s/components/gpu``.
        storage: size of the silo's volume, as Kubernetes writes it.
        priority_classes: that its Jobs may name, besides the one of its placement.
        jobset: account that JobSet's controller runs as in the silo's cluster; of use where ``placement.trainer`` is ``trainjob``.

    What its Jobs may be otherwise follows from the silo's placement (`job_terms`): on which nodes they run, how many of these train together, how much
    each has, further claims, and whether a training is a TrainJob, whose runtime is written with it.

    Raises:
        FederationError: no such silo; a file that cannot run on Kubernetes; an argument of the wrong form; the folder is not empty.
    """
    silo = federation.silo(silo_id)
    images = images or [silo.placement.image or ""]
    gpus = silo.placement.gpus * silo.placement.nodes if gpus is None else gpus
    if silo.placement.priority_class:
        priority_classes = sorted({*priority_classes, silo.placement.priority_class})
    problems = [*_unfit(federation, silo, images), *_malformed(images, launcher, storage, priority_classes, jobset)]
    problems += [*_unreachable("store address", store_cidrs, "endpoint", endpoint)]
    problems += [*_unreachable("address of the silo's own S3", own_cidrs, "own endpoint", own_endpoint)]
    if problems:
        raise FederationError("\n".join([f"silo {silo_id} cannot be onboarded: {len(problems)} to correct", *(f"  {p}" for p in problems)]))
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FederationError(f"{folder}: must be an empty folder or none, since files of the silo's own would be lost; name another")
    policy = silo_policy(federation, silo_id, tls_only=not endpoint.startswith("http://"))
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(MANIFESTS / "base" / "silo", folder / "base", ignore=shutil.ignore_patterns("__*"))
    by_trainer = silo.placement.trainer == "trainjob"
    parts = [name for name, wanted in (("gpu", gpus), ("trainjob", by_trainer)) if wanted]
    for part in parts:
        shutil.copytree(MANIFESTS / "components" / part, folder / part, ignore=shutil.ignore_patterns("__*"))
    namespace = f"silotune-{silo_id}"
    account = f"{namespace}/silotune-launcher" if own_cluster else launcher
    if own_cluster:
        (folder / "launcher.yaml").write_text(handout("launcher.yaml").format(namespace=namespace))
    patches = _patches(federation, silo, images, account, storage)
    patches += _ways(store_cidrs, endpoint, own_cidrs, own_endpoint)
    patches += [*admitted(silo.placement, gpus, priority_classes), *room(silo.placement, gpus)]
    patches += _trainer(federation, silo, images[0], gpus, jobset) if by_trainer else []
    kustomization: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["base", *(["launcher.yaml"] if own_cluster else [])],
        **({"components": parts} if parts else {}),
        "configMapGenerator": [{"name": "silotune-federation", "namespace": namespace, "files": ["federation.yaml", "policy.yaml"]}],
        "generatorOptions": {"disableNameSuffixHash": True},
        "patches": [
            {"target": target, "patch": yaml.dump(operations, Dumper=_Plain, sort_keys=False, width=140)} for target, operations in patches
        ],
    }
    head = f"# Silo {silo_id} of federation {federation.name}: what of base/ is this silo's own. README.md says what it grants.\n"
    (folder / "kustomization.yaml").write_text(head + yaml.dump(kustomization, Dumper=_Blocks, sort_keys=False, width=140))
    shutil.copyfile(federation.file, folder / "federation.yaml")
    policy_starter.write(folder / "policy.yaml", federation, silo_id, None, images)
    (folder / "iam-policy.json").write_text(json.dumps(policy, indent=2) + "\n")
    (folder / "probe.yaml").write_text(handout("probe.yaml").format(namespace=namespace))
    logs = f"{silo.storage}/{federation.name}/logs"
    (folder / "logs.yaml").write_text(handout("logs.yaml").format(namespace=namespace, image=images[0], logs=logs, mount=MOUNT))
    (folder / "README.md").write_text(silo_readme(federation, silo, account, images, store_cidrs, endpoint, own_cluster))
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _unfit(federation: Federation, silo: Silo, images: Sequence[str]) -> list[str]:
    """Why a federation file is none for a silo on Kubernetes, or none for a silo that lets only these images run."""
    where = f"silos[{[s.id for s in federation.silos].index(silo.id)}]"
    problems = []
    if federation.launcher != "job":
        problems.append(f"launcher: must be job, got {federation.launcher!r}; with pod all silos share the coordinator's namespace")
    if federation.custody != "parties":
        problems.append("security.keys: must name a key of every party; make them with `silotune keys new`, each on its owner's machine")
    if (ours := silo.placement.image) and ours not in images:
        problems.append(
            f"{where}.placement.image: must be one of the images that the silo admits, got {ours!r}; every Job would be refused"
        )
    problems += [f"{where}.placement.{text}" for text in not_admitted(silo.placement)]
    for name in ("train", "valid", "test", "storage"):
        place = getattr(silo, name)
        if place is not None and (name == "storage" or not is_remote(place)) and Path(MOUNT) not in (Path(place), *Path(place).parents):
            problems.append(
                f"{where}.{name}: must lie in the silo's volume, under {MOUNT}, got {place!r}; write it as the silo's Job sees it"
            )
    return problems


def _malformed(images: Sequence[str], launcher: str, storage: str, classes: Sequence[str], jobset: str) -> list[str]:
    problems = [
        f"image: must be registry/name@sha256:<64 hex digits>, got {i!r}; a tag can change its content"
        for i in images
        if i and not _is(IMAGE, i)
    ]
    if not all(images):
        problems.append("image: must name at least one, by digest, here or in the silo's placement.image; without any nothing may run")
    if not _is(r"[a-z0-9-]{1,63}/[a-z0-9.-]{1,253}", launcher):
        problems.append(f"launcher: must be namespace/service-account, got {launcher!r}; the usual one is {ACCOUNT}")
    for name in classes:
        if not _is(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?", name) or name.startswith("system-"):
            problems.append(f"priority class: must be a name that is not the cluster's own system-…, got {name!r}; name one for such work")
    if not _is(r"system:serviceaccount:[a-z0-9-]{1,63}:[a-z0-9.-]{1,253}", jobset):
        problems.append(f"jobset: must be system:serviceaccount:namespace:name, got {jobset!r}; the usual one is {JOBSET}")
    if not _is(r"[1-9][0-9]*(Gi|Ti)", storage):
        problems.append(f"storage: must be a size such as 50Gi, got {storage!r}")
    return problems


def _unreachable(what: str, cidrs: Sequence[str], url: str, endpoint: str) -> Iterator[str]:
    """What is wrong with where an S3 is."""
    for cidr in cidrs:
        try:
            network = ipaddress.ip_network(cidr)
        except ValueError as error:
            yield f"{what}: must be a range such as 10.20.0.0/28, got {cidr!r}: {error}"
            continue
        if network.prefixlen < WIDEST[network.version]:
            yield f"{what}: must not be everywhere, got {cidr!r}; name the range of the store"
        elif any(network.version == never.version and network.overlaps(never) for never in NEVER):
            yield f"{what}: must hold no address of the node itself or of its cloud's metadata, got {cidr!r}; name the range of the store"
    if not _is(r"(https?://[A-Za-z0-9.-]+(:\d+)?/?)?", endpoint):
        yield f"{url}: must be http(s)://host[:port], got {endpoint!r}; empty is AWS"


def _is(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text) is not None


def _seconds(federation: Federation) -> int:
    """The longest a Job may take."""
    return int(federation.deadline_seconds) + MARGIN if federation.deadline_seconds else LONGEST


def _ways(cidrs: Sequence[str], endpoint: str, own_cidrs: Sequence[str], own_endpoint: str) -> list[Patch]:
    """To the store, and to the silo's own S3 where that is another one."""
    flow = [put("/spec/egress/0/ports/0/port", _port(endpoint))]
    if cidrs:
        flow.append(put("/spec/egress/0/to", [{"ipBlock": {"cidr": cidr}} for cidr in cidrs]))
    if own_cidrs:
        ports = [{"protocol": "TCP", "port": _port(own_endpoint)}]
        flow.append(put("/spec/egress/-", {"to": [{"ipBlock": {"cidr": cidr}} for cidr in own_cidrs], "ports": ports}))
    where = [put("/data/AWS_ENDPOINT_URL", endpoint), *([put("/data/SILO_AWS_ENDPOINT_URL", own_endpoint)] if own_endpoint else [])]
    return [
        ({"kind": "ConfigMap", "name": "silotune-store"}, where),
        ({"kind": "NetworkPolicy", "labelSelector": "silotune.dev/flow=store"}, flow),
    ]


def _port(endpoint: str) -> int:
    return int(match[1]) if (match := re.search(r":(\d+)/?$", endpoint)) else 80 if endpoint.startswith("http://") else 443


def _patches(federation: Federation, silo: Silo, images: Sequence[str], account: str, storage: str) -> list[Patch]:
    """What else differs from ``k8s/base/silo``, whatever the placement."""
    namespace = f"silotune-{silo.id}"
    subject_namespace, subject = account.split("/")
    return [
        ({"namespace": NAMESPACE}, [put("/metadata/namespace", namespace)]),
        ({"kind": "Namespace", "name": NAMESPACE}, [put("/metadata/name", namespace)]),
        (
            {"kind": "ConfigMap", "name": "silotune-job-terms"},
            [
                put("/data/silo", silo.id),
                put("/data/maxSeconds", str(_seconds(federation))),
                *(put(f"/data/image-{i}", v) for i, v in enumerate(images, 1)),
            ],
        ),
        ({"kind": "PersistentVolumeClaim"}, [put("/spec/resources/requests/storage", storage)]),
        (
            {"kind": "RoleBinding", "name": "silotune-launcher"},
            [put("/subjects/0/namespace", subject_namespace), put("/subjects/0/name", subject)],
        ),
        *_admission("silotune-jobs", silo.id),
    ]


def _admission(policy: str, silo: str) -> list[Patch]:
    """Its own name for a policy, which is cluster-scoped, and the namespace that it holds in."""
    namespace = f"silotune-{silo}"
    return [
        ({"kind": "ValidatingAdmissionPolicy", "name": policy}, [put("/metadata/name", f"{policy}-{silo}")]),
        (
            {"kind": "ValidatingAdmissionPolicyBinding", "name": policy},
            [
                put("/metadata/name", f"{policy}-{silo}"),
                put("/spec/policyName", f"{policy}-{silo}"),
                put("/spec/paramRef/namespace", namespace),
                put("/spec/matchResources/namespaceSelector/matchLabels/kubernetes.io~1metadata.name", namespace),
            ],
        ),
    ]


def _trainer(federation: Federation, silo: Silo, image: str, gpus: int, jobset: str) -> list[Patch]:
    """The silo's own runtime, and who may make Jobs of it."""
    place = silo.placement.model_copy(update={"image": silo.placement.image or image})
    if gpus and not place.runtime_class:  # a launcher's Job names it; a TrainJob cannot
        place = place.model_copy(update={"runtime_class": GPU_CLASS})
    runtime = train_job.runtime_of(place, silo.id, _seconds(federation))
    job = "/spec/template/spec/replicatedJobs/0/template/spec"
    (made,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return [
        ({"kind": "TrainingRuntime", "name": train_job.RUNTIME}, [put(job, made["template"]["spec"])]),
        ({"kind": "ConfigMap", "name": "silotune-job-terms"}, [put("/data/jobsetController", jobset)]),
        *_admission("silotune-trainjobs", silo.id),
    ]


class _Blocks(yaml.SafeDumper):
    """Texts of several lines as blocks, so that the patches can be read."""


class _Plain(yaml.SafeDumper):
    """Without anchors: kustomize reads each patch by itself, and so do people."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Blocks.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)
)
