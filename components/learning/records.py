"""Records: what a silo's files hold, one dict at a time, and the text an example is made of.

Reads jsonl, csv (with commas, semicolons or tabs), parquet, txt, and folders of these (files in the order of their paths, those of inner folders among them; none that is hidden). Errors name the file and the line, never a record's content:
a message may travel further than a record may.
"""

from __future__ import annotations

import csv
import json
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silotune.components.errors import FederationError
from silotune.components.terms.training import FIELDS

# Names of columns that an error may tell. Any other might be a record: of a csv without a header the first line counts as names.
USUAL = (
    "prompt",
    "response",
    "question",
    "answer",
    "instruction",
    "input",
    "output",
    "completion",
    "context",
    "text",
    "content",
    "messages",
)
CURES = {
    ".json": "write one JSON object a line, as .jsonl",
    ".gz": "unpack it",
    ".zip": "unpack it",
    ".xlsx": "save it as .csv",
}

PERSON = "person"  # in a record: whose it is, where that is asked for; never of a format's own fields

Render = Callable[[list[dict[str, str]], bool], str]


@dataclass(frozen=True)
class Laid:
    """Text of one example and the character spans [start, end) of it that are to be learned."""

    text: str
    spans: tuple[tuple[int, int], ...]


def read_records(path: Path, kind: str, fields: dict[str, str], person: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, record) for every record of a file or folder, with exactly the fields that format ``kind`` needs.

    Args:
        path: a .jsonl, .csv, .parquet or .txt file, or a folder of such files.
        kind: ``prompt-response``, ``chat`` or ``text``.
        fields: field -> column where a file names it otherwise.
        person: column that says whose record it is; goes under `PERSON`, as text.

    Raises:
        FederationError: unreadable file, invalid UTF-8, a line that is no object, a missing or mistyped field.
    """
    if not path.exists():
        raise FederationError(f"{path}: no such file; correct the path in the federation file")
    files = data_files(path)
    if not files:
        raise FederationError(f"{path}: holds no {', '.join(sorted(READERS))} file")
    for file in files:
        kind_of_file = file.suffix.lower()
        if kind_of_file not in READERS:
            got = file.suffix or "no suffix"
            raise FederationError(
                f"{file}: must be one of {', '.join(sorted(READERS))}, got {got!r}; {CURES.get(kind_of_file, 'convert it')}"
            )
        try:
            for place, row in READERS[kind_of_file](file):
                yield place, _pick(place, row, kind, fields) | ({} if person is None else {PERSON: _person(place, row, person)})
        except UnicodeDecodeError as error:
            raise FederationError(f"{file.name}: not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
        except OSError as error:
            raise FederationError(f"{file}: cannot be read: {error.strerror or error}") from None


def data_files(path: Path) -> list[Path]:
    """The files that a location names: itself, or all of a folder that can be read."""
    if not path.is_dir():
        return [path]
    inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS and p.is_file())
    return [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]


def _pick(place: str, row: dict[str, Any], kind: str, fields: dict[str, str]) -> dict[str, Any]:
    picked = {}
    for field in FIELDS[kind]:
        column = fields.get(field, field)
        if column not in row:
            raise FederationError(
                f"{place}: has no field {column!r}, which format {kind!r} needs{_usual(row)}; add it, or name the column under data.fields, or "
                "under the silo's own fields"
            )
        value = row[column]
        if field == "messages":
            if not isinstance(value, list) or not value or not all(_is_message(m) for m in value):
                raise FederationError(f"{place}: field {column!r} must be a list of objects with text in 'role' and 'content'")
        elif not isinstance(value, str):
            raise FederationError(f"{place}: field {column!r} must be text, got {_kind(value)}; write it as text")
        if not _is_unicode(value):
            raise FederationError(f"{place}: field {column!r} holds half a character (a lone surrogate such as \\ud800); correct the text")
        picked[field] = value
    return picked


def _usual(row: dict[str, Any]) -> str:
    """The names in a record that are no news to anybody."""
    found = [repr(name) for name in row if str(name).strip().casefold() in USUAL]
    return f" (there is {', '.join(found)})" if found else ""


def _kind(value: Any) -> str:
    """What a value is, in JSON's words, and never what it says."""
    kinds = {
        type(None): "nothing",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), type(value).__name__)


def _person(place: str, row: dict[str, Any], column: str) -> str:
    """A name or number as text. One that is missing would make strangers one person, or nobody's record unprotected."""
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int) or str(value).strip() == "":
        raise FederationError(
            f"{place}: field {column!r} must say whose record it is, as text or a whole number, got {_kind(value)}; "
            "fill it in, or correct privacy.person_field"
        )
    return unicodedata.normalize("NFC", str(value).strip())  # a letter with its accent, or followed by it: the same name


def _is_unicode(value: str | list[dict[str, str]]) -> bool:
    """Whether it can be written as UTF-8; JSON escapes can spell what cannot."""
    try:
        for text in [value] if isinstance(value, str) else [m["content"] for m in value]:
            text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _read_jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{file.name}, line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                raise FederationError(f"{place}: not UTF-8 text; convert the file to UTF-8") from None
            except (ValueError, RecursionError):
                raise FederationError(f"{place}: not valid JSON; write one JSON object a line") from None
            if not isinstance(row, dict):
                raise FederationError(f"{place}: must be a JSON object, got {_kind(row)}; write one JSON object a line")
            yield place, row


def _read_csv(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as text:
        head = text.readline()
        text.seek(0)
        # Where commas are decimal points, spreadsheets write semicolons: the header says what separates columns.
        rows = csv.DictReader(text, strict=True, delimiter=max(",;\t", key=head.count))
        try:
            for row in rows:
                yield f"{file.name}, line {rows.line_num}", {k: v for k, v in row.items() if k is not None}
        except csv.Error as error:
            raise FederationError(f"{file.name}, line {rows.reader.line_num}: not valid CSV: {error}") from None


def _read_parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file.name}, row {number}", row
    except pyarrow.ArrowException:
        raise FederationError(f"{file.name}: not a valid parquet file (after row {number})") from None


def _read_txt(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = file.read_text(encoding="utf-8-sig").strip()
    if text:
        yield file.name, {"text": text}


READERS: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}


def lay_out(record: dict[str, Any], template: str, render: Render | None) -> Laid:
    """The text of a record, with the spans to be learned: responses, assistant turns, or everything.

    Args:
        record: with the fields of one format.
        template: for prompt-response; ``chat`` for the tokenizer's chat template.
        render: (messages, add_generation_prompt) -> text, from the tokenizer's chat template.

    Raises:
        FederationError: a chat template is asked for and there is none, or it rewrites earlier turns.
    """
    if "text" in record:
        return Laid(record["text"], ((0, len(record["text"])),))
    if "prompt" in record and template != "chat":
        before, after = template.removesuffix("{response}").split("{prompt}")
        head = before + record["prompt"] + after
        return Laid(head + record["response"], ((len(head), len(head) + len(record["response"])),))
    if render is None:
        raise FederationError("the base model's tokenizer has no chat template; add one to it, or give data.template as text")
    messages = record.get("messages") or [
        {"role": "user", "content": record["prompt"]},
        {"role": "assistant", "content": record["response"]},
    ]
    text = render(messages, False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            head, turn = render(messages[:i], True) if i else "", render(messages[: i + 1], False)
            if not (turn.startswith(head) and text.startswith(turn)):
                raise FederationError("the tokenizer's chat template rewrites earlier turns, so that responses cannot be found in its text")
            spans.append((len(head), len(turn)))
    return Laid(text, tuple(spans))
