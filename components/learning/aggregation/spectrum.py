"""Spectra: the singular values of a module's mean product, what they say about its rank, and whether that rank is being lost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

COLLAPSED = 0.5  # of the effective rank that there was; below, it is told
FLOOR = 2.0**-24  # of the largest singular value: what float32 factors cannot tell from nothing reads as zero


@dataclass(frozen=True)
class Spectrum:
    """Of Σ wᵢBᵢAᵢ, before it is cut to the global's rank."""

    values: np.ndarray  # singular values, falling, float64; as many as the product can have
    rank: int  # R, the global's
    residual: float  # 1 - ‖best of rank R‖² / ‖all‖², from 0 to 1: the share of energy that rank R does not hold; 0 of a zero product

    @property
    def effective_rank(self) -> float:
        """Of what the global holds: exp of the entropy of its R singular values as shares of their sum (Roy & Vetterli 2007); 0 of a zero product.

        The values beyond R are the silos' differences from each other: with them it would tell how many silos there are.
        """
        return effective_rank(self.values[: self.rank])

    @property
    def stable_rank(self) -> float:
        """The same as ‖·‖_F² / ‖·‖₂² (Rudelson & Vershynin 2007, arXiv:math/0503442); 0 of a zero product."""
        return stable_rank(self.values[: self.rank])


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


def collapsed(now: float, before: float, share: float = COLLAPSED) -> bool:
    """Whether an effective rank is being lost.

    Args:
        before: the greatest that it has been; of 1 there is none to lose.
    """
    return before > 1 and now < share * before
