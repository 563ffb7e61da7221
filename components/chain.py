"""The chain from any global model back to the base: every commit, plan, contribution and entry of the audit log, with nothing between them.

`verify` reads records only, a few kilobytes a round, and lists which tensor files are there; ``deep`` also digests the bytes of each. A record
that the wrong party signed, or that names a predecessor other than the one that stands, breaks the chain, and so does a tensor file that is
gone without an erasure in the log. All breaks are told, not only the first.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from silotune.components import audit
from silotune.components.errors import RefusedError, SilotuneError
from silotune.components.object_store import ObjectMissing
from silotune.components.rounds import Commit, CorruptObject, Plan, Rounds, UpdateManifest

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
    """Walk the whole chain.

    Raises:
        UnreachableError: the store.
    """
    latest, chain = rounds.latest(), Chain([])
    if latest is None:
        return chain
    with ThreadPoolExecutor(READERS) as readers:
        numbers = range(latest.round + 1)
        chain.commits = list(readers.map(rounds.commit, numbers))
        chain.records += len(chain.commits)
        _verify_log(rounds, chain)
        stored = {key for folder in ("objects", "contributions") for key in rounds.store.list(rounds.key(folder) + "/")}
        chain.objects = len(stored)
        plans = list(readers.map(lambda n: rounds.plan(n) if n else None, numbers))
        for breaks, records in readers.map(lambda n: _verify_round(rounds, chain, plans[n], n, stored), numbers):
            chain.breaks += breaks
            chain.records += records
        outgoing = {c.outgoing: c for c in chain.commits if c.made_global}
        for digest, commit in outgoing.items():
            if rounds.object_key(digest) not in stored:
                chain.breaks.append(f"round {commit.round}: its global {digest[:12]}… is gone from the store")
                chain.lost.append(commit)
        if deep:
            _verify_bytes(rounds, chain, outgoing, stored)
    return chain


def _verify_round(rounds: Rounds, chain: Chain, plan: Plan | None, number: int, stored: set[str]) -> tuple[list[str], int]:
    """(breaks, records read) of one round."""
    commit, breaks, records = chain.commits[number], [], 1
    before = chain.commits[number - 1] if number else None
    if commit.round != number:
        breaks.append(f"its commit says that it is round {commit.round}")
    if commit.previous != (before.digest if before else None):
        breaks.append("its commit does not name the one before it")
    try:
        rounds.agreement(commit.agreement)
    except SilotuneError as error:
        breaks.append(f"its terms cannot be read: {error}")
    if before is None:
        return [f"round {number}: {b}" for b in breaks], records
    if plan is None or plan.digest != commit.plan:
        breaks.append("its plan is not the one that its commit names")
    elif (plan.round, plan.incoming) != (number, before.outgoing) or commit.incoming != before.outgoing:
        breaks.append("it does not begin from the global before it")
    if commit.outcome in ("skipped", "amended") and commit.outgoing != commit.incoming:
        breaks.append(f"it was {commit.outcome}, and yet has another global")
    if commit.outcome == "rolled-back":
        back = chain.commits[commit.back_to] if commit.back_to is not None and commit.back_to < number else None
        if back is None or not back.made_global or back.outgoing != commit.outgoing:
            breaks.append("it was rolled back to a global that is not that of an earlier round")
    for silo, contribution in commit.contributions.items():
        records += 1
        manifest = _manifest(rounds, number, silo, contribution.manifest)
        if manifest is None:
            breaks.append(f"the manifest of {silo} is gone, altered or not signed by it")
        elif (manifest.object, manifest.plan, manifest.cursor) != (contribution.object, commit.plan, contribution.cursor):
            breaks.append(f"the manifest of {silo} names another update than the commit")
        if rounds.object_key(contribution.object, silo) not in stored and contribution.object not in chain.erased:
            breaks.append(f"the update {contribution.object[:12]}… of {silo} is gone, and the audit log tells of no erasure")
    return [f"round {number}: {b}" for b in breaks], records


def _manifest(rounds: Rounds, number: int, silo: str, digest: str) -> UpdateManifest | None:
    """The manifest of a silo with this digest, among those it has sent."""
    for key in rounds.update_keys(number, silo):
        try:
            found = rounds.read(UpdateManifest, key)
        except (RefusedError, ObjectMissing):
            continue
        if found.digest == digest:
            return found
    return None


def _verify_log(rounds: Rounds, chain: Chain) -> None:
    """The audit log: chained to its first entry, and with exactly the commits that stand."""
    last: audit.Entry | None = None
    told: list[audit.Entry] = []
    try:
        for entry in audit.entries(rounds):
            chain.records += 1
            if entry.number != (last.number if last else 0) + 1 or entry.previous != (last.digest if last else None):
                chain.breaks.append(f"audit log: entry {entry.number} is not chained to the one before it")
            told += [entry] if entry.kind == "commit" else []
            if entry.kind == "erasure":
                said = f"erased on {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(entry.at))} by {entry.by}: {entry.reason}"
                chain.erased |= dict.fromkeys((digest for digests in entry.erased.values() for digest in digests), said)
            last = entry
    except RefusedError as error:
        chain.breaks.append(f"audit log: {error}")
        return
    facts = [audit.of_commit(c).facts for c in chain.commits]
    for number, (entry, stands) in enumerate(zip(told, facts, strict=False)):
        if entry.facts != stands:
            chain.breaks.append(f"round {number}: the audit log tells of another commit")
    if len(told) > len(facts):
        chain.breaks.append(f"round {len(facts)}: the audit log tells of it, and its commit is gone")
    elif len(told) < len(facts) - 1:  # the last one may be on its way
        chain.breaks.append(f"round {len(told)}: the audit log does not tell of it")


def _verify_bytes(rounds: Rounds, chain: Chain, outgoing: dict[str, Commit], stored: set[str]) -> None:
    """Digest every tensor file."""
    with tempfile.TemporaryDirectory() as folder:
        for key in sorted(stored):
            digest = key.rsplit("/", 1)[1]
            silo = key.split("/")[-2] if "/contributions/" in key else None
            try:
                rounds.fetch_object(digest, Path(folder) / hashlib.sha256(key.encode()).hexdigest(), silo).unlink()
            except CorruptObject as error:
                chain.breaks.append(str(error))
                if digest in outgoing:
                    chain.lost.append(outgoing[digest])


def exported_global(rounds: Rounds, folder: Path) -> str:
    """The global that an exported folder holds, by the digests of its files.

    Raises:
        RefusedError: a file is missing, altered, or was never part of an export.
    """
    from silotune.components.rounds import file_digest

    found = {str(p.relative_to(folder)): file_digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    best, fewest = "no export of this federation has these files", len(found) + 1
    for exported in rounds.exports():
        odd = sorted({name for name in found.keys() | exported.files.keys() if found.get(name) != exported.files.get(name)})
        if not odd:
            return exported.outgoing
        if len(odd) < fewest:
            best, fewest = f"{', '.join(odd)} is not as it was exported from round {exported.round}", len(odd)
    raise RefusedError(f"model {folder}: {best}; export it again")
