"""A silo that leaves is cut out of the file and of nothing else, and is told what that means."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from three_hospitals import FILE, KEYS
from three_hospitals import load as load_hospitals

from silotune.components import keys
from silotune.components.errors import FederationError, RefusedError
from silotune.components.federation import Federation
from silotune.components.initialize import step as initialize
from silotune.components.protocol import Turn
from silotune.components.rounds import Rounds
from silotune.pipelines.membership import offboarding
from silotune.pipelines.simulate import Simulation

load = load_hospitals  # a fixture


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


def test_its_key_signs_nothing_from_the_next_round_on(make_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole course: three train, one leaves, two go on; what the one who left still writes, with its own key, is refused."""
    monkeypatch.setenv("SILOTUNE_KEYS", str(tmp_path / "keys"))
    public = {party: keys.new(tmp_path / "keys", party) for party in ("coordinator", "east", "north", "south")}
    file = make_federation(rounds={"total": 1, "quorum": 2}, security={"keys": public}, training={"steps": 1, "batch_size": 2})
    (first,) = Simulation(file).run()
    file.write_text(offboarding.without_silo(Federation.load(file), "east").replace("total: 1", "total: 2"))
    after = Rounds.of(Federation.load(file))
    assert set(first.silos) == {"east", "north", "south"}
    assert Turn.parse(initialize.work(str(file))).round == 2
    plan = after.plan(2)
    assert plan
    assert set(plan.participants) == set(after.agreement(plan.agreement).keys) - {"coordinator"} == {"north", "south"}

    sent = after.update(1, "east")
    assert sent, "what it sent before stays valid"
    key = after.key("rounds", "00002", "updates", "east.json")
    late = sent.model_copy(update={"round": 2, "plan": plan.digest, "agreement": plan.agreement, "incoming": plan.incoming})
    late = late.model_copy(update={"signature": keys.signature(keys.private_key(tmp_path / "keys" / "east.pem"), late.message(key))})
    assert after.store.create(key, late.encode())
    with pytest.raises(RefusedError, match=r"no key of security\.keys\.east that is good for round 2"):
        after.update(2, "east")
    (second,) = Simulation(file).run()
    assert (second.round, set(after.commit(2).contributions)) == (2, {"north", "south"})
