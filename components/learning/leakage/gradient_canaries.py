"""Canaries as gradients: an audit of private training itself, by the strongest adversary that ε is a promise against.

Each canary is a unit whose gradient moves one number of the model, and no other's (*Dirac canaries*, Nasr et al. 2023, arXiv:2302.07956; as in
Steinke et al. 2023, arXiv:2305.08846, section 6). They go through the very code that private training goes through: Poisson sampling,
gradients unit by unit, clipping, noise. The auditor sees every step's noised gradient, and scores a canary by what its number got in all of them.
The gradients are far above the clip, so that clipping that is left out is seen as well as noise that is too small.

A canary whose coin says *out* is replaced by a unit that adds nothing, as the accounting has it; the number of units is public.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from silotune.components.learning.leakage.one_run import LowerBound, lower_bound
from silotune.components.learning.ranks import ALONE
from silotune.components.learning.tokens import Counts, Shard
from silotune.components.terms.training import Training

if TYPE_CHECKING:
    from silotune.components.learning.privacy.private_gradient import Private

ROWS = 32  # canaries whose gradients are held at a time
OVER = 10.0  # times the clip: what a canary's own gradient has for a norm


def audit_training(private: Private, canaries: int, delta: float, coins: np.ndarray, confidence: float = 0.95) -> LowerBound:
    """A lower bound on ε of one training of ``private.mechanism.steps`` steps.

    Args:
        private: as a silo trains; sampling probability and noise are its own, whatever the number of canaries.
        coins: which canaries are in, (canaries,) bool; must be random and independent of the key.
    """
    import torch

    from silotune.components.learning.privacy.private_gradient import PrivateGradient

    model = torch.nn.Linear(canaries, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    named = {"weight": model.weight}
    size = OVER * private.clip

    def losses(batch: Any) -> Any:
        """Of every unit: its own number of the weight, times what its gradient shall be; 0 of one that is out."""
        ids = batch.input_ids
        one_hot = torch.nn.functional.one_hot(ids.clamp(max=canaries - 1), canaries).float() * (ids < canaries)[..., None]
        return size * model(one_hot)[..., 0][:, :-1][batch.targets[:, 1:]]

    expected = max(1, round(private.mechanism.sampling_probability * canaries))
    terms = Training(batch_size=expected, accumulation=max(1, expected // ROWS), packing=False)
    own = PrivateGradient(private, model, named, _shard(coins), terms, 2, canaries, ALONE)
    total = np.zeros(canaries)
    for step in range(private.mechanism.steps):
        own.take(step, losses, lambda scalar: scalar.backward())
        assert model.weight.grad is not None
        total += model.weight.grad[0].double().numpy() / float(own.clip)
        model.weight.grad = None
    return lower_bound(total, coins, delta, confidence)


def _shard(coins: np.ndarray) -> Shard:
    """Unit i: its own token, or one that stands for nothing, and a target after it."""
    count = len(coins)
    own = np.where(coins, np.arange(count), count)
    tokens = np.stack([own, np.full(count, count)], axis=1).astype(np.int32).ravel()
    targets = np.tile(np.array([0, 1], np.uint8), count)
    return Shard(
        tokens=tokens, targets=targets, offsets=np.arange(0, 2 * count + 1, 2), units=np.arange(count, dtype=np.int32), digest="canaries",
        counts=Counts(count, 2 * count, count, count, 0, 0),
    )  # fmt: skip
