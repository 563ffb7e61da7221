"""Judgement: what zeroing, clipping and a robust rule make of a round's updates, before anything is combined.

All of it follows from norms and angles, which one Gram matrix holds: of LoRA's products where those are what is combined, else of the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from silotune.components.learning.aggregation import bounds, coordinates, robust
from silotune.components.learning.aggregation.foolsgold import Likeness, foolsgold
from silotune.components.learning.aggregation.gram import Gram, updates_gram
from silotune.components.learning.aggregation.side_by_side import SideBySide
from silotune.components.learning.update import Update
from silotune.components.terms.strategies import Aggregation, Robust

Numbers = Mapping[str, Any]  # JSON: what the rounds before have left of running bounds and FoolsGold's memory


@dataclass(frozen=True)
class Judgement:
    """Coefficients cᵢ of Σ cᵢΔᵢ, or a rule for numbers and the factors to apply before it."""

    coefficients: dict[str, float]
    scores: dict[str, float]
    told: dict[str, str]
    numbers: dict[str, Any]
    rule: coordinates.Rule | None = None
    factors: dict[str, float] = field(default_factory=dict)  # of the silos that the rule is given


def judged(
    terms: Aggregation, updates: Mapping[str, Update], counts: Mapping[str, float], known: Numbers, incoming: Callable[[str], np.ndarray]
) -> tuple[Judgement, dict[str, float]]:
    """What becomes of each update, and the norms of all as they were sent; none where no update had to be read for it.

    Args:
        counts: silos' weights, in any unit.
        known: `Judgement.numbers` of the round before.
        incoming: a tensor of the incoming global, by name.

    Raises:
        UpdateRefused: a tensor is corrupt or not finite, or a norm is not what its header says: what is left out is not read again.
        QuorumError: too few updates for the robust rule.
    """
    if terms.robust:
        robust.require_enough(terms.robust.rule, len(updates), terms.robust.hostile)
    rule = _by_number(terms)
    if rule and terms.clip is None and not terms.zeroing:
        return Judgement({}, {}, {}, {}, rule, dict.fromkeys(sorted(updates), 1.0)), {}
    # Of two factors whose product is harmless each may do harm to a mean of factors: these are judged as tensors.
    reader, names = SideBySide(updates), sorted(next(iter(updates.values())).file.entries)
    gram = updates_gram(updates, names, reader.tensors, incoming if terms.traits.combine == "product" else None)
    sent = reader.norms()
    return _of_gram(terms, gram, counts, known), sent


def _of_gram(terms: Aggregation, gram: Gram, counts: Mapping[str, float], known: Numbers) -> Judgement:
    """Zeroing, clipping and the robust rule, one after the other."""
    norms, numbers, stages = gram.norms, {}, []
    if terms.zeroing:
        running = _running(known, "zeroing", norms, bounds.ZEROING_QUANTILE, bounds.ZEROING_RATE)
        stages.append(bounds.zeroing(norms, running))
        numbers["zeroing"] = running.after(norms).estimate
    if terms.clip:
        left = bounds.remaining(norms, stages[0]) if stages else norms
        if terms.clip.norm is not None:
            stages.append(bounds.clipping(left, terms.clip.norm))
        else:
            first = {"clip": terms.clip.initial} if terms.clip.initial else {}
            running = _running({**first, **known}, "clip", left, terms.clip.quantile or 0.5, bounds.CLIP_RATE)
            stages.append(bounds.clipping(left, running.estimate))
            numbers["clip"] = running.after(left).estimate
    stage = bounds.composed(norms, *stages)
    factors, told = stage.factors, dict(stage.told)
    if terms.robust is None:
        total = math.fsum(counts.values())
        return Judgement({s: counts[s] / total * factors[s] for s in gram.silos}, {}, told, numbers)
    if by_number := _by_number(terms):
        return Judgement({}, {}, told, numbers, by_number, {s: factors[s] for s in gram.silos})
    verdict = _verdict(terms.robust, gram.scaled(factors), counts, known, numbers)
    told |= {silo: "; ".join(filter(None, [told.get(silo), why])) for silo, why in verdict.told.items()}
    if terms.robust.rule == "bulyan":
        chosen = {s: factors[s] for s, c in verdict.coefficients.items() if c > 0}
        by_number = coordinates.mean_around_median(len(gram.silos) - 4 * terms.robust.hostile)
        return Judgement({}, verdict.scores, told, numbers, by_number, chosen)
    return Judgement({s: c * factors[s] for s, c in verdict.coefficients.items()}, verdict.scores, told, numbers)


def _by_number(terms: Aggregation) -> coordinates.Rule | None:
    """The rule where it is one that works number by number on all silos."""
    name = terms.robust.rule if terms.robust else ""
    if name == "median":
        return coordinates.median()
    return coordinates.trimmed_mean(terms.robust.hostile) if terms.robust and name == "trimmed-mean" else None


def _running(known: Numbers, name: str, norms: Mapping[str, float], quantile: float, rate: float) -> bounds.RunningQuantile:
    if name not in known:
        return bounds.first_quantile(norms, quantile, rate)
    return bounds.RunningQuantile(float(known[name]), quantile, rate)


def _verdict(terms: Robust, gram: Gram, counts: Mapping[str, float], known: Numbers, numbers: dict[str, Any]) -> robust.Verdict:
    """Of the rules that weigh silos; what they remember goes into ``numbers``."""
    if terms.rule == "norm-bound":
        return robust.norm_bound(gram, counts, terms.bound)
    if terms.rule == "krum":
        return robust.krum(gram, terms.hostile)
    if terms.rule == "multi-krum":
        return robust.multi_krum(gram, counts, terms.hostile)
    if terms.rule == "bulyan":
        return robust.bulyan_selection(gram, terms.hostile)
    if terms.rule == "geometric-median":
        return robust.geometric_median(gram, counts)
    if terms.rule == "fltrust":
        return robust.fltrust(gram, str(terms.trusted))
    kept = known.get("likeness")
    memory = Likeness(tuple(kept["silos"]), np.array(kept["total"]), np.array(kept["weight"])) if kept else None
    verdict, memory = foolsgold(gram, counts, memory)
    numbers["likeness"] = {"silos": list(memory.silos), "total": memory.total.tolist(), "weight": memory.weight.tolist()}
    return verdict
