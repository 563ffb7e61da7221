import math
from itertools import pairwise

import numpy as np
import pytest

from silotune.components.learning.aggregation.bounds import CLIP_RATE, RunningQuantile
from silotune.components.learning.privacy import gaussian
from silotune.components.learning.privacy.noise import BLOCK, Noise, grid_of
from silotune.components.learning.privacy.silo_noise import SHARE, WORTH, Layer, SiloNoise, SumNoise, count_tells

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))


def noise(**more):
    return SiloNoise(**({"multiplier": 2.0, "layers": [Layer(1, Noise(KEY))], "numbers": 1000, "silos": 5, "fan_in": 16} | more))


def test_any_windows_give_the_same_numbers():
    whole = 2 * BLOCK + 777
    total = np.random.default_rng(0).normal(size=whole).astype(np.float32)
    at_once = SumNoise(0.5, [Layer(1, Noise(KEY))]).added("a", 0, whole, total)
    cuts = [0, 1, 100, BLOCK - 1, BLOCK + 5, 2 * BLOCK, whole]
    made = SumNoise(0.5, [Layer(1, Noise(KEY))])
    parts = [made.added("a", a, whole, total[a:b]) for a, b in pairwise(cuts)]
    assert np.array_equal(np.concatenate(parts), at_once)
    assert not np.array_equal(made.added("b", 0, whole, total), at_once)
    assert not np.array_equal(SumNoise(0.5, [Layer(1, Noise(OTHER))]).added("a", 0, whole, total), at_once)


def test_noise_is_normal_of_the_deviation_and_on_a_grid():
    total = np.full(4 * BLOCK, 0.1, np.float32)
    found = SumNoise(3.0, [Layer(1, Noise(KEY))]).added("a", 0, len(total), total)
    drawn = (found - 0.1) / 3.0
    count = len(total)
    assert abs(drawn.mean()) < 4 / math.sqrt(count)
    assert drawn.var() == pytest.approx(1, abs=4 * math.sqrt(2 / count))
    assert np.mean(np.abs(drawn) > 1.959964) == pytest.approx(0.05, abs=4 * math.sqrt(0.05 / count))
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 4 / math.sqrt(count)
    assert np.array_equal(np.rint(found / grid_of(3.0)) * grid_of(3.0), found)


def test_layers_cancel_exactly():
    """What one step of a tree takes away is what an earlier one added, to the last bit."""
    total, zero = np.arange(100, dtype=np.float32), np.zeros(100, np.float32)
    one, two = Layer(1, Noise(KEY)), Layer(1, Noise(OTHER))
    added = SumNoise(1.0, [one]).added("a", 0, 100, total)
    changed = SumNoise(1.0, [two, Layer(-1, Noise(KEY))]).added("a", 0, 100, zero)
    assert np.array_equal(added + changed, SumNoise(1.0, [two]).added("a", 0, 100, total))


def test_deviation_covers_the_clip_and_all_rounding():
    found = noise().for_bound(0.7).deviation
    assert 2.0 * 0.7 < found < 2.0 * 0.7 * 1.001
    for many in (10**6, 10**9):
        assert noise(numbers=many).for_bound(0.7).deviation > found
    with pytest.raises(ValueError, match="too large"):
        noise(multiplier=1e6, numbers=10**9).for_bound(1.0)


def test_the_sum_as_it_is_rounded_stays_within_its_sensitivity():
    """The sum of clipped updates with and without a silo, in float32 as `summation` adds, both on the grid."""
    draw, silos, numbers = np.random.default_rng(3), 16, 4000
    rows = draw.normal(size=(silos, numbers)).astype(np.float32)
    rows *= (1.0 / np.linalg.norm(rows.astype(np.float64), axis=1)).astype(np.float32)[:, None]
    made = noise(multiplier=1.0, numbers=numbers, silos=silos).for_bound(1.0)
    grid, allowed = grid_of(made.deviation), made.deviation / 1.0

    def summed(some):
        total = np.zeros(numbers, np.float32)
        for row in some:
            total += row
        return np.rint(total.astype(np.float64) / grid) * grid

    for out in range(silos):
        moved = np.linalg.norm(summed(rows) - summed(np.delete(rows, out, axis=0)))
        assert moved <= allowed


def test_sum_and_count_together_cost_what_one_release_of_the_multiplier_does():
    both = noise(count=Noise(OTHER))
    assert 1 / both.of_sum**2 + 1 / (2 * both.of_count) ** 2 == pytest.approx(1 / 4.0)
    assert (1 / (2 * both.of_count) ** 2) / (1 / 4.0) == pytest.approx(SHARE)
    assert noise().of_sum == 2.0


def test_share_is_noisy_around_the_truth():
    within = [True] * 30 + [False] * 70
    found = [noise(multiplier=1.0, count=Noise(bytes([i] * 32))).share(within) for i in range(250)]
    assert np.mean(found) == pytest.approx(0.3, abs=0.005)
    assert np.std(found) == pytest.approx(1 / (2 * math.sqrt(SHARE)) / 100, rel=0.15)
    wild = [noise(multiplier=50.0, count=Noise(bytes([i] * 32))).share([True, False]) for i in range(250)]
    assert np.mean(wild) == pytest.approx(0.5, abs=4 * 50 / (2 * math.sqrt(SHARE)) / 2 / math.sqrt(250))  # right on average, however wild


@pytest.mark.parametrize(("silos", "epsilon", "good"), [(5, 3.0, False), (10, 8.0, True), (30, 3.0, True)])
def test_a_bound_finds_the_norms_where_their_count_is_said_to_tell(silos, epsilon, good):
    """Begun at ten times and a tenth of all norms, and followed for 20 rounds with the noise that ε leaves."""
    mu, rounds = gaussian.mu_of(epsilon, 1e-5), 20
    assert (count_tells(silos, mu) >= WORTH) == good
    off = []
    for trial in range(40):
        for start in (0.1, 10.0):
            running = RunningQuantile(start, 0.5, CLIP_RATE)
            for number in range(rounds):
                made = noise(multiplier=math.sqrt(rounds) / mu, count=Noise(bytes([trial, number] * 16)))
                running = running.moved(made.share(running.within({str(k): 1.0 + 0.1 * (k - silos / 2) / silos for k in range(silos)})))
            off.append(math.log(running.estimate))
    rms = math.sqrt(np.mean(np.square(off)))
    assert (rms < 0.75) == good, rms


def test_noise_alone_moves_the_bound_nowhere_on_average():
    """Of any quantile: cut to a share, a wild count would drive the bound of 0.9 up by a third in four rounds."""
    moved = []
    for i in range(400):
        made = noise(multiplier=1e4, count=Noise(i.to_bytes(2, "big") * 16))
        moved.append(math.log(RunningQuantile(1.0, 0.9, CLIP_RATE).moved(made.share([True, False])).estimate))
    assert np.mean(moved) == pytest.approx(0, abs=4 * CLIP_RATE / math.sqrt(400))
    assert np.abs(moved).max() <= CLIP_RATE * (1 + 1e-6)
