"""A silo that leaves is cut out of the file and of nothing else, and is told what that means."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from silotune.components.errors import FederationError
from silotune.components.federation import Federation
from silotune.pipelines import offboarding

KEYS = {party: f"ed25519:{'A' * 42}{letter}=" for party, letter in (("coordinator", "A"), ("north", "E"), ("south", "I"), ("west", "M"))}
FILE = f"""\
# The terms of three hospitals.
name: trial
model: {{base: /silo/base}}
silos:   # in the order of their joining
  # the one in the north
  - id: north
    train: /silo/north/train.jsonl   # since May
    storage: /silo/north
  # the one in the south
  - id: south
    train: /silo/south/train.jsonl
    storage: /silo/south

  # the one in the west
  - {{id: west, train: /silo/west/train.jsonl, storage: /silo/west}}
# how it goes on
rounds: {{total: 3, quorum: 2, deadline: 30m}}
storage: {{root: "s3://bucket/team"}}
security:
  keys:
    coordinator: {KEYS["coordinator"]}
    north: {KEYS["north"]}   # by telephone
    south:
      - {{public: "{KEYS["south"]}", since: 2}}
    west: {KEYS["west"]}
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Federation]:
    def write(old: str = "", new: str = "", text: str = FILE) -> Federation:
        assert old in text
        (tmp_path / "f.yaml").write_text(text.replace(old, new))
        return Federation.load(tmp_path / "f.yaml")

    return write


def test_a_silo_is_cut_out_and_comments_stay(load: Callable[..., Federation]) -> None:
    text = offboarding.without_silo(load(), "south")
    gone = (
        "  # the one in the south\n", "  - id: south\n", "    train: /silo/south/train.jsonl\n", "    storage: /silo/south\n",
        "    south:\n", f'      - {{public: "{KEYS["south"]}", since: 2}}\n',
    )  # fmt: skip
    expected = FILE
    for line in gone:
        expected = expected.replace(line, "")
    assert text == expected


@pytest.mark.parametrize("silo", ["north", "south", "west"])
def test_what_is_left_is_the_same_federation_without_it(load: Callable[..., Federation], silo: str) -> None:
    before = load()
    after = load("", "", offboarding.without_silo(before, silo))
    assert after.silo_ids == [s for s in before.silo_ids if s != silo]
    assert after.public_keys == {party: keys for party, keys in before.public_keys.items() if party != silo}
    assert after.model_dump(exclude={"silos", "security"}) == before.model_dump(exclude={"silos", "security"})


@pytest.mark.parametrize("silo", ["a", "b", "c"])
def test_a_flow_list_is_cut_as_well(load: Callable[..., Federation], silo: str) -> None:
    items = ", ".join(f"{{id: {s}, train: /silo/{s}.jsonl, storage: /silo/{s}}}" for s in "abc")
    text = f"name: t\nmodel: {{base: /b}}\nsilos: [{items}]  # three\n"
    after = offboarding.without_silo(load(text=text), silo)
    assert [s["id"] for s in yaml.safe_load(after)["silos"]] == [s for s in "abc" if s != silo]
    assert after.endswith("]  # three\n")


def test_a_silo_that_the_quorum_needs_stays(load: Callable[..., Federation]) -> None:
    for quorum in ("3", "{count: 3}"):
        federation = load("quorum: 2", f"quorum: {quorum}")
        for leave in (offboarding.without_silo, offboarding.offboard_text):
            with pytest.raises(FederationError, match="at most the number of silos, 2 without south, got 3; lower it first"):
                leave(federation, "south")


def test_the_last_silo_and_a_stranger_cannot_leave(load: Callable[..., Federation]) -> None:
    alone = load(text="name: t\nmodel: {base: /b}\nsilos:\n  - {id: a, train: /a}\n")
    with pytest.raises(FederationError, match="the only silo"):
        offboarding.without_silo(alone, "a")
    with pytest.raises(FederationError, match="is not in federation"):
        offboarding.offboard_text(alone, "b")


def test_a_text_that_cannot_be_cut_safely_is_refused(load: Callable[..., Federation]) -> None:
    text = "name: t\nmodel: {base: /b}\nsilos:\n  - &x\n    id: a\n    train: &t /a\n  - {id: b, train: *t}\n  - {id: c, train: /c}\n"
    with pytest.raises(FederationError, match="cut out safely; take its item and its key out by hand"):
        offboarding.without_silo(load(text=text), "a")


def test_leaving_is_told_with_its_round_and_its_commands(load: Callable[..., Federation]) -> None:
    text = offboarding.offboard_text(load(), "south", 4)
    assert "From round 4 on" in text
    assert "Left: north, west; the quorum is\n2 of 2" in text
    assert "Three silos or more hide an update" in text
    for command in ("silotune gc f.yaml --silo south", "kubectl --namespace silotune-south delete rolebinding", "s3://bucket/team/trial"):
        assert command in text
    assert "the next round that is opened" in offboarding.offboard_text(load(), "south")
    assert not re.search(r"[{}]", text)
