"""Gradients unit by unit: what each record, or person, by itself asks of the weights.

Two ways, of which the model decides:

    stretches   where all that is trained are linear layers, as LoRA's are: one pass over packed rows. A linear layer's gradient is a sum over
                tokens of outer products of what came back and what went in, so that each unit's is the same sum over its own stretches
                of the rows. Rows may hold several units, and units several rows.
    alone       everything else: one pass a unit, whose whole gradient is the unit's

With stretches a unit's gradient is made at once, not its norm first: norms alone ("ghost clipping", Li et al. 2021, arXiv:2110.05679, section 4)
cost T² (in + out) against T · in · out for the gradient, and LoRA's layers are so thin that the latter is the less from some r tokens on. And there is
no second backward pass, whose rounding would be another than that of the norms it was clipped by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from silotune.components.learning.privacy.sampling import Group, Units
from silotune.components.learning.tokens import Shard

Tensors = dict[str, Any]  # parameter's name -> (units, *its shape), float32


class NoStretches(Exception):
    """A layer does not see rows of tokens as they were given to the model: a mixture of experts, say."""


@dataclass(frozen=True)
class Stretches:
    """Whose the tokens of a part are."""

    slots: np.ndarray  # (stretches,) int64: place of the unit in its group
    places: np.ndarray  # (stretches, longest) int64: of the flattened (R, T); padding repeats the first
    real: np.ndarray  # (stretches, longest) bool: no padding
    shape: tuple[int, int]  # R, T
    weights: np.ndarray  # (targets,) float32, row by row: 1 / the unit's targets, so that its loss is the mean over them


def stretches_of(shard: Shard, units: Units, group: Group, part: Sequence[Sequence[int]]) -> Stretches:
    """Of the rows of a part, laid out as `batches.collate` does."""
    owner = {int(example): slot for slot, unit in enumerate(group.units) for example in units.of_unit(unit)}
    targets = [sum(int(shard.example(int(e))[1].sum()) for e in units.of_unit(unit)) for unit in group.units]
    lengths = [[int(n) for n in shard.lengths(np.array(row))] for row in part]
    width = max(sum(row) for row in lengths)
    slots, starts, ends, weights = [], [], [], []
    for r, row in enumerate(part):
        at = r * width
        for example, length in zip(row, lengths[r], strict=True):
            slot = owner[example]
            slots.append(slot)
            starts.append(at)
            at += length
            ends.append(at)
            weights.append(np.full(int(shard.example(example)[1].sum()), 1 / targets[slot], np.float32))
    first, last = np.array(starts)[:, None], np.array(ends)[:, None]
    places = first + np.arange(int((last - first).max()))
    real = places < last
    return Stretches(np.array(slots), np.where(real, places, first), real, (len(part), width), np.concatenate(weights))


class UnitGradients:
    """Takes a model's gradients apart by unit."""

    def __init__(self, model: Any, named: Mapping[str, Any]) -> None:
        """
        Args:
            named: the parameters that are trained, by the names they travel by.
        """
        self._named = named
        self._layers = _linear_layers(model, named)
        self.by_stretches = self._layers is not None
        self._sums: Tensors = {}
        self._where: tuple[Any, Any, Any, tuple[int, int]] | None = None  # whose, places, real, shape: of the part at hand

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While the model trains: its linear layers give their gradients here and none to their parameters."""
        layers = self._layers or {}
        for layer, parts in layers.items():
            layer.forward = partial(_forward, layer, self, parts)
        try:
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)

    def of_group(self, size: int, parts: Sequence[Stretches], backward: Callable[[int, Any], None]) -> Tensors:
        """Each unit's own gradient.

        Args:
            size: units in the group; 1 unless `by_stretches`.
            parts: whose tokens are whose.
            backward: runs the model on a part, by number, and the backward pass of its losses times their weights, which it is given.

        Raises:
            NoStretches: then `by_stretches` is no longer so, and the units are to be given one by one.
        """
        import torch

        device = next(iter(self._named.values())).device
        if self.by_stretches:
            self._sums = {n: torch.zeros((size, *p.shape), dtype=torch.float32, device=device) for n, p in self._named.items()}
        try:
            for i, part in enumerate(parts):
                whose = torch.nn.functional.one_hot(torch.from_numpy(part.slots), size).T.float().to(device)
                self._where = whose, torch.from_numpy(part.places).to(device), torch.from_numpy(part.real).to(device), part.shape
                backward(i, torch.from_numpy(part.weights).to(device))
        except NoStretches:
            for layer in self._layers or {}:
                layer.__dict__.pop("forward", None)
            self.by_stretches, self._layers = False, None
            self._clear()
            raise
        if self.by_stretches:
            return self._sums
        found = {n: (torch.zeros_like(p) if p.grad is None else p.grad).detach().float()[None] for n, p in self._named.items()}
        self._clear()
        return found

    def _clear(self) -> None:
        for parameter in self._named.values():
            parameter.grad = None

    def rows_fit(self, x: Any) -> bool:
        return self._where is None or tuple(x.shape[:-1]) == self._where[3]

    def add(self, names: tuple[str, str | None], x: Any, came_back: Any) -> None:
        """A layer's part of the units' gradients.

        Args:
            names: of its weight and its bias; "" and None where they are not trained.
            x: (R, T, in), what went in.
            came_back: (R, T, out).
        """
        import torch

        if self._where is None:
            raise ValueError("no part is at hand")
        whose, places, real, _ = self._where
        back = came_back.reshape(-1, came_back.shape[-1])[places]  # (stretches, longest, out)
        went = x.reshape(-1, x.shape[-1])[places].to(back.dtype)
        narrow = back if back.shape[-1] <= went.shape[-1] else went
        narrow.mul_(real[..., None])
        weight, bias = names
        if weight:
            self._gather(weight, whose, torch.bmm(back.transpose(1, 2), went))
        if bias:
            self._gather(bias, whose, (back * real[..., None]).sum(1))

    def _gather(self, name: str, whose: Any, stretches: Any) -> None:
        """By a product with zeros and ones, whose order of adding is the same each time, as that of index_add_ on a GPU is not."""
        self._sums[name] += (whose @ stretches.float().flatten(1)).view(len(whose), *stretches.shape[1:])


def _linear_layers(model: Any, named: Mapping[str, Any]) -> dict[Any, tuple[str, str | None]] | None:
    """Linear layers that hold all that is trained, with the names of weight and bias; None where something else is trained, too."""
    import torch

    names = {id(parameter): name for name, parameter in named.items()}
    found: dict[Any, tuple[str, str | None]] = {}
    seen: list[int] = []
    for module in model.modules():
        own = [id(p) for p in module.parameters(recurse=False) if id(p) in names]
        if not own:
            continue
        if not isinstance(module, torch.nn.Linear):
            return None
        seen += own
        found[module] = (names.get(id(module.weight), ""), names.get(id(module.bias)))
    return found if len(seen) == len(names) == len(set(seen)) else None  # a weight that two modules share is no layer's alone


def _forward(layer: Any, sink: UnitGradients, names: tuple[str, str | None], x: Any) -> Any:
    if not sink.rows_fit(x):
        raise NoStretches
    return _function().apply(x, layer.weight, layer.bias, sink, names)


def _function() -> Any:
    """The autograd function of a linear layer whose own gradient goes to a sink; made at first use, since torch is imported late."""
    global _made
    if _made is None:
        import torch

        class Taken(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Any, weight: Any, bias: Any, sink: UnitGradients, names: tuple[str, str | None]) -> Any:
                ctx.save_for_backward(x, weight)
                ctx.sink, ctx.names = sink, names
                return torch.nn.functional.linear(x, weight, bias)

            @staticmethod
            def backward(ctx: Any, *came_back: Any) -> Any:
                x, weight = ctx.saved_tensors
                (back,) = came_back
                ctx.sink.add(ctx.names, x, back)
                onward = (back @ weight.to(back.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
                return onward, None, None, None, None

        _made = Taken
    return _made


_made: Any = None
