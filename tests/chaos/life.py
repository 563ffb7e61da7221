"""A life: the pipeline's boxes one after the other in this process, with the protocol of the pipeline between them.

It runs each box's own ``run``, which a pipeline's task does; only the child process is left out, so that one fork is one life. What a box
raises is told as `child` tells it. At the end stands a result on the board: exit code, every message, and the trace of what nobody foresaw.
"""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import traps
from board import Board
from faults import FaultyStore
from invariants import Broken, require_exact_sum
from scenario import SILOS, STAGES, Death, Scenario, Trap

from silotune.components import round_records
from silotune.components.learning import training
from silotune.components.process import child, ending
from silotune.components.protocol import Turn
from silotune.components.silo_job import status_text
from silotune.components.store.object_store import ObjectStore, open_store

UNFORESEEN = "unexpected error"


@dataclass
class Gate:
    """Where a life waits until its tracer is there."""

    ready: tuple[int, int]
    go: tuple[int, int]

    @classmethod
    def new(cls) -> Gate:
        return cls(os.pipe(), os.pipe())

    def wait(self) -> None:
        os.write(self.ready[1], b"x")
        os.read(self.go[0], 1)

    def close(self) -> None:
        for end in (*self.ready, *self.go):
            os.close(end)


class CountedStore:
    """A store that counts the bytes put into it; the rest of it is the store's own."""

    def __init__(self, store: ObjectStore, board: Board) -> None:
        self._store, self._board = store, board

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __str__(self) -> str:
        return str(self._store)

    def create(self, key: str, data: bytes) -> bool:
        self._board["put"] += len(data)
        return self._store.create(key, data)

    def put_file(self, key: str, path: Path) -> None:
        if self._store.size(key) != path.stat().st_size:
            self._board["put"] += path.stat().st_size
        self._store.put_file(key, path)


@dataclass
class Life:
    """One process's way through the boxes."""

    file: Path
    board: Board
    trap: Trap | None = None
    gate: Gate | None = None
    absent: Mapping[int, Collection[str]] | None = None  # by round: silos that do not work; for references
    silos: tuple[str, ...] = SILOS
    secure: bool = False
    dead: tuple[Death, ...] = ()

    def __post_init__(self) -> None:
        self._starts: dict[str, int] = {}
        self._messages: list[str] = []
        self._traces: list[str] = []

    def run(self) -> None:
        """To the end, or to the first box of the coordinator that fails."""
        child.die_with_run = lambda: None  # type: ignore[assignment]  # there is no run folder to hold on to
        child.call = self._call  # type: ignore[assignment]
        code = 0
        try:
            self._boxes()
        except SystemExit as error:
            code = int(error.code or 0)
        except Broken as error:
            code, self._messages = 1, [str(error)]
        self.board.result = {"code": code, "messages": self._messages, "traces": self._traces}

    def _boxes(self) -> None:
        step = {box: importlib.import_module(f"silotune.components.{box}.step") for box in ("preprocess", "initialize", "train")}
        step |= {box: importlib.import_module(f"silotune.components.{box}.step") for box in ("aggregate", "evaluate", "export")}
        file = str(self.file)
        turn = step["initialize"].run(file, [step["preprocess"].run(file, silo) for silo in self.silos])
        while not (parsed := Turn.parse(turn)).done:
            statuses = [self._of_silo("train", s, turn, parsed.round) for s in self.silos]
            for stage in STAGES if self.secure else ():
                going = importlib.import_module("silotune.components.muster.step").run(file, turn, stage, statuses)
                statuses += [self._of_silo(stage, s, going, parsed.round) for s in self.silos]
            turn = step["aggregate"].run(file, turn, statuses)
            if self.secure and self.absent is not None:
                require_exact_sum(self.file, parsed.round)
        step["export"].run(file, turn, [step["evaluate"].run(file, silo, turn) for silo in self.silos])

    def _of_silo(self, box: str, silo: str, turn: str, number: int) -> str:
        """A silo's status; one that is dead by now has none of its own."""
        dead = any((d.silo, d.round) == (silo, number) and d.misses(box) for d in self.dead)
        if dead or silo in (self.absent or {}).get(number, ()):
            return status_text(silo, "failed", "away")
        return str(importlib.import_module(f"silotune.components.{box}.step").run(str(self.file), silo, turn))

    def _call(self, box: str, *arguments: str, **_: Any) -> str:
        """In place of `child.call`: in this process."""
        self.board.box = box
        self._starts[box] = self._starts.get(box, 0) + 1
        if self.trap and (box, self._starts[box]) == (self.trap.box, self.trap.occurrence):
            if self.gate:
                self.gate.wait()
            else:
                traps.hook(self.trap, self.board)
        try:
            return str(importlib.import_module(f"silotune.components.{box}.step").work(*arguments))
        except Exception as error:
            told = ending.told(error)
            self._messages.append(f"{box} {' '.join(arguments[1:2])}: {told['message']}")
            if told["reason"] == UNFORESEEN:
                self._traces.append("".join(traceback.format_exception(error)))
            raise child.ERRORS[told["exit_code"]](told["message"], told["reason"]) from None


def prepare(scenario: Scenario, board: Board, faults: Mapping[str, float], number: tuple[int, int]) -> None:
    """In a life: count what is trained and put, and let the store go wrong."""
    rng = scenario.rng("store", number)

    def opened(location: str, **options: Any) -> Any:
        store: Any = CountedStore(open_store(location, **options), board)
        if not faults:
            return store
        faulty: Any = FaultyStore(store, rng, faults)
        faulty.injected = board
        return faulty

    def counted(*arguments: Any, inner: Any = training.train, **options: Any) -> Any:
        board["trainings"] += 1
        *rest, pulse = arguments

        def on_step(step: int, steps: int, loss: float) -> None:
            board["steps"] += 1
            pulse(step, steps, loss)

        return inner(*rest, on_step, **options)

    round_records.open_store = opened
    training.train = counted
