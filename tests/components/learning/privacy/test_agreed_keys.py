"""Agreed keys: the same on both sides, another for every context and purpose; what is sealed opens with its own key only."""

from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from silotune.components.learning.privacy.agreed_keys import derived_key, public_key, seal, shared_key, unseal


def test_the_curve_is_that_of_the_rfc() -> None:
    """RFC 7748, section 6.1."""
    private = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    assert public_key(private).hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"


def test_both_sides_make_the_same_key_and_nobody_else() -> None:
    a, b, c = (os.urandom(32) for _ in range(3))
    key = shared_key(a, public_key(b), b"here", "masks")
    assert key == shared_key(b, public_key(a), b"here", "masks")
    assert len({key, shared_key(a, public_key(b), b"there", "masks"), shared_key(a, public_key(b), b"here", "shares"),
                shared_key(c, public_key(b), b"here", "masks"), derived_key(a, b"here", "masks")}) == 5  # fmt: skip


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31)])
def test_a_point_that_gives_all_the_same_secret_is_refused(point: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (the message is cryptography's)
        shared_key(os.urandom(32), point, b"", "masks")


def test_what_is_sealed_opens_with_its_key_and_about_the_same_only() -> None:
    key = os.urandom(32)
    sealed = seal(key, b"share", b"from a to b")
    assert sealed != seal(key, b"share", b"from a to b"), "a nonce is used once"
    assert ChaCha20Poly1305(key).decrypt(sealed[:12], sealed[12:], b"from a to b") == unseal(key, sealed, b"from a to b") == b"share"
    for wrong, text, about in ((os.urandom(32), sealed, b"from a to b"), (key, sealed, b"from a to c"),
                               (key, sealed[:-1] + b"x", b"from a to b"), (key, b"", b"from a to b")):  # fmt: skip
        with pytest.raises(ValueError):  # noqa: PT011
            unseal(wrong, text, about)
