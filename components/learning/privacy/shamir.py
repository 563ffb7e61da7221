"""Shamir's secret sharing: any ``threshold`` of the shares of a secret give it back, and fewer say nothing about it.

Shamir 1979, doi:10.1145/359168.359176. The secret is f(0) of a random polynomial of degree ``threshold`` - 1 over the integers modulo the
Mersenne prime 2^521 - 1, in which secrets of 32 bytes have room; the share of holder x is f(x).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping

PRIME = (1 << 521) - 1
SECRET_BYTES = 32
SHARE_BYTES = 66  # of a number below `PRIME`


def split(secret: bytes, holders: Iterable[int], threshold: int) -> dict[int, bytes]:
    """The share of each holder.

    Args:
        secret: `SECRET_BYTES` bytes.
        holders: positive numbers, all different.

    Raises:
        ValueError: these cannot be shares of a secret.
    """
    places = list(holders)
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"secret: must have {SECRET_BYTES} bytes, got {len(secret)}")
    if len(set(places)) != len(places) or not all(0 < x < PRIME for x in places):
        raise ValueError(f"holders: must be positive and all different, got {places}")
    if not 1 <= threshold <= len(places):
        raise ValueError(f"threshold: must be from 1 to the {len(places)} holders, got {threshold}")
    coefficients = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = {}
    for x in places:
        value = 0
        for coefficient in reversed(coefficients):  # Horner
            value = (value * x + coefficient) % PRIME
        shares[x] = value.to_bytes(SHARE_BYTES)
    return shares


def join(shares: Mapping[int, bytes]) -> bytes:
    """The secret, by Lagrange's interpolation at 0. With fewer shares than the threshold something else comes out, or an error.

    Args:
        shares: by holder; exactly as many as the threshold is best, as more cost time and prove nothing.

    Raises:
        ValueError: they are not shares of one secret of `SECRET_BYTES` bytes.
    """
    if any(len(share) != SHARE_BYTES for share in shares.values()):
        raise ValueError(f"shares: must have {SHARE_BYTES} bytes each")
    values = {x: int.from_bytes(share) for x, share in shares.items()}
    if any(value >= PRIME for value in values.values()):
        raise ValueError("shares: must be below the prime")
    secret = 0
    for x, value in values.items():
        above, below = 1, 1
        for other in values:
            if other != x:
                above, below = above * other % PRIME, below * (other - x) % PRIME
        secret = (secret + value * above * pow(below, -1, PRIME)) % PRIME
    if secret >> (8 * SECRET_BYTES):
        raise ValueError("shares: are not of one secret, or too few")
    return secret.to_bytes(SECRET_BYTES)
