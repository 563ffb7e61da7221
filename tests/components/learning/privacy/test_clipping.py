"""Clipping, written out in numpy, and its bound for any gradients."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.components.learning.privacy.clipping import Clipping, add_clipped, centred_count, next_clip
from silotune.components.learning.privacy.noise import clip_left, grid_of

KINDS = get_args(Clipping)
SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 2, 2)}
NUMBERS = 25
FINE = 2.0**-44  # a grid


def some(units: int, scale: float, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return {
        n: torch.tensor(scale * rng.standard_normal((units, *s)) * rng.exponential(1, (units, *([1] * len(s)))), dtype=torch.float32)
        for n, s in SHAPES.items()
    }


def totals() -> dict[str, torch.Tensor]:
    return {n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()}


def by_hand(gradients: dict[str, torch.Tensor], clip: float, kind: str) -> dict[str, np.ndarray]:
    found = {n: np.zeros(s) for n, s in SHAPES.items()}
    for u in range(len(gradients["a"])):
        own = {n: g[u].double().numpy() for n, g in gradients.items()}
        norm = math.sqrt(sum((x**2).sum() for x in own.values()))
        for n, x in own.items():
            if kind == "per-layer":
                x = x * min(1.0, clip / math.sqrt(3) / math.sqrt((x**2).sum()))
            elif kind == "automatic":
                x = x * clip / (norm + 0.01)
            else:
                x = x * min(1.0, clip / norm)
            found[n] += x
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_papers(kind: Clipping) -> None:
    gradients, sums = some(6, 0.3), totals()
    norms = add_clipped(sums, gradients, 2.4, kind, FINE)
    for name, wanted in by_hand(gradients, 2.4, kind).items():
        np.testing.assert_allclose(sums[name].numpy(), wanted, rtol=1e-12, atol=6 * FINE)
    assert (norms < 2.4).any()
    assert (norms > 2.4).any()


@pytest.mark.parametrize("kind", KINDS)
@given(clip=st.floats(1e-3, 1e3), scale=st.floats(1e-6, 1e6), z=st.floats(1e-2, 1e3), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_no_unit_makes_more_than_the_clip(kind: Clipping, clip: float, scale: float, z: float, seed: int) -> None:
    sums = totals()
    add_clipped(sums, some(1, scale, seed), clip_left(clip, z * clip, NUMBERS), kind, grid_of(z * clip))
    assert math.sqrt(sum(float((t**2).sum()) for t in sums.values())) <= clip


@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_more_moves_the_sum_by_its_own_part_and_nothing_else(kind: Clipping) -> None:
    """To the last bit, in whatever company and order: sums that round as they grow move by the others' rounding, too."""
    grid, units, many = grid_of(0.37), 40, some(40, 1.0)
    alone, others, whole, backwards = totals(), totals(), totals(), totals()
    add_clipped(alone, {n: g[:1] for n, g in many.items()}, 0.5, kind, grid)
    add_clipped(others, {n: g[1:] for n, g in many.items()}, 0.5, kind, grid)
    add_clipped(whole, many, 0.5, kind, grid)
    for unit in reversed(range(units)):
        add_clipped(backwards, {n: g[unit : unit + 1] for n, g in many.items()}, 0.5, kind, grid)
    for name in SHAPES:
        assert torch.equal(whole[name] - others[name], alone[name])
        assert torch.equal(whole[name], backwards[name])
        assert torch.equal(whole[name] / grid, (whole[name] / grid).round())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_counts_as_nothing(kind: Clipping, bad: float) -> None:
    gradients, sums, without = some(3, 1.0), totals(), totals()
    gradients["b"][1, 2] = bad
    norms = add_clipped(sums, gradients, 0.5, kind, FINE)
    add_clipped(without, {n: g[[0, 2]] for n, g in gradients.items()}, 0.5, kind, FINE)
    assert torch.isnan(norms).tolist() == [False, True, False]
    for name in sums:
        assert torch.equal(sums[name], without[name])
    assert centred_count(norms, 1e9) == 2 - 1.5


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: Clipping) -> None:
    sums = totals()
    add_clipped(sums, {n: torch.zeros(2, *s) for n, s in SHAPES.items()}, 0.5, kind, FINE)
    assert all((t == 0).all() for t in sums.values())


def test_the_bound_goes_after_the_median() -> None:
    norms, clip = torch.tensor(np.random.default_rng(0).lognormal(1.0, 0.7, 501)), 40.0
    for _ in range(80):
        clip = next_clip(clip, centred_count(norms, clip), 501.0)
    assert clip == pytest.approx(float(norms.median()), rel=0.05)
    assert next_clip(1.0, 1e9, 8.0) == pytest.approx(math.exp(-0.2))  # however much noise, it moves by a fifth
