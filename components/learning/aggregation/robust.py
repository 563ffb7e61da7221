"""Robust rules that weigh whole updates: functions of the Gram matrix, which say by how much each silo's update counts.

What stands in the mean's place is Σ cᵢΔᵢ, with the coefficients of a `Verdict`. They need not sum to 1: where updates are scaled down the
rest of the weight stays with the incoming global, so that LoRA's product becomes Σ cᵢBᵢAᵢ + (1 - Σ cᵢ)B₀A₀.

What each rule bears with, as long as at most ``hostile`` silos are hostile and enough deliver (`require_enough`):

    norm-bound         a bounded push; no protection of direction
    geometric-median   any vectors, while hostile silos hold less than half of the *weight*: claims of many examples count
    krum, multi-krum   any vectors far from the rest; small pushes hide within the spread of honest updates (arXiv:1902.06156)
    bulyan             the same number by number (`coordinates`), with smaller pushes
    foolsgold          (`foolsgold`) several silos that push alike; none against one silo alone
    fltrust            any number of hostile silos, if the trusted one is honest and its records are like the others'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from silotune.components.errors import QuorumError
from silotune.components.learning.aggregation.bounds import clipping
from silotune.components.learning.aggregation.gram import Gram
from silotune.components.terms.strategies import RULES

SMOOTHING = 1e-6  # of the geometric median: smallest distance that counts, in parts of the median norm
ROUNDS = 1000  # of Weiszfeld's iteration at most
CONVERGED = 1e-10  # greatest change of a coefficient


@dataclass(frozen=True)
class Verdict:
    """What a rule makes of a round's updates."""

    coefficients: dict[str, float]  # silo -> cᵢ
    scores: dict[str, float]  # silo -> what the rule judged it by
    told: dict[str, str]  # silo -> why it was left out, or scaled down


def least_silos(rule: str, hostile: int) -> int:
    """How many updates a rule needs against so many hostile silos: 2f+3 for Krum, 4f+3 for Bulyan, 2f+1 for medians and trimmed means."""
    needs = RULES[rule].least
    return needs["silos"] + needs["hostile"] * hostile


def require_enough(rule: str, silos: int, hostile: int) -> None:
    """Raises QuorumError where a rule's assumption does not hold of those who delivered."""
    if silos < (least := least_silos(rule, hostile)):
        raise QuorumError(
            f"aggregation.robust: {rule} needs {least} updates against {hostile} hostile, {silos} came; "
            "wait for more silos, lower hostile or choose another rule"
        )


def norm_bound(gram: Gram, weights: Mapping[str, float], bound: float | None = None, quantile: float = 0.5) -> Verdict:
    """The weighted mean of updates scaled down to a bound on their norm (Sun et al. 2019, arXiv:1911.07963, section 4).

    Args:
        bound: L2 norm; None takes the quantile of this round's norms.
    """
    norms = gram.norms
    stage = clipping(norms, float(np.quantile(gram.lengths, quantile)) if bound is None else bound)
    shares = shares_of(gram, weights)
    kept = {silo: float(share) * stage.factors[silo] for silo, share in zip(gram.silos, shares, strict=True)}
    return Verdict(kept, norms, stage.told)


def krum_scores(distances: np.ndarray, hostile: int) -> np.ndarray:
    """Sum of the squared distances to the n - f - 2 nearest others, at least one (Blanchard et al. 2017, arXiv:1703.02757, section 4).

    Args:
        distances: squared, (n, n).
    """
    count = len(distances)
    near = max(1, count - hostile - 2)
    others = distances + np.diag(np.full(count, np.inf))
    return np.asarray(np.sort(others, axis=1)[:, :near].sum(axis=1)) if count > 1 else np.zeros(1)


def krum_order(distances: np.ndarray, hostile: int) -> np.ndarray:
    """Places by rising score. Of equals, as the nearest two are where one neighbour counts, by the sum of all distances; then by place."""
    return np.lexsort((distances.sum(axis=1), krum_scores(distances, hostile)))


def krum(gram: Gram, hostile: int) -> Verdict:
    """The one update with the least score. Raises QuorumError."""
    return _best(gram, dict.fromkeys(gram.silos, 1.0), hostile, "krum", 1)


def multi_krum(gram: Gram, weights: Mapping[str, float], hostile: int) -> Verdict:
    """The weighted mean of the n - f updates with the least scores. Raises QuorumError."""
    return _best(gram, weights, hostile, "multi-krum", len(gram.silos) - hostile)


def _best(gram: Gram, weights: Mapping[str, float], hostile: int, rule: str, keep: int) -> Verdict:
    require_enough(rule, len(gram.silos), hostile)
    scores = krum_scores(gram.distances, hostile)
    chosen = krum_order(gram.distances, hostile)[:keep]
    kept = np.zeros(len(scores))
    kept[chosen] = shares_of(gram, weights)[chosen]
    return verdict_of(gram, kept / kept.sum(), scores, f"of those chosen the greatest Krum score is {scores[chosen].max():.3g}, its own is")


def bulyan_selection(gram: Gram, hostile: int) -> Verdict:
    """The n - 2f updates that Krum picks one after the other, each from those left (El Mhamdi et al. 2018, arXiv:1802.07927, section 4).

    What comes of them is not their mean but `coordinates.mean_around_median`, of the n - 4f nearest numbers. Raises QuorumError.
    """
    require_enough("bulyan", len(gram.silos), hostile)
    distances = gram.distances
    left = list(range(len(gram.silos)))
    chosen: list[int] = []
    while len(chosen) < len(gram.silos) - 2 * hostile:
        chosen.append(left.pop(int(krum_order(distances[np.ix_(left, left)], hostile)[0])))
    scores = krum_scores(distances, hostile)
    kept = np.isin(np.arange(len(gram.silos)), chosen) / len(chosen)
    return verdict_of(gram, kept, scores, "Krum picked the others, its score is")


def geometric_median(gram: Gram, weights: Mapping[str, float]) -> Verdict:
    """The point z of least Σ wᵢ‖Δᵢ - z‖, by the smoothed Weiszfeld iteration (RFA: Pillutla et al. 2019, arXiv:1912.13445, Algorithm 2).

    z = Σ cᵢΔᵢ lies among the updates, and ‖Δᵢ - z‖² = Σⱼ cⱼDᵢⱼ - ½ Σⱼₖ cⱼcₖDⱼₖ with the squared distances D: only those are needed. The paper
    stops after a few iterations; here they cost nothing and go on until the coefficients stand still.
    """
    shares, distances = shares_of(gram, weights), gram.distances
    if len(shares) == 1:
        return verdict_of(gram, np.ones(1), np.zeros(1), "")
    least = SMOOTHING * float(np.median(gram.lengths)) or 1.0
    # Begun at the mean, one far update would take many iterations to lose its hold.
    start = shares / np.maximum(np.sqrt(np.median(distances, axis=1)), least)
    found = start / start.sum()
    away = np.zeros(len(shares))
    for _ in range(ROUNDS):
        towards = distances @ found
        away = np.sqrt(np.maximum(towards - found @ towards / 2, 0))
        step = shares / np.maximum(away, least)
        step /= step.sum()
        moved = float(np.abs(step - found).max())
        found = step
        if moved < CONVERGED:
            break
    return verdict_of(gram, found, away, "its distance to the geometric median is")


def fltrust(gram: Gram, trusted: str) -> Verdict:
    """Updates rescaled to the trusted one's norm and weighed by their cosine with it, if that is positive (Cao et al. 2020,
    arXiv:2012.13995, Eq. 1-3). The trusted silo's own update counts with a cosine of 1.

    Raises:
        QuorumError: the trusted silo is not among them.
    """
    if trusted not in gram.silos:
        raise QuorumError(
            f"aggregation.robust.trusted: the update of silo {trusted!r} has not come, and fltrust needs it; run that silo, or change the terms"
        )
    place, lengths = gram.silos.index(trusted), gram.lengths
    cosines = gram.cosines[place].copy()
    cosines[place] = 1.0
    trust = np.maximum(cosines, 0) / np.maximum(cosines, 0).sum()
    scale = np.divide(lengths[place], lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return verdict_of(gram, trust * scale, cosines, f"its cosine with the update of {trusted} must be positive, is")


def shares_of(gram: Gram, weights: Mapping[str, float]) -> np.ndarray:
    """Weights that sum to 1, (K,). Raises ValueError where one is not positive."""
    found = np.array([weights[silo] for silo in gram.silos], np.float64)
    if not (np.isfinite(found).all() and (found > 0).all()):
        raise ValueError(f"weights: must be positive, got {dict(weights)}")
    return found / found.sum()


def verdict_of(gram: Gram, coefficients: np.ndarray | list[float], scores: np.ndarray, why: str) -> Verdict:
    """With ids; ``why`` goes before the score of those that do not count."""
    told = dict(zip(gram.silos, map(float, scores), strict=True))
    given = dict(zip(gram.silos, map(float, coefficients), strict=True))
    return Verdict(given, told, {silo: f"{why} {told[silo]:.3g}" for silo, c in given.items() if c == 0})
