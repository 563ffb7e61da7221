"""A masked vector: all numbers of an update, whole ones of a ring, under masks; and the sum of such vectors, without them.

The file holds the numbers and nothing else: little-endian, of 4 or 8 bytes, tensors in the sorted order of their names, each row-major. What it is
of, its manifest says. Both directions work in blocks, so that memory does not grow with the vector.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from silotune.components.errors import RefusedError
from silotune.components.learning.aggregation.summation import windows
from silotune.components.learning.blob import Blob, read_ahead
from silotune.components.learning.privacy.discrete_gaussian import Noise
from silotune.components.learning.privacy.fixed_point import FixedPoint
from silotune.components.learning.privacy.masking import BLOCK, Mask, masked, scratch
from silotune.components.learning.tensor_file import TensorFile, tensor_writer


class VectorDamaged(RefusedError):
    """A masked vector whose bytes are not those that its silo has signed."""

    def __init__(self, silo: str) -> None:
        super().__init__(
            f"silo {silo!r}: its masked vector does not have its digest; it was damaged in the store, and the silo sends it again",
            "object corrupt",
        )
        self.silo = silo


@dataclass(frozen=True)
class Vector:
    """A masked vector in a store."""

    silo: str
    blob: Blob
    digest: str  # SHA-256 of its bytes


def numbers(update: TensorFile, point: FixedPoint, factor: float, noise: Noise | None = None) -> Iterator[np.ndarray]:
    """An update's whole numbers, in order, in blocks; see `FixedPoint.encode`.

    Args:
        noise: is added to them.
    """
    for window in windows(update):
        for piece in window:
            for start in range(piece.start, piece.stop, BLOCK):
                block = point.encode(update.part(piece.name, start, min(piece.stop, start + BLOCK)), factor)
                if noise is not None:
                    np.add(block, noise.take(len(block)).astype(point.dtype), out=block)
                yield block


def write_vector(path: Path, blocks: Iterator[np.ndarray], masks: Sequence[Mask]) -> str:
    """Write the file; returns its SHA-256. It appears under its name when it is complete."""
    hash, part = hashlib.sha256(), path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            for block in masked(blocks, masks):
                hash.update(block.data)
                file.write(block.data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return hash.hexdigest()


def write_sum(
    path: Path, vectors: Sequence[Vector], masks: Sequence[Mask], point: FixedPoint, shapes: Mapping[str, Sequence[int]]
) -> float:
    """Write the sum of all vectors without the masks, as a tensor file in float32; returns its L2 norm.

    Args:
        masks: what takes away the masks that have not cancelled.
        shapes: of the tensors.

    Raises:
        VectorDamaged: the bytes of a vector are not those of its digest; nothing was written.
    """
    length = sum(math.prod(shape) for shape in shapes.values())
    hashes = {v.silo: hashlib.sha256() for v in vectors}
    room, square = scratch(), 0.0
    names = deque((name, math.prod(shapes[name])) for name in sorted(shapes))
    with tensor_writer(path, shapes, "F32", {"format": "pt"}) as target:
        reading = _read_ahead(vectors, length, point)
        for start in range(0, length, BLOCK):
            total = np.zeros(min(BLOCK, length - start), point.dtype)
            for vector in vectors:
                data = next(reading)
                hashes[vector.silo].update(data)
                if len(data) != total.nbytes:
                    raise VectorDamaged(vector.silo)
                np.add(total, np.frombuffer(data, point.dtype), out=total)
            for mask in masks:
                mask.apply(total, room)
            found = point.decode(total)
            square += float(np.dot(found, found))
            found, at = found.astype("<f4"), 0
            while at < len(found):
                name, left = names.popleft()
                target.write(name, found[at : at + left])
                at, left = at + left, left - (len(found) - at)
                if left > 0:
                    names.appendleft((name, left))
        for vector in vectors:
            if hashes[vector.silo].hexdigest() != vector.digest:
                raise VectorDamaged(vector.silo)
    return math.sqrt(square)


def _read_ahead(vectors: Sequence[Vector], length: int, point: FixedPoint) -> Iterator[bytes | memoryview]:
    """Blocks of all vectors in the order they are needed, some of them on their way in threads where they come from far."""
    width = point.width // 8
    wanted = ((v.blob, start * width, min(start + BLOCK, length) * width) for start in range(0, length, BLOCK) for v in vectors)
    reads = (partial(blob.read, start, end) for blob, start, end in wanted)
    return read_ahead(reads, max(v.blob.ahead for v in vectors))
