"""Updates read side by side: tensor by tensor, that of all silos at once, for whatever must compare them or take them apart.

Means need no more than a window of one update at a time (`summation`). Here memory holds one tensor of every silo, and the few that are on their
way from the store. As there, digests, finiteness and norms are checked in the same pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import numpy as np

from silotune.components.learning.aggregation.summation import BLOCK, Check, verify_norms
from silotune.components.learning.blob import read_ahead
from silotune.components.learning.tensor_file import WIDTH, MalformedFile, from_bytes
from silotune.components.learning.update import Update, UpdateRefused


class SideBySide:
    """Some updates, silos in the sorted order of their ids."""

    def __init__(self, updates: Mapping[str, Update]) -> None:
        if not updates:
            raise ValueError("there is no update to read")
        self._updates = {silo: updates[silo] for silo in sorted(updates)}
        self._checks = {silo: Check(update.header) for silo, update in self._updates.items()}

    def tensors(self, names: Iterable[str]) -> Iterator[dict[str, np.ndarray]]:
        """Of each name in turn, the verified tensors of all silos, float32.

        Raises:
            UpdateRefused: the bytes of one are cut short or do not have the digest in the header, or it is not finite.
        """
        wanted = [(silo, name) for name in names for silo in self._updates]
        ahead = max(update.file.blob.ahead for update in self._updates.values())
        reading = read_ahead((partial(self._read, *at) for at in wanted), min(ahead, len(self._updates)))
        found: dict[str, np.ndarray] = {}
        try:
            for silo, name in wanted:
                found[silo] = self._checked(silo, name, next(reading))
                if len(found) == len(self._updates):
                    yield found
                    found = {}
        finally:
            reading.close()

    def norms(self) -> dict[str, float]:
        """L2 norms by silo, after all tensors were read once. Raises UpdateRefused where a header tells another norm."""
        return verify_norms([(self._updates[silo], check) for silo, check in self._checks.items()])

    def _read(self, silo: str, name: str) -> bytes | memoryview:
        file = self._updates[silo].file
        try:
            return file.span(name, file.entries[name].start, file.entries[name].end)
        except MalformedFile as error:
            raise UpdateRefused(silo, str(error), "send the update again") from None

    def _checked(self, silo: str, name: str, data: bytes | memoryview) -> np.ndarray:
        check, entry, view = self._checks[silo], self._updates[silo].file.entries[name], memoryview(data)
        array, width = from_bytes(data, entry.dtype), WIDTH[entry.dtype]
        for start in range(0, len(array), BLOCK):  # what has been hashed still lies in the processor's cache
            check.read(view[start * width : (start + BLOCK) * width])
            check.numbers(name, array[start : start + BLOCK])
        check.end_tensor(name)
        return array.reshape(entry.shape)
