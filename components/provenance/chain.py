"""The chain from any global model back to the base: every commit, plan, contribution and entry of the audit log, with nothing between them.

`verify` reads records only, a few kilobytes a round, and lists which tensor files are there; ``deep`` also digests the bytes of each. A record
that the wrong party signed, or that names a predecessor other than the one that stands, breaks the chain, and so does a tensor file that is
gone without an erasure in the log. All breaks are told, not only the first. What no commit names, such as a refused update, is no part of it.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from silotune.components.errors import RefusedError, SilotuneError
from silotune.components.protocol import Commit, Plan, UpdateManifest
from silotune.components.provenance import audit
from silotune.components.rounds import Rounds
from silotune.components.secure_sum.records import MaskedVector
from silotune.components.store.content import CorruptObject
from silotune.components.store.object_store import ObjectMissing

T = TypeVar("T")
Sent = dict[tuple[int, str], list[str]]  # (round, silo) -> keys
READERS = 16  # records read at once: a store's answers take longer than their verification


@dataclass
class Chain:
    """What was found."""

    commits: list[Commit]
    records: int = 0  # whose signatures and digests were verified
    objects: int = 0  # tensor files that are there
    erased: dict[str, str] = field(default_factory=dict)  # digest of an update file -> when, by whom and why it was erased
    breaks: list[str] = field(default_factory=list)
    lost: list[Commit] = field(default_factory=list)  # whose globals are gone or damaged

    def lineage(self, outgoing: str) -> list[Commit]:
        """The commits that a global comes from, the newest first.

        Raises:
            RefusedError: no commit made it.
        """
        made = [c for c in self.commits if c.made_global and c.outgoing.startswith(outgoing)]
        if not made or len({c.outgoing for c in made}) > 1:
            what = "several globals begin" if made else "no committed global begins"
            raise RefusedError(f"model {outgoing[:16]!r}: {what} with this digest; `silotune status` shows those there are")
        chain = [made[-1]]
        while chain[-1].round:
            before = next(c for c in reversed(self.commits[: chain[-1].round]) if c.made_global and c.outgoing == chain[-1].incoming)
            chain.append(before)
        return chain


def verify(rounds: Rounds, *, deep: bool = False) -> Chain:
    """Walk the whole chain. A federation that is at work meanwhile is no break.

    Raises:
        UnreachableError: the store.
    """
    chain = Chain([])
    with ThreadPoolExecutor(READERS) as readers:
        written = list(rounds.store.list(rounds.key("audit") + "/"))  # first: the log must not tell of more than is looked at
        present = set(rounds.store.list(rounds.key("rounds") + "/"))
        stored = {key for folder in ("objects", "contributions") for key in rounds.store.list(rounds.key(folder) + "/")}
        commits = _commits(rounds, chain, present, readers)
        log = _log(rounds, chain, written, readers)
        top = max(commits, default=-1)
        gone = {n for n in range(top + 1) if rounds.key("rounds", f"{n:05d}", "commit.json") not in present}
        plans = {n: plan for n, plan in _plans(rounds, chain, present, readers).items() if plan}
        gone |= {n - 1 for n in plans if n > top + 1}
        chain.breaks += [f"round {n}: its commit is gone" for n in sorted(gone)]
        _verify_log(rounds, chain, log, commits, top + 1 in plans)
        sent, named = _sent(present), set[str]()
        for breaks, records, names in readers.map(lambda n: _verify_round(rounds, chain, commits, plans.get(n), n, sent, stored), commits):
            chain.breaks += breaks
            chain.records += records
            named |= names
    _verify_releases(rounds, chain)
    makers = {rounds.object_key(c.outgoing): c for c in chain.commits if c.made_global}
    for key, commit in makers.items():
        if key not in stored:
            chain.breaks.append(f"round {commit.round}: its global {commit.outgoing[:12]}… is gone from the store")
            chain.lost.append(commit)
    chain.objects = len((named | set(makers)) & stored)
    if deep:
        _verify_bytes(rounds, chain, makers, sorted((named | set(makers)) & stored))
    return chain


def _verify_releases(rounds: Rounds, chain: Chain) -> None:
    """Every commit with silo-level noise has the release that it names, of its own updates."""
    found = _read(lambda: {r.number: r for r in rounds.releases()})
    if isinstance(found, str):
        chain.breaks.append(found)
        return
    chain.records += len(found)
    for commit in chain.commits:
        if (number := commit.guards.get("silo release")) is None:
            continue
        release = found.get(int(number))
        if release is None or (release.plan, release.silos) != (commit.plan, {s: c.object for s, c in commit.contributions.items()}):
            chain.breaks.append(
                f"round {commit.round}: no release {number:.0f} of its updates stands, so that its silo-level noise cannot be shown"
            )


def _number(key: str) -> int | None:
    """The round that a record's key is in."""
    name = key.split("/")[2]
    return int(name) if re.fullmatch(r"\d{5,}", name) else None


def _read(read: Callable[[], T]) -> T | str:
    """What is read, or why it cannot be believed."""
    try:
        return read()
    except (RefusedError, ObjectMissing) as error:
        return str(error)


def _commits(rounds: Rounds, chain: Chain, present: set[str], readers: ThreadPoolExecutor) -> dict[int, Commit]:
    """By round, those that can be believed."""
    numbers = sorted(n for key in present if key.endswith("/commit.json") and (n := _number(key)) is not None)
    found: dict[int, Commit] = {}
    for number, commit in zip(numbers, readers.map(lambda n: _read(lambda: rounds.commit(n)), numbers), strict=True):
        if isinstance(commit, str):
            chain.breaks.append(f"round {number}: its commit cannot be believed: {commit}")
        else:
            found[number] = commit
    chain.commits = list(found.values())
    chain.records += len(found)
    return found


def _plans(rounds: Rounds, chain: Chain, present: set[str], readers: ThreadPoolExecutor) -> dict[int, Plan | None]:
    """By round; one that cannot be believed matters to the round's commit only, if it has any."""
    numbers = sorted(n for key in present if key.endswith("/plan.json") and (n := _number(key)) is not None)
    found = zip(numbers, readers.map(lambda n: _read(lambda: rounds.plan(n)), numbers), strict=True)
    return {number: None if isinstance(plan, str) else plan for number, plan in found}


def _verify_round(
    rounds: Rounds, chain: Chain, commits: dict[int, Commit], plan: Plan | None, number: int, sent: Sent, stored: set[str]
) -> tuple[list[str], int, set[str]]:
    """(breaks, records read, keys of the tensor files that it names) of one round."""
    commit, breaks, records = commits[number], [], 1
    named: set[str] = set()
    if commit.round != number:
        breaks.append(f"its commit says that it is round {commit.round}")
    try:
        rounds.agreement(commit.agreement)
    except SilotuneError as error:
        breaks.append(f"its terms cannot be read: {error}")
    before = commits.get(number - 1)
    if number and before is None:  # told already
        return [f"round {number}: {b}" for b in breaks], records, named
    if commit.previous != (before.digest if before else None):
        breaks.append("its commit does not name the one before it")
    if before is None:
        return [f"round {number}: {b}" for b in breaks], records, named
    if plan is None or plan.digest != commit.plan:
        breaks.append("its plan is not the one that its commit names")
    elif (plan.round, plan.incoming) != (number, before.outgoing) or commit.incoming != before.outgoing:
        breaks.append("it does not begin from the global before it")
    if commit.outcome in ("skipped", "amended") and commit.outgoing != commit.incoming:
        breaks.append(f"it was {commit.outcome}, and yet has another global")
    if commit.outcome == "rolled-back":
        back = commits.get(commit.back_to) if commit.back_to is not None and commit.back_to < number else None
        if back is None or not back.made_global or back.outgoing != commit.outgoing:
            breaks.append("it was rolled back to a global that is not that of an earlier round")
    for schema in sorted({p.tensors for p in plan.participants.values()}) if plan else []:
        named.add(rounds.object_key(schema))
        if rounds.object_key(schema) not in stored:
            breaks.append(f"the list of tensors {schema[:12]}… that its plan names is gone from the store")
    for silo, contribution in commit.contributions.items():
        records += 1
        manifest = _manifest(rounds, sent.get((number, silo), []), contribution.manifest)
        if manifest is None:
            breaks.append(f"the manifest of {silo} is gone, altered or not signed by it")
        elif (manifest.object, manifest.plan, manifest.cursor) != (contribution.object, commit.plan, contribution.cursor):
            breaks.append(f"the manifest of {silo} names another update than the commit")
        key = rounds.object_key(contribution.object, silo)
        named.add(key)
        if key not in stored and contribution.object not in chain.erased:
            breaks.append(f"the update {contribution.object[:12]}… of {silo} is gone, and the audit log tells of no erasure")
    return [f"round {number}: {b}" for b in breaks], records, named


def _sent(present: set[str]) -> Sent:
    """Where the manifests of each silo in each round lie, refused ones too."""
    found: Sent = {}
    for key in sorted(present):
        parts = key.split("/")
        if (parts[3] == "updates" or parts[3:6:2] == ["secagg", "masked"]) and (number := _number(key)) is not None:
            found.setdefault((number, parts[-1].split(".", 1)[0]), []).append(key)
    return found


def _manifest(rounds: Rounds, keys: list[str], digest: str) -> UpdateManifest | MaskedVector | None:
    """The manifest with this digest, among those under some keys; of a masked vector where updates were summed securely."""
    for key in keys:
        with contextlib.suppress(RefusedError, ObjectMissing):
            found = rounds.read(MaskedVector, key) if "/secagg/" in key else rounds.read(UpdateManifest, key)
            if found.digest == digest:
                return found
    return None


def _log(rounds: Rounds, chain: Chain, written: list[str], readers: ThreadPoolExecutor) -> list[audit.Entry]:
    """The entries of the audit log that can be believed, in order, and what they say was erased."""
    found: list[audit.Entry] = []
    for key, entry in zip(written, readers.map(lambda key: _read(lambda: rounds.read(audit.Entry, key)), written), strict=True):
        if isinstance(entry, str):
            chain.breaks.append(f"audit log: {entry}")
        elif key != audit.key(rounds, entry.number):
            chain.breaks.append(f"audit log: {key} says that it is entry {entry.number}")
        else:
            found.append(entry)
    chain.records += len(found)
    # What was appended since the log was listed can tell of files that are gone since.
    later = _later(rounds, len(found)) if len(found) == len(written) else ()
    for entry in (*found, *later):
        if entry.kind == "erasure":
            said = f"erased on {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(entry.at))} by {entry.by}: {entry.reason}"
            for digest in (d for digests in entry.erased.values() for d in digests):
                chain.erased.setdefault(digest, said)
    return found


def _later(rounds: Rounds, number: int) -> Iterator[audit.Entry]:
    """The entries behind one, up to the first that cannot be believed."""
    with contextlib.suppress(RefusedError):
        yield from audit.entries(rounds, number + 1)


def _verify_log(rounds: Rounds, chain: Chain, log: list[audit.Entry], commits: dict[int, Commit], opened: bool) -> None:
    """The audit log: chained to its first entry, and with exactly the commits that stand.

    Args:
        opened: the round after the last commit is open, which comes after that commit's entry.
    """
    told = -1
    for last, entry in zip([None, *log], log, strict=False):
        if entry.number != (last.number if last else 0) + 1 or entry.previous != (last.digest if last else None):
            chain.breaks.append(f"audit log: entry {entry.number} is not chained to the one before it")
        if entry.kind == "erasure" and entry.round < told:
            chain.breaks.append(f"audit log: entry {entry.number} is an erasure in round {entry.round}, and stands behind round {told}")
        if entry.kind != "commit":
            continue
        told = entry.round
        if (stands := commits.get(told)) is None:
            chain.breaks.append(f"round {told}: the audit log tells of its commit, which is gone or cannot be believed")
        elif entry.facts != audit.of_commit(stands).facts:
            chain.breaks.append(f"round {told}: the audit log tells of another commit")
    known = [entry.round for entry in log if entry.kind == "commit"]
    chain.breaks += [f"round {n}: the audit log tells of it twice" for n in sorted({n for n in known if known.count(n) > 1})]
    untold = sorted(commits.keys() - set(known))
    if untold == [max(commits, default=0)]:  # its entry may be on its way, unless a later record shows that it was there
        end = log[-1].number if log else 0
        untold = untold if opened and rounds.store.size(audit.key(rounds, end + 1)) is None else []
    chain.breaks += [f"round {n}: the audit log does not tell of it" for n in untold]


def _verify_bytes(rounds: Rounds, chain: Chain, makers: dict[str, Commit], keys: list[str]) -> None:
    """Digest the tensor files under these keys."""
    with tempfile.TemporaryDirectory() as folder:
        for key in keys:
            *_, owner, digest = key.split("/")
            silo = owner if key.startswith(rounds.key("contributions") + "/") else None
            try:
                rounds.fetch_object(digest, Path(folder) / "object", silo).unlink()
            except (CorruptObject, ObjectMissing) as error:
                if isinstance(error, ObjectMissing) and digest in chain.erased:
                    continue
                chain.breaks.append(str(error))
                if key in makers:
                    chain.lost.append(makers[key])


def exported_global(rounds: Rounds, folder: Path) -> str:
    """The global that an exported folder holds, by the digests of its files.

    Raises:
        RefusedError: a file is missing, altered, or was never part of an export.
    """
    from silotune.components.store.content import file_digest

    found = {str(p.relative_to(folder)): file_digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    best, fewest = "no export of this federation has these files", len(found) + 1
    for exported in rounds.exports():
        odd = sorted({name for name in found.keys() | exported.files.keys() if found.get(name) != exported.files.get(name)})
        if not odd:
            return exported.outgoing
        if len(odd) < fewest:
            best, fewest = f"{', '.join(odd)} is not as it was exported from round {exported.round}", len(odd)
    raise RefusedError(f"model {folder}: {best}; export it again")
