"""A global that the store has lost or damaged: made again from what its round was made of, and put back, or refused with what is missing."""

from __future__ import annotations

import tempfile
from pathlib import Path

from silotune.components.aggregate import carried, releases
from silotune.components.aggregate.delivery import expectations, fetch_whole, open_delivery, silo_of
from silotune.components.aggregate.secure import secure_sum
from silotune.components.errors import QuorumError, RefusedError
from silotune.components.federation import Agreement, Federation
from silotune.components.learning.aggregation.combination import OUTGOING, Round, combine, combine_sum
from silotune.components.learning.tensor_file import open_tensor_file
from silotune.components.learning.update import Update, UpdateRefused
from silotune.components.process.progress import tell
from silotune.components.protocol import Commit, Plan
from silotune.components.rounds import Rounds
from silotune.components.secure_sum.records import SecureRound
from silotune.components.store.content import CorruptObject, file_digest
from silotune.components.store.object_store import ObjectMissing


def fetch_global(rounds: Rounds, commit: Commit, path: Path, federation: Federation | None = None) -> Path:
    """The global that a commit made; where the store has lost or damaged it, made again from the updates that it was made of.

    Args:
        federation: as the coordinator has it, whose secret silo-level noise is made of.

    Raises:
        RefusedError: it cannot be made again; the message names it.
    """
    try:
        return rounds.fetch_object(commit.outgoing, path)
    except (CorruptObject, ObjectMissing) as error:
        rebuild(rounds, commit, path, federation)
        tell("aggregate", "warned", detail=f"the global of round {commit.round} was made again from its updates: {error}")
        return path


def rebuild(rounds: Rounds, commit: Commit, path: Path, federation: Federation | None = None) -> None:
    """Make a lost global again, and put it where it belongs; arguments as `fetch_global`.

    Raises:
        RefusedError: an update is gone or damaged as well, or something else comes out.
    """
    lost = f"object {commit.outgoing[:12]}…, the global of round {commit.round}, is lost or damaged"
    maker = next((c for c in rounds.commits() if c.made_global and c.outgoing == commit.outgoing), commit)
    plan = rounds.plan(maker.round)
    if plan is None:
        raise RefusedError(f"{lost}, and nothing is stored that it could be made from; restore it from a backup", "object corrupt")
    agreement = rounds.agreement(plan.agreement)
    before = rounds.commit(maker.round - 1)
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        folder = Path(name)
        incoming = fetch_global(rounds, before, folder / "incoming.safetensors", federation)
        given = carried.round_of(rounds, before, plan, agreement, open_tensor_file(incoming), folder)
        if agreement.privacy.secure_aggregation is not None:
            _rebuild_securely(rounds, plan, agreement, given, folder, path, lost)
            return _put_back(rounds, commit, path, lost)
        if agreement.privacy.silo is not None:
            given = releases.again(federation, rounds, plan, agreement, given, {s: c.object for s, c in maker.contributions.items()})
        updates: dict[str, Update] = {}
        silo, failed = "", None  # what was found late, and of whose update
        try:
            expected = expectations(rounds, plan, agreement, maker.contributions)
            for silo, part in maker.contributions.items():
                updates[silo] = open_delivery(rounds, expected[silo], part.object, folder)
            while True:
                if failed:
                    silo = silo_of(failed, updates)
                    updates[silo] = fetch_whole(rounds, expected[silo], maker.contributions[silo].object, folder, updates[silo], failed)
                try:
                    combine(given, updates, folder)
                    (folder / OUTGOING).replace(path)
                    break
                except (UpdateRefused, ObjectMissing) as error:
                    failed = error
        except (RefusedError, ObjectMissing) as error:
            rule = f"{lost}, and so is the update of {silo}: {error}; restore one from a backup"
            raise RefusedError(rule, "object corrupt") from None
    _put_back(rounds, commit, path, lost)


def _rebuild_securely(rounds: Rounds, plan: Plan, agreement: Agreement, given: Round, folder: Path, path: Path, lost: str) -> None:
    """From the masked vectors and what has opened their sum, as far as they are still stored."""
    try:
        survivors = SecureRound(rounds, plan.round, 1, plan.digest).survivors()
        if survivors is None:
            raise RefusedError("its survivors are not stored")
        opened = secure_sum(rounds, plan, agreement, survivors, folder)
        combine_sum(given, opened.path, opened.weights, folder)
    except (QuorumError, RefusedError, ObjectMissing) as error:
        raise RefusedError(f"{lost}, and so is its secure sum: {error}; restore one from a backup", "object corrupt") from None
    (folder / OUTGOING).replace(path)


def _put_back(rounds: Rounds, commit: Commit, path: Path, lost: str) -> None:
    if (got := file_digest(path)) != commit.outgoing:
        raise RefusedError(
            f"{lost}; made again it has the digest {got[:12]}…, as it may where processor or numpy are of another kind than then; restore it from a backup",
            "object corrupt",
        )
    rounds.store.delete(rounds.object_key(commit.outgoing))  # what is there, is not written
    rounds.put_object(path)
