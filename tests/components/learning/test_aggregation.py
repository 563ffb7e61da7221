"""FedAvg against a reference in float64, and the properties that every mean must have."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from silotune.components.learning.aggregation import weigh, weighted_mean
from silotune.components.learning.tensor_file import TensorFile, open_tensor_file, to_bytes, write_tensor_file
from silotune.components.learning.update import Codec, Expectation, Header, Update, UpdateRefused, open_update, write_update

SHAPES = {"x.lora_A": (4, 6), "x.lora_B": (6, 4), "y": (5,)}
COUNTS = {"north": (30, 700), "south": (7, 910), "west": (101, 33)}  # examples, tokens
Arrays = dict[str, np.ndarray]
MakeUpdate = Callable[..., Update]


def arrays(seed: int, scale: float = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def incoming(tmp_path: Path) -> TensorFile:
    path = tmp_path / "incoming"
    write_tensor_file(path, SHAPES, "F32", ((n, to_bytes(a, "F32")) for n, a in sorted(arrays(0).items())), {"format": "pt"})
    return open_tensor_file(path)


@pytest.fixture
def make(tmp_path: Path) -> MakeUpdate:
    def make(silo: str, tensors: Arrays, examples: int = 1, tokens: int = 1) -> Update:
        header = Header(
            federation="f", agreement="a", round=1, silo=silo, plan="p", base="b", incoming="i", examples=examples, tokens=tokens, steps=1,
            cursor=1, loss=1.0, norm=0.0, codec=Codec(name="float32"), tensors={},
        )  # fmt: skip
        expected = Expectation(
            federation="f", agreement="a", plan="p", base="b", accepted=((1, "i"),), silo=silo, cursor=0, codec="float32",
            schema={n: list(s) for n, s in SHAPES.items()},
        )  # fmt: skip
        path = tmp_path / f"{silo}.safetensors"
        write_update(path, header, tensors)
        return open_update(path, expected)

    return make


@pytest.fixture
def three(make: MakeUpdate) -> dict[str, Update]:
    return {s: make(s, arrays(i, 10.0 ** (1 - i)), *COUNTS[s]) for i, s in enumerate(COUNTS, 1)}


def mean(incoming: TensorFile, updates: dict[str, Update], by: str = "examples") -> Arrays:
    out = incoming.path.with_name("outgoing")
    weighted_mean(incoming, updates, weigh(updates, by), out)
    return open_tensor_file(out).read_all()


@pytest.mark.parametrize(("by", "column"), [("examples", 0), ("tokens", 1)])
def test_equals_the_average_in_float64(incoming: TensorFile, three: dict[str, Update], by: str, column: int) -> None:
    got = mean(incoming, three, by)
    counts = [COUNTS[s][column] for s in COUNTS]
    for name in SHAPES:
        models = np.stack([arrays(0)[name].astype(np.float64) + arrays(i, 10.0 ** (1 - i))[name] for i in (1, 2, 3)])
        wanted = np.average(models, axis=0, weights=counts)  # the average of the models, not of the differences
        np.testing.assert_allclose(got[name], wanted, rtol=6e-8, atol=1e-9, err_msg=name)
    assert any((got[n] != mean(incoming, three, "tokens" if by == "examples" else "examples")[n]).any() for n in SHAPES)


def test_result_is_a_file_that_safetensors_opens(incoming: TensorFile, three: dict[str, Update]) -> None:
    from safetensors.numpy import load_file

    got = mean(incoming, three)
    theirs = load_file(incoming.path.with_name("outgoing"))
    assert {n: a.tobytes() for n, a in theirs.items()} == {n: a.tobytes() for n, a in got.items()}
    assert {n: a.shape for n, a in theirs.items()} == SHAPES


def test_order_of_arrival_changes_no_byte(incoming: TensorFile, make: MakeUpdate, tmp_path: Path) -> None:
    """Of numbers so far apart that a sum in another order would come out otherwise."""
    big = arrays(1, 1e17)
    sent = {"a": make("a", big, 4), "b": make("b", arrays(2), 4), "c": make("c", {n: -x for n, x in big.items()}, 4)}
    results = set()
    for order in itertools.permutations(sent):
        updates = {s: sent[s] for s in order}
        weighted_mean(incoming, updates, weigh(updates, "examples"), tmp_path / "out")
        results.add((tmp_path / "out").read_bytes())
    assert len(results) == 1


def test_identical_updates_average_to_themselves(incoming: TensorFile, make: MakeUpdate) -> None:
    got = mean(incoming, {s: make(s, arrays(5), *COUNTS[s]) for s in COUNTS})
    for name in SHAPES:
        np.testing.assert_array_max_ulp(got[name], arrays(0)[name] + arrays(5)[name], maxulp=1)


def test_scale_of_the_weights_does_not_matter(incoming: TensorFile, make: MakeUpdate, tmp_path: Path) -> None:
    results = []
    for scale in (1, 3, 1000):
        updates = {s: make(s, arrays(i), scale * COUNTS[s][0]) for i, s in enumerate(COUNTS, 1)}
        weighted_mean(incoming, updates, weigh(updates, "examples"), tmp_path / "out")
        results.append((tmp_path / "out").read_bytes())
    assert results[0] == results[1] == results[2]


def test_one_silo_alone_is_its_own_model(incoming: TensorFile, make: MakeUpdate) -> None:
    got = mean(incoming, {"north": make("north", arrays(5), 17)})
    for name in SHAPES:
        wanted = (arrays(0)[name].astype(np.float64) + arrays(5)[name].astype(np.float64)).astype(np.float32)
        assert got[name].tobytes() == wanted.tobytes()


def test_updates_that_cancel_leave_the_model_as_it_was(incoming: TensorFile, make: MakeUpdate) -> None:
    got = mean(incoming, {"a": make("a", arrays(5), 4), "b": make("b", {n: -a for n, a in arrays(5).items()}, 4)})
    assert {n: a.tobytes() for n, a in got.items()} == {n: a.tobytes() for n, a in arrays(0).items()}


def test_weights(three: dict[str, Update]) -> None:
    assert weigh(three, "examples") == {"north": 30 / 138, "south": 7 / 138, "west": 101 / 138}
    assert weigh(three, "tokens") == {"north": 700 / 1643, "south": 910 / 1643, "west": 33 / 1643}
    assert sum(weigh(three, "tokens").values()) == pytest.approx(1.0, abs=1e-15)
    with pytest.raises(ValueError, match="no update"):
        weigh({}, "examples")


def test_corrupt_tensor_leaves_no_file(incoming: TensorFile, three: dict[str, Update], tmp_path: Path) -> None:
    path = three["south"].file.path
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40  # in the last tensor: found late
    path.write_bytes(data)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UpdateRefused, match=r"silo 'south': update refused: tensor 'y' does not have the digest") as caught:
        weighted_mean(incoming, three, weigh(three, "examples"), tmp_path / "out")
    assert caught.value.silo == "south"
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    del three["south"]
    weighted_mean(incoming, three, weigh(three, "examples"), tmp_path / "out")
    assert (tmp_path / "out").exists()
