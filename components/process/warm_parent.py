"""A warm parent: one process per local run that has imported the heavy packages, and forks a child for every step.

Importing torch, transformers, peft and MLflow takes seconds, and a run has dozens of steps. The parent imports them once and *uses* none of
them, so that a fork starts with the state of a fresh import: no thread, no generator, no device. What preprocess needs comes first, and its
children are forked between the other imports. Optional, for one machine only; a step does the same, to the byte, in a fresh interpreter.

    python -m silotune.components.process.warm_parent SOCKET      serves until its standard input closes
    python -m silotune.components.process.warm_parent             a fresh one, for the one request on its standard input; imports nothing

A caller sends a request as a line of JSON. It is answered in lines, and the child is killed when the caller's end closes:

    pid <number>          of the child, which leads a process group
    result <JSON>         from the child itself
    ended <exit code>     as ``subprocess`` counts them; all of the group is gone
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from silotune.components.process.child import die_with, execute, kill_group

PREPROCESS = (
    "silotune.components.preprocess.step",
    "silotune.components.learning.model",
    "silotune.components.learning.tokens",
    "torch",  # as all of transformers does
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
    "transformers.models.llama.configuration_llama",  # a tokenizer is chosen by the model's configuration
    "transformers.models.gpt2.configuration_gpt2",
)
PACKAGES = (
    *PREPROCESS,
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "accelerate",
    "peft",
    "mlflow.tracking",
    "mlflow.store.tracking.sqlalchemy_store",
    *(
        f"silotune.components.{box}.step"
        for box in ("initialize", "train", "share", "mask", "confirm", "unmask", "muster", "combine", "aggregate", "evaluate", "export")
    ),
    *(f"silotune.components.learning.{noun}" for noun in ("batches", "training", "evaluation", "update")),
)
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux


class Brood:
    """The children that this process has forked, each for a caller."""

    def __init__(self) -> None:
        self._callers: dict[int, socket.socket] = {}
        self._left: set[int] = set()  # children whose caller has gone
        self._lifeline, self._held = os.pipe()  # children end when this process does, and with it the held end
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._stop)

    def __len__(self) -> int:
        return len(self._callers)

    @property
    def watched(self) -> list[socket.socket]:
        """What to select on."""
        return [self._woken, *(c for pid, c in self._callers.items() if pid not in self._left)]

    def tend(self, ready: list[Any]) -> None:
        """Tell callers of children that have ended, and kill those whose callers have gone."""
        if self._woken in ready:
            with contextlib.suppress(BlockingIOError):
                self._woken.recv(4096)
            self._reap()
        for pid, connection in self._callers.items():
            if connection in ready and _closed(connection):
                self._left.add(pid)
                kill_group(pid)

    def fork(self, connection: socket.socket, request: dict[str, Any], others: Iterable[socket.socket] = ()) -> None:
        """Fork a child for a caller. ``others``: this process's other sockets, which are none of its business."""
        pid = os.fork()
        if pid == 0:
            try:
                for other in (*others, self._woken, self._waker, *self._callers.values()):
                    other.close()
                self._child(connection, request)
            finally:
                os._exit(1)  # whatever happens, a child never goes on as its parent
        with contextlib.suppress(OSError):  # by now the child may have done it, or have ended
            os.setpgid(pid, pid)
        self._callers[pid] = connection
        with contextlib.suppress(OSError):
            connection.sendall(f"pid {pid}\n".encode())

    def _child(self, connection: socket.socket, request: dict[str, Any]) -> NoReturn:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(PermissionError):
            os.setpgid(0, 0)
        os.close(self._held)
        with contextlib.suppress(OSError, AttributeError):  # Linux only; elsewhere the thread of die_with does, unless code in C is stuck
            ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
        die_with(self._lifeline)
        _no_input()
        execute(request, connection)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                kill_group(pid)  # what it has started and left behind
                self._left.discard(pid)
                with self._callers.pop(pid) as connection, contextlib.suppress(OSError):
                    connection.sendall(f"\nended {os.waitstatus_to_exitcode(status)}\n".encode())

    def end(self) -> None:
        for pid in self._callers:
            kill_group(pid)

    def _stop(self, number: int, _: object) -> None:
        self.end()
        os._exit(128 + number)


def serve(address: str, lifeline: int) -> None:
    """Listen, import, and fork a child for every request until ``lifeline`` closes."""
    brood = Brood()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{address}.part")
    listener.listen(64)
    os.rename(f"{address}.part", address)  # whoever sees it can connect
    listener.setblocking(False)
    ahead = list(PACKAGES)
    waiting: list[tuple[socket.socket, dict[str, Any]]] = []
    while True:
        watched: list[Any] = [listener, lifeline, *brood.watched]
        ready = select.select(watched, [], [], 0 if ahead or waiting else None)[0]
        if lifeline in ready and not os.read(lifeline, 1):
            brood.end()
            return
        brood.tend(ready)
        with contextlib.suppress(BlockingIOError):
            while listener in ready:  # all that have come: the next look may be an import away
                connection, _ = listener.accept()
                if request := _request(connection):
                    waiting.append((connection, request))
        early = not set(PREPROCESS).intersection(ahead)
        due = [w for w in waiting if not ahead or (early and w[1]["box"] == "preprocess")]
        waiting = [w for w in waiting if w not in due]
        for connection, request in due:
            if select.select([connection], [], [], 0)[0]:  # the caller no longer waits
                connection.close()
            else:
                brood.fork(connection, request, (listener, *(c for c, _ in (*waiting, *due) if c is not connection)))
        if ahead:
            with contextlib.suppress(ImportError):  # only ever slower without it
                importlib.import_module(package := ahead.pop(0))
            if not ahead or package == PREPROCESS[-1]:
                gc.collect()
                gc.freeze()  # pages that the collector would touch stay shared


def serve_one(connection: socket.socket) -> None:
    """Fork a child for one request, and stay with it to its end."""
    brood = Brood()
    if request := _request(connection):
        brood.fork(connection, request)
    while brood:
        brood.tend(select.select(brood.watched, [], [])[0])


def _request(connection: socket.socket) -> dict[str, Any]:
    """What the caller asks; empty, and the connection closed, where it has gone."""
    connection.setblocking(True)
    with connection.makefile("rb") as stream:
        line = stream.readline()
    if not line.endswith(b"\n"):
        connection.close()
        return {}
    return dict(json.loads(line))


def _closed(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1)
    except OSError:
        return True


def _no_input() -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller gets it too, and ends the child
    if len(sys.argv) > 1:
        serve(sys.argv[1], sys.stdin.fileno())
    else:
        caller = socket.socket(fileno=os.dup(0))
        _no_input()
        serve_one(caller)
