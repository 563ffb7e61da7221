"""Tensor files: the safetensors container, written and read strictly, tensor by tensor, in numpy.

    8 bytes    length N of the header, unsigned little-endian
    N bytes    header: UTF-8 JSON without spaces, {"__metadata__":{text:text},name:{"dtype":…,"shape":[…],"data_offsets":[start,end]},…};
               metadata first, left out if empty, by sorted keys; then the tensors by sorted names; then spaces until 8 + N divides by 8
    the rest   tensors end to end in the header's order, all of one dtype, little-endian, row-major, no holes, nothing behind the last

Any safetensors reader opens these files. This one is stricter than the format, for files that come from others: only F32 or BF16, offsets
without holes or overlaps, sizes that follow from the shapes, a header within a limit, a file of exactly the length that the header says, and
a header that is byte for byte what `header_text` makes of its content: the same content never stands in two different files. Nothing is
allocated on a header's word before all this holds. Only numpy is needed, so that the aggregator runs without torch.

A file is read from a local path or from any `Blob`: its header first, then tensors, or parts of them, as they are asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from silotune.components.learning.blob import Blob, FileBlob

HEADER_LIMIT = 64 << 20  # bytes
FIRST = 1 << 16  # bytes of the first read: most headers are whole in it, and a store is asked once
WIDTH = {"F32": 4, "BF16": 2}


class MalformedFile(ValueError):
    """Not a tensor file in the strict sense; the message says which rule is broken."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor stands in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    end: int


@dataclass(frozen=True)
class TensorFile:
    """An open file's header; tensors are read one at a time, or in parts."""

    blob: Blob
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    header_digest: str  # SHA-256, in hexadecimal, of all that stands before the tensors

    def raw(self, name: str) -> bytes:
        """The bytes of a tensor as they stand in the file."""
        entry = self.entries[name]
        return bytes(self.span(name, entry.start, entry.end))

    def span(self, name: str, start: int, end: int) -> bytes | memoryview:
        """Bytes of the file from ``start`` to before ``end``.

        Args:
            name: the tensor that is told where the file ends before.
        """
        data = self.blob.read(start, end)
        if len(data) != end - start:
            raise MalformedFile(f"tensor {name!r}: the file ends inside it")
        return data

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32."""
        entry = self.entries[name]
        return from_bytes(self.raw(name), entry.dtype).reshape(entry.shape)

    def part(self, name: str, start: int, stop: int) -> np.ndarray:
        """The numbers of a tensor from index ``start`` to before ``stop`` of its flat form, as float32."""
        entry = self.entries[name]
        width = WIDTH[entry.dtype]
        return from_bytes(self.span(name, entry.start + start * width, entry.start + stop * width), entry.dtype)

    def read_all(self) -> dict[str, np.ndarray]:
        return {name: self.read(name) for name in self.entries}


def to_bytes(array: np.ndarray, dtype: str) -> bytes:
    """Little-endian bytes of a float32 array as F32, or as BF16 rounded to nearest, ties to even."""
    if array.dtype != np.float32:
        raise ValueError(f"tensors must be float32, got {array.dtype}")
    if dtype == "F32":
        return np.ascontiguousarray(array, "<f4").tobytes()
    bits = np.ascontiguousarray(array, "<f4").view("<u4")
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    rounded = np.where(np.isnan(array), 0x7FC0, rounded)
    return rounded.astype("<u2").tobytes()


def from_bytes(data: bytes | memoryview, dtype: str) -> np.ndarray:
    """The float32 array of such bytes, flat."""
    if dtype == "F32":
        return np.frombuffer(data, "<f4").astype(np.float32, copy=False)
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)


def header_text(shapes: Mapping[str, Sequence[int]], dtype: str, metadata: Mapping[str, str]) -> bytes:
    """The header of a file, padding included: one byte string per content."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name in sorted(shapes):
        size = math.prod(shapes[name]) * WIDTH[dtype]
        header[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)  # tensors start at a multiple of 8, for memory maps


class TensorWriter:
    """Fills in the tensors of a file whose header stands; each from its first number to its last, several at the same time if need be."""

    def __init__(self, file: BinaryIO, shapes: Mapping[str, Sequence[int]], dtype: str, metadata: Mapping[str, str]) -> None:
        text = header_text(shapes, dtype, metadata)
        file.write(len(text).to_bytes(8, "little") + text)
        self._file = file
        self._next, self._end = {}, {}
        at = 8 + len(text)
        for name in sorted(shapes):
            self._next[name] = at
            at += math.prod(shapes[name]) * WIDTH[dtype]
            self._end[name] = at

    def write(self, name: str, data: bytes | np.ndarray) -> None:
        """The next numbers of a tensor, as the bytes that are to stand in the file. Raises ValueError where they are more than it has."""
        view = data if isinstance(data, bytes) else np.ascontiguousarray(data).data
        at = self._next[name]
        end = at + (len(data) if isinstance(data, bytes) else data.nbytes)
        if end > self._end[name]:
            raise ValueError(f"tensor {name!r}: {end - self._end[name]} bytes more than were announced")
        if self._file.tell() != at:
            self._file.seek(at)
        self._file.write(view)
        self._next[name] = end

    def check(self) -> None:
        """Raises ValueError where a tensor is not complete."""
        for name, at in self._next.items():
            if at != self._end[name]:
                raise ValueError(f"tensor {name!r}: was announced and not written to its end")


@contextmanager
def tensor_writer(path: Path, shapes: Mapping[str, Sequence[int]], dtype: str, metadata: Mapping[str, str]) -> Iterator[TensorWriter]:
    """Write a file in one go, its tensors in any order; it appears under its name, on disk, when it is complete, or not at all.

    Args:
        shapes: of all tensors.
        dtype: of all tensors, ``F32`` or ``BF16``.
        metadata: text by text.

    Raises:
        ValueError: at the end, a tensor is not complete.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            writer = TensorWriter(file, shapes, dtype, metadata)
            yield writer
            writer.check()
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_tensor_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, tensors: Iterable[tuple[str, bytes]], metadata: Mapping[str, str]
) -> None:
    """As `tensor_writer`, of whole tensors.

    Args:
        tensors: (name, bytes) in sorted order of names; may be produced on the way.

    Raises:
        ValueError: tensors and shapes do not match.
    """
    with tensor_writer(path, shapes, dtype, metadata) as writer:
        expected = iter(sorted(shapes))
        for name, data in tensors:
            if name != next(expected, None) or len(data) != math.prod(shapes[name]) * WIDTH[dtype]:
                raise ValueError(f"tensor {name!r}: is not the next one, or not of the size that was announced")
            writer.write(name, data)
        if (missing := next(expected, None)) is not None:
            raise ValueError(f"tensor {missing!r}: was announced and not written")


def open_tensor_file(source: Path | Blob, header_limit: int = HEADER_LIMIT) -> TensorFile:
    """Read and check a header.

    Args:
        source: a local file, or any bytes that can be read in ranges.
        header_limit: bytes; a longer header is refused unread.

    Raises:
        MalformedFile: a rule of the format is broken.
    """
    blob = FileBlob(source) if isinstance(source, Path) else source
    size = blob.size
    data = bytes(blob.read(0, min(size, FIRST, 8 + header_limit)))
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > size - 8:
        raise MalformedFile(f"the file of {size} bytes is too short for its header")
    if length > header_limit:
        raise MalformedFile(f"the header of {length} bytes is over the limit of {header_limit}")
    if 8 + length > len(data):
        data += blob.read(len(data), 8 + length)
    data = data[: 8 + length]
    if len(data) < 8 + length:
        raise MalformedFile("the file ends inside its header")
    text = data[8:]
    if not text.startswith(b"{"):
        raise MalformedFile("the header does not begin with {")
    try:
        header = strict_json(text.decode("utf-8"))
    except ValueError:
        raise MalformedFile("the header is not UTF-8 JSON without repeated keys") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise MalformedFile("the header's __metadata__ is not text by text")
    entries = dict(_entries(header, 8 + length))
    end = max((e.end for e in entries.values()), default=8 + length)
    if end != size:
        raise MalformedFile(f"the file has {size} bytes where its header says {end}")
    if text != _canonical(entries, metadata):
        raise MalformedFile("the header is not byte for byte the one way to write its content")
    return TensorFile(blob, metadata, entries, hashlib.sha256(data).hexdigest())


def _entries(header: dict[str, object], at: int) -> Iterator[tuple[str, Entry]]:
    base = at
    if list(header) != sorted(header):
        raise MalformedFile("tensor names are not in sorted order")
    for name, about in header.items():
        if not isinstance(about, dict) or about.keys() != {"dtype", "shape", "data_offsets"}:
            raise MalformedFile(f"tensor {name!r}: must have dtype, shape and data_offsets")
        dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
        if not isinstance(dtype, str) or dtype not in WIDTH:
            raise MalformedFile(f"tensor {name!r}: dtype must be one of {', '.join(WIDTH)}")
        if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
            raise MalformedFile(f"tensor {name!r}: shape and data_offsets must be whole numbers, not negative")
        size = math.prod(shape) * WIDTH[dtype]
        if offsets[0] != at - base or offsets[1] - offsets[0] != size:
            raise MalformedFile(f"tensor {name!r}: data_offsets leave a hole, overlap, or do not fit the shape")
        yield name, Entry(dtype, tuple(shape), at, at + size)
        at += size


def _canonical(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    dtypes = sorted({e.dtype for e in entries.values()})
    if len(dtypes) > 1:
        raise MalformedFile(f"its tensors are of more than one dtype: {', '.join(dtypes)}")
    try:
        return header_text({name: e.shape for name, e in entries.items()}, "".join(dtypes), metadata)
    except UnicodeEncodeError:  # an escape for half a character: no UTF-8 stands for it
        raise MalformedFile("the header's texts are not all Unicode") from None


def _naturals(values: object) -> bool:
    return isinstance(values, list) and len(values) <= 16 and all(type(v) is int and 0 <= v < 1 << 48 for v in values)


def strict_json(text: str) -> Any:
    """What a JSON text says; memory is bounded by some 40 times its length, whatever it says.

    Raises:
        ValueError: it is not JSON, repeats a key, holds NaN or Infinity, or is nested too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _no_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("repeated key")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(name)
