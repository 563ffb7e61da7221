"""Robust rules against references written from the papers with loops over whole vectors, and what every rule must keep."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from silotune.components.errors import QuorumError
from silotune.components.learning.aggregation.foolsgold import foolsgold, remember
from silotune.components.learning.aggregation.gram import Gram
from silotune.components.learning.aggregation.robust import (
    Verdict,
    bulyan_selection,
    fltrust,
    geometric_median,
    krum,
    krum_scores,
    least_silos,
    multi_krum,
    norm_bound,
    require_enough,
)
from silotune.components.terms.strategies import RULES

Vectors = dict[str, np.ndarray]


def vectors(count: int, seed: int = 0, size: int = 30) -> Vectors:
    """Updates with a common part, of unequal lengths."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(size)
    return {f"s{i}": (0.5 + rng.random()) * (common + rng.standard_normal(size)) for i in range(count)}


def gram(x: Vectors) -> Gram:
    silos = tuple(sorted(x))
    return Gram(silos, np.array([[x[a] @ x[b] for b in silos] for a in silos]))


def weights(x: Vectors) -> dict[str, float]:
    return {silo: 1.0 + i % 3 for i, silo in enumerate(sorted(x))}


def combined(x: Vectors, verdict: Verdict) -> np.ndarray:
    return np.sum([c * x[silo] for silo, c in verdict.coefficients.items()], axis=0)


RULES_ON_GRAM: dict[str, Callable[[Gram, dict[str, float]], Verdict]] = {
    "norm-bound": norm_bound,
    "fixed norm-bound": lambda g, w: norm_bound(g, w, bound=3.0),
    "krum": lambda g, w: krum(g, 1),
    "multi-krum": lambda g, w: multi_krum(g, w, 1),
    "bulyan": lambda g, w: bulyan_selection(g, 1),
    "geometric-median": geometric_median,
    "foolsgold": lambda g, w: foolsgold(g, w)[0],
    "fltrust": lambda g, w: fltrust(g, "s2"),
}
EVERY = pytest.mark.parametrize("rule", RULES_ON_GRAM.values(), ids=list(RULES_ON_GRAM))


def reference_scores(x: Vectors, hostile: int) -> dict[str, float]:
    near = max(1, len(x) - hostile - 2)
    return {a: sum(sorted(np.linalg.norm(x[a] - x[b]) ** 2 for b in x if b != a)[:near]) for a in x}


@pytest.mark.parametrize(("count", "hostile"), [(5, 1), (7, 2), (9, 1)])
def test_krum_takes_the_update_with_the_least_score(count: int, hostile: int) -> None:
    x = vectors(count)
    scores = reference_scores(x, hostile)
    verdict = krum(gram(x), hostile)
    best = min(scores, key=scores.__getitem__)
    assert verdict.coefficients == {silo: float(silo == best) for silo in x}
    assert verdict.scores == pytest.approx(scores)
    assert verdict.told.keys() == x.keys() - {best}
    assert verdict.told[max(scores, key=scores.__getitem__)].endswith(f"its own is {max(scores.values()):.3g}")


@pytest.mark.parametrize(("count", "hostile"), [(5, 1), (7, 2)])
def test_multi_krum_takes_the_mean_of_the_best(count: int, hostile: int) -> None:
    x = vectors(count)
    scores = reference_scores(x, hostile)
    best = sorted(x, key=scores.__getitem__)[: count - hostile]
    wanted = np.average([x[s] for s in best], axis=0, weights=[weights(x)[s] for s in best])
    np.testing.assert_allclose(combined(x, multi_krum(gram(x), weights(x), hostile)), wanted, rtol=1e-12)


def test_equal_scores_go_to_the_first_silo() -> None:
    assert krum(Gram(tuple("abcde"), np.eye(5)), 1).coefficients == {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0, "e": 0.0}
    assert krum_scores(np.zeros((1, 1)), 0).tolist() == [0.0]


@pytest.mark.parametrize(("count", "hostile"), [(7, 1), (11, 2), (12, 2)])
def test_bulyan_picks_by_krum_again_and_again(count: int, hostile: int) -> None:
    x = vectors(count)
    left, picked = dict(x), set()
    for _ in range(count - 2 * hostile):
        scores = reference_scores(left, hostile)
        all_of = {a: sum(np.linalg.norm(v - u) ** 2 for u in left.values()) for a, v in left.items()}
        picked.add(best := min(left, key=lambda s, scores=scores, all_of=all_of: (round(scores[s], 9), all_of[s])))
        del left[best]
    verdict = bulyan_selection(gram(x), hostile)
    assert {s for s, c in verdict.coefficients.items() if c} == picked
    assert set(verdict.coefficients.values()) == {0.0, 1 / len(picked)}
    assert verdict.told.keys() == left.keys()


@pytest.mark.parametrize("count", [2, 3, 5, 8])
@pytest.mark.parametrize("far", [1.0, 1e6])
def test_geometric_median_has_the_least_sum_of_distances(count: int, far: float) -> None:
    """Its gradient vanishes, or it lies on an update that outweighs the pull of all others (which is what the median of points is)."""
    x = vectors(count)
    x["s1"] = far * x["s1"]
    w = weights(x)
    z = combined(x, geometric_median(gram(x), w))
    away = {s: float(np.linalg.norm(v - z)) for s, v in x.items()}
    near = 1e-5 * np.median([np.linalg.norm(v) for v in x.values()])
    pulls = [w[s] * (x[s] - z) / away[s] for s in x if away[s] > near]
    held = sum(w[s] for s in x if away[s] <= near)
    assert np.linalg.norm(np.sum(pulls, axis=0)) <= held + 1e-3 * sum(w.values())


def test_geometric_median_against_descent_in_all_coordinates() -> None:
    x = vectors(6)
    points, w = np.stack([x[s] for s in sorted(x)]), np.array([weights(x)[s] for s in sorted(x)])
    z = points.mean(axis=0)
    for _ in range(2000):
        away = z - points
        z = z - 2 * (w @ (away / np.linalg.norm(away, axis=1)[:, None])) / w.sum()
    verdict = geometric_median(gram(x), weights(x))
    np.testing.assert_allclose(combined(x, verdict), z, atol=2e-3)
    assert verdict.scores == pytest.approx({s: np.linalg.norm(x[s] - z) for s in x}, rel=1e-3)


def test_norm_bound_scales_down_to_the_bound() -> None:
    x = vectors(5)
    for bound in (None, 2.0):
        limit = np.median([np.linalg.norm(v) for v in x.values()]) if bound is None else bound
        clipped = [v * min(1, limit / np.linalg.norm(v)) for v in x.values()]
        wanted = np.average(clipped, axis=0, weights=list(weights(x).values()))
        verdict = norm_bound(gram(x), weights(x), bound)
        np.testing.assert_allclose(combined(x, verdict), wanted, rtol=1e-12)
        assert verdict.told.keys() == {s for s, v in x.items() if np.linalg.norm(v) > limit} != set()
        assert all(f"the bound is {limit:.3g}" in why for why in verdict.told.values())
        assert verdict.scores == pytest.approx({s: np.linalg.norm(v) for s, v in x.items()})


def test_fltrust_trusts_by_the_cosine_and_takes_the_trusted_norm() -> None:
    x = vectors(5)
    x["s3"] = -x["s3"]
    root = x["s2"]
    trust = {s: max(0.0, v @ root / np.linalg.norm(v) / np.linalg.norm(root)) for s, v in x.items()}
    wanted = sum(trust[s] * np.linalg.norm(root) / np.linalg.norm(v) * v for s, v in x.items()) / sum(trust.values())
    verdict = fltrust(gram(x), "s2")
    np.testing.assert_allclose(combined(x, verdict), wanted, rtol=1e-12)
    assert verdict.told.keys() == {"s3"}
    assert "cosine with the update of s2 must be positive, is -0." in verdict.told["s3"]
    with pytest.raises(QuorumError, match="'gone' has not come"):
        fltrust(gram(x), "gone")


def reference_foolsgold(history: list[np.ndarray]) -> list[float]:
    """Algorithm 1 of the paper, line by line, on similarities given."""
    cs = np.mean(history, axis=0)
    n = len(cs)
    v = [max(cs[i][j] for j in range(n) if j != i) for i in range(n)]
    trust = []
    for i in range(n):
        row = [cs[i][j] * (v[i] / v[j] if v[j] > v[i] > 0 else 1) for j in range(n) if j != i]
        trust.append(min(1.0, max(0.0, 1 - max(row))))
    trust = [a / max(trust) for a in trust]
    return [1.0 if a == 1 else 0.0 if a == 0 else min(1.0, max(0.0, float(np.log(a / (1 - a))) + 0.5)) for a in trust]


def test_foolsgold_against_the_paper() -> None:
    x = vectors(6)
    x["s4"] = x["s5"] + 0.05 * x["s0"]
    verdict, _ = foolsgold(gram(x), dict.fromkeys(x, 2.0))
    wanted = np.array(reference_foolsgold([gram(x).cosines]))
    np.testing.assert_allclose(list(verdict.coefficients.values()), wanted / wanted.sum(), rtol=1e-5)
    assert verdict.coefficients["s4"] == verdict.coefficients["s5"] == 0
    assert verdict.told.keys() == {"s4", "s5"}


def test_foolsgold_pardons_who_is_like_a_hostile_silo_but_less_so_than_that_one_is() -> None:
    cosines = np.array([[1, 0.1, 0.6, 0.1], [0.1, 1, 0.1, 0.1], [0.6, 0.1, 1, 0.95], [0.1, 0.1, 0.95, 1]])
    verdict, _ = foolsgold(Gram(tuple("abhi"), cosines), dict.fromkeys("abhi", 1.0))
    wanted = np.array(reference_foolsgold([cosines]))
    np.testing.assert_allclose(list(verdict.coefficients.values()), wanted / wanted.sum(), rtol=1e-5)
    assert verdict.coefficients == {"a": 0.5, "b": 0.5, "h": 0.0, "i": 0.0}


def test_foolsgold_remembers_who_was_alike() -> None:
    """In the last round all are at right angles: only the memory tells."""
    x = vectors(5)
    x["s4"] = x["s3"].copy()
    equal = dict.fromkeys(x, 1.0)
    apart = Gram(tuple(sorted(x)), np.eye(5))
    _, memory = foolsgold(gram(x), equal)
    verdict, memory = foolsgold(apart, equal, memory)
    assert verdict.coefficients["s3"] == verdict.coefficients["s4"] < verdict.coefficients["s0"]
    for _ in range(60):
        verdict, memory = foolsgold(apart, equal, memory)
    assert verdict.coefficients == pytest.approx(dict.fromkeys(x, 0.2))


def test_foolsgolds_memory_is_a_mean_that_counts_the_last_rounds_most() -> None:
    rounds = [vectors(3, seed) for seed in range(3)]
    memory = None
    for x in rounds:
        memory = remember(memory, gram(x), decay=0.5)
    assert memory is not None
    wanted = np.average([gram(x).cosines for x in rounds], axis=0, weights=[0.25, 0.5, 1])
    np.testing.assert_allclose(memory.among(("s0", "s1", "s2")), wanted, rtol=1e-6)
    late = remember(memory, gram({"s1": rounds[0]["s1"], "t": rounds[0]["s1"]}), decay=0.5)
    np.testing.assert_allclose(late.among(("s0", "s2")), memory.among(("s0", "s2")))
    assert late.among(("s0", "t"))[0, 1] == 0
    assert late.among(("s1", "t"))[0, 1] == pytest.approx(1)


@EVERY
def test_identical_in_same_out(rule: Callable[[Gram, dict[str, float]], Verdict]) -> None:
    x = dict.fromkeys(vectors(7), vectors(1)["s0"] / 4)
    np.testing.assert_allclose(combined(x, rule(gram(x), weights(x))), x["s0"], rtol=1e-7)


@EVERY
def test_scale_of_weights_does_not_matter(rule: Callable[[Gram, dict[str, float]], Verdict]) -> None:
    x = vectors(7)
    one, other = (rule(gram(x), {s: c * w for s, w in weights(x).items()}).coefficients for c in (1.0, 977.0))
    assert one == pytest.approx(other)


@EVERY
def test_names_of_silos_do_not_matter_and_order_changes_no_byte(rule: Callable[[Gram, dict[str, float]], Verdict]) -> None:
    x = vectors(7)
    w = weights(x)
    usual = rule(gram(x), w)
    assert rule(gram(dict(reversed(x.items()))), dict(reversed(w.items()))) == usual
    if rule is not RULES_ON_GRAM["fltrust"]:
        names = dict(zip(sorted(x), ["s6", "s3", "s0", "s1", "s5", "s2", "s4"], strict=True))
        renamed = rule(gram({names[s]: v for s, v in x.items()}), {names[s]: c for s, c in w.items()})
        assert {s: renamed.coefficients[names[s]] for s in x} == pytest.approx(usual.coefficients)


@pytest.mark.parametrize("name", ["norm-bound", "geometric-median", "foolsgold", "fltrust"])
def test_one_silo_is_the_identity(name: str) -> None:
    x = {"s2": vectors(1)["s0"]}
    assert RULES_ON_GRAM[name](gram(x), {"s2": 4.0}).coefficients == {"s2": 1.0}


@EVERY
def test_updates_of_zero_make_no_trouble(rule: Callable[[Gram, dict[str, float]], Verdict]) -> None:
    x = vectors(7)
    for zeroed in (["s0"], ["s0", "s2"], list(x)):
        verdict = rule(gram(x | {s: np.zeros(30) for s in zeroed}), weights(x))
        assert np.isfinite(list(verdict.coefficients.values())).all()


@pytest.mark.parametrize("name", ["krum", "multi-krum", "bulyan", "geometric-median", "fltrust", "norm-bound"])
@pytest.mark.parametrize("size", [1e3, 1e30])
def test_one_far_update_cannot_carry_the_result_away(name: str, size: float) -> None:
    x = vectors(7)
    rule = RULES_ON_GRAM[name]
    others = combined(x, rule(gram(x), dict.fromkeys(x, 1.0)))
    x["s5"] = size * np.ones(30)
    got = combined(x, rule(gram(x), dict.fromkeys(x, 1.0)))
    assert np.linalg.norm(got - others) < np.median([np.linalg.norm(v) for v in x.values()])


def test_each_rule_asks_for_the_silos_its_theorem_needs() -> None:
    assert [least_silos(r, 2) for r in ("krum", "multi-krum", "bulyan", "trimmed-mean", "median")] == [7, 7, 11, 5, 5]
    for rule in RULES:
        require_enough(rule, least_silos(rule, 1), 1)
        with pytest.raises(QuorumError, match=f"{rule} needs {least_silos(rule, 1)} updates against 1 hostile"):
            require_enough(rule, least_silos(rule, 1) - 1, 1)
    for short in (lambda g: krum(g, 1), lambda g: multi_krum(g, dict.fromkeys(g.silos, 1.0), 1), lambda g: bulyan_selection(g, 1)):
        with pytest.raises(QuorumError, match="4 came"):
            short(gram(vectors(4)))


def test_refuses_weights_that_are_none() -> None:
    x = vectors(3)
    with pytest.raises(ValueError, match="must be positive"):
        geometric_median(gram(x), {"s0": 1.0, "s1": 0.0, "s2": 1.0})
