"""Server optimisers: what the server does with the mean of the updates. Each is a pure function, number by number, in float64.

The mean difference Δ is the negative of a gradient: a step adds to the global x. ``η`` is the server's learning rate. What a method carries
from round to round is stored in a tensor file beside the global, in float32, as ``<kind>.<name>`` for every tensor of the global: ``momentum``,
``second``, ``control``, ``h``. Without such a file, in a first round, all of a kind is its initial value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

CONTROL = "control"  # the kind that silos' memories change, and no step
State = dict[str, np.ndarray]  # kind -> numbers, float64, as many as the block has


@dataclass(frozen=True)
class ServerOptimizer:
    """How the mean moves the global."""

    step: Callable[[np.ndarray, State], tuple[np.ndarray, State]]
    """(Δ, state) -> (what is added to the global, next state); float64 arrays of one shape, none of which is changed."""

    initial: Mapping[str, float] = field(default_factory=dict)
    """Kind -> its value in the first round, for all that is carried."""

    memory: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    """(mean of the silos' ``memory`` tensors, ``control``) -> next ``control``; None where it is not the server's."""


def fedavg(learning_rate: float = 1.0) -> ServerOptimizer:
    """x ← x + ηΔ; with η = 1 FedAvg (McMahan et al. 2017, arXiv:1602.05629, Algorithm 1)."""
    if learning_rate == 1.0:
        return ServerOptimizer(lambda delta, state: (delta, {}))
    return ServerOptimizer(lambda delta, state: (learning_rate * delta, {}))


def fedavgm(learning_rate: float = 1.0, momentum: float = 0.9) -> ServerOptimizer:
    """v ← βv + Δ, x ← x + ηv (Hsu, Qi & Brown 2019, arXiv:1909.06335, section 4.2)."""

    def step(delta: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        velocity = momentum * state["momentum"] + delta
        return learning_rate * velocity, {"momentum": velocity}

    return ServerOptimizer(step, {"momentum": 0.0})


def nesterov(learning_rate: float = 0.7, momentum: float = 0.9) -> ServerOptimizer:
    """DiLoCo's outer step (Douillard et al. 2023, arXiv:2311.08105, Algorithm 1): v ← μv + Δ, x ← x + η(Δ + μv), as torch's SGD has it."""

    def step(delta: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        velocity = momentum * state["momentum"] + delta
        return learning_rate * (delta + momentum * velocity), {"momentum": velocity}

    return ServerOptimizer(step, {"momentum": 0.0})


def _adaptive(second: Callable[[np.ndarray, np.ndarray], np.ndarray], learning_rate: float, beta1: float, tau: float) -> ServerOptimizer:
    """m ← β₁m + (1-β₁)Δ, v ← second(v, Δ²), x ← x + ηm/(√v + τ); v begins at τ² (Reddi et al. 2020, arXiv:2003.00295, Algorithm 2)."""
    if not tau > 0:
        raise ValueError(f"tau: must be positive, got {tau}")

    def step(delta: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        first = beta1 * state["momentum"] + (1 - beta1) * delta
        scale = second(state["second"], np.square(delta))
        return learning_rate * first / (np.sqrt(scale) + tau), {"momentum": first, "second": scale}

    return ServerOptimizer(step, {"momentum": 0.0, "second": tau * tau})


def fedadagrad(learning_rate: float, beta1: float = 0.0, tau: float = 1e-3) -> ServerOptimizer:
    """`_adaptive` with v ← v + Δ²."""
    return _adaptive(lambda v, square: v + square, learning_rate, beta1, tau)


def fedyogi(learning_rate: float, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> ServerOptimizer:
    """`_adaptive` with v ← v - (1-β₂) Δ² sign(v - Δ²)."""
    return _adaptive(lambda v, square: v - (1 - beta2) * square * np.sign(v - square), learning_rate, beta1, tau)


def fedadam(learning_rate: float, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> ServerOptimizer:
    """`_adaptive` with v ← β₂v + (1-β₂)Δ²."""
    return _adaptive(lambda v, square: beta2 * v + (1 - beta2) * square, learning_rate, beta1, tau)


def scaffold(participation: float, learning_rate: float = 1.0) -> ServerOptimizer:
    """x ← x + ηΔ, c ← c + |S|/N · mean(cᵢ⁺ - cᵢ) (Karimireddy et al. 2019, arXiv:1910.06378, Eq. 5).

    Silos send cᵢ⁺ - cᵢ as ``memory.<name>``. Where each counts as one, the control variate is (1/N) Σ cᵢ over all N silos; where each counts N·pᵢ
    (`combination.memory_weights`), it is Σ pᵢcᵢ.

    Args:
        participation: |S|/N, the share of the federation's silos whose updates are averaged.
    """
    share = _share(participation)
    step = fedavg(learning_rate).step
    return ServerOptimizer(step, {CONTROL: 0.0}, lambda mean, control: control + share * mean)


def feddyn(alpha: float, participation: float) -> ServerOptimizer:
    """h ← h - α|S|/N · Δ, x ← x + Δ - h/α (Acar et al. 2021, arXiv:2111.04263, Algorithm 1); Δ is the unweighted mean of θᵢ - x.

    Args:
        alpha: the strength of the silos' dynamic term.
        participation: |S|/N, the share of the federation's silos whose updates are averaged.
    """
    if not alpha > 0:
        raise ValueError(f"alpha: must be positive, got {alpha}")
    share = _share(participation)

    def step(delta: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        h = state["h"] - alpha * share * delta
        return delta - h / alpha, {"h": h}

    return ServerOptimizer(step, {"h": 0.0})


def fednova_weights(counts: Mapping[str, float], steps: Mapping[str, float]) -> tuple[dict[str, float], float]:
    """Weights of the updates, and what their weighted sum is to be divided by (Wang et al. 2020, arXiv:2007.07481, Eq. 9 and 10).

    FedNova averages the updates per local step, Δᵢ/τᵢ, in proportion to the examples, and takes τ_eff = Σ pᵢτᵢ such steps:
    x ← x + τ_eff Σ pᵢ Δᵢ/τᵢ with pᵢ = nᵢ/n. So wᵢ = nᵢ/τᵢ and the divisor is n/τ_eff.

    Args:
        counts: nᵢ, by silo.
        steps: τᵢ, by silo: ‖aᵢ‖₁ of the local optimiser, which for SGD without momentum, at a constant rate, is its number of steps.
    """
    if any(not (steps[silo] > 0 and counts[silo] > 0) for silo in counts):
        raise ValueError("counts and steps: must be positive")
    total = math.fsum(counts.values())
    effective = math.fsum(counts[silo] * steps[silo] for silo in counts) / total
    return {silo: counts[silo] / steps[silo] for silo in sorted(counts)}, total / effective


def state_shapes(optimizer: ServerOptimizer, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Of the tensor file that the optimiser carries on; empty where it carries nothing."""
    return {f"{kind}.{name}": tuple(shape) for kind in optimizer.initial for name, shape in shapes.items()}


def _share(participation: float) -> float:
    if not 0 < participation <= 1:
        raise ValueError(f"participation: must be above 0 and at most 1, got {participation}")
    return participation
