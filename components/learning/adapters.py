"""Adapters: the tensors that peft puts into a model, and what some strategies do beside them: cores between the factors, deltas in the base.

Names are those that tensors travel by: a module's own, followed by ``.lora_A.weight``, ``.lora_B.weight``, ``.lora_core.weight`` or
``.delta.weight``. Arrays are (out, in) whichever way the layer keeps its weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from silotune.components.learning.aggregation.core import core_bases, plain_state
from silotune.components.learning.aggregation.factors import CORE, DELTA, A, B

if TYPE_CHECKING:
    import numpy as np
    import torch

ADAPTER = "default"  # peft's name for the only adapter; its own files leave it out, too


def named_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The parameters of all adapters themselves (not copies), trained or frozen; none where peft has made none."""
    found = {name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in model.named_parameters() if f".{ADAPTER}." in name}
    return {name: tensor for name, tensor in found.items() if name.endswith((A, B, CORE))}


def rank_of(state: Mapping[str, np.ndarray]) -> int:
    """The rank of a global's adapters, as its first A has it; 0 where there are none."""
    return next((array.shape[0] for name, array in sorted(state.items()) if name.endswith(A)), 0)


# Cores (fed-sb)


def with_cores(model: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """The first global of fed-sb: fixed bases from the base's weights in the place of A and B, and a core of zeros (see `aggregation.core`).

    Args:
        model: with adapters; only its base and their rank count.
        seed: as `core_bases` takes it.

    Raises:
        ValueError: the rank is larger than a weight's smaller side.
    """
    import numpy as np
    import torch

    state: dict[str, np.ndarray] = {}
    for module, layer in _layers(model):
        rank = layer.r[ADAPTER]
        bases = core_bases(_weight(layer).to("cpu", torch.float32).numpy(), rank, seed)
        state |= {module + A: bases.a, module + B: bases.b, module + CORE: np.zeros((rank, rank), np.float32)}
    return dict(sorted(state.items()))


def without_cores(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A global with cores as plain pairs of the same rank and effect, for all that knows no cores; its deltas, if any, stay.

    Raises:
        ValueError: a module has a core and no bases, or the other way round.
    """
    cores = {name: array for name, array in state.items() if name.endswith(CORE)}
    bases = {name: array for name, array in state.items() if name.endswith((A, B))}
    rest = {name: array for name, array in state.items() if name not in cores and name not in bases}
    return dict(sorted((rest | plain_state(bases, cores)).items()))


def insert_cores(model: Any) -> None:
    """Put a core of zeros between A and B of every adapter, on its way from the one to the other: s·B·R·A.

    peft does not know of it and would merge or save B·A: do that with a model of `without_cores`.

    Raises:
        ValueError: there are cores already.
    """
    import torch

    for module, layer in _layers(model):
        if hasattr(layer, "lora_core"):
            raise ValueError(f"module {module!r}: has a core already")
        first, rank = layer.lora_A[ADAPTER], layer.r[ADAPTER]
        core = torch.nn.Linear(rank, rank, bias=False, device=first.weight.device, dtype=first.weight.dtype)
        torch.nn.init.zeros_(core.weight)
        layer.lora_core = torch.nn.ModuleDict({ADAPTER: core})  # makes it one of the model's parameters, under the name it travels by
        first.register_forward_hook(_through)
        first.silotune_core = [core]  # in a list, so that it is not registered under a second name


def _through(first: Any, _inputs: Any, output: Any) -> Any:
    return first.silotune_core[0](output)


# Deltas (fedex, flora)


def add_deltas(model: Any, state: Mapping[str, np.ndarray]) -> None:
    """Add a global's deltas to the frozen weights, once, in float32, each rounded once to its weight's dtype.

    What is smaller than the last bit of a weight is lost in it: with ``dtype: bfloat16`` all below some 1/512 of the weight, entry by entry.

    Args:
        model: with adapters, and without deltas so far.
        state: by name; what is no ``….delta.weight`` is passed over.

    Raises:
        ValueError: there is no such module, or its weight has another shape; nothing was changed.
    """
    import torch

    layers = {module + DELTA: layer for module, layer in _layers(model)}
    deltas = {name: array for name, array in state.items() if name.endswith(DELTA)}
    if odd := sorted(deltas.keys() - layers.keys()):
        raise ValueError(f"tensor {odd[0]!r}: the model has no adapted module of that name")
    for name, delta in deltas.items():
        if (shape := tuple(_weight(layers[name]).shape)) != delta.shape:
            raise ValueError(f"tensor {name!r}: the model's weight is of shape {shape}, the delta's {delta.shape}")
    with torch.no_grad():
        for name, delta in deltas.items():
            weight = _weight(layers[name])
            weight.copy_(weight.float() + torch.tensor(delta, device=weight.device))


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """peft's LoRA layers by name."""
    from peft.tuners.lora import LoraLayer

    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A)


def _weight(layer: Any) -> Any:
    """The frozen weight as (out, in): a view, where GPT-2's Conv1D keeps it as (in, out)."""
    weight = layer.get_base_layer().weight.detach()
    return weight.T if layer.fan_in_fan_out else weight
