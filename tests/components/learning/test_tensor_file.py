"""Tensor files: the bytes as documented, what safetensors makes of them, and every broken rule refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from silotune.components.learning.tensor_file import MalformedFile, from_bytes, open_tensor_file, to_bytes, write_tensor_file

rng = np.random.default_rng(4)
TENSORS = {
    "b.é": rng.standard_normal((3, 5)).astype(np.float32),
    "a": rng.standard_normal(7).astype(np.float32),
    "c": np.array(2.5, np.float32),
    "d": np.empty((0, 4), np.float32),
    "B": rng.standard_normal((2, 3, 2)).astype(np.float32).transpose(2, 1, 0),  # not contiguous
}
METADATA = {"z": "ü", "format": "pt"}


def write(path: Path, dtype: str = "F32", tensors: dict[str, np.ndarray] = TENSORS, metadata: dict[str, str] = METADATA) -> Path:
    encoded = ((n, to_bytes(a, dtype)) for n, a in sorted(tensors.items()))
    write_tensor_file(path, {n: a.shape for n, a in tensors.items()}, dtype, encoded, metadata)
    return path


def compact(header: Any) -> bytes:
    """The header as the writer spells it, right or wrong."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def raw_file(path: Path, header: Any, body: bytes) -> Path:
    """A file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else compact(header)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


# Writing and reading


@pytest.mark.parametrize(("dtype", "width"), [("F32", 4), ("BF16", 2)])
def test_bytes_are_as_documented(tmp_path: Path, dtype: str, width: int) -> None:
    data = write(tmp_path / "f", dtype).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    assert (8 + length) % 8 == 0
    assert header.pop("__metadata__") == METADATA
    assert list(header) == sorted(TENSORS)
    at = 0
    for name, about in header.items():
        size = TENSORS[name].size * width
        assert about == {"dtype": dtype, "shape": list(TENSORS[name].shape), "data_offsets": [at, at + size]}
        values = list(TENSORS[name].flatten())
        if dtype == "F32":
            assert body[at : at + size] == struct.pack(f"<{len(values)}f", *values)
        at += size
    assert at == len(body)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_safetensors_reads_the_same(tmp_path: Path, dtype: str) -> None:
    from safetensors import safe_open

    path = write(tmp_path / "f", dtype)
    mine = open_tensor_file(path).read_all()
    with safe_open(path, "pt") as theirs:
        assert theirs.metadata() == METADATA
        assert set(theirs.keys()) == set(mine) == set(TENSORS)
        for name, array in mine.items():
            assert theirs.get_tensor(name).float().numpy().tobytes() == array.tobytes()
            assert array.shape == TENSORS[name].shape
    if dtype == "F32":
        assert all(mine[n].tobytes() == a.tobytes() for n, a in TENSORS.items())


def test_file_of_safetensors_is_read(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": TENSORS["b.é"], "y": TENSORS["a"]}, tmp_path / "f", metadata={"format": "pt"})
    read = open_tensor_file(tmp_path / "f")
    assert dict(read.metadata) == {"format": "pt"}
    assert (read.read("x") == TENSORS["b.é"]).all()
    assert (read.read("y") == TENSORS["a"]).all()


def test_same_tensors_same_bytes(tmp_path: Path) -> None:
    turned = dict(reversed(TENSORS.items()))
    other = dict(reversed(METADATA.items()))
    assert write(tmp_path / "f").read_bytes() == write(tmp_path / "g", tensors=turned, metadata=other).read_bytes()


def test_bfloat16_rounds_as_torch_does() -> None:
    import torch

    special = [0.0, -0.0, 1.0, np.inf, -np.inf, 3.3895314e38, 3.4028235e38, -3.4028235e38, 1e-45, 1.17549435e-38, 1e-40, 65504.0]
    ties = (np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7F8000, 0x00008000, 0x80018000], np.uint32)).view(np.float32)
    anything = rng.integers(0, 1 << 32, 20000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([np.array(special, np.float32), ties, anything[~np.isnan(anything)]])
    wanted = torch.from_numpy(values).bfloat16()
    got = to_bytes(values, "BF16")
    assert got == wanted.view(torch.int16).numpy().astype("<i2").tobytes()
    assert from_bytes(got, "BF16").tobytes() == wanted.float().numpy().tobytes()
    nans = np.array([0x7FC00000, 0xFFFFFFFF, 0x7F800001, 0xFF800001], np.uint32).view(np.float32)
    assert np.isnan(from_bytes(to_bytes(nans, "BF16"), "BF16")).all()


def test_only_float32_is_written() -> None:
    with pytest.raises(ValueError, match="must be float32, got float64"):
        to_bytes(np.zeros(2), "F32")


@pytest.mark.parametrize(
    "tensors", [[("a", 8)], [("b", 8), ("a", 8)], [("a", 4), ("b", 8)], [("a", 8), ("b", 8), ("c", 8)], [("a", 8), ("a", 8)]]
)
def test_file_that_differs_from_what_was_announced_never_appears(tmp_path: Path, tensors: list[tuple[str, int]]) -> None:
    with pytest.raises(ValueError, match="tensor '"):
        write_tensor_file(tmp_path / "f", {"a": (2,), "b": (2,)}, "F32", ((n, bytes(k)) for n, k in tensors), {})
    assert list(tmp_path.iterdir()) == []


def test_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    old = write(tmp_path / "f").read_bytes()

    def broken() -> Any:
        yield "a", bytes(8)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_tensor_file(tmp_path / "f", {"a": (2,), "b": (2,)}, "F32", broken(), {})
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == old


# Refusing

GOOD: dict[str, Any] = {
    "__metadata__": {"k": "v"},
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [1, 1], "data_offsets": [8, 12]},
}


def with_entry(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "b": {**GOOD["b"], **changes}}


def test_the_good_header_is_good(tmp_path: Path) -> None:
    read = open_tensor_file(raw_file(tmp_path / "f", GOOD, bytes(12)))
    assert read.read("b").shape == (1, 1)
    write_tensor_file(tmp_path / "g", {"a": (2,), "b": (1, 1)}, "F32", [("a", bytes(8)), ("b", bytes(4))], {"k": "v"})
    assert (tmp_path / "f").read_bytes() == (tmp_path / "g").read_bytes()


@pytest.mark.parametrize(
    ("header", "rule"),
    [
        (with_entry(data_offsets=[9, 13]), "'b': data_offsets leave a hole"),
        (with_entry(data_offsets=[4, 8]), "'b': data_offsets leave a hole, overlap"),
        (with_entry(data_offsets=[8, 13]), "or do not fit the shape"),
        (with_entry(shape=[3]), "or do not fit the shape"),
        (with_entry(data_offsets=[12, 8]), "or do not fit the shape"),
        (with_entry(dtype="F64"), "'b': dtype must be one of F32, BF16"),
        (with_entry(dtype=["F32"]), "'b': dtype must be one of"),
        (with_entry(shape=[-1, -2]), "whole numbers, not negative"),
        (with_entry(shape=[1.0, 2]), "whole numbers"),
        (with_entry(shape=[True, 2]), "whole numbers"),
        (with_entry(shape="12"), "whole numbers"),
        (with_entry(shape=[1 << 60]), "whole numbers"),
        (with_entry(shape=[1] * 17), "whole numbers"),
        (with_entry(data_offsets=[8]), "whole numbers"),
        (with_entry(data_offsets=None), "whole numbers"),
        (with_entry(extra=1), "'b': must have dtype, shape and data_offsets"),
        ({**GOOD, "b": 7}, "'b': must have dtype, shape and data_offsets"),
        ({"b": {**GOOD["b"], "data_offsets": [0, 4]}, "a": {**GOOD["a"], "data_offsets": [4, 12]}}, "not in sorted order"),
        ({**GOOD, "__metadata__": {"k": 7}}, "__metadata__ is not text by text"),
        ({**GOOD, "__metadata__": None}, "__metadata__ is not text by text"),
        ([], "does not begin with {"),
        (b"", "does not begin with {"),
        (b'{"a": NaN}', "not UTF-8 JSON"),
        (b'{"a": 1, "a": 1}', "without repeated keys"),
        (b'{"__metadata__": {"k": "v", "k": "w"}}', "without repeated keys"),
        (b'{"\xff": 1}', "not UTF-8 JSON"),
        (b'{"a":' * 100_000, "not UTF-8 JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not UTF-8 JSON"),
        (b" " + json.dumps(GOOD).encode(), "does not begin with {"),
        (with_entry(dtype="BF16", shape=[1, 2]), "of more than one dtype: BF16, F32"),
        ({**GOOD, "__metadata__": {"k": "v", "j": "w"}}, "one way to write"),
        ({**GOOD, "__metadata__": {}}, "one way to write"),
        ({"a": GOOD["a"], "b": GOOD["b"], "__metadata__": GOOD["__metadata__"]}, "one way to write"),
        ({**GOOD, "a": dict(reversed(GOOD["a"].items()))}, "one way to write"),
        (json.dumps(GOOD).encode(), "one way to write"),
        (compact(GOOD).rstrip(), "one way to write"),
        (compact(GOOD) + b" " * 8, "one way to write"),
        (compact(GOOD).rstrip() + b"\n" * 5, "one way to write"),
        (compact(GOOD).replace(b"[0,8]", b"[-0,8]"), "one way to write"),
        (compact(GOOD).replace(b'"v"', rb'"\u0076"'), "one way to write"),
        (compact(GOOD).replace(b'"v"', rb'"\ud800"'), "not all Unicode"),
    ],
)
def test_broken_headers(tmp_path: Path, header: Any, rule: str) -> None:
    with pytest.raises(MalformedFile, match=rule):
        open_tensor_file(raw_file(tmp_path / "f", header, bytes(12)))


def test_length_must_be_exact(tmp_path: Path) -> None:
    for size, said in ((11, "has .* bytes where its header says"), (13, "has .* bytes where its header says")):
        with pytest.raises(MalformedFile, match=said):
            open_tensor_file(raw_file(tmp_path / "f", GOOD, bytes(size)))


@pytest.mark.parametrize("keep", [0, 7, 8, 20, -1])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "f")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MalformedFile):
        open_tensor_file(path)


def test_file_cut_after_opening(tmp_path: Path) -> None:
    path = write(tmp_path / "f")
    read = open_tensor_file(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(MalformedFile, match="the file ends inside it"):
        read.read_all()


def test_longer_header_than_the_reader_wants(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "f", GOOD, bytes(12))
    length = len(compact(GOOD))
    open_tensor_file(path, length)
    with pytest.raises(MalformedFile, match=f"the header of {length} bytes is over the limit of {length - 1}"):
        open_tensor_file(path, length - 1)


names = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.dictionaries(names, st.lists(st.integers(0, 3), max_size=3), max_size=4), metadata=st.dictionaries(names, names, max_size=3)
)
def test_whatever_is_written_is_read(tmp_path: Path, shapes: dict[str, list[int]], metadata: dict[str, str]) -> None:
    """Names and texts of any characters have one way to be written, and the reader takes it."""
    tensors = {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(shapes.items())}
    read = open_tensor_file(write(tmp_path / "f", "F32", tensors, metadata))
    assert dict(read.metadata) == metadata
    assert {n: a.tolist() for n, a in read.read_all().items()} == {n: a.tolist() for n, a in tensors.items()}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3))
def test_changed_bytes_before_the_tensors_give_another_content_or_none(tmp_path: Path, changes: list[tuple[float, int]]) -> None:
    path = raw_file(tmp_path / "f", GOOD, bytes(12))
    before = open_tensor_file(path)
    good = path.read_bytes()
    data = bytearray(good)
    for where, value in changes:
        data[int(where * (len(data) - 12))] = value
    path.write_bytes(data)
    try:
        after = open_tensor_file(path)
    except MalformedFile:
        return
    assert data == good or (after.metadata, after.entries) != (before.metadata, before.entries)
