"""A silo's work under supervision: whatever happens to it, the pipeline's task ends well and says how it went.

    silo_home(federation, silo)      the silo's private folder for one federation
    supervise(box, ...)              run a silo's step in a child; its failure is a value, never an exception

A status is ``<silo> ok``, ``<silo> failed: <reason>``, ``<silo> refused: <reason>`` or ``<silo> late``, in the characters that a pipeline
parameter may hold. Reasons are from a fixed vocabulary; the full message stays in the silo's own log.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from silotune.components import child
from silotune.components.errors import RefusedError, SilotuneError
from silotune.components.federation import Federation, Silo
from silotune.components.progress import tell
from silotune.components.rounds import Report, Rounds, Status, Turn


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


def supervise(box: str, federation_file: str, silo_id: str, *arguments: str, turn: Turn | None = None) -> str:
    """Run a silo's step in a child and return its status.

    Args:
        box: ``preprocess``, ``train`` or ``evaluate``.
        turn: the attempt to report a failure to, where a round is open.
    """
    child.die_with_run()
    federation = Federation.load(federation_file)
    home = silo_home(federation, federation.silo(silo_id))
    tell(box, "started", silo_id, round=turn.round if turn else 0)
    began = time.monotonic()
    detail = ""
    try:
        status = child.call(box, federation_file, silo_id, *arguments, log=home / "logs" / f"{box}.log")
    except SilotuneError as error:
        kind: Status = "refused" if isinstance(error, RefusedError) else "failed"
        status, detail = status_text(silo_id, kind, error.reason), str(error)
        if turn and not turn.done:
            detail += _report_failure(federation, turn, silo_id, kind, error.reason)
    tell(box, "ended", silo_id, status=status, detail=detail, seconds=round(time.monotonic() - began, 2))
    return status


def _report_failure(federation: Federation, turn: Turn, silo: str, status: Status, reason: str) -> str:
    """Write the report; returns what to add to the message where that fails, too: the status still reaches the aggregator by the pipeline."""
    try:
        Rounds.of(federation).write_report(Report(round=turn.round, attempt=turn.attempt, silo=silo, status=status, reason=reason))
    except SilotuneError as error:
        return f" (and the report could not be written: {error})"
    return ""
