"""What a trial applies: `silotune onboard`'s folder for each silo, the S3 of k8s/components, and the account and settings of the tasks.

    write(place, federation, folder)      a kustomization, ready for `kubectl apply -k`

Secrets are in none of it; they and the pods that bring records and base model are made through the API (`secrets_of`, `seed_pods`). All bear
the label of the trial, by which all of it is found again and deleted.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from silotune.components.cluster.job_manifest import pod_of
from silotune.components.federation import Federation
from silotune.pipelines.membership import onboarding
from trial.place import LABEL, Place
from trial.terms import BASE, BUCKET, RECORDS

ROOT = Path(__file__).parents[3]
K8S = ROOT / "k8s"
SCRIPTS = (Path(__file__).parent / "seed.py", ROOT / "examples/hospitals/notes.py", ROOT / "examples/hospitals/base.py")
SIZES = {"steps": 60, "passages": 1500, "records": 200}  # of the base model's warming up; of each split
STORE_SETTINGS = "silotune-store"  # the tasks' ConfigMap that says where the store is; the one name that is not the trial's own
Object = dict[str, Any]


def write(place: Place, federation: Federation, folder: Path) -> Path:
    """Write the kustomization; returns its folder.

    Args:
        folder: absent or empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for silo in place.silos:
        onboarding.write_silo(
            federation, silo, folder / silo, images=[place.silo_image], endpoint=place.endpoint,
            launcher=f"{place.tasks}/{place.ours}", storage="2Gi",
        )  # fmt: skip
    shutil.copytree(K8S / "components" / "seaweedfs", folder / "seaweedfs")
    (folder / "tasks.yaml").write_text(yaml.safe_dump_all(_tasks(place), sort_keys=False))
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["tasks.yaml", *place.silos],
        "components": ["seaweedfs"],
        "labels": [{"pairs": place.labels}],
        "patches": [{"target": target, "patch": yaml.safe_dump(patch)} for target, patch in _patches(place)],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization, sort_keys=False))
    return folder


def _tasks(place: Place) -> list[Object]:
    """The account that the run's tasks use, with the rights that overlays/kind gives it, and where they find the store."""
    account, role, binding, settings = yaml.safe_load_all((K8S / "overlays" / "kind" / "launcher.yaml").read_text())
    for o in (account, role, binding):
        o["metadata"] |= {"name": place.ours, "namespace": place.tasks}
    binding["roleRef"]["name"] = binding["subjects"][0]["name"] = place.ours
    binding["subjects"][0]["namespace"] = place.tasks
    settings["metadata"] |= {"namespace": place.tasks}
    settings["data"] = {"AWS_ENDPOINT_URL": place.endpoint}
    return [account, role, binding, settings]


def _patches(place: Place) -> list[tuple[Object, list[Object]]]:
    """(target, JSON patch): the S3 in a namespace of the trial's own, reached by its silos, the run's tasks and what brings the base model."""
    seaweedfs = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": place.store}},
                 "podSelector": {"matchLabels": {"app.kubernetes.io/name": "seaweedfs"}}}  # fmt: skip
    silos = {"namespaceSelector": {"matchLabels": {LABEL: place.identity, "silotune.dev/part": "silo"}}}
    at = {"matchLabels": {"kubernetes.io/metadata.name": place.tasks}}
    tasks = {"namespaceSelector": at, "podSelector": {"matchLabels": {"pipelines.kubeflow.org/v2_component": "true"}}}
    seed = {"namespaceSelector": at, "podSelector": {"matchLabels": place.labels}}
    url = {"op": "replace", "path": "/data/AWS_ENDPOINT_URL", "value": place.endpoint}
    return [
        ({"namespace": "silotune-store"}, [{"op": "replace", "path": "/metadata/namespace", "value": place.store}]),
        ({"kind": "Namespace", "name": "silotune-store"}, [{"op": "replace", "path": "/metadata/name", "value": place.store}]),
        ({"kind": "NetworkPolicy", "labelSelector": "silotune.dev/flow=store"},
         [{"op": "replace", "path": "/spec/egress/0/to", "value": [seaweedfs]}]),
        ({"kind": "NetworkPolicy", "name": "store-from-parties"},
         [{"op": "replace", "path": "/spec/ingress/0/from", "value": [silos, tasks, seed]}]),
        ({"kind": "ConfigMap", "name": STORE_SETTINGS}, [url]),
    ]  # fmt: skip


def secrets_of(
    place: Place, keys: Mapping[str, bytes], credentials: Mapping[str, tuple[str, str]], mlflow: tuple[str, str]
) -> list[Object]:
    """Every Secret of the trial.

    Args:
        keys: party -> private key as PEM.
        credentials: party, and ``admin`` who may make the bucket -> access key and secret key.
        mlflow: user and password, empty where MLflow asks nobody.
    """
    identities = [
        {
            "name": party,
            "credentials": [{"accessKey": access, "secretKey": secret}],
            "actions": ["Admin"] if party == "admin" else [f"{verb}:{BUCKET}" for verb in ("Read", "Write", "List")],
        }
        for party, (access, secret) in credentials.items()
    ]

    def of_s3(party: str) -> dict[str, str]:
        return dict(zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), credentials[party], strict=True))

    ours = place.ours
    found = [
        _secret(place, place.store, "seaweedfs-s3", {"s3.json": json.dumps({"identities": identities})}),
        _secret(place, place.tasks, f"{ours}-s3", of_s3("coordinator")),
        _secret(place, place.tasks, f"{ours}-keys", {"coordinator.pem": keys["coordinator"].decode()}),
        _secret(place, place.tasks, f"{ours}-seed", of_s3("admin")),
    ]
    if mlflow[0]:
        found.append(
            _secret(
                place,
                place.tasks,
                f"{ours}-mlflow",
                dict(zip(("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"), mlflow, strict=True)),
            )
        )
    for silo in place.silos:
        found += [
            _secret(place, place.namespace(silo), "silotune-s3", of_s3(silo)),
            _secret(place, place.namespace(silo), "silotune-keys", {f"{silo}.pem": keys[silo].decode()}),
        ]
    return found


def _secret(place: Place, namespace: str, name: str, data: Mapping[str, str]) -> Object:
    encoded = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": _meta(place, namespace, name), "type": "Opaque", "data": encoded}


def config_map(place: Place, namespace: str, name: str, data: Mapping[str, str]) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _meta(place, namespace, name), "data": dict(data)}


def _meta(place: Place, namespace: str, name: str) -> Object:
    return {"name": name, "namespace": namespace, "labels": dict(place.labels)}


def seeds(place: Place, federation: Federation) -> list[tuple[Object, Object]]:
    """(ConfigMap of scripts, pod that runs them): the base model from the tasks' namespace, and each hospital's records in its silo."""
    name, scripts = f"{place.ours}-seed", {script.name: script.read_text(encoding="utf-8") for script in SCRIPTS}
    to_store: Object = {
        "serviceAccountName": place.ours,
        "words": ["base", BUCKET, BASE, str(SIZES["steps"]), str(SIZES["passages"])],
        "env": [
            *({"name": key, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}} for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")),
            {"name": "AWS_ENDPOINT_URL", "value": place.endpoint},
            {"name": "AWS_DEFAULT_REGION", "value": "us-east-1"},
        ],
    }  # fmt: skip
    made = [(config_map(place, place.tasks, name, scripts), _seed_pod(place, federation, place.tasks, to_store))]
    for silo in place.silos:
        words = ["records", silo.removeprefix(f"{place.identity}-"), RECORDS, str(SIZES["records"])]
        here = place.namespace(silo)
        pod = _seed_pod(place, federation, here, {"serviceAccountName": "silotune-silo", "words": words, "env": []}, claim="silotune-silo")
        made.append((config_map(place, here, name, scripts), pod))
    return made


def _seed_pod(place: Place, federation: Federation, namespace: str, its: Object, claim: str = "") -> Object:
    """As a silo's own Job is secured: user, capabilities, read-only root."""
    like = pod_of(federation.silos[0].placement, 0)
    container, name = like["containers"][0], f"{place.ours}-seed"
    mounts = [{"name": "scripts", "mountPath": "/seed", "readOnly": True}, {"name": "scratch", "mountPath": "/tmp"}]
    volumes: list[Object] = [{"name": "scripts", "configMap": {"name": name}}, {"name": "scratch", "emptyDir": {}}]
    if claim:
        mounts.append({"name": "silo", "mountPath": "/silo"})
        volumes.append({"name": "silo", "persistentVolumeClaim": {"claimName": claim}})
    fixed = [{"name": "HOME", "value": "/tmp/home"}, {"name": "HF_HUB_OFFLINE", "value": "1"}]
    return {
        "apiVersion": "v1", "kind": "Pod", "metadata": _meta(place, namespace, name),
        "spec": {
            "restartPolicy": "Never", "activeDeadlineSeconds": 900, "automountServiceAccountToken": False,
            "serviceAccountName": its["serviceAccountName"], "securityContext": like["securityContext"], "volumes": volumes,
            "containers": [{
                "name": "seed", "image": place.silo_image, "command": ["python", "/seed/seed.py"], "args": its["words"],
                "env": [*fixed, *its["env"]], "volumeMounts": mounts, "securityContext": container["securityContext"],
                "resources": {"requests": {"cpu": "100m", "memory": "1Gi"}, "limits": {"memory": "1Gi"}},
            }],
        },
    }  # fmt: skip
