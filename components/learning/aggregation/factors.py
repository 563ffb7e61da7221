"""LoRA factors: how pairs A and B are found by name, cut to a rank, and stacked, so that the products BA can be averaged exactly.

A module's weight is moved by s·B·A, with B (out × r), A (r × in) and one scale s for all silos, whatever their ranks (Hu et al. 2021,
arXiv:2106.09685, section 4.1). Names are peft's: ``….q_proj.lora_A.weight`` and ``….q_proj.lora_B.weight``. What the strategies make of them:

    strategy  trained and sent        next global                                            keeps Σ wᵢBᵢAᵢ
    fedit     A and B                 the mean of A, the mean of B                           no: a mean of products is no product of means
    ffa       B                       the mean of B; A stays as it began                     yes, in the span of A
    rolora    B and A, in turns       the mean of what was trained                           yes, in the span of the other
    product   A and B                 the best pair of rank R for Σ wᵢBᵢAᵢ (`product`)       as far as rank R goes; the rest is measured
    fedex     A and B                 the means; what they miss goes into ``delta``          yes (`stacking`)
    flora     A and B                 all into ``delta``; A and B begin anew                 yes (`stacking`)
    fed-sb    a core R between both   the mean of R                                          yes, in the span of both (`core`)

fedit: Zhang et al. 2023, arXiv:2305.05644. ffa: Sun et al. 2024, arXiv:2403.12313. rolora: Chen et al. 2024, arXiv:2409.02346. product: the
truncation that FlexLoRA (Bai et al. 2024, arXiv:2402.11505) does on the dense matrix. The others are cited where they are computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

A, B, CORE, DELTA = ".lora_A.weight", ".lora_B.weight", ".lora_core.weight", ".delta.weight"  # what follows a module's name


@dataclass(frozen=True)
class LoraPair:
    """The factors of one module, or the differences of both. Raises ValueError where their ranks differ."""

    b: np.ndarray  # (out, r)
    a: np.ndarray  # (r, in)

    def __post_init__(self) -> None:
        if self.b.ndim != 2 or self.a.ndim != 2 or self.b.shape[1] != self.a.shape[0]:
            raise ValueError(f"a LoRA pair: must be of shapes (out, r) and (r, in), got {self.b.shape} and {self.a.shape}")

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def product(self) -> np.ndarray:
        """BA in float64, (out, in)."""
        return self.b.astype(np.float64) @ self.a.astype(np.float64)


def modules(names: Iterable[str]) -> list[str]:
    """Names of the modules that have a pair, sorted; ``delta`` tensors beside pairs are passed over.

    Raises:
        ValueError: a tensor that is neither, or a factor without the other one.
    """
    every = set(names)
    found = sorted({name.removesuffix(A).removesuffix(B) for name in every if name.endswith((A, B))})
    known = {module + ending for module in found for ending in (A, B)}
    if odd := sorted((known - every) | (every - known - {module + DELTA for module in found})):
        why = "is not there, though the other factor is" if odd[0] in known else "is no factor of a LoRA pair"
        raise ValueError(f"tensor {odd[0]!r}: {why}; products are of pairs only")
    return found


def truncated(pair: LoraPair, rank: int) -> LoraPair:
    """The first ``rank`` columns of B and rows of A: of a pair as `product` makes it, the best product of that rank.

    Raises:
        ValueError: the pair has not that many.
    """
    if not 1 <= rank <= pair.rank:
        raise ValueError(f"rank: must be from 1 to the pair's {pair.rank}, got {rank}")
    return LoraPair(pair.b[:, :rank], pair.a[:rank])


def stacked(
    incoming: LoraPair, differences: Mapping[str, LoraPair], weights: Mapping[str, float], carried: LoraPair | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Stacks (out × n) and (n × in), in float64, whose product is Σ wᵢ(BᵢAᵢ + tailᵢ) / Σ wᵢ + what is carried.

    Silo i of rank rᵢ was given the first rᵢ columns and rows of the incoming pair, and answers with the difference to them. What it could not
    hold, tailᵢ = B[:, rᵢ:]·A[rᵢ:], it neither confirms nor removes. So n = Σ rᵢ + (R - min rᵢ) + the rank of what is carried.

    Args:
        differences: by silo; taken in sorted order.
        weights: by silo, in any unit.

    Raises:
        ValueError: shapes do not fit, or the weights do not add up to something positive.
    """
    silos = sorted(differences)
    shares = normalised(weights, silos)
    low = min(differences[silo].rank for silo in silos)
    width = sum(differences[silo].rank for silo in silos) + incoming.rank - low + (carried.rank if carried else 0)
    b, a = np.empty((incoming.b.shape[0], width)), np.empty((width, incoming.a.shape[1]))
    tail = np.zeros(incoming.rank)
    at = 0
    for silo in silos:
        difference = differences[silo]
        known = truncated(incoming, difference.rank)
        if (difference.b.shape, difference.a.shape) != (known.b.shape, known.a.shape):
            raise ValueError(
                f"silo {silo!r}: its pair has shapes {difference.b.shape} and {difference.a.shape}, the global's are of others"
            )
        to = at + difference.rank
        np.add(known.b, difference.b, out=b[:, at:to], dtype=np.float64)
        b[:, at:to] *= shares[silo]
        np.add(known.a, difference.a, out=a[at:to], dtype=np.float64)
        tail[difference.rank :] += shares[silo]
        at = to
    to = at + incoming.rank - low
    b[:, at:to] = incoming.b[:, low:]
    b[:, at:to] *= tail[low:]
    a[at:to] = incoming.a[low:]
    if carried:
        b[:, to:], a[to:] = carried.b, carried.a
    return b, a


def normalised(weights: Mapping[str, float], silos: Iterable[str]) -> dict[str, float]:
    """Weights of some silos that add up to one. Raises ValueError where that cannot be."""
    chosen = {silo: weights[silo] for silo in silos}
    total = math.fsum(chosen.values())
    if not (math.isfinite(total) and total > 0 and min(chosen.values()) >= 0):
        raise ValueError(f"weights: must be finite, not negative, and add up to something positive, got {chosen}")
    return {silo: weight / total for silo, weight in chosen.items()}
