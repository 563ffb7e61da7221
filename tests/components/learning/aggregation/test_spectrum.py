"""Ranks of a spectrum, and when they are being lost."""

from __future__ import annotations

import math

import numpy as np
import pytest

from silotune.components.learning.aggregation.spectrum import Spectrum, collapsed


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_equal_values_have_their_number_as_rank(scale: float) -> None:
    spectrum = Spectrum(np.array([scale] * 5 + [0.0] * 3), 0.0)
    assert spectrum.effective_rank == pytest.approx(5)
    assert spectrum.stable_rank == pytest.approx(5)


def test_ranks_by_hand() -> None:
    spectrum = Spectrum(np.array([2.0, 1.0, 1.0]), 0.0)
    assert spectrum.effective_rank == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))
    assert spectrum.stable_rank == pytest.approx(1.5)


def test_nothing_has_no_rank() -> None:
    for values in (np.zeros(4), np.zeros(0)):
        assert (Spectrum(values, 0.0).effective_rank, Spectrum(values, 0.0).stable_rank) == (0.0, 0.0)


def test_collapse_is_told_module_by_module() -> None:
    before = {"a": 8.0, "b": 8.0, "c": 1.0, "d": 0.0}
    found = collapsed({"a": 3.9, "b": 4.1, "c": 0.0, "d": 0.0, "new": 1.0}, before, 0.5)
    assert found == {"a": "its effective rank fell from 8 to 3.9, below 50% of it"}
    with pytest.raises(ValueError, match="share: must be between 0 and 1, got 1"):
        collapsed({}, {}, 1.0)
