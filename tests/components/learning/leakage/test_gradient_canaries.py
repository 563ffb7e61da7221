"""The audit of private training: it must not cry wolf, and it must see noise that is too small and clipping that is left out."""

from __future__ import annotations

import numpy as np
import pytest

from silotune.components.learning.leakage.gradient_canaries import audit_training
from silotune.components.learning.leakage.one_run import LowerBound
from silotune.components.learning.privacy import private_gradient
from silotune.components.learning.privacy.accounting import Mechanism, noise_multiplier_for
from silotune.components.learning.privacy.private_gradient import Private

CANARIES, DELTA, CLAIMED = 800, 1e-5, 1.0
COURSES = {"sampled": (0.1, 20), "whole": (1.0, 4)}  # sampling probability, steps


def audited(course: str, broken: float = 1.0, clipping: str = "flat", seed: int = 0) -> LowerBound:
    q, steps = COURSES[course]
    noise = noise_multiplier_for(CLAIMED, DELTA, q, steps) / broken
    mechanism = Mechanism(sampling_probability=q, noise_multiplier=noise, steps=steps)
    coins = np.random.default_rng(seed).random(CANARIES) < 0.5
    return audit_training(Private(mechanism, 0.5, clipping, bytes([seed]) * 32), CANARIES, DELTA, coins)  # type: ignore[arg-type]


@pytest.mark.parametrize("course", COURSES)
@pytest.mark.parametrize("clipping", ["flat", "per-layer", "automatic"])
def test_what_is_shown_lies_below_what_is_claimed(course: str, clipping: str) -> None:
    assert audited(course, clipping=clipping).epsilon < CLAIMED


@pytest.mark.parametrize("course", COURSES)
def test_a_quarter_of_the_noise_is_found_out(course: str) -> None:
    shown = [audited(course, broken=4.0, seed=seed).epsilon for seed in range(3)]
    assert max(shown) > CLAIMED
    if course == "whole":
        assert min(shown) > CLAIMED


@pytest.mark.parametrize("course", COURSES)
def test_clipping_that_is_left_out_is_found_out(course: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_gradient, "clip_left", lambda clip, deviation, numbers: 1e9)
    assert audited(course).epsilon > CLAIMED


def test_noise_from_a_key_that_is_known_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a public seed would have it: taken off again, what is left is in or out."""
    monkeypatch.setattr(private_gradient, "add_noise", lambda total, deviation, normals: total)
    assert audited("whole").epsilon > 3 * CLAIMED
