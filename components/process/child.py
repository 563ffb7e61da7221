"""A step in a process of its own, so that what it does to memory, threads and exit codes ends with it.

The child is a fork: of a fresh interpreter, or, where SILOTUNE_WARM names its socket, of the `warm_parent`; it does the same either way. It
calls ``work`` of ``silotune.components.<box>.step`` with text arguments. It leads a process group, and the whole group is killed when the
child ends, passes its deadline, shows no sign of life, or loses its caller, whose end of the connection then closes.

How a child ended is said in a fixed vocabulary (see `ending`): ``killed by signal 11``, ``exit code 3``, ``out of memory``, ``disk full``,
``late``, ``hung at step 3 of 50``, ``hung``, or the reason of the error that its step raised.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from silotune.components.errors import FederationError, QuorumError, RefusedError, SilotuneError, UnreachableError
from silotune.components.process.ending import DISK_FULL_REASON, NO_MEMORY, in_words, oom_kills, told
from silotune.components.process.progress import HEARTBEAT_VARIABLE, RUN_VARIABLE, read_heartbeat, tell

WARM_VARIABLE = "SILOTUNE_WARM"
DEADLINE_VARIABLE = "SILOTUNE_DEADLINE"  # in the child: Unix time in seconds, by this machine's clock, at which it is killed
ERRORS = {e.exit_code: e for e in (SilotuneError, FederationError, QuorumError, RefusedError, UnreachableError)}
LOOK = 0.25  # seconds between looks at a child's signs of life
PATIENCE = 2.0  # seconds for a killed child to be gone


class ChildDied(SilotuneError):
    """The child ended without a result: it was killed, left on its own, or the machine ran out of memory."""


class ChildLate(SilotuneError):
    """The child was not done at its deadline and was killed."""


class ChildHung(SilotuneError):
    """The child showed no sign of life for too long and was killed."""


def coordinate(box: str, *arguments: str, failed: str = "") -> str:
    """Run a coordinator's step in a child, and tell of its start and end; its errors break the pipeline.

    Args:
        failed: given where another box does the work if this one cannot: how its output begins then. Only a store out of reach breaks the
            pipeline, since that other box could do nothing either.
    """
    die_with_run()
    tell(box, "started")
    began = time.monotonic()
    try:
        output = call(box, *arguments)
    except SilotuneError as error:
        if not failed or (isinstance(error, UnreachableError) and error.reason != DISK_FULL_REASON):
            tell(box, "broke", exit_code=error.exit_code, detail=str(error))
            raise SystemExit(error.exit_code) from None
        tell(box, "warned", detail=str(error))
        output = re.sub(r"[^A-Za-z0-9 :._-]", "_", f"{failed}: {error.reason}")[:300]
    tell(box, "ended", output=output, seconds=round(time.monotonic() - began, 2))
    return output


def call(
    box: str,
    *arguments: str,
    log: Path | None = None,
    deadline: float | None = None,
    stall: float | None = None,
    heartbeat: Path | None = None,
) -> str:
    """Run a step in a child and return what its ``work`` returns.

    Args:
        box: the step, such as ``train``.
        arguments: handed to ``work`` as they are.
        log: where the child's output goes; default: this process's own.
        deadline: seconds from now after which the child is killed; the child reads it from SILOTUNE_DEADLINE.
        stall: seconds without a new heartbeat after which the child is killed; one that is slow but beats goes on.
        heartbeat: file that the child's `progress.Pulse` writes for this call and that is watched; removed first, so that an old one is no
            sign of life. Default: one of this call's own, so that no other work of the silo is taken for this one.

    Raises:
        SilotuneError: what ``work`` raised, of the same exit code and message.
        ChildDied: no result came.
        ChildLate, ChildHung: it was killed at a limit.
        OSError: this machine can start no process or make no file.
    """
    with tempfile.TemporaryDirectory(prefix="silotune-", dir=os.environ.get(RUN_VARIABLE), ignore_cleanup_errors=True) as folder:
        beats = heartbeat.absolute() if heartbeat else Path(folder) / "heartbeat.json"
        beats.unlink(missing_ok=True)
        environment = {**os.environ, HEARTBEAT_VARIABLE: str(beats)}
        if deadline is not None:
            environment[DEADLINE_VARIABLE] = repr(time.time() + deadline)
        request = {"box": box, "arguments": arguments, "log": str(log) if log else None, "environment": environment, "folder": os.getcwd()}
        kills = oom_kills()
        with _parent() as connection:
            child = _Child(connection)
            try:
                connection.sendall(json.dumps(request).encode() + b"\n")
                _attend(child, box, beats, deadline, stall)
            except BrokenPipeError:  # the parent has ended; what it said before tells more
                child.wait(PATIENCE)
            finally:
                child.end()
    if child.result is None:
        memory = child.code == -signal.SIGKILL and oom_kills() > kills
        how = "out of memory" if memory else in_words(child.code)
        raise ChildDied(f"{box}: {NO_MEMORY}" if memory else f"{box}: ended without a result ({how}); see its log", how)
    if child.result["exit_code"]:
        raise ERRORS[child.result["exit_code"]](child.result["message"], child.result["reason"])
    return str(child.result["output"])


@contextlib.contextmanager
def _parent() -> Iterator[socket.socket]:
    """A connection to the process that will fork the child: the warm parent, or a fresh one where there is none, or no longer."""
    if warm := os.environ.get(WARM_VARIABLE):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            with contextlib.suppress(OSError):
                connection.connect(warm)
                warm = ""
            if not warm:
                yield connection
                return
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen([sys.executable, "-m", "silotune.components.process.warm_parent"], stdin=theirs.fileno())
        try:
            yield ours
        finally:
            ours.close()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class _Child:
    """The child at the other end of a connection, as far as it has been told of."""

    def __init__(self, connection: socket.socket) -> None:
        self.pid = 0
        self.result: dict[str, Any] | None = None
        self.code: int | None = None
        self.over = False
        self._connection, self._rest = connection, b""

    def listen(self, seconds: float | None) -> None:
        """Take in what comes next, if it comes within ``seconds``."""
        self._connection.settimeout(seconds)
        try:
            chunk = self._connection.recv(65536)
        except TimeoutError:
            return
        except ConnectionResetError:
            chunk = b""
        self.over = not chunk
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            word, _, value = line.partition(b" ")
            if word == b"pid":
                self.pid = int(value)
            elif word == b"result":
                with contextlib.suppress(ValueError):  # the child was killed while it told
                    self.result = json.loads(value)
            elif word == b"ended":
                self.code, self.over = int(value), True

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.over and (left := end - time.monotonic()) > 0:
            self.listen(left)

    def end(self) -> None:
        """Have it killed if it is still there, with all that it started."""
        if self.over:
            return
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)  # its parent kills it, whatever it is stuck in
        self.wait(PATIENCE if self.pid else LOOK)  # a parent that has not forked yet will not, or kills what it has just forked
        if self.pid and not self.over:  # the parent is busy importing and has not reaped it, so the number is still this child's
            kill_group(self.pid)
            self.wait(PATIENCE)


def _attend(child: _Child, box: str, heartbeat: Path, deadline: float | None, stall: float | None) -> None:
    """Wait for the end of a child. Raises ChildLate and ChildHung at the limits."""
    began = looked = time.monotonic()
    idle, seen = 0.0, _mark(heartbeat)
    while not child.over:
        left = float("inf") if deadline is None else began + deadline - time.monotonic()
        if child.result is not None:
            return child.wait(PATIENCE)
        if left <= 0:
            raise ChildLate(f"{box}: not done after {deadline:g} s and stopped; raise rounds.deadline, or give it less work", "late")
        unlimited = deadline is None and stall is None
        child.listen(None if unlimited else min(LOOK, left))
        now, mark = time.monotonic(), _mark(heartbeat)
        # While this process was stopped it could see nothing, and blames nobody for that time.
        idle = idle + min(now - looked, 2 * LOOK) if mark == seen else 0.0
        looked, seen = now, mark
        if stall is not None and idle >= stall and not child.over and child.result is None:
            beat = read_heartbeat(heartbeat)
            reason = f"hung at step {beat.step:d} of {beat.steps:d}" if beat and beat.steps else "hung"
            raise ChildHung(f"{box}: {reason}: no sign of life for {stall:g} s; raise rounds.stall if a step takes that long", reason)


def _mark(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever a file is written, replaced or touched."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_mtime_ns, found.st_ino, found.st_size
    return None


def kill_group(pid: int) -> None:
    """Kill the group that a child leads: itself and what it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def execute(request: dict[str, Any], connection: socket.socket) -> NoReturn:
    """In the child: call the step, tell the result, leave."""
    code = 0
    try:
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        if request["log"]:
            _redirect(Path(request["log"]))
        step = importlib.import_module(f"silotune.components.{request['box']}.step")
        result = {"exit_code": 0, "output": step.work(*request["arguments"])}
    except SystemExit as error:  # a step that leaves has no result; its code says how
        result, code = {}, error.code if isinstance(error.code, int) else int(error.code is not None)
    except Exception as error:  # the step's edge: what is not foreseen becomes exit code 1, and its trace stays in the log
        result = told(error)
        with contextlib.suppress(OSError):
            if isinstance(error, SilotuneError):
                print(f"error: {error}", file=sys.stderr)
            else:
                traceback.print_exception(error)
    with contextlib.suppress(OSError):  # a log on a full disk
        sys.stdout.flush()
        sys.stderr.flush()
    if result:
        with contextlib.suppress(OSError):  # the caller is gone, and nobody wants the result
            connection.sendall(b"result " + json.dumps(result).encode() + b"\n")
    os._exit(code)  # no teardown of torch's threads: they have nothing left to do


def die_with(fd: int) -> None:
    """End this process, at once, when the other end of ``fd`` closes."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(fd, 1):
                pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def die_with_run() -> None:
    """End this process when the local run it belongs to ends: it holds a lock on its run folder for as long as it lives."""
    if not (folder := os.environ.get(RUN_VARIABLE)):
        return

    def watch() -> None:
        with open(Path(folder) / "alive.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _redirect(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
