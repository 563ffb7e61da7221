"""The secret that a party draws its noise and its samples from, and the keys made of it.

32 bytes from the operating system, in a file that only its owner may read, made once and never sent: a silo's in its own folder, which all its
machines share, the coordinator's in its own. Whoever has it can take the noise off again; whoever loses it loses nothing but that a killed
training goes on with the same noise.

Every use has a key of its own. The same inputs give the same key, so that a training that is killed and done again sends the same bytes; with any
other input the noise is fresh, so that no two updates can be subtracted to be rid of it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import uuid
from pathlib import Path

from silotune.components.errors import SilotuneError
from silotune.components.federation import canonical_json

BYTES = 32
FILE = "secrets/noise.key"  # in the party's folder


def own_secret(folder: Path) -> bytes:
    """The party's secret, made now if there is none.

    Raises:
        SilotuneError: it cannot be read or made, is not of the right size, or others may read it.
    """
    path = folder / FILE
    try:
        if not path.exists():
            _make(path)
        if mode := path.stat().st_mode & 0o077:
            raise SilotuneError(
                f"secret '{path}': must be readable by its owner only, got mode {mode:03o} for others; chmod 600 it, or delete it",
                "secret exposed",
            )
        secret = path.read_bytes()
    except OSError as error:
        raise SilotuneError(f"secret '{path}': cannot be read or made: {error.strerror or error}; allow it", "no secret") from None
    if len(secret) != BYTES:
        raise SilotuneError(f"secret '{path}': must be of {BYTES} bytes, got {len(secret)}; delete it, and a new one is made", "no secret")
    return secret


def derive(secret: bytes, *, agreement: str, plan: str, incoming: str, dataset: str, purpose: str) -> bytes:
    """The key for one purpose in one round: HMAC-SHA256 of all that names them, 32 bytes.

    Args:
        agreement, plan, incoming, dataset: digests; "" where there is none.
    """
    named = {"agreement": agreement, "plan": plan, "incoming": incoming, "dataset": dataset, "purpose": purpose}
    return hmac.digest(secret, b"silotune key 1\n" + canonical_json(named), hashlib.sha256)


def subkey(key: bytes, *place: str | int) -> bytes:
    """The key for a place within a purpose, such as a step and a tensor; 32 bytes."""
    return hmac.digest(key, canonical_json(list(place)), hashlib.sha256)


def _make(path: Path) -> None:
    """Whole or not at all; of several at once the first one's counts."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = path.with_name(f".{uuid.uuid4().hex}.part")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(os.urandom(BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(scratch, path)
        except FileExistsError:
            return
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or a crash could take the key away after its noise was used
        finally:
            os.close(folder)
    finally:
        scratch.unlink()
