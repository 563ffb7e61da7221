"""The object store a federation shares: what the round protocol needs of it, whatever it is (`directory_store`, `s3_store`).

The protocol stands on one promise, `create`: of all who write the same key, exactly one wins, and what it wrote is there whole and for good
or not at all. There is no overwriting write: records are created once, tensor files are stored under the digest of their bytes.

Whatever goes wrong leaves as an error of `errors`, with store, rule, value and cure, and without what the server wrote.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from silotune.components.errors import FederationError, SilotuneError

PROBE = ".silotune-probe"
OWN = "SILO_"  # before the names of what boto3 reads (SILO_AWS_ENDPOINT_URL, …): for buckets of a silo's own, where they stand

# What a store of either kind can hold: S3 allows 1024 bytes with the prefix, file systems 255 in one name.
KEY = re.compile(r"(?=.{1,900}\Z)(?!\.tmp(/|\Z))(?!(.*/)?\.\.?(/|\Z))[A-Za-z0-9._=+,-]{1,255}(/[A-Za-z0-9._=+,-]{1,255})*\Z")


class ObjectMissing(SilotuneError):
    """The store holds no object of this key."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the store holds no object '{key}'", "object missing")
        self.key = key


class ObjectStore(Protocol):
    """What a federation needs of its store.

    Keys are relative to the store's root: names of ``[A-Za-z0-9._=+,-]`` joined by ``/``, 900 characters at most; a name is neither ``.``
    nor ``..``, the first one not ``.tmp``. Every method raises ValueError for another key, UnreachableError when the store cannot be
    reached or has no room, and FederationError when trying again would change nothing.
    """

    def get(self, key: str) -> bytes:
        """The whole object. Raises ObjectMissing."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from byte `start` on, fewer at the end of the object, as a slice. Raises ObjectMissing; ValueError if negative."""

    def size(self, key: str) -> int | None:
        """Bytes in the object, None if there is none."""

    def create(self, key: str, data: bytes) -> bool:
        """Writes the object if the key is free: atomic, and durable once this returns.

        True: this call created it. False: it already existed, whoever wrote it. On S3 that may have been this very call: when the answer to
        a PUT is lost, the client repeats it and meets its own object. So False never means "somebody else's": compare the contents.
        """

    def put_file(self, key: str, path: Path) -> None:
        """Stores a file under a key that always stands for the same bytes (its digest): nothing to do if it is there with this size.

        Protocol records never come this way: it is no create-if-absent. Raises SilotuneError if the file cannot be read.
        """

    def fetch_file(self, key: str, path: Path) -> None:
        """Copies the object to a local file, which appears whole or not at all; memory stays bounded. Raises ObjectMissing.

        The copy is not forced to disk: whoever keeps it over a power failure checks its digest.
        """

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        """All keys that start with these characters (``a/b`` also finds ``a/bc``), sorted; without what is being written.

        Args:
            after: only those that come after it in this order; a bucket of many is asked for no others.
        """

    def delete(self, key: str) -> None:
        """Removes the object; a missing one is fine."""

    def url(self, key: str) -> str:
        """Where a person finds the object."""

    def check(self) -> None:
        """Tries with a probe object what the protocol needs: writing, create-if-absent, reading, listing."""


def open_store(location: str, *, own: bool = False, kms_key: str | None = None) -> ObjectStore:
    """The store at an absolute path or at ``s3://bucket/prefix``; nothing is touched yet (see `check`).

    Args:
        own: it is a silo's own, and a bucket of another account or server than the federation's store where SILO_AWS_… says so.
        kms_key: that a bucket is to encrypt with; default: as the bucket is set up.
    """
    scheme, _, rest = location.partition("://")
    bucket, _, prefix = rest.rstrip("/").partition("/")
    if scheme == "s3" and re.fullmatch(r"[A-Za-z0-9._-]{1,255}", bucket) and KEY.match(prefix or "x"):
        from silotune.components.store.s3_store import S3Store

        return S3Store(bucket, prefix, names=OWN if own else "", kms_key=kms_key)
    if os.path.isabs(location):
        if kms_key:
            raise FederationError(f"storage.kms_key: needs an s3:// store, whose server encrypts, got '{location}'; remove it")
        from silotune.components.store.directory_store import DirectoryStore

        return DirectoryStore(Path(location))
    raise FederationError(f"storage: must be an absolute path or s3://bucket/prefix, got '{without_secrets(location)}'")


def checked(key: str) -> str:
    if not KEY.match(key):
        raise ValueError(f"key: must be names of [A-Za-z0-9._=+,-] joined by '/', none '.' or '..', the first not '.tmp', got {key!r}")
    return key


def check_range(start: int, length: int) -> None:
    if start < 0 or length < 0:
        raise ValueError(f"range: start and length must not be negative, got start={start}, length={length}")


def probe(store: ObjectStore) -> None:
    key = f"{PROBE}/{uuid.uuid4().hex}"
    try:
        store.create(key, b"first")
        if store.create(key, b"second"):
            raise FederationError(
                f"{store}: must honour create-if-absent (on S3: answer 412 to a PUT with If-None-Match: * when the object exists), but a "
                f"second write of '{key}' was accepted; use AWS S3, a recent Ceph or MinIO, or a folder"
            )
        if store.get(key) != b"first" or list(store.list(key)) != [key]:
            raise FederationError(f"{store}: must return and list what was just written, did not for '{key}'; use a consistent store")
    finally:
        with suppress(SilotuneError):  # the error above says more; and a store that forbids deletion is fine until `gc`
            store.delete(key)


def without_secrets(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url).partition("?")[0]
