"""An object of a store, read in ranges."""

from __future__ import annotations

from dataclasses import dataclass

from silotune.components.store.object_store import ObjectStore


@dataclass(frozen=True)
class StoreBlob:
    """A `learning.blob.Blob`. Nothing says that what one read finds is of the same bytes as what another finds: digests must."""

    store: ObjectStore
    key: str
    size: int
    ahead: int = 8  # reads on their way at once: so many answers' latency is hidden behind one another

    def read(self, start: int, end: int) -> bytes:
        """Raises ObjectMissing; UnreachableError."""
        return self.store.get_range(self.key, start, end - start)
