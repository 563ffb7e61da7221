"""Deltas in frozen weights and cores between fixed bases, on tiny models of both layouts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silotune.components.learning import adapters
from silotune.components.learning import model as models
from silotune.components.learning.aggregation.core import plain_state
from silotune.components.learning.aggregation.factors import CORE, DELTA, A, B, modules

IDS = [[0, 40, 77, 290, 15, 101, 60, 1]]
TERMS = {"method": "lora", "dtype": "float32", "lora": {"r": 4, "alpha": 12.0, "dropout": 0.0, "target_modules": "all-linear"}}
SCALE = 3.0


def load(base: Path, dtype: str = "float32") -> Any:
    return models.load_trainable(base, TERMS | {"dtype": dtype}, seed=1)


def logits(model: Any) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor(IDS)).logits.float().numpy()


def moved(state: dict[str, np.ndarray], size: float = 0.1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {n: (size * rng.standard_normal(a.shape)).astype(np.float32) for n, a in state.items()}


def deltas_of(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {m + DELTA: (SCALE * state[m + B] @ state[m + A]).astype(np.float32) for m in modules(state)}


def lora_layers(model: Any) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in model.named_modules() if hasattr(m, "lora_A")]


# Names


def test_adapters_are_found_frozen_or_not(tiny_base: Path) -> None:
    model = load(tiny_base)
    names = set(models.trainable_state(model))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert adapters.named_tensors(model).keys() == names
    assert adapters.named_tensors(models.load_base(tiny_base, "float32")) == {}


def test_rank_is_that_of_a(tiny_base: Path) -> None:
    assert adapters.rank_of(models.trainable_state(load(tiny_base))) == 4
    assert adapters.rank_of({"embed.weight": np.zeros((3, 2))}) == 0


# Deltas


def test_a_delta_does_what_the_pair_it_came_from_does(tiny_base: Path) -> None:
    model = load(tiny_base)
    zero = models.trainable_state(model)
    plain = logits(model)
    state = moved(zero)
    models.load_state(model, state)
    expected = logits(model)
    assert np.abs(expected - plain).max() > 0.01
    models.load_state(model, zero)
    adapters.add_deltas(model, zero | deltas_of(state))
    np.testing.assert_allclose(logits(model), expected, atol=2e-5)
    assert models.trainable_state(model).keys() == zero.keys()  # not sent


def test_a_delta_in_bfloat16_is_rounded_once(tiny_base: Path) -> None:
    import torch

    model = load(tiny_base, "bfloat16")
    name, layer = lora_layers(model)[0]
    before = layer.get_base_layer().weight.detach().clone()
    flat = before.T if layer.fan_in_fan_out else before
    delta = np.random.default_rng(0).standard_normal(tuple(flat.shape)).astype(np.float32)
    adapters.add_deltas(model, {name + DELTA: delta})
    now = layer.get_base_layer().weight
    assert now.dtype == torch.bfloat16
    assert torch.equal(now.T if layer.fan_in_fan_out else now, (flat.float() + torch.tensor(delta)).bfloat16())


def test_deltas_of_other_models_are_refused(tiny_base: Path) -> None:
    model = load(tiny_base)
    plain, deltas = logits(model), deltas_of(moved(models.trainable_state(model)))
    name = sorted(deltas)[-1]
    with pytest.raises(ValueError, match=r"tensor 'other.delta.weight': the model has no adapted module of that name"):
        adapters.add_deltas(model, deltas | {"other" + DELTA: deltas[name]})
    with pytest.raises(ValueError, match=r"the model's weight is of shape .* the delta's \(3, 3\)"):
        adapters.add_deltas(model, deltas | {name: np.zeros((3, 3), np.float32)})
    assert np.array_equal(logits(model), plain)


# Cores


def test_bases_are_of_the_weights_and_the_same_each_time(tiny_base: Path) -> None:
    model = load(tiny_base)
    names = list(models.trainable_state(model))
    state = adapters.with_cores(model)
    assert list(state) == sorted([*names, *(m + CORE for m in modules(names))])
    for name, layer in lora_layers(model):
        weight = layer.get_base_layer().weight.detach().double().numpy()
        weight = weight.T if layer.fan_in_fan_out else weight
        best = np.linalg.svd(weight, compute_uv=False)[:4]
        np.testing.assert_allclose(np.linalg.svd(state[name + B].T @ weight @ state[name + A].T, compute_uv=False), best, rtol=0.02)
        assert not state[name + CORE].any()
    again = adapters.with_cores(load(tiny_base))
    assert all(np.array_equal(state[n], again[n]) for n in state)


def with_inserted(base: Path, state: dict[str, np.ndarray]) -> Any:
    """A model with cores and a state, in which the cores alone are trained."""
    model = load(base)
    adapters.insert_cores(model)
    models.load_state(model, state)
    for name, tensor in adapters.named_tensors(model).items():
        tensor.requires_grad_(name.endswith(CORE))
    return model


def test_cores_begin_without_effect_and_are_all_that_is_sent(tiny_base: Path) -> None:
    plain = load(tiny_base)
    model = with_inserted(tiny_base, adapters.with_cores(plain))
    assert np.array_equal(logits(model), logits(plain))
    sent = models.trainable_state(model)
    assert sorted(sent) == [n for n in sorted(adapters.named_tensors(model)) if n.endswith(CORE)]
    assert all(a.shape == (4, 4) for a in sent.values())
    assert len({id(p) for p in model.parameters()}) == len(list(model.parameters()))


def test_cores_are_the_plain_pairs_they_are_exported_as(tiny_base: Path) -> None:
    plain = load(tiny_base)
    begin = adapters.with_cores(plain)
    state = begin | moved({n: a for n, a in begin.items() if n.endswith(CORE)})
    model = with_inserted(tiny_base, state)
    assert np.abs(logits(model) - logits(plain)).max() > 0.01
    exported = adapters.without_cores(state | {"x.delta.weight": np.ones((1, 1), np.float32)})
    assert exported.pop("x.delta.weight").tolist() == [[1.0]]
    models.load_state(plain, exported)
    np.testing.assert_allclose(logits(model), logits(plain), atol=2e-5)


def test_a_cores_gradient_is_the_weights_seen_through_the_bases(tiny_base: Path) -> None:
    """s·BᵀGAᵀ, with G from training the weight itself."""
    import torch

    ids = torch.tensor(IDS)
    full = load(tiny_base)
    state = adapters.with_cores(full)
    model = with_inserted(tiny_base, state)
    model(input_ids=ids, labels=ids).loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is not None and "lora_core" not in n]
    full.requires_grad_(True)
    full(input_ids=ids, labels=ids).loss.backward()
    for name, layer in lora_layers(full):
        weight = layer.get_base_layer().weight.grad
        weight = weight.T if layer.fan_in_fan_out else weight
        expected = SCALE * state[name + B].T @ weight.numpy() @ state[name + A].T
        found = model.get_submodule(name).lora_core["default"].weight.grad.numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max() + 1e-7)
        assert found.any()


def test_a_copy_of_a_model_has_cores_of_its_own(tiny_base: Path) -> None:
    begin = adapters.with_cores(load(tiny_base))
    model = with_inserted(tiny_base, begin)
    other = copy.deepcopy(model)
    models.load_state(other, begin | moved({n: a for n, a in begin.items() if n.endswith(CORE)}))
    assert np.abs(logits(other) - logits(model)).max() > 0.01
    assert np.array_equal(logits(model), logits(load(tiny_base)))


def test_cores_are_put_in_once(tiny_base: Path) -> None:
    model = load(tiny_base)
    adapters.insert_cores(model)
    with pytest.raises(ValueError, match="has a core already"):
        adapters.insert_cores(model)


def test_cores_of_other_modules() -> None:
    bases = {"x" + A: np.ones((1, 3), np.float32), "x" + B: np.ones((3, 1), np.float32)}
    with pytest.raises(ValueError, match=r"cores: are not of the bases' modules, such as 'x.lora_core.weight'"):
        plain_state(bases, {})
