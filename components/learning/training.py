"""Local training: some AdamW steps on one silo's examples, from the global model on.

The loss of a step is the mean over its target tokens, whatever the packing, accumulation and number of processes, so that these change speed
and memory only (see `ranks` for several processes). A training may stop at any step, and goes on from its checkpoint as if nothing had been
(see `checkpoint`).
"""

from __future__ import annotations

import hashlib
import math
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from silotune.components.errors import SilotuneError
from silotune.components.federation import canonical_json
from silotune.components.learning import checkpoint as checkpoints
from silotune.components.learning.batches import batches, seed_of, stream, target_count
from silotune.components.learning.checkpoint import Checkpoint, NotSaved, Seen
from silotune.components.learning.local_term import AppliedTerm, LocalTerm
from silotune.components.learning.model import trainable
from silotune.components.learning.privacy.private_gradient import Private, PrivateGradient
from silotune.components.learning.ranks import ALONE, Ranks
from silotune.components.learning.schedule import rate
from silotune.components.learning.separation import keeps_apart
from silotune.components.learning.tokens import Shard
from silotune.components.terms.training import Training

NONE = LocalTerm()
OnStep = Callable[[int, int, float | None], None]
Stop = Callable[[int, float], bool]

# What allocators say that do not raise torch.OutOfMemoryError: torch's on a CPU, CUDA's libraries, C++.
NO_MEMORY = re.compile(
    r"not enough memory|can't allocate memory|cannot allocate memory|out of memory|ALLOC_FAILED|bad_alloc", re.IGNORECASE
)


class NonFiniteLoss(SilotuneError):
    """Training ran away; nothing of it is worth sending."""

    def __init__(self, where: str) -> None:
        super().__init__(f"non-finite loss {where}; lower training.learning_rate or check the records", f"non-finite loss {where}")


class OutOfMemory(SilotuneError):
    """A step does not fit into the memory of the CPU or the GPU."""

    def __init__(self, terms: Training) -> None:
        on = "with" if terms.gradient_checkpointing else "without"
        super().__init__(
            f"out of memory: a step must fit, got training.batch_size {terms.batch_size} in {terms.accumulation} part(s) {on} "
            "gradient_checkpointing; lower training.batch_size, raise training.accumulation or set training.gradient_checkpointing",
            "out of memory",
        )


@dataclass(frozen=True)
class Trained:
    """What a round of local training has seen, from its first step on, however often it was resumed."""

    steps: int  # done; fewer than asked for where it was stopped
    examples: int  # of a private training: as many as were expected
    tokens: int  # target tokens; of a private training the examples again, since the tokens would tell of records
    loss: float | None  # mean training loss per target token, nats; None of a private training
    cursor: int  # where the data stream goes on
    gradient: Mapping[str, np.ndarray] = field(default_factory=dict)  # mean of the raw gradients, where the local term asks for it


@dataclass(frozen=True)
class Stretch:
    """Which part of which endless stream of examples a round trains on."""

    seed: tuple[object, ...]
    cursor: int


def train(
    model: Any,
    shard: Shard,
    stretch: Stretch,
    terms: Training,
    learning_rate: float,
    max_length: int,
    pad: int,
    on_step: OnStep | None = None,
    *,
    checkpoint: Checkpoint | None = None,
    stop: Stop | None = None,
    ranks: Ranks = ALONE,
    local_term: LocalTerm = NONE,
    private: Private | None = None,
) -> Trained:
    """Train ``model`` in place for ``terms.steps`` steps, from its checkpoint on if there is one.

    The weights of the model and the state of torch's random numbers are the caller's, and must be the same each time a training is started; a
    private training seeds the latter itself.
    A checkpoint that cannot be written is warned of, once, and changes nothing.

    Args:
        learning_rate: peak rate of this round.
        max_length: tokens per packed row at most.
        pad: token id that fills rows.
        on_step: called after each step with (steps done, steps, mean loss of the step, or None of a private one).
        checkpoint: where to resume from, and to write to every so many steps; its identity stands for what the arguments here do not say.
        stop: asked after each step with (steps done, seconds from one asking to the next at most, in this process). If true, training ends
            there with a checkpoint; the course of the rate is still that over ``terms.steps``.
        ranks: the processes that train together. All are to be called with the same arguments and weights; only rank 0 is asked to stop, and
            only it reads and writes the checkpoint. With more than one, dropout is seeded by step and rank, from the seed last set.
        local_term: what the strategy adds to the gradients; not one that observes them, in a private training.
        private: train on clipped and noised gradients of sampled units (see `privacy.private_gradient`). ``terms.batch_size`` is then the
            number of units that is expected, and nothing of what is returned depends on records but the weights. How many steps there
            are depends on time, if ``stop`` does.

    Raises:
        NonFiniteLoss: a step's loss or gradient is not finite; of a private training, the weights at its end.
        OutOfMemory: a step does not fit.
        RankLost: another of the processes has ended.
        RanksDiffer: they do not hold the same weights: at the start, at a checkpoint or at the end.
    """
    if checkpoint and checkpoint.every > 0:
        known = [
            [str(x) for x in stretch.seed],
            stretch.cursor,
            shard.digest,
            terms.model_dump(),
            learning_rate,
            max_length,
            pad,
            local_term.digest,
            *(private.known if private else []),
        ]
        identity = hashlib.sha256(canonical_json([checkpoint.identity, known])).hexdigest()
        checkpoint = replace(checkpoint, identity=identity)
    else:
        checkpoint = None
    try:
        seen, gradient = _steps(
            model, shard, stretch, terms, learning_rate, max_length, pad, on_step, checkpoint, stop, ranks, local_term, private
        )
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
            raise OutOfMemory(terms) from error
        raise
    loss = None if private else seen.loss_sum / seen.tokens
    return Trained(seen.steps, seen.examples, seen.tokens, loss, seen.cursor, gradient)


def _steps(
    model: Any, shard: Shard, stretch: Stretch, terms: Training, learning_rate: float, max_length: int, pad: int, on_step: OnStep | None,
    checkpoint: Checkpoint | None, stop: Stop | None, ranks: Ranks, local_term: LocalTerm, private: Private | None,
) -> tuple[Seen, dict[str, np.ndarray]]:  # fmt: skip
    import torch
    from accelerate import Accelerator

    bf16 = terms.precision == "bfloat16" or (terms.precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no")
    if terms.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    named = trainable(model)
    parameters = list(named.values())
    added = AppliedTerm(local_term, named)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=terms.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    if terms.packing and not keeps_apart(model):
        terms = terms.model_copy(update={"packing": False})
    model.train()
    work = _Work(model, shard, stretch, terms, max_length, pad, accelerator, ranks, parameters, added)
    if private:
        torch.manual_seed(private.seed)
    seed, seen = torch.initial_seed(), Seen(0, 0, 0, 0.0, stretch.cursor)
    own = PrivateGradient(private, model, named, shard, terms, max_length, pad, ranks) if private else None
    sums = added.seen | ({"clip": own.clip} if own else {})
    if checkpoint and (found := _resumed(checkpoint, ranks)) and checkpoints.restore(found[1], named, optimizer, accelerator.device, sums):
        seen = found[0]
    ranks.agree(named, "before the first step")
    asked, slowest, warned = time.monotonic(), 0.0, False
    for step in range(seen.steps, terms.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, terms.steps, learning_rate, terms.schedule, terms.warmup_steps)
        if ranks.size > 1:  # a checkpoint holds the random numbers' state of rank 0 only
            torch.manual_seed(seed_of(seed, step, ranks.rank))
        loss, count, tokens = work.private_gradient(own, step) if own else work.gradient(step, seen.cursor)
        optimizer.step()
        optimizer.zero_grad()
        seen = Seen(step + 1, seen.examples + count, seen.tokens + tokens, seen.loss_sum + (loss or 0.0) * tokens, seen.cursor + count)
        if on_step:
            on_step(step + 1, terms.steps, loss)
        now = time.monotonic()
        asked, slowest = now, max(slowest, now - asked)
        stopped = stop is not None and ranks.decided(ranks.rank == 0 and stop(step + 1, slowest))
        if checkpoint and (stopped or checkpoint.due(step + 1)):
            ranks.agree(named, f"after step {step + 1} of {terms.steps}")
            try:
                if ranks.rank == 0:
                    checkpoints.save(checkpoint, seen, checkpoints.capture(named, optimizer, accelerator.device, sums))
            except NotSaved as error:
                if not warned:
                    warnings.warn(f"{error}; training goes on without", RuntimeWarning, stacklevel=3)
                warned = True
        if stopped:
            break
    ranks.agree(named, "after the last step")
    if own and not all(bool(torch.isfinite(p).all()) for p in parameters):
        raise NonFiniteLoss("in the weights that training ended with")  # which are noised, so that this tells of no record
    return seen, added.mean(seen.steps)


@dataclass(frozen=True)
class _Work:
    """What the steps of a training have in common."""

    model: Any
    shard: Shard
    stretch: Stretch
    terms: Training
    max_length: int
    pad: int
    accelerator: Any
    ranks: Ranks
    parameters: list[Any]
    added: AppliedTerm

    def gradient(self, step: int, cursor: int) -> tuple[float, int, int]:
        """Put the gradient of a step's loss into the parameters, clipped as a whole; returns loss, examples and target tokens."""
        import torch

        terms, ranks = self.terms, self.ranks
        indices = stream(len(self.shard), cursor, terms.batch_size, *self.stretch.seed)
        share = (ranks.rank, ranks.size)
        tokens, loss = target_count(self.shard, indices), 0.0
        for part in list(batches(self.shard, indices, terms.accumulation, self.max_length, self.pad, terms.packing, share)):
            part_loss = self._losses(part).sum() / tokens
            self.accelerator.backward(part_loss)
            loss += float(part_loss.detach())
        loss = ranks.sum_gradients(self.parameters, loss)
        self.added.add()
        norm = self.accelerator.clip_grad_norm_(self.parameters, terms.max_grad_norm)
        if not math.isfinite(loss) or not bool(torch.isfinite(norm)):
            raise NonFiniteLoss(f"at step {step + 1} of {terms.steps}")
        return loss, len(indices), tokens

    def private_gradient(self, own: PrivateGradient, step: int) -> tuple[None, int, int]:
        """The same of a private step: no loss, and the examples that are expected. What the strategy adds comes after the noise."""
        own.take(step, self._losses, self.accelerator.backward)
        self.added.add()
        return None, self.terms.batch_size, self.terms.batch_size

    def _losses(self, batch: Any) -> Any:
        with self.accelerator.autocast():
            return token_losses(self.model, batch.to(self.accelerator.device))


def _resumed(checkpoint: Checkpoint, ranks: Ranks) -> tuple[Seen, checkpoints.Tensors] | None:
    """The last checkpoint, read by rank 0 for all."""
    found = checkpoints.load(checkpoint) if ranks.rank == 0 else None
    if copied := ranks.copied((asdict(found[0]), found[1]) if found else None):
        return Seen(**copied[0]), copied[1]
    return None


def token_losses(model: Any, batch: Any) -> Any:
    """Cross entropy in nats of every target token of a batch; (targets,) float32."""
    import torch

    logits, wanted = target_logits(model, batch)
    return torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")


def target_logits(model: Any, batch: Any) -> tuple[Any, Any]:
    """Logits that predict the targets, (targets, vocabulary), and the target ids, (targets,)."""
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False)
    wanted = batch.targets[:, 1:]
    return out.logits[:, :-1][wanted], batch.input_ids[:, 1:][wanted]


def update_of(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What training added: after - before, tensor by tensor."""
    return {name: after[name] - before[name] for name in before}
