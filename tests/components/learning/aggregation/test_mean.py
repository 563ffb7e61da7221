"""FedAvg against a reference in float64, and the properties that every mean must have."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from silotune.components.learning.aggregation.guards import norm_outliers
from silotune.components.learning.aggregation.mean import weigh, weighted_mean
from silotune.components.learning.tensor_file import TensorFile, open_tensor_file, to_bytes, write_tensor_file
from silotune.components.learning.update import Codec, Expectation, Header, Update, UpdateRefused, open_update, write_update

SHAPES = {"x.lora_A": (4, 6), "x.lora_B": (6, 4), "y": (5,)}
COUNTS = {"north": (30, 700), "south": (7, 910), "west": (101, 33)}  # examples, tokens
Arrays = dict[str, np.ndarray]
MakeUpdate = Callable[..., Update]


def arrays(seed: int, scale: float = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}


def norm(tensors: Mapping[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a in tensors.values())))


@pytest.fixture
def incoming(tmp_path: Path) -> TensorFile:
    path = tmp_path / "incoming"
    write_tensor_file(path, SHAPES, "F32", ((n, to_bytes(a, "F32")) for n, a in sorted(arrays(0).items())), {"format": "pt"})
    return open_tensor_file(path)


@pytest.fixture
def make(tmp_path: Path) -> MakeUpdate:
    def make(silo: str, tensors: Arrays, examples: int = 1, tokens: int = 1, codec: str = "float32", said: float | None = None) -> Update:
        """``said``: the norm that the header tells, instead of the true one."""
        header = Header(
            federation="f", agreement="a", round=1, silo=silo, plan="p", base="b", incoming="i", examples=examples, tokens=tokens, steps=1,
            cursor=1, loss=1.0, norm=0.0, codec=Codec.model_validate({"name": codec}), tensors={},
        )  # fmt: skip
        expected = Expectation(
            federation="f", agreement="a", plan="p", base="b", accepted=((1, "i"),), silo=silo, cursor=0, codec=codec,
            schema={n: list(s) for n, s in SHAPES.items()},
        )  # fmt: skip
        path = tmp_path / f"{silo}.safetensors"
        written = write_update(path, header, tensors)
        if said is None:
            return open_update(path, expected)
        return Update(written.model_copy(update={"norm": said}), open_tensor_file(path))

    return make


@pytest.fixture
def three(make: MakeUpdate) -> dict[str, Update]:
    return {s: make(s, arrays(i, 10.0 ** (1 - i)), *COUNTS[s]) for i, s in enumerate(COUNTS, 1)}


def mean(incoming: TensorFile, updates: dict[str, Update], by: str = "examples") -> Arrays:
    out = incoming.blob.path.with_name("outgoing")
    weighted_mean(incoming, updates, weigh(updates, by), out)
    return open_tensor_file(out).read_all()


def assert_close(got: Arrays, incoming: Mapping[str, np.ndarray], deltas: Mapping[str, Arrays], weights: Mapping[str, float]) -> None:
    """Within the bound that `summation` states, and the rounding of the result, of an average in float64."""
    total = sum(weights.values())
    for name in SHAPES:
        terms = np.stack([weights[s] / total * deltas[s][name].astype(np.float64) for s in sorted(weights)])
        wanted = incoming[name] + terms.sum(axis=0)
        most = 2.0**-24 * ((len(weights) + 1) * np.abs(terms).sum(axis=0) + np.abs(wanted)) * (1 + 1e-6)
        assert (np.abs(got[name] - wanted) <= most).all(), name


@pytest.mark.parametrize(("by", "column"), [("examples", 0), ("tokens", 1), ("uniform", None)])
def test_equals_the_average_in_float64(incoming: TensorFile, three: dict[str, Update], by: str, column: int | None) -> None:
    got = mean(incoming, three, by)
    counts = {s: 1 if column is None else COUNTS[s][column] for s in COUNTS}
    assert_close(got, arrays(0), {s: arrays(i, 10.0 ** (1 - i)) for i, s in enumerate(COUNTS, 1)}, counts)
    assert any((got[n] != mean(incoming, three, "tokens" if by == "examples" else "examples")[n]).any() for n in SHAPES)


def test_result_is_a_file_that_safetensors_opens(incoming: TensorFile, three: dict[str, Update]) -> None:
    from safetensors.numpy import load_file

    got = mean(incoming, three)
    theirs = load_file(incoming.blob.path.with_name("outgoing"))
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
    assert_close(got, arrays(0), dict.fromkeys(COUNTS, arrays(5)), {s: COUNTS[s][0] for s in COUNTS})
    exact = mean(incoming, {s: make(s, arrays(5), 1) for s in ("a", "b")})
    assert all((exact[n] == arrays(0)[n] + arrays(5)[n]).all() for n in SHAPES), "where no product and no sum is rounded"


def test_scale_of_the_weights_does_not_matter(incoming: TensorFile, make: MakeUpdate, tmp_path: Path) -> None:
    results = []
    for scale in (1, 2, 1024, 3, 1000):
        updates = {s: make(s, arrays(i), scale * COUNTS[s][0]) for i, s in enumerate(COUNTS, 1)}
        weighted_mean(incoming, updates, weigh(updates, "examples"), tmp_path / "out")
        results.append((tmp_path / "out").read_bytes())
        got = open_tensor_file(tmp_path / "out").read_all()
        assert_close(got, arrays(0), {s: arrays(i) for i, s in enumerate(COUNTS, 1)}, {s: COUNTS[s][0] for s in COUNTS})
    assert results[0] == results[1] == results[2], "no bit changes where the scale is a power of two"


@pytest.mark.parametrize("examples", [1, 17, 4096])
def test_one_silo_alone_is_its_own_model(incoming: TensorFile, make: MakeUpdate, examples: int) -> None:
    got = mean(incoming, {"north": make("north", arrays(5), examples)})
    assert_close(got, arrays(0), {"north": arrays(5)}, {"north": examples})
    for name in SHAPES if examples != 17 else ():
        wanted = (arrays(0)[name].astype(np.float64) + arrays(5)[name].astype(np.float64)).astype(np.float32)
        assert got[name].tobytes() == wanted.tobytes()


def test_updates_that_cancel_leave_the_model_as_it_was(incoming: TensorFile, make: MakeUpdate) -> None:
    got = mean(incoming, {"a": make("a", arrays(5), 4), "b": make("b", {n: -a for n, a in arrays(5).items()}, 4)})
    assert {n: a.tobytes() for n, a in got.items()} == {n: a.tobytes() for n, a in arrays(0).items()}


def test_weights(three: dict[str, Update]) -> None:
    assert weigh(three, "examples") == {"north": 30.0, "south": 7.0, "west": 101.0}
    assert weigh(three, "tokens") == {"north": 700.0, "south": 910.0, "west": 33.0}
    assert weigh(three, "uniform") == {"north": 1.0, "south": 1.0, "west": 1.0}
    with pytest.raises(ValueError, match="no update"):
        weigh({}, "examples")


def test_corrupt_tensor_leaves_no_file(incoming: TensorFile, three: dict[str, Update], tmp_path: Path) -> None:
    path = three["south"].file.blob.path
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


@pytest.mark.parametrize("codec", ["float32", "bfloat16"])
def test_the_mean_tells_what_it_was_made_of(incoming: TensorFile, make: MakeUpdate, tmp_path: Path, codec: str) -> None:
    updates = {s: make(s, arrays(i, 10.0 ** (1 - i)), *COUNTS[s], codec=codec) for i, s in enumerate(COUNTS, 1)}
    found = weighted_mean(incoming, updates, weigh(updates, "examples"), tmp_path / "out")
    assert found.norms == {s: pytest.approx(norm(dict(u.tensors())), rel=2e-7) for s, u in updates.items()}
    moved = {n: after - arrays(0)[n].astype(np.float64) for n, after in open_tensor_file(tmp_path / "out").read_all().items()}
    assert found.change == pytest.approx(norm(moved), rel=2e-7)


def test_updates_that_cancel_are_no_change(incoming: TensorFile, make: MakeUpdate, tmp_path: Path) -> None:
    updates = {"a": make("a", arrays(5), 4), "b": make("b", {n: -a for n, a in arrays(5).items()}, 4)}
    assert weighted_mean(incoming, updates, weigh(updates, "examples"), tmp_path / "out").change == 0.0


@pytest.mark.parametrize("times", [0.5, 0.99, 1.01, 1000.0])
@pytest.mark.parametrize("codec", ["float32", "bfloat16"])
def test_an_update_whose_header_tells_another_norm_is_refused(
    incoming: TensorFile, make: MakeUpdate, tmp_path: Path, codec: str, times: float
) -> None:
    """The norm guards are asked of headers: they must be true."""
    times = times if codec == "float32" else times**3  # bfloat16 may be off by a hundredth
    updates = {"honest": make("honest", arrays(1), codec=codec), "liar": make("liar", arrays(2), codec=codec, said=times * norm(arrays(2)))}
    with pytest.raises(UpdateRefused, match=r"silo 'liar': update refused: its norm is .*, its header says") as caught:
        weighted_mean(incoming, updates, weigh(updates, "examples"), tmp_path / "out")
    assert caught.value.silo == "liar"
    assert not (tmp_path / "out").exists()


def test_an_update_of_zeros_is_refused_whatever_its_header_says(incoming: TensorFile, make: MakeUpdate, tmp_path: Path) -> None:
    updates = {"a": make("a", arrays(1)), "idle": make("idle", {n: 0 * a for n, a in arrays(1).items()}, said=1.0)}
    with pytest.raises(UpdateRefused, match=r"silo 'idle': update refused: its norm is 0, its header says 1"):
        weighted_mean(incoming, updates, weigh(updates, "examples"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Norms out of the usual


@pytest.mark.parametrize(
    ("norms", "recent", "outliers"),
    [
        ({"a": 1.0, "b": 1.0, "c": 9.9}, [], []),
        ({"a": 1.0, "b": 1.0, "c": 10.0}, [], []),  # the edge belongs to the band
        ({"a": 1.0, "b": 1.0, "c": 10.1}, [], ["c"]),
        ({"a": 1.0, "b": 1.0, "c": 0.1}, [], []),
        ({"a": 1.0, "b": 1.0, "c": 0.09}, [], ["c"]),
        ({"a": 1.0, "b": 1.0, "c": 100.0, "d": 0.001}, [], ["c", "d"]),
        ({"a": 50.0}, [1.0, 1.1, 0.9], ["a"]),
        ({"a": 50.0, "b": 50.0}, [1.0, 1.1, 0.9], ["a", "b"]),  # all at once, against the rounds before
        ({"a": 50.0}, [40.0, 60.0, 1.0], []),
    ],
)
def test_norms_far_from_the_median_are_out(norms: dict[str, float], recent: list[float], outliers: list[str]) -> None:
    assert list(norm_outliers(norms, recent, 10.0)) == outliers


@pytest.mark.parametrize(("norms", "recent"), [({}, []), ({"a": 1.0, "b": 1e6}, []), ({"a": 1e6}, [1.0])])
def test_few_norms_have_no_median(norms: dict[str, float], recent: list[float]) -> None:
    assert norm_outliers(norms, recent, 10.0) == {}


def test_the_band_is_what_the_file_says() -> None:
    norms = {"a": 1.0, "b": 1.0, "c": 5.0}
    assert list(norm_outliers(norms, [], 4.0)) == ["c"]
    assert list(norm_outliers(norms, [], 6.0)) == []
    assert list(norm_outliers({s: 1e-12 * n for s, n in norms.items()}, [], 4.0)) == ["c"], "only ratios count"


def test_a_falling_learning_rate_is_no_outlier() -> None:
    """Norms come divided by their learning rates: a fiftieth of the rate makes a fiftieth of the norm."""
    before, now = 1e-3, 2e-5
    recent = [norm / before for norm in (0.5, 0.52, 0.47)]
    falling = {"a": 0.5 * now / before, "b": 0.51 * now / before}
    assert norm_outliers({s: n / now for s, n in falling.items()}, recent, 10.0) == {}
    assert list(norm_outliers({"a": 0.5 / now}, recent, 10.0)) == ["a"], "the old norm at the new rate is fifty times too large"


def test_an_outlier_is_told_with_the_numbers() -> None:
    said = norm_outliers({"a": 2.0, "b": 2.0, "c": 64.0}, [], 8.0)
    assert said == {"c": "its norm is 32 times the median of recent updates, 0.12 to 8 times are allowed"}
