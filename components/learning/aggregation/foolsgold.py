"""FoolsGold: silos that keep saying the same count less, judged by the angles between updates over the rounds.

Fung et al. 2018, arXiv:1808.04866, compare the sums of all that silos ever sent. Keeping those would take a model for each silo. Here the cosines
of each round are kept, with an exponential memory: K × K numbers of server state. Silos that push alike in every round are found either way;
those that push alike only on average over rounds are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from silotune.components.learning.aggregation.gram import Gram
from silotune.components.learning.aggregation.robust import Verdict, shares_of, verdict_of

DECAY = 0.9  # of the memory, per round
CONFIDENCE = 1.0  # the paper's κ
LEAST_TRUST = 1e-6  # below this of all silos, none stands out


@dataclass(frozen=True)
class Likeness:
    """FoolsGold's memory: how alike the updates of each pair of silos have been, the last rounds counting most."""

    silos: tuple[str, ...]  # sorted; all that ever took part
    total: np.ndarray  # (K, K), Σ decayᵗ cosine
    weight: np.ndarray  # (K, K), Σ decayᵗ; 0 of pairs that never met

    def among(self, silos: tuple[str, ...]) -> np.ndarray:
        """Mean cosines of pairs, (len(silos), len(silos))."""
        at = [self.silos.index(silo) for silo in silos]
        total, weight = self.total[np.ix_(at, at)], self.weight[np.ix_(at, at)]
        return np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)


def remember(memory: Likeness | None, gram: Gram, decay: float = DECAY) -> Likeness:
    """The memory after a round. Pairs of which one is missing stay as they are. Numbers are rounded to float32, as files hold them."""
    silos = tuple(sorted({*(memory.silos if memory else ()), *gram.silos}))
    total, weight = (np.zeros((len(silos), len(silos))) for _ in range(2))
    if memory is not None:
        old = np.ix_(*[[silos.index(s) for s in memory.silos]] * 2)
        total[old], weight[old] = memory.total, memory.weight
    new = np.ix_(*[[silos.index(s) for s in gram.silos]] * 2)
    total[new] = decay * total[new] + gram.cosines
    weight[new] = decay * weight[new] + 1
    return Likeness(silos, *(x.astype(np.float32).astype(np.float64) for x in (total, weight)))


def foolsgold(gram: Gram, weights: Mapping[str, float], memory: Likeness | None = None) -> tuple[Verdict, Likeness]:
    """Silos whose updates keep pointing the same way count less (Fung et al. 2018, arXiv:1808.04866, Algorithm 1, with κ = 1).

    Where all are equally alike none stands out, and all count by their weight: so do two silos, and one. Coefficients sum to 1. Returns the
    verdict and the memory for the next round.
    """
    memory = remember(memory, gram)
    alike = memory.among(gram.silos)
    np.fill_diagonal(alike, -np.inf)
    count = len(gram.silos)
    most = alike.max(axis=1) if count > 1 else np.zeros(1)
    # Pardoning: an honest silo that is like a hostile one is less alike to others than that one is.
    above = np.maximum(most, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        pardon = np.where(above[None, :] > above[:, None], above[:, None] / above[None, :], 1.0)
    pardoned = np.where(np.eye(count, dtype=bool), -np.inf, np.where(alike > 0, alike * pardon, alike))
    trust = np.clip(1 - pardoned.max(axis=1), 0, 1) if count > 1 else np.ones(1)
    if trust.max() < LEAST_TRUST:
        trust = np.ones(count)
    trust = trust / trust.max()
    with np.errstate(divide="ignore"):
        trust = np.clip(CONFIDENCE * (np.log(trust / np.where(trust < 1, 1 - trust, 0)) + 0.5), 0, 1)
    kept = trust * shares_of(gram, weights)
    return verdict_of(gram, kept / kept.sum(), most, "its greatest cosine with another silo is"), memory
