"""Traps: how a life is killed at a system call, or finds no room at some.

With strace, the life waits at a gate until a tracer is attached, so that only the box in question is slowed down; the tracer counts real
system calls and alters them. Without strace (or with SILOTUNE_CHAOS_TRAPS=hooks), an audit hook in the life itself counts what Python does:
coarser, for it does not see what libraries do in C, but as repeatable.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from board import Board
from scenario import Trap

STRACE = None if os.environ.get("SILOTUNE_CHAOS_TRAPS") == "hooks" else shutil.which("strace")
EVENTS = {  # what Python says before it makes a call
    "os.rename": ("rename", "renameat"), "os.link": ("link",), "os.remove": ("unlink", "unlinkat"), "os.rmdir": ("rmdir",),
    "os.mkdir": ("mkdir",), "fcntl.flock": ("flock",), "socket.connect": ("sendto",), "os.truncate": ("ftruncate",),
}  # fmt: skip


def how() -> str:
    return f"{STRACE} (system calls)" if STRACE else "audit hooks (calls of Python)"


def attach(pid: int, trap: Trap, log: Path) -> subprocess.Popen[str]:
    """A tracer that is at work once this returns; it ends with the life."""
    assert STRACE
    what = "signal=KILL" if trap.kills else "error=ENOSPC"
    when = f"{trap.first}" if trap.kills else f"{trap.first}..{trap.last}"
    names = ",".join(trap.calls)
    command = [STRACE, "-p", str(pid), "-o", str(log), "-e", f"trace={names}", "-e", f"inject={names}:{what}:when={when}"]
    tracer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr
    said = tracer.stderr.readline()
    if "attached" not in said:
        raise RuntimeError(f"strace cannot attach: {said}{tracer.stderr.read()}")
    return tracer


def refused_calls(log: Path) -> int:
    """How many calls found no room, by a tracer's log."""
    return sum(line.rstrip().endswith("(INJECTED)") for line in log.read_text(errors="replace").splitlines()) if log.exists() else 0


def hook(trap: Trap, board: Board) -> None:
    """In a life: the same by an audit hook, from now on."""
    counts: dict[str, int] = {}

    def call(*names: str) -> None:
        for name in names:
            if name in trap.calls:
                counts[name] = counts.get(name, 0) + 1
                if trap.kills and counts[name] == trap.first:
                    os.kill(os.getpid(), signal.SIGKILL)
                if not trap.kills and trap.first <= counts[name] <= trap.last:
                    board["no room"] += 1
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            writing = bool(isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
            call("openat", *(("write",) if writing else ()))
        elif event in EVENTS:
            call(*EVENTS[event])

    def sync(descriptor: Any, inner: Any = os.fsync) -> None:
        call("fsync")
        inner(descriptor)

    os.fsync = sync
    sys.addaudithook(audit)
