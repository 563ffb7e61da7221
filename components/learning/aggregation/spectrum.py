"""Spectra: the singular values of a module's mean product, what they say about its rank, and whether that rank is being lost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

FLOOR = 2.0**-24  # of the largest singular value: what float32 factors cannot tell from nothing reads as zero


@dataclass(frozen=True)
class Spectrum:
    """Of Σ wᵢBᵢAᵢ, before it is cut to the global's rank."""

    values: np.ndarray  # singular values, falling, float64; as many as the product can have
    residual: float  # 1 - ‖best of rank R‖² / ‖all‖², from 0 to 1: the share of energy that rank R does not hold; 0 of a zero product

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values as shares of their sum (Roy & Vetterli 2007); 0 of a zero product."""
        return effective_rank(self.values)

    @property
    def stable_rank(self) -> float:
        """‖·‖_F² / ‖·‖₂² (Rudelson & Vershynin 2007, arXiv:math/0503442); 0 of a zero product."""
        return stable_rank(self.values)


def effective_rank(values: np.ndarray) -> float:
    live = values[values > 0]
    if not live.size:
        return 0.0
    shares = live / live.max()
    shares = shares / shares.sum()
    return float(math.exp(-float(np.sum(shares * np.log(shares)))))


def stable_rank(values: np.ndarray) -> float:
    top = float(values.max(initial=0.0))
    return float(np.sum(np.square(values / top))) if top > 0 else 0.0


def collapsed(ranks: Mapping[str, float], before: Mapping[str, float], share: float) -> dict[str, str]:
    """Modules whose effective rank has fallen below ``share`` of what it was, and how far.

    Args:
        ranks: effective rank by module, now.
        before: the same of an earlier round; modules without, or with none to lose, are passed over.
        share: from 0 to 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"share: must be between 0 and 1, got {share}")
    return {
        module: f"its effective rank fell from {before[module]:.3g} to {rank:.3g}, below {share:.0%} of it"
        for module, rank in sorted(ranks.items())
        if module in before and before[module] > 1 and rank < share * before[module]
    }
