"""The gradient of a step of DP-SGD and DP-AdamW (Abadi et al. 2016, arXiv:1607.00133, Algorithm 1):

    (Σ over the drawn units of their clipped gradients + N(0, z²C²)) / batch_size

``batch_size`` is the *expected* number of units, and never how many were drawn. A unit's loss is the mean over its target tokens, in however many
examples and rows. What follows, AdamW and what a strategy adds, sees no record, and costs nothing more.

No loss is reckoned, since none may be told, and a step whose sample is empty is noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from silotune.components.learning.batches import collate
from silotune.components.learning.privacy.accounting import Mechanism
from silotune.components.learning.privacy.clipping import Clipping, add_clipped, centred_count, next_clip
from silotune.components.learning.privacy.noise import Noise, add_noise, clip_left, grid_of
from silotune.components.learning.privacy.own_secret import subkey
from silotune.components.learning.privacy.sampling import Group, Units, groups, sample
from silotune.components.learning.privacy.unit_gradients import NoStretches, Tensors, UnitGradients, stretches_of
from silotune.components.learning.ranks import Ranks
from silotune.components.learning.tokens import Shard
from silotune.components.terms.training import Training

Losses = Callable[[Any], Any]  # a batch to its target tokens' losses, row by row


@dataclass(frozen=True)
class Private:
    """How a training is to be private."""

    mechanism: Mechanism
    clip: float
    clipping: Clipping
    key: bytes  # of the noise and the samples; never of a public seed

    @property
    def seed(self) -> int:
        """Of dropout, 63 bits. Under a public seed everybody would know which unit's gradient has which mask, and as that follows from its place
        among those drawn, one unit more would change all others' gradients, by as much as the clip allows. Under a secret one masks are as
        independent of places as of each other: the sum's distribution changes by the one unit's part."""
        return int.from_bytes(subkey(self.key, "dropout")[:8], "little") >> 1

    @property
    def known(self) -> list[Any]:
        """What a checkpoint's identity must tell, besides the key."""
        return [self.mechanism.model_dump(), self.clip, self.clipping]


class PrivateGradient:
    """Puts a step's private gradient into the parameters."""

    def __init__(
        self, private: Private, model: Any, named: Mapping[str, Any], shard: Shard, terms: Training, max_length: int, pad: int, ranks: Ranks
    ) -> None:
        import torch

        self._private, self._named, self._shard, self._terms, self._ranks = private, named, shard, terms, ranks
        self._max_length, self._pad = max_length, pad
        self._units = Units.of(shard)
        self._noise = Noise(private.key)
        self._gradients = UnitGradients(model, named)
        self.clip = torch.tensor(private.clip, dtype=torch.float64)  # moves with adaptive clipping; kept in checkpoints

    def take(self, step: int, losses: Losses, backward: Callable[[Any], None]) -> None:
        """One step's: sample, clip, add up, noise.

        Args:
            losses: of a batch.
            backward: from a scalar.
        """
        import torch

        mechanism, clip = self._private.mechanism, float(self.clip)
        deviation = mechanism.noise_multiplier * clip
        grid, limit = grid_of(deviation), clip_left(clip, deviation, sum(p.numel() for p in self._named.values()))
        totals = {n: torch.zeros(p.shape, dtype=torch.float64, device=p.device) for n, p in self._named.items()}
        count = 0.0
        with self._gradients.attached():
            for gradients in (g for group in self._mine(step) for g in self._of(group, losses, backward)):
                norms = add_clipped(totals, gradients, limit, self._private.clipping, grid)
                count += centred_count(norms, clip)
        self._ranks.sum_tensors(list(totals.values()))
        for name, parameter in self._named.items():
            noised = add_noise(totals[name].cpu().numpy(), deviation, self._noise.normals(parameter.numel(), "gradient", step, name))
            parameter.grad = torch.from_numpy(noised / self._terms.batch_size).to(parameter.device, parameter.dtype)
        if mechanism.quantile_noise_multiplier is not None:
            total = np.array(self._ranks.sums([count])[0])
            noise = self._noise.normals(1, "quantile", step)
            self.clip.fill_(
                next_clip(clip, float(add_noise(total, mechanism.quantile_noise_multiplier, noise)), float(self._terms.batch_size))
            )

    def _mine(self, step: int) -> list[Group]:
        """This rank's part of the step's sample."""
        terms = self._terms
        drawn = sample(self._private.key, step, len(self._units), self._private.mechanism.sampling_probability)
        rows = max(1, -(-terms.batch_size // terms.accumulation))
        return list(groups(self._shard, self._units, drawn, rows, self._max_length, terms.packing))[self._ranks.rank :: self._ranks.size]

    def _of(self, group: Group, losses: Losses, backward: Callable[[Any], None]) -> Iterator[Tensors]:
        """The units' gradients: all at once, or one after the other where they cannot be told apart by stretches."""

        def taken(chosen: Group) -> Tensors:
            def pass_of(i: int, weights: Any) -> None:
                batch = collate(self._shard, [list(row) for row in chosen.parts[i]], self._pad).to(weights.device)
                backward((losses(batch) * weights).sum())

            parts = [stretches_of(self._shard, self._units, chosen, part) for part in chosen.parts]
            return self._gradients.of_group(len(chosen.units), parts, pass_of)

        if self._gradients.by_stretches:
            try:
                yield taken(group)
                return
            except NoStretches:
                pass  # from here on
        rows = max(len(part) for part in group.parts)
        for unit in group.units:
            yield from map(taken, groups(self._shard, self._units, np.array([unit]), rows, self._max_length, self._terms.packing))
