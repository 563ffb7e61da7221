"""Forks of a process that has had threads: one that Python has joined may still be in its last lines in C. Once this is imported, forks wait."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

TASKS = Path("/proc/self/task")
PATIENCE = 0.2  # seconds; a library's own threads, which do not end, are not waited for any longer


def settle() -> None:
    """Wait for threads that Python no longer counts.

    OpenSSL cleans up after each thread that has used it, under a lock of its own. Whoever forks at that moment inherits the lock, locked for ever.
    """
    end = time.monotonic() + PATIENCE
    while TASKS.exists() and len(os.listdir(TASKS)) > threading.active_count() and time.monotonic() < end:
        time.sleep(0.001)


os.register_at_fork(before=settle)
