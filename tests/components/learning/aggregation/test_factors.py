"""Pairs by name, cut to a rank, and stacked."""

from __future__ import annotations

import numpy as np
import pytest

from silotune.components.learning.aggregation.factors import LoraPair, modules, stacked, truncated

NAMES = [f"layers.{i}.q_proj.{tail}.weight" for i in range(2) for tail in ("delta", "lora_A", "lora_B")]


def pair(seed: int, rank: int = 3, out: int = 5, into: int = 4) -> LoraPair:
    rng = np.random.default_rng(seed)
    return LoraPair(rng.standard_normal((out, rank)).astype(np.float32), rng.standard_normal((rank, into)).astype(np.float32))


def test_modules_have_pairs() -> None:
    assert modules(NAMES) == ["layers.0.q_proj", "layers.1.q_proj"]
    with pytest.raises(ValueError, match=r"'layers.1.q_proj.lora_A.weight': is not there, though the other factor is"):
        modules([n for n in NAMES if n != "layers.1.q_proj.lora_A.weight"])
    with pytest.raises(ValueError, match=r"'head.weight': is no factor of a LoRA pair"):
        modules([*NAMES, "head.weight"])
    with pytest.raises(ValueError, match=r"'x.delta.weight': is no factor"):
        modules([*NAMES, "x.delta.weight"])


def test_pairs_must_fit() -> None:
    with pytest.raises(ValueError, match=r"must be of shapes \(out, r\) and \(r, in\), got \(5, 3\) and \(2, 4\)"):
        LoraPair(np.zeros((5, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="rank: must be from 1 to the pair's 3, got 4"):
        truncated(pair(1), 4)


def test_truncated_is_the_first_columns_and_rows() -> None:
    whole = pair(1)
    cut = truncated(whole, 2)
    assert np.array_equal(cut.b, whole.b[:, :2])
    assert np.array_equal(cut.a, whole.a[:2])


def test_stacks_multiply_to_the_mean_with_tails_and_what_is_carried() -> None:
    incoming, carried = pair(0), pair(9, 2)
    differences = {"c": pair(1, 3), "a": pair(2, 1), "b": pair(3, 2)}
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    expected = carried.product()
    for silo, d in differences.items():
        own = (incoming.b[:, : d.rank].astype(float) + d.b) @ (incoming.a[: d.rank].astype(float) + d.a)
        expected += weights[silo] / 8 * (own + incoming.b[:, d.rank :].astype(float) @ incoming.a[d.rank :].astype(float))
    b, a = stacked(incoming, differences, weights, carried)
    assert b.shape == (5, 3 + 1 + 2 + (3 - 1) + 2)
    np.testing.assert_allclose(b @ a, expected, rtol=1e-12, atol=1e-12)


def test_with_equal_ranks_there_is_no_tail() -> None:
    b, _ = stacked(pair(0), {"a": pair(1), "b": pair(2)}, {"a": 1.0, "b": 1.0})
    assert b.shape == (5, 6)


def test_stacks_of_another_module_are_refused() -> None:
    with pytest.raises(ValueError, match=r"silo 'b': its pair has shapes \(6, 3\) and \(3, 4\)"):
        stacked(pair(0), {"a": pair(1), "b": pair(2, out=6)}, {"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="rank: must be from 1 to the pair's 3, got 4"):
        stacked(pair(0), {"a": pair(1, 4)}, {"a": 1.0})


@pytest.mark.parametrize("bad", [{"a": 0.0, "b": 0.0}, {"a": -1.0, "b": 3.0}, {"a": float("nan"), "b": 1.0}, {"a": float("inf"), "b": 1.0}])
def test_weights_must_be_weights(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="weights: must be finite, not negative, and add up to something positive"):
        stacked(pair(0), {"a": pair(1), "b": pair(2)}, bad)
