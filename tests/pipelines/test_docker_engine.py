"""The Docker engine without a Docker engine: what it runs where, what it says where it cannot, and how it judges what a run came to."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler, local

from silotune.components.errors import FederationError, UnreachableError
from silotune.components.federation import Federation
from silotune.pipelines import docker_engine
from silotune.pipelines.container_plan import PARTY_VARIABLE, Images
from silotune.pipelines.docker_engine import Ended, verdict
from silotune.pipelines.federated_finetuning import federated_finetuning

LIES = Ended("/models/1", "")  # all went well, says the runner


def containers(federation: Federation, folder: Path, **options: Any) -> dict[str, Any]:
    """Box -> its container in the compiled pipeline."""
    compiler.Compiler().compile(federated_finetuning(federation, 1, **options), str(folder / "p.yaml"))
    spec = next(yaml.safe_load_all((folder / "p.yaml").read_text()))
    found = {}
    for component in spec["components"].values():
        for task in component.get("dag", {}).get("tasks", {}).values() or ():
            found[task["taskInfo"]["name"]] = task["componentRef"]["name"]
    found |= {t["taskInfo"]["name"]: t["componentRef"]["name"] for t in spec["root"]["dag"]["tasks"].values()}
    executors = {name: c["executorLabel"] for name, c in spec["components"].items() if "executorLabel" in c}
    return {box: spec["deploymentSpec"]["executors"][executors[name]]["container"] for box, name in found.items() if name in executors}


def test_each_box_has_the_image_and_the_party_it_belongs_to(make_federation: Any, tmp_path: Path) -> None:
    found = containers(Federation.load(make_federation()), tmp_path, images=Images("with-torch:1", "without:1"))
    told = {box: (c["image"], {e["name"]: e["value"] for e in c["env"]}[PARTY_VARIABLE]) for box, c in found.items()}
    silos = {f"{box} {silo}": ("with-torch:1", silo) for box in ("preprocess", "train", "evaluate") for silo in ("east", "north", "south")}
    assert told == silos | {
        "initialize": ("with-torch:1", "coordinator"),
        "aggregate": ("without:1", "coordinator"),
        "export": ("with-torch:1", "coordinator"),
    }


def test_a_group_is_combined_by_the_coordinator_without_torch(make_federation: Any, tmp_path: Path) -> None:
    federation = Federation.load(make_federation(aggregation={"fan_in": 2}))
    found = containers(federation, tmp_path, images=Images("with-torch:1", "without:1"))
    for box in ("combine 1", "combine 2", "aggregate"):
        assert found[box]["image"] == "without:1"
        assert {e["name"]: e["value"] for e in found[box]["env"]}[PARTY_VARIABLE] == "coordinator"


@pytest.mark.parametrize("model_image", [None, "r/torch@sha256:" + "b" * 64])
def test_on_a_cluster_initialize_and_export_run_the_model_image(make_federation: Any, tmp_path: Path, model_image: str | None) -> None:
    small = "r/small@sha256:" + "a" * 64
    silos = {"placement": {"namespace": "n", "image": "r/silo@sha256:" + "c" * 64}}
    file = make_federation(coordinator_image=small, **({"model_image": model_image} if model_image else {}))
    known = yaml.safe_load(file.read_text())
    known["silos"] = [silo | silos for silo in known["silos"]]
    file.write_text(yaml.safe_dump(known))
    found = containers(Federation.load(file), tmp_path, placed=True)
    assert {box: found[box]["image"] for box in ("initialize", "aggregate", "export")} == {
        "initialize": model_image or small,
        "aggregate": small,
        "export": model_image or small,
    }


# Where it cannot run


def test_no_engine_is_exit_code_5_with_the_cure(silotune: Any, federation: Federation, hand: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    code, _, err = silotune("run", federation.file, "--engine", "docker")
    assert code == UnreachableError.exit_code
    assert f"no Docker engine answers at unix://{tmp_path}/no.sock" in err
    assert "--engine local" in err


def test_an_engine_on_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://far:2376")
    with pytest.raises(FederationError, match=r"must be on this machine.*tcp://far:2376"):
        docker_engine.connect()


def test_without_its_client_the_cure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "docker.client", None)
    with pytest.raises(FederationError, match=r"pip install 'silotune\[docker\]'"):
        docker_engine.connect()


def test_images_are_for_docker_only(silotune: Any, federation: Federation) -> None:
    code, _, err = silotune("run", federation.file, "--silo-image", "x:1")
    assert (code, "need --engine docker" in err) == (2, True)


def test_the_restrictions_are_such_as_kfp_hands_on() -> None:
    known = docker_engine.restrictions(["name=seccomp,profile=default"])
    assert local.DockerRunner(**known, labels={}).container_run_args.keys() == {*known, "labels"}
    assert known["cap_drop"] == ["ALL"]
    assert (known["read_only"], known["network_mode"]) == (True, "none")
    assert docker_engine.restrictions(["name=rootless"])["user"] == "0:0"
    assert "label=disable" in docker_engine.restrictions(["name=selinux"])["security_opt"]


# What a run came to


def told(folder: Path, *events: dict[str, Any]) -> Path:
    lines = [{"at": 1.0, "silo": "", **event} for event in events]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_rounds_and_export_in_the_store_are_a_success_whatever_the_runner_says(
    federation: Federation, rounds: Any, two_rounds: Any, tmp_path: Path
) -> None:
    for ended in (LIES, Ended("", "Task export finished with status FAILURE")):
        assert verdict(federation, rounds, 0, 2, told(tmp_path), ended) == {"exit_code": 0, "message": "", "output": "/models/2"}


def test_a_success_without_the_rounds_in_the_store_is_a_failure(federation: Federation, rounds: Any, hand: Any, tmp_path: Path) -> None:
    hand.commit(0)
    hand.evaluate(0, {"north": 5.0})
    hand.export(hand.commit(1))
    found = verdict(federation, rounds, 0, 2, told(tmp_path, {"box": "train", "what": "started", "silo": "west"}), LIES)
    assert found["exit_code"] == 1
    for piece in ("says that it went well", "1 of 2 rounds are committed", "train west's container ended without a result"):
        assert piece in found["message"]


def test_a_success_without_an_export_in_the_store_is_a_failure(federation: Federation, rounds: Any, hand: Any, tmp_path: Path) -> None:
    hand.commit(0)
    hand.commit(1)
    found = verdict(federation, rounds, 0, 1, told(tmp_path), LIES)
    assert (found["exit_code"], "the model is not exported" in found["message"]) == (1, True)


def test_rounds_of_earlier_runs_do_not_count(federation: Federation, rounds: Any, two_rounds: Any, tmp_path: Path) -> None:
    found = verdict(federation, rounds, 2, 1, told(tmp_path), LIES)
    assert (found["exit_code"], "0 of 1 rounds" in found["message"]) == (1, True)


def test_a_box_that_told_why_it_broke_gives_the_exit_code(federation: Federation, rounds: Any, two_rounds: Any, tmp_path: Path) -> None:
    broke = {"box": "aggregate", "what": "broke", "exit_code": 3, "detail": "round 3 stays open"}
    found = verdict(federation, rounds, 2, 1, told(tmp_path, broke), Ended("", "a task failed"))
    assert found == {"exit_code": 3, "message": "round 3 stays open", "output": ""}


def test_a_box_that_ended_is_not_blamed(tmp_path: Path) -> None:
    folder = told(
        tmp_path,
        {"box": "initialize", "what": "started"},
        {"box": "initialize", "what": "ended"},
        {"box": "train", "what": "started", "silo": "north"},
        {"box": "train", "what": "ended", "silo": "north"},
        {"box": "train", "what": "started", "silo": "north"},
    )
    assert docker_engine.unfinished(folder) == ["train north"]
