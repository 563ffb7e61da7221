"""Output control: an update that holds anything beside what the plan asks for does not leave the silo."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import courses
import numpy as np
import pytest

from silotune.components.aggregate.delivery import expectation
from silotune.components.errors import RefusedError
from silotune.components.federation import Federation, canonical_json
from silotune.components.learning.tensor_file import open_tensor_file, to_bytes, write_tensor_file
from silotune.components.learning.update import KEY, Codec, Header, signed_bytes, write_update
from silotune.components.protocol import Plan
from silotune.components.rounds import Rounds
from silotune.components.steward import egress
from silotune.components.steward.policy import Policy
from silotune.components.store.object_store import ObjectMissing
from silotune.components.train import step as train
from silotune.pipelines.simulate import Simulation

SCHEMA = {"a": [2, 3], "b": [4]}


@pytest.fixture
def course(tmp_path: Path) -> courses.Course:
    return courses.Course(tmp_path).run(0)


@pytest.fixture
def plan(course: courses.Course) -> Plan:
    return course.open(1)


@pytest.fixture
def require(course: courses.Course, plan: Plan) -> Any:
    """Output control of north's update."""

    def check(path: Path, codec: str = "float32", policy: Policy | None = None) -> None:
        expected = expectation(course.rounds, plan, course.agreement, "north")
        egress.require_update(path, replace(expected, schema=SCHEMA, codec=codec), policy)

    return check


def tensors(**changes: Any) -> dict[str, np.ndarray]:
    found = {name: np.linspace(0.1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape) for name, shape in SCHEMA.items()} | changes
    return {name: array for name, array in found.items() if array is not None}


def header_of(plan: Plan, codec: str = "float32", /, **facts: Any) -> Header:
    known: dict[str, Any] = {
        "federation": "fed", "agreement": plan.agreement, "round": 1, "silo": "north", "plan": plan.digest, "base": plan.base, "incoming": plan.incoming,
        "examples": 8, "tokens": 80, "steps": 4, "cursor": 8, "loss": 1.0, "norm": 0.0, "codec": Codec(name=codec), "tensors": {},
    }  # fmt: skip
    return Header(**(known | facts))


@pytest.fixture
def written(course: courses.Course, plan: Plan, tmp_path: Path) -> Any:
    """An update file that north has signed."""

    def write(arrays: dict[str, np.ndarray], codec: str = "float32", /, **facts: Any) -> Path:
        sign = lambda message: course.rounds.sign("north", 1, message)  # noqa: E731
        write_update(tmp_path / "update", header_of(plan, codec, **facts), arrays, sign)
        return tmp_path / "update"

    return write


@pytest.fixture
def forged(course: courses.Course, plan: Plan, tmp_path: Path) -> Any:
    """One whose tensors are signed for as they stand, whatever they hold."""

    def write(arrays: dict[str, np.ndarray], digests: dict[str, str] | None = None, **facts: Any) -> Path:
        raw = {name: to_bytes(array, "F32") for name, array in sorted(arrays.items())}
        squares = sum(float(np.square(a, dtype=np.float64).sum()) for a in arrays.values() if np.isfinite(a).all())
        known = {"norm": squares**0.5, "tensors": digests or {n: hashlib.sha256(d).hexdigest() for n, d in raw.items()}}
        header = header_of(plan, **(known | facts))
        header = header.model_copy(update={"signature": course.rounds.sign("north", 1, signed_bytes(header))})
        text = canonical_json(header.model_dump()).decode()
        write_tensor_file(tmp_path / "update", {n: a.shape for n, a in arrays.items()}, "F32", raw.items(), {KEY: text})
        return tmp_path / "update"

    return write


@pytest.mark.parametrize("codec", ["float32", "bfloat16"])
def test_what_the_plan_asks_for_may_leave(written: Any, require: Any, codec: str) -> None:
    require(written(tensors(), codec), codec)


@pytest.mark.parametrize(
    ("arrays", "codec", "rule"),
    [
        ({"a": None}, "float32", "it has no tensor 'a'"),
        ({"records": np.ones(3, np.float32)}, "float32", "an unknown tensor 'records'"),
        ({"a": np.ones((3, 2), np.float32)}, "float32", r"'a' has shape \[3, 2\], must have \[2, 3\]"),
        ({"b": np.ones(5, np.float32)}, "float32", "'b' has shape"),
        ({}, "bfloat16", "codec is 'bfloat16'"),
    ],
)
def test_other_tensors_may_not(written: Any, require: Any, arrays: dict[str, Any], codec: str, rule: str) -> None:
    with pytest.raises(RefusedError, match=rule) as refused:
        require(written(tensors(**arrays), codec))
    assert refused.value.reason == "output control"


def test_no_text_but_the_plans_own_stands_in_the_header(written: Any, require: Any) -> None:
    for field in ("federation", "agreement", "plan", "base", "incoming", "silo"):
        with pytest.raises(RefusedError, match="answers round" if field == "incoming" else f"{field} is 'Mrs Smith, born") as refused:
            require(written(tensors(), **{field: "Mrs Smith, born 1950"}))
        assert refused.value.reason == "output control"


@pytest.mark.parametrize("field", ["examples", "tokens", "steps", "cursor"])
def test_a_count_has_no_room_for_records(written: Any, require: Any, field: str) -> None:
    """A whole number of Python has no end: this one spells out a name."""
    with pytest.raises(RefusedError, match=f"{field} is ") as refused:
        require(written(tensors(), **{field: int.from_bytes(b"Mrs Smith, born 1950", "big")}))
    assert refused.value.reason == "output control"


def test_nor_has_a_number_that_is_none(forged: Any, require: Any) -> None:
    """23 bits of a NaN are free."""
    odd = tensors()
    odd["b"].view("<u4")[1] = 0x7FC00000 | int.from_bytes(b"Mr", "big")
    with pytest.raises(RefusedError, match="tensor 'b' is not finite") as refused:
        require(forged(odd))
    assert refused.value.reason == "output control"


def test_nor_has_a_digest_or_a_norm(forged: Any, require: Any) -> None:
    require(forged(tensors()))
    with pytest.raises(RefusedError, match="does not have the digest in the header"):
        require(forged(tensors(), dict.fromkeys(SCHEMA, b"Mrs Smith, born 1950".hex().ljust(64, "0"))))
    with pytest.raises(RefusedError, match="its norm is"):
        require(forged(tensors(), norm=1950.01))


def rewrite(path: Path, metadata: dict[str, str]) -> None:
    file = open_tensor_file(path)
    arrays = file.read_all()
    encoded = ((n, to_bytes(a, "F32")) for n, a in sorted(arrays.items()))
    write_tensor_file(path, {n: a.shape for n, a in arrays.items()}, "F32", encoded, dict(file.metadata) | metadata)


def test_nothing_hides_beside_the_header_or_behind_the_tensors(written: Any, forged: Any, require: Any) -> None:
    path = written(tensors())
    rewrite(path, {"note": "Mrs Smith"})
    with pytest.raises(RefusedError, match="its metadata must be 'silotune' and nothing else"):
        require(path)
    path = written(tensors())
    with path.open("ab") as file:
        file.write(b"Mrs Smith")
    with pytest.raises(RefusedError, match="not a tensor file"):
        require(path)
    with pytest.raises(RefusedError, match="digests are not of these tensors"):
        require(forged(tensors(), {"Mrs Smith": "0" * 64, "b": "0" * 64}))


def test_the_policy_bounds_the_file(written: Any, require: Any) -> None:
    path = written(tensors())
    size = path.stat().st_size
    require(path, policy=Policy(dataset="d", max_update_bytes=size))
    with pytest.raises(RefusedError, match=f"has {size} bytes, its policy lets {size - 1} out") as refused:
        require(path, policy=Policy(dataset="d", max_update_bytes=size - 1))
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
