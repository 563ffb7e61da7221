"""One round's aggregation, from accepted updates to the next global: the stages in their order, by the terms.

    refuse       what does not answer the plan never comes here; what is found while reading ends in UpdateRefused
    zero, clip   each update gets a factor from 0 to 1, by its norm (`bounds`)
    judge        a robust rule gives each silo a coefficient (`robust`), or works number by number (`coordinates`)
    combine      the mean of the differences, or of LoRA's products (`mean`, `lora_mean`, `robust_product`)
    server step  an optimiser at the server turns that into the next global (`server_optimizer`)

What a stage carries to the next round is part of the `Carried` state, which a commit names by digest. The same updates, terms and state give the
same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from silotune.components.learning.aggregation import bounds, coordinates, robust, server_optimizer
from silotune.components.learning.aggregation.factors import LoraPair
from silotune.components.learning.aggregation.foolsgold import Likeness, foolsgold
from silotune.components.learning.aggregation.gram import Gram, updates_gram
from silotune.components.learning.aggregation.lora_mean import fedex_mean, flora_mean, pairs_mean, product_mean
from silotune.components.learning.aggregation.mean import METADATA, ServerState, finish, weigh, weighted_mean
from silotune.components.learning.aggregation.product import Best
from silotune.components.learning.aggregation.robust_product import rule_on_products, weighed_product
from silotune.components.learning.aggregation.server_optimizer import ServerOptimizer
from silotune.components.learning.aggregation.spectrum import Spectrum
from silotune.components.learning.aggregation.summation import Term
from silotune.components.learning.aggregation.tree import Stored, grouped_mean
from silotune.components.learning.tensor_file import TensorFile, open_tensor_file, tensor_writer, to_bytes
from silotune.components.learning.update import Update
from silotune.components.strategies import Aggregation

OUTGOING = "outgoing.safetensors"
OPTIMIZER, REST = "optimizer", "rest"  # names of what is carried as tensor files


@dataclass(frozen=True)
class Carried:
    """What goes from round to round beside the global."""

    files: Mapping[str, TensorFile] = field(default_factory=dict)  # by `OPTIMIZER`, `REST`
    numbers: Mapping[str, Any] = field(default_factory=dict)  # JSON: running bounds, FoolsGold's memory


@dataclass(frozen=True)
class Round:
    """What the next global follows from, besides the updates."""

    terms: Aggregation
    incoming: TensorFile
    silos: int  # in the federation, whether they delivered or not
    scale: float = 1.0  # LoRA's alpha / r
    carried: Carried = field(default_factory=Carried)
    initial: Mapping[str, np.ndarray] = field(default_factory=dict)  # flora: A by tensor name, as adapters begin anew
    groups: Sequence[Sequence[str]] = ()  # `Aggregation.groups` of all silos that were asked


@dataclass(frozen=True)
class Combined:
    """What came of a round."""

    weights: dict[str, float]  # silo -> its share of the step; 0 of one that was left out
    norms: dict[str, float]  # silo -> L2 norm of its update
    change: float  # norm of what the global moved by
    scores: dict[str, float] = field(default_factory=dict)  # silo -> what a robust rule judged it by
    told: dict[str, str] = field(default_factory=dict)  # silo -> why it was left out or scaled down
    residuals: dict[str, float] = field(default_factory=dict)  # module -> share of the mean product's energy that its pair does not hold
    spectra: dict[str, Spectrum] = field(default_factory=dict)  # module -> spectrum of its mean product
    files: dict[str, Path] = field(default_factory=dict)  # carried to the next round
    numbers: dict[str, Any] = field(default_factory=dict)  # carried to the next round


@dataclass(frozen=True)
class _Judgement:
    """Coefficients cᵢ of Σ cᵢΔᵢ, or a rule for numbers and the factors to apply before it."""

    coefficients: dict[str, float]
    scores: dict[str, float]
    told: dict[str, str]
    numbers: dict[str, Any]
    rule: coordinates.Rule | None = None
    factors: dict[str, float] = field(default_factory=dict)  # of the silos that the rule is given


def combine(given: Round, updates: Mapping[str, Update], folder: Path, stored: Sequence[Stored] = ()) -> Combined:
    """Write the next global to ``folder``/`OUTGOING`, and beside it what is carried on.

    Args:
        stored: sums of some of the groups, of the `summands` weights.

    Raises:
        UpdateRefused: a tensor of an update is corrupt or not finite, or its norm is not what its header says; nothing of use was written.
        SumDamaged: a stored sum does not have its digest; nothing of use was written.
        QuorumError: too few updates for the robust rule.
        SilotuneError: the result is not finite in float32.
    """
    terms, out = given.terms, folder / OUTGOING
    counts = _counts(terms, updates)
    if terms.robust is None and terms.clip is None and not terms.zeroing:
        return _plain(given, updates, counts, out, stored)
    judgement = _judged(given, updates, counts)
    if terms.traits.combine == "product":
        found = pairs_mean(given.incoming, updates, out, given.scale, lambda _, before, pairs, rest: _product(judgement, before, pairs))
        norms, change, residuals, spectra = found.norms, found.change, found.residuals, found.spectra
        files: dict[str, Path] = {}
    else:
        norms, change, files = _tensors(given, updates, judgement, out)
        residuals, spectra = {}, {}
    weights = judgement.coefficients or {silo: float(silo in judgement.factors) for silo in sorted(updates)}
    total = math.fsum(weights.values()) or 1.0
    return Combined(
        {silo: weight / total for silo, weight in weights.items()}, norms, change, judgement.scores, judgement.told, residuals, spectra, files,
        judgement.numbers,
    )  # fmt: skip


def combine_sum(given: Round, path: Path, weights: Mapping[str, float], folder: Path) -> Combined:
    """As `combine`, of a weighted sum that was made elsewhere, of updates that nobody here has seen.

    Args:
        path: tensor file, float32.
        weights: of the silos that are in it, by which they were multiplied.
    """
    out, total = folder / OUTGOING, math.fsum(weights.values())
    optimizer, state, files = _server(given, len(weights), out)
    term = Term(open_tensor_file(path), 1.0)
    change = finish(given.incoming, [term], total, len(weights), out, optimizer, state, given.terms.fan_in, lambda: None)
    return Combined({silo: weight / total for silo, weight in weights.items()}, {}, change, files=files)


def _counts(terms: Aggregation, updates: Mapping[str, Update]) -> dict[str, float]:
    return weigh(updates, "uniform" if terms.traits.server == "dynamic" else terms.weights)


def summands(terms: Aggregation, updates: Mapping[str, Update]) -> tuple[dict[str, float], float | None]:
    """Of a mean: what each update is multiplied by before it is added, which no other update changes, and what the sum is divided by, where that
    is not the weights' own sum."""
    counts = _counts(terms, updates)
    if terms.traits.by_steps:
        return server_optimizer.fednova_weights(counts, {s: float(u.header.steps) for s, u in updates.items()})
    return counts, None


def _plain(
    given: Round, updates: Mapping[str, Update], counts: dict[str, float], out: Path, stored: Sequence[Stored]
) -> Combined:  # fmt: skip
    """No stage before the mean."""
    terms, incoming = given.terms, given.incoming
    total = math.fsum(counts.values())
    shares = {silo: count / total for silo, count in counts.items()}
    if terms.traits.combine == "mean":
        weights, divisor = summands(terms, updates)
        optimizer, state, files = _server(given, len(updates), out)
        if given.groups:
            mean = grouped_mean(
                incoming, given.groups, updates, weights, stored, out, total=divisor, optimizer=optimizer, state=state, fan_in=terms.fan_in
            )
        else:
            mean = weighted_mean(incoming, updates, weights, out, total=divisor, optimizer=optimizer, state=state, fan_in=terms.fan_in)
        return Combined(shares, mean.norms, mean.change, files=files)
    if terms.traits.combine == "product":
        rest = ServerState(given.carried.files.get(REST), out.with_name("rest.safetensors")) if terms.carry else None
        found = product_mean(incoming, updates, counts, out, scale=given.scale, carry=rest)
        return Combined(
            shares, found.norms, found.change, residuals=found.residuals, spectra=found.spectra, files={REST: rest.after} if rest else {}
        )
    if terms.traits.combine == "fold":
        found = fedex_mean(incoming, updates, counts, out, scale=given.scale)
    else:
        found = flora_mean(incoming, updates, counts, out, scale=given.scale, initial=given.initial)
    return Combined(shares, found.norms, found.change, residuals=found.residuals, spectra=found.spectra)


def _server(given: Round, delivered: int, out: Path) -> tuple[ServerOptimizer, ServerState | None, dict[str, Path]]:
    """The server's optimiser, its state, and what of that is carried on."""
    optimizer = optimizer_of(given.terms, delivered / given.silos)
    if not optimizer.initial:
        return optimizer, None, {}
    after = out.with_name("optimizer.safetensors")
    return optimizer, ServerState(given.carried.files.get(OPTIMIZER), after), {OPTIMIZER: after}


def optimizer_of(terms: Aggregation, participation: float) -> ServerOptimizer:
    """What a strategy does at the server.

    Args:
        participation: share of the federation's silos whose updates are combined.
    """
    step, rate, kind = terms.server, terms.server_rate, terms.traits.server
    if kind == "momentum":
        return server_optimizer.fedavgm(rate, step.beta1)
    if kind == "nesterov":
        return server_optimizer.nesterov(rate, step.beta1)
    if kind == "adagrad":
        return server_optimizer.fedadagrad(rate, tau=step.tau)  # without momentum, as in the paper
    if kind == "yogi":
        return server_optimizer.fedyogi(rate, step.beta1, step.beta2, step.tau)
    if kind == "adam":
        return server_optimizer.fedadam(rate, step.beta1, step.beta2, step.tau)
    if kind == "control":
        return server_optimizer.scaffold(participation)
    if kind == "dynamic":
        return server_optimizer.feddyn(terms.mu, participation)
    return server_optimizer.fedavg()


def _judged(given: Round, updates: Mapping[str, Update], counts: Mapping[str, float]) -> _Judgement:
    """Zeroing, clipping and the robust rule, all from the updates' Gram matrix."""
    terms = given.terms
    gram = _gram(given, updates)
    norms, numbers, stages = gram.norms, {}, []
    if terms.zeroing:
        running = _running(given, "zeroing", norms, bounds.ZEROING_QUANTILE, bounds.ZEROING_RATE)
        stages.append(bounds.zeroing(norms, running))
        numbers["zeroing"] = running.after(norms).estimate
    if terms.clip:
        left = bounds.remaining(norms, stages[0]) if stages else norms
        if terms.clip.norm is not None:
            stages.append(bounds.clipping(left, terms.clip.norm))
        else:
            running = _running(given, "clip", left, terms.clip.quantile or 0.5, bounds.CLIP_RATE)
            stages.append(bounds.clipping(left, running.estimate))
            numbers["clip"] = running.after(left).estimate
    stage = bounds.composed(norms, *stages)
    factors, told = stage.factors, dict(stage.told)
    if terms.robust is None:
        total = math.fsum(counts.values())
        return _Judgement({s: counts[s] / total * factors[s] for s in gram.silos}, {}, told, numbers)
    rule = terms.robust.rule
    robust.require_enough(rule, len(gram.silos), terms.robust.hostile)
    if rule in ("median", "trimmed-mean"):
        by_number = coordinates.median() if rule == "median" else coordinates.trimmed_mean(terms.robust.hostile)
        return _Judgement({}, {}, told, numbers, by_number, {s: factors[s] for s in gram.silos})
    verdict = _verdict(given, gram.scaled(factors), counts, numbers)
    told |= verdict.left_out
    if rule == "bulyan":
        chosen = {s: factors[s] for s, c in verdict.coefficients.items() if c > 0}
        by_number = coordinates.mean_around_median(len(gram.silos) - 4 * terms.robust.hostile)
        return _Judgement({}, verdict.scores, told, numbers, by_number, chosen)
    return _Judgement({s: c * factors[s] for s, c in verdict.coefficients.items()}, verdict.scores, told, numbers)


def _gram(given: Round, updates: Mapping[str, Update]) -> Gram:
    """Of what is combined: of products, or of the tensors themselves. Of two factors whose product is harmless each may do harm to a mean of factors."""
    names = sorted(next(iter(updates.values())).file.entries)
    products = given.terms.traits.combine == "product"
    return updates_gram(updates, names, lambda silo, name: updates[silo].tensor(name), given.incoming.read if products else None)


def _running(given: Round, name: str, norms: Mapping[str, float], quantile: float, rate: float) -> bounds.RunningQuantile:
    known = given.carried.numbers.get(name)
    return bounds.first_quantile(norms, quantile, rate) if known is None else bounds.RunningQuantile(float(known), quantile, rate)


def _verdict(given: Round, gram: Gram, counts: Mapping[str, float], numbers: dict[str, Any]) -> robust.Verdict:
    """Of the rules that weigh silos; what they remember goes into ``numbers``."""
    terms = given.terms.robust
    assert terms is not None
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
    known = given.carried.numbers.get("likeness")
    memory = Likeness(tuple(known["silos"]), np.array(known["total"]), np.array(known["weight"])) if known else None
    verdict, memory = foolsgold(gram, counts, memory)
    numbers["likeness"] = {"silos": list(memory.silos), "total": memory.total.tolist(), "weight": memory.weight.tolist()}
    return verdict


def _product(judgement: _Judgement, before: LoraPair, pairs: Mapping[str, LoraPair]) -> Best:
    if judgement.rule is None:
        return weighed_product(before, pairs, judgement.coefficients)
    return rule_on_products(before, {s: pairs[s] for s in judgement.factors}, judgement.rule, judgement.factors)


def _tensors(
    given: Round, updates: Mapping[str, Update], judgement: _Judgement, out: Path
) -> tuple[dict[str, float], float, dict[str, Path]]:
    """Of tensors that mean the same in all silos: (norms, change, what is carried on)."""
    optimizer, state, files = _server(given, len(updates), out)
    if judgement.rule is None:
        mean = weighted_mean(
            given.incoming, updates, judgement.coefficients, out, total=1.0, optimizer=optimizer, state=state, fan_in=given.terms.fan_in
        )
        return mean.norms, mean.change, files
    norms = {silo: update.verify() for silo, update in sorted(updates.items())}
    chosen, entries = sorted(judgement.factors), next(iter(updates.values())).file.entries
    delta = out.with_name("delta.safetensors")
    with tensor_writer(delta, {n: e.shape for n, e in entries.items()}, "F32", METADATA) as file:
        for name in sorted(entries):
            rows = [updates[silo].tensor(name) for silo in chosen]
            combined = coordinates.combine(rows, judgement.rule, [judgement.factors[s] for s in chosen])
            file.write(name, to_bytes(combined, "F32"))
    one = Term(open_tensor_file(delta), 1.0)
    change = finish(given.incoming, [one], 1.0, len(chosen), out, optimizer, state, given.terms.fan_in, lambda: None)
    delta.unlink()
    return norms, change, files
