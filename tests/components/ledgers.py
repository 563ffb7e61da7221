"""Ledgers to test with: a silo's key, charges that are alike or not, and lives of processes that reserve."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from silotune.components import keys
from silotune.components.errors import RefusedError
from silotune.components.learning.privacy.accounting import Mechanism
from silotune.components.steward.budget import Limits, reserve
from silotune.components.steward.entry import Charge
from silotune.components.steward.ledger import Ledger
from silotune.components.store.object_store import ObjectStore
from silotune.components.terms.security import PublicKey

MOMENTS = {"os.link", "os.remove", "os.mkdir", "os.rename"}  # what Python tells an audit hook of


def key_of(folder: Path, party: str = "north") -> PublicKey:
    path = folder / "keys" / f"{party}.pub"
    return PublicKey(public=path.read_text().strip() if path.exists() else keys.new(path.parent, party))


def ledger(store: ObjectStore, folder: Path, dataset: str = "notes", party: str = "north", **more: Any) -> Ledger:
    """A fresh look at a ledger, as another process has it."""
    own = key_of(folder, party)
    private = keys.private_key(folder / "keys" / f"{party}.pem")
    return Ledger(store, dataset, lambda message: keys.signature(private, message), more.get("trusted", [own]), more.get("copies"))


def charge(number: int = 1, federation: str = "fed", z: float = 4.0, **more: Any) -> Charge:
    """Round ``number``: one step on all records, a plain Gaussian mechanism, whose ε is known in closed form."""
    known: dict[str, Any] = {
        "federation": federation, "agreement": "a" * 64, "plan": f"{federation}-{number}".rjust(64, "0"), "round": number, "silo": "north", "content": "c" * 64, "delta": 1e-5,
        "mechanism": Mechanism(sampling_probability=1.0, noise_multiplier=z, steps=1),
    }  # fmt: skip
    return Charge(**(known | more))


def writes(said: tuple[Any, ...]) -> bool:
    return isinstance(said[2], int) and bool(said[2] & (os.O_WRONLY | os.O_RDWR))


def life(kill_at: int | None, work: Any) -> int:
    """Fork, do the work there, and be killed (SIGKILL) at the so-manieth thing that it does to files; returns how the life ended."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        seen = 0

        def moment() -> None:
            nonlocal seen
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        def sync(descriptor: int, inner: Any = os.fsync) -> None:
            moment()
            inner(descriptor)
            moment()

        os.fsync = sync
        sys.addaudithook(lambda event, said: moment() if event in MOMENTS or (event == "open" and writes(said)) else None)
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def reserve_many(store: ObjectStore, folder: Path, charges: list[Charge], limits: Limits) -> int:
    """How many of the charges were let in."""
    book, done = ledger(store, folder), 0
    for wanted in charges:
        try:
            reserve(book, wanted, limits, "record", bounded=True)
            done += 1
        except RefusedError as error:
            if error.reason != "budget":
                raise
    return done
