"""A board of numbers and one text that a life shares with its watcher: what is written on it outlasts the life, and takes no system call."""

from __future__ import annotations

import json
import mmap
import struct
from typing import Any

from scenario import BOXES

STORE_FAULTS = ("drop-before", "drop-after", "delay", "duplicate", "truncate", "flip")
NAMES = ("box", "trainings", "steps", "put", "no room", *STORE_FAULTS)
TEXT = 4096
SIZE = 1 << 18


class Board:
    """Counts by name."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, SIZE)

    def __getitem__(self, name: str) -> int:
        return int(struct.unpack_from("<q", self._memory, 8 * NAMES.index(name))[0])

    def __setitem__(self, name: str, value: int) -> None:
        struct.pack_into("<q", self._memory, 8 * NAMES.index(name), value)

    @property
    def box(self) -> str:
        """Which box is, or was last, at work."""
        return BOXES[self["box"]]

    @box.setter
    def box(self, name: str) -> None:
        self["box"] = BOXES.index(name)

    @property
    def result(self) -> dict[str, Any]:
        """What the life said at its end; empty where it never came to that."""
        size = struct.unpack_from("<q", self._memory, TEXT)[0]
        return dict(json.loads(self._memory[TEXT + 8 : TEXT + 8 + size])) if size else {}

    @result.setter
    def result(self, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()[: SIZE - TEXT - 8]
        self._memory[TEXT + 8 : TEXT + 8 + len(data)] = data
        struct.pack_into("<q", self._memory, TEXT, len(data))
