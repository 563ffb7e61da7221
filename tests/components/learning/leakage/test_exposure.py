import math

import numpy as np
import pytest

from silotune.components.learning.leakage.exposure import BY_CHANCE, exposure, ranks


def test_ranks_are_places_in_the_order():
    references = np.array([3.0, 1.0, 2.0])
    assert ranks(np.array([0.0, 1.5, 9.0]), references).tolist() == [1, 2, 4]
    assert ranks(np.array([2.0]), references).tolist() == [2.5]


def test_what_is_known_by_heart_has_the_most_that_can_be_measured():
    found = exposure(np.array([0.1, 0.2]), np.linspace(1, 2, 1023))
    assert found.mean == found.greatest == found.most == 10
    assert found.surprising


def test_what_was_never_seen_has_what_chance_gives():
    draw = np.random.default_rng(0)
    found = exposure(draw.normal(size=4000), draw.normal(size=4095))
    assert found.by_chance == pytest.approx(BY_CHANCE, abs=0.01)
    assert abs(found.mean - found.by_chance) < 3 * found.error
    assert not found.surprising


def test_a_constant_model_has_learned_nothing():
    found = exposure(np.ones(5), np.ones(255))
    assert found.mean == pytest.approx(8 - math.log2(1 + 255 / 2))
    assert not found.surprising


def test_exposure_is_of_the_rank_only():
    draw = np.random.default_rng(2)
    planted, references = draw.normal(size=20), draw.normal(size=100)
    assert exposure(planted, references) == exposure(np.exp(planted), np.exp(references))


@pytest.mark.parametrize(("planted", "references"), [([], [1.0]), ([1.0], []), ([math.nan], [1.0])])
def test_no_losses_give_no_exposure(planted, references):
    with pytest.raises(ValueError, match="losses"):
        exposure(np.array(planted), np.array(references))
