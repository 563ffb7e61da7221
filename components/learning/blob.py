"""Blobs: bytes that are read in ranges, wherever they lie, so that a file much larger than memory, or in a store far away, is read in parts."""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

MAPPED = 1 << 20  # bytes; what is shorter is copied sooner than it is mapped


class Blob(Protocol):
    """Some bytes of known length."""

    @property
    def size(self) -> int:
        """Bytes in all."""

    @property
    def ahead(self) -> int:
        """How many reads are worth having on their way at once, in threads; 0 where an answer comes as fast as memory."""

    def read(self, start: int, end: int) -> bytes | memoryview:
        """The bytes from ``start`` to before ``end``; fewer where there are no more. Of two calls, neither waits for the other."""


class FileBlob:
    """A local file. It is opened for each read, so that a thousand of them need no thousand descriptors.

    Long reads are maps of the page cache, and no copies: whoever keeps such a view must know that nobody cuts the file short meanwhile.
    """

    ahead = 0

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size

    def read(self, start: int, end: int) -> bytes | memoryview:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if end - start >= MAPPED and end <= os.fstat(descriptor).st_size:
                skip = start % mmap.ALLOCATIONGRANULARITY
                view = mmap.mmap(descriptor, end - start + skip, prot=mmap.PROT_READ, offset=start - skip)
                return memoryview(view)[skip:]
            return os.pread(descriptor, max(0, end - start), start)  # on Linux up to 2 GiB at once, which is more than MAPPED
        finally:
            os.close(descriptor)


def read_ahead(reads: Iterable[Callable[[], bytes | memoryview]], ahead: int) -> Generator[bytes | memoryview, None, None]:
    """What some reads return, in their order, up to ``ahead`` of them on their way in threads."""
    if ahead == 0:
        for read in reads:
            yield read()
        return
    pool = ThreadPoolExecutor(ahead)
    underway: deque[Future[bytes | memoryview]] = deque()
    try:
        for read in reads:
            underway.append(pool.submit(read))
            if len(underway) > ahead:
                yield underway.popleft().result()
        while underway:
            yield underway.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
