"""The DAG: what it compiles to, and how its boxes fit their steps."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler

from silotune.components.errors import FederationError
from silotune.components.federation import Federation
from silotune.pipelines.federated_finetuning import federated_finetuning

GOLDEN = Path(__file__).parents[1] / "golden"
BESIDES = {  # what a box does for Kubeflow once its step is done
    "aggregate": [
        "from silotune.components.round_page import write",
        "following = {call}",
        "metrics.metadata.update(write(federation, turn, page.path))",
        "return following",
    ],
    "export": [
        "from silotune.components.recurrence import end_when_done",
        "location = {call}",
        "end_when_done(federation, turn)",
        "return location",
    ],
}
BOXES = ("preprocess", "initialize", "train", "share", "mask", "confirm", "unmask", "muster", "combine", "aggregate", "evaluate", "export")


def compiled(federation: Federation, rounds: int, folder: Path) -> dict[str, Any]:
    """The KFP IR without what changes from release to release of kfp."""
    compiler.Compiler().compile(federated_finetuning(federation, rounds), str(folder / "pipeline.yaml"))
    found = yaml.safe_load((folder / "pipeline.yaml").read_text())
    found.pop("sdkVersion")
    return found


def test_the_compiled_pipeline_is_the_golden_one(make_federation: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    found = compiled(Federation.load(make_federation()), 2, tmp_path)
    golden = GOLDEN / "three_silos_two_rounds.yaml"
    if request.config.getoption("--rewrite-golden"):
        golden.write_text(yaml.safe_dump(found, sort_keys=True))
    assert found == yaml.safe_load(golden.read_text()), "the DAG changed; if that is meant, run `make golden` and read the difference"


def test_it_is_unrolled_over_silos_and_rounds(make_federation: Any, tmp_path: Path) -> None:
    found = compiled(Federation.load(make_federation()), 3, tmp_path)
    tasks = found["root"]["dag"]["tasks"]
    names = [t["taskInfo"]["name"] for t in tasks.values()]
    assert sorted(n for n in names if n.startswith("round slot")) == ["round slot 1", "round slot 2", "round slot 3"]
    assert sum(n.startswith("preprocess ") for n in names) == sum(n.startswith("evaluate ") for n in names) == 3
    inner = next(c for n, c in found["components"].items() if n.startswith("comp-federated-round"))["dag"]["tasks"]
    assert sorted(t["taskInfo"]["name"] for t in inner.values()) == ["aggregate", "train east", "train north", "train south"]


FIVE = ("ada", "bo", "cy", "di", "ed")


def a_round(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tasks of one round, by the names that Kubeflow shows."""
    inner = next(c for n, c in found["components"].items() if n.startswith("comp-federated-round"))["dag"]["tasks"]
    return {t["taskInfo"]["name"]: t | {"key": key} for key, t in inner.items()}


def test_groups_of_silos_are_combined_between_train_and_aggregate(make_federation: Any, tmp_path: Path) -> None:
    federation = Federation.load(make_federation(silos=FIVE, aggregation={"fan_in": 2}))
    tasks = a_round(compiled(federation, 2, tmp_path))
    assert sorted(tasks) == ["aggregate", "combine 1", "combine 2", "combine 3", *(f"train {s}" for s in FIVE)]
    name_of = {t["key"]: name for name, t in tasks.items()}
    waits = {name: sorted(name_of[key] for key in t.get("dependentTasks", [])) for name, t in tasks.items()}
    assert waits == {
        **{f"train {s}": [] for s in FIVE},
        "combine 1": ["train ada", "train bo"], "combine 2": ["train cy", "train di"], "combine 3": ["train ed"],
        "aggregate": sorted(tasks.keys() - {"aggregate"}),
    }  # fmt: skip
    groups = {name: t["inputs"]["parameters"]["group"]["runtimeValue"]["constant"] for name, t in tasks.items() if "combine" in name}
    assert groups == {"combine 1": "1", "combine 2": "2", "combine 3": "3"}
    assert all(not t["cachingOptions"].get("enableCache") for t in tasks.values())


SECURE = {"privacy": {"secure_aggregation": {}}, "aggregation": {"clip": {"norm": 1.0}}}


def test_a_secure_round_musters_before_each_stage(make_federation: Any, tmp_path: Path) -> None:
    """train, then a muster each before share, mask, confirm and unmask, then aggregate: no box of a stage begins before those of the last have ended."""
    silos = ("ada", "bo", "cy")
    tasks = a_round(compiled(Federation.load(make_federation(silos=silos, **SECURE)), 2, tmp_path))
    of = {box: [f"{box} {s}" for s in silos] for box in ("train", "share", "mask", "confirm", "unmask")}
    name_of = {t["key"]: name for name, t in tasks.items()}
    waits = {name: sorted(name_of[key] for key in t.get("dependentTasks", [])) for name, t in tasks.items()}
    stages = ("share", "mask", "confirm", "unmask")
    told = {stage: [name for box in ("train", *stages[:n]) for name in of[box]] for n, stage in enumerate(stages)}
    assert waits == {
        **{key: [] for key in of["train"]},
        **{f"muster {stage}": sorted(before) for stage, before in told.items()},
        **{name: [f"muster {stage}"] for stage in told for name in of[stage]},
        "aggregate": sorted(name for names in of.values() for name in names),
    }
    fixed = {n: t["inputs"]["parameters"]["stage"]["runtimeValue"]["constant"] for n, t in tasks.items() if n.startswith("muster")}
    assert fixed == {f"muster {stage}": stage for stage in told}
    assert all(not t["cachingOptions"].get("enableCache") for t in tasks.values())


def test_the_tasks_of_secure_rounds_count_towards_what_a_run_holds(make_federation: Any) -> None:
    federation = Federation.load(make_federation(silos=FIVE, **SECURE))
    federated_finetuning(federation, 8)
    with pytest.raises(FederationError, match=r"5 silos × 9 rounds are 225 silos' tasks .* set per_run to at most 8"):
        federated_finetuning(federation, 9)


@pytest.mark.parametrize("aggregation", [{}, {"fan_in": 5}, {"strategy": "product"}, {"robust": {"rule": "krum"}}, {"clip": {"norm": 1.0}}])
def test_without_need_there_are_no_groups(make_federation: Any, tmp_path: Path, aggregation: dict[str, Any]) -> None:
    tasks = a_round(compiled(Federation.load(make_federation(silos=FIVE, aggregation=aggregation)), 1, tmp_path))
    assert not any(name.startswith("combine") for name in tasks)


def test_nothing_is_cached_and_no_secret_or_path_is_compiled_in(make_federation: Any, tmp_path: Path) -> None:
    file = make_federation()
    found = compiled(Federation.load(file), 1, tmp_path)
    dags = [found["root"]["dag"], *(c["dag"] for c in found["components"].values() if "dag" in c)]
    leaves = [t for dag in dags for t in dag["tasks"].values() if not t["taskInfo"]["name"].startswith("round slot")]
    assert leaves
    assert all(not t["cachingOptions"].get("enableCache") for t in leaves)
    assert str(file.parent) not in (tmp_path / "pipeline.yaml").read_text()


def test_too_many_trainings_for_one_run_are_refused_with_the_cure(make_federation: Any) -> None:
    federation = Federation.load(make_federation())
    with pytest.raises(FederationError, match=r"3 silos × 67 rounds are 201 .* set per_run to at most 66"):
        federated_finetuning(federation, 67)


@pytest.mark.parametrize("box", BOXES)
def test_a_box_has_the_signature_of_its_step(box: str) -> None:
    component = getattr(importlib.import_module(f"silotune.components.{box}.component"), box)
    run = importlib.import_module(f"silotune.components.{box}.step").run
    wanted = {name: re.sub(r"\[.*", "", str(p.annotation)) for name, p in inspect.signature(run).parameters.items()}
    types = {"String": "str", "JsonArray": "list", "List": "list"}
    assert {name: types[str(i.type).split("[")[0]] for name, i in component.component_spec.inputs.items()} == wanted
    body = [line.strip() for line in inspect.getsource(component.python_func).split("-> str:")[1].splitlines() if line.strip()]
    call = f"run({', '.join(wanted)})"
    assert body[0] == f"from silotune.components.{box}.step import run"
    assert body[1:] == [line.format(call=call) for line in BESIDES.get(box, ["return {call}"])]


def test_a_round_shows_its_numbers_and_its_page_on_kubeflow(make_federation: Any, tmp_path: Path) -> None:
    found = compiled(Federation.load(make_federation()), 1, tmp_path)
    shown = found["components"]["comp-aggregate"]["outputDefinitions"]["artifacts"]
    assert {name: its["artifactType"]["schemaTitle"] for name, its in shown.items()} == {
        "metrics": "system.Metrics",
        "page": "system.Markdown",
    }


def test_every_package_of_the_tree_is_installed() -> None:
    import tomllib

    root = Path(__file__).parents[2]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(("silotune", *p.parent.relative_to(root).parts))
        for top in ("components", "pipelines")
        for p in (root / top).rglob("__init__.py")
    }
    assert found | {"silotune.k8s"} == set(declared), "manifests go along as data"
