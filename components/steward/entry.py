"""Entry: one training in a ledger, and what it cost the records that it touched. See `ledger`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from silotune.components.federation import canonical_json
from silotune.components.learning.privacy.accounting import Mechanism
from silotune.components.protocol import Record
from silotune.components.terms.section import Section


class Charge(Section):
    """What a training is about to do to a data set."""

    federation: str
    agreement: str = Field(description="Digest of the terms.")
    plan: str = Field(description="Digest of the round's plan.")
    round: int = Field(ge=1)
    silo: str = Field(description="The silo's id in that federation.")
    content: str = Field(description="Digest of the train split.")
    mechanism: Mechanism | None = Field(
        None, description="What it costs; none: a training without differential privacy, which nothing bounds."
    )
    unit: Literal["record", "person"] = Field("record", description="Whose traces the mechanism bounds.")
    delta: float | None = Field(None, description="The delta of the federation's promise.")
    noise: str = Field("", description="Which secret the noise is from, by a digest that does not tell it.")

    def identity(self, dataset: str) -> str:
        """The same for every try at the same training, which gives the same update; another one where anything that it depends on has changed."""
        facts = self.model_dump(include={"plan", "silo", "content", "mechanism", "noise"})
        return hashlib.sha256(canonical_json([dataset, facts])).hexdigest()


class Entry(Record):
    """One training."""

    number: int = Field(ge=1)
    previous: str | None = Field(description="Digest of the entry before.")
    dataset: str
    identity: str = Field(description="The same for every try at this training.")
    charge: Charge
    at: float = Field(description="Unix time in seconds; never before that of the entry before.")


def last_of(entries: Sequence[Entry], federation: str) -> Entry | None:
    """The newest about one federation."""
    return next((e for e in reversed(entries) if e.charge.federation == federation), None)
