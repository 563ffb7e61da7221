"""The promise about silos (`privacy.silo`): what all published sums have cost of it, whichever noise they had, and whether one more may follow.

A sum with normal noise costs μ², and such sums add up exactly (`learning.privacy.gaussian`). One with the silos' own discrete noise costs ρ of
concentrated differential privacy (`learning.privacy.discrete_gaussian`). A course whose terms were amended may hold both: a Gaussian of μ is
½μ²-concentrated (Bun & Steinke 2016, arXiv:1605.02065, Proposition 1.6), and ρ adds up over both kinds in any order (Lemma 2.3), also where what came
before decides on what follows (Feldman & Zrnic 2021, arXiv:2008.11193). That bound is a little above the exact one, and never below.

A round whose sum could not be published is not opened: nobody shall train for nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from silotune.components.errors import RefusedError
from silotune.components.federation import Agreement
from silotune.components.learning.privacy import gaussian, prefix_tree
from silotune.components.protocol import Plan, Release
from silotune.components.rounds import Rounds
from silotune.components.secure_sum import terms as secure_terms
from silotune.components.terms.privacy import SiloPrivacy

CLOSE = 1e-8  # relative: rounds that were planned for add up to the promise but for rounding
MU = "silo mu"  # in a commit's guards: the root of μ² of all releases so far


@dataclass(frozen=True)
class Spent:
    """What sums cost together."""

    mu_squared: float = 0.0  # of normal noise
    rho: float = 0.0  # of discrete noise

    def __add__(self, more: Spent) -> Spent:
        return Spent(self.mu_squared + more.mu_squared, self.rho + more.rho)

    def epsilon(self, delta: float) -> float:
        from silotune.components.learning.privacy.discrete_gaussian import concentrated_epsilon

        if not self.rho:
            return gaussian.epsilon_of(delta, math.sqrt(self.mu_squared))
        return concentrated_epsilon(self.rho + self.mu_squared / 2, delta)

    def within(self, terms: SiloPrivacy) -> bool:
        return self.epsilon(terms.delta) <= terms.epsilon * (1 + CLOSE)


def noise_multiplier(terms: SiloPrivacy, total: int) -> float:
    """Of a round's sum, of a tree of each node, so that so many rounds keep the promise."""
    if terms.mechanism != "tree":
        return gaussian.noise_multiplier_of(terms.epsilon, terms.delta, total)
    whole = sum(prefix_tree.squared_sensitivity(number) for number in range(1, total + 1))
    return math.sqrt(whole) / gaussian.mu_of(terms.epsilon, terms.delta)


def released(rounds: Rounds) -> list[Release]:
    """All releases so far.

    Raises:
        RefusedError: a commit knows of more.
    """
    found = list(rounds.releases())
    known = max((c.guards.get("silo release", 0.0) for c in rounds.commits()), default=0.0)
    if len(found) < known:
        raise RefusedError(
            f"the store's releases/ hold {len(found)}, and commits know of {known:.0f}; restore them from a backup", "budget"
        )
    return found


def spent_on(releases: list[Release]) -> Spent:
    return Spent(mu_squared=math.fsum(r.mu_squared for r in releases))


def spent_on_secure_sums(rounds: Rounds, number: int) -> Spent:
    """Of rounds before ``number``, whether a global came of them or not."""
    total = 0.0
    for commit in rounds.commits():
        if commit.round >= number or not (commit.contributions or commit.spent):
            continue
        plan = rounds.plan(commit.round)
        agreement = rounds.agreement(plan.agreement) if plan else None
        if plan and agreement and agreement.privacy.silo and agreement.privacy.secure_aggregation:
            total += _secure_cost(rounds, plan, agreement).rho
    return Spent(rho=total)


def spent_as_committed(rounds: Rounds) -> Spent:
    """What releases cost, as commits tell a silo, which cannot read them."""
    return Spent(mu_squared=max((c.guards.get(MU, 0.0) for c in rounds.commits()), default=0.0) ** 2)


def secure_epsilon_with(rounds: Rounds, plan: Plan, agreement: Agreement) -> float | None:
    """ε that this round's secure sum brings all sums to; None where nothing is promised about silos. Raises RefusedError where it would break the
    promise."""
    if not (cost := _secure_cost(rounds, plan, agreement)).rho:
        return None
    before = spent_on(released(rounds)) + spent_on_secure_sums(rounds, plan.round)
    return require_left(agreement, before, cost, f"round {plan.round} stays open")


def require_left(agreement: Agreement, before: Spent, more: Spent, who: str) -> float:
    """ε of all sums with one more, at the promised δ. Raises RefusedError where it would be above the promised one."""
    terms, after = agreement.privacy.silo, before + more
    assert terms is not None
    if not after.within(terms):
        raise RefusedError(
            f"{who}: privacy.silo: another sum would bring epsilon to {after.epsilon(terms.delta):.4g}, and {terms.epsilon:g} at delta {terms.delta:g} "
            "is promised; raise it, if all agree, or stop here",
            "silo privacy spent",
        )
    return after.epsilon(terms.delta)


def spent_out(rounds: Rounds, plan: Plan, agreement: Agreement) -> str:
    """Why a round that is about to be opened could not be published, and what to do about that; "" where it could, as far as is known by now."""
    terms, total = agreement.privacy.silo, agreement.privacy.rounds
    if terms is None or total is None:
        return ""
    known = released(rounds)
    before = spent_on(known) + spent_on_secure_sums(rounds, plan.round)
    if terms.mechanism == "discrete-gaussian":
        cost = _secure_cost(rounds, plan, agreement)
    else:
        cost = Spent(_next_leaf(rounds, known, agreement) / noise_multiplier(terms, total) ** 2)
    if (before + cost).within(terms):
        return ""
    return (
        f"{before.epsilon(terms.delta):.4g} of privacy.silo's epsilon {terms.epsilon:g} is spent, planned for {total} rounds; "
        "for more of them raise privacy.silo.epsilon and privacy.rounds together, if all silos agree"
    )


def _next_leaf(rounds: Rounds, known: list[Release], agreement: Agreement) -> int:
    """What a tree's next leaf adds, in clips squared; the least where it may be that another tree begins. 1 without a tree."""
    assert agreement.privacy.silo is not None
    if agreement.privacy.silo.mechanism != "tree" or not known or not known[-1].tree:
        return 1
    plan = rounds.plan(known[-1].round)
    last = rounds.agreement(plan.agreement) if plan else None
    if last is None or (last.privacy, last.aggregation) != (agreement.privacy, agreement.aggregation):
        return 1
    return prefix_tree.squared_sensitivity(known[-1].leaf + 1)


def _secure_cost(rounds: Rounds, plan: Plan, agreement: Agreement) -> Spent:
    return Spent(rho=secure_terms.silo_rho(agreement, rounds.json_object(plan.participants[min(plan.participants)].tensors)))
