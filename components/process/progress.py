"""Progress: what a run tells whoever watches it, on the machine where it runs.

Three channels, all optional and never part of the protocol, so that trouble in writing them is no trouble:

    <run folder>/events.jsonl            one line when a box starts and ends; only if SILOTUNE_RUN names a run folder
    <silo storage>/…/heartbeat.json      step and loss of a silo's work, replaced a few times a second; stays in the silo's own storage
    the file SILOTUNE_HEARTBEAT names    the same heartbeats, for the one that supervises this process and kills what no longer beats
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RUN_VARIABLE = "SILOTUNE_RUN"
HEARTBEAT_VARIABLE = "SILOTUNE_HEARTBEAT"
INTERVAL = 0.25  # seconds between heartbeats


def tell(box: str, what: str, silo: str = "", **more: Any) -> None:
    """Append one event: ``what`` is started, ended or warned."""
    line = json.dumps({"at": time.time(), "box": box, "what": what, "silo": silo, **more})
    if folder := os.environ.get(RUN_VARIABLE):
        with contextlib.suppress(OSError), (Path(folder) / "events.jsonl").open("a", encoding="utf-8") as file:
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
    steps: int  # 0 before the first step
    loss: float | None  # none of a private training
    at: float  # Unix time in seconds
    phase: str = ""  # what is done outside of steps: loading, evaluating, sending
    beats: int = 0  # signs of life so far, written or not


class Pulse:
    """Writes heartbeats, at most one every `INTERVAL` seconds: called after a step, or ``beat`` in any other long work."""

    def __init__(self, folder: Path | None, box: str, round_number: int) -> None:
        global _pulse
        self.folder, self.box, self.round = folder, box, round_number
        self._at: tuple[int, int, float | None] = (0, 0, 0.0)  # step, steps, loss
        self._beats = 0
        self._last = float("-inf")
        _pulse = self

    def __call__(self, step: int, steps: int, loss: float | None) -> None:
        """After a step; the last one is always written."""
        self._at = (step, steps, loss)
        self._beat("", always=step >= steps)

    def beat(self, phase: str, *, holder: bool = True) -> None:
        """A sign of life outside of steps; keeps the step that was reached. Where this process is not the ``holder`` of the silo's folder,
        the heartbeat there is another's and left alone."""
        self._beat(phase, holder=holder)

    def _beat(self, phase: str, always: bool = False, holder: bool = True) -> None:
        self._beats += 1
        now = time.monotonic()
        if now - self._last < INTERVAL and not always:
            return
        self._last = now
        text = json.dumps(asdict(Heartbeat(self.box, self.round, *self._at, time.time(), phase, self._beats)))
        watched = os.environ.get(HEARTBEAT_VARIABLE)
        own = [self.folder / "heartbeat.json"] if self.folder and holder else []
        for path in {*own, *([Path(watched)] if watched else [])}:
            _replace(path, text)


_pulse: Pulse | None = None  # the newest of this process


def beat(phase: str, *, holder: bool = True) -> None:
    """A sign of life from a long loop that was handed no `Pulse`; costs nothing where none is due. Phases are words of the code, no data."""
    (_pulse or Pulse(None, "", 0)).beat(phase, holder=holder)


@contextlib.contextmanager
def beating(phase: str) -> Iterator[None]:
    """Signs of life through work that cannot give them itself and has time limits of its own, such as a transfer."""
    done = threading.Event()

    def keep() -> None:
        while not done.wait(1.0):
            beat(phase)

    beat(phase)
    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all; on a full disk at least its time changes, which is a sign of life too."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text)
        scratch.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
            os.utime(path)


def read_heartbeats(folders: dict[str, Path]) -> Iterator[tuple[str, Heartbeat]]:
    """(silo, heartbeat) of every silo that has one and has begun its steps: before that there is no share and no loss to show."""
    for silo, folder in folders.items():
        if (found := read_heartbeat(folder / "heartbeat.json")) and found.steps:
            yield silo, found


def read_heartbeat(path: Path) -> Heartbeat | None:
    """None where there is none, or it cannot be read."""
    try:
        return Heartbeat(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
