"""The update file: what one silo sends after one round.

One tensor file (see `tensor_file`) that holds the *difference* that local training made to every trainable tensor. Byte by byte:

    8 bytes    length of the header, unsigned little-endian
    header     JSON; ``__metadata__`` holds one key, ``silotune``, whose value is the canonical JSON text of `Header` (sorted keys, no
               spaces, UTF-8, no NaN):
                 format       1
                 federation, agreement, round, silo, plan, base, incoming     what this update answers, all by digest
                 examples, tokens, steps, cursor, loss, norm                  what training has seen; of a private training how many
                                                                              examples were expected, the same for tokens, and null
                 codec        {"name": "float32" | "bfloat16"}
                 tensors      name -> SHA-256 of the tensor's bytes as they stand in the file, in hexadecimal
                 signature    text; null in federations without keys
    tensors    sorted by name, F32 or BF16 as the codec says, no holes

``norm`` is the L2 norm over all tensors before the codec rounds them. The signature is made over the bytes

    b"silotune update 1\\n" + the same canonical JSON with ``"signature":null``

by a function that the caller gives (Ed25519, base64), so that the learning core needs no cryptography. It covers the header, the header's
digests cover the tensors, and both have one way to be written: no byte of a signed file can be changed, added or taken away unnoticed, and
no file can stand in for another silo's, round's, base's or federation's.

`open_update` refuses from the header alone whatever does not answer the plan; `Update.tensors` then verifies each tensor's digest and
finiteness as it is read. A refusal names silo, tensor, rule and cure.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError

from silotune.components.errors import RefusedError, SilotuneError
from silotune.components.federation import canonical_json
from silotune.components.learning.blob import Blob, FileBlob
from silotune.components.learning.tensor_file import (
    WIDTH,
    MalformedFile,
    TensorFile,
    from_bytes,
    header_text,
    open_tensor_file,
    strict_json,
    to_bytes,
    write_tensor_file,
)
from silotune.components.terms.section import Section

KEY = "silotune"
DTYPE = {"float32": "F32", "bfloat16": "BF16"}
WEIGHT_LIMIT = 1 << 40  # examples or tokens; more than any silo can have seen in a round
RULE_LIMIT = 300  # characters
PART = 1 << 17  # numbers squared at a time
HEADER_SLACK = 1 << 16  # bytes beyond the names, digests and shapes: numbers, signature, and what a refusal is to name instead of a size
SIGNED = b"silotune update 1\n"
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2}  # relative; bfloat16 rounds every number by up to 2^-9 after the norm was taken


class UpdateRefused(RefusedError):
    """An update that must not be averaged. ``rule`` is short and fit for a report."""

    def __init__(self, silo: str, rule: str, cure: str) -> None:
        # Names in it are of the silo's choosing: they must neither fill screens and commits nor steer terminals.
        rule = "".join(c if c.isprintable() else "?" for c in rule[: RULE_LIMIT + 1])
        rule = rule if len(rule) <= RULE_LIMIT else f"{rule[: RULE_LIMIT - 1]}…"
        super().__init__(f"silo {silo!r}: update refused: {rule}; {cure}", rule)
        self.silo = silo
        self.rule = rule


class Codec(Section):
    """How tensors are written."""

    name: Literal["float32", "bfloat16"]


class Header(Section):
    """Everything about an update but its tensors."""

    format: Literal[1] = 1
    federation: str
    agreement: str
    round: int = Field(ge=1)
    silo: str
    plan: str
    base: str
    incoming: str
    examples: int
    tokens: int
    steps: int
    cursor: int
    loss: float | None
    norm: float
    codec: Codec
    tensors: dict[str, str]
    signature: str | None = None


def signed_bytes(header: Header) -> bytes:
    """What a silo signs: everything in the header but the signature.

    Raises:
        ValueError: loss or norm is not finite.
    """
    return SIGNED + canonical_json(header.model_dump() | {"signature": None})


def norm_matches(header_norm: float, squares: float, codec: str) -> bool:
    """Whether a header tells the true norm of its tensors.

    Args:
        squares: sum of the squares of all numbers, as the file holds them.
        codec: says how much rounding has moved the norm at most: 1e-6 of it for float32 (order of summation), 1e-2 for bfloat16.
    """
    if not 0 < squares < math.inf:
        return False
    norm = math.sqrt(squares)
    return abs(header_norm - norm) <= TOLERANCE[codec] * norm


def sum_of_squares(array: np.ndarray) -> float:
    """In float64, in parts, so that no copy of all is made."""
    flat = array.reshape(-1)
    return math.fsum(float(np.square(flat[at : at + PART], dtype=np.float64).sum()) for at in range(0, flat.size, PART))


@dataclass(frozen=True)
class Expectation:
    """What an update must be to answer a plan."""

    federation: str
    agreement: str
    plan: str
    base: str
    accepted: tuple[tuple[int, str], ...]  # (round, incoming global)
    silo: str
    cursor: int  # where the silo's data stream stood before
    codec: str
    schema: Mapping[str, list[int]]  # tensor name -> shape

    most_steps: int = WEIGHT_LIMIT
    most_examples: int = WEIGHT_LIMIT
    most_tokens: int = WEIGHT_LIMIT
    """What the terms let a silo do in a round: an update counts by what its header claims, so claims have bounds."""

    verify: Callable[[bytes, str], bool] | None = None
    """Whether a signature of `signed_bytes` is of the silo's key, written in the one way it can be; None where silos have no keys."""

    @property
    def tensor_bytes(self) -> int:
        """What the tensors take in the file."""
        return sum(math.prod(shape) for shape in self.schema.values()) * WIDTH[DTYPE[self.codec]]

    @cached_property
    def header_bytes(self) -> int:
        """No honest header is longer: names, shapes and digests as they will stand there, and some room for the rest."""
        metadata = canonical_json({"tensors": dict.fromkeys(self.schema, "0" * 64)}).decode()
        return len(header_text(self.schema, DTYPE[self.codec], {KEY: metadata})) + HEADER_SLACK

    @property
    def most_bytes(self) -> int:
        """No honest file is larger."""
        return 8 + self.header_bytes + self.tensor_bytes


def write_update(path: Path, header: Header, tensors: Mapping[str, np.ndarray], sign: Callable[[bytes], str] | None = None) -> Header:
    """Write an update; returns its header with norm, digests and signature filled in.

    Args:
        header: with any ``norm``, ``tensors`` and ``signature``.
        tensors: float32 differences by name.
        sign: the silo's signature of some bytes; None where silos have no keys.

    Raises:
        SilotuneError: a tensor is not finite, or no longer so in the codec's number format.
    """
    dtype = DTYPE[header.codec.name]
    digests, squares = {}, 0.0
    for name, array in sorted(tensors.items()):
        data = to_bytes(array, dtype)
        if not np.isfinite(from_bytes(data, dtype)).all():
            raise SilotuneError(
                f"tensor {name!r} of the update is not finite in {dtype}; lower training.learning_rate", "non-finite update"
            )
        digests[name] = hashlib.sha256(data).hexdigest()
        squares += float(np.square(array, dtype=np.float64).sum())
    header = header.model_copy(update={"tensors": digests, "norm": math.sqrt(squares), "signature": None})
    if sign is not None:
        header = header.model_copy(update={"signature": sign(signed_bytes(header))})
    encoded = ((name, to_bytes(array, dtype)) for name, array in sorted(tensors.items()))
    shapes = {name: array.shape for name, array in tensors.items()}
    write_tensor_file(path, shapes, dtype, encoded, {KEY: canonical_json(header.model_dump()).decode()})
    return header


@dataclass(frozen=True)
class Update:
    """An update whose header has been accepted."""

    header: Header
    file: TensorFile

    def tensor(self, name: str) -> np.ndarray:
        """One verified tensor as float32.

        Raises:
            UpdateRefused: its bytes are cut short or do not have the digest in the header, or it is not finite.
        """
        try:
            data = self.file.raw(name)
        except MalformedFile as error:
            raise UpdateRefused(self.header.silo, str(error), "send the update again") from None
        if hashlib.sha256(data).hexdigest() != self.header.tensors[name]:
            raise UpdateRefused(self.header.silo, f"tensor {name!r} does not have the digest in the header", "send the update again")
        entry = self.file.entries[name]
        array = from_bytes(data, entry.dtype).reshape(entry.shape)
        if not np.isfinite(array).all():
            raise UpdateRefused(self.header.silo, f"tensor {name!r} is not finite", "lower the learning rate or check the records")
        return array

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        yield from ((name, self.tensor(name)) for name in self.file.entries)

    def verify(self) -> float:
        """Read all of it as `tensor` does, and compare its norm with the header's; returns the norm, summed in float64.

        Raises:
            UpdateRefused: as `tensor`, or the norm is another one.
        """
        squares = sum(sum_of_squares(array) for _, array in self.tensors())
        if not norm_matches(self.header.norm, squares, self.header.codec.name):
            rule = f"its norm is {math.sqrt(squares):.4g}, its header says {self.header.norm:.4g}"
            raise UpdateRefused(self.header.silo, rule, "send the update again")
        return math.sqrt(squares)


def read_header(path: Path) -> Header:
    """The header of one's own update file. Raises MalformedFile where it is none."""
    try:
        return Header.model_validate(strict_json(open_tensor_file(path).metadata.get(KEY, "")))
    except ValueError as error:
        raise MalformedFile(f"the header is not that of an update: {type(error).__name__}") from None


def open_update(source: Path | Blob, expected: Expectation) -> Update:
    """Accept or refuse an update by its header, before any tensor is read.

    Args:
        source: a local file, or bytes in a store.

    Raises:
        UpdateRefused: with the first rule that is broken.
    """

    def refuse(rule: str, cure: str) -> UpdateRefused:
        return UpdateRefused(expected.silo, rule, cure)

    blob = FileBlob(source) if isinstance(source, Path) else source
    size = blob.size
    if size > expected.most_bytes:
        raise refuse(
            f"it has {size} bytes, more than the {expected.most_bytes} that its tensors can take", "send the tensors of the plan only"
        )
    try:
        file = open_tensor_file(blob, expected.header_bytes)
    except MalformedFile as error:
        raise refuse(f"not a tensor file: {error}", "send the update again") from None
    header = _header(file, refuse)
    cures = {"silo": "a silo sends its own update only", "base": "its base model differs from the federation's; install the agreed one"}
    for field in ("federation", "agreement", "plan", "base", "silo"):
        got, wanted = getattr(header, field), getattr(expected, field)
        if got != wanted:
            raise refuse(f"{field} is {got[:16]!r}, the plan's is {wanted[:16]!r}", cures.get(field, "train again on the open plan"))
    if (header.round, header.incoming) not in expected.accepted:
        raise refuse(f"it answers round {header.round} and global {header.incoming[:12]}", "train again on the open plan")
    _check_signature(header, expected, refuse)
    if header.codec.name != expected.codec:
        raise refuse(f"codec is {header.codec.name!r}, the agreement's is {expected.codec!r}", "use the agreed codec")
    for field in ("examples", "tokens", "steps"):
        most = getattr(expected, f"most_{field}")
        if not 0 < getattr(header, field) <= most:
            raise refuse(f"{field} is {getattr(header, field)}, must be from 1 to {most}", "train as long as the terms say")
    if not 0 < header.cursor - expected.cursor <= expected.most_examples:
        least, most = expected.cursor + 1, expected.cursor + expected.most_examples
        raise refuse(f"its data cursor is {header.cursor}, must be from {least} to {most}", "train on the next stretch of the data")
    if header.norm <= 0:
        raise refuse(
            "training changed nothing: its norm is 0" if header.norm == 0 else f"its norm is {header.norm}, must be positive",
            "raise the learning rate or check the records",
        )
    _check_tensors(file, header, expected, refuse)
    return Update(header, file)


def _header(file: TensorFile, refuse: Callable[[str, str], UpdateRefused]) -> Header:
    if file.metadata.keys() != {KEY}:
        raise refuse(f"not a tensor file of an update: its metadata must be {KEY!r} and nothing else", "send the update again")
    try:
        # Not pydantic's own reader of JSON: it takes a kilobyte for every empty list.
        header = Header.model_validate(strict_json(file.metadata[KEY]))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise refuse(
            ": ".join(["bad header", *filter(None, [where]), first["msg"]]), "use the version of silotune the plan names"
        ) from None
    except ValueError:
        raise refuse("bad header: it is not JSON without repeated keys, NaN and Infinity", "send the update again") from None
    if not (math.isfinite(header.loss or 0.0) and math.isfinite(header.norm)):
        raise refuse("loss or norm is not finite", "lower the learning rate or check the records")
    if canonical_json(header.model_dump()) != file.metadata[KEY].encode():
        raise refuse("bad header: it is not byte for byte the one way to write its content", "send the update again")
    return header


def _check_signature(header: Header, expected: Expectation, refuse: Callable[[str, str], UpdateRefused]) -> None:
    cure = "register or rotate the silo's key with `silotune keys`"
    if expected.verify is None:
        if header.signature is not None:  # to ignore it would look like trust in it
            raise refuse("it is signed, and the federation has no key to check it with", f"{cure}, or send it unsigned")
    elif header.signature is None:
        raise refuse(f"it bears no signature of silo {expected.silo}", cure)
    elif not expected.verify(signed_bytes(header), header.signature):
        raise refuse(f"its signature is not of silo {expected.silo}'s key", cure)


def _check_tensors(file: TensorFile, header: Header, expected: Expectation, refuse: Callable[[str, str], UpdateRefused]) -> None:
    matching = len(file.entries.keys() & expected.schema.keys())
    cure = "its base model or LoRA targets differ from the federation's; compare the two"
    if missing := sorted(expected.schema.keys() - file.entries.keys()):
        raise refuse(f"it has no tensor {missing[0]!r} ({matching} of {len(expected.schema)} names match)", cure)
    if unknown := sorted(file.entries.keys() - expected.schema.keys()):
        raise refuse(f"it has an unknown tensor {unknown[0]!r} ({matching} of {len(expected.schema)} names match)", cure)
    for name, entry in file.entries.items():
        if list(entry.shape) != expected.schema[name]:
            raise refuse(f"tensor {name!r} has shape {list(entry.shape)}, must have {expected.schema[name]}", cure)
        if entry.dtype != DTYPE[expected.codec]:
            raise refuse(
                f"tensor {name!r} is {entry.dtype}, codec {expected.codec!r} writes {DTYPE[expected.codec]}", "use the agreed codec"
            )
    if header.tensors.keys() != file.entries.keys():
        raise refuse("the header's digests are not of these tensors", "send the update again")
