"""Token shards: targets are exactly the tokens to learn; what is cut, dropped or left over; the same bytes every time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silotune.components.errors import FederationError
from silotune.components.learning import tokens
from silotune.components.learning.model import load_tokenizer
from silotune.components.learning.records import read_records
from silotune.components.learning.tokens import Shard, Tokeniser, count_examples, open_shard, write_shard

TEMPLATE = "Q: {prompt}\nA:\n{response}"
Write = Callable[..., Shard]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


@pytest.fixture
def write(tmp_path: Path, tokenizer: Any) -> Write:
    def write(records: list[dict[str, Any]], max_length: int = 200, long: str = "truncate", **kwargs: Any) -> Shard:
        tokeniser = Tokeniser(kwargs.get("tokenizer", tokenizer), kwargs.get("template", TEMPLATE), max_length, long)
        placed = ((f"r.jsonl, line {i}", record) for i, record in enumerate(records, 1))
        return write_shard(kwargs.get("folder", tmp_path / "train"), placed, tokeniser, "silo 'a': train")

    return write


def pair(prompt: str, response: str) -> dict[str, str]:
    return {"prompt": prompt, "response": response}


def learned(tokenizer: Any, shard: Shard, index: int) -> str:
    ids, targets = shard.example(index)
    return tokenizer.decode(ids[targets == 1])


def text_of(tokenizer: Any, shard: Shard, index: int) -> str:
    return tokenizer.decode(shard.example(index)[0])


# Targets


@pytest.mark.parametrize("response", ["it moves the blood", "é 日本 😀", "x", "two\n\nlines ", "{prompt}", "</s> is a token"])
def test_targets_are_the_response_and_the_end(write: Write, tokenizer: Any, response: str) -> None:
    shard = write([pair("what does the heart do? é", response)])
    assert text_of(tokenizer, shard, 0) == f"<s>Q: what does the heart do? é\nA:\n{response}</s>"
    assert learned(tokenizer, shard, 0) == f"{response}</s>"
    ids, targets = shard.example(0)
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert (np.diff(targets.astype(int)) != 0).sum() == 1  # one stretch, up to the end


def test_token_across_the_border_is_learned(write: Write, tokenizer: Any) -> None:
    """The model will meet "A: blood" with " blood" begun by one token, so that is what it must learn to write."""
    shard = write([pair("the", "blood")], template="{prompt} A: {response}")
    assert learned(tokenizer, shard, 0).strip() == "blood</s>"
    ids, _ = shard.example(0)
    assert ids[1:-1].tolist() == tokenizer("the A: blood", add_special_tokens=False)["input_ids"]


def test_text_is_learned_but_for_its_first_token(write: Write, tokenizer: Any) -> None:
    shard = write([{"text": "the blood moves"}])
    ids, targets = shard.example(0)
    assert text_of(tokenizer, shard, 0) == "<s>the blood moves</s>"
    assert targets.tolist() == [0] + [1] * (len(ids) - 1)


def test_chat_learns_assistant_turns_with_their_end_and_adds_nothing(write: Write, tiny_chat: Path) -> None:
    tokenizer = load_tokenizer(tiny_chat)
    turns = [("user", "hi é"), ("assistant", "the card"), ("user", "and?"), ("assistant", "blood 日")]
    shard = write([{"messages": [{"role": r, "content": c} for r, c in turns]}], tokenizer=tokenizer)
    assert text_of(tokenizer, shard, 0) == "".join(f"<|{r}|>\n{c}</s>\n" for r, c in turns)
    assert learned(tokenizer, shard, 0) == "the card</s>\nblood 日</s>\n"


def test_chat_template_for_prompt_response(write: Write, tiny_chat: Path) -> None:
    tokenizer = load_tokenizer(tiny_chat)
    shard = write([pair("hi", "the card")], tokenizer=tokenizer, template="chat")
    assert text_of(tokenizer, shard, 0) == "<|user|>\nhi</s>\n<|assistant|>\nthe card</s>\n"
    assert learned(tokenizer, shard, 0) == "the card</s>\n"


def test_tokenizer_without_beginning_token(write: Write, tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.bos_token = None
    shard = write([{"text": "the blood"}], tokenizer=tokenizer)
    ids, targets = shard.example(0)
    assert text_of(tokenizer, shard, 0) == "the blood</s>"
    assert targets.tolist() == [0] + [1] * (len(ids) - 1)


def test_real_records(write: Write, tokenizer: Any, shared: Path) -> None:
    records = [r for _, r in read_records(shared / "data/banking77/bank-a/test.jsonl", "prompt-response", {})][:200]
    shard = write(records, max_length=10_000)
    assert [learned(tokenizer, shard, i) for i in range(len(shard))] == [f"{r['response']}</s>" for r in records]


# Too long, too short, nothing


def test_truncation_keeps_the_beginning(write: Write, tokenizer: Any) -> None:
    whole = write([pair("the blood", "moves through the body of the patient")])
    ids, targets = (x.tolist() for x in whole.example(0))
    cut = write([pair("the blood", "moves through the body of the patient"), pair("a", "b")], max_length=len(ids) - 3)
    assert cut.example(0)[0].tolist() == ids[:-3]
    assert cut.example(0)[1].tolist() == targets[:-3]
    assert (cut.counts.examples, cut.counts.records, cut.counts.truncated, cut.counts.dropped) == (2, 2, 1, 0)


def test_exactly_as_long_as_allowed_is_not_truncated(write: Write) -> None:
    length = len(write([pair("the blood", "moves")]).example(0)[0])
    for long in ("truncate", "drop"):
        shard = write([pair("the blood", "moves")], max_length=length, long=long)
        assert (shard.counts.examples, shard.counts.truncated, shard.counts.dropped) == (1, 0, 0)


def test_example_without_a_token_to_learn_after_truncation_is_dropped(write: Write) -> None:
    shard = write([pair("the blood " * 50, "moves"), pair("a", "b")], max_length=30)
    assert (shard.counts.examples, shard.counts.truncated, shard.counts.dropped) == (1, 0, 1)


def test_drop(write: Write, tokenizer: Any) -> None:
    shard = write([pair("a", "the blood " * 50), pair("a", "b")], max_length=30, long="drop")
    assert (shard.counts.examples, shard.counts.records, shard.counts.truncated, shard.counts.dropped) == (1, 2, 0, 1)
    assert learned(tokenizer, shard, 0) == "b</s>"


@pytest.mark.parametrize("long", ["truncate", "drop"])
def test_long_text_becomes_windows_that_lose_nothing(write: Write, long: str) -> None:
    text = "The patient was given ten milligrams and went home the next day. " * 5
    whole = write([{"text": text}], max_length=10_000)
    cut = write([{"text": text}], max_length=16, long=long)
    assert len(cut) == -(-len(whole.tokens) // 16)
    assert cut.tokens.tolist() == whole.tokens.tolist()
    assert all(cut.example(i)[1].tolist() == [0] + [1] * (len(cut.example(i)[0]) - 1) for i in range(len(cut)))
    assert (cut.counts.records, cut.counts.truncated, cut.counts.dropped) == (1, 0, 0)


def test_nothing_to_learn_from(write: Write, tiny_chat: Path, tmp_path: Path) -> None:
    with pytest.raises(FederationError, match=r"silo 'a': train: holds no record"):
        write([])
    with pytest.raises(FederationError, match=r"no example fits data.max_length=8 with a token to learn \(the shortest of 2 has \d+\)"):
        write([pair("the blood " * 20, "x"), pair("the blood " * 9, "x")], max_length=8)
    with pytest.raises(FederationError, match="none of its 1 records has anything to learn"):
        write([{"messages": [{"role": "user", "content": "hi"}]}], tokenizer=load_tokenizer(tiny_chat))
    assert list(tmp_path.iterdir()) == []  # nothing half-made is left


def test_a_prompt_that_is_too_long_by_itself_is_not_to_be_cured_by_cutting(write: Write) -> None:
    long = [pair("the blood " * 20, "x")]
    with pytest.raises(FederationError, match="raise it: prompts alone are longer"):
        write(long, max_length=8)
    with pytest.raises(FederationError, match="raise it, or set long_examples: truncate"):
        write(long, max_length=8, long="drop")


@pytest.mark.parametrize("long", ["truncate", "drop"])
def test_counting_tells_what_writing_does(write: Write, tokenizer: Any, long: str) -> None:
    records = [pair("the heart", "moves " * n) for n in (1, 5, 40)] + [pair("the blood " * 20, "x"), {"text": "milligrams " * 30}]
    shard = write(records, max_length=32, long=long)
    counts = count_examples((("", r) for r in records), Tokeniser(tokenizer, TEMPLATE, 32, long))
    assert counts == shard.counts
    assert counts.lossy
    cut = {"truncate": "2 cut at 32 tokens, 1 left out", "drop": "3 left out"}[long]
    assert f"5 records in {counts.examples} examples, {cut}, with nothing to learn within 32 tokens" in counts.told(32)
    assert not write([pair("a", "b")] * 20).counts.lossy


def test_refused_record_is_named_by_place_not_content(write: Write) -> None:
    with pytest.raises(FederationError, match=r"^r\.jsonl, line 2: .* has no chat template") as caught:
        write([pair("a", "b"), {"messages": [{"role": "user", "content": "CANARY"}]}])
    assert "CANARY" not in str(caught.value)


# On disk


def test_files_are_as_documented(write: Write, tmp_path: Path) -> None:
    shard = write([pair("a", "b"), pair("the blood", "moves é")])
    folder = tmp_path / "train"
    assert sorted(p.name for p in folder.iterdir()) == ["offsets.i64", "shard.json", "targets.u8", "tokens.i32", "units.i32"]
    offsets = np.fromfile(folder / "offsets.i64", "<i8")
    ids, marks = np.fromfile(folder / "tokens.i32", "<i4"), np.fromfile(folder / "targets.u8", "u1")
    assert len(offsets) == 3
    for i in range(2):
        assert shard.example(i)[0].tolist() == ids[offsets[i] : offsets[i + 1]].tolist()
        assert shard.example(i)[1].tolist() == marks[offsets[i] : offsets[i + 1]].tolist()
    assert (shard.counts.tokens, shard.counts.targets) == (len(ids), marks.sum())
    assert shard.lengths(np.array([1, 0])).tolist() == [offsets[2] - offsets[1], offsets[1]]


def test_digest_depends_on_content_only(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [pair("a", "b"), pair("the blood", "moves"), pair("c", "d")]
    first = write(records)
    assert open_shard(tmp_path / "train").digest == first.digest
    monkeypatch.setattr(tokens, "CHUNK", 2)
    assert write(records, folder=tmp_path / "again").digest == first.digest
    assert write([pair("a", "b"), pair("the blood", "move"), pair("c", "d")]).digest != first.digest
    assert write(records[::-1]).digest != first.digest
    assert write(records, template="Q: {prompt}\n\n\n{response}").digest != first.digest


def test_leftovers_of_a_crash_are_ignored(write: Write, tmp_path: Path) -> None:
    expected = write([pair("a", "b")], folder=tmp_path / "clean").digest
    folder = tmp_path / "train"
    for half in (folder, folder.with_name(f".train.{os.getpid()}")):
        half.mkdir()
        (half / "tokens.i32").write_bytes(b"half")
    with pytest.raises(FileNotFoundError):
        open_shard(folder)
    assert write([pair("a", "b")]).digest == expected
    assert open_shard(folder).digest == expected
    assert json.loads((folder / "shard.json").read_text())["digest"] == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clean", "train"]
