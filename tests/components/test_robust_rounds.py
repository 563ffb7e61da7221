"""Robust rules and bounds in whole rounds: a hostile silo among five, who signs what it sends; too few silos for a rule; bounds that adapt."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trials

from silotune.components.aggregate import lost_global
from silotune.components.errors import FederationError, QuorumError
from silotune.components.federation import Federation
from silotune.components.learning import evaluation
from silotune.components.learning import model as models
from silotune.components.learning.aggregation.factors import A, B
from silotune.components.preprocess import step as preprocess
from silotune.components.protocol import Commit
from silotune.components.provenance import chain
from silotune.components.silo_job import silo_home
from silotune.components.terms.strategies import RULES
from silotune.components.train import step as train
from silotune.pipelines.simulate import Simulation

FIVE = ("east", "mid", "north", "south", "west")
HOSTILE = "mid"
OPEN = {"total": 9, "quorum": 1, "guards": {"norm_band": None}}
BYTES: dict[tuple[str, ...], dict[str, trials.Arrays]] = {}  # what the silos' training came to, trained once for all these tests


def federation(
    make_federation: Any, base: Path, folder: Path, strategy: str, aggregation: dict[str, Any], silos: Any = FIVE, **more: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    sections = {"rounds": OPEN, "training": {"steps": 4, "batch_size": 3, "learning_rate": 0.02}} | more
    return Path(make_federation(folder, silos=silos, **trials.terms(base, strategy, aggregation, **sections)))


@pytest.fixture
def true_updates(make_federation: Any, tiny_llama: Path, tmp_path: Path) -> Any:
    """What silos' training of the first round comes to: the same under every rule, since all start from the same global by seed."""

    def of(silos: tuple[str, ...]) -> dict[str, trials.Arrays]:
        if silos not in BYTES:
            file = federation(make_federation, tiny_llama, tmp_path / "true", "fedavg", {}, silos, rounds=OPEN | {"total": 1})
            simulation = Simulation(file)
            list(simulation.run())
            BYTES[silos] = trials.updates(simulation.rounds, simulation.rounds.commit(1), tmp_path)
        return BYTES[silos]

    return of


def closed(file: Path, sent: dict[str, trials.Arrays], folder: Path) -> Commit:
    turn = trials.begin(file)
    rounds = trials.rounds_of(file)
    for silo, tensors in sent.items():
        trials.send(rounds, silo, tensors, folder, turn.round)
    return trials.close(file, turn)


def loss(file: Path, commit: Commit, base: Path, folder: Path) -> float:
    """Of a global on the honest silos' valid splits, nats per token."""
    rounds, terms = trials.rounds_of(file), Federation.load(file)
    agreement = rounds.agreement(commit.agreement)
    model = models.load_with_state(base, agreement.model, trials.state(rounds, commit.outgoing, folder))
    pad, total, tokens = models.pad_id(models.load_tokenizer(base)), 0.0, 0
    for silo in FIVE:
        if silo != HOSTILE:
            preprocess.work(str(file), silo)
            shard = train.open_split(silo_home(terms, terms.silo(silo)), "valid")
            score = evaluation.evaluate(model, shard, np.arange(len(shard)), 8, 64, pad)
            total, tokens = total + score.loss_sum, tokens + score.tokens
    return total / tokens


def poisoned(true: dict[str, trials.Arrays]) -> dict[str, trials.Arrays]:
    """The hostile silo's own update, its B a hundred times as large and the other way. With A turned as well the product would stay as it was."""
    return true | {HOSTILE: {n: a * np.float32(-100 if n.endswith(B) else 1) for n, a in true[HOSTILE].items()}}


WEIGHTS = [name for name, rule in RULES.items() if rule.kind == "weights"]
CASES = [*((name, "product") for name in RULES), *((name, "fedavg") for name in WEIGHTS)]


@pytest.mark.parametrize(("rule", "strategy"), CASES)
def test_a_hostile_silo_among_others(
    make_federation: Any, tiny_llama: Path, tmp_path: Path, true_updates: Any, rule: str, strategy: str
) -> None:
    silos = FIVE if rule != "bulyan" else (*FIVE, "upper", "vale")  # 4f + 3
    robust = {"rule": rule} | ({"trusted": "east"} if rule == "fltrust" else {})
    true = true_updates(silos)
    clean = federation(make_federation, tiny_llama, tmp_path / "clean", strategy, {}, silos)
    honest = closed(clean, true, tmp_path)
    start = loss(clean, trials.rounds_of(clean).commit(0), tiny_llama, tmp_path)
    wanted = loss(clean, honest, tiny_llama, tmp_path)
    file = federation(make_federation, tiny_llama, tmp_path / "robust", strategy, {"robust": robust}, silos)
    sent = poisoned(true)
    commit = closed(file, sent, tmp_path)
    found = loss(file, commit, tiny_llama, tmp_path)
    part = commit.contributions[HOSTILE]
    if rule == "foolsgold":  # knows several silos that push alike, and bears with nothing from one alone
        assert part.weight > 0
    else:
        assert found < start - 0.3 * (start - wanted), f"{found:.3f}, from {start:.3f}, {wanted:.3f} where all are honest"
    if rule in ("krum", "multi-krum", "bulyan", "fltrust"):
        assert part.weight == 0
        assert part.told
        assert part.score is not None
    if rule == "norm-bound":
        assert part.weight < 0.15
    if rule == "geometric-median":
        assert part.weight < 0.05
    if rule not in ("median", "trimmed-mean"):
        assert all(c.score is not None for c in commit.contributions.values())
    assert sum(c.weight for c in commit.contributions.values()) == pytest.approx(1)
    assert not chain.verify(trials.rounds_of(file), deep=True).breaks


@pytest.mark.parametrize("strategy", ["fedavg", "product"])
def test_without_a_rule_one_hostile_silo_is_enough(
    make_federation: Any, tiny_llama: Path, tmp_path: Path, true_updates: Any, strategy: str
) -> None:
    file = federation(make_federation, tiny_llama, tmp_path / "plain", strategy, {})
    commit = closed(file, poisoned(true_updates(FIVE)), tmp_path)
    start = loss(file, trials.rounds_of(file).commit(0), tiny_llama, tmp_path)
    assert loss(file, commit, tiny_llama, tmp_path) > start + 0.5


def test_where_factors_are_averaged_a_harmless_product_is_no_excuse(
    make_federation: Any, tiny_llama: Path, tmp_path: Path, true_updates: Any
) -> None:
    """A·c and B/c are the same product, and ruin the mean of A and the mean of B."""
    first = federation(make_federation, tiny_llama, tmp_path / "first", "fedavg", {})
    true = true_updates(FIVE)
    honest = closed(first, true, tmp_path)
    rounds = trials.rounds_of(first)
    before = trials.state(rounds, honest.incoming or "", tmp_path)
    bad = {}
    for name, delta in true[HOSTILE].items():
        factor = 1000.0 if name.endswith(A) else 1 / 1000.0
        bad[name] = (factor * (before[name].astype(np.float64) + delta) - before[name]).astype(np.float32)
    file = federation(make_federation, tiny_llama, tmp_path / "krum", "fedavg", {"robust": {"rule": "multi-krum"}})
    commit = closed(file, true | {HOSTILE: bad}, tmp_path)
    assert commit.contributions[HOSTILE].weight == 0
    assert loss(file, commit, tiny_llama, tmp_path) < loss(first, honest, tiny_llama, tmp_path) + 0.3


# Too few for the rule


@pytest.mark.parametrize(("rule", "strategy", "least"), [("krum", "product", 5), ("median", "product", 3), ("multi-krum", "fedavg", 5)])
def test_too_few_updates_for_a_rule_are_too_few_for_the_round(
    make_federation: Any, tiny_llama: Path, tmp_path: Path, rule: str, strategy: str, least: int
) -> None:
    file = federation(make_federation, tiny_llama, tmp_path / "few", strategy, {"robust": {"rule": rule}})
    turn, rounds = trials.begin(file), trials.rounds_of(file)
    for i, silo in enumerate(FIVE[: least - 1]):
        trials.send(rounds, silo, trials.made_up(rounds, 1, silo, i), tmp_path, 1)
    late = [f"{s} failed: killed by signal 9" for s in FIVE[least - 1 :]]
    with pytest.raises(
        QuorumError, match=rf"round 1 stays open: .*{rule} needs {least} updates against 1 hostile, {least - 1} came"
    ) as caught:
        trials.close(file, turn, *late)
    assert caught.value.exit_code == 3
    assert f"{FIVE[-1]:<20} failed: killed by signal 9" in str(caught.value)
    latest = rounds.latest()
    assert latest is not None
    assert latest.round == 0
    again = trials.begin(file)
    assert rounds.attempts(1)[-1].asked == list(FIVE[least - 1 :]), "what has come is kept"
    trials.send(rounds, FIVE[least - 1], trials.made_up(rounds, 1, FIVE[least - 1], 9), tmp_path, 1)
    assert len(trials.close(file, again).contributions) == least


def test_too_few_for_a_rule_are_skipped_where_too_few_silos_are(make_federation: Any, tiny_llama: Path, tmp_path: Path) -> None:
    robust = {"robust": {"rule": "krum"}}
    file = federation(make_federation, tiny_llama, tmp_path / "few", "product", robust, rounds=OPEN | {"on_missing_quorum": "skip"})
    turn, rounds = trials.begin(file), trials.rounds_of(file)
    trials.send(rounds, "east", trials.made_up(rounds, 1, "east", 0), tmp_path, 1)
    commit = trials.close(file, turn, "mid late: 1 of 4 steps")
    assert commit.outcome == "skipped"
    assert commit.missing["mid"] == "late: 1 of 4 steps"
    assert commit.outgoing == commit.incoming


def test_the_trusted_silo_must_be_there(make_federation: Any, tiny_llama: Path, tmp_path: Path) -> None:
    file = federation(make_federation, tiny_llama, tmp_path / "trust", "product", {"robust": {"rule": "fltrust", "trusted": "east"}})
    turn, rounds = trials.begin(file), trials.rounds_of(file)
    for i, silo in enumerate(FIVE[1:]):
        trials.send(rounds, silo, trials.made_up(rounds, 1, silo, i), tmp_path, 1)
    with pytest.raises(QuorumError, match="the update of silo 'east' has not come"):
        trials.close(file, turn, "east failed: killed by signal 9")


# Bounds


@pytest.mark.parametrize("strategy", ["fedavg", "product"])
def test_bounds_follow_the_norms_from_round_to_round(make_federation: Any, tiny_llama: Path, tmp_path: Path, strategy: str) -> None:
    bounds = {"zeroing": True, "clip": {"quantile": 0.5}}
    file = federation(make_federation, tiny_llama, tmp_path / "bounds", strategy, bounds)
    numbers: list[dict[str, float]] = []
    for number in (1, 2, 3):
        turn, rounds = trials.begin(file), trials.rounds_of(file)
        sent = {s: trials.made_up(rounds, number, s, 10 * number + i) for i, s in enumerate(FIVE)}
        if number == 2:
            sent[HOSTILE] = {n: 50 * a for n, a in sent[HOSTILE].items()}
        for silo, tensors in sent.items():
            trials.send(rounds, silo, tensors, tmp_path, number)
        commit = trials.close(file, turn)
        numbers.append(rounds.json_object(commit.server_state["numbers"]))
        told = {silo: c.told for silo, c in commit.contributions.items() if c.told}
        if number == 2:
            assert commit.contributions[HOSTILE].weight == 0
            assert "count as zero" in told[HOSTILE]
            assert commit.guards["change"] < 10 * rounds.commit(1).guards["change"]
        else:
            assert all("the bound is" in why for why in told.values())
            assert number == 3 or 0 < len(told) < 5
    assert all(found.keys() == {"zeroing", "clip"} for found in numbers)
    for one, two in pairwise(numbers):
        assert one != two
        assert 0.8 < two["clip"] / one["clip"] < 1.25, "by exp(0.2 · ½) at most"
    rounds, commit = trials.rounds_of(file), trials.rounds_of(file).commit(3)
    rounds.store.delete(rounds.object_key(commit.outgoing))
    lost_global.rebuild(rounds, commit, tmp_path / "again")  # from the numbers before, too; refuses other bytes
    assert rounds.object_size(commit.outgoing) > 0


def test_foolsgold_remembers(make_federation: Any, tiny_llama: Path, tmp_path: Path) -> None:
    file = federation(make_federation, tiny_llama, tmp_path / "gold", "product", {"robust": {"rule": "foolsgold"}})
    for number in (1, 2):
        turn, rounds = trials.begin(file), trials.rounds_of(file)
        for i, silo in enumerate(FIVE):
            twins = silo in ("mid", "west")  # who send the same, but for a hair
            tensors = trials.made_up(rounds, number, silo, 1000 * number if twins else 10 * number + i)
            trials.send(rounds, silo, {n: a * (1.0001 if silo == "mid" else 1.0) for n, a in tensors.items()}, tmp_path, number)
        commit = trials.close(file, turn)
        memory = rounds.json_object(commit.server_state["numbers"])["likeness"]
        assert memory["silos"] == list(FIVE)
        assert np.allclose(np.array(memory["weight"]), 1.0 if number == 1 else 1.9)
        twins_weight = sum(commit.contributions[s].weight for s in ("mid", "west"))
        assert twins_weight < 0.1


@pytest.mark.parametrize("given", [{"robust": {"rule": "krum"}}, {"zeroing": True}, {"clip": {"norm": 1.0}}])
def test_what_would_be_dropped_in_silence_is_refused(make_federation: Any, tiny_llama: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    file = federation(make_federation, tiny_llama, tmp_path / "carry", "product", {"carry": True} | given)
    with pytest.raises(FederationError, match=r"aggregation\.carry: cannot hold with"):
        Federation.load(file)
    if "robust" not in given:
        file = federation(make_federation, tiny_llama, tmp_path / "nova", "fednova", given)
        with pytest.raises(FederationError, match="which weighs updates by their steps"):
            Federation.load(file)
