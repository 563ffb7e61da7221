"""The update file: exact on the way, and every reason to refuse it."""

from __future__ import annotations

import hashlib
import json
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silotune.components.errors import SilotuneError
from silotune.components.learning.tensor_file import to_bytes, write_tensor_file
from silotune.components.learning.update import KEY, Codec, Expectation, Header, UpdateRefused, open_update, write_update

rng = np.random.default_rng(8)
TENSORS = {"m.lora_A": rng.standard_normal((4, 8)).astype(np.float32), "m.lora_B": (rng.standard_normal((8, 4)) * 1e-4).astype(np.float32)}
HEADER = Header(
    federation="fed", agreement="a" * 64, round=3, silo="north", plan="p" * 64, base="b" * 64, incoming="i" * 64, examples=40, tokens=900,
    steps=5, cursor=140, loss=1.25, norm=0.0, codec=Codec(name="float32"), tensors={},
)  # fmt: skip
EXPECTED = Expectation(
    federation="fed", agreement="a" * 64, plan="p" * 64, base="b" * 64, accepted=((3, "i" * 64), (2, "j" * 64)), silo="north", cursor=100,
    codec="float32", schema={n: list(a.shape) for n, a in TENSORS.items()},
)  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "update.safetensors"


def forge(path: Path, metadata: dict[str, Any] | str | None = None, tensors: dict[str, np.ndarray] = TENSORS, dtype: str = "F32") -> Path:
    """A well-made tensor file with any header of ours: what a faulty or hostile silo can send."""
    data = {n: to_bytes(a, dtype) for n, a in sorted(tensors.items())}
    digests = {n: hashlib.sha256(d).hexdigest() for n, d in data.items()}
    header = HEADER.model_dump() | {"tensors": digests} | (metadata if isinstance(metadata, dict) else {})
    text = metadata if isinstance(metadata, str) else json.dumps(header)
    write_tensor_file(path, {n: a.shape for n, a in tensors.items()}, dtype, iter(data.items()), {KEY: text})
    return path


# There and back


def test_float32_arrives_bit_by_bit(path: Path) -> None:
    written = write_update(path, HEADER, TENSORS)
    update = open_update(path, EXPECTED)
    assert update.header == written
    got = dict(update.tensors())
    assert list(got) == sorted(TENSORS)
    assert all(got[n].tobytes() == a.tobytes() and got[n].shape == a.shape for n, a in TENSORS.items())


def test_bfloat16_arrives_to_eight_bits_in_half_the_bytes(path: Path, tmp_path: Path) -> None:
    write_update(path, HEADER.model_copy(update={"codec": Codec(name="bfloat16")}), TENSORS)
    got = dict(open_update(path, replace(EXPECTED, codec="bfloat16")).tensors())
    for name, array in TENSORS.items():
        assert (np.abs(got[name] - array) <= 2**-8 * np.abs(array)).all()
        assert (got[name] != array).any()
    write_update(tmp_path / "wide", HEADER, TENSORS)
    halved = 2 * sum(a.size for a in TENSORS.values())
    assert (tmp_path / "wide").stat().st_size - path.stat().st_size == pytest.approx(halved, abs=16)


def test_header_says_norm_and_digests(path: Path) -> None:
    header = write_update(path, HEADER.model_copy(update={"norm": 99.0, "tensors": {"x": "y"}}), TENSORS)
    flat = np.concatenate([a.ravel() for a in TENSORS.values()]).astype(np.float64)
    assert header.norm == pytest.approx(float(np.linalg.norm(flat)), rel=1e-12)
    assert header.tensors == {n: hashlib.sha256(a.astype("<f4").tobytes()).hexdigest() for n, a in TENSORS.items()}
    assert header.signature is None


def test_safetensors_opens_it_and_the_header_is_one_json_text(path: Path) -> None:
    from safetensors import safe_open

    header = write_update(path, HEADER, TENSORS)
    with safe_open(path, "np") as file:
        assert list(file.metadata()) == ["silotune"]
        assert json.loads(file.metadata()["silotune"]) == header.model_dump()
        assert all((file.get_tensor(n) == a).all() for n, a in TENSORS.items())


def test_same_update_same_bytes(path: Path, tmp_path: Path) -> None:
    write_update(path, HEADER, TENSORS)
    write_update(tmp_path / "again", HEADER, dict(reversed(TENSORS.items())))
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


@pytest.mark.parametrize(("bad", "codec"), [(np.nan, "float32"), (np.inf, "float32"), (np.nan, "bfloat16"), (3.4e38, "bfloat16")])
def test_what_is_not_finite_is_not_written(path: Path, bad: float, codec: str) -> None:
    array = TENSORS["m.lora_A"].copy()
    array[1, 2] = bad
    with pytest.raises(SilotuneError, match=r"tensor 'm\.lora_A' of the update is not finite"):
        write_update(path, HEADER.model_copy(update={"codec": Codec(name=codec)}), {**TENSORS, "m.lora_A": array})
    assert not path.exists()


def test_any_accepted_pair_of_round_and_global_will_do(path: Path) -> None:
    open_update(forge(path, {"round": 2, "incoming": "j" * 64}), EXPECTED)


# Refused by the header


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"federation": "other"}, "federation is 'other', the plan's is 'fed'"),
        ({"agreement": "x" * 64}, "agreement is 'xxxxxxxxxxxxxxxx'"),
        ({"plan": "x" * 64}, "plan is 'x"),
        ({"base": "x" * 64}, "base is 'x"),
        ({"silo": "south"}, "silo is 'south', the plan's is 'north'"),
        ({"round": 2}, "it answers round 2 and global iiiiiiiiiiii"),
        ({"round": 4}, "it answers round 4"),
        ({"incoming": "j" * 64}, "it answers round 3 and global jjjjjjjjjjjj"),
        ({"codec": {"name": "bfloat16"}}, "codec is 'bfloat16', the agreement's is 'float32'"),
        ({"examples": 0}, "examples is 0"),
        ({"examples": -5}, "examples is -5"),
        ({"tokens": 0}, "tokens is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"examples": 10**15}, "examples is 1000000000000000, must be from 1 to"),
        ({"tokens": 10**30}, "tokens is 10"),
        ({"cursor": 100}, "its data cursor 100 is not past 100"),
        ({"cursor": -1}, "its data cursor -1 is not past 100"),
        ({"loss": float("nan")}, "loss or norm is not finite"),
        ({"norm": float("inf")}, "loss or norm is not finite"),
        ({"norm": -1.0}, "loss or norm is not finite"),
        ({"tensors": {}}, "the header's digests are not of these tensors"),
        ({"tensors": {"m.lora_A": "x", "other": "y"}}, "the header's digests are not of these tensors"),
        ({"format": 2}, "bad header: format"),
        ({"round": 0}, "bad header: round"),
        ({"round": "3"}, "bad header: round"),
        ({"examples": 40.0}, "bad header: examples"),
        ({"examples": True}, "bad header: examples"),
        ({"examples": None}, "bad header: examples"),
        ({"codec": {"name": "int4"}}, "bad header: codec.name"),
        ({"extra": 1}, "bad header: extra"),
    ],
)
def test_refused_header(path: Path, change: dict[str, Any], rule: str) -> None:
    with pytest.raises(UpdateRefused) as caught:
        open_update(forge(path, change), EXPECTED)
    assert caught.value.rule.startswith(rule)
    assert caught.value.silo == "north"  # whoever the file says it is from
    assert str(caught.value).startswith("silo 'north': update refused: ")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "{}"])
def test_header_that_is_none(path: Path, text: str) -> None:
    with pytest.raises(UpdateRefused, match="bad header"):
        open_update(forge(path, text), EXPECTED)


@pytest.mark.parametrize(
    ("tensors", "rule"),
    [
        ({"m.lora_A": TENSORS["m.lora_A"]}, r"it has no tensor 'm.lora_B' \(1 of 2 names match\)"),
        ({**TENSORS, "m.extra": np.zeros(2, np.float32)}, r"it has an unknown tensor 'm.extra' \(2 of 2 names match\)"),
        ({**TENSORS, "m.lora_A": TENSORS["m.lora_A"].T.copy()}, r"tensor 'm.lora_A' has shape \[8, 4\], must have \[4, 8\]"),
        ({**TENSORS, "m.lora_A": TENSORS["m.lora_A"].ravel()}, r"tensor 'm.lora_A' has shape \[32\], must have \[4, 8\]"),
        ({}, "it has no tensor 'm.lora_A'"),
    ],
)
def test_refused_tensors(path: Path, tensors: dict[str, np.ndarray], rule: str) -> None:
    with pytest.raises(UpdateRefused, match=rule):
        open_update(forge(path, None, tensors), EXPECTED)


def test_number_format_other_than_the_codec_says(path: Path) -> None:
    with pytest.raises(UpdateRefused, match=r"tensor 'm\.lora_A' is BF16, codec 'float32' writes F32"):
        open_update(forge(path, dtype="BF16"), EXPECTED)


def test_long_names_do_not_make_long_reports(path: Path) -> None:
    """A rule goes into the commit and onto screens; a silo must not fill them."""
    with pytest.raises(UpdateRefused) as caught:
        open_update(forge(path, {"k" * 20000: 1}), EXPECTED)
    assert len(caught.value.rule) <= 300


def test_not_a_tensor_file(path: Path) -> None:
    path.write_bytes(b"\x80\x04\x95pickle" + bytes(50))
    with pytest.raises(UpdateRefused, match=r"not a tensor file: the file of .* bytes is too short"):
        open_update(path, EXPECTED)


def test_bound_on_bytes_admits_every_honest_file(path: Path) -> None:
    schema = {f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight": [1] for i in range(300)}
    tensors = {n: np.ones(1, np.float32) for n in schema}
    write_update(path, HEADER, tensors)
    expected = replace(EXPECTED, schema=schema)
    open_update(path, expected)
    assert path.stat().st_size <= expected.most_bytes < 4 * path.stat().st_size + 65536


def peak_of(work: Callable[[], None]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("really", [False, True])
def test_a_hundred_gigabytes_are_refused_without_being_read(path: Path, really: bool) -> None:
    header = {"__metadata__": {KEY: "{}"}, "m.lora_A": {"dtype": "F32", "shape": [25 * 10**9], "data_offsets": [0, 10**11]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    if really:
        with path.open("r+b") as file:
            file.truncate(8 + len(text) + 10**11)  # sparse

    def refuse() -> None:
        with pytest.raises(UpdateRefused, match="more than the" if really else "where its header says"):
            open_update(path, EXPECTED)

    assert peak_of(refuse) < 1 << 20


# Refused while being read


def test_changed_tensor_byte_is_found_in_its_tensor(path: Path) -> None:
    write_update(path, HEADER, TENSORS)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    update = open_update(path, EXPECTED)
    assert (update.tensor("m.lora_A") == TENSORS["m.lora_A"]).all()
    with pytest.raises(UpdateRefused, match=r"tensor 'm\.lora_B' does not have the digest in the header"):
        update.tensor("m.lora_B")
    with pytest.raises(UpdateRefused):
        list(update.tensors())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_tensor_that_is_not_finite(path: Path, bad: float, dtype: str) -> None:
    array = TENSORS["m.lora_B"].copy()
    array[7, 3] = bad
    codec = {"F32": "float32", "BF16": "bfloat16"}[dtype]
    forge(path, {"codec": {"name": codec}}, {**TENSORS, "m.lora_B": array}, dtype)
    update = open_update(path, replace(EXPECTED, codec=codec))
    with pytest.raises(UpdateRefused, match=r"tensor 'm\.lora_B' is not finite"):
        update.tensor("m.lora_B")


def test_file_cut_after_it_was_accepted(path: Path) -> None:
    write_update(path, HEADER, TENSORS)
    update = open_update(path, EXPECTED)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UpdateRefused, match=r"tensor 'm\.lora_B'"):
        update.tensor("m.lora_B")
