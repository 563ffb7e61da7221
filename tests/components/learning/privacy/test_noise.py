"""Noise: whether it is normal, of the right size, the same again, and on its grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy import stats

from silotune.components.learning.privacy.noise import BLOCK, Bits, Noise, add_noise, clip_left, grid_of
from silotune.components.learning.privacy.own_secret import subkey

KEY = bytes(range(32))
MANY = 1_000_001


def test_it_is_standard_normal() -> None:
    x = Noise(KEY).normals(MANY, "gradient", 3, "w")
    assert x.shape == (MANY,)
    assert x.dtype == np.float64
    assert abs(x.mean()) < 4 / math.sqrt(MANY)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / MANY)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / MANY)
    assert stats.kstest(x, "norm").pvalue > 1e-3
    for far in (3.0, 4.0, 4.5):  # tails, on either side
        expected = MANY * stats.norm.sf(far)
        for seen in ((x > far).sum(), (x < -far).sum()):
            assert abs(seen - expected) < 4.5 * math.sqrt(expected)
    for lag in (1, 2, BLOCK // 2, BLOCK):  # the pair of a number stands half a block on
        assert abs(np.mean(x[:-lag] * x[lag:])) < 5 / math.sqrt(MANY)
        assert abs(np.mean((x[:-lag] ** 2 - 1) * (x[lag:] ** 2 - 1))) < 5 * 2 / math.sqrt(MANY)


def test_it_is_box_muller_on_chacha20() -> None:
    stream = Cipher(algorithms.ChaCha20(subkey(KEY, "gradient", 0, "w"), bytes(16)), None).encryptor().update(bytes(64))
    bits = np.frombuffer(stream, "<u8")
    first = [math.sqrt(-2 * math.log(((int(u) >> 11) + 1) / 2**53)) for u in bits[:4]]
    angle = [2 * math.pi * (int(u) >> 11) / 2**53 for u in bits[4:]]
    wanted = [r * math.cos(a) for r, a in zip(first, angle, strict=True)] + [r * math.sin(a) for r, a in zip(first, angle, strict=True)]
    np.testing.assert_allclose(Noise(KEY).normals(8, "gradient", 0, "w"), wanted, rtol=1e-12)


def test_every_place_has_its_own_and_the_same_again() -> None:
    noise = Noise(KEY)
    again = Noise(KEY).normals(1000, "gradient", 5, "w")
    places = [("gradient", 5, "w"), ("gradient", 6, "w"), ("gradient", 5, "v"), ("quantile", 5)]
    found = [noise.normals(1000, *place) for place in reversed(places)][::-1]
    np.testing.assert_array_equal(found[0], again)
    for i, x in enumerate(found):
        for y in [*found[i + 1 :], Noise(bytes(32)).normals(1000, *places[i])]:
            assert not np.intersect1d(x, y).size
    np.testing.assert_array_equal(np.concatenate([b.take(5).copy() for b in [Bits(KEY)] for _ in range(2)]), Bits(KEY).take(10))


@pytest.mark.parametrize("deviation", [0.7, 3e-6, 1e4])
def test_what_comes_out_lies_on_the_grid_whatever_went_in(deviation: float) -> None:
    rng = np.random.default_rng(3)
    total = rng.standard_normal((300, 40)) * 20 * deviation
    noised = add_noise(total.astype(np.float32), deviation, Noise(KEY).normals(total.size, 1))
    grid = grid_of(deviation)
    assert 2.0**-25 < grid / deviation <= 2.0**-24
    assert math.frexp(grid)[0] == 0.5  # a power of 2
    np.testing.assert_array_equal(noised / grid, np.rint(noised / grid))
    added = noised - total.astype(np.float32)
    assert added.std() == pytest.approx(deviation, rel=0.03)
    # A sum that is moved by less than half a step gives the same number; that is all that rounding hides.
    np.testing.assert_array_equal(add_noise(np.zeros(9), deviation, np.ones(9)), add_noise(np.full(9, 0.4 * grid), deviation, np.ones(9)))


def test_rounding_is_taken_off_the_clip() -> None:
    assert clip_left(1.0, 1.5, 20_000_000) == pytest.approx(1 - 2.0**-25 * math.sqrt(2e7), abs=1e-9)
    with pytest.raises(ValueError, match="leaves nothing"):
        clip_left(1e-6, 1e3, 10**9)
