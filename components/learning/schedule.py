"""Learning-rate schedules: within a round, and over rounds."""

from __future__ import annotations

import math


def rate(step: int, steps: int, peak: float, schedule: str, warmup: int) -> float:
    """Learning rate of 0-based ``step``: linear climb over ``warmup`` steps, then constant, or down to zero after ``steps``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * decay(schedule, (step - warmup) / max(1, steps - warmup))


def steps_worth(done: int, steps: int, schedule: str, warmup: int) -> float:
    """What the first ``done`` steps are worth together, each by its rate, in steps at the peak rate."""
    return math.fsum(rate(step, steps, 1.0, schedule, warmup) for step in range(done))


def decay(schedule: str, progress: float) -> float:
    """Factor on a peak rate at ``progress`` in [0, 1] of the way: constant, linear or cosine (Loshchilov & Hutter 2016, arXiv:1608.03983, Eq. 5)."""
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))
