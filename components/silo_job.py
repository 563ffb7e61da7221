"""A silo's work under supervision: whatever happens to it, the pipeline's task ends well and says how it went.

    silo_home(federation, silo)      the silo's private folder for one federation
    supervise(box, ...)              run a silo's step in a child; its failure is a value, never an exception
    one_at_a_time(home)              in the child: the silo's folder has one writer
    time_left()                      in the child: seconds until it is killed, so that it can stop softly before

A status is ``<silo> ok``, ``<silo> failed: <reason>``, ``<silo> refused: <reason>`` or ``<silo> late``, in the characters that a pipeline
parameter may hold. Reasons are from a fixed vocabulary; the full message stays in the silo's own log.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from silotune.components.errors import RefusedError, SilotuneError
from silotune.components.federation import Federation, Silo
from silotune.components.process import child, ending
from silotune.components.process.nodes import Layout
from silotune.components.process.progress import Pulse, beat, tell
from silotune.components.protocol import Report, Status, Turn
from silotune.components.rounds import Rounds

PAST_DEADLINE = "past the deadline"
LOOK = 0.2  # seconds between tries to have a silo's folder


def silo_home(federation: Federation, silo: Silo) -> Path:
    """The silo's own folder for this federation; made if absent, readable by its owner only."""
    home = Path(silo.storage) / federation.name
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    return home


def status_text(silo: str, status: Status, reason: str = "") -> str:
    text = f"{silo} {status}" + (f": {reason}" if reason else "")
    return re.sub(r"[^A-Za-z0-9 :._-]", "_", text)[:300]


def parse_status(text: str) -> tuple[str, Status, str]:
    """(silo, status, reason or what an ok says besides).

    Raises:
        RefusedError: it is no status.
    """
    match = re.fullmatch(r"(\S+) (ok|failed|refused|late)(?:: (.*))?", text)
    if not match:
        raise RefusedError(f"a silo's status must read '<silo> ok|failed|refused|late[: reason]', got {text!r}")
    return match[1], match[2], match[3] or ""  # type: ignore[return-value]


def first_troubles(statuses: Iterable[str]) -> dict[str, str]:
    """By silo, the first of its statuses that is not ok, as ``failed: <reason>``: what comes after follows from it."""
    found: dict[str, str] = {}
    for silo, status, reason in map(parse_status, statuses):
        if status != "ok":
            found.setdefault(silo, f"{status}: {reason}" if reason else status)
    return found


def supervise(
    box: str, federation_file: str, silo_id: str, *arguments: str, turn: Turn | None = None, until: float | None = None
) -> str:  # fmt: skip
    """Run a silo's step in a child and return its status. The child is killed where it passes ``rounds.deadline`` or is silent for
    ``rounds.stall``.

    Args:
        box: ``preprocess``, ``train``, ``share``, ``mask``, ``confirm``, ``unmask`` or ``evaluate``.
        turn: the attempt to report a failure to, where a round is open.
        until: Unix time in seconds at which the time for this work is over, where some of it may have gone by in waiting for a machine. It
            shortens the deadline and never lengthens it, so that a clock that is behind gives nobody more time; once it is past, the work
            is late before it begins.

    Where several machines train one silo, only the first one reports, and does the other boxes; the others have a log of their own.

    Raises:
        FederationError: the federation file cannot be read, or does not name the silo; the machine's place among several makes no sense.
    """
    child.die_with_run()
    federation = Federation.load(federation_file)
    silo = federation.silo(silo_id)
    node = Layout.of().node
    if node and box != "train":
        return status_text(silo_id, "ok", "nothing to do")
    tell(box, "started", silo_id, round=turn.round if turn else 0)
    began = time.monotonic()
    detail = ""
    try:
        log = silo_home(federation, silo) / "logs" / (f"{box}-node{node}.log" if node else f"{box}.log")
        deadline, stall = _time_for(federation, until), federation.stall_seconds
        status = child.call(box, federation_file, silo_id, *arguments, log=log, deadline=deadline, stall=stall)
    except (SilotuneError, OSError) as error:
        kind, reason, detail = _failure(error)
        status = status_text(silo_id, kind, "" if kind == "late" else reason)
        if box == "preprocess":
            _note_unready(federation, silo, reason)
        if turn and not turn.done and not node:
            detail += _report_failure(federation, turn, silo_id, kind, reason)
    tell(box, "ended", silo_id, status=status, detail=detail, seconds=round(time.monotonic() - began, 2))
    return status


def _time_for(federation: Federation, until: float | None) -> float | None:
    """Seconds that a box has from now on. Raises ChildLate where that is none."""
    deadline = federation.deadline_seconds
    if until is None:
        return deadline
    left = until - time.time()
    if left <= 0:
        raise child.ChildLate(f"its time was over {-left:.0f} s before it could start; raise rounds.deadline, or have nodes free", "late")
    return left if deadline is None else min(deadline, left)


def _failure(error: SilotuneError | OSError) -> tuple[Status, str, str]:
    """(status, reason, full message) of what ended a silo's work."""
    if isinstance(error, child.ChildLate):
        return "late", PAST_DEADLINE, str(error)
    if isinstance(error, SilotuneError):
        return ("refused" if isinstance(error, RefusedError) else "failed"), error.reason, str(error)
    told = ending.told(error)
    return "failed", told["reason"], told["message"]


UNREADY = "unready.txt"  # in a silo's folder: why its records could not be made ready, for the later boxes of the run


def _note_unready(federation: Federation, silo: Silo, reason: str) -> None:
    with contextlib.suppress(OSError):
        (silo_home(federation, silo) / UNREADY).write_text(reason)


def _report_failure(federation: Federation, turn: Turn, silo: str, status: Status, reason: str) -> str:
    """Write the report; returns what to add to the message where that fails, too: the status still reaches the aggregator by the pipeline."""
    try:
        Rounds.of(federation).write_report(Report(round=turn.round, attempt=turn.attempt, silo=silo, status=status, reason=reason[:200]))
    except (SilotuneError, OSError) as error:
        return f" (and the report could not be written: {error})"
    return ""


def time_left() -> float | None:
    """In a step: seconds until its deadline, at which it is killed; None where it has none. Never negative.

    The deadline is handed over as Unix time by the clock of this machine, on which caller and child both are.
    """
    deadline = os.environ.get(child.DEADLINE_VARIABLE)
    return max(0.0, float(deadline) - time.time()) if deadline else None


@contextlib.contextmanager
def one_at_a_time(home: Path, pulse: Pulse | None = None) -> Iterator[None]:
    """Hold a silo's folder for the work of one box; a second run's box of the same silo waits, with heartbeats, until it is free.

    The kernel frees it when this process ends, however it ends. Not to be entered twice by one process: it would wait for itself.
    """
    with (home / "silo.lock").open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                (pulse.beat if pulse else beat)("waiting", holder=False)
                time.sleep(LOOK)
        yield


EXIT_CODES: dict[Status, int] = {"ok": 0, "failed": 1, "refused": 4, "late": 6}
EXIT_CODES_BY_REASON = {"data or settings are wrong": 2, "store unreachable or full": 5, "disk full": 5}
UNTIL = re.compile(r"until:(\d{1,12})")  # last of a Job's words, where its launcher says when its time is over
TERMINATION_LOG = Path("/dev/termination-log")  # in a pod: what its status shows to those who may read pods


def main(box: str, federation_file: str, silo_id: str, *arguments: str) -> int:
    """As a Job: the status is all that stands on stdout, and the exit code says its kind, for a launcher that sees the Job's end only.

    Args:
        arguments: the box's own, and after them, if it has one, ``until:<Unix time in seconds>``; see `supervise`.
    """
    import signal
    import sys

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as a container's first process it would ignore the signal
    try:
        with contextlib.redirect_stdout(sys.stderr):
            *words, last = arguments or ("",)
            until = UNTIL.fullmatch(last)
            arguments = tuple(words) if until else arguments
            turn = Turn.parse(arguments[0]) if box == "train" and arguments else None
            status = supervise(box, federation_file, silo_id, *arguments, turn=turn, until=float(until[1]) if until else None)
    except SilotuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    with contextlib.suppress(OSError):
        if TERMINATION_LOG.is_file():
            TERMINATION_LOG.write_text(status)
    print(status)
    _, kind, reason = parse_status(status)
    return EXIT_CODES_BY_REASON.get(reason, EXIT_CODES[kind])


if __name__ == "__main__":
    import sys

    sys.exit(main(*sys.argv[1:]))
