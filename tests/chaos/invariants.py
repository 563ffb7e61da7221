"""What must hold after every life, and at the end of every scenario, whatever has happened."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from damage import Damage
from scenario import FOUR, STEPS
from secure_courses import quantised_mean

from silotune.components.aggregate.lost_global import fetch_global
from silotune.components.errors import RefusedError
from silotune.components.federation import Federation
from silotune.components.learning.tensor_file import open_tensor_file
from silotune.components.learning.update import read_header
from silotune.components.provenance import chain
from silotune.components.rounds import Rounds
from silotune.components.secure_sum.records import Opening, SecureRound
from silotune.components.secure_sum.silo import UPDATE
from silotune.components.silo_job import silo_home
from silotune.components.store.object_store import PROBE
from silotune.pipelines.status import status

HEX = r"[0-9a-f]{64}"
SILO = f"({'|'.join(FOUR)})"
VISIBLE = re.compile(  # every kind of key that the protocol knows, see `rounds`
    rf"agreements/{HEX}\.json|objects/{HEX}|contributions/{SILO}/{HEX}|audit/\d{{6}}\.json|rounds/00000/commit\.json"
    rf"|rounds/\d{{5}}/(plan|commit|attempts/\d+|reports/\d+/{SILO}|updates/{SILO}(\.\d+)?|refusals/{SILO}(\.\d+)?)\.json"
    rf"|rounds/\d{{5}}/secagg/(survivors|\d+/rosters/(share|mask)|\d+/(keys|shares|masked|confirmations|openings)/{SILO})\.json"
    rf"|evaluations/{HEX}/{SILO}/(valid|test)-[0-9a-f]{{16}}\.json|exports/{HEX}\.json|exports/[0-9a-f]{{16}}-[0-9a-f]{{16}}/[A-Za-z0-9._-]+"
)
Course = tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]  # by round from 1 on: who took part, and with how many steps


class Broken(Exception):
    """An invariant does not hold."""


def require(held: object, what: str) -> None:
    if not held:
        raise Broken(what)


def stands(rounds: Rounds, before: dict[int, str]) -> dict[int, str]:
    """Digest by round of what is committed; what was committed before must be among it, unchanged."""
    now = {c.round: c.digest for c in rounds.commits()}
    for number, digest in before.items():
        require(number in now, f"LOST: round {number} was committed and is gone")
        require(now[number] == digest, f"LOST: the commit of round {number} is another one than before")
    return now


def only_what_is_committed_shows(federation: Federation, rounds: Rounds) -> None:
    """No temporary file, no round without a commit, no score of an uncommitted global."""
    latest = rounds.latest()
    top = latest.round if latest else -1
    committed = {c.outgoing for c in rounds.commits()}
    for key in rounds.store.list(""):
        if key.startswith(f"{PROBE}/"):  # what a killed `check` has left, beside all federations
            continue
        require(key.startswith(rounds.key("")), f"{key}: is no key of the federation")
        short = key.removeprefix(rounds.key(""))
        require(VISIBLE.fullmatch(short), f"{key}: is no key that the protocol knows")
        if short.startswith("rounds/"):
            number = int(short.split("/")[1])
            require(number <= top + 1, f"{key}: is of a round beyond the open one, {top + 1}")
        if short.startswith("evaluations/"):
            require(short.split("/")[1] in committed, f"{key}: is a score of a global that is not committed")
    shown = status(federation, rounds)
    require([r.round for r in shown.rounds if r.committed] == list(range(top + 1)), "status shows other rounds than are committed")
    require({r.sha256 for r in shown.rounds if not r.committed} <= {None}, "status shows a global of an open round")


def course(rounds: Rounds) -> Course:
    """Who took part in each round."""
    found = []
    for commit in rounds.commits():
        if commit.round:
            require(commit.outcome == "aggregated", f"round {commit.round}: is {commit.outcome}")
            parts = sorted(commit.contributions.items())
            require(all(c.steps == STEPS for _, c in parts), f"round {commit.round}: a silo has done other than {STEPS} steps")
            found.append((tuple(s for s, _ in parts), tuple(c.steps for _, c in parts)))
    return tuple(found)


def same_globals(rounds: Rounds, reference: Callable[[Course], list[str]]) -> None:
    """Bit for bit those of a federation that nobody disturbed, with the same participants."""
    got, wanted = [c.outgoing for c in rounds.commits()], reference(course(rounds))
    for number, (ours, theirs) in enumerate(zip(got, wanted, strict=False)):
        require(ours == theirs, f"round {number}: its global is {ours[:12]}…, undisturbed it is {theirs[:12]}…")
    require(len(got) <= len(wanted), f"{len(got)} rounds are committed, undisturbed {len(wanted)}")


def one_sum_is_opened(rounds: Rounds, number: int) -> None:
    """In whatever attempts of a round, all shares that were told are of the same survivors, and never of both secrets of one silo."""
    plan = rounds.plan(number)
    attempts = {
        key.split("/")[4] for key in rounds.store.list(rounds.key("rounds", f"{number:05d}", "secagg") + "/") if "/openings/" in key
    }
    if plan is None or not attempts:
        return
    require(len(attempts) == 1, f"round {number}: shares are told in attempts {', '.join(sorted(attempts))}")
    told, _ = SecureRound(rounds, number, int(attempts.pop()), plan.digest).believed(Opening, FOUR)
    require(len({o.survivors for o in told.values()}) <= 1, f"round {number}: shares are told of two sets of survivors")
    both = {silo for o in told.values() for silo in o.seeds} & {silo for o in told.values() for silo in o.keys}
    require(not both, f"round {number}: both secrets are told of {', '.join(sorted(both))}")


def require_exact_sum(file: Path, number: int) -> None:
    """Of an undisturbed round that was summed securely: bit for bit the plain sum of the whole numbers that its silos' updates are."""
    federation = Federation.load(file)
    rounds = Rounds.of(federation)
    commit, clip = rounds.commit(number), federation.aggregation.clip
    assert clip
    assert clip.norm
    with tempfile.TemporaryDirectory() as folder:
        before, after = (
            open_tensor_file(rounds.fetch_object(d, Path(folder) / d)).read_all() for d in (commit.incoming or "", commit.outgoing)
        )
    updates = {}
    for silo in commit.contributions:
        path = silo_home(federation, federation.silo(silo)) / UPDATE
        require(read_header(path).plan == commit.plan, f"round {number}: {silo} keeps no update of it")
        updates[silo] = open_tensor_file(path).read_all()
    mean = quantised_mean(updates, dict.fromkeys(updates, 1.0), clip=clip.norm)
    for name, array in after.items():
        require(
            (array == (before[name] + mean[name]).astype("float32")).all(),
            f"round {number}: {name} is not the quantised sum of {sorted(updates)}",
        )


def unbroken(federation: Federation, open_rounds: Callable[[], Rounds], left: list[Damage], scratch: Path) -> int:
    """The chain holds to the last byte, after it has told of the damage that is still there, and that has been mended.

    Returns how many objects had to be restored or made again by hand.
    """
    rounds = open_rounds()
    still = [d for d in left if d.there(rounds.store)]
    if still:
        found = chain.verify(rounds, deep=True)
        committed = {digest for c in rounds.commits() for digest in (c.outgoing, *(part.object for part in c.contributions.values()))}
        for damage in still:
            part = damage.what == "record" or damage.key.rsplit("/", 1)[1] in committed  # an update that no commit names is no part of it
            require(not part or damage.named(found.breaks), f"verify --deep does not name {damage.key}, which was altered: {found.breaks}")
            commit = next((c for c in found.lost if rounds.object_key(c.outgoing) == damage.key), None)
            if commit and commit.round:
                fetch_global(rounds, commit, scratch)
            else:
                damage.restore(rounds.store)
    found = chain.verify(open_rounds(), deep=True)
    require(found.commits and not found.breaks, f"the chain is broken: {'; '.join(found.breaks)}")
    return len(still)


def noticed(open_rounds: Callable[[], Rounds]) -> bool:
    """Whether `chain.verify` tells of a record that was altered; by its key, or by its round."""
    try:
        return bool(chain.verify(open_rounds()).breaks)
    except RefusedError:
        return True
