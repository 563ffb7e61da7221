"""Workers: the processes of one machine that train one silo together with those of its other machines, started and watched by the step.

The step itself loads no model and takes no part in the arithmetic, so that it never hangs in it: it can always say why the training ended. Each
worker is a fresh interpreter in the step's process group, which the silo's supervisor kills as a whole, sees one GPU, or none, and
ends with the step. Rank 0 of all writes what the training added to a file in the silo's folder; the first of each machine gives heartbeats.

    python -m silotune.components.train.workers     a worker, for the one request on its standard input

A worker answers in lines:

    score <JSON>     rank 0: of the incoming global on valid, before the first step
    result <JSON>    it is done; what it has seen
    error <JSON>     it has failed: exit code, message and reason
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from silotune.components.errors import SilotuneError
from silotune.components.learning.ranks import RankLost, joined
from silotune.components.learning.tensor_file import open_tensor_file, to_bytes, write_tensor_file
from silotune.components.process.child import die_with
from silotune.components.process.ending import NO_MEMORY, in_words, oom_kills, told
from silotune.components.process.nodes import Layout, NodeLost, Table, raised
from silotune.components.process.progress import HEARTBEAT_VARIABLE, Pulse
from silotune.components.train.order import OnScore, Order, learn

if TYPE_CHECKING:
    import numpy as np

    from silotune.components.learning.evaluation import Score
    from silotune.components.learning.training import Trained

ADDED = ".added.safetensors"  # in the silo's folder: what rank 0's training added
LOOK = 0.2  # seconds between looks at the other machines
GRACE = 5.0  # seconds to learn the cause where a process only says that it has lost another
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
Told = dict[str, Any]


class Worker:
    """One process, as the step sees it."""

    def __init__(self, order: Order, layout: Layout, local: int, host: str, port: int) -> None:
        self.rank = layout.node * layout.per_node + local
        self.result: Told | None = None
        self.failure: Told | None = None
        self.connection, theirs = socket.socketpair()
        self._rest, self._kills = b"", oom_kills()
        request = {
            "order": json.loads(order.model_dump_json()), "rank": self.rank, "size": layout.size, "host": host, "port": port, "first": local == 0,
        }  # fmt: skip
        with theirs:
            command = [sys.executable, "-m", "silotune.components.train.workers"]
            self.process = subprocess.Popen(command, stdin=theirs.fileno(), env=_environment(layout, local))
        self.connection.sendall(json.dumps(request).encode() + b"\n")

    def listen(self) -> Iterator[tuple[str, Told]]:
        """What it says now that there is something to read; its end is a result or a failure."""
        try:
            chunk = self.connection.recv(65536)
        except ConnectionResetError:
            chunk = b""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            word, _, value = line.partition(b" ")
            content = json.loads(value)
            if word == b"result":
                self.result = content
            elif word == b"error":
                self.failure = content
            else:
                yield word.decode(), content
        if not chunk and self.result is None and self.failure is None:
            self.failure = self._died()

    def _died(self) -> Told:
        code = self.process.wait()
        if code == -signal.SIGKILL and oom_kills() > self._kills:
            return {"exit_code": 1, "message": f"train: {NO_MEMORY}", "reason": "out of memory"}
        how = in_words(code)
        return {"exit_code": 1, "message": f"train: process {self.rank} ended without a result ({how}); see the log", "reason": how}

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


def _environment(layout: Layout, local: int) -> dict[str, str]:
    """Of a worker: one GPU, its share of the threads, and nothing that libraries would take for a launcher's word."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    threads = int(kept.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    kept["OMP_NUM_THREADS"] = str(max(1, threads // layout.per_node))
    seen = [x for x in kept.get("CUDA_VISIBLE_DEVICES", "").split(",") if x.strip()]
    kept["CUDA_VISIBLE_DEVICES"] = seen[local] if local < len(seen) else str(local)
    if local:
        kept.pop(HEARTBEAT_VARIABLE, None)
    if layout.nodes == 1:  # nothing of it is for the network
        kept = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} | kept
    return kept


def together(order: Order, layout: Layout, table: Table, on_score: OnScore) -> tuple[Trained, dict[str, np.ndarray]]:
    """Have this machine's workers do their part of an order; what the training has seen, and, on machine 0, what it added.

    Args:
        on_score: called on machine 0; what it raises ends the training everywhere.

    Raises:
        SilotuneError: what a worker, or another machine, failed of; all workers of this machine have ended.
    """
    from silotune.components.learning.evaluation import Score
    from silotune.components.learning.training import Trained

    host, port = (layout.host, layout.port) if layout.nodes > 1 else ("127.0.0.1", table.port)
    workers: list[Worker] = []
    try:
        for local in range(layout.per_node):
            workers.append(Worker(order, layout, local, host, port))
        failures: list[Told] = []
        running, end = list(workers), float("inf")
        while running or any(w.failure for w in workers):
            ready = select.select([w.connection for w in running], [], [], LOOK)[0]
            for worker in (w for w in running if w.connection in ready):
                for _, content in worker.listen():
                    on_score(Score(**content))
            failures += [w.failure for w in running if w.failure]
            running = [w for w in running if w.result is None and w.failure is None]
            try:
                failures += [other] if (running or failures) and (other := table.look()) and other["exit_code"] else []
            except NodeLost as error:
                failures.append(told(error))
            # Of the many that fail of one's failure, only that one knows why, on whichever machine it is.
            if failures and end == float("inf"):
                end = time.monotonic() + GRACE
            if failures and (time.monotonic() >= end or not all(_of_another(f) for f in failures)):
                break
        if not all(w.result for w in workers):
            raise raised(min(failures, key=_of_another))
        result = workers[0].result or {}
        loss = result["loss"]
        trained = Trained(**{**result, "loss": None if loss is None else float.fromhex(loss)})
        if layout.node:
            return trained, {}
        arrays = open_tensor_file(order.home / ADDED).read_all()
        kinds = {kind: {n.removeprefix(kind): a for n, a in arrays.items() if n.startswith(kind)} for kind in ("added/", "gradient/")}
        return replace(trained, gradient=kinds["gradient/"]), kinds["added/"]
    finally:
        if not layout.node:
            (order.home / ADDED).unlink(missing_ok=True)
        for worker in workers:
            worker.end()


def _of_another(failure: Told) -> bool:
    """Whether it only says that another process or machine has gone."""
    return failure["reason"] in (RankLost.REASON, NodeLost.REASON)


def main() -> None:
    """A worker."""
    connection = socket.socket(fileno=os.dup(0))
    with connection.makefile("rb", buffering=0) as stream:
        request = json.loads(stream.readline())
    with contextlib.suppress(OSError, AttributeError):  # Linux only; elsewhere the thread of die_with does
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
    die_with(connection.fileno())

    def say(word: str, content: Told) -> None:
        connection.sendall(f"{word} {json.dumps(content)}\n".encode())

    code = 0
    try:
        say("result", _work(Order.model_validate(request["order"]), request, say))
    except Exception as error:  # the worker's edge, as the step's: what is not foreseen becomes exit code 1, and its trace stays in the log
        code = 1
        if isinstance(error, SilotuneError):
            print(f"error: process {request['rank']}: {error}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        say("error", told(error))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no teardown of torch's threads: they have nothing left to do


def _work(order: Order, request: Told, say: Any) -> Told:
    pulse = Pulse(order.home if request["rank"] == 0 else None, "train", order.round) if request["first"] else None

    def on_score(score: Score) -> None:
        if request["rank"] == 0:
            say("score", asdict(score))

    with joined(request["rank"], request["size"], request["host"], request["port"]) as ranks:
        trained, added = learn(order, pulse, on_score, ranks)
        if ranks.rank == 0:
            kinds = {"added": added, "gradient": trained.gradient}
            arrays = {f"{kind}/{name}": array for kind, found in kinds.items() for name, array in found.items()}
            tensors = ((name, to_bytes(arrays[name], "F32")) for name in sorted(arrays))
            write_tensor_file(order.home / ADDED, {n: a.shape for n, a in arrays.items()}, "F32", tensors, {})
        ranks.leave()
    return {
        "steps": trained.steps, "examples": trained.examples, "tokens": trained.tokens, "cursor": trained.cursor,
        "loss": None if trained.loss is None else trained.loss.hex(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
