"""What record-level privacy costs: noise and rounds to ε, and ε to the noise that keeps it.

A step of private training is one *Poisson-subsampled Gaussian mechanism*: every unit is in the sample with probability q, by itself, its
gradient is clipped to norm C, and N(0, z²C²) is added to each number of the sum. z is the noise multiplier.

Neighbours are two data sets of the same number of units N, in one of which one unit is replaced by one that adds nothing (`REPLACE_SPECIAL`,
Erlingsson et al. 2020, arXiv:2001.03618, after Kairouz et al. 2021, arXiv:2103.00039, Definition 1.1). N itself is taken to be public, because
q = batch_size / N follows from it, and a relation that hides N while q shows it would promise too much. For this mechanism the privacy
loss is the same as under adding or removing a unit, in both directions, of which the worse one counts. Who wants the bound for a unit
whose content is *exchanged* for another's takes twice ε.

ε comes from privacy loss distributions (Koskela et al. 2020, arXiv:1906.03049; rounded up by Connect the Dots, Doroshenko et al. 2022,
arXiv:2207.04380), so it is an upper bound, and composes mechanisms of any kind and number. `rdp_epsilon` is the second opinion: moments
(Mironov 2017, arXiv:1702.07476; Mironov et al. 2019, arXiv:1908.10530), looser and of other code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, reduce
from typing import Any

from pydantic import Field

from silotune.components.errors import RefusedError, SilotuneError
from silotune.components.terms.privacy import Privacy
from silotune.components.terms.section import Positive, Section
from silotune.components.terms.training import Training

QUANTILE_SHARE = 0.05  # of 1 / z²: what adaptive clipping pays for its quantile
INTERVAL = 1e-4  # of the loss distributions' grid, in nats, where nothing calls for another
STEP_POINTS, POINTS = 1 << 17, 1 << 20  # of the grid for a step, which is slow to make, and for all of them, about, at most
CALIBRATED = 1e-3  # relative: the noise multiplier is at most so much above the least that will do
LEAST_NOISE, MOST_NOISE = 0.125, 1e4  # noise multipliers that are looked among
MOST_EPSILON = 1e6  # nothing above is told apart from no bound
LEAST_DELTA = 1e-13  # below it, what the distributions' tails cut off would show


class Mechanism(Section):
    """The steps of one training as a mechanism. Frozen and hashable: to be counted."""

    sampling_probability: float = Field(gt=0, le=1, allow_inf_nan=False, description="Of each unit, in each step.")
    noise_multiplier: float = Field(
        gt=0, allow_inf_nan=False, description="Standard deviation of the noise on the summed gradients, per clip."
    )
    steps: Positive
    quantile_noise_multiplier: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Adaptive clipping: standard deviation of the noise on the count of small norms."
    )

    @property
    def joint_noise_multiplier(self) -> float:
        """That of one Gaussian mechanism as costly as gradient and count together.

        Both are made from the same sample, so that they are one vector; a unit moves the count by ½, once it is centred (Andrew et al. 2021,
        arXiv:1905.03871, Theorem 1): 1/z² = 1/z_Δ² + 1/(2σ_b)².
        """
        if self.quantile_noise_multiplier is None:
            return self.noise_multiplier
        return (self.noise_multiplier**-2 + (2 * self.quantile_noise_multiplier) ** -2) ** -0.5


Spent = Mapping[Mechanism, int] | Iterable[Mechanism]


def epsilon(spent: Spent, delta: float) -> float:
    """ε of everything together, at ``delta``; infinite where no finite one can be shown.

    Args:
        spent: mechanisms, each as often as it is there, or with how often it ran. None: 0.
    """
    _check_delta(delta)
    return _epsilon(_tally(spent), delta, 1)


def rdp_epsilon(spent: Spent, delta: float) -> float:
    """The same by Rényi moments: a bound, too, and never to be far below `epsilon`."""
    _check_delta(delta)
    _require_library()
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    for q, z, steps in _tally(spent):
        accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(z)) if q < 1 else GaussianDpEvent(z), steps)
    return float(accountant.get_epsilon(delta))


@lru_cache(256)
def noise_multiplier_for(epsilon: float, delta: float, sampling_probability: float, steps_total: int) -> float:
    """The least noise multiplier, to a thousandth, with which so many steps stay within ε at δ; of gradient and count together.

    Raises:
        ValueError: none does.
    """
    _check_delta(delta)

    def costs(z: float, coarser: int = 8) -> float:
        return _epsilon(((sampling_probability, z, steps_total),), delta, coarser)

    low = high = 1.0
    least = most = costs(1.0)  # what high and low cost
    while least > epsilon:
        low, most, high = high, least, 2 * high
        least = costs(high)
        if high > MOST_NOISE:
            raise ValueError(f"no noise keeps epsilon {epsilon:g} at delta {delta:g} over {steps_total} steps")
    while most <= epsilon:
        high, least, low = low, most, low / 2
        most = costs(low)
        if low < LEAST_NOISE:
            return high
    aside = CALIBRATED / 3  # a guess is set aside of where a straight line between the logarithms points to, so that both ends move
    while high > low * (1 + CALIBRATED):
        slope = math.log(high / low) / math.log(most / least) if most < math.inf else 0.0
        guess = low * (most / epsilon) ** slope * (1 + aside) if slope else math.sqrt(low * high)
        guess = min(max(guess, low * (1 + CALIBRATED / 4)), high / (1 + CALIBRATED / 4))
        found = costs(guess)
        if found > epsilon:
            low, most, aside = guess, found, abs(aside)
        else:
            high, least, aside = guess, found, -abs(aside)
    high = _rounded_up(high)
    while (
        costs(high, 1) > epsilon
    ):  # the finer grid is the tighter one; what is promised is compared with what will be reported all the same
        high = _rounded_up(high * (1 + CALIBRATED / 4))
    return high


def round_mechanism(terms: Privacy, training: Training, units: int) -> Mechanism:
    """What one round of a silo's training is to be, so that all planned rounds together keep the promise.

    Args:
        terms: as agreed, with ``epsilon`` and ``rounds``.
        training: the silo's own.
        units: records, or persons, in its train split.

    Raises:
        RefusedError: the silo has too few units for the terms.
    """
    if terms.epsilon is None or terms.rounds is None:
        raise ValueError("the terms promise nothing about records")
    what = "persons" if terms.unit == "person" else "records"
    if training.batch_size > units:
        raise RefusedError(
            f"training.batch_size: must be at most the {units} {what} to train on with privacy.epsilon, got {training.batch_size}; "
            "lower it, for this silo under silos[…].training",
            "batch larger than the data",
        )
    if terms.delta * units >= 1:
        raise RefusedError(
            f"privacy.delta: must be below 1/{units}, since the silo has {units} {what}, got {terms.delta:g}; lower it, to {0.1 / units:.0e} or less",
            "delta too large",
        )
    q = training.batch_size / units
    try:
        z = noise_multiplier_for(terms.epsilon, terms.delta, q, terms.rounds * training.steps)
    except ValueError as error:
        raise RefusedError(f"privacy.epsilon: {error}; raise it, or lower rounds or steps", "epsilon too small") from None
    if terms.clipping != "adaptive":
        return Mechanism(sampling_probability=q, noise_multiplier=z, steps=training.steps)
    return Mechanism(
        sampling_probability=q,
        noise_multiplier=_rounded_up(z / math.sqrt(1 - QUANTILE_SHARE)),
        quantile_noise_multiplier=_rounded_up(z / (2 * math.sqrt(QUANTILE_SHARE))),
        steps=training.steps,
    )


def _tally(spent: Spent) -> tuple[tuple[float, float, int], ...]:
    """(sampling probability, joint noise multiplier, steps), each pair once, in order."""
    counted: Mapping[Mechanism, int] = spent if isinstance(spent, Mapping) else Counter(spent)
    steps: Counter[tuple[float, float]] = Counter()
    for mechanism, count in counted.items():
        if count < 0:
            raise ValueError(f"a mechanism must have run 0 times or more, got {count}")
        steps[mechanism.sampling_probability, mechanism.joint_noise_multiplier] += count * mechanism.steps
    return tuple((q, z, n) for (q, z), n in sorted(steps.items()) if n)


@lru_cache(256)
def _epsilon(tally: tuple[tuple[float, float, int], ...], delta: float, coarser: int) -> float:
    if not tally:
        return 0.0
    if whole := [(z, n) for q, z, n in tally if q == 1]:  # Gaussians on all data add up in closed form
        tally = (*(entry for entry in tally if entry[0] < 1), (1.0, sum(n / z**2 for z, n in whole) ** -0.5, 1))
    interval = _interval(tally) * coarser
    parts = [_composed(q, z, n, interval) for q, z, n in tally]
    return _least_epsilon(reduce(lambda a, b: a.compose(b), parts).get_delta_for_epsilon, delta)


def _least_epsilon(delta_of: Callable[[float], float], delta: float) -> float:
    """The least ε, to some 1e-7 of it, that is a bound: from above. (The library's own search goes along the grid, in Python.)"""
    low, high = 0.0, 1.0
    if delta_of(low) <= delta:
        return 0.0
    while delta_of(high) > delta:
        low, high = high, 2 * high
        if high > MOST_EPSILON:
            return math.inf
    while high - low > max(1e-7, 1e-7 * high):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
    return high


def _interval(tally: Iterable[tuple[float, float, int]]) -> float:
    """A grid that is fine for the steps' losses and not too long for their sum; in octaves around `INTERVAL`, so that few are made."""
    finest, longest, variance = INTERVAL, 0.0, 0.0
    for q, z, n in tally:
        deviation = 1 / z if q == 1 or z < 0.1 else min(1 / z, q * math.sqrt(math.expm1(z**-2)))
        finest = min(finest, max(INTERVAL / 64, deviation / 8))
        longest = max(longest, (20 * z + 1) / (2 * z**2))
        variance += n * deviation**2
    least = max(longest / STEP_POINTS, 16 * math.sqrt(variance) / POINTS)
    return float(INTERVAL * 2.0 ** math.ceil(math.log2(max(least, finest) / INTERVAL)))


@lru_cache(32)
def _composed(q: float, z: float, steps: int, interval: float) -> Any:
    single = _single(q, z, interval)
    return single if steps == 1 else single.self_compose(steps)


@lru_cache(32)
def _single(q: float, z: float, interval: float) -> Any:
    _require_library()
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(
        z, value_discretization_interval=interval, sampling_prob=q, neighboring_relation=NeighboringRelation.REPLACE_SPECIAL
    )


def _require_library() -> None:
    """Only silos add up ε of records. What the coordinator adds up is in closed form (`gaussian`), so that its image is without dp-accounting, and
    SciPy, which that brings."""
    try:
        import dp_accounting  # noqa: F401
    except ModuleNotFoundError:
        raise SilotuneError(
            "dp-accounting: is needed to add up epsilon of records, and is not installed here; do it in the silo's image, or where all of silotune is",
            "no accounting",
        ) from None


def _rounded_up(value: float) -> float:
    """To four digits: the same on every machine, whatever its last bits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return float(f"{math.ceil(value / unit * (1 - 1e-12)) * unit:.4g}")


def _check_delta(delta: float) -> None:
    if not LEAST_DELTA <= delta < 1:
        raise ValueError(f"delta must be from {LEAST_DELTA:g} to below 1, got {delta:g}")
