"""From updates to the next global, for the strategies that look at pairs: files in, files out."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from silotune.components.errors import SilotuneError
from silotune.components.learning.aggregation.factors import DELTA, A, B, LoraPair
from silotune.components.learning.aggregation.lora_mean import fedex_mean, flora_mean, product_mean
from silotune.components.learning.aggregation.mean import ServerState
from silotune.components.learning.tensor_file import TensorFile, open_tensor_file, to_bytes, write_tensor_file
from silotune.components.learning.update import Codec, Expectation, Header, Update, UpdateRefused, open_update, write_update

SIZES = {"layers.0.q_proj": (12, 9), "layers.0.v_proj": (7, 9), "layers.1.q_proj": (12, 30)}
RANK, SCALE = 3, 2.0
WEIGHTS = {"north": 30.0, "south": 7.0, "west": 101.0}
Arrays = dict[str, np.ndarray]
MakeUpdate = Callable[..., Update]


def arrays(seed: int, rank: int = RANK, scale: float = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    made = {}
    for module, (out, into) in SIZES.items():
        made[module + A] = (scale * rng.standard_normal((rank, into))).astype(np.float32)
        made[module + B] = (scale * rng.standard_normal((out, rank))).astype(np.float32)
    return made


def save(path: Path, tensors: Mapping[str, np.ndarray]) -> TensorFile:
    shapes = {n: a.shape for n, a in tensors.items()}
    write_tensor_file(path, shapes, "F32", ((n, to_bytes(a, "F32")) for n, a in sorted(tensors.items())), {"format": "pt"})
    return open_tensor_file(path)


@pytest.fixture
def incoming(tmp_path: Path) -> TensorFile:
    return save(tmp_path / "incoming", arrays(0))


@pytest.fixture
def make(tmp_path: Path) -> MakeUpdate:
    def make(silo: str, tensors: Arrays, said: float | None = None) -> Update:
        """``said``: the norm that the header tells, instead of the true one."""
        header = Header(
            federation="f", agreement="a", round=1, silo=silo, plan="p", base="b", incoming="i", examples=1, tokens=1, steps=1, cursor=1,
            loss=1.0, norm=0.0, codec=Codec.model_validate({"name": "float32"}), tensors={},
        )  # fmt: skip
        expected = Expectation(
            federation="f", agreement="a", plan="p", base="b", accepted=((1, "i"),), silo=silo, cursor=0, codec="float32",
            schema={n: list(a.shape) for n, a in tensors.items()},
        )  # fmt: skip
        path = tmp_path / f"{silo}.safetensors"
        written = write_update(path, header, tensors)
        if said is None:
            return open_update(path, expected)
        return Update(written.model_copy(update={"norm": said}), open_tensor_file(path))

    return make


@pytest.fixture
def updates(make: MakeUpdate) -> dict[str, Update]:
    return {silo: make(silo, arrays(i + 1, scale=0.5)) for i, silo in enumerate(WEIGHTS)}


def pair(tensors: Mapping[str, np.ndarray], module: str) -> LoraPair:
    return LoraPair(tensors[module + B], tensors[module + A])


def mean_of_products(incoming: Arrays, updates: Mapping[str, Update], module: str) -> np.ndarray:
    """Σ wᵢBᵢAᵢ of whole pairs in float64."""
    total = sum(WEIGHTS[s] for s in updates)
    w = np.zeros(SIZES[module])
    for silo, update in updates.items():
        own = [incoming[module + e].astype(np.float64) + update.tensor(module + e) for e in (B, A)]
        w += WEIGHTS[silo] / total * own[0] @ own[1]
    return w


def standing(tensors: Arrays, module: str) -> np.ndarray:
    """What a global adds to a module's weight."""
    delta = tensors.get(module + DELTA)
    return SCALE * pair(tensors, module).product() + (delta.astype(np.float64) if delta is not None else 0.0)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)


def test_product_of_every_module(incoming: TensorFile, updates: dict[str, Update], tmp_path: Path) -> None:
    before = incoming.read_all()
    result = product_mean(incoming, updates, WEIGHTS, tmp_path / "out", scale=SCALE)
    after = open_tensor_file(tmp_path / "out").read_all()
    assert {n: a.shape for n, a in after.items()} == {n: a.shape for n, a in before.items()}
    moved = 0.0
    for module in SIZES:
        w = mean_of_products(before, updates, module)
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        close(pair(after, module).product(), (u[:, :RANK] * s[:RANK]) @ vt[:RANK])
        assert result.residuals[module] == pytest.approx(np.sum(s[RANK:] ** 2) / np.sum(s**2), abs=1e-9)
        np.testing.assert_allclose(result.spectra[module].values[: len(s)], s[: len(result.spectra[module].values)], atol=1e-6 * s[0])
        moved += np.linalg.norm(standing(after, module) - standing(before, module)) ** 2
    assert result.change == pytest.approx(np.sqrt(moved), rel=1e-6)
    for silo, update in updates.items():
        assert result.norms[silo] == pytest.approx(update.header.norm)


def test_product_takes_silos_of_lower_rank(incoming: TensorFile, make: MakeUpdate, tmp_path: Path) -> None:
    product_mean(incoming, {"north": make("north", arrays(1, rank=1)), "west": make("west", arrays(2))}, WEIGHTS, tmp_path / "out")
    assert open_tensor_file(tmp_path / "out").entries["layers.0.q_proj" + A].shape == (RANK, 9)


def test_order_of_arrival_and_repetition_give_the_same_bytes(incoming: TensorFile, updates: dict[str, Update], tmp_path: Path) -> None:
    initial = arrays(5)
    for k, order in enumerate((updates, dict(reversed(updates.items())))):
        product_mean(incoming, order, WEIGHTS, tmp_path / f"product{k}", carry=ServerState(None, tmp_path / f"rest{k}"))
        fedex_mean(incoming, order, WEIGHTS, tmp_path / f"fedex{k}", scale=SCALE)
        flora_mean(incoming, order, WEIGHTS, tmp_path / f"flora{k}", scale=SCALE, initial=initial)
    for name in ("product", "rest", "fedex", "flora"):
        assert (tmp_path / f"{name}0").read_bytes() == (tmp_path / f"{name}1").read_bytes()


def test_what_is_carried_comes_back(incoming: TensorFile, updates: dict[str, Update], make: MakeUpdate, tmp_path: Path) -> None:
    """A second round in which nobody trains anything: global and rest are those of the first."""
    means = {module: mean_of_products(incoming.read_all(), updates, module) for module in SIZES}
    product_mean(incoming, updates, WEIGHTS, tmp_path / "one", carry=ServerState(None, tmp_path / "rest1"))
    rest = open_tensor_file(tmp_path / "rest1")
    assert set(rest.entries) == {"rest." + name for name in incoming.entries}
    still = {n: np.zeros_like(a) for n, a in arrays(0).items()}
    still["layers.0.q_proj" + A][0, 0] = 1e-30  # an update that is wholly zero is refused
    one = open_tensor_file(tmp_path / "one")
    product_mean(one, {"west": make("west", still)}, WEIGHTS, tmp_path / "two", carry=ServerState(rest, tmp_path / "rest2"))
    two, rest2 = open_tensor_file(tmp_path / "two").read_all(), open_tensor_file(tmp_path / "rest2").read_all()
    for module, w in means.items():
        assert np.linalg.norm(pair(two, module).product() - pair(one.read_all(), module).product()) <= 2e-6 * np.linalg.norm(w)
        both = pair(two, module).product() + pair(rest2, "rest." + module).product()
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        assert np.linalg.norm(both - (u[:, : 2 * RANK] * s[: 2 * RANK]) @ vt[: 2 * RANK]) <= 2e-6 * np.linalg.norm(w)


@pytest.mark.parametrize("rounds", [1, 2])
def test_fedex_is_exact(incoming: TensorFile, updates: dict[str, Update], tmp_path: Path, rounds: int) -> None:
    for k in range(rounds):
        before = incoming.read_all()
        result = fedex_mean(incoming, updates, WEIGHTS, tmp_path / f"out{k}", scale=SCALE)
        incoming = open_tensor_file(tmp_path / f"out{k}")
        after = incoming.read_all()
        moved = 0.0
        for module in SIZES:
            w = mean_of_products(before, updates, module)
            old = before.get(module + DELTA, np.zeros(SIZES[module])).astype(np.float64)
            close(standing(after, module), old + SCALE * w)
            missed = np.linalg.norm(w - pair(after, module).product()) ** 2 / np.linalg.norm(w) ** 2
            assert result.residuals[module] == pytest.approx(missed, rel=1e-6)
            assert missed > 1e-3
            moved += np.linalg.norm(standing(after, module) - standing(before, module)) ** 2
            b = sum(WEIGHTS[s] * (before[module + B].astype(float) + u.tensor(module + B)) for s, u in updates.items()) / 138
            np.testing.assert_allclose(after[module + B], b, rtol=1e-6, atol=1e-6)
        assert result.change == pytest.approx(np.sqrt(moved), rel=1e-6)


@pytest.mark.parametrize("rounds", [1, 2])
def test_flora_is_exact_and_begins_anew(tmp_path: Path, make: MakeUpdate, rounds: int) -> None:
    initial = arrays(7)
    begin = initial | {n: np.zeros_like(a) for n, a in initial.items() if n.endswith(B)}
    incoming = save(tmp_path / "begin", begin)
    updates = {"north": make("north", arrays(1, rank=2)), "south": make("south", arrays(2)), "west": make("west", arrays(3, rank=1))}
    expected = {module: np.zeros(SIZES[module]) for module in SIZES}
    for k in range(rounds):
        for module in SIZES:
            for silo, update in updates.items():
                b = update.tensor(module + B).astype(np.float64)
                own = b @ (begin[module + A][: b.shape[1]].astype(np.float64) + update.tensor(module + A))
                expected[module] += SCALE * WEIGHTS[silo] / 138 * own
        flora_mean(incoming, updates, WEIGHTS, tmp_path / f"out{k}", scale=SCALE, initial=initial)
        incoming = open_tensor_file(tmp_path / f"out{k}")
        after = incoming.read_all()
        for module in SIZES:
            close(after[module + DELTA], expected[module])
            assert not after[module + B].any()
            assert np.array_equal(after[module + A], initial[module + A])


@pytest.mark.parametrize("method", ["product", "fedex", "flora"])
def test_gauge_of_a_silo_does_not_matter(incoming: TensorFile, make: MakeUpdate, tmp_path: Path, method: str) -> None:
    """One silo's A → 4A, B → B/4; powers of two, so that float32 loses nothing by it. fedex's factors do change, and its delta makes up for it."""
    before, own = incoming.read_all(), {silo: arrays(i + 1) for i, silo in enumerate(WEIGHTS)}
    found = []
    for factor in (1, 4):
        spread = own | {"west": {n: a * np.float32(factor if n.endswith(A) else 1 / factor) for n, a in own["west"].items()}}
        updates = {s: make(s, {n: a - before[n] for n, a in tensors.items()}) for s, tensors in spread.items()}
        out = tmp_path / f"out{factor}"
        if method == "product":
            product_mean(incoming, updates, WEIGHTS, out)
        elif method == "fedex":
            fedex_mean(incoming, updates, WEIGHTS, out, scale=SCALE)
        else:
            flora_mean(incoming, updates, WEIGHTS, out, scale=SCALE, initial=before)
        after = open_tensor_file(out).read_all()
        found.append({m: after[m + DELTA] if method == "flora" else standing(after, m) for m in SIZES})
    for module in SIZES:
        assert np.linalg.norm(found[0][module] - found[1][module]) <= 3e-6 * np.linalg.norm(found[0][module])


def test_delta_is_made_in_bounded_memory(tmp_path: Path, make: MakeUpdate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "layers.0.q_proj", (6000, 2000))  # 96 MB in float64
    incoming = save(tmp_path / "big", arrays(0))
    updates = {silo: make(silo, arrays(i + 1)) for i, silo in enumerate(WEIGHTS)}
    tracemalloc.start()
    fedex_mean(incoming, updates, WEIGHTS, tmp_path / "out", scale=SCALE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


@pytest.mark.parametrize("method", ["product", "fedex", "flora"])
def test_a_lie_about_the_norm_is_found_and_nothing_written(
    incoming: TensorFile, updates: dict[str, Update], make: MakeUpdate, tmp_path: Path, method: str
) -> None:
    updates["west"] = make("west", arrays(3), said=0.5)
    out, rest = tmp_path / "out", tmp_path / "rest"
    means = {
        "product": partial(product_mean, carry=ServerState(None, rest)),
        "fedex": partial(fedex_mean, scale=SCALE),
        "flora": partial(flora_mean, scale=SCALE, initial=arrays(0)),
    }
    with pytest.raises(UpdateRefused, match=r"west.*its norm is .* its header says 0.5"):
        means[method](incoming, updates, WEIGHTS, out)
    assert not out.exists()
    assert not rest.exists()


def test_fedex_needs_equal_ranks(incoming: TensorFile, make: MakeUpdate, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="silo 'north': its rank is 2, must be the global's 3; or use product or flora"):
        fedex_mean(incoming, {"north": make("north", arrays(1, rank=2))}, WEIGHTS, tmp_path / "out", scale=SCALE)


def test_updates_must_be_of_pairs(incoming: TensorFile, make: MakeUpdate, tmp_path: Path) -> None:
    half = {n: a for n, a in arrays(1).items() if n.endswith(B)}
    with pytest.raises(ValueError, match=r"silo 'north': its update must have the global's pairs and nothing else; .*lora_A"):
        product_mean(incoming, {"north": make("north", half)}, WEIGHTS, tmp_path / "out")
    with pytest.raises(ValueError, match="there is no update"):
        product_mean(incoming, {}, WEIGHTS, tmp_path / "out")


def test_overflow_is_told(tmp_path: Path, make: MakeUpdate) -> None:
    incoming = save(tmp_path / "incoming", {n: np.zeros_like(a) for n, a in arrays(0).items()})
    huge = make("north", {n: np.full_like(a, 1e18) for n, a in arrays(0).items()})
    flora_mean(incoming, {"north": huge}, WEIGHTS, tmp_path / "fits", scale=1.0, initial=arrays(0))
    with pytest.raises(SilotuneError, match=r"module 'layers.0.q_proj': delta of the mean product is not finite; lower"):
        flora_mean(incoming, {"north": huge}, WEIGHTS, tmp_path / "out", scale=1e3, initial=arrays(0))
    assert not (tmp_path / "out").exists()


def test_new_factors_must_have_the_shape_of_the_old(incoming: TensorFile, updates: dict[str, Update], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"initial: must have A's shape \(3, 9\), got \(2, 9\)"):
        flora_mean(incoming, updates, WEIGHTS, tmp_path / "out", scale=1.0, initial=arrays(0, rank=2))
