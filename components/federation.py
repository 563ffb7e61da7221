"""The agreement: one YAML file that says who takes part, on what model, under which terms.

`Federation.load` turns the file into frozen, validated objects, or raises one `FederationError` that lists *every* problem with its path
in the file (``silos[1].train``), the value got and the cure. Paths become absolute, relative ones from the file's folder; ``${NAME}`` and
``${NAME:-default}`` are taken from the environment in paths and endpoints only. Secrets never stand in the file.

The `Agreement` is the part of it that silos consent to; its SHA-256 names it everywhere. Three kinds of edit follow from it:

    free            paths, storage, tracking, round counts: at any time
    an amendment    silos, training, data terms, aggregation, codec, privacy: from the next open round on
    a new federation: base model, method, adapter shape: needs another name or another storage root

This module imports nothing heavy: `silotune check` and every pipeline task start with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from silotune.components import federation_file
from silotune.components.errors import FederationError
from silotune.components.federation_file import COORDINATOR
from silotune.components.terms.placement import Coordinator, Placement
from silotune.components.terms.privacy import Privacy
from silotune.components.terms.rounds import Quorum, Rounds, seconds
from silotune.components.terms.section import Positive, Section
from silotune.components.terms.security import PublicKey, Security
from silotune.components.terms.storage import Storage, Tracking
from silotune.components.terms.strategies import Aggregation, chosen
from silotune.components.terms.training import Data, Model, SiloLora, SiloTraining, Training

SILO_ID = r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$"

WORK_VARIABLE = "SILOTUNE_WORK"


class Silo(Section):
    """One organisation, and where *it* keeps its records. Its paths are read on its side only."""

    id: str = Field(pattern=SILO_ID, description="Lower-case letters, digits and inner dashes, 40 at most.")
    train: str = Field(description="jsonl, csv, tsv, parquet or txt, a folder of such files, or `s3://` with one of these.")
    valid: str | None = Field(None, description="Steers the run (convergence, best round). Default: a seeded part of train.")
    test: str | None = Field(None, description="Read by the evaluate box only.")
    fields: dict[str, str] = Field(default_factory=dict, description="Its own names of columns, before `data.fields`.")
    storage: str = Field("", description="The silo's own folder: token shards, logs. Default `.silotune-private/<id>`.")
    canaries: Annotated[int, Field(ge=0, le=10_000)] = Field(
        0, description="Made-up records, of which a random half is trained on; by them it is measured what the model remembers. 30 will do."
    )
    training: SiloTraining = Field(default_factory=SiloTraining, description="Overrides for this silo.")
    lora: SiloLora = Field(default_factory=SiloLora, description="Its own rank, for a silo with less memory or bandwidth.")
    placement: Placement = Field(default_factory=Placement, description="Kubernetes only: what its work needs from the cluster.")


class Evaluation(Section):
    """How the global model is judged in each silo."""

    max_examples: Positive | None = Field(
        None, description="At most so many valid examples per silo, chosen by seed; default: all. Test is always scored whole."
    )
    batch_size: Positive = Field(16, description="Examples per forward pass.")


class Export(Section):
    """What comes out."""

    select: Literal["best", "last"] = Field("best", description="The round with the best pooled validation loss, or the last one.")
    merge: bool = Field(False, description="Merge LoRA adapters into the base and export a full model.")
    max_exposure: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Bits of a canary's secret, on average in any silo, above which no model is exported; chance gives 1.44. Needs silos with "
        "`canaries`, all of which must have measured it.",
    )


class Communication(Section):
    """What updates look like on the wire."""

    codec: Literal["float32", "bfloat16"] = Field("float32", description="Number format of update tensors; bfloat16 halves the bytes.")


class Federation(Section):
    """A whole federation file. `Federation.load` reads one."""

    name: str = Field(pattern=SILO_ID, description="Names the federation in the store and in MLflow.")
    model: Model
    data: Data = Field(default_factory=Data)
    silos: list[Silo] = Field(min_length=1, description="The organisations that take part.")
    launcher: Literal["job", "pod"] = Field(
        "job",
        description="Kubernetes only: `job` runs a silo's work as a Job in its own namespace, `pod` in the pipeline's own task, for trials.",
    )
    coordinator_image: str | None = Field(
        None,
        description="Kubernetes only: image of the coordinator's boxes and of launchers, by digest: `registry/silotune-coordinator@sha256:…`.",
    )
    model_image: str | None = Field(
        None,
        description="Kubernetes only: image of initialize and export, which need PyTorch, by digest: `registry/silotune-silo@sha256:…`; "
        "default: `coordinator_image`.",
    )
    coordinator: Coordinator = Field(
        default_factory=Coordinator, description="Kubernetes only: what the coordinator's own boxes need from the cluster."
    )
    rounds: Rounds = Field(default_factory=Rounds)
    training: Training = Field(default_factory=Training)
    aggregation: Aggregation = Field(default_factory=Aggregation)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    export: Export = Field(default_factory=Export)
    communication: Communication = Field(default_factory=Communication)
    privacy: Privacy = Field(default_factory=Privacy)
    storage: Storage = Field(default_factory=Storage)
    tracking: Tracking = Field(default_factory=Tracking)
    security: Security = Field(default_factory=Security)
    _file: Path = PrivateAttr(default=Path("federation.yaml"))

    @model_validator(mode="before")
    @classmethod
    def _has_a_strategy(cls, raw: Any) -> Any:
        """The default follows from other parts of the file."""
        if isinstance(raw, dict) and isinstance(terms := raw.get("aggregation", {}), dict):
            return raw | {"aggregation": terms | {"strategy": chosen(raw)}}
        return raw

    @classmethod
    def load(cls, file: str | Path, *, check_files: bool = False) -> Federation:
        """Read, resolve and validate a federation file.

        Args:
            file: the YAML file.
            check_files: also require that every local file and folder it names exists (the coordinator of a
                cluster cannot see the silos' files, so only commands on one machine ask for it).

        Raises:
            FederationError: with every problem found.
        """
        path = Path(file).absolute()
        raw = federation_file.parse(path)
        problems: list[str] = []
        federation_file.resolve(raw, path.parent, problems)
        federation = None
        try:
            federation = cls.model_validate(raw)
        except ValidationError as error:
            problems += [federation_file.explain(e, cls) for e in error.errors(include_url=False)]
        problems += federation_file.contradictions(raw)
        if check_files:
            problems += federation_file.missing_files(raw)
        if problems or federation is None:
            count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            raise FederationError("\n".join([f"{path.name}: {count}", *(f"  {p}" for p in problems)]))
        federation._file = path
        return federation

    @property
    def file(self) -> Path:
        return self._file

    @property
    def work(self) -> Path:
        """The coordinator's own folder on this machine: run logs, caches, by default also store and tracking.

        Beside the federation file, or where SILOTUNE_WORK says: in a pod the file lies in a mounted ConfigMap, which nobody can write to.
        """
        return Path(os.environ.get(WORK_VARIABLE) or self._file.parent / ".silotune")

    @property
    def silo_ids(self) -> list[str]:
        return sorted(s.id for s in self.silos)

    @property
    def quorum(self) -> Quorum:
        """What makes a round; by default more than half of the silos."""
        return self.rounds.quorum or Quorum(count=len(self.silos) // 2 + 1)

    @property
    def deadline_seconds(self) -> float | None:
        return seconds(self.rounds.deadline)

    @property
    def stall_seconds(self) -> float | None:
        return seconds(self.rounds.stall)

    @property
    def custody(self) -> Literal["parties", "local", "none"]:
        """Who holds the private keys: each party its own, this machine all of them, or nobody, since nothing is signed."""
        if not self.security.signing:
            return "none"
        return "parties" if self.security.keys else "local"

    def key_folder(self, party: str) -> Path:
        """Where a party's private key lies on its own machine."""
        return (self.work if party == COORDINATOR else Path(self.silo(party).storage)) / "keys"

    @property
    def public_keys(self) -> dict[str, list[PublicKey]]:
        """Of every party that has any: those of the file, or those that were made on this machine. In local custody, one file is read for each."""
        if self.custody != "local":
            return dict(self.security.keys) if self.security.signing else {}
        return {party: found for party in (COORDINATOR, *self.silo_ids) if (found := self.public_keys_of(party))}

    def public_keys_of(self, party: str) -> list[PublicKey]:
        """Of one party; none of one that has none, or that is not in the federation."""
        if self.custody != "local":
            return list(self.security.keys.get(party, [])) if self.security.signing else []
        with contextlib.suppress(OSError, ValueError, FederationError):  # a party without a sound key cannot take part, and is told so
            return [PublicKey(public=(self.key_folder(party) / f"{party}.pub").read_text().strip())]
        return []

    def fields_of(self, silo: Silo) -> dict[str, str]:
        """Field -> column where a silo's files name it otherwise."""
        return self.data.fields | silo.fields

    def silo(self, silo_id: str) -> Silo:
        for silo in self.silos:
            if silo.id == silo_id:
                return silo
        raise FederationError(f"silo {silo_id!r} is not in federation {self.name!r}; it has {', '.join(self.silo_ids)}")

    @property
    def privacy_agreed(self) -> Privacy:
        """The terms of privacy with the rounds that they are planned for, which noise follows from."""
        planned = self.privacy.of_records or self.privacy.silo is not None
        return self.privacy.model_copy(update={"rounds": self.privacy.rounds or self.rounds.total}) if planned else self.privacy

    def agreement(self, base: str, tokenizer: str) -> Agreement:
        """The terms of this file for a base model of content digest ``base`` and tokenizer digest ``tokenizer``."""
        model = self.model.model_dump(exclude={"base"})
        if self.model.method == "full":
            model.pop("lora")
        return Agreement(
            federation=self.name,
            base=base,
            tokenizer=tokenizer,
            model=model,
            data=self.data.model_dump(exclude={"fields"}),
            silos={s.id: _own_terms(s) for s in sorted(self.silos, key=lambda s: s.id)},
            training=self.training,
            aggregation=self.aggregation,
            evaluation=self.evaluation,
            communication=self.communication,
            privacy=self.privacy_agreed,
            custody=self.custody,
            keys=self.public_keys,
        )


class Agreement(Section):
    """What the silos agree on; the digest of its canonical JSON names it in plans, updates and commits."""

    format: Literal[1] = 1
    federation: str
    base: str = Field(description="SHA-256 over the base model's files.")
    tokenizer: str = Field(description="SHA-256 over the tokenizer's files.")
    model: dict[str, Any]
    data: dict[str, Any]
    silos: dict[str, dict[str, Any]]
    training: Training
    aggregation: Aggregation
    evaluation: Evaluation
    communication: Communication
    privacy: Privacy
    custody: Literal["parties", "local", "none"]
    keys: dict[str, list[PublicKey]]

    def encode(self) -> bytes:
        return canonical_json(self.model_dump())

    @classmethod
    def decode(cls, data: bytes) -> Agreement:
        return cls.model_validate_json(data)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.encode()).hexdigest()

    def training_of(self, silo_id: str) -> Training:
        """Training terms of one silo: the federation's with the silo's own overrides."""
        return self.training.model_copy(update=self.silos[silo_id]["training"])

    def examples_of(self, silo_id: str) -> int:
        """What one silo is asked to train on in a round."""
        terms = self.training_of(silo_id)
        return terms.steps * terms.batch_size

    @property
    def parts(self) -> dict[str, float]:
        """Each silo's part in a mean over all of them, whoever delivers; they add up to 1. By examples asked for, where those are what counts."""
        alike = self.aggregation.weighs_alike
        counts = {silo: 1 if alike else self.examples_of(silo) for silo in sorted(self.silos)}
        total = sum(counts.values())
        return {silo: count / total for silo, count in counts.items()}

    def rank_of(self, silo_id: str) -> int:
        """Rank of the adapters that one silo trains; 0 where all weights are trained."""
        if self.model["method"] == "full":
            return 0
        return int(self.silos[silo_id].get("lora", {}).get("r", self.model["lora"]["r"]))

    def changes(self, new: Agreement) -> list[str]:
        """Paths of all terms in which ``new`` differs, such as ``training.learning_rate``."""
        return list(_differences(self.model_dump(), new.model_dump(), ""))

    def forbids(self, new: Agreement) -> list[str]:
        """The changes among these that make a new federation rather than an amendment: base, tokenizer and the global's tensors."""
        fixed = {"federation", "base", "tokenizer", "model", "format"}
        cored = {terms.aggregation.strategy == "fed-sb" for terms in (self, new)}  # only its globals hold cores, and all of them do
        return [c for c in self.changes(new) if c.split(".")[0] in fixed or (c == "aggregation.strategy" and len(cored) > 1)]


def _own_terms(silo: Silo) -> dict[str, Any]:
    """What a silo does otherwise than the others, as far as it is agreed on."""
    lora = silo.lora.model_dump(exclude_none=True)
    return {"training": silo.training.model_dump(exclude_none=True)} | ({"lora": lora} if lora else {})


def canonical_json(value: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces, UTF-8, no NaN (ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def json_schema() -> dict[str, Any]:
    """JSON Schema of the federation file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Federation.model_json_schema()}


def _differences(old: Any, new: Any, where: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        yield where
