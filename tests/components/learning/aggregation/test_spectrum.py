"""Ranks of a spectrum, and when they are being lost."""

from __future__ import annotations

import math

import numpy as np
import pytest

from silotune.components.learning.aggregation.spectrum import Spectrum, collapsed


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_equal_values_have_their_number_as_rank(scale: float) -> None:
    spectrum = Spectrum(np.array([scale] * 5 + [0.0] * 3), 8, 0.0)
    assert spectrum.effective_rank == pytest.approx(5)
    assert spectrum.stable_rank == pytest.approx(5)


def test_ranks_by_hand() -> None:
    spectrum = Spectrum(np.array([2.0, 1.0, 1.0]), 3, 0.0)
    assert spectrum.effective_rank == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))
    assert spectrum.stable_rank == pytest.approx(1.5)


def test_what_the_global_does_not_hold_is_none_of_its_rank() -> None:
    spectrum = Spectrum(np.array([2.0, 2.0, 1.0, 1.0, 1.0]), 2, 0.3)
    assert (spectrum.effective_rank, spectrum.stable_rank) == pytest.approx((2, 2))


def test_nothing_has_no_rank() -> None:
    for values in (np.zeros(4), np.zeros(0)):
        assert (Spectrum(values, 4, 0.0).effective_rank, Spectrum(values, 4, 0.0).stable_rank) == (0.0, 0.0)


def test_half_of_the_rank_is_a_collapse_and_of_rank_one_there_is_none() -> None:
    assert collapsed(3.9, 8.0)
    assert not collapsed(4.1, 8.0)
    assert not collapsed(0.0, 1.0)
    assert collapsed(7.9, 8.0, share=0.99)
