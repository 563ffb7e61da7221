"""One round's aggregation, from accepted updates to the next global: the stages in their order, by the terms.

    refuse       what does not answer the plan never comes here; what is found while reading ends in UpdateRefused
    zero, clip   each update gets a factor from 0 to 1, by its norm (`bounds`)
    judge        a robust rule gives each silo a coefficient (`robust`), or works number by number (`coordinates`)
    noise        silo-level privacy adds noise to the clipped sum (`privacy.silo_noise`)
    combine      the mean of the differences, or of LoRA's products (`mean`, `lora_mean`, `robust_product`)
    server step  an optimiser at the server turns that into the next global (`server_optimizer`)

What a stage carries to the next round is part of the `Carried` state, which a commit names by digest. The same updates, terms and state give the
same bytes, on however many threads: linear algebra is given one. Where none is used, as in means and in medians of plain tensors, on any processor;
products and rules that weigh silos, on one kind of processor with one version of numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from silotune.components.learning.aggregation import bounds, coordinates, server_optimizer
from silotune.components.learning.aggregation.factors import LoraPair
from silotune.components.learning.aggregation.judgement import Judgement, judged
from silotune.components.learning.aggregation.lora_mean import fedex_mean, flora_mean, pairs_mean, product_mean
from silotune.components.learning.aggregation.mean import METADATA, ServerState, finish, weigh, weighted_mean
from silotune.components.learning.aggregation.product import Best
from silotune.components.learning.aggregation.robust_product import rule_on_products, weighed_product
from silotune.components.learning.aggregation.server_optimizer import ServerOptimizer
from silotune.components.learning.aggregation.side_by_side import SideBySide
from silotune.components.learning.aggregation.spectrum import Spectrum
from silotune.components.learning.aggregation.summation import Term
from silotune.components.learning.aggregation.tree import Stored, grouped_mean
from silotune.components.learning.privacy.silo_noise import SiloNoise
from silotune.components.learning.schedule import steps_worth
from silotune.components.learning.tensor_file import TensorFile, open_tensor_file, tensor_writer, to_bytes
from silotune.components.learning.update import Update
from silotune.components.terms.strategies import Aggregation
from silotune.components.terms.training import Training

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
    parts: Mapping[str, float] = field(default_factory=dict)  # `Agreement.parts`; each silo's the same where there are none
    training_of: Callable[[str], Training] | None = None  # a silo's terms of training; None: its steps all had one rate
    scale: float = 1.0  # LoRA's alpha / r
    carried: Carried = field(default_factory=Carried)
    initial: Mapping[str, np.ndarray] = field(default_factory=dict)  # flora: A by tensor name, as adapters begin anew
    groups: Sequence[Sequence[str]] = ()  # `Aggregation.groups` of all silos that were asked
    noise: SiloNoise | None = None  # for silo-level privacy; then there is a clip, and every silo counts as one


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


@threadpool_limits.wrap(limits=1, user_api="blas")  # several share sums out otherwise, and round them otherwise
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
    if given.noise:
        return _covered(given, given.noise, updates, out)
    judgement, norms = judged(terms, updates, counts, given.carried.numbers, given.incoming.read)
    chosen = {silo: update for silo, update in updates.items() if silo in judgement.factors or judgement.coefficients.get(silo)} or updates
    residuals: dict[str, float] = {}
    spectra: dict[str, Spectrum] = {}
    files: dict[str, Path] = {}
    if terms.traits.combine == "product":
        found = pairs_mean(given.incoming, chosen, out, given.scale, lambda _, before, pairs, rest: _product(judgement, before, pairs))
        read, change, residuals, spectra = found.norms, found.change, found.residuals, found.spectra
    else:
        read, change, files = _tensors(given, chosen, judgement, out)
    weights = judgement.coefficients or {silo: float(silo in judgement.factors) for silo in sorted(updates)}
    total = math.fsum(weights.values()) or 1.0
    return Combined(
        {silo: weight / total for silo, weight in weights.items()}, norms or read, change, judgement.scores, judgement.told, residuals, spectra, files,
        judgement.numbers,
    )  # fmt: skip


def _covered(given: Round, noise: SiloNoise, updates: Mapping[str, Update], out: Path) -> Combined:
    """Clipped, summed, and the sum covered by noise. Norms are summed in float64: that of a clipped update must not be above its bound."""
    terms = given.terms
    if terms.clip is None or terms.weights != "uniform" or terms.zeroing or terms.robust or terms.traits.combine != "mean":
        raise ValueError("noise: covers the sum of clipped updates of equal weight only")
    norms, numbers = {silo: update.verify() for silo, update in sorted(updates.items())}, dict[str, Any]()
    if terms.clip.norm is not None:
        bound = terms.clip.norm
    else:
        bound = float(given.carried.numbers.get("clip", terms.clip.initial or bounds.FIRST_BOUND))
        running = bounds.RunningQuantile(bound, terms.clip.quantile or 0.5, bounds.CLIP_RATE)
        numbers["clip"] = running.moved(noise.share(running.within(norms))).estimate
    stage, (optimizer, state, files) = bounds.clipping(norms, bound), _server(given, len(updates), out)
    mean = weighted_mean(
        given.incoming, updates, stage.factors, out, total=len(updates), optimizer=optimizer, state=state, fan_in=terms.fan_in,
        noise=noise.for_bound(bound),
    )  # fmt: skip
    return Combined(dict.fromkeys(norms, 1 / len(norms)), norms, mean.change, told=stage.told, files=files, numbers=numbers)


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
    return weigh(updates, "uniform" if terms.weighs_alike else terms.weights)


def summands(
    terms: Aggregation, updates: Mapping[str, Update], training_of: Callable[[str], Training] | None = None
) -> tuple[dict[str, float], float | None]:  # fmt: skip
    """Of a mean: what each update is multiplied by before it is added, which no other update changes, and what the sum is divided by, where that
    is not the weights' own sum."""
    counts = _counts(terms, updates)
    if terms.traits.by_steps:
        return server_optimizer.fednova_weights(
            counts, {s: _worth(u.header.steps, training_of and training_of(s)) for s, u in updates.items()}
        )
    return counts, None


def _worth(done: int, training: Training | None) -> float:
    """A silo's steps by their rates, which FedNova's ‖aᵢ‖₁ is: AdamW's moments are means of gradients, so that no step counts more than its rate."""
    return float(done) if training is None else steps_worth(done, training.steps, training.schedule, training.warmup_steps)


def memory_weights(terms: Aggregation, parts: Mapping[str, float]) -> dict[str, float]:
    """What each silo's memory counts for, so that the server's is Σ pᵢcᵢ over all silos: N·pᵢ, which is 1 where all count alike.

    The paper's mean is (1/N) Σ, over losses that count alike (Karimireddy et al. 2019, arXiv:1910.06378, Eq. 1). Where silo i's counts pᵢ, the corrections
    cᵢ - c cancel in the mean of the updates only if c is weighed as they are; else the course settles where the unweighted loss is least.
    """
    return {silo: len(parts) * part for silo, part in parts.items()} if terms.traits.local == "control" else {}


def _plain(
    given: Round, updates: Mapping[str, Update], counts: dict[str, float], out: Path, stored: Sequence[Stored]
) -> Combined:  # fmt: skip
    """No stage before the mean."""
    terms, incoming = given.terms, given.incoming
    total = math.fsum(counts.values())
    shares = {silo: count / total for silo, count in counts.items()}
    if terms.traits.combine == "mean":
        weights, divisor = summands(terms, updates, given.training_of)
        memory = memory_weights(terms, given.parts)
        optimizer, state, files = _server(given, len(updates), out)
        if given.groups:
            mean = grouped_mean(
                incoming, given.groups, updates, weights, stored, out, total=divisor, optimizer=optimizer, state=state, fan_in=terms.fan_in,
                memory=memory,
            )  # fmt: skip
        else:
            mean = weighted_mean(
                incoming, updates, weights, out, total=divisor, optimizer=optimizer, state=state, fan_in=terms.fan_in, memory=memory
            )
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


def _product(judgement: Judgement, before: LoraPair, pairs: Mapping[str, LoraPair]) -> Best:
    if judgement.rule is None:
        return weighed_product(before, pairs, judgement.coefficients)
    return rule_on_products(before, {s: pairs[s] for s in judgement.factors}, judgement.rule, judgement.factors)


def _tensors(
    given: Round, updates: Mapping[str, Update], judgement: Judgement, out: Path
) -> tuple[dict[str, float], float, dict[str, Path]]:
    """Of tensors that mean the same in all silos: (norms, change, what is carried on)."""
    optimizer, state, files = _server(given, len(updates), out)
    if judgement.rule is None:
        weights = {silo: judgement.coefficients[silo] for silo in updates}
        mean = weighted_mean(given.incoming, updates, weights, out, total=1.0, optimizer=optimizer, state=state, fan_in=given.terms.fan_in)
        return mean.norms, mean.change, files
    reader, chosen, entries = SideBySide(updates), sorted(updates), next(iter(updates.values())).file.entries
    factors = [judgement.factors[silo] for silo in chosen]
    delta = out.with_name("delta.safetensors")
    with tensor_writer(delta, {n: e.shape for n, e in entries.items()}, "F32", METADATA) as file:
        for name, found in zip(sorted(entries), reader.tensors(sorted(entries)), strict=True):
            file.write(name, to_bytes(coordinates.combine([found[silo] for silo in chosen], judgement.rule, factors), "F32"))
    norms = reader.norms()
    one = Term(open_tensor_file(delta), 1.0)
    change = finish(given.incoming, [one], 1.0, len(chosen), out, optimizer, state, given.terms.fan_in, lambda: None)
    delta.unlink()
    return norms, change, files
