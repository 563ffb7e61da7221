"""The budget: what the trainings in a ledger say together about one record or person, and whether one more may.

    reserve(ledger, charge, limits)     before a record is read: write the training down, or refuse
    spent(charges, …)                   the bound ε of everything, of this calendar month (UTC), and of one federation
    promised(charges, …)                that of one federation at its own δ, which it promises not to pass

The mechanisms of all entries are composed by privacy loss distributions (see `learning.privacy.accounting`), so that the bound is tighter than
the sum of the federations' own, and holds for all that their coordinators may tell each other. A training without differential privacy has no
bound: with it in the ledger, ε is infinite.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field

from silotune.components.errors import RefusedError
from silotune.components.learning.privacy.accounting import LEAST_DELTA, Mechanism, epsilon
from silotune.components.steward.entry import Charge, Entry
from silotune.components.steward.ledger import Ledger
from silotune.components.terms.privacy import Privacy
from silotune.components.terms.section import Section

MOST_DISTINCT = 12  # kinds of steps that are composed as they are; each takes some tenths of a second
MOST_COMPARED = 500  # kinds that are compared each with each
FUZZ = 1e-9  # by which the quotient of two logarithms may be off
Unit = Literal["record", "person"]


class Limits(Section):
    """Bounds ε on what all trainings together may say about a unit of the data set, at ``delta``. A run is all rounds of one federation."""

    run: float | None = Field(None, gt=0, allow_inf_nan=False, description="Of any one federation, by its name.")
    month: float | None = Field(None, gt=0, allow_inf_nan=False, description="Of all trainings in a calendar month (UTC).")
    total: float | None = Field(None, gt=0, allow_inf_nan=False, description="Of all trainings ever.")
    delta: float = Field(1e-5, ge=LEAST_DELTA, lt=1, description="Probability δ that a bound does not hold.")

    @property
    def any(self) -> bool:
        return any(bound is not None for bound in (self.run, self.month, self.total))


class Spent(Section):
    """Bounds ε at ``delta``; infinite where a training without differential privacy counts among what they cover."""

    run: float
    month: float
    total: float
    delta: float
    unit: Unit
    trainings: int
    unprotected: int = Field(description="Trainings that bound nothing about the unit.")

    def beyond(self, limits: Limits) -> list[str]:
        """The limits that it passes: run, month, total."""
        return [name for name in ("run", "month", "total") if (most := getattr(limits, name)) is not None and getattr(self, name) > most]


def reserve(
    ledger: Ledger, charge: Charge, limits: Limits, unit: Unit, *, bounded: bool, clock: Callable[[], float] = time.time,
    also: Callable[[Sequence[Entry]], None] | None = None,
) -> Spent:  # fmt: skip
    """Write a training down before it begins; returns what is spent with it. One that is written down already costs nothing more.

    Args:
        unit: whose traces the limits bound.
        bounded: whether a training that bounds nothing counts, and so is refused where there is a limit.
        also: what else must hold of the entries that it would go behind; raises where it does not.

    Raises:
        RefusedError: ε would pass a limit; or the ledger is damaged.
    """
    identity = charge.identity(ledger.dataset)
    while True:
        entries = ledger.entries()
        if also:
            also(entries)
        charges = [(e.charge, e.at) for e in entries]
        if any(e.identity == identity for e in entries):
            return spent(charges, limits.delta, unit, charge.federation, entries[-1].at, bounded=bounded)
        at = max(clock(), entries[-1].at) if entries else clock()
        after = spent([*charges, (charge, at)], limits.delta, unit, charge.federation, at, bounded=bounded)
        if passed := after.beyond(limits):
            before = spent(charges, limits.delta, unit, charge.federation, at, bounded=bounded)
            raise _refusal(ledger.dataset, charge, limits, passed, before, after)
        if ledger.append(charge, at):
            return after
        # Somebody was faster: look again.


def spent(
    charges: Sequence[tuple[Charge, float]], delta: float, unit: Unit, federation: str, at: float, *, bounded: bool = True
) -> Spent:  # fmt: skip
    """What trainings cost together.

    Args:
        charges: each with its Unix time in seconds.
        federation: whose trainings are a run.
        at: Unix time in seconds, in the month that counts.
        bounded: whether trainings that bound nothing about the unit count; else they are told by their number only.
    """
    counted = [(c, when) for c, when in charges if bounded or bounds(c, unit)]
    month = _month(at)
    return Spent(
        run=bound((c for c, _ in counted if c.federation == federation), delta, unit),
        month=bound((c for c, when in counted if _month(when) == month), delta, unit),
        total=bound((c for c, _ in counted), delta, unit),
        delta=delta, unit=unit, trainings=len(charges), unprotected=sum(not bounds(c, unit) for c, _ in charges),
    )  # fmt: skip


def promised(charges: Iterable[Charge], federation: str, terms: Privacy) -> float:
    """ε of a federation's private trainings, about the unit and at the δ of its own promise."""
    return bound((c for c in charges if c.federation == federation and c.mechanism is not None), terms.delta, terms.unit)


def bound(charges: Iterable[Charge], delta: float, unit: Unit, more: Iterable[Mechanism] = ()) -> float:
    """ε of these trainings and of ``more`` mechanisms; infinite where one bounds nothing about the unit."""
    steps: Counter[Mechanism] = Counter(more)
    for charge in charges:
        if charge.mechanism is None or not bounds(charge, unit):
            return math.inf
        steps[charge.mechanism] += 1
    return epsilon(_grouped(steps), delta)


def bounds(charge: Charge, unit: Unit) -> bool:
    """A promise about all records of a person holds for each of them; one about records says nothing about a person with many."""
    return charge.mechanism is not None and (charge.unit == unit or charge.unit == "person")


def _month(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m}"


def _refusal(dataset: str, charge: Charge, limits: Limits, passed: list[str], before: Spent, after: Spent) -> RefusedError:
    told = {"run": f"for federation {charge.federation!r}", "month": "in a calendar month (UTC)", "total": "in total"}
    rules = "; ".join(
        f"epsilon at most {getattr(limits, name):g} {told[name]}, spent: {_text(getattr(before, name))}, with this training: "
        f"{_text(getattr(after, name))}"
        for name in passed
    )
    keys = ", ".join(f"privacy.epsilon.{name}" for name in passed)
    wait = ", or wait for the next month" if passed == ["month"] else ""
    return RefusedError(
        f"silo {charge.silo!r}: the budget of data set {dataset!r}, at delta {limits.delta:g}: {rules}; `silotune privacy` shows it all; only the "
        f"silo's steward can raise {keys} in its policy{wait}",
        "budget",
    )


def _text(value: float) -> str:
    return "no bound" if value == math.inf else f"{value:.4g}"


def _grouped(mechanisms: Counter[Mechanism]) -> Counter[Mechanism]:
    """Steps of few kinds. Where there are many, the likest are taken together, with the greatest sampling probability among them and the least
    noise, so that a bound stays one.
    """
    kinds: Counter[tuple[float, float]] = Counter()
    for mechanism, count in mechanisms.items():
        kinds[mechanism.sampling_probability, mechanism.joint_noise_multiplier] += count * mechanism.steps
    exponent = 12
    while len(kinds) > MOST_COMPARED:
        kinds, exponent = _on_grid(kinds, math.log1p(2.0**-exponent)), exponent - 1
    if len(kinds) > MOST_DISTINCT:
        kinds = _merged(kinds)
    return Counter({Mechanism(sampling_probability=q, noise_multiplier=z, steps=1): steps for (q, z), steps in kinds.items()})


def _on_grid(kinds: Counter[tuple[float, float]], step: float) -> Counter[tuple[float, float]]:
    """Sampling probabilities rounded up, and noise down, to powers of ``exp(step)``."""
    rounded: Counter[tuple[float, float]] = Counter()
    for (q, z), steps in kinds.items():
        up, down = math.ceil(math.log(q) / step - FUZZ), math.floor(math.log(z) / step + FUZZ)
        rounded[max(q, min(1.0, math.exp(up * step))), min(z, math.exp(down * step))] += steps
    return rounded


def _merged(kinds: Counter[tuple[float, float]]) -> Counter[tuple[float, float]]:
    """The two whose union costs least, again and again. Cost: the variance of all steps' privacy loss, steps · q² (exp(1/z²) - 1), about
    (Bu et al. 2020, arXiv:1911.11607, Corollary 4).
    """
    import numpy as np

    def cost(q: Any, z: Any, steps: Any) -> Any:
        return steps * q**2 * np.expm1(np.minimum(z**-2.0, 500.0))

    q, z = np.array(list(kinds)).T
    steps = np.array(list(kinds.values()), dtype=np.float64)

    def against(i: int) -> Any:
        """What it costs to merge kind i with each other one."""
        extra = cost(np.maximum(q[i], q), np.minimum(z[i], z), steps[i] + steps) - cost(q[i], z[i], steps[i]) - cost(q, z, steps)
        return np.where((np.arange(len(q)) == i) | (steps == 0), np.inf, extra)

    costs = np.array([against(i) for i in range(len(q))])
    for _ in range(len(q) - MOST_DISTINCT):
        i, j = np.unravel_index(np.argmin(costs), costs.shape)
        q[i], z[i], steps[i] = max(q[i], q[j]), min(z[i], z[j]), steps[i] + steps[j]
        steps[j] = 0
        costs[j, :] = costs[:, j] = np.inf
        costs[i, :] = costs[:, i] = against(int(i))
    return Counter({(float(q[i]), float(z[i])): int(steps[i]) for i in range(len(q)) if steps[i]})
