"""What can be got out of a model about the records it was trained on, measured where records and store are at hand.

Per silo: can its training records be told from others (membership), does the model go on from their beginnings (extraction), what does it know of the
canaries (exposure), and what does the silo's last update alone tell. With record-level privacy, the private training itself is audited: what is
shown to be spent must lie below what is claimed.
"""

from __future__ import annotations

import secrets
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from silotune.components.errors import FederationError, RefusedError
from silotune.components.learning.leakage.exposure import Exposure, exposure
from silotune.components.learning.leakage.extraction import Extraction, comes_out, extraction
from silotune.components.learning.leakage.membership import Membership, attack, calibrated
from silotune.components.learning.leakage.one_run import LEAST_GUESSES, LowerBound, lower_bound
from silotune.components.terms.section import Section

if TYPE_CHECKING:
    from silotune.components.federation import Federation, Silo
    from silotune.components.learning.tokens import Shard
    from silotune.components.protocol import Commit
    from silotune.components.rounds import Rounds

ASKED = 64  # examples that are asked for one by one: for extraction and alignment
DELTA = 1e-5  # of bounds where nothing is claimed


class OfUpdate(Section):
    """What one silo's update of one round tells who sees it alone."""

    round: int
    membership: Membership  # by losses of the incoming global with that update, against the incoming global
    alignment: Membership  # by the angle between the update and an example's own gradient
    exposure: Exposure | None


class OfSilo(Section):
    """What is measured in one silo."""

    membership: Membership
    extraction: Extraction
    exposure: Exposure | None  # of its canaries
    shown: LowerBound | None  # of ε, by its canaries
    update: OfUpdate | None
    no_update: str  # why there is none


class Leakage(Section):
    """What is measured of one model."""

    federation: str
    round: int
    outgoing: str
    claimed: float | None  # ε of a record, or person, over all planned rounds
    delta: float
    silos: dict[str, OfSilo]
    training: LowerBound | None  # of ε, by gradients that are canaries, through the private training itself

    @property
    def broken(self) -> list[str]:
        """Promises that are shown not to hold."""
        if self.claimed is None:
            return []
        shown = {f"silo {silo}: its canaries": found.shown for silo, found in self.silos.items()} | {"private training": self.training}
        return [
            f"{who} show epsilon {b.epsilon:.3g}, {self.claimed:g} is claimed" for who, b in shown.items() if b and b.epsilon > self.claimed
        ]


def measure(federation: Federation, silos: list[str], *, most: int = 500, canaries: int = 1000, confidence: float = 0.95) -> Leakage:
    """Of the model that would be exported.

    Args:
        silos: to look into; their shards must be on this machine.
        most: examples of each kind that losses are taken of.
        canaries: gradients that private training is audited by; 0: not at all.

    Raises:
        RefusedError: no round is committed.
        FederationError: a silo's shards are not here.
    """
    from silotune.components import best_global
    from silotune.components.rounds import Rounds

    rounds = Rounds.of(federation)
    latest = rounds.latest()
    if latest is None or latest.round == 0:
        raise RefusedError("no round is trained yet, so that there is nothing to get anything out of; run the federation first")
    commit = rounds.commit(best_global.best_round(rounds) if federation.export.select == "best" else latest.round)
    terms = federation.privacy_agreed
    delta = terms.delta if terms.of_records else DELTA
    found = {silo: _Probe(federation, rounds, federation.silo(silo), most).all(commit, delta, confidence) for silo in silos}
    return Leakage(
        federation=federation.name, round=commit.round, outgoing=commit.outgoing, claimed=terms.epsilon, delta=delta, silos=found,
        training=_training(federation, silos, canaries, confidence) if terms.of_records and canaries else None,
    )  # fmt: skip


def _training(federation: Federation, silos: list[str], canaries: int, confidence: float) -> LowerBound:
    """Of all planned rounds as one training, with the noise of the silo that has the fewest units: it draws each the most often, and shows the most."""
    from silotune.components.learning.leakage.gradient_canaries import audit_training
    from silotune.components.learning.privacy.accounting import round_mechanism
    from silotune.components.learning.privacy.private_gradient import Private
    from silotune.components.silo_job import silo_home
    from silotune.components.train.order import open_split

    terms = federation.privacy_agreed
    counts = {s: open_split(silo_home(federation, federation.silo(s)), "train").unit_count for s in silos}
    silo = min(counts, key=lambda s: (counts[s], s))
    training = federation.training.model_copy(update=federation.silo(silo).training.model_dump(exclude_none=True))
    mechanism = round_mechanism(terms, training, counts[silo])
    whole = mechanism.model_copy(update={"steps": mechanism.steps * (terms.rounds or 1)})
    coins = np.frombuffer(secrets.token_bytes(canaries), np.uint8) % 2 == 1
    return audit_training(Private(whole, terms.clip, terms.clipping, secrets.token_bytes(32)), canaries, terms.delta, coins, confidence)


class _Probe:
    """One silo's measurements."""

    def __init__(self, federation: Federation, rounds: Rounds, silo: Silo, most: int) -> None:
        from silotune.components import base_model
        from silotune.components.learning import model as models
        from silotune.components.learning.leakage.canaries import planted
        from silotune.components.preprocess.step import CANARIES
        from silotune.components.silo_job import silo_home
        from silotune.components.train.order import open_split

        self.federation, self.rounds, self.silo, self.most = federation, rounds, silo, most
        home = silo_home(federation, silo)
        self.train, self.others = open_split(home, "train"), open_split(home, "test" if silo.test else "valid")
        self.planted = planted(home, silo.canaries) if silo.canaries else None
        self.secrets = open_split(home, CANARIES) if silo.canaries else None
        self.base = base_model.resolve(federation.model.base, federation.work / "base")
        self.pad = models.pad_id(models.load_tokenizer(self.base.folder))
        self.records = len(self.train) - (len(self.planted.included) if self.planted else 0)  # canaries are the last examples of a shard

    def all(self, commit: Commit, delta: float, confidence: float) -> OfSilo:
        before = self._model(self.rounds.commit(0).outgoing)
        members, others = self._some(self._trained(0, self._cursor(commit))), self._some(np.arange(len(self.others)))
        base = [self._losses(before, shard, chosen) for shard, chosen in ((self.train, members), (self.others, others))]
        after = self._model(commit.outgoing)
        final = [self._losses(after, shard, chosen) for shard, chosen in ((self.train, members), (self.others, others))]
        out = [comes_out(after, shard, chosen[:ASKED]) for shard, chosen in ((self.train, members), (self.others, others))]
        known, shown = self._canaries(after, delta, confidence)
        update, why = self._update(commit)
        return OfSilo(
            membership=attack(calibrated(base[0], final[0]), calibrated(base[1], final[1])), extraction=extraction(out[0], out[1]), exposure=known,
            shown=shown, update=update, no_update=why,
        )  # fmt: skip

    def _losses(self, model: Any, shard: Shard, chosen: np.ndarray) -> np.ndarray:
        """Per target token: what is long is not hard for that."""
        from silotune.components.learning.leakage.losses import example_losses

        found = example_losses(model, shard, chosen, self.pad)
        return np.nan_to_num(found / [int(shard.example(int(i))[1].sum()) for i in chosen], nan=1e6, posinf=1e6)

    def _canaries(self, model: Any, delta: float, confidence: float) -> tuple[Exposure | None, LowerBound | None]:
        from silotune.components.learning.leakage.losses import example_losses

        if self.planted is None or self.secrets is None or not self.planted.coins.any():
            return None, None
        losses = np.nan_to_num(example_losses(model, self.secrets, np.arange(len(self.secrets)), self.pad), nan=1e6)
        coins, shown = self.planted.coins, None
        if len(coins) >= LEAST_GUESSES:
            shown = lower_bound(-losses[: len(coins)], coins, delta, confidence)
        return exposure(losses[self.planted.into], losses[self.planted.out]), shown

    def _update(self, commit: Commit) -> tuple[OfUpdate | None, str]:
        """Of the newest round, up to the one that is looked at, whose update the store holds."""
        from silotune.components.learning.leakage.losses import alignments
        from silotune.components.learning.tensor_file import open_tensor_file
        from silotune.components.store.object_store import ObjectMissing

        if self.federation.privacy.secure_aggregation is not None:
            return None, "nobody has seen it: it was summed securely"
        made = next((c for n in range(commit.round, 0, -1) if self.silo.id in (c := self.rounds.commit(n)).contributions), None)
        if made is None or made.incoming is None:
            return None, "it has sent none"
        part, state = made.contributions[self.silo.id], self._state(made.incoming)
        try:
            with tempfile.TemporaryDirectory(dir=self.federation.work) as folder:
                update = open_tensor_file(self.rounds.fetch_object(part.object, Path(folder) / "update", self.silo.id)).read_all()
        except ObjectMissing:
            return None, "it was erased"
        if any(name in state and state[name].shape != array.shape for name, array in update.items()):
            return None, "its rank is not the global's"
        plan = self.rounds.plan(made.round)
        assert plan is not None
        members = self._some(self._trained(plan.participants[self.silo.id].cursor, part.cursor))
        others = self._some(np.arange(len(self.others)))
        incoming = self._model(made.incoming)
        base = [self._losses(incoming, shard, chosen) for shard, chosen in ((self.train, members), (self.others, others))]
        angles = [alignments(incoming, s, chosen[:ASKED], self.pad, update) for s, chosen in ((self.train, members), (self.others, others))]
        moved = self._model_of({n: a + update[n] if n in update else a for n, a in state.items()})
        final = [self._losses(moved, shard, chosen) for shard, chosen in ((self.train, members), (self.others, others))]
        known, _ = self._canaries(moved, DELTA, 0.95)
        found = OfUpdate(
            round=made.round,
            membership=attack(calibrated(base[0], final[0]), calibrated(base[1], final[1])),
            alignment=attack(angles[0], angles[1]),
            exposure=known,
        )
        return found, ""

    def _cursor(self, commit: Commit) -> int:
        """How much of its stream the silo had gone through when a global was made."""
        return max(
            (c.cursor for n in range(1, commit.round + 1) if (c := self.rounds.commit(n).contributions.get(self.silo.id))), default=0
        )

    def _trained(self, start: int, stop: int) -> np.ndarray:
        """Records of a stretch of the stream; all, where a secret decides who is drawn."""
        from silotune.components.learning.batches import stream

        if self.federation.privacy.of_records or stop <= start:
            return np.arange(self.records)
        seed = (self.federation.name, self.federation.training.seed, self.silo.id)
        seen = np.unique(stream(len(self.train), start, min(stop - start, 4 * len(self.train)), *seed))
        return seen[seen < self.records]

    def _some(self, indices: np.ndarray) -> np.ndarray:
        """At most so many as are asked for, at random, but the same each time."""
        if not len(indices):
            raise FederationError(f"silo {self.silo.id!r}: has no record to measure by; give it a test or valid file")
        return np.random.default_rng(0).permutation(indices)[: self.most]

    def _state(self, outgoing: str) -> dict[str, np.ndarray]:
        from silotune.components.learning.tensor_file import open_tensor_file

        with tempfile.TemporaryDirectory(dir=self.federation.work) as folder:
            return open_tensor_file(self.rounds.fetch_object(outgoing, Path(folder) / "global")).read_all()

    def _model(self, outgoing: str) -> Any:
        return self._model_of(self._state(outgoing))

    def _model_of(self, state: dict[str, np.ndarray]) -> Any:
        from silotune.components.learning import model as models

        latest = self.rounds.latest()
        assert latest is not None
        return models.load_with_state(self.base.folder, self.rounds.agreement(latest.agreement).model, state)
