"""Fixtures for the learning core: shards from plain lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from silotune.components.learning.tokens import Counts, Shard


@pytest.fixture
def make_shard() -> Callable[[Sequence[tuple[list[int], list[int]]]], Shard]:
    """A shard in memory from (token ids, targets) of each example."""

    def make(examples: Sequence[tuple[list[int], list[int]]]) -> Shard:
        tokens = np.array([t for ids, _ in examples for t in ids], np.int32)
        targets = np.array([t for _, marks in examples for t in marks], np.uint8)
        offsets = np.cumsum([0, *(len(ids) for ids, _ in examples)]).astype(np.int64)
        counts = Counts(len(examples), len(tokens), int(targets.sum()), len(examples), 0, 0)
        return Shard(tokens, targets, offsets, "digest", counts, np.arange(len(examples), dtype=np.int32))

    return make


@pytest.fixture
def some_shard(make_shard: Callable[..., Shard]) -> Shard:
    """Ten examples of 5 to 23 tokens, of which a varying tail is to be learned."""
    rng = np.random.default_rng(5)
    examples = []
    for length in (5, 23, 9, 14, 7, 11, 20, 6, 8, 17):
        ids = rng.integers(3, 300, length).tolist()
        learned = int(rng.integers(1, length))
        examples.append((ids, [0] * (length - learned) + [1] * learned))
    return make_shard(examples)
