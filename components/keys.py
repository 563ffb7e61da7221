"""Keys: who may sign what, and whose signature a record bears. Ed25519 (RFC 8032), by `cryptography`.

A party is ``coordinator`` or a silo. Its private key never leaves its own machine: ``<party>.pem`` (PKCS#8, mode 0600) in the silo's
storage, in the coordinator's ``.silotune/keys``, or in the folder that SILOTUNE_KEYS names, such as a mounted secret. The public half
stands in the federation file. Where the file holds none, `ensure` makes a pair for every party on this machine (``custody: local``).

What is signed is a record's canonical JSON behind its kind and its key in the store, so that no record can stand in for another one, in
another place, round or federation.
"""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from silotune.components.errors import FederationError, RefusedError
from silotune.components.federation import Federation
from silotune.components.federation_file import COORDINATOR
from silotune.components.terms.security import PublicKey

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

FOLDER_VARIABLE = "SILOTUNE_KEYS"
PREFIX = "ed25519:"


def new(folder: Path, party: str, *, replace: bool = False) -> str:
    """Make a pair of keys in a folder; returns the public half as the federation file wants it.

    Args:
        replace: put an existing private key aside, as ``<party>.<n>.pem``, instead of refusing.

    Raises:
        RefusedError: the party has a key there.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _alone(folder):
        path = folder / f"{party}.pem"
        if path.exists():
            if not replace:
                raise RefusedError(
                    f"{path}: {party} has a key already; rotate it with --replace, and give both keys their rounds in the file"
                )
            path.rename(next(p for n in range(1, 10**6) if not (p := folder / f"{party}.{n}.pem").exists()))
        return _make(folder, party)


def _make(folder: Path, party: str) -> str:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    private = Ed25519PrivateKey.generate()
    public = text_of(private)
    # The public half first: whoever finds a private key finds its public one as well.
    _write(folder / f"{party}.pub", public.encode() + b"\n", 0o644)
    _write(folder / f"{party}.pem", private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    return public


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time makes keys in a folder, so that no private key is ever written over."""
    import fcntl

    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(path: Path, data: bytes, mode: int) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)  # of a killed process that had this number; never written into: its mode is not known
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def text_of(private: Ed25519PrivateKey) -> str:
    return PREFIX + base64.b64encode(private.public_key().public_bytes_raw()).decode()


def ensure(federation: Federation) -> None:
    """In local custody, make the keys that are missing. A silo whose storage cannot be written stays without, and cannot take part.

    Raises:
        OSError: the coordinator's own cannot be written.
    """
    if federation.custody != "local":
        return
    for party in (COORDINATOR, *federation.silo_ids):
        folder = federation.key_folder(party)
        with contextlib.nullcontext() if party == COORDINATOR else contextlib.suppress(OSError):
            private, public = folder / f"{party}.pem", folder / f"{party}.pub"
            if private.exists() and public.exists():
                continue
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _alone(folder):  # two runs that begin together agree on one key
                if not private.exists():
                    _make(folder, party)
                elif not public.exists():
                    _write(public, text_of(private_key(private)).encode() + b"\n", 0o644)


class Keyring:
    """What one process signs with and verifies against, for one federation file."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation

    def sign(self, party: str, round_number: int | None, message: bytes) -> str:
        """The signature, base64.

        Raises:
            FederationError: this machine has no key of the party, or one that the federation file does not name for that round.
        """
        path = _key_file(self.federation, party)
        usable = _usable(self.federation.public_keys_of(party), round_number)
        private = private_key(path)
        if text_of(private) in usable:
            return _signature(private, message)
        # One that was rotated out still signs for the rounds that were its own, such as an export of an old global.
        for aside in sorted(path.parent.glob(f"{party}.*.pem")):
            if text_of(private := private_key(aside)) in usable:
                return _signature(private, message)
        where = "" if round_number is None else f" for round {round_number}"
        raise FederationError(
            f"{path}: {party}'s key {text_of(private_key(path))} is not among security.keys.{party}{where}; add it there, or put the private "
            "half of one that stands there in its place",
            "signing key not registered",
        )

    def trusts(self, party: str, round_number: int | None, message: bytes, signature: str) -> bool:
        """Whether the federation file has a key of the party, good for that round, that made the signature."""
        return verify(self.federation.public_keys_of(party), round_number, message, signature)


def signature(private: Ed25519PrivateKey, message: bytes) -> str:
    """A signature as records hold it, base64."""
    return base64.b64encode(private.sign(message)).decode()


def _signature(private: Ed25519PrivateKey, message: bytes) -> str:
    return base64.b64encode(private.sign(message)).decode()


def sign_as(federation: Federation, silo_id: str, message: bytes) -> str:
    """A silo's signature of what is its own business, and no round's. Raises FederationError without a key."""
    return signature(private_key(_key_file(federation, silo_id)), message)


def own(federation: Federation, silo_id: str) -> list[PublicKey]:
    """Public halves of the private keys that a silo has on this machine, the present one first. It is made where signing is off and there is none.

    Raises:
        FederationError: there is none, or it cannot be read.
    """
    path = _key_file(federation, silo_id)
    if federation.custody == "none" and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _alone(path.parent):
            if not path.exists():
                _make(path.parent, silo_id)
    return [PublicKey(public=text_of(private_key(p))) for p in (path, *sorted(path.parent.glob(f"{silo_id}.*.pem")))]


def verify(keys: list[PublicKey], round_number: int | None, message: bytes, signed: str) -> bool:
    """Whether one of the keys that are good for a round made the signature."""
    from cryptography.exceptions import InvalidSignature

    try:
        raw = base64.b64decode(signed, validate=True)
    except ValueError:
        return False
    if base64.b64encode(raw).decode() != signed:  # one signature, one text
        return False
    for public in _usable(keys, round_number):
        with contextlib.suppress(InvalidSignature):
            _public(public).verify(raw, message)
            return True
    return False


def _usable(keys: list[PublicKey], round_number: int | None) -> list[str]:
    return [k.public for k in keys if round_number is None or k.good_for(round_number)]


def _key_file(federation: Federation, party: str) -> Path:
    mounted = os.environ.get(FOLDER_VARIABLE)
    return (Path(mounted) if mounted else federation.key_folder(party)) / f"{party}.pem"


def private_key(path: Path) -> Ed25519PrivateKey:
    """The key in a file.

    Raises:
        FederationError: it cannot be read, or holds another kind of key.
    """
    with contextlib.suppress(OSError):
        return _read(path, path.stat().st_mtime_ns)
    return _read(path, 0)


@cache
def _read(path: Path, _: int) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise FederationError(
            f"{path}: the private key cannot be read: {error.strerror}; make one with `silotune keys new`, or set {FOLDER_VARIABLE}",
            "no signing key",
        ) from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise FederationError(f"{path}: is no unencrypted PEM private key; make one with `silotune keys new`", "no signing key") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise FederationError(
            f"{path}: must be an Ed25519 key, is {type(key).__name__}; make one with `silotune keys new`", "no signing key"
        )
    return key


@cache
def _public(text: str) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    return Ed25519PublicKey.from_public_bytes(base64.b64decode(text.removeprefix(PREFIX)))
