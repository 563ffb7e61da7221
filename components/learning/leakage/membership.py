"""Membership inference by losses: can members of the training data be told from others by what the model thinks of them?

Each example's loss is compared with that under the model before training, which knows how hard the example is by itself. That is LiRA with one
reference model in place of many (Carlini et al. 2022, arXiv:2112.03570, section VI; Watson et al. 2021, arXiv:2111.08440): weaker than the attack
with shadow models, and cheap enough to run on every model. Besides the area under the curve, what counts is how many members are found at a
false-positive rate that hurts few (Carlini et al. 2022, section III).
"""

from __future__ import annotations

import math

import numpy as np

from silotune.components.terms.section import Section

RATES = (0.01, 0.001)  # false-positive rates that are told of


class Membership(Section):
    """How well an attack does."""

    auc: float  # 0.5: not at all
    error: float  # standard error of the area where there is nothing to tell
    found: dict[str, float]  # false-positive rate -> share of the members that are found
    members: int
    others: int

    @property
    def surprising(self) -> bool:
        """Whether the area is three standard errors above chance."""
        return self.auc > 0.5 + 3 * self.error


def attack(members: np.ndarray, others: np.ndarray) -> Membership:
    """From scores, the higher the more like a member.

    Raises:
        ValueError: there are no members or no others, or a score is NaN.
    """
    n, m = len(members), len(others)
    if not n or not m or np.isnan(members).any() or np.isnan(others).any():
        raise ValueError("scores: must be numbers, of one member and one other at least")
    ordered = np.sort(others)
    below, through = np.searchsorted(ordered, members, "left"), np.searchsorted(ordered, members, "right")
    auc = float((below + through).sum() / (2 * n * m))  # Mann & Whitney's U, ties count half
    found = {f"{rate:g}": float((members > _threshold(ordered, rate)).mean()) for rate in RATES if rate * m >= 1}
    return Membership(auc=auc, error=math.sqrt((n + m + 1) / (12 * n * m)), found=found, members=n, others=m)


def _threshold(ordered: np.ndarray, rate: float) -> float:
    """The least score that at most a share ``rate`` of the others lies above."""
    return float(ordered[len(ordered) - 1 - math.floor(rate * len(ordered))])


def calibrated(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Scores from losses under the model before training and after it: what training took off."""
    return before - after
