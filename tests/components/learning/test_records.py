"""Records: every format read the same, errors that name the place and never the content, and the layout of examples."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from silotune.components.errors import FederationError
from silotune.components.learning.records import lay_out, read_records

CANARY = "CANARY-patient-4711"
ROWS = [{"prompt": 'a, "b"\nc', "response": "é 日 😀"}, {"prompt": "", "response": "x"}]
TEMPLATE = "Q: {prompt}\nA: {response}"


def read(path: Path, kind: str = "prompt-response", **fields: str) -> list[dict[str, Any]]:
    return [record for _, record in read_records(path, kind, fields)]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def error_of(path: Path, kind: str = "prompt-response", **fields: str) -> str:
    """The message; nothing of it, nor of the traceback, may hold a record's content."""
    with pytest.raises(FederationError) as caught:
        read(path, kind, **fields)
    assert CANARY not in "".join(traceback.format_exception(caught.value))
    assert CANARY not in caught.value.reason
    return str(caught.value)


# Reading


def test_all_formats_give_the_same_records(tmp_path: Path) -> None:
    jsonl(tmp_path / "r.jsonl", [{**row, "id": 7} for row in ROWS])
    pq.write_table(pa.Table.from_pylist([{**row, "id": 7} for row in ROWS]), tmp_path / "r.parquet")
    quoted = '"a, ""b""\nc",é 日 😀,7\n,x,7\n'
    (tmp_path / "r.csv").write_text(f"prompt,response,id\n{quoted}", encoding="utf-8")
    for name in ("r.jsonl", "r.parquet", "r.csv"):
        assert read(tmp_path / name) == ROWS, name


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv", "r.txt"])
def test_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, name: str) -> None:
    content = {"r.jsonl": '{"text": "hello"}\n', "r.csv": "text\nhello\n", "r.txt": "hello\n"}[name]
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert read(tmp_path / name, "text") == [{"text": "hello"}]


def test_blank_lines_and_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(b'\r\n{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert read(tmp_path / "r.jsonl", "text") == [{"text": "a"}, {"text": "b"}]


def test_folder_is_read_in_name_order_and_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("  second \n")
    (tmp_path / "a.txt").write_text("first\nstill first")
    (tmp_path / "c.txt").write_text(" \n")
    (tmp_path / "README.md").write_text("not a record")
    jsonl(tmp_path / "d.jsonl", [{"text": "third"}])
    assert [r["text"] for r in read(tmp_path, "text")] == ["first\nstill first", "second", "third"]


def test_inner_folders_are_read_and_hidden_files_are_not(tmp_path: Path) -> None:
    for name, text in (("2024/05/b.TXT", "second"), ("2023/a.txt", "first"), (".trash/c.txt", "thrown away"), ("2023/._a.txt", "\xff")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    assert [r["text"] for r in read(tmp_path, "text")] == ["first", "second"]


def test_renamed_columns_and_only_the_fields_of_the_format(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "r.jsonl", [{"question": "q", "prompt": "not this", "answer": "a", "name": "Mary"}])
    assert read(path, prompt="question", response="answer") == [{"prompt": "q", "response": "a"}]


def test_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = jsonl(tmp_path / "r.jsonl", [{"messages": messages}])
    assert read(path, "chat") == [{"messages": messages}]


def test_place_counts_lines_and_rows(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('\n{"text": "a"}\n\n{"text": "b"}\n')
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "r.parquet")
    assert [p for p, _ in read_records(tmp_path / "r.jsonl", "text", {})] == ["r.jsonl, line 2", "r.jsonl, line 4"]
    assert [p for p, _ in read_records(tmp_path / "r.parquet", "text", {})] == ["r.parquet, row 1", "r.parquet, row 2"]


def test_real_files_read_whole(shared: Path) -> None:
    file = shared / "data/banking77/bank-a/train.jsonl"
    with file.open(encoding="utf-8") as lines:
        expected = [json.loads(line) for line in lines]
    assert read(file) == [{k: e[k] for k in ("prompt", "response")} for e in expected]


# Errors


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f'["{CANARY}"]', "line 2: must be a JSON object, got a list"),
        (f'"{CANARY}"', "line 2: must be a JSON object, got text"),
        (f'{{"text": "{CANARY}"', "line 2: not valid JSON"),
        (f"{CANARY}", "line 2: not valid JSON"),
        (f'{{"txt": "{CANARY}"}}', "line 2: has no field 'text'"),
        (f'{{"text": ["{CANARY}"]}}', "line 2: field 'text' must be text, got a list"),
        (f'{{"text": null, "x": "{CANARY}"}}', "line 2: field 'text' must be text, got nothing"),
        (f'{{"text": 7, "x": "{CANARY}"}}', "line 2: field 'text' must be text, got a number"),
        (f'{{"text": "{CANARY} \\ud800"}}', "line 2: field 'text' holds half a character"),
        ("[" * 200_000 + CANARY, "line 2: not valid JSON"),
        (f'{{"text": {"9" * 5000}, "x": "{CANARY}"}}', "line 2: not valid JSON"),
    ],
)
def test_bad_line_is_named_and_its_content_is_not(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "r.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    message = error_of(tmp_path / "r.jsonl", "text")
    assert message.startswith("r.jsonl, ")
    assert said in message


@pytest.mark.parametrize(
    "messages",
    [
        [],
        CANARY,
        [CANARY],
        [{"role": "user"}],
        [{"role": "user", "content": [CANARY]}],
        [{"role": 3, "content": CANARY}],
        {"role": "user", "content": CANARY},
    ],
)
def test_bad_messages(tmp_path: Path, messages: Any) -> None:
    path = jsonl(tmp_path / "r.jsonl", [{"messages": messages}])
    assert error_of(path, "chat").startswith("r.jsonl, line 1: field 'messages' must be a list of objects with text in 'role'")


def test_half_a_character_in_a_message(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "r.jsonl", [{"messages": [{"role": "user", "content": f"{CANARY}\ud800"}]}])
    assert "line 1: field 'messages' holds half a character" in error_of(path, "chat")


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv", "r.txt"])
def test_invalid_utf8(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(f"text\n{CANARY} ".encode() + b"\xff\xfe\n")
    if name == "r.jsonl":
        (tmp_path / name).write_bytes(b'{"text": "a"}\n{"text": "' + CANARY.encode() + b'\xff"}\n')
    message = error_of(tmp_path / name, "text")
    assert message.startswith(name)
    assert "not UTF-8 text" in message
    if name == "r.jsonl":
        assert "line 2" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"prompt,response\nx,y\n{CANARY}\n", "r.csv, line 3: field 'response' must be text, got nothing"),
        (f'prompt,response\nx,y\n"{CANARY}"z,w\n', "r.csv, line 3: not valid CSV"),
        (f"prompt|response\n{CANARY}|w\n", "r.csv, line 2: has no field 'prompt'"),
    ],
)
def test_bad_csv(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "r.csv").write_text(content)
    assert said in error_of(tmp_path / "r.csv")


@pytest.mark.parametrize(("name", "between"), [("r.csv", ";"), ("r.csv", "\t"), ("r.tsv", "\t")])
def test_the_header_says_what_separates_columns(tmp_path: Path, name: str, between: str) -> None:
    rows = [("prompt", "response"), ("one, two", "three"), ('"a;b\tc"', "d, e, f")]
    (tmp_path / name).write_text("".join(between.join(row) + "\n" for row in rows))
    assert read(tmp_path / name) == [{"prompt": "one, two", "response": "three"}, {"prompt": "a;b\tc", "response": "d, e, f"}]


def test_a_missing_column_is_told_with_usual_names_only(tmp_path: Path) -> None:
    """The first line of a csv without a header counts as names, and it is a record."""
    (tmp_path / "r.csv").write_text(f"Question,{CANARY},answer\nx,y,z\n")
    told = error_of(tmp_path / "r.csv")
    assert "has no field 'prompt', which format 'prompt-response' needs (there is 'Question', 'answer'); add it" in told
    assert CANARY not in told


def test_bad_parquet(tmp_path: Path) -> None:
    (tmp_path / "r.parquet").write_bytes(f"PAR1{CANARY}".encode())
    assert error_of(tmp_path / "r.parquet").startswith("r.parquet: not a valid parquet file")
    pq.write_table(pa.table({"prompt": ["a"], "response": [7]}), tmp_path / "n.parquet")
    assert error_of(tmp_path / "n.parquet").startswith("n.parquet, row 1: field 'response' must be text, got a number")


def test_unusable_paths(tmp_path: Path) -> None:
    assert "no such file" in error_of(tmp_path / "nope.jsonl")
    assert "holds no .csv, .jsonl, .parquet, .tsv, .txt file" in error_of(tmp_path)
    (tmp_path / "r.doc").write_text("x")
    assert "must be one of .csv, .jsonl, .parquet, .tsv, .txt, got '.doc'" in error_of(tmp_path / "r.doc")
    (tmp_path / "r.JSON").write_text("{}")
    assert error_of(tmp_path / "r.JSON").endswith("got '.JSON'; write one JSON object a line, as .jsonl")


# Layout


def spans_of(record: dict[str, Any], template: str = TEMPLATE, render: Any = None) -> tuple[str, list[str]]:
    laid = lay_out(record, template, render)
    return laid.text, [laid.text[start:end] for start, end in laid.spans]


@pytest.mark.parametrize("prompt", ["plain", "{response}", "{prompt} {0} {", "}}{{", "%s \\1 ${X}", ""])
@pytest.mark.parametrize("response", ["plain", "{prompt}", "{response}{", ""])
def test_prompt_response_takes_text_as_it_is(prompt: str, response: str) -> None:
    text, learned = spans_of({"prompt": prompt, "response": response})
    assert text == "Q: " + prompt + "\nA: " + response
    assert learned == [response]
    assert lay_out({"prompt": prompt, "response": response}, TEMPLATE, None).spans[0][1] == len(text)


def test_text_is_learned_whole() -> None:
    assert spans_of({"text": "a {prompt} b"}) == ("a {prompt} b", ["a {prompt} b"])


def render(messages: list[dict[str, str]], generation: bool) -> str:
    return "".join(f"<{m['role']}>{m['content']}</>" for m in messages) + ("<assistant>" if generation else "")


def test_chat_learns_every_assistant_turn_and_its_end() -> None:
    turns = [("system", "be kind"), ("user", "hi"), ("assistant", "ho"), ("user", "and?"), ("assistant", "ho")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text, learned = spans_of({"messages": messages}, "unused", render)
    assert text == "<system>be kind</><user>hi</><assistant>ho</><user>and?</><assistant>ho</>"
    assert learned == ["ho</>", "ho</>"]
    assert [start for start, _ in lay_out({"messages": messages}, "unused", render).spans] == [40, 69]


def test_chat_template_for_prompt_response() -> None:
    assert spans_of({"prompt": "p", "response": "r"}, "chat", render) == ("<user>p</><assistant>r</>", ["r</>"])


def test_chat_without_a_template_and_with_one_that_rewrites_turns() -> None:
    messages = [{"role": "user", "content": CANARY}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(FederationError, match="has no chat template"):
        lay_out({"messages": messages}, "unused", None)

    def forgetful(messages: list[dict[str, str]], generation: bool) -> str:
        return render(messages[-1:], generation)

    with pytest.raises(FederationError, match="rewrites earlier turns") as caught:
        lay_out({"messages": messages}, "unused", forgetful)
    assert CANARY not in str(caught.value)
