"""Keys that two silos agree on through anybody's hands: X25519 (RFC 7748), HKDF-SHA256 (RFC 5869), and sealing by ChaCha20-Poly1305 (RFC 8439).

Every key is bound to a context, which says in which federation, round and attempt it is used, and to a purpose. Only the two silos can make it,
if each public key is known to be the other's: that is for its signature to say.
"""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

NONCE = 12  # bytes


def public_key(private: bytes) -> bytes:
    """32 bytes of 32 secret ones."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def is_key(public: bytes) -> bool:
    """Whether a secret can be agreed on by it: by the few points of small order all get the same."""
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return False
    return True


def shared_key(private: bytes, public: bytes, context: bytes, purpose: str) -> bytes:
    """32 bytes that the holders of both private keys make alike.

    Raises:
        ValueError: the public key is none, or of so few points that the shared secret is known to all.
    """
    return derived_key(X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public)), context, purpose)


def derived_key(secret: bytes, context: bytes, purpose: str) -> bytes:
    """32 bytes for one purpose."""
    return HKDF(SHA256(), 32, salt=context, info=f"silotune {purpose}".encode()).derive(secret)


def seal(key: bytes, data: bytes, about: bytes) -> bytes:
    """Data that only the key opens, bound to what it is about. The nonce is random, so that a step that is killed may seal again."""
    nonce = os.urandom(NONCE)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, data, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """Raises ValueError where it was not sealed with this key, or about something else."""
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:NONCE], sealed[NONCE:], about)
    except InvalidTag:
        raise ValueError("sealed data: was not sealed with this key, or about something else") from None
