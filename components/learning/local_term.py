"""Local terms: what a strategy adds to the gradient of a silo's own loss, so that silos drift apart less.

One form serves all: g ← g + o + μ(θ - θ₀), before clipping, where θ₀ are the weights that the round began from.

    fedprox    o = 0, μ as agreed on (Li et al. 2018, arXiv:1812.06127, Eq. 2)
    feddyn     o = α Σ Δᵢ over the silo's own rounds so far, μ = α (Acar et al. 2021, arXiv:2111.04263, Eq. 1: -∇Lᵢ(θᵢ) is that sum)
    scaffold   o = c - cᵢ, μ = 0 (Karimireddy et al. 2019, arXiv:1910.06378, Eq. 3)

SCAFFOLD's next cᵢ is the mean of the raw gradients of the round. For plain SGD that is the paper's Option II to the last term, cᵢ - c + (θ₀ - θ)/(Kη);
for AdamW, whose steps are no gradients, only this form still means what it says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class LocalTerm:
    """What is added, and whether the raw gradients' mean is wanted."""

    mu: float = 0.0
    offset: Mapping[str, np.ndarray] = field(default_factory=dict)  # by travel name; a tensor that is not there has none
    observe: bool = False

    @property
    def digest(self) -> str:
        """Of all that changes a training by it."""
        found = hashlib.sha256(repr((self.mu, self.observe)).encode())
        for name, array in sorted(self.offset.items()):
            found.update(f"\n{name} {array.shape}\n".encode() + array.tobytes())
        return found.hexdigest()


class AppliedTerm:
    """A term at work on a model's parameters."""

    def __init__(self, term: LocalTerm, parameters: Mapping[str, Any]) -> None:
        import torch

        self._mu, self._parameters = term.mu, parameters
        self._start = {n: p.detach().clone() for n, p in parameters.items()} if term.mu else {}
        self._offset = {n: torch.from_numpy(x).to(parameters[n].device) for n, x in term.offset.items() if n in parameters}
        self.seen: Tensors = {n: torch.zeros_like(p) for n, p in parameters.items()} if term.observe else {}

    def add(self) -> None:
        """To the gradients that lie in the parameters."""
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            if name in self.seen:
                self.seen[name] += parameter.grad
            if name in self._offset:
                parameter.grad += self._offset[name]
            if self._mu:
                parameter.grad.add_(parameter.detach() - self._start[name], alpha=self._mu)

    def mean(self, steps: int) -> dict[str, np.ndarray]:
        """Of the raw gradients, by travel name; empty where it was not wanted."""
        return {name: (total / steps).cpu().numpy() for name, total in self.seen.items()}
