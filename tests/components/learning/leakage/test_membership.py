import math

import numpy as np
import pytest

from silotune.components.learning.leakage.membership import attack, calibrated


def test_area_is_the_share_of_pairs_in_order():
    draw = np.random.default_rng(0)
    members, others = draw.integers(0, 9, 40).astype(float), draw.integers(0, 7, 30).astype(float)
    pairs = [1.0 if m > o else 0.5 if m == o else 0.0 for m in members for o in others]
    assert attack(members, others).auc == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("rate", [0.01, 0.001])
def test_found_at_a_rate_holds_the_rate(rate):
    draw = np.random.default_rng(1)
    members, others = draw.normal(1.0, 1, 5000), draw.normal(0.0, 1, 5000)
    found = attack(members, others).found[f"{rate:g}"]
    least = np.sort(members)[-round(found * 5000)]  # the least of those that are found
    assert (others >= least).mean() <= rate
    normal = 0.5 * math.erfc(({0.01: 2.326, 0.001: 3.090}[rate] - 1) / math.sqrt(2))
    assert found == pytest.approx(normal, abs=0.05)


def test_nothing_to_tell_is_within_its_error():
    draw = np.random.default_rng(2)
    areas = [attack(draw.normal(size=200), draw.normal(size=300)) for _ in range(300)]
    assert np.std([a.auc for a in areas]) == pytest.approx(areas[0].error, rel=0.15)
    assert sum(a.surprising for a in areas) <= 3


def test_rates_that_so_few_others_cannot_show_are_left_out():
    assert attack(np.ones(9), np.zeros(50)).found == {}
    assert attack(np.ones(9), np.zeros(100)).found == {"0.01": 1.0}


def test_calibration_takes_away_what_is_hard_by_itself():
    """Losses that differ a lot between examples hide a small gain; the gain itself does not."""
    draw = np.random.default_rng(3)
    hardness = draw.normal(3, 1, 2000)
    after = hardness - np.where(np.arange(2000) < 1000, 0.2, 0.0) + draw.normal(0, 0.05, 2000)
    plain, better = attack(-after[:1000], -after[1000:]), calibrated(hardness, after)
    assert attack(better[:1000], better[1000:]).auc > 0.99 > plain.auc + 0.3


def test_nobody_to_tell_apart_is_refused():
    with pytest.raises(ValueError, match="scores"):
        attack(np.array([]), np.array([1.0]))
