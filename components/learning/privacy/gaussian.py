"""The Gaussian mechanism on whole data, exactly: how ε, δ and noise hang together, and how releases add up.

A release adds N(0, z²S²) to every number of a sum that one party's part moves by at most S in L2 norm; z is its *noise multiplier*. It satisfies
(ε, δ) if and only if

    δ ≥ Φ(μ/2 - ε/μ) - exp(ε)·Φ(-μ/2 - ε/μ)        with μ = 1/z

(Balle & Wang 2018, arXiv:1805.06530, Theorem 8). Releases one after the other, each chosen by what came before, are together no worse than a
single one with μ² = Σ μᵢ² (Dong, Roth & Su 2019, arXiv:1905.02383, Corollary 3.3; also where μᵢ itself is chosen so, as long as the sum is held to
a bound: Smith & Thakurta 2022, arXiv:2210.17520), and T equal ones are exactly that one. So nothing
has to be bounded numerically, and no accountant is needed: `math.erfc` will do. Nothing here knows of sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

MOST = 1e6  # ε and μ above are not told apart from no bound
SAFE = 1e-9  # relative: by so much more noise is asked for than the formula needs, far above the errors of its evaluation


def delta_of(epsilon: float, mu: float) -> float:
    """The least δ at which a release of ``mu`` satisfies ``epsilon``."""
    if not (epsilon >= 0 and mu >= 0):
        raise ValueError(f"epsilon and mu: must not be negative, got {epsilon} and {mu}")
    if mu == 0:
        return 0.0
    first = _log_normal(mu / 2 - epsilon / mu)
    second = epsilon + _log_normal(-mu / 2 - epsilon / mu)
    return max(0.0, -math.exp(first) * math.expm1(second - first))


def epsilon_of(delta: float, mu: float) -> float:
    """The least ε, rounded up, that a release of ``mu`` satisfies at ``delta``; infinite where it is above `MOST`."""
    _check(delta)
    if mu == 0 or delta_of(0.0, mu) <= delta:
        return 0.0
    high = 1.0
    while delta_of(high, mu) > delta:
        high *= 2
        if high > MOST:
            return math.inf
    return _bisect(lambda epsilon: delta_of(epsilon, mu) <= delta, 0.0, high) * (1 + SAFE)


def mu_of(epsilon: float, delta: float) -> float:
    """The most that releases together may have for μ, rounded down, to satisfy (ε, δ)."""
    _check(delta)
    if not 0 < epsilon <= MOST:
        raise ValueError(f"epsilon: must be above 0 and at most {MOST:g}, got {epsilon}")
    high = 1.0
    while delta_of(epsilon, high) <= delta:
        high *= 2
    low = _bisect(lambda mu: delta_of(epsilon, mu) > delta, 0.0, high)  # the least that is too much
    return low * (1 - SAFE)


def noise_multiplier_of(epsilon: float, delta: float, releases: int) -> float:
    """z of each of so many equal releases that satisfy (ε, δ) together: √T / μ."""
    if releases < 1:
        raise ValueError(f"releases: must be 1 or more, got {releases}")
    return math.sqrt(releases) / mu_of(epsilon, delta)


def composed(mus: Iterable[float]) -> float:
    """μ of releases one after the other."""
    return math.sqrt(math.fsum(mu * mu for mu in mus))


def _log_normal(x: float) -> float:
    """log Φ(x), to some 1e-14 of Φ everywhere: beyond what erfc can hold by the asymptotic series (Abramowitz & Stegun 26.2.12)."""
    if x > -30:
        return math.log(math.erfc(-x / math.sqrt(2)) / 2)
    inverse = 1 / (x * x)
    series = 1 - inverse * (1 - 3 * inverse * (1 - 5 * inverse * (1 - 7 * inverse * (1 - 9 * inverse))))
    return -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi)) + math.log(series)


def _bisect(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The least number, from above and to the last bits, at which a condition holds that holds at ``high`` and above it."""
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _check(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta: must be between 0 and 1, got {delta}")
