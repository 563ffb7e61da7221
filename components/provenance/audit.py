"""The audit log: who contributed what to which model, and what was erased since. Append-only, each entry chained to the one before.

    <federation>/audit/000007.json     the seventh entry; names the digest of the sixth

An entry follows from the commit, export or erasure that it tells of, so that two that append at once write the same or come one after the
other, and a crash between a commit and its entry is made good by the next `sync`. The coordinator signs; `chain` verifies.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from silotune.components.errors import RefusedError
from silotune.components.protocol import Commit, Exported, Record
from silotune.components.record_keys import highest
from silotune.components.rounds import Rounds
from silotune.components.store.object_store import ObjectMissing


class Entry(Record):
    """One line of the log."""

    number: int = Field(ge=1)
    previous: str | None = Field(description="Digest of the entry before.")
    kind: Literal["commit", "export", "erasure"]
    round: int = Field(ge=0, description="The round it is about; of an erasure, the one that was open or next then.")
    commit: str | None = Field(None, description="Digest of the commit, or of the one exported.")
    outgoing: str | None = Field(None, description="Digest of the global.")
    contributions: dict[str, str] = Field(default_factory=dict, description="Silo -> digest of its update file.")
    location: str | None = Field(None, description="Where an export was put.")
    erased: dict[str, list[str]] = Field(default_factory=dict, description="Silo -> digests of its erased update files.")
    reason: str = ""
    by: str = Field("", description="Who erased.")
    at: float

    @property
    def facts(self) -> dict[str, object]:
        """What it says, without its place in the log."""
        return self.model_dump(exclude={"number", "previous", "signature"})


def key(rounds: Rounds, number: int) -> str:
    return rounds.key("audit", f"{number:06d}.json")


def entries(rounds: Rounds, number: int = 1) -> Iterator[Entry]:
    """The entries from one on, in order, each with a signature that holds. Raises RefusedError at the first that has none."""
    while True:
        try:
            yield rounds.read(Entry, key(rounds, number))
        except ObjectMissing:
            return
        number += 1


def append(rounds: Rounds, entry: Entry, after: int | None = None) -> Entry:
    """Put an entry at the log's end, or find that whoever was faster has; its number and predecessor are filled in.

    Args:
        after: number of the last entry that is known not to be this one; those behind it are looked through. Default: the last.
    """
    number = _end(rounds) if after is None else after
    last = rounds.read(Entry, key(rounds, number)) if number else None
    while True:
        number += 1
        wanted = entry.model_copy(update={"number": number, "previous": last.digest if last else None})
        last = rounds.create(wanted, key(rounds, number))
        if last.facts == entry.facts:
            return last


def _end(rounds: Rounds) -> int:
    return highest(lambda n: rounds.store.size(key(rounds, n)) is not None)


def sync(rounds: Rounds) -> None:
    """Append the commits that the log does not tell of yet.

    Raises:
        RefusedError: the log tells of a commit that the store does not hold: it was deleted, and going on would make another one.
    """
    number = _end(rounds)
    told, place = -1, 0
    while number and told < 0:
        entry = rounds.read(Entry, key(rounds, number))
        if entry.kind == "commit":
            told, place = entry.round, number
        number -= 1
    latest = rounds.latest()
    stands = latest.round if latest else -1
    if told > stands:
        raise RefusedError(
            f"{key(rounds, place)}: tells of the commit of round {told}, and the commit of round {stands + 1} is gone; restore it from a "
            "backup, and look with `silotune verify`"
        )
    for missing in range(told + 1, stands + 1):
        place = append(rounds, of_commit(rounds.commit(missing)), place).number


def record_export(rounds: Rounds, exported: Exported, at: float) -> None:
    """Append an export, unless the log tells of it."""
    place = 0
    for entry in entries(rounds):
        if entry.kind == "export" and entry.location == exported.location:
            return
        place = entry.number
    append(rounds, Entry(
        number=1, previous=None, kind="export", round=exported.round, commit=exported.commit.removesuffix("-merged"),
        outgoing=exported.outgoing, location=exported.location, at=at,
    ), place)  # fmt: skip


def of_commit(commit: Commit) -> Entry:
    return Entry(
        number=1, previous=None, kind="commit", round=commit.round, commit=commit.digest, outgoing=commit.outgoing,
        contributions={silo: c.object for silo, c in sorted(commit.contributions.items())}, reason=commit.outcome, at=commit.at,
    )  # fmt: skip


def of_erasure(number: int, erased: dict[str, list[str]], reason: str, by: str) -> Entry:
    """An erasure in a round, so that a key which is good for earlier rounds only cannot sign it."""
    return Entry(number=1, previous=None, kind="erasure", round=number, erased=erased, reason=reason, by=by, at=time.time())
