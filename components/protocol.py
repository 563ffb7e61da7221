"""The facts of the protocol: what silos and coordinator tell each other, each a frozen, validated object with one encode and one decode.

They are small, they lie in the store as canonical JSON under keys of their own (see `rounds`), and each is signed by whom it is of. Only the
`Turn` is no record: it is what a pipeline hands from box to box.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import Field, ValidationError

from silotune.components.errors import RefusedError
from silotune.components.federation import canonical_json
from silotune.components.federation_file import COORDINATOR
from silotune.components.terms.section import Section

Status = Literal["ok", "failed", "refused", "late"]
Split = Literal["valid", "test"]


class Record(Section):
    """A small fact in the store: one encode, one decode, one digest, one signature over all but itself."""

    format: Literal[1] = 1
    signature: str | None = None

    @property
    def signer(self) -> tuple[str, int | None]:
        """The party that must sign it, and the round that its key must be good for."""
        return COORDINATOR, getattr(self, "round", None)

    def message(self, key: str) -> bytes:
        """What is signed: what it is and where it stands, then all that it says."""
        body = self.model_copy(update={"signature": None}).encode()
        return f"silotune {type(self).__name__} 1\n{key}\n".encode() + body

    def encode(self) -> bytes:
        return canonical_json(self.model_dump())

    @classmethod
    def decode(cls, data: bytes, key: str) -> Self:
        """Raises RefusedError where the bytes are no such record, or not in the one way to write it."""
        try:
            record = cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(p) for p in first["loc"])
            raise RefusedError(
                f"{key}: not a valid {cls.__name__} record: {where}: {first['msg']}; the object was altered or is newer"
            ) from None
        if record.encode() != data:
            raise RefusedError(f"{key}: not a valid {cls.__name__} record: its JSON is not canonical; the object was altered")
        return record

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.encode()).hexdigest()


class Participant(Section):
    """What a plan asks of one silo."""

    tensors: str = Field(description="Digest of the object that lists the exact tensors (name -> shape) of its update.")
    cursor: int = Field(
        ge=0, description="Training examples this silo has consumed in committed rounds; its data stream goes on from here."
    )


class Plan(Record):
    """An open round: everything a silo needs to know and an aggregator will insist on."""

    round: int = Field(ge=1)
    agreement: str
    base: str = Field(description="Digest of the base model.")
    incoming: str = Field(description="Digest of the global model that training starts from.")
    tensors: str = Field(description="Digest of the object that lists what silos may train: tensor name -> shape in the global.")
    accepted: list[tuple[int, str]] = Field(description="Pairs (round, global) that an update may answer.")
    participants: dict[str, Participant]
    learning_rate: float
    server_state: dict[str, str] = Field(default_factory=dict, description="Of the commit before: what some strategies' silos need of it.")
    code: str = Field(description="Version of silotune that opened the round.")
    image: str | None = None


class OfSilo(Record):
    """A record that a silo signs."""

    silo: str
    round: int

    @property
    def signer(self) -> tuple[str, int | None]:
        return self.silo, self.round


class Attempt(Record):
    """One try at an open round."""

    round: int
    attempt: int = Field(ge=1)
    asked: list[str]
    missing: dict[str, str] = Field(default_factory=dict, description="Participants left out of this try before it began, and why.")
    at: float = Field(description="Unix time in seconds.")


class Report(OfSilo):
    """How one silo's work in one attempt ended. ``reason`` is from a fixed vocabulary; never record text."""

    SCALARS: ClassVar[frozenset[str]] = frozenset(
        {"steps", "examples", "tokens", "loss", "seconds", "bytes_down", "bytes_up", "epsilon", "delta"}
    )

    attempt: int
    status: Status
    reason: str = Field("", max_length=200)
    numbers: dict[str, float] = Field(default_factory=dict)

    @property
    def text(self) -> str:
        return f"{self.status}: {self.reason}" if self.reason else self.status


class UpdateManifest(OfSilo):
    """Names an update file and repeats what its header says."""

    agreement: str
    plan: str
    incoming: str
    object: str = Field(description="SHA-256 of the update file.")
    header: str = Field(description="SHA-256 of the file up to its tensors, whose own digests it holds.")
    bytes: int
    examples: int = Field(ge=1)
    tokens: int = Field(ge=1, description="Target tokens; of a private training its examples again, whose expected number is public.")
    steps: int = Field(ge=1)
    cursor: int = Field(ge=1, description="Examples consumed after this round.")
    codec: str
    norm: float = Field(ge=0, description="L2 norm over all tensors of the update.")
    loss: float | None = Field(description="Mean training loss per token over the round; null of a private training.")


class Refusal(Record):
    """An update that was not let in. The silo may deliver another one."""

    round: int
    silo: str
    manifest: str = Field(description="SHA-256 of the manifest's bytes.")
    rule: str = Field(description="The rule that it broke.")
    resend: bool = Field(description="Its bytes were damaged on the way or in the store: the same ones, sent again, will do.")
    at: float


class Summand(Section):
    """A silo's part in a partial sum."""

    manifest: str
    weight: float = Field(gt=0, description="What its update was multiplied by.")
    norm: float


class Partial(Record):
    """The sum of one group's updates, made ahead of the mean. It holds for exactly these manifests, and no longer than they stand."""

    round: int = Field(ge=1)
    attempt: int = Field(ge=1)
    group: int = Field(ge=1, description="Place among the groups of the plan, from 1.")
    object: str = Field(description="SHA-256 of the tensor file.")
    silos: dict[str, Summand]
    refused: dict[str, str] = Field(default_factory=dict, description="Silos whose updates were refused while it was made, and the rule.")
    at: float


class Release(Record):
    """A sum that is published with silo-level noise; spent from here on. (Docs: `aggregate.releases`.)"""

    round: int = Field(ge=1)
    number: int = Field(ge=1, description="Among all releases of the federation.")
    plan: str
    silos: dict[str, str] = Field(description="Silo -> digest of the update that is in the sum.")
    mechanism: Literal["gaussian", "tree"]
    tree: str = Field(description="Name of the tree of noise that it belongs to; empty without.")
    leaf: int = Field(ge=0, description="Its place in that tree, from 1; 0 without.")
    noise_multiplier: float = Field(gt=0)
    mu_squared: float = Field(gt=0, description="What it adds to the square of the Gaussian mechanism that all releases together are.")
    epsilon: float = Field(description="Spent by all releases up to this one.")
    delta: float
    at: float


class Contribution(Section):
    """A silo's part in a commit."""

    manifest: str
    object: str
    bytes: int
    weight: float = Field(ge=0, description="Share of the step; 0 of a silo that a robust rule has left out.")
    examples: int
    tokens: int
    steps: int
    cursor: int
    norm: float | None = Field(description="L2 norm of the update; null where nobody has seen it alone, or silo-level privacy keeps it.")
    score: float | None = Field(None, description="What a robust rule judged it by.")
    told: str = Field("", description="Why it was left out or scaled down.")


class Spectrum(Section):
    """What the mean products of all adapted modules look like together."""

    residual: float = Field(description="Share of their energy that the global's rank does not hold.")
    effective_rank: float = Field(description="Of what the global holds: as many singular values as its rank. Mean over modules.")
    least_effective_rank: float
    values: list[float] = Field(
        description="Singular values, each module's scaled to 1 in energy, their mean over modules; also those that the global's rank cannot hold."
    )


class Commit(Record):
    """A round that happened."""

    round: int = Field(ge=0)
    outcome: Literal["initialized", "aggregated", "skipped", "rolled-back", "amended"]
    custody: Literal["parties", "local", "none"] = Field(description="Who held the private keys when it was written.")
    agreement: str
    plan: str | None
    attempt: int
    contributions: dict[str, Contribution]
    missing: dict[str, str]
    previous: str | None = Field(description="Digest of the commit before.")
    incoming: str | None
    outgoing: str = Field(description="Digest of the next global model.")
    back_to: int | None = Field(None, description="The round whose global is the next one, where this round was rolled back.")
    best: int = Field(description="The round with the lowest pooled validation loss, among those judged by now.")
    learning_rate: float = Field(0.0, description="Peak rate that the updates were trained with.")
    guards: dict[str, float] = Field(default_factory=dict, description="What was checked before it was written, with the values found.")
    server_state: dict[str, str] = Field(default_factory=dict, description="What aggregation carries on: name -> digest of the object.")
    spent: dict[str, int] = Field(
        default_factory=dict,
        description="Data cursors of silos whose part was in a secure sum that came to nothing: they go on from there.",
    )
    spectrum: Spectrum | None = Field(None, description="Of the mean of LoRA's products, where the strategy makes it.")
    converged: bool = False
    bytes_up: int = 0
    bytes_down: int = 0
    started: float
    at: float

    @property
    def counts(self) -> bool:
        """Whether it is one of the federation's ``rounds.total``."""
        return self.outcome in ("aggregated", "skipped", "rolled-back")

    @property
    def made_global(self) -> bool:
        """Whether its outgoing global is a new one."""
        return self.outcome in ("initialized", "aggregated")


class Evaluation(OfSilo):
    """How one global model does on one split of one silo; sums, so that pooling is exact. ``round`` is the one it was scored in."""

    outgoing: str = Field(description="Digest of the global model.")
    split: Split
    split_digest: str
    examples: int
    tokens: int = Field(ge=1)
    loss_sum: float | None = Field(description="Cross entropy in nats, summed over response tokens; null where it is not finite.")
    correct: int = Field(description="Response tokens whose most likely prediction is right.")
    at: float

    @property
    def loss(self) -> float:
        """Nats per token; infinite where the global does not give finite ones."""
        return math.inf if self.loss_sum is None else self.loss_sum / self.tokens


class Exposed(OfSilo):
    """How well one global model knows what one silo has planted; a fact of the model and of made-up records, and of no other."""

    outgoing: str = Field(description="Digest of the global model.")
    planted: str = Field(description="Digest of the silo's canaries.")
    canaries: int = Field(ge=1, description="That were trained on.")
    references: int = Field(ge=1, description="That were not.")
    exposure: float = Field(ge=0, allow_inf_nan=False, description="Mean over the canaries, bits.")
    at: float


class Exported(Record):
    """Where a trained model was put."""

    commit: str
    round: int
    outgoing: str
    location: str
    files: dict[str, str] = Field(description="Relative name -> SHA-256.")


class TrackingRun(Record):
    """The MLflow run that shows this federation."""

    experiment: str
    run: str


@dataclass(frozen=True)
class Turn:
    """What a pipeline hands from box to box: which round is open, or why none is. Short text, since it travels as a parameter."""

    round: int = 0
    attempt: int = 0
    done: str = ""

    @property
    def text(self) -> str:
        return f"done:{self.done}" if self.done else f"round:{self.round} attempt:{self.attempt}"

    @classmethod
    def parse(cls, text: str) -> Turn:
        if text.startswith("done:"):
            return cls(done=text.removeprefix("done:"))
        if match := re.fullmatch(r"round:(\d+) attempt:(\d+)", text):
            return cls(int(match[1]), int(match[2]))
        raise RefusedError(f"turn must read 'round:N attempt:K' or 'done:WHY', got {text!r}")


def pooled(evaluations: dict[str, Evaluation]) -> dict[str, float]:
    """Metrics over all silos, pooled by tokens: loss in nats per token, perplexity, token accuracy in [0, 1]; empty without evaluations."""
    tokens = sum(e.tokens for e in evaluations.values())
    if not tokens:
        return {}
    sums = [e.loss_sum for e in evaluations.values()]
    loss = math.inf if None in sums else sum(x for x in sums if x is not None) / tokens
    return {"loss": loss, "perplexity": perplexity(loss), "token_accuracy": sum(e.correct for e in evaluations.values()) / tokens}


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows a float."""
    return math.exp(loss) if loss < 709 else math.inf
