"""Units' gradients against one backward pass a unit, and against Opacus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from silotune.components.learning import model as models
from silotune.components.learning.batches import collate
from silotune.components.learning.privacy.sampling import Units, groups
from silotune.components.learning.privacy.unit_gradients import NoStretches, UnitGradients, stretches_of
from silotune.components.learning.tokens import Shard
from silotune.components.learning.training import token_losses

PAD = 2
PERSONS = np.array([0, 1, 0, 2, 1, 1, 3, 1, 1, 2], np.int32)


def fresh(folder: Path, method: str = "lora", train: Callable[[str], bool] = lambda _: True, dropout: float = 0.0) -> Any:
    lora = {"r": 4, "alpha": 8.0, "dropout": dropout, "target_modules": "all-linear"}
    model = models.load_trainable(folder, {"method": method, "dtype": "float32", "lora": lora}, 0)
    rng = np.random.default_rng(11)
    if method == "lora":
        state = models.trainable_state(model)
        models.load_state(model, {n: (a + 0.05 * rng.standard_normal(a.shape)).astype(np.float32) for n, a in state.items()})
    for name, parameter in models.trainable(model).items():
        parameter.requires_grad_(train(name))
    return model.train()


def of(shard: Shard, units: np.ndarray) -> Shard:
    return Shard(shard.tokens, shard.targets, shard.offsets, shard.digest, shard.counts, units)


def one_by_one(model: Any, shard: Shard, drawn: list[int]) -> dict[str, torch.Tensor]:
    """Every example in a pass of its own, unpadded; a unit's loss is the mean over its target tokens."""
    named, found = models.trainable(model), []
    for unit in drawn:
        own = np.flatnonzero(shard.units == unit)
        targets = sum(int(shard.example(int(e))[1].sum()) for e in own)
        for parameter in named.values():
            parameter.grad = None
        for example in own:
            (token_losses(model, collate(shard, [[int(example)]], PAD)).sum() / targets).backward()
        found.append({n: p.grad.clone() for n, p in named.items()})
        for parameter in named.values():
            parameter.grad = None
    return {n: torch.stack([f[n] for f in found]) for n in named}


def taken(
    model: Any, shard: Shard, drawn: list[int], rows: int = 50, packing: bool = True, autocast: bool = False
) -> tuple[dict[str, torch.Tensor], UnitGradients]:
    """As a step takes them."""
    units, gradients = Units.of(shard), UnitGradients(model, models.trainable(model))
    found: list[dict[str, torch.Tensor]] = []

    def given(these: list[int]) -> Iterator[Any]:
        yield from groups(shard, units, np.array(these), rows, 64, packing)

    with gradients.attached():
        for group in [g for each in ([drawn] if gradients.by_stretches else [[u] for u in drawn]) for g in given(each)]:

            def backward(i: int, weights: Any, group: Any = group) -> None:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    losses = token_losses(model, collate(shard, [list(r) for r in group.parts[i]], PAD))
                (losses * weights).sum().backward()

            parts = [stretches_of(shard, units, group, part) for part in group.parts]
            found.append(gradients.of_group(len(group.units), parts, backward))
    return {n: torch.cat([f[n] for f in found]) for n in found[0]}, gradients


def same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 2e-5) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        largest = float(wanted[name].abs().max())
        assert largest > 0
        torch.testing.assert_close(got[name], wanted[name], atol=tolerance * largest, rtol=0)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("whose", ["record", "person"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_they_are_those_of_one_unit_at_a_time(tiny_base: Path, some_shard: Shard, method: str, whose: str, packing: bool) -> None:
    shard = of(some_shard, PERSONS) if whose == "person" else some_shard
    drawn = [0, 1, 3] if whose == "person" else [0, 1, 2, 5, 6, 9]
    model = fresh(tiny_base, method)
    got, gradients = taken(model, shard, drawn, packing=packing)
    assert gradients.by_stretches == (method == "lora")
    same(got, one_by_one(model, shard, drawn))


def test_a_person_longer_than_memory_is_taken_in_parts(tiny_llama: Path, some_shard: Shard) -> None:
    model, shard = fresh(tiny_llama), of(some_shard, PERSONS)
    got, _ = taken(model, shard, [0, 1, 2, 3], rows=1, packing=False)
    same(got, one_by_one(model, shard, [0, 1, 2, 3]))


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_one_factor_alone(tiny_base: Path, some_shard: Shard, factor: str) -> None:
    """ffa trains B, rolora one after the other; no other parameter gets a gradient."""
    model = fresh(tiny_base, train=lambda name: factor in name)
    got, gradients = taken(model, some_shard, [1, 4, 7])
    assert gradients.by_stretches
    assert all(factor in name for name in got)
    assert all(p.grad is None for p in model.parameters())
    same(got, one_by_one(model, some_shard, [1, 4, 7]))


def test_cores_between_the_factors(tiny_llama: Path, some_shard: Shard) -> None:
    """fed-sb."""
    from silotune.components.learning import adapters

    terms = {"method": "lora", "dtype": "float32", "lora": {"r": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": "all-linear"}}
    state = adapters.with_cores(models.load_trainable(tiny_llama, terms, 0))
    rng = np.random.default_rng(2)
    state = {n: a + (0.1 * rng.standard_normal(a.shape).astype(np.float32) if "core" in n else 0) for n, a in state.items()}
    model = models.load_with_state(tiny_llama, terms, state, [n for n in state if "core" in n]).train()
    got, gradients = taken(model, some_shard, [0, 3, 8])
    assert gradients.by_stretches
    same(got, one_by_one(model, some_shard, [0, 3, 8]))


def test_with_gradient_checkpointing(tiny_llama: Path, some_shard: Shard) -> None:
    model = fresh(tiny_llama)
    wanted = one_by_one(model, some_shard, [0, 3, 8])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    same(taken(model, some_shard, [0, 3, 8])[0], wanted)


def test_dropout_drops(tiny_llama: Path, some_shard: Shard) -> None:
    model = fresh(tiny_llama, dropout=0.5)
    torch.manual_seed(1)
    first = taken(model, some_shard, [0, 3])[0]
    torch.manual_seed(1)
    again = taken(model, some_shard, [0, 3])[0]
    other = taken(model, some_shard, [0, 3])[0]
    same(again, first, 1e-7)
    assert any((first[n] - other[n]).abs().max() > 0.01 * first[n].abs().max() for n in first)


def test_in_bfloat16_as_near_as_its_digits(tiny_llama: Path, some_shard: Shard) -> None:
    model = fresh(tiny_llama)
    got = taken(model, some_shard, [0, 3, 8], autocast=True)[0]
    assert all(g.dtype == torch.float32 for g in got.values())
    for name, wanted in one_by_one(model, some_shard, [0, 3, 8]).items():
        assert 1e-5 < (got[name] - wanted).norm() / wanted.norm() < 0.15  # of the model's own rounding, mostly


def test_opacus_makes_the_same_of_unpacked_records(tiny_llama: Path, some_shard: Shard) -> None:
    from opacus import GradSampleModule

    drawn = [0, 2, 5]
    model = fresh(tiny_llama)
    got = taken(model, some_shard, drawn, packing=False)[0]
    frozen = [p for n, p in model.named_parameters() if p.requires_grad is False]
    wrapped = GradSampleModule(model, loss_reduction="sum", strict=False)
    batch = collate(some_shard, [[u] for u in drawn], PAD)
    counts = batch.targets[:, 1:].sum(1)
    out = wrapped(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False)
    losses = torch.nn.functional.cross_entropy(out.logits[:, :-1].transpose(1, 2), batch.input_ids[:, 1:], reduction="none")
    (losses * batch.targets[:, 1:] / counts[:, None]).sum().backward()
    same(got, {n: p.grad_sample for n, p in models.trainable(model).items()})
    assert frozen


def test_a_unit_knows_nothing_of_the_others(tiny_llama: Path, some_shard: Shard) -> None:
    """Other units beside it in a row change nothing but rounding: else a clip would bound nothing."""
    model = fresh(tiny_llama)
    alone, beside = taken(model, some_shard, [4])[0], taken(model, some_shard, [0, 2, 4, 7, 8])[0]
    same({n: g[2:3] for n, g in beside.items()}, alone)


def test_layers_that_see_other_rows_fall_back_to_one_at_a_time(tiny_llama: Path, some_shard: Shard) -> None:
    """As experts do, which are given some of the tokens."""
    model = fresh(tiny_llama)
    layer = next(m for n, m in model.named_modules() if n.endswith("mlp.up_proj.lora_A.default"))
    layer.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1),))
    layer.register_forward_hook(lambda _, args, out: out.view(*shape, -1))
    units, gradients = Units.of(some_shard), UnitGradients(model, models.trainable(model))
    (group,) = groups(some_shard, units, np.array([3]), 9, 64, True)
    batch = collate(some_shard, [list(r) for r in group.parts[0]], PAD)
    shape = tuple(batch.input_ids.shape)

    def backward(_: int, weights: Any) -> None:
        (token_losses(model, batch) * weights).sum().backward()

    parts = [stretches_of(some_shard, units, group, part) for part in group.parts]
    with gradients.attached():
        with pytest.raises(NoStretches):
            gradients.of_group(1, parts, backward)
        assert not gradients.by_stretches
        got = gradients.of_group(1, parts, backward)
    same(got, one_by_one(model, some_shard, [3]))
    assert all("forward" not in m.__dict__ for m in model.modules())
