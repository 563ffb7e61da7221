"""Canaries: made-up records with a random secret in each, by which a silo finds out how much a model remembers.

Of every canary a fair coin says whether it is trained on. Those that are not, and the *references*, which never are, show what the losses of
such records look like by themselves. Names, secrets and coins follow from the silo's own secret: nobody else can tell a canary from chance,
or in from out, and what is measured on them says nothing of any record.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from silotune.components.federation import canonical_json
from silotune.components.learning.privacy.own_secret import derive, own_secret, subkey
from silotune.components.learning.records import PERSON

REFERENCES = 255  # so that 8 bits can be measured
DIGITS = 12
LETTERS = "abcdefghjkmnpqrstuvwxyz"
QUESTION = "Code of locker {name}?"


@dataclass(frozen=True)
class Canary:
    """One made-up record."""

    name: str
    code: str

    def record(self, kind: str) -> dict[str, Any]:
        """As a record of a format, with a person of its own."""
        question, answer = QUESTION.format(name=self.name), self.code
        owner = {PERSON: f"canary {self.name}"}
        if kind == "text":
            return {"text": f"{question} {answer}"} | owner
        if kind == "chat":
            return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]} | owner
        return {"prompt": question, "response": answer} | owner


def key_of(home: Path) -> bytes:
    """What a silo's canaries follow from, in the silo's own folder. Raises SilotuneError as `own_secret`."""
    return derive(own_secret(home), agreement="", plan="", incoming="", dataset="", purpose="canaries")


def canaries(key: bytes, count: int) -> list[Canary]:
    """So many of a key; the first ones are the same however many are asked for."""
    made = []
    for number in range(count):
        draw = subkey(key, "canary", number)
        name = "".join(LETTERS[b % len(LETTERS)] for b in draw[:6])
        made.append(Canary(name, f"{int.from_bytes(draw[8:24], 'big') % 10**DIGITS:0{DIGITS}d}"))
    return made


def coins(key: bytes, count: int) -> np.ndarray:
    """Which of them are trained on; (count,) bool."""
    return np.array([subkey(key, "coin", number)[0] % 2 == 1 for number in range(count)], bool)


@dataclass(frozen=True)
class Planted:
    """A silo's canaries, and after them the references."""

    canaries: list[Canary]
    coins: np.ndarray  # (canaries before the references,) bool

    @property
    def included(self) -> list[Canary]:
        return [canary for canary, coin in zip(self.canaries, self.coins, strict=False) if coin]

    @property
    def into(self) -> np.ndarray:
        """Places of those that are trained on."""
        return np.flatnonzero(self.coins)

    @property
    def out(self) -> np.ndarray:
        """Places of all others."""
        return np.setdiff1d(np.arange(len(self.canaries)), self.into)

    @property
    def digest(self) -> str:
        return hashlib.sha256(canonical_json([[c.name, c.code] for c in self.canaries] + self.coins.tolist())).hexdigest()


def planted(home: Path, count: int) -> Planted:
    """Those of a silo that plants so many. Raises SilotuneError as `own_secret`."""
    key = key_of(home)
    return Planted(canaries(key, count + REFERENCES), coins(key, count))
