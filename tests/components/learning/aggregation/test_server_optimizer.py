"""Server optimisers against references in float64 that are written number by number, and on quadratics whose optimum is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from silotune.components.errors import SilotuneError
from silotune.components.learning.aggregation import server_optimizer as so
from silotune.components.learning.aggregation import summation
from silotune.components.learning.aggregation.mean import ServerState, weigh, weighted_mean
from silotune.components.learning.tensor_file import TensorFile, open_tensor_file, to_bytes, write_tensor_file
from silotune.components.learning.update import Codec, Header, Update, write_update

SHAPES = {"a": (3, 4), "b": (7,)}
Arrays = dict[str, np.ndarray]


def arrays(seed: int, scale: float = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in SHAPES.items()}


def stored(path: Path, tensors: Arrays) -> TensorFile:
    write_tensor_file(
        path, {n: a.shape for n, a in tensors.items()}, "F32", ((n, to_bytes(a, "F32")) for n, a in sorted(tensors.items())), {}
    )
    return open_tensor_file(path)


def update(folder: Path, silo: str, tensors: Arrays, examples: int = 1, steps: int = 1) -> Update:
    header = Header(
        federation="f", agreement="a", round=1, silo=silo, plan="p", base="b", incoming="i", examples=examples, tokens=1, steps=steps, cursor=1,
        loss=1.0, norm=0.0, codec=Codec(name="float32"), tensors={},
    )  # fmt: skip
    path = folder / f"{silo}.update"
    return Update(write_update(path, header, tensors), open_tensor_file(path))


# References: one number x, the means of the rounds, in plain Python.


def fedavgm(deltas: list[float], x: float) -> float:
    v = 0.0
    for d in deltas:
        v = 0.8 * v + d
        x -= 0.5 * -v
    return x


def nesterov(deltas: list[float], x: float) -> float:
    """As torch.optim.SGD's documentation has it, of the gradient -d."""
    buffer: float | None = None
    for d in deltas:
        g = -d
        buffer = g if buffer is None else 0.8 * buffer + g
        x -= 0.5 * (g + 0.8 * buffer)
    return x


def adaptive(rule: str) -> Callable[[list[float], float], float]:
    def reference(deltas: list[float], x: float) -> float:
        m, v = 0.0, 0.01**2
        for d in deltas:
            m = 0.7 * m + 0.3 * d
            if rule == "adagrad":
                v += d**2
            elif rule == "adam":
                v = 0.95 * v + 0.05 * d**2
            else:
                v -= 0.05 * d**2 * ((v > d**2) - (v < d**2))
            x += 0.5 * m / (math.sqrt(v) + 0.01)
        return x

    return reference


def feddyn(deltas: list[float], x: float) -> float:
    """With the models themselves in the place of the differences, as the paper writes it; 3 of 4 silos take part."""
    h, alpha = 0.0, 0.3
    for d in deltas:
        thetas = [x + d] * 3
        h -= alpha * sum(t - x for t in thetas) / 4
        x = sum(thetas) / 3 - h / alpha
    return x


METHODS = {
    "fedavg": (so.fedavg(0.5), lambda deltas, x: x + sum(0.5 * d for d in deltas)),
    "fedavgm": (so.fedavgm(0.5, 0.8), fedavgm),
    "nesterov": (so.nesterov(0.5, 0.8), nesterov),
    "fedadagrad": (so.fedadagrad(0.5, 0.7, 0.01), adaptive("adagrad")),
    "fedyogi": (so.fedyogi(0.5, 0.7, 0.95, 0.01), adaptive("yogi")),
    "fedadam": (so.fedadam(0.5, 0.7, 0.95, 0.01), adaptive("adam")),
    "feddyn": (so.feddyn(0.3, 0.75), feddyn),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("window", [5, 1 << 20])
def test_five_rounds_equal_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, window: int) -> None:
    monkeypatch.setattr(summation, "WINDOW", window)
    optimizer, reference = METHODS[method]
    rounds = [[arrays(10 * r + s, 0.1) for s in range(3)] for r in range(5)]
    now, state = stored(tmp_path / "0", arrays(99)), None
    for r, deltas in enumerate(rounds):
        updates = {str(s): update(tmp_path, str(s), deltas[s]) for s in range(3)}
        kept = ServerState(state, tmp_path / f"state{r}")
        found = weighted_mean(now, updates, weigh(updates, "uniform"), tmp_path / str(r + 1), optimizer=optimizer, state=kept)
        before, now = now.read_all(), open_tensor_file(tmp_path / str(r + 1))
        moved = math.sqrt(sum(np.square(now.read(n).astype(np.float64) - before[n]).sum() for n in SHAPES))
        assert found.change == pytest.approx(moved, rel=1e-6)
        if optimizer.initial:
            state = open_tensor_file(tmp_path / f"state{r}")
            assert state.entries.keys() == {f"{kind}.{n}" for kind in optimizer.initial for n in SHAPES}
        else:
            assert not kept.after.exists()
    for name in SHAPES:
        got, start = now.read(name).reshape(-1), arrays(99)[name].reshape(-1)
        for at, x in enumerate(start):
            means = [sum(float(d[name].reshape(-1)[at]) for d in deltas) / 3 for deltas in rounds]
            assert got[at] == pytest.approx(reference(means, float(x)), rel=2e-6, abs=2e-6)


def test_nesterov_is_torchs() -> None:
    import torch

    x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([x], lr=0.7, momentum=0.9, nesterov=True)
    mine, state = np.zeros(4), {"momentum": np.zeros(4)}
    for seed in range(6):
        delta = np.random.default_rng(seed).standard_normal(4)
        x.grad = torch.from_numpy(-delta)
        sgd.step()
        step, state = so.nesterov(0.7, 0.9).step(delta, state)
        mine += step
        np.testing.assert_allclose(mine, x.detach().numpy(), rtol=1e-12)


def test_fednova_counts_by_the_step(tmp_path: Path) -> None:
    counts, steps = {"a": 10.0, "b": 30.0, "c": 5.0}, {"a": 1.0, "b": 7.0, "c": 20.0}
    weights, total = so.fednova_weights(counts, steps)
    updates = {s: update(tmp_path, s, arrays(k)) for k, s in enumerate(counts)}
    weighted_mean(stored(tmp_path / "in", arrays(9)), updates, weights, tmp_path / "out", total=total)
    got = open_tensor_file(tmp_path / "out").read_all()
    p = {s: n / 45 for s, n in counts.items()}
    effective = sum(p[s] * steps[s] for s in p)
    for name in SHAPES:
        wanted = arrays(9)[name] + effective * sum(p[s] * arrays(k)[name].astype(np.float64) / steps[s] for k, s in enumerate(p))
        np.testing.assert_allclose(got[name], wanted, rtol=1e-6, atol=1e-6)
    even, divisor = so.fednova_weights(counts, dict.fromkeys(counts, 4.0))
    assert {s: w / divisor for s, w in even.items()} == pytest.approx(p), "with equal steps it is FedAvg"
    with pytest.raises(ValueError, match="positive"):
        so.fednova_weights(counts, steps | {"b": 0.0})


def test_scaffold_carries_the_mean_control_variate(tmp_path: Path) -> None:
    """Two of five silos, of unlike weight: differences count by examples, control variates as one each."""
    now, state, control = stored(tmp_path / "in", arrays(9)), None, {n: np.zeros(s) for n, s in SHAPES.items()}
    for r in range(3):
        sent = {s: arrays(10 * r + k) | {f"memory.{n}": a for n, a in arrays(50 + 10 * r + k).items()} for k, s in enumerate("ab")}
        updates = {s: update(tmp_path, s, tensors, examples) for (s, tensors), examples in zip(sent.items(), (1, 9), strict=True)}
        kept = ServerState(state, tmp_path / f"state{r}")
        x = now.read_all()
        weighted_mean(now, updates, weigh(updates, "examples"), tmp_path / f"x{r}", optimizer=so.scaffold(2 / 5, 0.5), state=kept)
        now, state = open_tensor_file(tmp_path / f"x{r}"), open_tensor_file(kept.after)
        for n in SHAPES:
            np.testing.assert_allclose(now.read(n), x[n] + 0.5 * (0.1 * sent["a"][n] + 0.9 * sent["b"][n]), rtol=2e-6, atol=1e-6)
            control[n] += (sent["a"][f"memory.{n}"].astype(np.float64) + sent["b"][f"memory.{n}"]) / 5
            np.testing.assert_allclose(state.read(f"control.{n}"), control[n], rtol=2e-6, atol=1e-6)


def test_what_was_not_trained_stays_and_so_does_its_state(tmp_path: Path) -> None:
    now, optimizer = stored(tmp_path / "in", arrays(9)), so.fedadam(0.1, tau=0.5)
    both, only = {"s": update(tmp_path, "s", arrays(1))}, {"t": update(tmp_path, "t", {"b": arrays(2)["b"]})}
    weighted_mean(now, only, weigh(only, "uniform"), tmp_path / "1", optimizer=optimizer, state=ServerState(None, tmp_path / "s1"))
    first, state = open_tensor_file(tmp_path / "1"), open_tensor_file(tmp_path / "s1")
    assert (first.read("a") == now.read("a")).all()
    assert (first.read("b") != now.read("b")).all()
    assert (state.read("second.a") == 0.25).all()
    weighted_mean(first, both, weigh(both, "uniform"), tmp_path / "2", optimizer=optimizer, state=ServerState(state, tmp_path / "s2"))
    second = open_tensor_file(tmp_path / "s2")
    weighted_mean(first, only, weigh(only, "uniform"), tmp_path / "3", optimizer=optimizer, state=ServerState(second, tmp_path / "s3"))
    assert (open_tensor_file(tmp_path / "s3").read("momentum.a") == second.read("momentum.a")).all()


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (lambda: so.fedadam(0.1, tau=0.0), "tau: must be positive"),
        (lambda: so.feddyn(0.0, 1.0), "alpha: must be positive"),
        (lambda: so.feddyn(0.1, 0.0), "participation: must be above 0"),
        (lambda: so.scaffold(1.5), "participation: must be above 0 and at most 1, got 1.5"),
    ],
)
def test_parameters_that_make_no_sense(wrong: Callable[[], object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        wrong()


def test_state_that_does_not_fit(tmp_path: Path) -> None:
    now, updates = stored(tmp_path / "in", arrays(9)), {"s": update(tmp_path, "s", arrays(1))}
    with pytest.raises(ValueError, match="state: must be given, the optimiser carries momentum"):
        weighted_mean(now, updates, {"s": 1.0}, tmp_path / "out", optimizer=so.fedavgm())
    other = ServerState(stored(tmp_path / "other", {"momentum.a": arrays(0)["a"]}), tmp_path / "after")
    with pytest.raises(ValueError, match="state: must be of the global's tensors"):
        weighted_mean(now, updates, {"s": 1.0}, tmp_path / "out", optimizer=so.fedavgm(), state=other)
    huge = {"s": update(tmp_path, "s", {n: np.full(s, 1e30, np.float32) for n, s in SHAPES.items()})}
    kept = ServerState(None, tmp_path / "after")
    with pytest.raises(SilotuneError, match=r"tensor 'second\.a': the server's state is not finite"):
        weighted_mean(now, huge, {"s": 1.0}, tmp_path / "out", optimizer=so.fedadam(0.1), state=kept)
    assert not (tmp_path / "after").exists()
    assert not (tmp_path / "out").exists()


# Quadratics: silo i's loss is ½ Σ aᵢ(x - bᵢ)², its local training some steps of gradient descent.

RATE, ROUNDS = 0.05, 400


class Silo:
    def __init__(self, seed: int, alike: bool) -> None:
        rng = np.random.default_rng(seed)
        self.a = np.ones(6) if alike else rng.uniform(0.2, 3.0, 6)
        self.b = np.arange(6.0) if alike else rng.standard_normal(6) * 3

    def train(self, x: np.ndarray, steps: int, more: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray:
        y = x.copy()
        for _ in range(steps):
            y -= RATE * (self.a * (y - self.b) + (more(y) if more else 0.0))
        return y - x


def optimum(silos: list[Silo]) -> np.ndarray:
    return sum(s.a * s.b for s in silos) / sum(s.a for s in silos)


def federate(optimizer: so.ServerOptimizer, silos: list[Silo], steps: int, rounds: int = ROUNDS) -> np.ndarray:
    x, state = np.zeros(6), {kind: np.full(6, value) for kind, value in optimizer.initial.items()}
    for _ in range(rounds):
        step, new = optimizer.step(np.mean([s.train(x, steps) for s in silos], axis=0), state)
        x, state = x + step, state | new
    return x


CONVERGING = {
    "fedavg": so.fedavg(), "fedavgm": so.fedavgm(0.3, 0.8), "nesterov": so.nesterov(0.3, 0.8), "fedadagrad": so.fedadagrad(0.5, tau=0.1),
    "fedyogi": so.fedyogi(0.05, tau=0.1), "fedadam": so.fedadam(0.05, tau=0.1),
}  # fmt: skip


@pytest.mark.parametrize("method", CONVERGING)
def test_silos_alike_come_to_the_optimum(method: str) -> None:
    silos = [Silo(s, alike=True) for s in range(4)]
    np.testing.assert_allclose(federate(CONVERGING[method], silos, steps=5), optimum(silos), atol=2e-3)


@pytest.mark.parametrize("method", CONVERGING)
def test_unlike_silos_with_one_step_come_to_the_optimum(method: str) -> None:
    silos = [Silo(s, alike=False) for s in range(4)]
    np.testing.assert_allclose(federate(CONVERGING[method], silos, steps=1, rounds=3 * ROUNDS), optimum(silos), atol=2e-2)


def test_scaffold_comes_to_the_optimum_where_fedavg_drifts() -> None:
    silos = [Silo(s, alike=False) for s in range(4)]
    drift = np.abs(federate(so.fedavg(), silos, steps=20) - optimum(silos)).max()
    assert drift > 0.05
    optimizer, x, control, own = so.scaffold(1.0), np.zeros(6), np.zeros(6), [np.zeros(6) for _ in silos]
    for _ in range(ROUNDS):
        deltas, memories = [], []
        for i, silo in enumerate(silos):
            deltas.append(silo.train(x, 20, lambda y, i=i, control=control: control - own[i]))
            new = own[i] - control - deltas[-1] / (20 * RATE)  # the paper's option II
            memories.append(new - own[i])
            own[i] = new
        x = x + optimizer.step(np.mean(deltas, axis=0), {})[0]
        assert optimizer.memory is not None
        control = optimizer.memory(np.mean(memories, axis=0), control)
    np.testing.assert_allclose(x, optimum(silos), atol=1e-6)
    np.testing.assert_allclose(control, np.mean(own, axis=0), atol=1e-9)


def test_feddyn_comes_to_the_optimum_where_fedavg_drifts() -> None:
    silos, alpha = [Silo(s, alike=False) for s in range(4)], 0.5
    optimizer, x, state, slopes = so.feddyn(alpha, 1.0), np.zeros(6), {"h": np.zeros(6)}, [np.zeros(6) for _ in silos]
    for _ in range(ROUNDS):
        deltas = []
        for i, silo in enumerate(silos):
            deltas.append(silo.train(x, 200, lambda y, i=i, x=x: -slopes[i] + alpha * (y - x)))
            slopes[i] = slopes[i] - alpha * deltas[-1]
        step, state = optimizer.step(np.mean(deltas, axis=0), state)
        x = x + step
    np.testing.assert_allclose(x, optimum(silos), atol=1e-4)


def test_fednova_comes_to_the_optimum_where_steps_are_unequal() -> None:
    """With few small steps, so that the curvature within a round does not matter: what is left is the bias of unequal numbers of steps."""
    silos, steps = [Silo(s, alike=False) for s in range(4)], [1, 2, 4, 8]

    def run(weights: dict[str, float], total: float) -> float:
        x = np.zeros(6)
        for _ in range(1500):
            x = x + 0.1 * sum(weights[str(i)] * s.train(x, steps[i]) for i, s in enumerate(silos)) / total
        return float(np.abs(x - optimum(silos)).max())

    counts = {str(i): 1.0 for i in range(4)}
    nova = run(*so.fednova_weights(counts, {str(i): float(n) for i, n in enumerate(steps)}))
    plain = run(counts, 4.0)
    assert nova < plain / 2
