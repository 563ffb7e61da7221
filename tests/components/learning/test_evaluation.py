"""Evaluation: sums that pool, equal to scoring token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silotune.components.learning.evaluation import Score, chosen, evaluate
from silotune.components.learning.model import load_base
from silotune.components.learning.tokens import Shard


def by_hand(model: Any, shard: Shard, indices: list[int]) -> tuple[int, float, int]:
    """Tokens, loss and hits, one example and one token at a time."""
    import torch

    tokens, loss, correct = 0, 0.0, 0
    for i in indices:
        ids, targets = shard.example(i)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids.tolist()])).logits[0].double().numpy()
        for t in np.flatnonzero(targets):
            row = logits[t - 1]
            loss += math.log(np.exp(row - row.max()).sum()) + row.max() - row[ids[t]]
            correct += int(np.argmax(row) == ids[t])
            tokens += 1
    return tokens, loss, correct


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_equals_token_by_token(tiny_base: Path, some_shard: Shard, batch_size: int) -> None:
    model = load_base(tiny_base, "float32").eval()
    indices = [8, 1, 5, 3, 0]
    score = evaluate(model, some_shard, np.array(indices), batch_size, 40, 2)
    tokens, loss, correct = by_hand(model, some_shard, indices)
    assert (score.examples, score.tokens, score.correct) == (5, tokens, correct)
    assert score.loss_sum == pytest.approx(loss, rel=1e-5)
    assert score.loss == pytest.approx(loss / tokens, rel=1e-5)


def test_hits_are_counted(tiny_llama: Path, make_shard: Callable[..., Shard]) -> None:
    """Ask for what the model says anyway: all correct; for anything else: none."""
    import torch

    model = load_base(tiny_llama, "float32").eval()
    ids = [0, 40, 77]
    with torch.inference_mode():
        for _ in range(4):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    right = make_shard([(ids, [0, 0, 0, 1, 1, 1, 1])])
    assert evaluate(model, right, np.array([0]), 1, 40, 2).correct == 4
    wrong = make_shard([([*ids[:-1], (ids[-1] + 1) % 300], [0, 0, 0, 0, 0, 0, 1])])
    assert evaluate(model, wrong, np.array([0]), 1, 40, 2).correct == 0


def test_sums_of_parts_pool_to_the_whole(tiny_llama: Path, some_shard: Shard) -> None:
    model = load_base(tiny_llama, "float32")
    whole, *parts = (evaluate(model, some_shard, np.array(i), 4, 40, 2) for i in (range(10), range(3), range(3, 10)))
    assert sum(p.loss_sum for p in parts) == pytest.approx(whole.loss_sum, rel=1e-6)
    for field in ("examples", "tokens", "correct"):
        assert sum(getattr(p, field) for p in parts) == getattr(whole, field)


def test_same_bits_in_any_order_of_asking(tiny_llama: Path, some_shard: Shard) -> None:
    """The score of a (model, split) is written once and compared by others."""
    model = load_base(tiny_llama, "float32")
    first = evaluate(model, some_shard, np.arange(10), 4, 40, 2)
    assert evaluate(model, some_shard, np.arange(10), 4, 40, 2) == first


def test_dropout_is_off(tiny_llama: Path, some_shard: Shard) -> None:
    from torch import nn

    model = load_base(tiny_llama, "float32").train()
    without = evaluate(model, some_shard, np.arange(4), 4, 40, 2)
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, nn.Dropout(0.5))
    model.train()
    assert evaluate(model, some_shard, np.arange(4), 4, 40, 2) == without


def test_leaves_the_model_able_to_train(tiny_llama: Path, some_shard: Shard) -> None:
    from silotune.components.learning.batches import collate
    from silotune.components.learning.training import token_losses

    model = load_base(tiny_llama, "float32").train()
    evaluate(model, some_shard, np.arange(3), 4, 40, 2)
    token_losses(model.train(), collate(some_shard, [[0]], 2)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_loss_of_a_broken_model_is_told_as_it_is(tiny_llama: Path, some_shard: Shard) -> None:
    import torch

    model = load_base(tiny_llama, "float32")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    whole = evaluate(load_base(tiny_llama, "float32"), some_shard, np.arange(3), 4, 40, 2)
    broken = evaluate(model, some_shard, np.arange(3), 4, 40, 2)
    assert not math.isfinite(broken.loss_sum)
    assert not math.isfinite(broken.loss)
    assert (broken.examples, broken.tokens) == (whole.examples, whole.tokens)


@pytest.mark.parametrize(("batch_size", "batches"), [(1, 10), (4, 3), (100, 1)])
def test_every_batch_gives_a_sign_of_life(tiny_llama: Path, some_shard: Shard, batch_size: int, batches: int) -> None:
    model = load_base(tiny_llama, "float32")
    seen: list[None] = []
    score = evaluate(model, some_shard, np.arange(10), batch_size, 40, 2, on_batch=lambda: seen.append(None))
    assert len(seen) == batches
    assert score == evaluate(model, some_shard, np.arange(10), batch_size, 40, 2)


def test_chosen_is_a_subset_by_seed(some_shard: Shard) -> None:
    assert chosen(some_shard, None, "f").tolist() == chosen(some_shard, 10, "f").tolist() == chosen(some_shard, 11, "f").tolist()
    assert chosen(some_shard, None, "f").tolist() == list(range(10))
    four = chosen(some_shard, 4, "f", "north").tolist()
    assert len(set(four)) == 4
    assert four == sorted(four)
    assert set(four) <= set(range(10))
    assert chosen(some_shard, 4, "f", "north").tolist() == four
    assert set(four) < set(chosen(some_shard, 5, "f", "north").tolist())
    assert len({tuple(chosen(some_shard, 4, "f", silo)) for silo in range(8)}) > 1


def test_loss_is_per_token() -> None:
    assert Score(examples=2, tokens=8, loss_sum=4.0, correct=1).loss == 0.5
