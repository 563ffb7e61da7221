"""Shamir's sharing against plain interpolation with fractions, and what fewer shares tell."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.components.learning.privacy import shamir


def interpolated(points: dict[int, int]) -> int:
    """f(0) by Lagrange in exact fractions, reduced modulo the prime at the end: another way than the code's."""
    total = Fraction(0)
    for x, y in points.items():
        term = Fraction(y)
        for other in points.keys() - {x}:
            term *= Fraction(other, other - x)
        total += term
    return total.numerator * pow(total.denominator, -1, shamir.PRIME) % shamir.PRIME


def test_the_modulus_is_the_mersenne_prime() -> None:
    """Lucas-Lehmer: 2^p - 1 is prime if and only if s_{p-2} is 0, with s_0 = 4 and s = s² - 2."""
    s = 4
    for _ in range(521 - 2):
        s = (s * s - 2) % shamir.PRIME
    assert s == 0


@settings(max_examples=40, deadline=None)
@given(secret=st.binary(min_size=32, max_size=32), holders=st.integers(1, 9), data=st.data())
def test_any_threshold_of_shares_gives_the_secret(secret: bytes, holders: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, holders))
    shares = shamir.split(secret, range(1, holders + 1), threshold)
    chosen = data.draw(st.sampled_from(list(itertools.combinations(shares, threshold))))
    some = {x: shares[x] for x in chosen}
    assert shamir.join(some) == secret == interpolated({x: int.from_bytes(s) for x, s in some.items()}).to_bytes(32)
    assert shamir.join(shares) == secret


@pytest.mark.parametrize("holders", [3, 5, 8])
def test_fewer_shares_fit_every_secret(holders: int) -> None:
    """With one share too few, there is for any secret at all a last share that makes it come out."""
    threshold = holders - 1
    shares = shamir.split(bytes(32), range(1, holders + 1), threshold)
    known = {x: int.from_bytes(shares[x]) for x in range(1, threshold)}
    for secret in (0, 1, 2**255 + 12345):
        others = {0: secret, **known}
        x, value = threshold, 0  # the value at x of the one polynomial through these points
        for a, y in others.items():
            above = below = 1
            for b in others.keys() - {a}:
                above, below = above * (x - b) % shamir.PRIME, below * (a - b) % shamir.PRIME
            value = (value + y * above * pow(below, -1, shamir.PRIME)) % shamir.PRIME
        found = shamir.join({**{k: v.to_bytes(66) for k, v in known.items()}, x: value.to_bytes(66)})
        assert int.from_bytes(found) == secret


def test_a_threshold_of_one_share_less_is_not_enough() -> None:
    secret = bytes(range(32))
    shares = shamir.split(secret, range(1, 6), 4)
    with pytest.raises(ValueError, match="not of one secret, or too few"):
        shamir.join({x: shares[x] for x in (1, 2, 3)})  # 2^256 of 2^521 numbers would pass: never by chance


def test_shares_of_two_secrets_do_not_join() -> None:
    one, other = (shamir.split(bytes([n]) * 32, range(1, 4), 2) for n in (1, 2))
    with pytest.raises(ValueError, match="not of one secret"):
        shamir.join({1: one[1], 2: other[2]})


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ((b"short", range(1, 4), 2), "secret: must have 32 bytes, got 5"),
        ((bytes(32), [0, 1], 2), "holders: must be positive"),
        ((bytes(32), [1, 1], 2), "all different"),
        ((bytes(32), [1, 2], 3), "threshold: must be from 1 to the 2 holders, got 3"),
        ((bytes(32), [1, 2], 0), "threshold"),
    ],
)
def test_what_cannot_be_shared_is_refused(arguments: tuple[bytes, list[int], int], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        shamir.split(*arguments)


def test_what_is_no_share_is_refused() -> None:
    with pytest.raises(ValueError, match="66 bytes"):
        shamir.join({1: b"x"})
    with pytest.raises(ValueError, match="below the prime"):
        shamir.join({1: shamir.PRIME.to_bytes(66)})
