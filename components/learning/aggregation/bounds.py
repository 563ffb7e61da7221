"""Bounds on updates' norms, before they are combined: zeroing what is absurd, then clipping what is large.

Each stage turns norms into factors by which updates are multiplied; an update that counts as zero keeps its weight, as in TensorFlow
Federated. Adaptive bounds follow a quantile of the norms from round to round (Andrew et al. 2021, arXiv:1905.03871, Eq. 2; its noise is
`privacy.silo_noise`'s). TensorFlow Federated zeroes above twice the 0.98-quantile of many clients. Among few silos that quantile is the greatest norm itself,
which one hostile silo can raise as it likes; so here zeroing follows the median, which needs half of the silos to be moved, and allows more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

CLIP_RATE = 0.2  # arXiv:1905.03871, section 3
FIRST_BOUND = 0.1  # likewise, where the first round's norms may not be looked at
ZEROING_RATE = math.log(10)  # TensorFlow Federated's, which finds the scale in a few rounds
ZEROING_QUANTILE = 0.5
ZEROING_MULTIPLE = 5.0


@dataclass(frozen=True)
class RunningQuantile:
    """A quantile of norms, followed over rounds: what is kept from round to round is one number."""

    estimate: float
    quantile: float
    rate: float

    def after(self, norms: Mapping[str, float]) -> RunningQuantile:
        """With the next round's norms."""
        return self.moved(float(np.mean(self.within(norms))))

    def within(self, norms: Mapping[str, float]) -> list[bool]:
        """Which norms are up to the estimate."""
        return [norm <= self.estimate for norm in norms.values()]

    def moved(self, within: float) -> RunningQuantile:
        """C·exp(-η(b - γ)), where b is the share of norms up to C. Rounded to float32, as files hold it.

        The estimate moves by at most the factor exp(η), whatever a silo sends. So does a noisy share, which may be no share: it is cut at the same
        distance either side of γ, since cut at 0 and 1 it would drift from a γ other than ½ by noise alone.
        """
        step = min(1.0, max(-1.0, within - self.quantile))
        return replace(self, estimate=_rounded(self.estimate * math.exp(-self.rate * step)))


def first_quantile(norms: Mapping[str, float], quantile: float, rate: float) -> RunningQuantile:
    """Where no round has gone before: begun at the quantile of this round's norms.

    Raises:
        ValueError: there are no norms, all are 0, or the quantile is not between 0 and 1.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile: must be between 0 and 1, got {quantile}")
    greatest = max(norms.values(), default=0.0)
    if not 0 < greatest < math.inf:
        raise ValueError(f"norms: must be finite and not all 0, got {dict(norms)}")
    return RunningQuantile(_rounded(float(np.quantile(list(norms.values()), quantile)) or greatest), quantile, rate)


@dataclass(frozen=True)
class Stage:
    """What a stage does to each silo's update."""

    factors: dict[str, float]  # silo -> number in [0, 1] that its update is multiplied by
    told: dict[str, str]  # silo -> why its factor is not 1


def zeroing(norms: Mapping[str, float], running: RunningQuantile, multiple: float = ZEROING_MULTIPLE) -> Stage:
    """Updates over a multiple of a quantile count as zero."""
    bound = multiple * running.estimate
    over = {silo: norm for silo, norm in sorted(norms.items()) if not norm <= bound}
    told = {silo: f"its norm is {norm:.3g}, from {bound:.3g} on updates count as zero" for silo, norm in over.items()}
    return Stage({silo: float(silo not in over) for silo in sorted(norms)}, told)


def clipping(norms: Mapping[str, float], bound: float) -> Stage:
    """Updates over a bound are scaled down to it: min(1, bound / norm)."""
    if not 0 <= bound < math.inf:
        raise ValueError(f"bound: must be finite and not negative, got {bound}")
    factors = {silo: bound / norm if norm > bound else 1.0 for silo, norm in sorted(norms.items())}
    told = {s: f"its norm is {norms[s]:.3g}, the bound is {bound:.3g}: scaled by {f:.3g}" for s, f in factors.items() if f < 1}
    return Stage(factors, told)


def composed(norms: Mapping[str, float], *stages: Stage) -> Stage:
    """Several stages, each made from what the ones before it left of the norms."""
    factors = {silo: math.prod(stage.factors[silo] for stage in stages) for silo in sorted(norms)}
    return Stage(factors, {s: "; ".join(stage.told[s] for stage in stages if s in stage.told) for s, f in factors.items() if f < 1})


def remaining(norms: Mapping[str, float], stage: Stage) -> dict[str, float]:
    """Norms after a stage."""
    return {silo: norms[silo] * stage.factors[silo] for silo in sorted(norms)}


def _rounded(number: float) -> float:
    return float(np.float32(number))
