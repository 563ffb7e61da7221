"""Output control: an update that holds anything beside what the plan asks for does not leave the silo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import courses
import numpy as np
import pytest

from silotune.components.errors import RefusedError
from silotune.components.federation import Federation
from silotune.components.learning.tensor_file import open_tensor_file, to_bytes, write_tensor_file
from silotune.components.learning.update import KEY, Codec, Header, write_update
from silotune.components.protocol import Plan
from silotune.components.rounds import Rounds
from silotune.components.steward import egress
from silotune.components.steward.policy import Policy
from silotune.components.store.object_store import ObjectMissing
from silotune.components.train import step as train
from silotune.pipelines.simulate import Simulation

SCHEMA = {"a": [2, 3], "b": [4]}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return courses.Course(tmp_path).run(0).open(1)


def tensors(**changes: Any) -> dict[str, np.ndarray]:
    found = {name: np.linspace(0.1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape) for name, shape in SCHEMA.items()} | changes
    return {name: array for name, array in found.items() if array is not None}


def written(folder: Path, plan: Plan, arrays: dict[str, np.ndarray], codec: str = "float32", /, **facts: Any) -> Path:
    known: dict[str, Any] = {
        "federation": "fed", "agreement": plan.agreement, "round": 1, "silo": "north", "plan": plan.digest, "base": plan.base, "incoming": plan.incoming,
        "examples": 8, "tokens": 80, "steps": 4, "cursor": 8, "loss": 1.0, "norm": 0.0, "codec": Codec(name=codec), "tensors": {},
    }  # fmt: skip
    write_update(folder / "update", Header(**(known | facts)), arrays)
    return folder / "update"


def require(path: Path, plan: Plan, codec: str = "float32", policy: Policy | None = None) -> None:
    egress.require_update(path, plan, "fed", "north", SCHEMA, codec, policy)


@pytest.mark.parametrize("codec", ["float32", "bfloat16"])
def test_what_the_plan_asks_for_may_leave(tmp_path: Path, plan: Plan, codec: str) -> None:
    require(written(tmp_path, plan, tensors(), codec), plan, codec)


@pytest.mark.parametrize(
    ("arrays", "codec", "rule"),
    [
        ({"a": None}, "float32", "differs in 'a'"),
        ({"records": np.ones(3, np.float32)}, "float32", "differs in 'records'"),
        ({"a": np.ones((3, 2), np.float32)}, "float32", r"must hold 'a' as F32 of \[2, 3\], has F32 of \[3, 2\]"),
        ({"b": np.ones(5, np.float32)}, "float32", "must hold 'b'"),
        ({}, "bfloat16", "has BF16"),
    ],
)
def test_other_tensors_may_not(tmp_path: Path, plan: Plan, arrays: dict[str, Any], codec: str, rule: str) -> None:
    with pytest.raises(RefusedError, match=rule) as refused:
        require(written(tmp_path, plan, tensors(**arrays), codec), plan)
    assert refused.value.reason == "output control"


@pytest.mark.parametrize("field", ["federation", "agreement", "plan", "base", "incoming", "silo"])
def test_no_text_but_the_plans_own_stands_in_the_header(tmp_path: Path, plan: Plan, field: str) -> None:
    with pytest.raises(RefusedError, match=f"says another {field} than the plan"):
        require(written(tmp_path, plan, tensors(), **{field: "Mrs Smith, born 1950"}), plan)


def rewrite(path: Path, metadata: dict[str, str]) -> None:
    file = open_tensor_file(path)
    arrays = file.read_all()
    encoded = ((n, to_bytes(a, "F32")) for n, a in sorted(arrays.items()))
    write_tensor_file(path, {n: a.shape for n, a in arrays.items()}, "F32", encoded, dict(file.metadata) | metadata)


def test_nothing_hides_beside_the_header_or_behind_the_tensors(tmp_path: Path, plan: Plan) -> None:
    path = written(tmp_path, plan, tensors())
    rewrite(path, {"note": "Mrs Smith"})
    with pytest.raises(RefusedError, match="metadata beside its header"):
        require(path, plan)
    path = written(tmp_path, plan, tensors())
    with path.open("ab") as file:
        file.write(b"Mrs Smith")
    with pytest.raises(RefusedError, match="is no update file"):
        require(path, plan)
    path = written(tmp_path, plan, tensors())
    rewrite(path, {KEY: open_tensor_file(path).metadata[KEY].replace('"a":', '"Mrs Smith":')})
    with pytest.raises(RefusedError, match="digests of other tensors"):
        require(path, plan)


def test_the_policy_bounds_the_file(tmp_path: Path, plan: Plan) -> None:
    path = written(tmp_path, plan, tensors())
    size = path.stat().st_size
    require(path, plan, policy=Policy(dataset="d", max_update_bytes=size))
    with pytest.raises(RefusedError, match=f"has {size} bytes, its policy lets {size - 1} out") as refused:
        require(path, plan, policy=Policy(dataset="d", max_update_bytes=size - 1))
    assert refused.value.reason == "policy: update size"


def test_a_report_holds_the_numbers_that_the_policy_names() -> None:
    numbers = {"steps": 1.0, "loss": 2.0}
    assert egress.told_numbers(numbers, None) == numbers
    assert egress.told_numbers(numbers, Policy(dataset="d")) == numbers
    assert egress.told_numbers(numbers, Policy(dataset="d", report=["steps"])) == {"steps": 1.0}
    assert egress.told_numbers(numbers, Policy(dataset="d", report=[])) == {}


def test_a_training_that_would_send_more_sends_nothing(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that smuggles: what it wrote stays in the silo, and the store holds no byte of it."""
    file = make_federation(rounds={"total": 1, "quorum": 2})
    learn = train.learn

    def smuggle(order: Any, *rest: Any) -> Any:
        trained, added = learn(order, *rest)
        return trained, added | ({"records": np.full(64, 7.25, np.float32)} if order.silo == "north" else {})

    monkeypatch.setattr(train, "learn", smuggle)
    (result,) = Simulation(file).run()
    assert result.missing == {"north": "refused: output control"}
    rounds = Rounds.of(Federation.load(file))
    assert list(rounds.store.list("tiny/contributions/north/")) == []
    with pytest.raises(ObjectMissing):
        rounds.store.get("tiny/rounds/00001/updates/north.json")
    secret = np.full(64, 7.25, np.float32).tobytes()
    assert not any(secret in rounds.store.get(key) for key in rounds.store.list("tiny/"))
