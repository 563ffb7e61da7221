"""Evaluation: how well a model predicts the target tokens of a split. Sums, not means, so that silos pool exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from silotune.components.learning.batches import batches, stream
from silotune.components.learning.ranks import ALONE, Ranks
from silotune.components.learning.separation import keeps_apart
from silotune.components.learning.tokens import Shard
from silotune.components.learning.training import target_logits


@dataclass(frozen=True)
class Score:
    """Sums over the target tokens of some examples."""

    examples: int
    tokens: int
    loss_sum: float  # nats
    correct: int

    @property
    def loss(self) -> float:
        return self.loss_sum / self.tokens


def chosen(shard: Shard, max_examples: int | None, *seed: object) -> np.ndarray:
    """The examples that count: all, or the first ``max_examples`` of a seeded order; sorted, (n,) int64."""
    if max_examples is None or max_examples >= len(shard):
        return np.arange(len(shard))
    return np.sort(stream(len(shard), 0, max_examples, *seed))


def evaluate(
    model: Any,
    shard: Shard,
    indices: np.ndarray,
    batch_size: int,
    max_length: int,
    pad: int,
    on_batch: Callable[[], None] | None = None,
    ranks: Ranks = ALONE,
) -> Score:
    """Score a model on some examples of a shard; the loss of a broken one is not finite, which is for the caller to judge.

    Args:
        on_batch: called after each batch.
        ranks: the processes that score the same model together, which take turns by batch; each gets the score of all.
    """
    import torch
    from accelerate import PartialState

    device = PartialState().device
    model.to(device).eval()
    packing = keeps_apart(model)
    loss_sum, tokens, correct = 0.0, 0, 0
    # Examples of like length share a batch, so that little is padded.
    order = indices[np.argsort(shard.lengths(indices), kind="stable")]
    with torch.inference_mode():
        for start in range(ranks.rank * batch_size, len(order), ranks.size * batch_size):
            for batch in batches(shard, order[start : start + batch_size], 1, max_length, pad, packing):
                logits, wanted = target_logits(model, batch.to(device))
                losses = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
                loss_sum += float(losses.double().sum())
                correct += int((logits.argmax(-1) == wanted).sum())
                tokens += batch.tokens
                if on_batch:
                    on_batch()
    loss_sum, all_tokens, all_correct = ranks.sums([loss_sum, tokens, correct])
    return Score(len(indices), int(all_tokens), loss_sum, int(all_correct))
