"""Local training: some AdamW steps on one silo's examples, from the global model on.

The loss of a step is the mean over its target tokens, whatever the packing and accumulation, so that these change speed and memory only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from silotune.components.errors import SilotuneError
from silotune.components.federation import Training
from silotune.components.learning.batches import batches, stream
from silotune.components.learning.schedule import rate
from silotune.components.learning.tokens import Shard

OnStep = Callable[[int, int, float], None]


class NonFiniteLoss(SilotuneError):
    """Training ran away; nothing of it is worth sending."""

    def __init__(self, where: str) -> None:
        super().__init__(f"non-finite loss {where}; lower training.learning_rate or check the records", f"non-finite loss {where}")


@dataclass(frozen=True)
class Trained:
    """What a round of local training has seen."""

    steps: int
    examples: int
    tokens: int  # target tokens
    loss: float  # mean training loss per target token, nats
    cursor: int  # where the data stream goes on


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
) -> Trained:
    """Train ``model`` in place for ``terms.steps`` steps.

    Args:
        learning_rate: peak rate of this round.
        max_length: tokens per packed row at most.
        pad: token id that fills rows.
        on_step: called after each step with (steps done, steps, mean loss of the step).

    Raises:
        NonFiniteLoss: a step's loss or gradient is not finite.
    """
    import torch
    from accelerate import Accelerator

    bf16 = terms.precision == "bfloat16" or (terms.precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no")
    if terms.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=terms.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    loss_sum, examples, tokens = 0.0, 0, 0
    for step in range(terms.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, terms.steps, learning_rate, terms.schedule, terms.warmup_steps)
        indices = stream(len(shard), stretch.cursor + examples, terms.batch_size, *stretch.seed)
        parts = list(batches(shard, indices, terms.accumulation, max_length, pad, terms.packing))
        step_tokens = sum(part.tokens for part in parts)
        step_loss = 0.0
        for part in parts:
            with accelerator.autocast():
                part_loss = token_losses(model, part.to(accelerator.device)).sum() / step_tokens
            accelerator.backward(part_loss)
            step_loss += float(part_loss.detach())
        norm = accelerator.clip_grad_norm_(parameters, terms.max_grad_norm)
        if not math.isfinite(step_loss) or not bool(torch.isfinite(norm)):
            raise NonFiniteLoss(f"at step {step + 1} of {terms.steps}")
        optimizer.step()
        optimizer.zero_grad()
        loss_sum, examples, tokens = loss_sum + step_loss * step_tokens, examples + len(indices), tokens + step_tokens
        if on_step:
            on_step(step + 1, terms.steps, step_loss)
    return Trained(terms.steps, examples, tokens, loss_sum / tokens, stretch.cursor + examples)


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
