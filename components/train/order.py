"""Order: one silo's local training of one round, written down for whichever processes do it.

All that a process needs besides this stands in the silo's own folder. It speaks to no store, and holds no key.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from silotune.components.errors import FederationError, SilotuneError
from silotune.components.learning.aggregation.summation import MEMORY
from silotune.components.learning.exchange import held, trained_names
from silotune.components.learning.local_term import LocalTerm
from silotune.components.learning.ranks import ALONE, Ranks
from silotune.components.process.progress import Pulse, beating
from silotune.components.silo_job import UNREADY, time_left
from silotune.components.terms.strategies import STRATEGIES, Strategy
from silotune.components.terms.training import Training
from silotune.components.train.private import PrivateTerms

if TYPE_CHECKING:
    from silotune.components.learning.evaluation import Score
    from silotune.components.learning.privacy.private_gradient import Private
    from silotune.components.learning.tokens import Shard
    from silotune.components.learning.training import Trained

INCOMING = "incoming.safetensors"  # in the silo's folder: the global model
CONTROL = "control.safetensors"  # in the silo's folder: what the local term is made of
NOTHING = np.zeros((), np.float32)
OWN, COMMON = "own.", "common."  # before its tensors' names: the silo's, and the federation's
CHECKPOINT = "checkpoint.safetensors"
OnScore = Callable[["Score"], None]


class Order(BaseModel):
    """What to train, on what, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    home: Path  # the silo's folder, which all its machines share
    base: Path  # folder of the base model
    base_digest: str
    silo: str
    round: int
    turn: int  # of what is trained in turns (see `exchange.trained_names`)
    federation: str  # as in the agreement; seeds
    model: dict[str, Any]  # the agreement's terms
    strategy: str
    rank: int  # of the adapters that this silo trains; 0 for full fine-tuning
    mu: float  # of the local term
    terms: Training
    learning_rate: float  # peak rate of the round
    max_length: int  # tokens
    pad: int
    cursor: int
    dropout_seed: int
    split_digests: dict[str, str]  # of train and valid
    score: tuple[int | None, int, int] | None  # of evaluation on valid: examples at most, batch size, seed; None: it has been done
    identity: str  # of the checkpoint
    every: int  # steps between checkpoints
    reserve: float  # seconds before the deadline that are kept for sending
    private: PrivateTerms | None  # of a training that is differentially private


def learn(order: Order, pulse: Pulse | None, on_score: OnScore, ranks: Ranks = ALONE) -> tuple[Trained, dict[str, np.ndarray]]:
    """Score the incoming global on valid where that is asked for, train it, and give what that added.

    Args:
        pulse: takes the heartbeats, where this process is to give any.
        on_score: called with the score before training begins; what it raises ends the work.
        ranks: the processes that do it together; only rank 0 is given what was added.

    Raises:
        NonFiniteLoss, OutOfMemory, RankLost, RanksDiffer: see `training.train`.
        FederationError: a split is not there.
    """
    import torch

    from silotune.components.learning import adapters, training
    from silotune.components.learning import model as models
    from silotune.components.learning.checkpoint import Checkpoint
    from silotune.components.learning.evaluation import chosen, evaluate
    from silotune.components.learning.tensor_file import open_tensor_file

    strategy = STRATEGIES[order.strategy]
    with beating("loading"):
        incoming = open_tensor_file(order.home / INCOMING).read_all()
        before, trained_here = held(incoming, order.rank), trained_names(strategy, order.turn, incoming)
        whole = order.rank in (0, adapters.rank_of(incoming))
        model = models.load_with_state(order.base, order.model, before if whole else incoming, trained_here if whole else None)
    if order.score:  # of the whole global, also where this silo's rank holds only a part of it
        most, size, seed = order.score
        shard = open_split(order.home, "valid", order.split_digests["valid"])
        indices = chosen(shard, most, order.federation, seed, order.silo, "valid")
        beat = (lambda: pulse.beat("evaluating")) if pulse else None
        on_score(evaluate(model, shard, indices, size, order.max_length, order.pad, beat, ranks))
    if not whole:
        del model
        model = models.load_with_state(order.base, order.model, before, trained_here)
    shard = open_split(order.home, "train", order.split_digests["train"])
    control = _file(order.home / CONTROL)
    torch.manual_seed(order.dropout_seed)
    trained = training.train(
        model, shard, training.Stretch((order.federation, order.terms.seed, order.silo), order.cursor), order.terms,
        order.learning_rate, order.max_length, order.pad, pulse, checkpoint=Checkpoint(order.home / CHECKPOINT, order.identity, order.every),
        stop=_deadline(order.reserve), ranks=ranks, local_term=_local_term(strategy, order, control), private=_private(order),
    )  # fmt: skip
    if ranks.rank != 0:
        return trained, {}
    added = training.update_of({name: before[name] for name in trained_here}, models.trainable_state(model))
    return trained, added | {MEMORY + name: mean - control.get(OWN + name, NOTHING) for name, mean in trained.gradient.items()}


def _private(order: Order) -> Private | None:
    """With the key of this round, from the secret in the folder that all of the silo's machines share; it is in no order."""
    from silotune.components.learning.privacy.private_gradient import Private

    if (terms := order.private) is None:
        return None
    return Private(terms.mechanism, terms.clip, terms.clipping, terms.key(order.home))


def _local_term(strategy: Strategy, order: Order, control: dict[str, np.ndarray]) -> LocalTerm:
    """What the strategy adds to the gradients; its tensors are the silo's own dual, or both control variates."""
    own = {name.removeprefix(OWN): array for name, array in control.items() if name.startswith(OWN)}
    if strategy.local == "proximal":
        return LocalTerm(mu=order.mu)
    if strategy.local == "dynamic":
        return LocalTerm(mu=order.mu, offset={name: np.float32(order.mu) * array for name, array in own.items()})
    if strategy.local == "control":
        common = {name.removeprefix(COMMON): array for name, array in control.items() if name.startswith(COMMON)}
        names = own.keys() | common.keys()
        return LocalTerm(offset={name: common.get(name, NOTHING) - own.get(name, NOTHING) for name in names}, observe=True)
    return LocalTerm()


def _file(path: Path) -> dict[str, np.ndarray]:
    from silotune.components.learning.tensor_file import open_tensor_file

    return open_tensor_file(path).read_all() if path.exists() else {}


def _deadline(reserve: float) -> Callable[[int, float], bool]:
    """Stops a training while there is time left to send what it has, and for one step more."""

    def stop(steps: int, slowest: float) -> bool:
        left = time_left()
        return left is not None and left < reserve + slowest

    return stop


def open_split(home: Path, split: str, digest: str = "") -> Shard:
    """The shard that preprocess made.

    Raises:
        FederationError: it has not.
        SilotuneError: its digest is another than the one asked for.
    """
    import json

    from silotune.components.learning.tokens import open_shard

    try:
        shard = open_shard(home / json.loads((home / "data.json").read_text())[split])
    except KeyError:
        raise FederationError(f"{home}: holds no {split} split; its file names none", "not preprocessed") from None
    except FileNotFoundError:
        why = home / UNREADY
        reason = why.read_text() if why.is_file() else "not preprocessed"
        raise FederationError(
            f"its records were not made ready at the start of this run ({reason}); see its preprocess.log, correct it, run again", reason
        ) from None
    if digest and shard.digest != digest:
        raise SilotuneError(f"{home}: its {split} split has changed since this training began; run again")
    return shard
