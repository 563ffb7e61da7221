"""How a process ended, in a fixed vocabulary: what the others learn of a crash, and no more."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
from pathlib import Path
from typing import Any

from silotune.components.errors import SilotuneError, UnreachableError

NO_MEMORY = "out of memory; use a smaller batch, more accumulation or gradient checkpointing"
# What allocators below Python say: torch on a CPU, on a GPU and in its libraries, and C++ itself.
NO_MEMORY_TEXT = re.compile(
    r"can't allocate memory|out of memory|Cannot allocate memory|ALLOC_FAILED|bad_alloc|os error 12\b", re.IGNORECASE
)
DISK_FULL_TEXT = re.compile(r"No space left on device|os error 28\b|code: 28\b|Disk quota exceeded", re.IGNORECASE)
DISK_FULL_REASON = "disk full"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def in_words(code: int | None) -> str:
    """An exit code as ``subprocess`` counts them, in words; None is of a child whose parent has ended, and it with that."""
    if code is None:
        code = -signal.SIGKILL
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def oom_kills() -> int:
    """Processes of this one's control group (else: of the machine) that the kernel has killed so far because memory ran out."""
    places = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if not kinds:  # version 2
                places += [f"/sys/fs/cgroup{path}/memory.events", "/sys/fs/cgroup/memory.events"]
            elif "memory" in kinds.split(","):  # version 1
                places += [f"/sys/fs/cgroup/memory{path}/memory.oom_control", "/sys/fs/cgroup/memory/memory.oom_control"]
    for place in (*places, "/proc/vmstat"):
        with contextlib.suppress(OSError):
            if found := re.search(r"^oom_kill (\d+)$", Path(place).read_text(), re.MULTILINE):
                return int(found[1])
    return 0


def told(error: Exception) -> dict[str, Any]:
    """What others learn of an error: an exit code, a message, and a reason in the fixed vocabulary."""
    if isinstance(error, SilotuneError):
        return {"exit_code": error.exit_code, "message": str(error), "reason": error.reason}
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    of_memory = isinstance(error, RuntimeError) and NO_MEMORY_TEXT.search(text)
    if isinstance(error, MemoryError) or number == errno.ENOMEM or type(error).__name__ == "OutOfMemoryError" or of_memory:
        return {"exit_code": 1, "message": NO_MEMORY, "reason": "out of memory"}
    if number in DISK_FULL or DISK_FULL_TEXT.search(text):
        what = f"{os.strerror(number or errno.ENOSPC)}: {getattr(error, 'filename', None) or 'a local file'}"
        return {"exit_code": UnreachableError.exit_code, "message": f"{what}; free space, then run again", "reason": DISK_FULL_REASON}
    if isinstance(error, OSError):
        message = f"{error.strerror or type(error).__name__}: {error.filename or 'a local file'}; free space or give access, then run again"
        return {"exit_code": 1, "message": message, "reason": "a local file cannot be used"}
    return {"exit_code": 1, "message": f"unexpected {type(error).__name__}; see the log", "reason": "unexpected error"}
