"""What a silo keeps to itself for secure sums, in its own folder: the secrets of an attempt, and what it has done with them.

    secagg/00003-1.json         the attempt's secrets: fresh from the system's random numbers, never of a seed
    secagg/00003-noise          what the round's noise is drawn from: the same in all its attempts
    secagg/00003-1.masked       which vector they cover: they cover no second one
    secagg/opened.json          the survivors that it has confirmed in each round: it helps to open no other sum

All is on the disk before anything that follows from it leaves the silo, so that a step which is killed and run again says the same. Two vectors
under the same masks, or the sums of two sets of silos, would show by their difference what none of them shows.
"""

from __future__ import annotations

import hmac
import json
import os
from pathlib import Path

from pydantic import Field, ValidationError

from silotune.components.errors import RefusedError
from silotune.components.federation import canonical_json
from silotune.components.store.local_files import sync_folder
from silotune.components.terms.section import Section

FOLDER = "secagg"


class Secrets(Section):
    """Of one attempt; 32 bytes each, in hexadecimal."""

    sealing: str
    masking: str
    seed: str


class Covered(Section):
    """The vector that an attempt's masks cover."""

    roster: str
    object: str


class Opened(Section):
    """A sum that the silo has agreed to help open. From then on it counts as opened."""

    round: int
    attempt: int
    record: str = Field("", description="Digest of the survivors' record; none in entries of before there were confirmations.")
    start: int = Field(description="Cursor of the silo's own part.")
    cursor: int = Field(description="Cursor after it.")
    survivors: list[str]
    summed: bool = Field(description="Whether the silo's own update is in it.")
    rho: float = Field(description="What it costs of the promise about silos, in concentrated differential privacy.")


class MaskSecrets:
    """In a silo's folder for one federation."""

    def __init__(self, home: Path) -> None:
        self._folder = home / FOLDER
        self._folder.mkdir(mode=0o700, exist_ok=True)

    def made(self, number: int, attempt: int) -> Secrets:
        """The attempt's secrets, made where there are none."""
        path = self._of(number, attempt, ".json")
        if not path.exists():
            fresh = Secrets(sealing=os.urandom(32).hex(), masking=os.urandom(32).hex(), seed=os.urandom(32).hex())
            self._keep(path, fresh.model_dump_json().encode())
        return self.known(number, attempt)

    def known(self, number: int, attempt: int) -> Secrets:
        """Raises RefusedError where they are gone: then the silo counts as one that has dropped out."""
        try:
            return Secrets.model_validate_json(self._of(number, attempt, ".json").read_bytes())
        except (FileNotFoundError, ValidationError):
            raise RefusedError(
                f"{self._folder}: holds no secrets of round {number}, attempt {attempt}; take part in the next attempt", "mask secrets gone"
            ) from None

    def noise(self, number: int, plan: str) -> bytes:
        """32 bytes for the noise of a plan's update, made where there are none. Another attempt sends the same update with the same noise: with
        fresh noise each time, the noise could be averaged out."""
        path = self._folder / f"{number:05d}-noise"
        if not path.exists():
            self._keep(path, os.urandom(32))
        return hmac.digest(path.read_bytes(), f"noise {plan}".encode(), "sha256")

    def cover(self, number: int, attempt: int, covered: Covered) -> None:
        """Before a vector leaves. Raises RefusedError where these masks have covered another one."""
        path = self._of(number, attempt, ".masked")
        if not path.exists():
            self._keep(path, canonical_json(covered.model_dump()))
        if Covered.model_validate_json(path.read_bytes()) != covered:
            raise RefusedError(
                f"{path}: another vector was masked in this attempt, or against others; two under the same masks would show their difference",
                "second vector",
            )

    def opened(self) -> list[Opened]:
        path = self._folder / "opened.json"
        try:
            return [Opened.model_validate(o) for o in json.loads(path.read_bytes())] if path.exists() else []
        except ValueError:  # of JSON, or of a model
            raise RefusedError(
                f"{path}: cannot be read, and says which sums this silo has helped to open; put it back from a backup", "sum memory damaged"
            ) from None

    def require_fresh(self, start: int, number: int) -> None:
        """Before an update is masked: none of its examples is of a stretch that went into a sum of another round.

        Args:
            start: cursor that the update begins from.
            number: the round.

        Raises:
            RefusedError: one is.
        """
        for old in self.opened():
            if old.summed and old.round != number and start < old.cursor:
                raise RefusedError(
                    f"its examples from {start} on went into the sum of round {old.round}, which it has helped to open up to example "
                    f"{old.cursor}; with another sum of nearly the same update the two would tell them apart: wait for a plan that goes on from there",
                    "examples summed before",
                )

    def confirm(self, wanted: Opened) -> None:
        """Before a confirmation leaves. Raises RefusedError where the silo has confirmed other survivors in this round."""
        known = self.opened()
        for old in known:
            if old.round == wanted.round and old.record != wanted.record:
                raise RefusedError(
                    f"other survivors were confirmed in round {old.round}, in attempt {old.attempt}: {', '.join(old.survivors)}; whoever shows "
                    "two sets of them wants two sums, whose difference shows what neither does: keep both records as evidence",
                    "second survivor set",
                )
        if all(old.round != wanted.round for old in known):
            self._keep(self._folder / "opened.json", canonical_json([o.model_dump() for o in (*known, wanted)]))

    def has_confirmed(self, number: int, record: str) -> bool:
        """Whether the round's survivors with this digest are the ones that the silo has confirmed."""
        return any((old.round, old.record) == (number, record) for old in self.opened())

    def forget(self, before: int) -> None:
        """Delete the secrets of rounds that are over: nobody needs them, and whoever broke in could read what was masked with them."""
        for path in self._folder.iterdir():
            number = path.name.removeprefix(".").split("-")[0]  # with what a step left that was killed while it wrote
            if number.isdigit() and int(number) < before:
                path.unlink()

    def _of(self, number: int, attempt: int, suffix: str) -> Path:
        return self._folder / f"{number:05d}-{attempt}{suffix}"

    def _keep(self, path: Path, data: bytes) -> None:
        """On the disk, name and all, before this returns; readable by the owner only."""
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        scratch.unlink(missing_ok=True)
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        sync_folder(self._folder)
