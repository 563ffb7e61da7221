"""A warm parent: one process per local run that has imported the heavy packages, and forks a child for every step.

Importing torch, transformers, peft and MLflow takes seconds, and a run has dozens of steps. The parent imports them once and *uses* none of
them, so that a fork starts with the state of a fresh import: no thread, no generator, no device. Optional, for one machine only; a step does
the same, to the byte, in a fresh interpreter.

    python -m silotune.components.warm_parent SOCKET      serves until its standard input closes
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from typing import Any

from silotune.components.child import die_with, execute

PACKAGES = (
    "torch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "accelerate",
    "peft",
    "mlflow.tracking",
    "mlflow.store.tracking.sqlalchemy_store",
    *(f"silotune.components.{box}.step" for box in ("preprocess", "initialize", "train", "aggregate", "evaluate", "export")),
    *(f"silotune.components.learning.{noun}" for noun in ("model", "tokens", "batches", "training", "evaluation", "update")),
)


def serve(address: str, lifeline: int) -> None:
    """Listen, import, then fork a child for every request until ``lifeline`` closes."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(64)
    for package in PACKAGES:
        if select.select([lifeline], [], [], 0)[0]:  # nothing is ever written to it: it has closed
            return
        with contextlib.suppress(ImportError):  # only ever slower without it
            importlib.import_module(package)
    gc.collect()
    gc.freeze()  # pages that the collector would touch stay shared
    woken, waker = socket.socketpair()
    for end in (woken, waker):
        end.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    callers: dict[int, socket.socket] = {}
    while True:
        watched: list[Any] = [listener, woken, lifeline]
        ready = select.select(watched, [], [])[0]
        if lifeline in ready and not os.read(lifeline, 1):
            return
        if woken in ready:
            woken.recv(4096)
            _reap(callers)
        if listener in ready:
            connection, _ = listener.accept()
            line = connection.makefile("rb").readline()
            pid = os.fork() if line else None
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for other in (listener, woken, waker, *callers.values()):
                    other.close()
                _child(connection, json.loads(line))
            if pid is None:
                connection.close()
            else:
                callers[pid] = connection


def _child(connection: socket.socket, request: dict[str, object]) -> None:
    environment, folder = request.pop("environment"), request.pop("folder")
    assert isinstance(environment, dict)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(str(folder))
    die_with(connection.fileno())
    execute(request)


def _reap(callers: dict[int, socket.socket]) -> None:
    """Tell callers how their ended children ended."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            code = os.waitstatus_to_exitcode(status)
            with callers.pop(pid) as connection, contextlib.suppress(OSError):
                connection.sendall((f"killed by signal {-code}" if code < 0 else f"exit code {code}").encode())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(sys.argv[1], sys.stdin.fileno())
