"""A federation through the images, one container a box: a silo's by its own Job's manifest, the coordinator's by the command KFP gives them.

Each container gets the folders of its own party and no other's. What a cluster would do is done by hand: a claim, a secret and a ConfigMap are
folders here.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kubernetes_api import ALL_JOB_VERBS, Cluster

from silotune.components.cluster.job_manifest import CONFIG_MAP, job_of
from silotune.components.federation import Federation
from silotune.components.launcher import LAUNCHER_VARIABLE

pytestmark = pytest.mark.images

SILOS = ("north", "south")
DIGEST = "registry.example/silotune-silo@sha256:" + "0" * 64


@dataclass
class Parties:
    """The folders of all parties and what runs in containers on them."""

    folder: Path
    contained: Callable[..., subprocess.CompletedProcess[str]]
    images: dict[str, str]  # silo, coordinator
    outputs: list[str] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.folder / "federation" / "federation.yaml"

    def place(self, *names: str) -> Path:
        """A folder that an arbitrary user may write."""
        place = self.folder.joinpath(*names)
        place.mkdir(parents=True, exist_ok=True)
        place.chmod(0o777)
        return place

    def key(self, party: str) -> str:
        """A party's new key pair, made by the command in its image; the public half."""
        image = self.images["coordinator" if party == "coordinator" else "silo"]
        folder = self.place(party, "keys")
        done = self.contained(image, "silotune", "keys", "new", party, "--folder", "/keys", write={folder: "/keys"})
        assert done.returncode == 0, done.stderr
        return (folder / f"{party}.pub").read_text().strip()

    def job(self, box: str, silo: str, turn: str = "") -> str:
        """A silo's box, as its Job's manifest says; returns the status."""
        pod = job_of(Federation.load(self.file), silo, box, turn)["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        volumes = {v["name"]: v for v in pod["volumes"]}
        write, read = {}, {}
        for mount in container["volumeMounts"]:
            if place := self._place_of(silo, volumes[mount["name"]]):
                (read if mount.get("readOnly") else write)[place] = mount["mountPath"]
        variables = {e["name"]: e["value"] for e in container["env"] if "value" in e}
        done = self.contained(
            self.images["silo"],
            *container["command"],
            *container["args"],
            write=write,
            read=read,
            variables=variables | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def _place_of(self, silo: str, volume: dict[str, Any]) -> Path | None:
        if "persistentVolumeClaim" in volume:
            claim = volume["persistentVolumeClaim"]["claimName"]
            return self.folder / claim if claim in ("store", "base") else self.folder / silo / claim
        if "secret" in volume:
            return self.folder / silo / "keys"
        named = volume.get("configMap", {}).get("name")
        return self.folder / "federation" if named == CONFIG_MAP else None  # the rest is empty, or need not be there

    def task(self, component: Any, image: str, *, network: str = "none", variables: dict[str, str] | None = None, **arguments: Any) -> str:
        """A component in a container, by the very command that KFP compiles for it; returns its output."""
        compiled = json_format.MessageToDict(component.pipeline_spec)
        (executor,) = compiled["deploymentSpec"]["executors"].values()
        (definition,) = compiled["components"].values()
        out = self.place("outputs", f"{len(list((self.folder / 'outputs').glob('*'))) if (self.folder / 'outputs').exists() else 0}")
        outputs = definition["outputDefinitions"]
        given = {
            "inputs": {"parameterValues": arguments},
            "outputs": {
                "parameters": {name: {"outputFile": f"/out/{name}"} for name in outputs.get("parameters", {})},
                "artifacts": {
                    name: {"artifacts": [{"name": name, "type": kind["artifactType"], "uri": f"/out/{name}", "metadata": {}}]}
                    for name, kind in outputs.get("artifacts", {}).items()
                },
                "outputFile": "/out/executor_output.json",
            },
        }
        words = [json.dumps(given) if word == "{{$}}" else word for word in executor["container"]["args"]]
        done = self.contained(
            image,
            *executor["container"]["command"],
            *words,
            network=network,
            write={out: "/out", self.folder / "store": "/store"},
            read={
                self.folder / "base": "/base",
                self.folder / "federation": "/federation",
                self.folder / "coordinator" / "keys": "/keys",
            },
            variables={"SILOTUNE_WORK": "/tmp/work", "SILOTUNE_KEYS": "/keys", "OMP_NUM_THREADS": "1"} | (variables or {}),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return str(json.loads((out / "executor_output.json").read_text())["parameterValues"]["Output"])

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """silotune, in the coordinator's image."""
        return self.contained(
            self.images["coordinator"],
            "silotune",
            *words,
            read={
                self.folder / "store": "/store",
                self.folder / "federation": "/federation",
                self.folder / "coordinator" / "keys": "/keys",
            },
            variables={"SILOTUNE_WORK": "/tmp/work", "SILOTUNE_KEYS": "/keys"},
        )


@pytest.fixture
def mlflow(tmp_path: Path) -> Iterator[str]:
    """A tracking server on a loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--artifacts-destination", str(tmp_path / "artifacts")]
    with (tmp_path / "mlflow.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "mlflow.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(log.read_text())


@pytest.fixture
def parties(tmp_path: Path, silo_image: str, coordinator_image: str, contained: Any, tiny_llama: Path) -> Parties:
    """Two silos and a coordinator, each with its folder and its keys; no file of the federation yet."""
    parties = Parties(tmp_path, contained, {"silo": silo_image, "coordinator": coordinator_image})
    shutil.copytree(tiny_llama, tmp_path / "base")
    parties.place("base")
    for path in (tmp_path / "base").iterdir():
        path.chmod(0o644)
    parties.place("store")
    for s, silo in enumerate(SILOS):
        records = parties.place(silo, "silotune-silo")
        for split, count in (("train", 12 + s), ("valid", 4), ("test", 4)):
            lines = ({"prompt": f"what is case {i} of {silo}?", "response": f"it is {'abcdefgh'[(i + s) % 8] * 3}"} for i in range(count))
            (records / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return parties


def write_federation(parties: Parties, tracking: str) -> None:
    claims = [{"claim": "silotune-silo", "mount": "/silo"}, {"claim": "store", "mount": "/store"}]
    claims.append({"claim": "base", "mount": "/base", "read_only": True})
    files = {split: f"/silo/{split}.jsonl" for split in ("train", "valid", "test")}
    placement = {"namespace": "silo", "image": DIGEST, "claims": claims}
    terms = {
        "name": "boxed",
        "model": {"base": "/base", "lora": {"r": 2, "target_modules": "all-linear"}},
        "data": {"max_length": 64},
        "silos": [{"id": silo, **files, "storage": f"/silo/{silo}", "placement": placement} for silo in SILOS],
        "rounds": {"total": 1, "quorum": 2},
        "training": {"steps": 2, "batch_size": 3, "learning_rate": 0.01},
        "storage": {"root": "/store"},
        "tracking": {"uri": tracking},
        "security": {"keys": {party: parties.key(party) for party in ("coordinator", *SILOS)}},
    }
    parties.place("federation")
    parties.file.write_text(yaml.safe_dump(terms))


def test_a_federation_runs_box_by_box(parties: Parties, mlflow: str) -> None:
    from silotune.components.aggregate.component import aggregate
    from silotune.components.export.component import export
    from silotune.components.initialize.component import initialize

    write_federation(parties, mlflow)
    silo, coordinator = parties.images["silo"], parties.images["coordinator"]
    told = {"federation": "/federation/federation.yaml"}

    ready = [parties.job("preprocess", s) for s in SILOS]
    assert [status.partition(": ")[0].split()[1].rstrip(":") for status in ready] == ["ok", "ok"], ready
    turn = parties.task(initialize, silo, network="host", statuses=ready, **told)
    assert turn.startswith("round:1"), turn
    trained = [parties.job("train", s, turn) for s in SILOS]
    turn = parties.task(aggregate, coordinator, network="host", turn=turn, statuses=trained, **told)
    evaluated = [parties.job("evaluate", s, turn) for s in SILOS]
    # The images have spoken to a server by now; it takes no model version that lies in a folder of ours, as this test's store does.
    parties.file.write_text(parties.file.read_text().replace(mlflow, "none"))
    location = parties.task(export, silo, turn=turn, statuses=evaluated, **told)

    exported = parties.folder / "store" / Path(location).relative_to("/store")
    assert (exported / "adapter_model.safetensors").stat().st_size > 0
    verified = parties.command("verify", "/federation/federation.yaml")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    status = json.loads(parties.command("status", "/federation/federation.yaml", "--json").stdout)
    assert status["export"] == location
    (experiment,) = _ask(mlflow, "experiments/search", {"max_results": 9, "filter": "name = 'boxed'"})["experiments"]
    (run,) = _ask(mlflow, "runs/search", {"experiment_ids": [experiment["experiment_id"]]})["runs"]
    logged = {metric["key"]: metric["step"] for metric in run["data"]["metrics"]}
    assert logged["global/loss"] == 0
    assert logged["silo/north/tokens"] == logged["round/participants"] == 1


def _ask(server: str, what: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{server}/api/2.0/mlflow/{what}", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return dict(json.load(answer))


def test_a_launcher_needs_the_coordinators_image_only(parties: Parties, engine: str) -> None:
    from silotune.components.preprocess.component import preprocess

    write_federation(parties, "none")
    cluster = Cluster(rights={"token": {"silo": {"jobs": ALL_JOB_VERBS}}}, namespaces={"silo"})
    cluster.course = [(0.1, "run", {}), (0.5, "exit", {})]
    try:
        cluster.kubeconfig(parties.place("coordinator", "keys") / "kubeconfig", "token").chmod(0o644)
        variables = {LAUNCHER_VARIABLE: "job", "SILOTUNE_KUBECONFIG": "/keys/kubeconfig"}
        status = parties.task(
            preprocess,
            parties.images["coordinator"],
            network="host",
            variables=variables,
            federation="/federation/federation.yaml",
            silo="north",
        )
    finally:
        cluster.close()
    assert cluster.violations == []
    assert status.startswith("north ok")
    assert [job["metadata"]["namespace"] for job in cluster.jobs()] == ["silo"]
