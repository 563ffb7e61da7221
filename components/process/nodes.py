"""Nodes: on how many machines one silo's training runs, with how many processes each, and how the machines hear of each other.

The environment says it in torchrun's words, whoever sets them: a Job, Kubeflow Trainer, or a person.

    PET_NNODES           machines; default 1
    PET_NPROC_PER_NODE   processes of each machine, at most one per GPU; default 1; auto or gpu: one per GPU, or one where there is none
    PET_NODE_RANK        which machine this is, from 0; default JOB_COMPLETION_INDEX, else 0
    PET_MASTER_ADDR      where machine 0 is reached; of no meaning on one machine
    PET_MASTER_PORT      default 29500; one machine takes any free port of its loopback
    PET_RDZV_CONF        timeout=SECONDS that a machine waits for the others to come; default 600

Machine 0 keeps a small table (torch's TCPStore) for as long as its step lives; texts only, never a pickle:

    topic       of which training, in which layout; whoever comes checks that it is of the same
    here/<k>    machine k has come
    order       what to train; see `train.order`
    over        there is nothing to train (any more), and why
    ended/<k>   the part of machine k has failed, and why
    left/<k>    machine k has heard how it ended
    alive/<k>   a number that machine k changes every few seconds

Whoever can reach that port, and the ones that NCCL or Gloo choose, can take part in the training: only the silo's own machines may.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from silotune.components.errors import FederationError, SilotuneError
from silotune.components.process import child
from silotune.components.process.progress import beat

PORT = 29500
LIMIT = 600.0  # seconds to come
TRY = 2.0  # seconds of one attempt to reach machine 0
LOOK = 0.1  # seconds between looks at the table
SIGN = 2.0  # seconds between a machine's signs of life
SILENCE = 300.0  # seconds without one, after which it is taken for lost: digesting a base model, it gives none
HEARD = 5.0  # seconds that machine 0 stays for the others to hear why it ends


class NodeLost(SilotuneError):
    """A machine of the training did not come, or has gone without a word."""

    REASON = "another node was lost"

    def __init__(self, rank: int, what: str, cure: str) -> None:
        super().__init__(f"node {rank} of this training {what}; {cure}", self.REASON)


@dataclass(frozen=True)
class Layout:
    """How many processes train one silo, and which machine this is."""

    nodes: int = 1
    per_node: int = 1  # 0: one per GPU
    node: int = 0
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    limit: float = LIMIT  # seconds

    @property
    def size(self) -> int:
        return self.nodes * self.per_node

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Layout:
        """What the environment says. Raises FederationError where it makes no sense."""
        nodes = _number(environment, "PET_NNODES", 1, 1)
        kind = environment.get("PET_NPROC_PER_NODE", "").strip()
        per_node = 0 if kind in ("auto", "gpu") else _number(environment, "PET_NPROC_PER_NODE", 1, 1)
        if nodes == 1:
            return cls(per_node=per_node, limit=_limit(environment))
        rank = "PET_NODE_RANK" if environment.get("PET_NODE_RANK") else "JOB_COMPLETION_INDEX"
        node, host = _number(environment, rank, 0, 0), environment.get("PET_MASTER_ADDR", "")
        if node >= nodes:
            raise FederationError(f"{rank}: must be below PET_NNODES {nodes}, got {node}; number the nodes from 0")
        if not host:
            raise FederationError(f"PET_MASTER_ADDR: is required with PET_NNODES {nodes}; give the address of node 0")
        return cls(nodes, per_node, node, host, _number(environment, "PET_MASTER_PORT", PORT, 1), _limit(environment))

    def settled(self) -> Layout:
        """With the number of processes that this machine's GPUs allow. Raises FederationError where there are fewer GPUs than processes."""
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        per_node = self.per_node or max(1, gpus)
        if 0 < gpus < per_node:
            raise FederationError(
                f"PET_NPROC_PER_NODE: must be at most the number of GPUs, got {per_node}, and node {self.node} sees {gpus}; "
                "ask for as many GPUs per node as processes, or lower it"
            )
        return Layout(self.nodes, per_node, self.node, self.host, self.port, self.limit)


def _number(environment: Mapping[str, str], name: str, default: int, least: int) -> int:
    text = environment.get(name, "").strip()
    if text and (not text.isascii() or not text.isdecimal() or int(text) < least):
        raise FederationError(f"{name}: must be a whole number from {least} on, got {text!r}; set it as torchrun would, or leave it out")
    return int(text) if text else default


def _limit(environment: Mapping[str, str]) -> float:
    for part in environment.get("PET_RDZV_CONF", "").split(","):
        name, _, value = part.strip().partition("=")
        if name == "timeout":
            return float(_number({"PET_RDZV_CONF timeout": value}, "PET_RDZV_CONF timeout", int(LIMIT), 1))
    return LIMIT


def raised(told: dict[str, Any]) -> SilotuneError:
    """The error that another process told of, to be raised here."""
    return child.ERRORS.get(told["exit_code"], SilotuneError)(told["message"], told["reason"])


class Table:
    """The table of one training, on machine 0 itself or on one that has come to it."""

    def __init__(self, layout: Layout, store: Any) -> None:
        self.layout, self._store = layout, store
        self._seen = {k: (-1, time.monotonic()) for k in range(1, layout.nodes)}  # last sign of life, and when it changed
        self._signs, self._signed = 0, float("-inf")

    @property
    def port(self) -> int:
        return int(self._store.port)

    @classmethod
    def kept(cls, layout: Layout, topic: dict[str, Any]) -> Table:
        """On machine 0. Raises FederationError where the port is taken."""
        import torch.distributed as dist

        try:
            door = socket.create_server(("127.0.0.1" if layout.nodes == 1 else "", layout.port))  # torch would always listen to the network
            port, limit = door.getsockname()[1], timedelta(seconds=TRY)
            store = dist.TCPStore("127.0.0.1", port, None, True, limit, wait_for_workers=False, master_listen_fd=door.detach())
        except (OSError, RuntimeError) as error:
            raise FederationError(f"PET_MASTER_PORT: must be free on node 0, got {layout.port}: {error}; set another port") from error
        table = cls(layout, store)
        table.say("topic", topic)
        return table

    @classmethod
    def reached(cls, layout: Layout, topic: dict[str, Any], over: Callable[[], bool]) -> Table | None:
        """From another machine: waits, with heartbeats, until machine 0 keeps its table; None where ``over`` says that it will not any more.

        Raises:
            NodeLost: it does not within the layout's limit.
            FederationError: its training is another, or laid out otherwise.
        """
        import torch.distributed as dist

        end = time.monotonic() + layout.limit
        while True:
            beat("waiting", holder=False)
            try:
                socket.create_connection((layout.host, layout.port), TRY).close()  # torch says a page about every failure
                store = dist.TCPStore(layout.host, layout.port, None, False, timedelta(seconds=TRY), wait_for_workers=False)
                table = cls(layout, store)
                found = json.loads(store.get("topic"))
                break
            except (OSError, RuntimeError):  # it is not up yet, its name does not resolve yet, or it has just ended
                pass
            if over():
                return None
            if time.monotonic() >= end:
                where = f"cannot be reached at {layout.host}:{layout.port} for {layout.limit:g} s"
                raise NodeLost(0, where, "see its log, and whether this machine may connect to it")
            time.sleep(TRY / 4)  # a refusal comes at once
        if odd := sorted(k for k in topic.keys() | found.keys() if topic.get(k) != found.get(k)):
            told = "; ".join(f"{k} is {found.get(k)!r} there and {topic.get(k)!r} here" for k in odd)
            error = FederationError(
                f"node {layout.node} does not fit node 0: {told}; start both for the same work with the same PET_ settings"
            )
            table.say(f"ended/{layout.node}", {"exit_code": error.exit_code, "message": str(error), "reason": error.reason})
            raise error
        table.say(f"here/{layout.node}", {})
        return table

    def say(self, key: str, what: dict[str, Any]) -> None:
        """Write an entry. Raises NodeLost."""
        try:
            self._store.set(key, json.dumps(what))
        except RuntimeError as error:
            raise self._gone() from error

    def said(self, key: str) -> dict[str, Any] | None:
        """An entry, or None where there is none. Raises NodeLost."""
        try:
            return dict(json.loads(self._store.get(key))) if self._store.check([key]) else None
        except RuntimeError as error:
            raise self._gone() from error

    def gather(self) -> None:
        """On machine 0: wait, with heartbeats, until all have come. Raises NodeLost, or what one of them says it failed of."""
        end = time.monotonic() + self.layout.limit
        missing = set(range(1, self.layout.nodes))
        while missing := {k for k in missing if self.said(f"here/{k}") is None}:
            beat("waiting")
            if failed := self.look():
                raise raised(failed)
            if time.monotonic() >= end:
                raise NodeLost(min(missing), f"did not come for {self.layout.limit:g} s", "see whether it was started, and its log")
            time.sleep(LOOK)
        self._seen = {k: (-1, time.monotonic()) for k in self._seen}

    def look(self) -> dict[str, Any] | None:
        """How another machine says that the training has ended, if it does; and a sign of life from this one.

        Raises:
            NodeLost: one has gone without a word.
        """
        now = time.monotonic()
        if self.layout.node:
            if now - self._signed >= SIGN:
                self._signs, self._signed = self._signs + 1, now
                self.say(f"alive/{self.layout.node}", {"signs": self._signs})
            return self.said("over")
        for k, (last, changed) in self._seen.items():
            if failed := self.said(f"ended/{k}"):
                return failed
            signs = (self.said(f"alive/{k}") or {"signs": -1})["signs"]
            self._seen[k] = (signs, now) if signs != last else (last, changed)
            if signs >= 0 and now - self._seen[k][1] > SILENCE:
                raise NodeLost(k, f"gave no sign of life for {SILENCE:g} s", "see its log")
        return None

    def close(self, over: dict[str, Any]) -> None:
        """On machine 0: say how it ended, and stay until those that have come have heard it, for a few seconds at most."""
        self.say("over", over)
        end = time.monotonic() + HEARD
        there = [k for k in self._seen if self.said(f"here/{k}") is not None]
        while any(self.said(f"left/{k}") is None for k in there) and time.monotonic() < end:
            time.sleep(LOOK)

    def _gone(self) -> NodeLost:
        return NodeLost(0, "has gone without a word", "see its log")
