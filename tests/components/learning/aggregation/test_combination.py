"""One suite of behaviour for every strategy, every robust rule and every bound, by the very call that the aggregate box makes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from combining import SCALE, Arrays, Course, QuadraticSilo, distance, first_global, random_updates, weights_of
from threadpoolctl import threadpool_limits

from silotune.components.errors import QuorumError
from silotune.components.learning.aggregation.factors import A, B
from silotune.components.learning.update import UpdateRefused
from silotune.components.terms.strategies import RULES, STRATEGIES, Aggregation
from silotune.components.terms.training import Training

SILOS = tuple(f"s{i}" for i in range(7))  # as many as Bulyan needs against one
SAME = 3e-6  # relative; what float32 and another order of summation may change


def kind_of(strategy: str) -> str:
    return "core" if strategy == "fed-sb" else "lora" if STRATEGIES[strategy].lora_only else "plain"


def robust(rule: str) -> dict[str, Any]:
    return {"robust": {"rule": rule} | ({"trusted": "s0"} if rule == "fltrust" else {})}


Case = tuple[dict[str, Any], str]  # terms, and what a global consists of
PLAIN: dict[str, Case] = {name: ({"strategy": name}, kind_of(name)) for name in STRATEGIES}
PLAIN["product that carries"] = ({"strategy": "product", "carry": True}, "lora")
ROBUST: dict[str, Case] = {f"{rule} of tensors": ({"strategy": "fedavg"} | robust(rule), "plain") for rule in RULES}
ROBUST |= {f"{rule} of products": ({"strategy": "product"} | robust(rule), "lora") for rule in RULES}
ROBUST["median, then yogi"] = ({"strategy": "fedyogi"} | robust("median"), "plain")
BOUNDED: dict[str, Case] = {
    "fixed clip": ({"strategy": "fedavg", "clip": {"norm": 1e3}}, "plain"),
    "adaptive clip and zeroing": ({"strategy": "fedavg", "clip": {"quantile": 0.5}, "zeroing": True}, "plain"),
    "the same of products": ({"strategy": "product", "clip": {"quantile": 0.5}, "zeroing": True}, "lora"),
    "all stages": ({"strategy": "fedavgm", "clip": {"quantile": 0.5}, "zeroing": True} | robust("multi-krum"), "plain"),
}
EVERY = pytest.mark.parametrize("case", [*PLAIN, *ROBUST, *BOUNDED])
CASES = PLAIN | ROBUST | BOUNDED


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Course]:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of small files whose durability nobody asks for

    def make(case: str, folder: str = "one", silos: int = len(SILOS), **more: Any) -> Course:
        terms, kind = CASES[case]
        return Course(tmp_path / folder, Aggregation.model_validate(terms | more), first_global(kind), silos)

    return make


Begin = Callable[..., Course]


def two_rounds(course: Course, order: tuple[str, ...], scale: int = 1) -> tuple[bytes, bytes]:
    """Silo sᵢ sends the same in whatever order, and claims (i + 1) · scale examples; the second round goes on with what the first has carried."""
    found = []
    for number in range(2):
        sent = random_updates(course, {silo: 100 * number + int(silo[1:]) for silo in order})
        found.append(course.close(sent, {s: (int(s[1:]) + 1) * scale for s in order}, {s: int(s[1:]) + 1 for s in order}))
    return found[0], found[1]


@EVERY
def test_order_of_arrival_changes_no_byte(begin: Begin, case: str) -> None:
    shuffled = ("s3", "s6", "s0", "s5", "s1", "s4", "s2")
    assert two_rounds(begin(case, "one"), SILOS) == two_rounds(begin(case, "other"), shuffled)


@EVERY
def test_it_does_not_matter_who_sends_what(begin: Begin, case: str) -> None:
    names = dict(zip(SILOS, ("s5", "s3", "s0", "s6", "s1", "s2", "s4"), strict=True))
    renamed = {"robust": {"rule": "fltrust", "trusted": names["s0"]}} if "fltrust" in case else {}
    one, other = begin(case, "one"), begin(case, "other", **renamed)
    sent = random_updates(one, {silo: i for i, silo in enumerate(SILOS)})
    examples = {silo: i + 1 for i, silo in enumerate(SILOS)}
    one.close(sent, examples, examples)
    other.close({names[s]: a for s, a in sent.items()}, moved := {names[s]: n for s, n in examples.items()}, moved)
    assert distance(weights_of(other.state), weights_of(one.state)) < SAME
    assert one.made
    assert other.made
    assert {names[s]: w for s, w in one.made.weights.items()} == pytest.approx(other.made.weights)


@EVERY
def test_identical_in_same_out(begin: Begin, case: str) -> None:
    """Silos that all send the same come to what one of them alone comes to without any rule or bound."""
    many, one = begin(case, "many"), begin(case, "one", silos=1, robust=None, clip=None, zeroing=False)
    (update,) = random_updates(one, {"s0": 1}).values()
    many.close(dict.fromkeys(SILOS, update), {silo: i + 1 for i, silo in enumerate(SILOS)})
    one.close({"s0": update})
    assert distance(weights_of(many.state), weights_of(one.state)) < SAME
    assert distance(weights_of(first_global(CASES[case][1])), weights_of(one.state)) > 1e-3, "else there was nothing to compare"


@EVERY
def test_scale_of_weights_does_not_matter(begin: Begin, case: str) -> None:
    one, double, other = (begin(case, str(scale)) for scale in (1, 1024, 1000))
    if "product" in STRATEGIES[one.terms.strategy].combine or one.terms.traits.folds:  # shares are made first, and may round otherwise
        two_rounds(one, SILOS, 1)
        two_rounds(double, SILOS, 1024)
        assert distance(weights_of(double.state), weights_of(one.state)) < SAME
    else:
        assert two_rounds(one, SILOS, 1) == two_rounds(double, SILOS, 1024), "no bit changes where the scale is a power of two"
    two_rounds(other, SILOS, 1000)
    assert distance(weights_of(other.state), weights_of(one.state)) < SAME


TAU, RATE = 1e-3, 0.01  # defaults of aggregation.server
FIRST_STEPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # what a server without state makes of a mean, by the papers
    "add": lambda d: d,
    "control": lambda d: d,
    "momentum": lambda d: d,  # v = Δ
    "nesterov": lambda d: 0.7 * (1 + 0.9) * d,
    "adagrad": lambda d: RATE * d / (np.sqrt(TAU**2 + d**2) + TAU),
    "yogi": lambda d: RATE * 0.1 * d / (np.sqrt(TAU**2 - 0.01 * d**2 * np.sign(TAU**2 - d**2)) + TAU),
    "adam": lambda d: RATE * 0.1 * d / (np.sqrt(0.99 * TAU**2 + 0.01 * d**2) + TAU),
    "dynamic": lambda d: 2 * d,  # h = -αΔ of all silos, and Δ - h/α
}


@pytest.mark.parametrize("case", [*PLAIN, *BOUNDED])
def test_one_silo_is_the_identity_up_to_the_servers_step(begin: Begin, case: str) -> None:
    course = begin(case, silos=1)
    if course.terms.robust:
        with pytest.raises(QuorumError, match="1 came"):
            course.close(random_updates(course, {"s0": 1}))
        return
    before, (update,) = dict(course.state), random_updates(course, {"s0": 1}).values()
    course.close({"s0": update}, {"s0": 17}, {"s0": 5})
    step = FIRST_STEPS[course.terms.traits.server]
    wanted = weights_of({n: a + step(update[n].astype(np.float64)) if n in update else a.astype(np.float64) for n, a in before.items()})
    assert distance(weights_of(course.state), wanted) < SAME


@pytest.mark.parametrize("case", ROBUST)
def test_rules_refuse_fewer_silos_than_they_need(begin: Begin, case: str) -> None:
    course = begin(case)
    assert course.terms.robust
    needs = RULES[course.terms.robust.rule].least
    enough = needs["silos"] + needs["hostile"]
    course.close(random_updates(course, {silo: i for i, silo in enumerate(SILOS[:enough])}))
    with pytest.raises(QuorumError, match=f"needs {enough} updates against 1 hostile, {enough - 1} came"):
        course.close(random_updates(course, {silo: i for i, silo in enumerate(SILOS[: enough - 1])}))


LORA = [name for name in STRATEGIES if name != "fed-sb"]


@pytest.mark.parametrize("name", [*LORA, "fed-sb"])
def test_the_composition_table_says_which_keep_the_mean_of_the_products(begin: Begin, name: str) -> None:
    """In the second round, from factors that are not zero, and by the share of the examples."""
    course, strategy = begin(name), STRATEGIES[name]
    if strategy.server != "add" or strategy.by_steps:
        pytest.skip("the server's step is no mean")
    course.state = first_global("core" if name == "fed-sb" else "lora")
    for number in range(2):
        before = dict(course.state)
        sent = random_updates(course, {silo: 50 * number + i for i, silo in enumerate(SILOS)}, 0.3)
        course.close(sent, {silo: i + 1 for i, silo in enumerate(SILOS)})
    dense = {silo: weights_of({n: a + tensors.get(n, 0.0) for n, a in before.items()}) for silo, tensors in sent.items()}
    mean = {n: sum((i + 1) / 28 * dense[silo][n] for i, silo in enumerate(SILOS)) for n in dense["s0"]}
    best = {n: truncated(w) for n, w in mean.items()}
    found = weights_of(course.state)
    if strategy.exact == "yes":
        assert distance(found, mean) < SAME
    elif strategy.exact == "no":
        assert distance(found, mean) > 1.05 * distance(best, mean) > 1e-2
    else:
        assert distance(found, best) < SAME
        assert distance(best, mean) > 1e-2


def truncated(w: np.ndarray, rank: int = 3) -> np.ndarray:
    u, s, vt = np.linalg.svd(w)
    return np.asarray((u[:, :rank] * s[:rank]) @ vt[:rank])


# Silos with one and the same loss, which take unequal numbers of steps towards its optimum

ROUNDS = 25
SERVERS = {
    "momentum": {"beta1": 0.3}, "nesterov": {"beta1": 0.3}, "adagrad": {"learning_rate": 1.0, "tau": 0.1},
    "yogi": {"learning_rate": 0.3, "beta1": 0.3, "beta2": 0.5, "tau": 0.1}, "adam": {"learning_rate": 0.3, "beta1": 0.3, "beta2": 0.5, "tau": 0.1},
}  # fmt: skip


def optimum(kind: str, strategy: str) -> Arrays:
    """A product of rank 2 that the strategy can reach from the first global."""
    rng, start = np.random.default_rng(8), first_global(kind)
    if kind == "plain":
        return {n: a + rng.standard_normal(a.shape) for n, a in start.items()}
    found = {}
    for module in ("m", "n"):
        b, a = rng.standard_normal((9, 2)), rng.standard_normal((2, 11)) / np.sqrt(11)
        if strategy in ("ffa", "fed-sb"):
            a = rng.standard_normal((2, 3)) @ start[module + A]
        if strategy == "fed-sb":
            b = start[module + B] @ rng.standard_normal((3, 2))
        found[module] = SCALE * b @ a
    return found


@EVERY
def test_silos_of_one_quadratic_loss_come_to_its_optimum(begin: Begin, case: str) -> None:
    terms, kind = CASES[case]
    course = begin(case, server=SERVERS.get(STRATEGIES[terms["strategy"]].server, {}))
    rule = course.terms.robust
    course.silos = sum(RULES[rule.rule].least.values()) if rule else 2
    target = optimum(kind, terms["strategy"])
    silos = {silo: QuadraticSilo(target, 1.0) for silo in SILOS[: course.silos]}
    rate, least = (0.1, 3) if kind == "plain" else (0.04, 8)  # steps on factors must be small
    steps = {silo: least + i for i, silo in enumerate(silos)}
    away = distance(weights_of(course.state), target)
    for _ in range(ROUNDS):
        course.close({s: silo.train(course, steps[s], rate) for s, silo in silos.items()}, steps=steps)
    assert distance(weights_of(course.state), target) < 0.02 * away


def test_fednova_counts_steps_by_their_rates(begin: Begin) -> None:
    """Silos with one gradient each, whatever the weights: the step is along the gradients' mean by examples, not nearer to whoever warms up less."""
    terms = {"s0": Training(steps=4, warmup_steps=4), "s1": Training(steps=20, warmup_steps=4, schedule="linear")}
    rates = {"s0": [0.25, 0.5, 0.75, 1.0], "s1": [0.25, 0.5, 0.75, 1.0, *(1 - i / 16 for i in range(8))]}  # s1 was stopped after 12 steps
    course, rng = begin("fednova", silos=2), np.random.default_rng(3)
    course.training_of = terms.__getitem__
    before = dict(course.state)
    gradients = {s: {n: rng.standard_normal(a.shape) for n, a in before.items()} for s in terms}
    sent = {s: {n: (sum(rates[s]) * g).astype(np.float32) for n, g in its.items()} for s, its in gradients.items()}
    course.close(sent, {"s0": 1, "s1": 3}, {s: len(r) for s, r in rates.items()})
    worth = 0.25 * sum(rates["s0"]) + 0.75 * sum(rates["s1"])
    for name, array in before.items():
        mean = 0.25 * gradients["s0"][name] + 0.75 * gradients["s1"][name]
        np.testing.assert_allclose(course.state[name], array + worth * mean, rtol=1e-5, atol=1e-5)


def test_control_variates_settle_where_the_loss_is_least_that_weighs_silos_as_their_updates_are(begin: Begin) -> None:
    """Whatever their steps: of the silos' optima, each its own, the mean by the examples asked for. One silo is absent now and then."""
    targets = [{n: a + np.float32(i) for n, a in first_global("plain").items()} for i in (1, 2, 5)]
    steps, rate = {"s0": 2, "s1": 3, "s2": 7}, 0.05
    course = begin("scaffold", silos=3)
    course.parts = {silo: count / 12 for silo, count in steps.items()}
    silos = {silo: QuadraticSilo(target, 1.0) for silo, target in zip(steps, targets, strict=True)}
    for number in range(45):
        present = [silo for silo in silos if number % 5 or silo != "s1"]
        course.close({s: silos[s].train(course, steps[s], rate) for s in present}, steps, steps)
    wanted = {n: sum(course.parts[s] * t[n] for s, t in zip(steps, targets, strict=True)) for n in course.state}
    assert distance(course.state, wanted) < 1e-2
    alike = {n: np.mean([t[n] for t in targets], axis=0) for n in course.state}
    assert distance(alike, wanted) > 0.1, "else the weights could not show"


def test_an_update_that_counts_as_zero_is_a_zero_among_the_others(begin: Begin) -> None:
    """With a rule by number, too: left out altogether it would move the median to 1.5."""
    for rule, wanted in (("median", 1.0), ("trimmed-mean", 1.0)):
        course = begin("median of tensors", rule, zeroing=True, robust={"rule": rule})
        before = dict(course.state)
        course.close({f"s{i}": {n: np.full_like(a, x) for n, a in before.items()} for i, x in enumerate((1.0, 2.0, 1000.0))})
        for name, array in before.items():
            np.testing.assert_allclose(course.state[name], array + wanted, rtol=1e-6)
        assert course.made
        assert "count as zero" in course.made.told["s2"]


def test_what_a_rule_leaves_out_is_named_with_its_score(begin: Begin) -> None:
    for case in ("krum of products", "multi-krum of tensors", "bulyan of tensors", "fltrust of products", "norm-bound of products"):
        course = begin(case, case.replace(" ", "-"))
        sent = random_updates(course, {silo: i for i, silo in enumerate(SILOS)})
        sent["s4"] = (
            {n: -30 * a for n, a in sent["s4"].items()}
            if "norm" in case
            else {n: -3 * a if n.endswith(B) or "." not in n else a for n, a in sent["s4"].items()}
        )
        course.close(sent)
        assert course.made
        assert f"{course.made.scores['s4']:.3g}" in course.made.told["s4"]
        assert (course.made.weights["s4"] == 0) == ("norm" not in case)


@pytest.mark.parametrize("rule", ["", "median", "multi-krum"])
def test_any_number_of_threads_gives_the_same_bytes(tmp_path: Path, rule: str) -> None:
    """Of a module as large as those whose linear algebra is shared out to threads: a lost global is made again on another machine."""
    size, rank, rng = 1536, 16, np.random.default_rng(0)

    def pair(scale: float) -> Arrays:
        return {
            "m" + ending: (scale * rng.standard_normal(shape)).astype(np.float32)
            for ending, shape in ((A, (rank, size)), (B, (size, rank)))
        }

    first, sent, found = pair(1.0), {f"s{i:02d}": pair(0.1) for i in range(16)}, set()
    for threads in (1, 2):
        terms = Aggregation.model_validate({"strategy": "product"} | (robust(rule) if rule else {}))
        course = Course(tmp_path / str(threads), terms, dict(first), len(sent))
        with threadpool_limits(threads, user_api="blas"):
            found.add(course.close(sent))
    assert len(found) == 1


# What is found late


@EVERY
def test_a_damaged_tensor_is_refused_with_its_silo_before_anything_is_written(begin: Begin, case: str, tmp_path: Path) -> None:
    course = begin(case)
    sent = random_updates(course, {silo: i for i, silo in enumerate(SILOS)})
    spoiled = {n: a.copy() for n, a in sent["s4"].items()}
    last = sorted(spoiled)[-1]
    spoiled[last].flat[-1] = np.nan

    def write(path: Path, silo: str, *rest: Any) -> Any:
        update = written(path, silo, *rest)
        if silo == "s4":
            data = bytearray(path.read_bytes())
            data[-1] ^= 0x10
            path.write_bytes(data)
        return update

    import combining

    written = combining.written
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(combining, "written", write)
        with pytest.raises(UpdateRefused, match="does not have the digest") as caught:
            course.close(sent)
    assert caught.value.silo == "s4"
    assert not (tmp_path / "one" / "1" / "outgoing.safetensors").exists()
