"""Clipping: how much of a step's gradient one unit may make.

    flat        g · min(1, C / ‖g‖) (Abadi et al. 2016, arXiv:1607.00133, Algorithm 1)
    per-layer   the same, tensor by tensor with C / √tensors (McMahan et al. 2018, arXiv:1710.06963, section 2.3)
    automatic   g · C / (‖g‖ + 0.01), which lifts small gradients, too (Bu et al. 2022, arXiv:2206.07136, Eq. 5.1: AUTO-S)
    adaptive    flat, with a C that goes after the median of the norms: C ← C · exp(-0.2 (b - ½)), where b is the share of norms at or below C, with noise
                (Andrew et al. 2021, arXiv:1905.03871, Algorithm 1); every round begins with the C of the file

Each makes a unit's part of the sum at most C in L2 norm. A unit whose gradient is not finite counts as zero: an error would tell of it.

What is added up is rounded first, to a grid of a power of 2 (see `noise`). So every sum is exact, in whatever order, in groups of whatever size and
on however many processes it is made, and one unit more or less moves it by that unit's own part and by nothing else. Sums that are rounded as
they grow do not have that: one number can change the rounding of all others (Casacuberta et al. 2022, arXiv:2207.10635).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

Clipping = Literal["flat", "per-layer", "automatic", "adaptive"]
STABILITY = 0.01  # of automatic clipping
RATE = 0.2  # of adaptive clipping
QUANTILE = 0.5


def add_clipped(totals: Mapping[str, Any], gradients: Mapping[str, Any], clip: float, kind: Clipping, grid: float) -> Any:
    """Add units' clipped gradients to a sum, exactly; returns their norms before, (units,) float64, NaN where not finite.

    Args:
        totals: name -> float64, multiples of the grid, changed in place.
        gradients: name -> (units, *shape) float32.
        clip: C. Rounding to the grid may lengthen a unit's part by ½ √numbers · grid beyond it (see `noise.clip_left`).
        grid: a power of 2.
    """
    import torch

    norms = {n: torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64) for n, g in gradients.items()}
    whole = torch.stack(list(norms.values())).square().sum(0).sqrt()
    finite = torch.isfinite(whole)
    for name, gradient in gradients.items():
        if kind == "per-layer":
            factor = (clip / math.sqrt(len(norms)) / norms[name]).clamp(max=1.0)
        elif kind == "automatic":
            factor = clip / (whole + STABILITY)
        else:
            factor = (clip / whole).clamp(max=1.0)
        wide = gradient.double()
        if not bool(finite.all()):
            wide[~finite] = 0.0
            factor = torch.where(finite, factor, torch.zeros_like(factor))
        wide *= (factor / grid).view(-1, *(1,) * (wide.dim() - 1))
        totals[name].add_(wide.round_().sum(0), alpha=grid)  # whole numbers below 2^53, and a power of 2
    return torch.where(finite, whole, torch.full_like(whole, math.nan))


def centred_count(norms: Any, clip: float) -> float:
    """Σ over units of 1 - ½ where the norm is at most the clip, else -½. One unit more or less moves it by ½."""
    return float((norms <= clip).double().sum()) - QUANTILE * len(norms)  # NaN is not at most


def next_clip(clip: float, noised_count: float, expected: float) -> float:
    """Eq. 2 of Andrew et al., with the count centred, so that the number of units drawn need not be known."""
    return clip * math.exp(-RATE * min(1.0, max(-1.0, noised_count / expected)))
