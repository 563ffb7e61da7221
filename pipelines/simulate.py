"""The Python door: a federation in one process, for notebooks, experiments and comparisons.

    from silotune.pipelines.simulate import Simulation

    simulation = Simulation("federation.yaml")
    for result in simulation.run(rounds=5):
        print(result.round, result.loss, result.silos, result.missing)
    model, tokenizer = simulation.model()

It calls the very steps that the pipeline's boxes call, on the same store, so that a run begun here can go on with `silotune run` and gives
the same bytes; only processes and KFP are left out. Because all records lie on one machine, it can also answer what a federation cannot ask:
how each silo would do alone, and how one model on all records would do.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from silotune.components import base_model, best_global
from silotune.components.aggregate import step as aggregate
from silotune.components.combine import step as combine
from silotune.components.confirm import step as confirm
from silotune.components.errors import RefusedError, SilotuneError, UnreachableError
from silotune.components.evaluate import step as evaluate
from silotune.components.export import step as export
from silotune.components.federation import Federation
from silotune.components.initialize import step as initialize
from silotune.components.learning import model as models
from silotune.components.learning.evaluation import Score, chosen
from silotune.components.learning.evaluation import evaluate as score
from silotune.components.learning.records import read_records
from silotune.components.learning.tensor_file import open_tensor_file
from silotune.components.mask import step as mask
from silotune.components.muster import step as muster
from silotune.components.preprocess import step as preprocess
from silotune.components.process.progress import tell
from silotune.components.protocol import Commit, Turn, pooled
from silotune.components.rounds import Rounds
from silotune.components.share import step as share
from silotune.components.silo_job import silo_home, status_text
from silotune.components.steward.policy import Policy
from silotune.components.terms.training import FIELDS
from silotune.components.train import step as train
from silotune.components.unmask import step as unmask


@dataclass(frozen=True)
class RoundResult:
    """One committed round. Losses are nats per token on the silos' valid splits, of the global the round produced; NaN where no silo tells its own."""

    round: int
    loss: float
    perplexity: float
    silos: dict[str, float]  # silo -> loss
    missing: dict[str, str]  # silo -> why it is not in the round
    global_digest: str


@dataclass
class Simulation:
    """A federation file, worked on in this process."""

    file: Path | str
    statuses: list[str] = field(default_factory=list, init=False)
    details: dict[str, str] = field(default_factory=dict, init=False)  # silo -> full message of its first failure in this run

    def __post_init__(self) -> None:
        self.file = str(Path(self.file).absolute())
        self.federation = Federation.load(self.file, check_files=True)
        self.rounds = Rounds.of(self.federation)

    def run(self, rounds: int | None = None) -> Iterator[RoundResult]:
        """Work on up to ``rounds`` rounds (default: all that are left), and yield each as it is committed.

        Raises:
            QuorumError: too few silos delivered; the round stays open, and calling again asks the missing ones.
        """
        turn = self._begin()
        while not turn.done and (rounds is None or rounds > 0):
            with models.kept():
                trained = [self._attempt(train, silo, turn.text) for silo in self.federation.silo_ids]
                for number, _ in enumerate(self.federation.aggregation.groups(self.federation.silo_ids), 1):
                    self._combine(turn.text, str(number))
                if self.federation.privacy.secure_aggregation is not None:
                    trained += self._sum_securely(turn.text, trained)
                following = self._coordinate(aggregate, turn.text, *trained)
                yield self._result(turn.round)
            turn = Turn.parse(following)
            rounds = None if rounds is None else rounds - 1

    def results(self) -> list[RoundResult]:
        """All committed rounds so far, whoever ran them; round 0 is the initial model."""
        return [self._result(c.round) for c in self.rounds.commits() if c.made_global]

    def model(self, round_number: int | None = None) -> tuple[Any, Any]:
        """(model, tokenizer) with the global of a round; default: what `export` would choose."""
        commit = self._commit(round_number)
        base = self._base()
        state = self.rounds.fetch_object(commit.outgoing, self._work() / "global.safetensors")
        agreement = self.rounds.agreement(commit.agreement)
        return export.trained_model(agreement, base, state), models.load_tokenizer(base.folder)

    def test(self) -> dict[str, dict[str, float]]:
        """Evaluate base, best and last global on every silo's test split: {"base" | "best" | "last": {silo or "all": loss}}."""
        latest = self._commit_or_refuse()
        for silo in self.federation.silo_ids:
            evaluate.work(str(self.file), silo, "")
        named = {"base": 0, "best": best_global.best_round(self.rounds), "last": latest.round}
        table = {}
        for name, number in named.items():
            found = self.rounds.evaluations(self.rounds.commit(number).outgoing, "test")
            table[name] = {silo: e.loss for silo, e in sorted(found.items())} | {"all": pooled(found).get("loss", float("nan"))}
        return table

    def export(self) -> Path | str:
        """Write the chosen global as a loadable folder and return where it is."""
        where = export.work(str(self.file), Turn(done="exported by hand").text)
        return Path(where) if where.startswith("/") else where

    # What a federation cannot ask

    def alone(self, silo_id: str, *, rounds: int | None = None, **training: Any) -> Simulation:
        """The same work by one silo on its own records, with a store of its own.

        Args:
            rounds: instead of ``rounds.total``; 1, with as many more steps, for one uninterrupted training.
            training: overrides terms of that section.
        """
        silos = [s.model_dump() for s in self.federation.silos if s.id == silo_id]
        if not silos:
            self.federation.silo(silo_id)
        return self._baseline(f"alone-{silo_id}", silos, rounds, training)

    def centralised(self, *, rounds: int | None = None, **training: Any) -> Simulation:
        """One model on all silos' records, with as many steps as all silos together; arguments as for `alone`."""
        folder = self._work("centralised")
        own = {field: field for field in FIELDS[self.federation.data.format]}  # the pool's names, whatever the silos' files say
        pool: dict[str, Any] = {"id": "pooled", "storage": str(folder / "private"), "fields": own}
        for split in ("train", "valid", "test"):
            if all(getattr(s, split) for s in self.federation.silos):
                pool[split] = str(self._pool(folder / f"{split}.jsonl", split))
        steps = sum(s.training.steps or self.federation.training.steps for s in self.federation.silos)
        return self._baseline("centralised", [pool], rounds, {"steps": steps, **training})

    def unprotected(self, *, rounds: int | None = None) -> Simulation:
        """The same silos, strategy aside, without any promise of privacy, each with a folder of its own here: what privacy saves, and costs.

        Raises:
            RefusedError: a silo's policy lets its records be trained on with differential privacy only.
        """
        folder = self._work("unprotected")
        silos = [s.model_dump() | {"storage": str(folder / "private" / s.id)} for s in self.federation.silos]
        return self._baseline("unprotected", silos, rounds, {}, privacy={})

    def scores(self, split: str = "test", of: Simulation | None = None, round_number: int | None = None) -> dict[str, Score]:
        """Score a global of ``of`` (default: this federation) on *this* federation's silos; nothing is recorded."""
        source = of or self
        commit = source._commit(round_number)
        state = source.rounds.fetch_object(commit.outgoing, source._work() / "global.safetensors")
        base = self._base()
        agreement = source.rounds.agreement(commit.agreement)
        model = export.trained_model(agreement, base, state)
        pad = models.pad_id(models.load_tokenizer(base.folder))
        found = {}
        for silo in self.federation.silos:
            shard = train.open_split(silo_home(self.federation, silo), split)
            most = self.federation.evaluation.max_examples if split == "valid" else None
            indices = chosen(shard, most, agreement.federation, agreement.training.seed, silo.id, split)
            found[silo.id] = score(model, shard, indices, self.federation.evaluation.batch_size, self.federation.data.max_length, pad)
        return found

    # How

    def _begin(self) -> Turn:
        self.details.clear()
        self.statuses = [self._attempt(preprocess, silo) for silo in self.federation.silo_ids]
        return Turn.parse(self._coordinate(initialize, *self.statuses))

    def _attempt(self, step: Any, silo: str, *arguments: str) -> str:
        """A silo's failure is a value, here as in the pipeline."""
        try:
            return str(step.work(self.file, silo, *arguments))
        except SilotuneError as error:
            self.details.setdefault(silo, str(error))  # the first cause; what follows from it is no news
            return status_text(silo, "refused" if isinstance(error, RefusedError) else "failed", error.reason)

    def _coordinate(self, step: Any, *arguments: str) -> str:
        try:
            return str(step.work(self.file, *arguments))
        except SilotuneError as error:
            if self.details:
                error.args = ("\n".join([str(error), *(f"  {silo}: {detail}" for silo, detail in self.details.items())]),)
            raise

    def _sum_securely(self, turn: str, statuses: list[str]) -> list[str]:
        """Share, mask, confirm and unmask; returns the silos' statuses."""
        found: list[str] = []
        for stage, step in (("share", share), ("mask", mask), ("confirm", confirm), ("unmask", unmask)):
            going = self._coordinate(muster, turn, stage, *statuses, *found)
            if not Turn.parse(going).done:
                found += [self._attempt(step, silo, going) for silo in self.federation.silo_ids]
        return found

    def _combine(self, turn: str, group: str) -> None:
        """Where it fails, aggregate does the work, here as in the pipeline."""
        try:
            combine.work(str(self.file), turn, group)
        except UnreachableError:
            raise
        except SilotuneError as error:
            tell("combine", "warned", detail=str(error))

    def _result(self, number: int) -> RoundResult:
        commit = self.rounds.commit(number)
        agreement = self.rounds.agreement(commit.agreement)
        known = self.rounds.evaluations(commit.outgoing, "valid")
        base, model = self._base(), None
        pad = models.pad_id(models.load_tokenizer(base.folder))
        for silo in self.federation.silos:
            if silo.id in known or silo.id not in agreement.silos or silo.id in commit.missing:
                continue
            shard, most = train.open_split(silo_home(self.federation, silo), "valid"), agreement.evaluation.max_examples
            if (policy := Policy.of(self.federation, silo.id)) and not policy.scored(min(len(shard), most or len(shard))):
                continue
            if model is None:
                path = self.rounds.fetch_object(commit.outgoing, self._work() / "global.safetensors")
                model = models.load_with_state(base.folder, agreement.model, open_tensor_file(path).read_all())
            known[silo.id] = train.evaluate_split(self.rounds, agreement, model, commit.outgoing, shard, silo.id, "valid", pad, number)
        total = pooled(known)
        losses = {silo: e.loss for silo, e in sorted(known.items())}
        loss, spread = (total.get(name, math.nan) for name in ("loss", "perplexity"))
        return RoundResult(number, loss, spread, losses, commit.missing, commit.outgoing)

    def _commit(self, round_number: int | None) -> Commit:
        latest = self._commit_or_refuse()
        if round_number is None:
            round_number = best_global.best_round(self.rounds) if self.federation.export.select == "best" else latest.round
        return self.rounds.commit(round_number)

    def _commit_or_refuse(self) -> Commit:
        latest = self.rounds.latest()
        if latest is None:
            raise RefusedError("no round is committed yet; call run() first")
        return latest

    def _base(self) -> base_model.Base:
        return base_model.resolve(self.federation.model.base, self.federation.work / "base")

    def _work(self, name: str = "simulation") -> Path:
        folder = self.federation.work / "baselines" / name if name != "simulation" else self.federation.work
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _pool(self, target: Path, split: str) -> Path:
        with target.open("w", encoding="utf-8") as out:
            for silo in self.federation.silos:
                source, fields = getattr(silo, split), self.federation.fields_of(silo)
                for _, record in read_records(Path(source), self.federation.data.format, fields):
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
        return target

    def _baseline(
        self, name: str, silos: list[dict[str, Any]], rounds: int | None, training: dict[str, Any], privacy: dict[str, Any] | None = None
    ) -> Simulation:  # fmt: skip
        """A federation of other silos on the same model and terms, started afresh in a folder of its own."""
        folder = self._work(name)
        shutil.rmtree(folder / ".silotune", ignore_errors=True)
        terms = self.federation.model_dump()
        terms |= {"silos": [{k: v for k, v in s.items() if v is not None} for s in silos]}
        terms["aggregation"] = {"strategy": "fedavg", "weights": self.federation.aggregation.weights}  # of one silo: its own difference
        kept = self.federation.privacy.model_dump() | {"silo": None, "secure_aggregation": None}
        terms["privacy"] = kept if privacy is None else privacy
        for silo in terms["silos"]:
            if rank := (silo.pop("lora", None) or {}).get("r"):
                lora = terms["model"]["lora"]
                lora |= {"r": rank, "alpha": lora["alpha"] * rank / lora["r"]}
        terms["export"] |= {"max_exposure": None}
        terms["training"] |= training
        terms["rounds"] |= {"quorum": 1, "per_run": None} | ({"total": rounds} if rounds else {})
        terms |= {"storage": {"root": "./.silotune/store"}, "tracking": {"uri": "none"}, "security": {"signing": False}}
        if terms["data"]["fields"] and name == "centralised":
            terms["data"]["fields"] = {}
        for silo in terms["silos"]:
            silo["training"] = {k: v for k, v in silo.get("training", {}).items() if v is not None and k not in training}
        file = folder / "federation.yaml"
        file.write_text(yaml.safe_dump(terms), encoding="utf-8")
        made = Simulation(file)
        for silo_id in self.federation.silo_ids:
            policy = Policy.of(self.federation, silo_id)
            if policy and policy.private and not made.federation.privacy.of_records:
                raise RefusedError(
                    f"silo {silo_id!r}: its policy lets its records be trained on with differential privacy only, {name} does without; compare on "
                    "other records, or ask the silo's steward",
                    "policy: privacy",
                )
        return made
