"""Token shards: a split of a silo's records as token ids, on the silo's own disk, read through memory maps.

A shard is a folder of four flat little-endian files and a description, written last:

    tokens.i32    token ids of all examples, end to end
    targets.u8    1 where the token is to be learned (predicted from those before it), else 0
    offsets.i64   start of every example, and the end of the last
    units.i32     whose example it is: of which record, or person, by number in the order in which they come; no name
    shard.json    counts, and the SHA-256 of the four files together
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from silotune.components.errors import FederationError
from silotune.components.learning.records import PERSON, Laid, lay_out

FILES = ("tokens.i32", "targets.u8", "offsets.i64", "units.i32")
CHUNK = 1024  # records tokenised together


@dataclass(frozen=True)
class Counts:
    """What became of the records of a split."""

    examples: int
    tokens: int
    targets: int
    records: int
    truncated: int
    dropped: int

    def told(self, max_length: int) -> str:
        """In words, with all that was lost."""
        cut = f", {self.truncated} cut at {max_length} tokens" if self.truncated else ""
        left = f", {self.dropped} left out, with nothing to learn within {max_length} tokens" if self.dropped else ""
        more = f" in {self.examples} examples" if self.examples > self.records else ""
        return f"{self.records} records{more}{cut}{left}"

    @property
    def lossy(self) -> bool:
        """Whether so much was cut or left out, a tenth of the examples, that somebody should know."""
        return 10 * (self.truncated + self.dropped) > self.examples + self.dropped


@dataclass(frozen=True)
class Shard:
    """One split. ``tokens`` and ``targets`` are flat; example i is the slice offsets[i]:offsets[i + 1]."""

    tokens: np.ndarray  # (total,) int32
    targets: np.ndarray  # (total,) uint8
    offsets: np.ndarray  # (examples + 1,) int64
    digest: str
    counts: Counts
    units: np.ndarray  # (examples,) int32, dense: all numbers from 0 on

    @property
    def unit_count(self) -> int:
        """Records, or persons, that have examples."""
        return int(self.units.max()) + 1

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return self.offsets[indices + 1] - self.offsets[indices]

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and targets of one example, each (length,)."""
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.tokens[start:end], self.targets[start:end]


@dataclass(frozen=True)
class Tokeniser:
    """A tokenizer with the terms of ``data``: records in, (ids, targets) out.

    The text of an example is tokenised in one piece, as the model will meet it, and a token is a target if any of its characters is
    to be learned. Beginning- and end-of-text tokens are added unless a chat template has written its own.
    """

    tokenizer: Any
    template: str
    max_length: int
    long_examples: str

    def __call__(self, records: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
        """For each record the examples it gives, each uncut: see `fit`."""
        stream = iter(records)
        while chunk := list(islice(stream, CHUNK)):
            laid = [self._lay_out(place, record) for place, record in chunk]
            encoded = self.tokenizer([x.text for x in laid], add_special_tokens=False, return_offsets_mapping=True)
            whole = [not self._is_chat(record) for _, record in chunk]
            for x, ids, spans, add in zip(laid, encoded["input_ids"], encoded["offset_mapping"], whole, strict=True):
                yield self._cut(*self._mark(x, ids, spans, add), is_text=x.spans == ((0, len(x.text)),) and add)

    def fit(self, ids: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """As much of an example as is learned from; None where nothing is."""
        if len(ids) > self.max_length:
            if self.long_examples == "drop":
                return None
            ids, targets = ids[: self.max_length], targets[: self.max_length]
        return (ids, targets) if targets.any() else None

    def _is_chat(self, record: dict[str, Any]) -> bool:
        return "messages" in record or ("prompt" in record and self.template == "chat")

    def _lay_out(self, place: str, record: dict[str, Any]) -> Laid:
        render = None
        if getattr(self.tokenizer, "chat_template", None):
            render = self._render
        try:
            return lay_out(record, self.template, render)
        except FederationError as error:
            raise FederationError(f"{place}: {error}") from None

    def _render(self, messages: list[dict[str, str]], generation: bool) -> str:
        import jinja2

        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))
        except jinja2.TemplateError as error:
            raise FederationError(f"the tokenizer's chat template refuses the messages: {type(error).__name__}") from None

    def _mark(self, laid: Laid, ids: list[int], offsets: list[tuple[int, int]], whole: bool) -> tuple[np.ndarray, np.ndarray]:
        starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        targets = np.zeros(len(ids), dtype=np.uint8)
        for start, end in laid.spans:
            targets |= ((ends > start) & (starts < end)).astype(np.uint8)
        if whole:
            bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            head = [] if bos is None else [bos]
            ids = [*head, *ids, eos]
            targets = np.concatenate([np.zeros(len(head), np.uint8), targets, np.ones(1, np.uint8)])
        if len(targets):
            targets[0] = 0  # nothing stands before the first token to predict it from
        return np.array(ids, dtype=np.int32), targets

    def _cut(self, ids: np.ndarray, targets: np.ndarray, is_text: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        if not is_text or len(ids) <= self.max_length:
            return [(ids, targets)]
        pieces = []
        for start in range(0, len(ids), self.max_length):
            part = targets[start : start + self.max_length].copy()
            part[0] = 0
            if part.any():
                pieces.append((ids[start : start + self.max_length], part))
        return pieces


def _why_nothing(records: int, shortest: int, tokeniser: Tokeniser) -> str:
    """Why there is nothing to learn from ``records``, of whose examples that are too long the shortest has so many tokens."""
    if not records:
        return "holds no record; give a file with at least one"
    if not shortest:
        return f"none of its {records} records has anything to learn; responses or texts are empty"
    cure = "raise it, or set long_examples: truncate" if tokeniser.long_examples == "drop" else "raise it: prompts alone are longer"
    return (
        f"no example fits data.max_length={tokeniser.max_length} with a token to learn (the shortest of {records} has {shortest}); {cure}"
    )


def count_examples(records: Iterable[tuple[str, dict[str, Any]]], tokeniser: Tokeniser) -> Counts:
    """What would become of records, without writing anything.

    Raises:
        FederationError: as of `write_shard`; a record cannot be read.
    """
    seen, kept, tokens, learned, truncated, dropped, shortest = 0, 0, 0, 0, 0, 0, 0
    for examples in tokeniser(records):
        seen += 1
        for ids, targets in examples:
            fitting = tokeniser.fit(ids, targets)
            if len(ids) > tokeniser.max_length:
                shortest = min(shortest or len(ids), len(ids))
            if fitting is None:
                dropped += 1
                continue
            kept, tokens, learned = kept + 1, tokens + len(fitting[0]), learned + int(fitting[1].sum())
            truncated += len(fitting[0]) < len(ids)
    if not kept:
        raise FederationError(_why_nothing(seen, shortest, tokeniser))
    return Counts(kept, tokens, learned, seen, truncated, dropped)


def write_shard(folder: Path, records: Iterable[tuple[str, dict[str, Any]]], tokeniser: Tokeniser, what: str) -> Shard:
    """Tokenise records into a shard, in bounded memory, and put it at ``folder`` in one rename.

    Args:
        what: names the split in errors, such as ``silo 'north': train``.

    Raises:
        FederationError: there is no record, or none leaves a token to learn within ``max_length``.
    """
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    offsets, targets_total, seen, truncated, dropped, shortest = [0], 0, 0, 0, 0, 0
    units: list[int] = []
    numbers: dict[Any, int] = {}  # of what a unit is told by
    with (scratch / "tokens.i32").open("wb") as tokens_file, (scratch / "targets.u8").open("wb") as targets_file:
        whose: deque[str] = deque()
        for examples in tokeniser(_watched(records, whose)):
            unit = whose.popleft() or seen
            seen += 1
            for ids, targets in examples:
                if len(ids) > tokeniser.max_length:
                    shortest = min(shortest or len(ids), len(ids))
                fitting = tokeniser.fit(ids, targets)
                if fitting is None:
                    dropped += 1
                    continue
                truncated += len(fitting[0]) < len(ids)
                ids, targets = fitting
                tokens_file.write(ids.astype("<i4").tobytes())
                targets_file.write(targets.tobytes())
                offsets.append(offsets[-1] + len(ids))
                units.append(numbers.setdefault(unit, len(numbers)))
                targets_total += int(targets.sum())
    if len(offsets) == 1:
        shutil.rmtree(scratch)
        raise FederationError(f"{what}: {_why_nothing(seen, shortest, tokeniser)}")
    np.array(offsets, dtype="<i8").tofile(scratch / "offsets.i64")
    np.array(units, dtype="<i4").tofile(scratch / "units.i32")
    counts = Counts(len(offsets) - 1, offsets[-1], targets_total, seen, truncated, dropped)
    (scratch / "shard.json").write_text(json.dumps({"digest": _digest(scratch), "counts": asdict(counts)}))
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    return open_shard(folder)


def _watched(records: Iterable[tuple[str, dict[str, Any]]], whose: deque[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records, after noting whose each of them is; "" where a record is its own unit."""
    for place, record in records:
        whose.append(record.get(PERSON, ""))
        yield place, record


def open_shard(folder: Path) -> Shard:
    """Map a shard. Raises FileNotFoundError where none was completed."""
    about = json.loads((folder / "shard.json").read_text())
    return Shard(
        tokens=np.memmap(folder / "tokens.i32", dtype="<i4", mode="r"),
        targets=np.memmap(folder / "targets.u8", dtype=np.uint8, mode="r"),
        offsets=np.fromfile(folder / "offsets.i64", dtype="<i8"),
        digest=about["digest"],
        counts=Counts(**about["counts"]),
        units=np.fromfile(folder / "units.i32", dtype="<i4"),
    )


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in FILES:
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
