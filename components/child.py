"""A step in a process of its own, so that what it does to memory, threads and exit codes ends with it.

The child is a fresh interpreter, or, where SILOTUNE_WARM names the socket of a `warm_parent`, a fork of that one; it does the same either
way. It calls ``work`` of ``silotune.components.<box>.step`` with text arguments and writes a result file. It dies with its caller: the
caller holds the other end of a pipe or socket, and when that closes the child ends itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from silotune.components.errors import FederationError, QuorumError, RefusedError, SilotuneError, UnreachableError
from silotune.components.progress import RUN_VARIABLE, tell

WARM_VARIABLE = "SILOTUNE_WARM"
ERRORS = {e.exit_code: e for e in (SilotuneError, FederationError, QuorumError, RefusedError, UnreachableError)}


class ChildDied(SilotuneError):
    """The child ended without a result: it was killed, or the machine ran out of memory."""


def coordinate(box: str, *arguments: str) -> str:
    """Run a coordinator's step in a child, and tell of its start and end; its errors break the pipeline."""
    die_with_run()
    tell(box, "started")
    began = time.monotonic()
    try:
        output = call(box, *arguments)
    except SilotuneError as error:
        tell(box, "broke", exit_code=error.exit_code, detail=str(error))
        raise SystemExit(error.exit_code) from None
    tell(box, "ended", output=output, seconds=round(time.monotonic() - began, 2))
    return output


def call(box: str, *arguments: str, log: Path | None = None) -> str:
    """Run a step in a child and return what its ``work`` returns.

    Args:
        box: the step, such as ``train``.
        arguments: handed to ``work`` as they are.
        log: where the child's output goes; default: this process's own.

    Raises:
        SilotuneError: what ``work`` raised, of the same exit code and message.
        ChildDied: no result came.
    """
    with tempfile.TemporaryDirectory(prefix="silotune-", dir=os.environ.get(RUN_VARIABLE)) as folder:
        result = Path(folder) / "result.json"
        request = {"box": box, "arguments": list(arguments), "result": str(result), "log": str(log) if log else None}
        warm = os.environ.get(WARM_VARIABLE)
        how = _fork(warm, request) if warm else _start(request)
        if not result.exists():
            raise ChildDied(f"{box}: ended without a result ({how}); killed, or out of memory", how)
        found = json.loads(result.read_text())
    if found["exit_code"]:
        raise ERRORS[found["exit_code"]](found["message"], found["reason"])
    return str(found["output"])


def _start(request: dict[str, Any]) -> str:
    """Run the request in a fresh interpreter; returns how it ended."""
    process = subprocess.Popen([sys.executable, "-m", "silotune.components.child", json.dumps(request)], stdin=subprocess.PIPE)
    try:
        code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        if process.stdin:
            process.stdin.close()
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def _fork(address: str, request: dict[str, Any]) -> str:
    """Run the request in a fork of the warm parent; returns how it ended."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(address)
        connection.sendall(json.dumps({**request, "environment": dict(os.environ), "folder": os.getcwd()}).encode() + b"\n")
        data = b""
        while chunk := connection.recv(4096):
            data += chunk
    return data.decode().strip() or "killed"


def execute(request: dict[str, Any]) -> NoReturn:
    """In the child: call the step, write the result, leave."""
    if request["log"]:
        _redirect(Path(request["log"]))
    result: dict[str, Any] = {"exit_code": 0}
    try:
        step = importlib.import_module(f"silotune.components.{request['box']}.step")
        result["output"] = step.work(*request["arguments"])
    except SilotuneError as error:
        print(f"error: {error}", file=sys.stderr)
        result = {"exit_code": error.exit_code, "message": str(error), "reason": error.reason}
    except MemoryError:
        message = "out of memory; use a smaller batch, more accumulation or gradient checkpointing"
        result = {"exit_code": 1, "message": message, "reason": "out of memory"}
    except OSError as error:
        traceback.print_exc()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        message = f"{error.strerror or type(error).__name__}: {error.filename or 'a local file'}; free space or give access, then run again"
        code = UnreachableError.exit_code if full else 1
        result = {"exit_code": code, "message": message, "reason": "disk full" if full else "a local file cannot be used"}
    except Exception as error:  # the step's edge: what is not foreseen becomes exit code 1, and its trace stays in the log
        traceback.print_exc()
        result = {"exit_code": 1, "message": f"unexpected {type(error).__name__}; see the log", "reason": "unexpected error"}
    path = Path(request["result"])
    with contextlib.suppress(FileNotFoundError):  # the caller is gone, and nobody wants the result
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps(result))
        scratch.replace(path)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no teardown of torch's threads: they have nothing left to do


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


if __name__ == "__main__":
    die_with(sys.stdin.fileno())
    execute(json.loads(sys.argv[1]))
