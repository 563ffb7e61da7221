"""The update file: exact on the way, and every reason to refuse it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silotune.components.errors import SilotuneError
from silotune.components.federation import canonical_json
from silotune.components.keys import text_of, verify
from silotune.components.learning.tensor_file import to_bytes, write_tensor_file
from silotune.components.learning.update import (
    KEY,
    Codec,
    Expectation,
    Header,
    UpdateRefused,
    norm_matches,
    open_update,
    signed_bytes,
    write_update,
)
from silotune.components.terms.security import PublicKey

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
NORTH, SOUTH = (Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in (1, 2))
SIGNED = replace(EXPECTED, verify=lambda message, signature: verify([PublicKey(public=text_of(NORTH))], 3, message, signature))


def signing(key: Ed25519PrivateKey) -> Callable[[bytes], str]:
    return lambda message: base64.b64encode(key.sign(message)).decode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "update.safetensors"


def forge(path: Path, metadata: dict[str, Any] | str | None = None, tensors: dict[str, np.ndarray] = TENSORS, dtype: str = "F32") -> Path:
    """A well-made tensor file with any header of ours: what a faulty or hostile silo can send."""
    data = {n: to_bytes(a, dtype) for n, a in sorted(tensors.items())}
    digests = {n: hashlib.sha256(d).hexdigest() for n, d in data.items()}
    header = HEADER.model_dump() | {"tensors": digests, "norm": 1.0} | (metadata if isinstance(metadata, dict) else {})
    text = metadata if isinstance(metadata, str) else json.dumps(header, sort_keys=True, separators=(",", ":"))
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
        ({"cursor": 100}, f"its data cursor is 100, must be from 101 to {100 + 2**40}"),
        ({"cursor": -1}, "its data cursor is -1, must be from 101"),
        ({"cursor": 10**4000}, "its data cursor is 10000"),
        ({"loss": float("nan")}, "bad header: it is not JSON without repeated keys, NaN and Infinity"),
        ({"norm": float("inf")}, "bad header: it is not JSON"),
        ({"norm": float("nan")}, "bad header: it is not JSON"),
        ({"norm": -1.0}, "its norm is -1.0, must be positive"),
        ({"norm": 0.0}, "training changed nothing: its norm is 0"),
        ({"norm": -0.0}, "training changed nothing: its norm is 0"),
        ({"norm": 1}, "bad header: it is not byte for byte the one way to write its content"),
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
        ({"\x1b[2J\n": 1}, "bad header: ?[2J?: "),
    ],
)
def test_refused_header(path: Path, change: dict[str, Any], rule: str) -> None:
    with pytest.raises(UpdateRefused) as caught:
        open_update(forge(path, change), EXPECTED)
    assert caught.value.rule.startswith(rule)
    assert caught.value.silo == "north"  # whoever the file says it is from
    assert str(caught.value).startswith("silo 'north': update refused: ")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', "{}", "[" * 30000, '{"round":3,"round":3}', '{"examples":' + "9" * 30000 + "}"]
)
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


@pytest.mark.parametrize(
    "respelled",
    [
        lambda text: json.dumps(json.loads(text)),
        lambda text: text + " ",
        lambda text: text.replace("fed", "\\u0066ed", 1),
        lambda text: text.replace("1.25", "1.250"),
        lambda text: text.replace("1.25", "125e-2"),
    ],
)
def test_header_that_says_the_same_in_other_bytes(path: Path, respelled: Callable[[str], str]) -> None:
    text = canonical_json(write_update(path, HEADER, TENSORS).model_dump()).decode()
    assert json.loads(respelled(text)) == json.loads(text)
    with pytest.raises(UpdateRefused, match="bad header: it is not byte for byte the one way"):
        open_update(forge(path, respelled(text)), EXPECTED)


def test_header_with_a_number_beyond_all_numbers(path: Path) -> None:
    text = canonical_json(write_update(path, HEADER, TENSORS).model_dump()).decode()
    with pytest.raises(UpdateRefused, match="loss or norm is not finite"):
        open_update(forge(path, text.replace("1.25", "1e999")), EXPECTED)


def test_metadata_of_others_has_no_place(path: Path) -> None:
    text = canonical_json(HEADER.model_dump()).decode()
    write_tensor_file(path, {}, "F32", [], {KEY: text, "format": "pt"})
    with pytest.raises(UpdateRefused, match="its metadata must be 'silotune' and nothing else"):
        open_update(path, EXPECTED)


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
    assert path.stat().st_size <= expected.most_bytes < path.stat().st_size + 70000


# The norm

FLAT = np.concatenate([a.ravel() for a in TENSORS.values()]).astype(np.float64)


@pytest.mark.parametrize(("codec", "within", "beyond"), [("float32", 0.9e-6, 1.1e-6), ("bfloat16", 0.9e-2, 1.1e-2)])
def test_norm_may_be_off_by_rounding_only(codec: str, within: float, beyond: float) -> None:
    assert all(norm_matches(5.0 * (1 + x), 25.0, codec) for x in (0, within, -within))
    assert not any(norm_matches(5.0 * (1 + x), 25.0, codec) for x in (beyond, -beyond, 1, -1, -2, float("inf"), float("nan")))
    assert not any(norm_matches(x, squares, codec) for x in (0.0, 1.0, float("inf")) for squares in (0.0, float("inf"), float("nan")))


@pytest.mark.parametrize("codec", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norm_of_an_honest_update_matches(path: Path, codec: str, scale: float) -> None:
    tensors = {n: (a * scale).astype(np.float32) for n, a in TENSORS.items()}
    header = write_update(path, HEADER.model_copy(update={"codec": Codec(name=codec)}), tensors)
    squares = sum(float(np.square(a, dtype=np.float64).sum()) for _, a in open_update(path, replace(EXPECTED, codec=codec)).tensors())
    assert norm_matches(header.norm, squares, codec)


# Attacks on signed updates


def test_signed_update_is_accepted(path: Path) -> None:
    header = write_update(path, HEADER, TENSORS, signing(NORTH))
    assert signed_bytes(header) == b"silotune update 1\n" + canonical_json(header.model_dump() | {"signature": None})
    NORTH.public_key().verify(base64.b64decode(header.signature or ""), signed_bytes(header))
    update = open_update(path, SIGNED)
    assert update.header == header
    assert {n: a.tobytes() for n, a in update.tensors()} == {n: a.tobytes() for n, a in TENSORS.items()}


def test_same_signed_update_same_bytes(path: Path, tmp_path: Path) -> None:
    header = write_update(path, HEADER, TENSORS, signing(NORTH))
    write_update(tmp_path / "again", header, TENSORS, signing(NORTH))  # an old signature in the header is not signed over
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


def refused(path: Path, expected: Expectation = SIGNED) -> str:
    with pytest.raises(UpdateRefused) as caught:
        dict(open_update(path, expected).tensors())
    return str(caught.value).removeprefix("silo 'north': update refused: ")


@pytest.mark.parametrize(
    ("change", "key", "said"),
    [
        pytest.param({"round": 2, "incoming": "h" * 64, "plan": "o" * 64}, NORTH, "plan is 'oooo", id="replay of an old round's update"),
        pytest.param({"round": 2, "incoming": "h" * 64}, NORTH, "it answers round 2 and global hhhh", id="old global under the open plan"),
        pytest.param({"silo": "south"}, SOUTH, "silo is 'south', the plan's is 'north'; a silo sends its own", id="another silo's file"),
        pytest.param({"federation": "other"}, NORTH, "federation is 'other', the plan's is 'fed'", id="another federation's file"),
        pytest.param({"agreement": "x" * 64}, NORTH, "agreement is 'xxxx", id="trained on other terms"),
        pytest.param({"base": "x" * 64}, NORTH, "base is 'xxxx", id="trained on another base"),
        pytest.param({}, SOUTH, "its signature is not of silo north's key; register or rotate", id="signed anew with a wrong key"),
    ],
)
def test_true_file_out_of_its_place(path: Path, change: dict[str, Any], key: Ed25519PrivateKey, said: str) -> None:
    write_update(path, HEADER.model_copy(update=change), TENSORS, signing(key))
    assert refused(path).startswith(said)


def test_unsigned_file_in_a_signed_federation(path: Path) -> None:
    write_update(path, HEADER, TENSORS)
    assert refused(path) == "it bears no signature of silo north; register or rotate the silo's key with `silotune keys`"


def test_signed_file_in_a_federation_without_keys(path: Path) -> None:
    write_update(path, HEADER, TENSORS, signing(NORTH))
    assert refused(path, EXPECTED).startswith("it is signed, and the federation has no key to check it with; register")


@pytest.mark.parametrize("signature", ["", "é", "AAAA", "=" * 88, "A" * 88, "A" * 60000])
def test_signature_that_is_none(path: Path, signature: str) -> None:
    write_update(path, HEADER, TENSORS, lambda _: signature)
    assert refused(path).startswith("its signature is not of silo north's key; register")


@pytest.mark.parametrize("change", [{"examples": 41}, {"tokens": 901}, {"steps": 6}, {"cursor": 141}, {"loss": 1.24}, {"norm": 2.0}])
def test_header_changed_after_it_was_signed(path: Path, change: dict[str, Any]) -> None:
    header = write_update(path, HEADER, TENSORS, signing(NORTH))
    open_update(forge(path, header.model_dump()), SIGNED)
    assert refused(forge(path, header.model_dump() | change)).startswith("its signature is not of")


def test_tensors_exchanged_under_a_signed_header(path: Path) -> None:
    header = write_update(path, HEADER, TENSORS, signing(NORTH))
    twice = {n: 2 * a for n, a in TENSORS.items()}
    assert refused(forge(path, header.model_dump(), twice)).startswith("tensor 'm.lora_A' does not have the digest")
    digests = {n: hashlib.sha256(to_bytes(a, "F32")).hexdigest() for n, a in twice.items()}
    assert refused(forge(path, header.model_dump() | {"tensors": digests}, twice)).startswith("its signature is not of")


def test_bit_flipped_in_a_tensor(path: Path) -> None:
    write_update(path, HEADER, TENSORS, signing(NORTH))
    data = bytearray(path.read_bytes())
    data[-130] ^= 1
    path.write_bytes(data)
    assert refused(path).startswith("tensor 'm.lora_A' does not have the digest in the header")


def test_bit_flipped_in_the_header(path: Path) -> None:
    write_update(path, HEADER, TENSORS, signing(NORTH))
    data = path.read_bytes()
    path.write_bytes(data.replace(b'\\"tokens\\":900', b'\\"tokens\\":901'))
    assert path.read_bytes() != data
    assert refused(path).startswith("its signature is not of")


@pytest.mark.parametrize("keep", [0, 5, 100, -100, -1])
def test_truncated_upload(path: Path, keep: int) -> None:
    write_update(path, HEADER, TENSORS, signing(NORTH))
    path.write_bytes(path.read_bytes()[:keep])
    assert refused(path).startswith("not a tensor file: the file ")


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
