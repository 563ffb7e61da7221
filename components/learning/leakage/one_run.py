"""A lower bound on ε from one run (Steinke, Nasr & Jagielski 2023, arXiv:2305.08846).

For each of m canaries a fair coin decides whether it is in. After the run every canary has a score, high where it seems to have been in. The
auditor says *in* of the highest, *out* of the lowest, and nothing of the rest. If what was run satisfies (ε, δ), of r such guesses v or more are
right with a probability of at most

    p = f(v) + 2mδ · max_i (f(v - i) - f(v)) / i        with f(v) = P[Binomial(r, exp(ε) / (1 + exp(ε))) ≥ v]

(Theorem 5.2). So every ε at which p is small is refuted. This holds for any mechanism and any scores: it needs coins that are fair, independent
and unknown to who scores, and no belief in the mechanism's own accounting. Neighbours are runs in which one canary is in, or is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from silotune.components.terms.section import Section

MOST = 64.0  # no bound above is looked for
LEAST_GUESSES = 8


class LowerBound(Section):
    """What an audit shows of ε."""

    epsilon: float  # refuted with the confidence that was asked for, as is every smaller one; 0 where nothing is
    delta: float
    canaries: int
    guesses: int
    right: int
    confidence: float


@dataclass(frozen=True)
class _Tails:
    """Binomial tails of r guesses at one ε: ``at_least[v]`` = P[≥ v], v from 0 to r + 1."""

    at_least: np.ndarray

    @classmethod
    def of(cls, guesses: int, epsilon: float) -> _Tails:
        logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, guesses + 1)))])
        right = np.arange(guesses + 1)
        choose = logs[-1] - logs - logs[::-1]
        mass = np.exp(choose - right * math.log1p(math.exp(-epsilon)) - (guesses - right) * (epsilon + math.log1p(math.exp(-epsilon))))
        return cls(np.append(np.cumsum(mass[::-1])[::-1], 0.0))


def p_value(epsilon: float, delta: float, canaries: int, guesses: int, right: int) -> float:
    """The greatest probability, over everything that satisfies (ε, δ), of so many right guesses or more.

    Raises:
        ValueError: more right ones than guesses, or more guesses than canaries.
    """
    if not 0 <= right <= guesses <= canaries:
        raise ValueError(f"right, guesses, canaries: must not decrease, got {right}, {guesses}, {canaries}")
    tails = _Tails.of(guesses, epsilon).at_least
    p = float(tails[right])
    if delta > 0 and right > 0:
        steps = np.arange(1, right + 1)
        p += 2 * canaries * delta * float(np.max((tails[right - steps] - tails[right]) / steps))
    return min(p, 1.0)


def refuted(delta: float, canaries: int, guesses: int, right: int, confidence: float) -> float:
    """The greatest ε whose p-value is at most 1 - confidence; 0 where there is none. To 1e-6, from below."""
    if p_value(0.0, delta, canaries, guesses, right) > 1 - confidence:
        return 0.0
    low, high = 0.0, 1.0
    while high < MOST and p_value(high, delta, canaries, guesses, right) <= 1 - confidence:
        low, high = high, 2 * high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, delta, canaries, guesses, right) <= 1 - confidence else (low, middle)
    return low


def lower_bound(
    scores: Sequence[float] | np.ndarray, included: Sequence[bool] | np.ndarray, delta: float, confidence: float = 0.95
) -> LowerBound:
    """The best of a few bounds, with more and with fewer guesses, each held to its part of the error.

    How many guesses are best depends on what is unknown: many where the mechanism is private, the surest few where it is not; and none of *out*
    where sampling passes over many canaries that are in. So there are a few tries, fixed before any score is seen: halvings of the number of
    canaries, each with as many guesses of *out* as of *in*, and with none. By Bonferroni each may err with (1 - confidence) / tries.

    Args:
        scores: of every canary; NaN is refused.
        included: what its coin said.

    Raises:
        ValueError: fewer than 8 canaries, unequal lengths, NaN, or a confidence that is none.
    """
    x, coins = np.asarray(scores, float), np.asarray(included, bool)
    if x.shape != coins.shape or x.ndim != 1 or len(x) < LEAST_GUESSES or np.isnan(x).any():
        raise ValueError(
            f"scores and coins: must be of the same {LEAST_GUESSES} canaries or more, and numbers, got {x.shape}, {coins.shape}"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: must be between 0 and 1, got {confidence}")
    order, halves = np.argsort(x, kind="stable"), [len(x) // 2]
    while halves[-1] >= LEAST_GUESSES:
        halves.append(halves[-1] // 2)
    tries = [(inside, outside) for inside in halves for outside in (inside, 0) if inside + outside >= LEAST_GUESSES]
    each = 1 - (1 - confidence) / len(tries)
    best = LowerBound(epsilon=0.0, delta=delta, canaries=len(x), guesses=0, right=0, confidence=confidence)
    for inside, outside in tries:
        right = int(coins[order[len(x) - inside :]].sum() + (~coins[order[:outside]]).sum())
        found = refuted(delta, len(x), inside + outside, right, each)
        if found > best.epsilon or best.guesses == 0:
            best = best.model_copy(update={"epsilon": found, "guesses": inside + outside, "right": right})
    return best
