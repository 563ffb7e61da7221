"""What a model thinks of single examples: their losses, and how their gradients lie to an update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from silotune.components.learning.batches import batches, collate
from silotune.components.learning.model import trainable
from silotune.components.learning.tokens import Shard
from silotune.components.learning.training import target_logits, token_losses

ROWS = 16


def example_losses(model: Any, shard: Shard, indices: np.ndarray, pad: int) -> np.ndarray:
    """Cross entropy in nats of each example, summed over its target tokens; (len(indices),) float64."""
    import torch
    from accelerate import PartialState

    device = PartialState().device
    model.to(device).eval()
    found = np.empty(len(indices))
    order = np.argsort(shard.lengths(indices), kind="stable")
    with torch.inference_mode():
        for start in range(0, len(order), ROWS):
            chosen = order[start : start + ROWS]
            batch = collate(shard, [[int(indices[i])] for i in chosen], pad)
            logits, wanted = target_logits(model, batch.to(device))
            losses = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none").double().cpu().numpy()
            owners = np.repeat(np.arange(len(chosen)), [int(shard.example(int(indices[i]))[1].sum()) for i in chosen])
            found[chosen] = np.bincount(owners, losses, len(chosen))
    return found


def alignments(model: Any, shard: Shard, indices: np.ndarray, pad: int, update: Mapping[str, np.ndarray]) -> np.ndarray:
    """Cosine of the angle between what each example by itself asks of the weights, and what an update did to them; (len(indices),) float64.

    Who has one silo's update and a guess at a record can tell so whether it was trained on (Melis et al. 2018, arXiv:1805.04049, in the form of
    Nasr et al. 2018, arXiv:1812.00910), and which of several guesses it was.

    Args:
        model: with the weights that training began from.
        update: by tensor's name; those of others than the trained ones count as nothing.
    """
    import torch
    from accelerate import PartialState

    device = PartialState().device
    model.to(device).eval()
    named = {name: p for name, p in trainable(model).items() if name in update}
    moved = {name: torch.from_numpy(np.array(update[name], np.float32)).to(device) for name in named}
    length = float(np.sqrt(sum(float(m.double().square().sum()) for m in moved.values())))
    found = np.zeros(len(indices))
    for place, index in enumerate(indices):
        batch = next(batches(shard, np.array([index]), 1, 0, pad, packing=False))
        gradients = torch.autograd.grad(token_losses(model, batch.to(device)).mean(), list(named.values()), allow_unused=True)
        pairs = [(g.double(), moved[n].double()) for n, g in zip(named, gradients, strict=True) if g is not None]
        norm = float(np.sqrt(sum(float(g.square().sum()) for g, _ in pairs)))
        if norm > 0 and length > 0:
            found[place] = -sum(float((g * m).sum()) for g, m in pairs) / (norm * length)
    return found
