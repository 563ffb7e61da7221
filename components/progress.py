"""Progress: what a run tells whoever watches it, on the machine where it runs.

Two channels, both optional and never part of the protocol:

    <run folder>/events.jsonl            one line when a box starts and ends; only if SILOTUNE_RUN names a run folder
    <silo storage>/…/heartbeat.json      step and loss of a training, replaced a few times a second; stays in the silo's own storage
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RUN_VARIABLE = "SILOTUNE_RUN"
INTERVAL = 0.25  # seconds between heartbeats


def tell(box: str, what: str, silo: str = "", **more: Any) -> None:
    """Append one event: ``what`` is started, ended or warned."""
    line = json.dumps({"at": time.time(), "box": box, "what": what, "silo": silo, **more})
    if folder := os.environ.get(RUN_VARIABLE):
        with (Path(folder) / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    else:
        shown = [v for k, v in more.items() if not (silo and k == "detail")]  # a silo's full message stays in its own log
        print(" ".join(str(x) for x in (box, silo, what, *shown) if x != ""), flush=True)


def read_events(folder: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Events from a byte offset on, and the offset to go on from; a line still being written is left for the next call."""
    try:
        with (folder / "events.jsonl").open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    whole = data[: data.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], offset + len(whole)


@dataclass(frozen=True)
class Heartbeat:
    """Where a silo's work stands."""

    box: str
    round: int
    step: int
    steps: int
    loss: float
    at: float


class Pulse:
    """Writes heartbeats, at most one every `INTERVAL` seconds."""

    def __init__(self, folder: Path, box: str, round_number: int) -> None:
        self.folder, self.box, self.round = folder, box, round_number
        self._last = 0.0

    def __call__(self, step: int, steps: int, loss: float) -> None:
        now = time.time()
        if now - self._last < INTERVAL and step < steps:
            return
        self._last = now
        scratch = self.folder / f".heartbeat.{os.getpid()}"
        scratch.write_text(json.dumps(asdict(Heartbeat(self.box, self.round, step, steps, loss, now))))
        scratch.replace(self.folder / "heartbeat.json")


def read_heartbeats(folders: dict[str, Path]) -> Iterator[tuple[str, Heartbeat]]:
    """(silo, heartbeat) of every silo that has one."""
    for silo, folder in folders.items():
        try:
            yield silo, Heartbeat(**json.loads((folder / "heartbeat.json").read_text()))
        except (OSError, ValueError, TypeError):
            continue
