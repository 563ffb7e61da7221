"""Exposure: how much better a model knows a planted secret than the secrets that could have stood in its place (Carlini et al. 2019, arXiv:1802.08232).

A canary's secret is drawn at random from many. After training, it is ranked by the model's loss among *references*: secrets drawn the same way that
were never trained on. Its exposure is log2(n + 1) - log2(rank), for n references: the bits of the secret that the model gives away to
who can ask for losses. A model that has not seen it gives 1.44 bits on average (the mean of -log2 of a uniform number), whatever its quality;
one that has it by heart gives log2(n + 1), the most that can be measured.
"""

from __future__ import annotations

import math

import numpy as np

from silotune.components.terms.section import Section

BY_CHANCE = 1 / math.log(2)  # bits


class Exposure(Section):
    """Of a few canaries together."""

    mean: float  # bits
    greatest: float
    most: float  # that could have been measured
    by_chance: float  # mean of a model that has seen none of them
    error: float  # standard error of the mean of such a model
    canaries: int
    references: int

    @property
    def surprising(self) -> bool:
        """Whether the mean is three standard errors above chance."""
        return self.mean > self.by_chance + 3 * self.error


def ranks(planted: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Rank of each planted loss among the references and itself, from 1; ties count half. (canaries,) float64."""
    ordered = np.sort(references)
    below, through = np.searchsorted(ordered, planted, "left"), np.searchsorted(ordered, planted, "right")
    return 1 + (below + through) / 2


def exposure(planted: np.ndarray, references: np.ndarray) -> Exposure:
    """From losses, the lower the better known.

    Raises:
        ValueError: there are no canaries or no references, or a loss is NaN.
    """
    if not len(planted) or not len(references) or np.isnan(planted).any() or np.isnan(references).any():
        raise ValueError("losses: must be numbers, of one canary and one reference at least")
    count = len(references)
    bits = math.log2(count + 1) - np.log2(ranks(planted, references))
    chance = math.log2(count + 1) - np.log2(np.arange(1, count + 2))
    return Exposure(
        mean=float(bits.mean()), greatest=float(bits.max()), most=math.log2(count + 1), by_chance=float(chance.mean()),
        error=float(chance.std()) / math.sqrt(len(planted)), canaries=len(planted), references=count,
    )  # fmt: skip
