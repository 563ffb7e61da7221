"""Content: objects of a store that lie under the SHA-256 of their bytes, so that whatever is read can be told from what was stored."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from silotune.components.errors import RefusedError
from silotune.components.store.object_store import ObjectStore


class CorruptObject(RefusedError):
    """An object whose bytes are not those that its name promises."""

    def __init__(self, key: str, got: str) -> None:
        super().__init__(
            f"object '{key}': its bytes have the digest {got[:12]}…; it was damaged in the store: `silotune verify --repair` makes a global "
            "again, other objects come from a backup",
            "object corrupt",
        )
        self.key = key


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(store: ObjectStore, key: str, digest: str, path: Path) -> Path:
    """Copy an object to ``path``; what arrives damaged is asked for once more.

    Raises:
        CorruptObject: the bytes in the store do not have the digest.
        ObjectMissing: there is no such object.
    """
    for _ in range(2):
        store.fetch_file(key, path)
        if (got := file_digest(path)) == digest:
            return path
        path.unlink()
    raise CorruptObject(key, got)


def fetch_json(store: ObjectStore, key: str, digest: str) -> Any:
    """The value of an object of JSON. Raises as `fetch`."""
    data = store.get(key)
    if (got := hashlib.sha256(data).hexdigest()) != digest:
        raise CorruptObject(key, got)
    return json.loads(data)


def fetch_shapes(store: ObjectStore, key: str, digest: str) -> dict[str, list[int]]:
    """Names and shapes of a safetensors object. All of it is read, because only the digest of all says that its header is sound.

    Raises:
        CorruptObject, ObjectMissing: as `fetch`.
    """
    with tempfile.TemporaryDirectory() as folder, fetch(store, key, digest, Path(folder) / "tensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: about["shape"] for name, about in header.items() if name != "__metadata__"}
