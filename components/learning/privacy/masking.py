"""Masks: numbers of a ring that look random to whoever lacks their key, and go away in the sum (Bonawitz et al. 2017,
doi:10.1145/3133956.3133982, section 4).

A silo u adds to its vector the numbers that its own seed expands to, those of the key it shares with each silo that comes after it, and takes
away those of the key it shares with each silo before it:

    y_u = x_u + PRG(b_u) + Σ_{v > u} PRG(s_uv) - Σ_{v < u} PRG(s_uv)

In Σ y_u the pairs' masks cancel. The seeds b_u of the silos that are in the sum, and the keys s_uv of those that dropped out after others had
masked against them, are recovered from shares, never both of one silo: so one whose vector comes late is still covered by its own seed.

The generator is AES-256 in counter mode from zero, under a key that is used for one vector only. Masks are added block by block, in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from silotune.components.learning.privacy.agreed_keys import derived_key, shared_key

BLOCK = 1 << 18  # numbers masked at a time
KEY_BYTES = 32
_ZEROS = bytes(BLOCK * 8)


class Mask:
    """One key's numbers, to be added or taken away; goes through a vector once, from its beginning."""

    def __init__(self, key: bytes, sign: int) -> None:
        """
        Args:
            sign: 1 to add, -1 to take away.

        Raises:
            ValueError: key or sign are none.
        """
        if len(key) != KEY_BYTES or sign not in (1, -1):
            raise ValueError(f"mask: needs a key of {KEY_BYTES} bytes and a sign of 1 or -1")
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._add = np.add if sign == 1 else np.subtract

    def apply(self, numbers: np.ndarray, scratch: bytearray) -> None:
        """To the next numbers of the vector, in place.

        Args:
            numbers: at most `BLOCK`, of the ring: ``<u4`` or ``<u8``.
            scratch: of `scratch`, any content.
        """
        self._stream.update_into(_ZEROS[: numbers.nbytes] if numbers.nbytes < len(_ZEROS) else _ZEROS, scratch)
        self._add(numbers, np.frombuffer(scratch, numbers.dtype, count=len(numbers)), out=numbers)


def scratch() -> bytearray:
    """Room for the numbers of one block; one for all masks of a vector."""
    return bytearray(len(_ZEROS) + 15)


def masked(blocks: Iterable[np.ndarray], masks: Sequence[Mask]) -> Iterator[np.ndarray]:
    """Blocks of a vector with all masks applied, each in its own place."""
    room = scratch()
    for block in blocks:
        for start in range(0, len(block), BLOCK):
            for mask in masks:
                mask.apply(block[start : start + BLOCK], room)
        yield block


def self_mask(seed: bytes, context: bytes, *, remove: bool = False) -> Mask:
    """What a silo's own seed hides."""
    return Mask(derived_key(seed, context, "self mask"), -1 if remove else 1)


def pair_mask(mine: str, other: str, private: bytes, public: bytes, context: bytes, *, remove: bool = False) -> Mask:
    """What a silo and another hide from all others.

    Args:
        private, public: one's private and the other's public key, of either of the two silos.
        remove: what takes the mask out of ``mine``'s vector again.

    Raises:
        ValueError: the public key is none.
    """
    sign, (first, second) = sign_of(mine, other), sorted((mine, other))
    # The names, for one public key has several spellings (RFC 7748, section 5): a silo that showed another's would else cancel that one's masks.
    return Mask(shared_key(private, public, context, f"pair mask {first} {second}"), -sign if remove else sign)


def sign_of(mine: str, other: str) -> int:
    """Whether a silo adds the mask it shares with another or takes it away. Raises ValueError where the two are one."""
    if mine == other:
        raise ValueError(f"silo {mine!r}: shares no mask with itself")
    return 1 if mine < other else -1
