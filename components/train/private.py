"""Private rounds: what a silo's training must be, so that all planned rounds together keep the promise.

It follows from the agreed terms and from the number of units in the silo's train split, and from nothing else about its records.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from silotune.components.federation import Agreement
from silotune.components.learning.privacy.accounting import Mechanism, round_mechanism
from silotune.components.learning.privacy.clipping import Clipping
from silotune.components.learning.privacy.own_secret import derive, own_secret
from silotune.components.protocol import Plan

if TYPE_CHECKING:
    from silotune.components.learning.tokens import Shard


class PrivateTerms(BaseModel):
    """What an order says of a private training. The key is made where it is used, from the secret in the silo's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mechanism: Mechanism
    clip: float
    clipping: Clipping
    names: dict[str, str]  # digests that the key is derived for

    def key(self, home: Path) -> bytes:
        """Of noise and samples; the folder is one that all of the silo's machines share."""
        return derive(own_secret(home), **self.names, purpose="training")

    def noise(self, home: Path) -> str:
        """Which secret it is, without telling it: a training done again under another one is another training."""
        return derive(own_secret(home), agreement="", plan="", incoming="", dataset="", purpose="name of this secret").hex()


def private_terms(plan: Plan, agreement: Agreement, silo: str, shard: Shard) -> PrivateTerms | None:
    """Of a silo's round on its train split; None where no such promise is made.

    Raises:
        RefusedError: the promise cannot be kept with so few units.
    """
    if not agreement.privacy.of_records:
        return None
    names = {"agreement": plan.agreement, "plan": plan.digest, "incoming": plan.incoming, "dataset": shard.digest}
    mechanism = round_mechanism(agreement.privacy, agreement.training_of(silo), shard.unit_count)
    return PrivateTerms(mechanism=mechanism, clip=agreement.privacy.clip, clipping=agreement.privacy.clipping, names=names)
