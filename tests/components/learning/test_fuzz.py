"""Hostile bytes: no changed file is accepted, every one is refused by a rule, and none costs more memory or time than its size is worth.

Signatures are real. Files are changed at random, but from seeds, so that a failure can be had again; the rules that refused are counted, so
that it shows whether the changes reach those that stand deep.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import signal
import struct
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silotune.components.federation import canonical_json
from silotune.components.keys import text_of, verify
from silotune.components.learning.tensor_file import MalformedFile, header_text, open_tensor_file
from silotune.components.learning.update import KEY, SIGNED, Codec, Expectation, Header, UpdateRefused, open_update, write_update
from silotune.components.terms.security import PublicKey

NORTH, SOUTH = (Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in (1, 2))
SHAPES = {"m.é.lora_A": (2, 6), "m.é.lora_B": (6, 2)}
HEADER = Header(
    federation="fed", agreement="a" * 64, round=3, silo="north", plan="p" * 64, base="b" * 64, incoming="i" * 64, examples=40, tokens=900,
    steps=5, cursor=140, loss=1.25, norm=0.0, codec=Codec(name="float32"), tensors={},
)  # fmt: skip
EXPECTED = Expectation(
    federation="fed", agreement="a" * 64, plan="p" * 64, base="b" * 64, accepted=((3, "i" * 64),), silo="north", cursor=100,
    codec="float32", schema={n: list(s) for n, s in SHAPES.items()},
    verify=lambda message, signature: verify([PublicKey(public=text_of(NORTH))], 3, message, signature),
)  # fmt: skip
SECONDS = 2.0  # for one file of 2 KiB; it takes a few tenths of a millisecond
Change = Callable[[random.Random, bytes], bytes]

# Every refusal must be one of these, and a run of a few thousand changes meets them all.
RULES = {
    "length": r"not a tensor file: the file of \d+ bytes is too short",
    "size": r"not a tensor file: the file has \d+ bytes where",
    "larger": r"it has \d+ bytes, more than",
    "begin": r"not a tensor file: the header does not begin",
    "json": r"not a tensor file: the header is not UTF-8 JSON",
    "entry": r"not a tensor file: tensor ['\"]",
    "order": r"not a tensor file: tensor names are not in sorted order",
    "spelling": r"not a tensor file: the header( is not byte for byte|'s texts)",
    "metadata": r"not a tensor file( of an update)?: (the header's __metadata__|its metadata)",
    "header": r"bad header: (?!it is not byte)",
    "header spelling": r"bad header: it is not byte for byte",
    "federation": r"federation is ",
    "agreement": r"agreement is ",
    "plan": r"plan is ",
    "base": r"base is ",
    "silo": r"silo is ",
    "round": r"it answers round ",
    "unsigned": r"it bears no signature",
    "signature": r"its signature is not",
    "codec": r"codec is ",
    "weight": r"(examples|tokens|steps) is ",
    "cursor": r"its data cursor is ",
    "norm": r"(training changed nothing|its norm is )",
    "not finite": r"loss or norm is not finite",
    "name": r"it has (no|an unknown) tensor ",
    "shape": r"tensor .* has shape",
    "dtype": r"(tensor .* is BF16|not a tensor file: its tensors are of more than one dtype)",
    "digests": r"the header's digests",
    "digest": r"tensor .* does not have the digest",
    "values": r"tensor .* is not finite",
}  # fmt: skip


def signing(key: Ed25519PrivateKey) -> Callable[[bytes], str]:
    return lambda message: base64.b64encode(key.sign(message)).decode()


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Ends what hangs."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refusal(path: Path) -> UpdateRefused | None:
    """What an update is refused with; None if it is accepted and all its tensors can be read."""
    try:
        for _ in open_update(path, EXPECTED).tensors():
            pass
    except UpdateRefused as error:
        return error
    return None


class Bench:
    """One true file, true files that belong elsewhere, and a count of what refused the rest."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "update.safetensors"
        self.good = self.make(1)
        self.others = [
            self.make(2, round=2, incoming="h" * 64),  # another round's
            self.make(3, plan="o" * 64, round=2, incoming="h" * 64),
            self.make(4, SOUTH, silo="south"),
            self.make(5, federation="other"),
            self.make(6, agreement="x" * 64),
            self.make(7, base="x" * 64),
            self.make(8, SOUTH),  # signed by a wrong key
            self.make(9, None),  # unsigned
            self.make(10, codec=Codec(name="bfloat16")),
        ]
        self.refusals: Counter[str] = Counter()

    def make(self, seed: int, key: Ed25519PrivateKey | None = NORTH, **changes: Any) -> bytes:
        write_update(self.path, HEADER.model_copy(update=changes), arrays(seed), signing(key) if key else None)
        return self.path.read_bytes()

    def judge(self, data: bytes) -> str | None:
        """The rule that refuses a file, by its short name; None if it is accepted and all its tensors can be read."""
        self.path.unlink()  # or a file system waits for the disk before it writes over a file
        self.path.write_bytes(data)
        with within(SECONDS):
            error = refusal(self.path)
        if error is None:
            return None
        assert error.silo == "north"
        assert str(error).isprintable()
        found = [name for name, pattern in RULES.items() if re.match(pattern, error.rule)]
        assert found, error.rule
        return found[0]

    def try_out(self, data: bytes) -> None:
        rule = self.judge(data)
        assert (rule is None) == (data == self.good), f"accepted: {data!r}" if rule is None else f"the true file is refused: {rule}"
        self.refusals[rule or "accepted"] += 1


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


# Changes of bytes


def place(rng: random.Random, data: bytes) -> int:
    return rng.randrange(len(data) + 1)


def stretch(rng: random.Random, data: bytes) -> tuple[int, int]:
    """Where a block begins and ends; mostly a short one."""
    start = place(rng, data)
    return start, min(len(data), start + rng.choice([1, 1, 2, 4, 8, 16, rng.randrange(1, len(data))]))


def flipped(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwritten(rng: random.Random, data: bytes) -> bytes:
    start, end = stretch(rng, data)
    fill = rng.choice([bytes(end - start), b"\xff" * (end - start), b" " * (end - start), rng.randbytes(end - start)])
    return data[:start] + fill + data[end:]


def swapped(rng: random.Random, data: bytes) -> bytes:
    size = rng.choice([1, 2, 4, 8, 48])
    first = rng.randrange(len(data) - 2 * size)
    second = rng.randrange(first + size, len(data) - size)
    a, b = data[first : first + size], data[second : second + size]
    return data[:first] + b + data[first + size : second] + a + data[second + size :]


def inserted(rng: random.Random, data: bytes) -> bytes:
    at = place(rng, data)
    return data[:at] + rng.choice([b" ", b"\0", b'"', b"}", b"0", b"\\", rng.randbytes(rng.randrange(1, 9)), bytes(8)]) + data[at:]


def deleted(rng: random.Random, data: bytes) -> bytes:
    start, end = stretch(rng, data)
    return data[:start] + data[end:]


def truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice([rng.randrange(len(data)), len(data) - rng.randrange(1, 9)])]


def extended(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice([b"\0", b" " * 8, data, rng.randbytes(rng.randrange(1, 64)), bytes(70_000)])


def block_copied(rng: random.Random, data: bytes) -> bytes:
    start, end = stretch(rng, data)
    at = place(rng, data)
    over = rng.choice([0, end - start])
    return data[:at] + data[start:end] + data[at + over :]


def length_changed(rng: random.Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    return (
        struct.pack("<Q", rng.choice([length + rng.randrange(-16, 17), rng.randrange(1 << 64), 0, 1 << 63, len(data) - 8]) % 2**64)
        + data[8:]
    )


BYTE_CHANGES: list[Change] = [
    flipped, overwritten, swapped, inserted, deleted, truncated, extended, block_copied, length_changed
]  # fmt: skip


# Changes of content, written anew as a well-made file


def parts(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Header of the container, header of the update, and the rest."""
    end = 8 + int.from_bytes(data[:8], "little")
    outer = json.loads(data[8:end])
    return outer, json.loads(outer["__metadata__"][KEY]), data[end:]


def joined(outer: dict[str, Any], inner: dict[str, Any] | str, body: bytes) -> bytes:
    text = inner if isinstance(inner, str) else json.dumps(inner, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    outer = {**outer, "__metadata__": {**outer.get("__metadata__", {}), KEY: text}}
    header = json.dumps(outer, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + body


def sign_anew(inner: dict[str, Any], key: Ed25519PrivateKey) -> None:
    inner["signature"] = signing(key)(SIGNED + canonical_json(inner | {"signature": None}))


ODD = [0, -1, 1, 2, 41, 2**53, 10**30, 0.0, -0.0, 1.5, 1e308, True, None, "", "3", "x" * 64, "\u202e\x1b[2J", [], {}, {"name": "int8"}]


def field_edited(rng: random.Random, data: bytes) -> bytes:
    """One field of the header, under the old signature, none, or a wrong key's."""
    outer, inner, body = parts(data)
    name = rng.choice([*inner, "extra"])
    if rng.random() < 0.1:
        inner.pop(name, None)
    else:
        inner[name] = rng.choice([*ODD, float("nan"), float("-inf")])
    if rng.random() < 0.2:
        inner["signature"] = rng.choice([None, "", "A" * 88, str(inner.get("signature"))[::-1]])
    elif rng.random() < 0.2 and not any(isinstance(v, float) and v - v != 0 for v in inner.values()):
        sign_anew(inner, SOUTH)
    return joined(outer, inner, body)


def told_wrongly(rng: random.Random, data: bytes) -> bytes:
    """What a silo may sign with its own true key, and must still be refused for."""
    outer, inner, body = parts(data)
    name = rng.choice(sorted(inner["tensors"]))
    wrongs: list[dict[str, Any]] = [
        {"examples": 0}, {"tokens": -1}, {"steps": 2**50}, {"cursor": 100}, {"cursor": 10**20}, {"norm": 0.0}, {"norm": -1.0},
        {"codec": {"name": "bfloat16"}}, {"tensors": inner["tensors"] | {name: "0" * 64}}, {"tensors": {name: inner["tensors"][name]}},
        {"round": 4}, {"silo": "south"}, {"federation": "other"}, {"base": "c" * 64},
    ]  # fmt: skip
    inner |= rng.choice(wrongs)
    sign_anew(inner, NORTH)
    return joined(outer, inner, body)


def tensors_changed(rng: random.Random, data: bytes) -> bytes:
    """Other tensors than the plan's, with true digests and a true signature."""
    _, inner, body = parts(data)
    shapes: dict[str, tuple[int, ...]] = dict(SHAPES)
    dtype, name = "F32", rng.choice(sorted(SHAPES))
    kind = rng.randrange(5)
    if kind == 0:
        shapes[name] = rng.choice([shapes[name][::-1], (12,), (1, 12), (12, 1, 1)])
    elif kind == 1:
        shapes[name + "x"] = shapes.pop(name)
    elif kind == 2:
        del shapes[name]
        body = body[: len(body) // 2]
    elif kind == 3:
        dtype, body = "BF16", body[: len(body) // 2]
    else:
        at = 4 * rng.randrange(len(body) // 4)
        body = body[:at] + rng.choice([b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\1\0\xc0\x7f"]) + body[at + 4 :]
    width = len(body) // len(shapes)
    inner["tensors"] = {n: hashlib.sha256(body[i * width : (i + 1) * width]).hexdigest() for i, n in enumerate(sorted(shapes))}
    sign_anew(inner, NORTH)
    text = header_text(shapes, dtype, {KEY: canonical_json(inner).decode()})
    return struct.pack("<Q", len(text)) + text + body


def container_edited(rng: random.Random, data: bytes) -> bytes:
    """The safetensors header around a true update header: names, shapes, dtypes, offsets, order, further texts, other spelling."""
    outer, inner, body = parts(data)
    name = rng.choice(sorted(SHAPES))
    kind = rng.randrange(8)
    if kind == 0:
        outer[name]["shape"] = rng.choice([[], [12, 1], [2, 6, 1], [10**9, 10**5], [-2, -6], "12", [2.0, 6], [1] * 40])
    elif kind == 1:
        outer[name]["dtype"] = rng.choice(["BF16", "F64", "", None, ["F32"]])
    elif kind == 2:
        outer[name]["data_offsets"] = rng.choice([[0, 0], [48, 0], [0, 10**11], [48, 96], [0, 48], [0], None, [1, 49]])
    elif kind == 3:
        outer[name + rng.choice(["x", "\0", "é"])] = outer.pop(name)
    elif kind == 4:
        outer = dict(rng.sample(sorted(outer.items()), len(outer)))
    elif kind == 5:
        outer["__metadata__"][rng.choice(["format", "a", "z"])] = rng.choice(["pt", "", 7])
    elif kind == 6:
        outer[name][rng.choice(["extra", "shape"])] = rng.choice([1, None])
    else:
        end = 8 + int.from_bytes(data[:8], "little")
        text = rng.choice(
            [lambda: json.dumps(outer), lambda: json.dumps(outer, indent=1), lambda: data[8:end].decode() + " " * 8]
        )().encode()
        return struct.pack("<Q", len(text)) + text + body
    return joined(outer, inner, body)


def inner_respelled(rng: random.Random, data: bytes) -> bytes:
    """The same header of the update in other JSON, or in none."""
    outer, inner, body = parts(data)
    text = canonical_json(inner).decode()
    at = rng.randrange(len(text))
    spellings = [
        json.dumps(inner), json.dumps(inner, indent=1), text + " ", "\ufeff" + text, text.replace("fed", "\\u0066ed", 1), text[:at],
        text.replace('"steps":5', '"steps":5,"steps":5'), text.replace('"steps":5', '"steps":5.0'), text.replace("1.25", rng.choice(["125e-2", "1e999"])),
        text[:at] + rng.choice('"{}[],:0\\') + text[at:], "[" * 5000, '{"a":' * 5000, "9" * 5000, text.replace("fed", "\\ud800", 1),
    ]  # fmt: skip
    return joined(outer, rng.choice(spellings), body)


CONTENT_CHANGES: list[Change] = [field_edited, told_wrongly, tensors_changed, container_edited, inner_respelled]


def spliced(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Two true files made into one."""
    outer, inner, body = parts(data)
    their_outer, their_inner, their_body = parts(other)
    at = place(rng, data)
    keys = rng.sample(sorted(inner), rng.randrange(1, len(inner)))
    return rng.choice([
        lambda: data[:at] + other[at:], lambda: other[:at] + data[at:], lambda: data[:at] + other[place(rng, other) :],
        lambda: joined(outer, inner, their_body), lambda: joined(their_outer, their_inner, body), lambda: other, lambda: data + other,
        lambda: joined(outer, inner | {k: their_inner[k] for k in keys}, body), lambda: joined(outer, their_inner, body),
        lambda: joined(outer, inner, body[:48] + their_body[48:]),
    ])()  # fmt: skip


def change_at_random(bench: Bench, rng: random.Random, count: int) -> None:
    for _ in range(count):
        kind = rng.random()
        if kind < 0.5:
            data = rng.choice(BYTE_CHANGES)(rng, bench.good)
        elif kind < 0.8:
            data = rng.choice(CONTENT_CHANGES)(rng, bench.good)
        elif kind < 0.95:
            data = spliced(rng, bench.good, rng.choice(bench.others))
        else:  # changes upon changes
            data = rng.choice(BYTE_CHANGES)(rng, rng.choice(CONTENT_CHANGES)(rng, bench.good))
        bench.try_out(data)


# The runs


def test_true_file_is_accepted_and_each_that_belongs_elsewhere_refused(bench: Bench) -> None:
    assert bench.judge(bench.good) is None
    assert [bench.judge(other) for other in bench.others] == [
        "round", "plan", "silo", "federation", "agreement", "base", "signature", "unsigned", "codec"
    ]  # fmt: skip


def test_every_byte_counts(bench: Bench) -> None:
    """Each byte in turn: changed, taken away, doubled, preceded by a space; and the file cut there."""
    rng = random.Random(7)
    good = bench.good
    for at in range(len(good)):
        bench.try_out(good[:at] + bytes([good[at] ^ rng.randrange(1, 256)]) + good[at + 1 :])
        bench.try_out(good[:at] + good[at + 1 :])
        bench.try_out(good[:at] + b" " + good[at:])
        bench.try_out(good[: at + 1] + good[at:])
        bench.try_out(good[:at])
    assert not bench.refusals["accepted"]
    assert bench.refusals["signature"] > 50
    assert bench.refusals["digest"] == 96  # one byte in 96 of tensors


def test_thousands_of_changed_files(bench: Bench) -> None:
    change_at_random(bench, random.Random(11), 6000)
    print(dict(bench.refusals.most_common()))
    assert bench.refusals.keys() - {"accepted"} == RULES.keys()
    assert bench.refusals["accepted"] < 100  # changes that changed nothing


@pytest.mark.slow
def test_every_bit_of_every_byte_and_every_character_of_json_in_its_place(bench: Bench) -> None:
    good = bench.good
    for at in range(len(good)):
        values = {good[at] ^ 1 << bit for bit in range(8)} | set(b'{}[]":,\\ 0123456789-+.eEu')
        for value in values - {good[at]}:
            bench.try_out(good[:at] + bytes([value]) + good[at + 1 :])
    assert not bench.refusals["accepted"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_hundred_thousand_changed_files(bench: Bench, seed: int) -> None:
    change_at_random(bench, random.Random(100 + seed), 30_000)
    print(dict(bench.refusals.most_common()))
    assert bench.refusals.keys() - {"accepted"} == RULES.keys()
    assert all(count >= 10 for count in bench.refusals.values())


# Memory and time


def peak_of(work: Callable[[], None]) -> int:
    """Bytes that Python and numpy allocate at most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refuse(path: Path, said: str, by_update: bool = True) -> int:
    """Peak of memory while a file is refused."""

    def work() -> None:
        with within(SECONDS), pytest.raises(UpdateRefused if by_update else MalformedFile, match=said):
            list(open_update(path, EXPECTED).tensors()) if by_update else open_tensor_file(path)

    return peak_of(work)


@pytest.mark.parametrize("by_update", [True, False])
@pytest.mark.parametrize("length", [10**11, 1 << 62, 2**64 - 1, (64 << 20) + 1])
@pytest.mark.parametrize("size", [100, 70 << 20, 10**11 + 100])
def test_header_that_claims_to_be_huge(tmp_path: Path, length: int, size: int, by_update: bool) -> None:
    path = tmp_path / "f"
    path.write_bytes(struct.pack("<Q", length) + b'{"a":')
    with path.open("r+b") as file:
        file.truncate(size)  # sparse: takes no room
    said = "more than the" if by_update and size > EXPECTED.most_bytes else "too short for its header|over the limit of"
    assert refuse(path, said, by_update) < 1 << 20


@pytest.mark.parametrize("by_update", [True, False])
@pytest.mark.parametrize("really", [False, True])
def test_tensor_that_claims_to_be_huge(tmp_path: Path, really: bool, by_update: bool) -> None:
    text = header_text({"m.é.lora_A": [25 * 10**9]}, "F32", {KEY: "{}"})
    path = tmp_path / "f"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    if really:
        with path.open("r+b") as file:
            file.truncate(8 + len(text) + 10**11)
        if not by_update:
            assert peak_of(lambda: open_tensor_file(path) and None) < 1 << 20  # it is what it says; nothing of it is read
            return
    assert refuse(path, "more than the" if really else "where its header says", by_update) < 1 << 20


BOMBS = {
    "deep lists": b"[" * 60_000,
    "deep objects": b'{"a":' * 12_000,
    "closed deep lists": b"[" * 30_000 + b"]" * 30_000,
    "huge whole number": b'{"a":' + b"9" * 60_000 + b"}",
    "huge exponent": b'{"a":1e' + b"9" * 60_000 + b"}",
    "long text": b'{"a":"' + b"x" * 60_000 + b'"}',
    "repeated key": b"{" + b'"a":1,' * 10_000 + b'"a":1}',
    "many keys": b"{" + b",".join(b'"%d":{}' % i for i in range(6000)) + b"}",
    "many lists": b'{"a":[' + b",".join([b"[]"] * 20_000) + b"]}",
    "escapes": b'{"a":"' + b"\\u0041" * 10_000 + b'"}',
    "half characters": b'{"__metadata__":{"silotune":"' + b"\\ud800" * 10_000 + b'"}}',
    "half a text": b'{"' + b"\\" * 60_001,
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_bomb_of_json(tmp_path: Path, bomb: bytes, inside: bool) -> None:
    """As the header of the container, and as the text that it holds."""
    path = tmp_path / "f"
    text = header_text({}, "F32", {KEY: bomb.decode()}) if inside else bomb
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    assert path.stat().st_size < EXPECTED.most_bytes or inside
    assert refuse(path, "update refused") < 4 * path.stat().st_size + (4 << 20)


def test_larger_bombs_are_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "f"
    text = b'{"a":' + b"9" * 10_000_000 + b"}"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    began = time.monotonic()
    assert refuse(path, "it has 10000014 bytes, more than the") < 1 << 20
    assert time.monotonic() - began < 0.5


def test_header_may_not_take_the_room_of_the_tensors(tmp_path: Path) -> None:
    """A file of honest size that is one huge header."""
    path = tmp_path / "f"
    text = b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    expected = replace(EXPECTED, schema={"a": [4000, 1000]})
    assert path.stat().st_size < expected.most_bytes

    def work() -> None:
        with pytest.raises(UpdateRefused, match="the header of 15000010 bytes is over the limit of"):
            open_update(path, expected)

    assert peak_of(work) < 1 << 20
