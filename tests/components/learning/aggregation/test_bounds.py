"""Zeroing and clipping: factors from norms, and bounds that follow a quantile."""

from __future__ import annotations

import math

import numpy as np
import pytest

from silotune.components.learning.aggregation.bounds import (
    CLIP_RATE,
    ZEROING_QUANTILE,
    ZEROING_RATE,
    clipping,
    composed,
    first_quantile,
    remaining,
    zeroing,
)

NORMS = {"north": 1.0, "south": 2.0, "west": 4.0, "east": 100.0, "far": 3.0}


def test_clipping_scales_down_to_the_bound_and_says_so() -> None:
    stage = clipping(NORMS, 2.0)
    assert stage.factors == {"north": 1.0, "south": 1.0, "west": 0.5, "east": 0.02, "far": pytest.approx(2 / 3)}
    assert stage.told.keys() == {"west", "east", "far"}
    assert stage.told["east"] == "its norm is 100, the bound is 2: scaled by 0.02"
    assert list(remaining(NORMS, stage).values()) == pytest.approx([2.0, 2.0, 1.0, 2.0, 2.0])


def test_zeroing_counts_the_absurd_as_zero() -> None:
    running = first_quantile(NORMS, ZEROING_QUANTILE, ZEROING_RATE)
    assert running.estimate == 3.0
    stage = zeroing(NORMS, running)
    assert stage.factors == {"north": 1.0, "south": 1.0, "west": 1.0, "east": 0.0, "far": 1.0}
    assert stage.told == {"east": "its norm is 100, from 15 on updates count as zero"}
    assert zeroing({"odd": math.inf, "none": math.nan, "south": 2.0}, running).factors == {"odd": 0.0, "none": 0.0, "south": 1.0}


def test_stages_follow_each_other() -> None:
    first = zeroing(NORMS, first_quantile(NORMS, 0.5, ZEROING_RATE))
    both = composed(NORMS, first, clipping(remaining(NORMS, first), 2.0))
    assert both.factors["east"] == 0
    assert both.factors["west"] == 0.5
    assert both.factors["north"] == 1
    assert both.told.keys() == {"east", "west", "far"}
    assert "count as zero" in both.told["east"]
    assert "the bound is 2" in both.told["west"]


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
def test_the_estimate_follows_a_quantile_of_norms_that_shrink(quantile: float) -> None:
    rng = np.random.default_rng(0)
    running = first_quantile({"a": 50.0}, quantile, CLIP_RATE)
    for round_number in range(400):
        scale = 10 * 0.99 ** min(round_number, 100)
        running = running.after({str(i): scale * math.exp(0.5 * rng.standard_normal()) for i in range(20)})
    norms = 10 * 0.99**100 * np.exp(0.5 * rng.standard_normal(20000))
    assert np.mean(norms <= running.estimate) == pytest.approx(quantile, abs=0.1)


def test_one_step_is_the_papers() -> None:
    running = first_quantile({"a": 2.0}, 0.5, 0.2)
    after = running.after({"a": 1.0, "b": 1.5, "c": 2.0, "d": 9.0})
    assert after.estimate == pytest.approx(2.0 * math.exp(-0.2 * (0.75 - 0.5)))
    assert float(np.float32(after.estimate)) == after.estimate  # so that a file holds it to the last bit


def test_a_minority_cannot_raise_the_zeroing_bound_for_long() -> None:
    running = first_quantile({str(i): 1.0 for i in range(5)}, ZEROING_QUANTILE, ZEROING_RATE)
    for _ in range(100):
        norms = {str(i): 1.0 + 0.1 * i for i in range(3)} | {"h1": 1e9, "h2": 1e9}
        assert zeroing(norms, running).factors == {"0": 1.0, "1": 1.0, "2": 1.0, "h1": 0.0, "h2": 0.0}
        running = running.after(norms)


def test_begins_at_the_first_rounds_quantile() -> None:
    assert first_quantile(NORMS, 0.5, 1.0).estimate == 3.0
    assert first_quantile({"a": 0.0, "b": 0.0, "c": 5.0}, 0.5, 1.0).estimate == 5.0
    for norms in ({}, {"a": 0.0}, {"a": math.inf}):
        with pytest.raises(ValueError, match="finite and not all 0"):
            first_quantile(norms, 0.5, 1.0)
    for quantile in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            first_quantile(NORMS, quantile, 1.0)
    with pytest.raises(ValueError, match="not negative"):
        clipping(NORMS, -1.0)
