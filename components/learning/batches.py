"""Batches: in which order a silo's examples come, and how they lie in a tensor.

Order: every epoch is a permutation seeded by (federation, seed, silo, epoch), and a silo's stream runs through epoch after epoch. A round
takes the next stretch of the stream from the silo's *cursor*, so that no round starts over with the same examples.

Layout: the examples of a batch lie side by side in as few rows of at most ``max_length`` tokens as first-fit-decreasing finds. A token
sees only earlier tokens of its own example, and positions start anew with each, so that a packed batch has the loss of an unpacked one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from silotune.components.learning.tokens import Shard

if TYPE_CHECKING:
    import torch


def seed_of(*parts: object) -> int:
    """A public 63-bit seed from the parts; for order and initialisation, never for noise or masks."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def stream(size: int, cursor: int, count: int, *seed: object) -> np.ndarray:
    """Example indices at positions cursor .. cursor + count of the endless stream over ``size`` examples; (count,) int64."""
    parts = []
    while count > 0:
        epoch, start = divmod(cursor, size)
        order = np.random.Generator(np.random.PCG64(seed_of(*seed, epoch))).permutation(size)
        part = order[start : start + count]
        parts.append(part)
        cursor, count = cursor + len(part), count - len(part)
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of positions into ``lengths`` whose lengths add up to at most ``capacity``, by first-fit-decreasing.

    Johnson 1973: never more than 11/9 of the fewest rows possible, plus one.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i)):
        length = int(lengths[i])
        for row, room in enumerate(free):
            if length <= room:
                rows[row].append(i)
                free[row] -= length
                break
        else:
            rows.append([i])
            free.append(max(capacity, length) - length)
    return rows


@dataclass(frozen=True)
class Batch:
    """Tensors of some rows: R rows of T tokens."""

    input_ids: torch.Tensor  # (R, T) int64
    targets: torch.Tensor  # (R, T) bool: tokens to predict
    position_ids: torch.Tensor  # (R, T) int64
    attention_mask: torch.Tensor  # (R, T) int64 where each row is one example, else (R, 1, T, T) bool
    tokens: int  # how many targets

    def to(self, device: torch.device) -> Batch:
        ids, targets, positions, mask = (x.to(device) for x in (self.input_ids, self.targets, self.position_ids, self.attention_mask))
        return Batch(ids, targets, positions, mask, self.tokens)


def collate(shard: Shard, rows: list[list[int]], pad: int) -> Batch:
    """Lay rows of example indices into tensors, padded on the right."""
    import torch

    lengths = [int(shard.lengths(np.array(row)).sum()) for row in rows]
    shape = (len(rows), max(lengths))
    ids = np.full(shape, pad, np.int64)
    targets = np.zeros(shape, bool)
    positions = np.zeros(shape, np.int64)
    segments = np.full(shape, -1, np.int64)
    for r, row in enumerate(rows):
        at = 0
        for segment, index in enumerate(row):
            tokens, marks = shard.example(index)
            here = slice(at, at + len(tokens))
            ids[r, here], targets[r, here], positions[r, here], segments[r, here] = tokens, marks, np.arange(len(tokens)), segment
            at += len(tokens)
    if all(len(row) == 1 for row in rows):
        mask = torch.from_numpy((segments >= 0).astype(np.int64))
    else:
        same = segments[:, :, None] == segments[:, None, :]  # padding sees padding, so that no softmax is over nothing
        mask = torch.from_numpy((same & np.tri(shape[1], dtype=bool))[:, None])
    return Batch(torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(positions), mask, int(targets.sum()))


def batches(
    shard: Shard, indices: np.ndarray, parts: int, capacity: int, pad: int, packing: bool, share: tuple[int, int] = (0, 1)
) -> Iterator[Batch]:
    """The examples of one optimiser step as at most ``parts`` batches of about the same number of rows.

    Args:
        share: (rank, ranks): only the rows of one of so many processes, every ``ranks``-th from ``rank`` on, so that all have long and
            short ones; none where there are fewer rows than ranks. The ``parts`` are divided among them: no batch has more rows than
            with one process.
    """
    rank, ranks = share
    placed = pack(shard.lengths(indices), capacity if packing else 0)[rank::ranks]
    rows = [[int(indices[i]) for i in row] for row in placed]
    size = max(1, -(-len(rows) // -(-parts // ranks)))
    for start in range(0, len(rows), size):
        yield collate(shard, rows[start : start + size], pad)


def target_count(shard: Shard, indices: np.ndarray) -> int:
    """Target tokens of some examples."""
    return sum(int(shard.example(int(i))[1].sum()) for i in indices)
