"""Losses, angles and continuations of single examples, against the plain way to have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from silotune.components.learning import model as models
from silotune.components.learning.evaluation import evaluate
from silotune.components.learning.leakage.extraction import comes_out, extraction
from silotune.components.learning.leakage.losses import alignments, example_losses
from silotune.components.learning.tokens import Counts, Shard

FULL = {"method": "full", "dtype": "float32"}


@pytest.fixture(scope="module")
def shard() -> Shard:
    draw = np.random.default_rng(0)
    lengths = [5, 9, 3, 7, 9, 4]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    targets = np.concatenate([[0] + [int(i > n // 3) for i in range(1, n)] for n in lengths]).astype(np.uint8)
    return Shard(
        tokens=draw.integers(3, 60, offsets[-1]).astype(np.int32), targets=targets, offsets=offsets, units=np.arange(6, dtype=np.int32),
        digest="d", counts=Counts(6, int(offsets[-1]), int(targets.sum()), 6, 0, 0),
    )  # fmt: skip


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    return models.load_trainable(tiny_llama, FULL, seed=1)


def test_losses_are_those_of_each_example_alone(model: Any, shard: Shard) -> None:
    indices = np.array([4, 0, 2, 5])
    found = example_losses(model, shard, indices, pad=0)
    alone = [evaluate(model, shard, np.array([i]), 1, 64, 0).loss_sum for i in indices]
    assert found == pytest.approx(alone, rel=1e-5)


def test_an_update_lies_along_the_gradient_of_what_it_was_made_of(model: Any, shard: Shard) -> None:
    named = models.trainable(model)
    before = {n: p.detach().clone() for n, p in named.items()}
    ids = torch.tensor(shard.example(1)[0].astype(np.int64))[None]
    wanted = torch.tensor(shard.example(1)[1].astype(bool))[None]
    logits = model(input_ids=ids).logits[0, :-1][wanted[0, 1:]]
    torch.nn.functional.cross_entropy(logits, ids[0, 1:][wanted[0, 1:]]).backward()
    update = {n: (-0.1 * p.grad).numpy() for n, p in named.items() if p.grad is not None}
    found = alignments(model, shard, np.arange(6), 0, update)
    assert found[1] == pytest.approx(1, abs=1e-4)
    assert found.argmax() == 1
    assert np.all(np.abs(found) <= 1 + 1e-6)
    assert alignments(model, shard, np.array([1]), 0, {n: -u for n, u in update.items()})[0] == pytest.approx(-1, abs=1e-4)
    assert alignments(model, shard, np.array([1]), 0, {n: 0 * u for n, u in update.items()})[0] == 0
    assert all(torch.equal(p, before[n]) for n, p in named.items())  # nothing is trained


def test_a_continuation_comes_out_if_greedy_decoding_gives_it(model: Any, shard: Shard) -> None:
    """Examples whose targets are what the model itself says, token by token, and the same with one token changed."""
    rows = []
    for i in (0, 1, 3):
        ids, targets = (x.copy() for x in shard.example(i))
        for at in np.flatnonzero(targets):
            with torch.no_grad():
                ids[at] = int(model(input_ids=torch.tensor(ids[None, :at].astype(np.int64))).logits[0, -1].argmax())
        rows += [(ids, targets), (np.where(np.arange(len(ids)) == len(ids) - 1, (ids + 1) % 60, ids), targets)]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in rows])])
    made = Shard(
        tokens=np.concatenate([ids for ids, _ in rows]).astype(np.int32), targets=np.concatenate([t for _, t in rows]), offsets=offsets,
        units=np.arange(6, dtype=np.int32), digest="d", counts=shard.counts,
    )  # fmt: skip
    assert comes_out(model, made, np.arange(6)).tolist() == [True, False] * 3


def test_extraction_is_surprising_beside_what_others_give() -> None:
    members, others = np.arange(40) < 20, np.arange(40) < 2
    found = extraction(members, others)
    assert (found.members, found.others) == (0.5, 0.05)
    assert found.surprising
    assert not extraction(others, members).surprising
    assert not extraction(np.zeros(40, bool), np.zeros(40, bool)).surprising
    with pytest.raises(ValueError, match="extraction"):
        extraction(np.array([], bool), others)
