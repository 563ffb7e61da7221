"""What can be promised about records and silos, and what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from silotune.components.errors import FederationError
from silotune.components.federation import Federation
from silotune.components.terms import privacy as privacy_terms
from silotune.components.terms.privacy import SecureAggregation, most_in_league, sums_securely, threshold_of
from silotune.components.terms.strategies import STRATEGIES

CLIPPED = {"strategy": "fedavg", "weights": "uniform", "clip": {"norm": 1.0}}
SECURE = {"secure_aggregation": {}}


def written(folder: Path, *, silos: int = 5, **sections: Any) -> Path:
    file = folder / "federation.yaml"
    parts = [{"id": f"silo-{i}", "train": f"{i}.jsonl"} for i in range(silos)]
    file.write_text(yaml.safe_dump({"name": "trial", "model": {"base": "./base"}, "silos": parts} | sections))
    return file


def problems(folder: Path, **given: Any) -> str:
    with pytest.raises(FederationError) as caught:
        Federation.load(written(folder, **given))
    return str(caught.value)


@pytest.mark.parametrize("name", [n for n, s in STRATEGIES.items() if s.record_privacy])
def test_records_can_be_protected_under_every_strategy_that_says_so(tmp_path: Path, name: str) -> None:
    folds = STRATEGIES[name].folds
    Federation.load(written(tmp_path, aggregation={"strategy": name}, export={"merge": folds}, privacy={"epsilon": 8.0}))


@pytest.mark.parametrize("name", [n for n, s in STRATEGIES.items() if sums_securely(s)])
def test_sums_can_be_secret_under_every_strategy_that_is_one_sum(tmp_path: Path, name: str) -> None:
    Federation.load(written(tmp_path, aggregation=CLIPPED | {"strategy": name}, privacy=SECURE | {"epsilon": 3.0}))


def test_all_three_promises_hold_together(tmp_path: Path) -> None:
    silo = {"epsilon": 2.0, "mechanism": "discrete-gaussian"}
    Federation.load(written(tmp_path, aggregation=CLIPPED, privacy=SECURE | {"epsilon": 3.0, "silo": silo}))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"privacy": {"unit": "person", "epsilon": 1.0}}, "privacy.person_field: is required with privacy.unit: person"),
        ({"privacy": {"person_field": "who", "epsilon": 1.0}}, "privacy.person_field: is for privacy.unit: person"),
        ({"privacy": {"clip": 0.5}}, "privacy.clip: is for record-level privacy, which privacy.epsilon asks for"),
        ({"privacy": {"rounds": 5}}, "privacy.rounds: is for record-level privacy"),
        ({"privacy": {"epsilon": 1.0}, "aggregation": {"strategy": "scaffold"}}, "privacy.epsilon: cannot hold with aggregation.strategy scaffold"),
        ({"privacy": {"epsilon": 1.0}, "aggregation": {"strategy": "feddyn"}}, "privacy.epsilon: cannot hold with aggregation.strategy feddyn"),
        ({"privacy": {"epsilon": 1.0}, "aggregation": {"weights": "tokens"}}, "privacy.epsilon: cannot hold with aggregation.weights: tokens"),
        ({"privacy": {"epsilon": 1.0}, "training": {"max_grad_norm": 2.0}}, "training.max_grad_norm: has no meaning with privacy.epsilon"),
        ({"privacy": {"epsilon": 0.0}}, "privacy.epsilon: must be greater than 0"),
        ({"privacy": {"epsilon": 1.0, "delta": 1.0}}, "privacy.delta: must be less than 1"),
        ({"privacy": {"noise_multiplier": 1.0}}, "privacy.noise_multiplier: unknown key"),
        ({"privacy": {"silo": {"epsilon": 1.0}}, "aggregation": {"weights": "uniform"}}, "privacy.silo: needs aggregation.clip"),
        ({"privacy": {"silo": {"epsilon": 1.0}}, "aggregation": {"clip": {"norm": 1.0}}}, "privacy.silo: needs aggregation.weights: uniform"),
        ({"privacy": {"silo": {"epsilon": 1.0}}, "aggregation": CLIPPED | {"strategy": "product"}}, "privacy.silo: needs a mean of what silos send"),
        ({"privacy": {"silo": {"epsilon": 1.0}}, "aggregation": CLIPPED | {"robust": {"rule": "krum"}}}, "cannot hold with aggregation.robust"),
        ({"privacy": {"silo": {"epsilon": 1.0}}, "aggregation": CLIPPED | {"zeroing": True}}, "cannot hold with aggregation.zeroing"),
        ({"privacy": {"silo": {"epsilon": 1.0, "mechanism": "discrete-gaussian"}}, "aggregation": CLIPPED}, "is for privacy.secure_aggregation"),
        ({"privacy": SECURE | {"silo": {"epsilon": 1.0}}, "aggregation": CLIPPED}, "must be discrete-gaussian with privacy.secure_aggregation"),
        (
            {"privacy": {"silo": {"epsilon": 1.0, "mechanism": "tree"}}, "aggregation": CLIPPED | {"clip": {"quantile": 0.5}}},
            "tree needs a fixed bound",
        ),
        ({"privacy": SECURE, "aggregation": CLIPPED | {"strategy": "product"}}, "needs a strategy that is one sum, got product"),
        ({"privacy": SECURE, "aggregation": CLIPPED | {"strategy": "fednova"}}, "needs a strategy that is one sum, got fednova"),
        ({"privacy": SECURE, "aggregation": CLIPPED, "communication": {"codec": "bfloat16"}}, "sends whole numbers of its own, got communication.codec"),
        ({"privacy": SECURE}, "privacy.secure_aggregation: needs aggregation.clip.norm"),
        ({"privacy": SECURE, "aggregation": CLIPPED | {"clip": {"quantile": 0.5}}}, "needs aggregation.clip.norm"),
        ({"privacy": SECURE, "aggregation": CLIPPED | {"weights": "tokens"}}, "cannot hold with aggregation.weights: tokens"),
        ({"privacy": SECURE, "aggregation": CLIPPED | {"zeroing": True}}, "cannot hold with aggregation.zeroing"),
        ({"privacy": SECURE, "aggregation": CLIPPED | {"fan_in": 3}}, "cannot hold with aggregation.fan_in"),
        ({"silos": 2, "privacy": SECURE, "aggregation": CLIPPED}, "needs three silos"),
        ({"privacy": {"secure_aggregation": {"threshold": 2}}, "aggregation": CLIPPED}, "threshold: must be more than half of the 5 silos"),
        ({"privacy": {"secure_aggregation": {"threshold": 6}}, "aggregation": CLIPPED}, "and at most all, got 6"),
        ({"privacy": SECURE, "aggregation": CLIPPED, "security": {"signing": False}}, "cannot hold with security.signing: false"),
    ],
)  # fmt: skip
def test_what_cannot_hold_is_refused_with_its_place_and_the_cure(tmp_path: Path, given: dict[str, Any], told: str) -> None:
    assert told in problems(tmp_path, **given)


def test_silos_of_unequal_rank_have_no_sum_of_one_shape(tmp_path: Path) -> None:
    silos = [{"id": f"silo-{i}", "train": f"{i}.jsonl", "lora": {"r": 8}} for i in range(3)]
    terms = {"name": "trial", "model": {"base": "./base"}, "silos": silos, "aggregation": CLIPPED, "privacy": SECURE}
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(terms))
    with pytest.raises(FederationError, match=r"cannot hold with silos' own lora\.r"):
        Federation.load(tmp_path / "f.yaml")


def test_a_malformed_section_is_left_to_the_models() -> None:
    for raw in ({"privacy": []}, {"privacy": {"epsilon": 1.0}, "aggregation": {"strategy": 3}}, {"privacy": SECURE, "silos": [3]}):
        assert all(isinstance(line, str) for line in privacy_terms.conflicts(raw))


@pytest.mark.parametrize("silos", range(3, 40))
def test_the_usual_threshold_leaves_no_room_for_a_third_of_the_silos_to_open_two_sums(silos: int) -> None:
    threshold = threshold_of(SecureAggregation(), silos)
    colluding = (silos - 1) // 3
    assert threshold <= silos
    assert 2 * threshold > silos + colluding, "each honest silo signs once, a colluding one twice"
    assert most_in_league(SecureAggregation(), silos) >= colluding


@pytest.mark.parametrize("silos", range(3, 40))
def test_no_two_sets_get_a_threshold_of_signatures_and_with_one_more_in_league_they_do(silos: int) -> None:
    for threshold in range(silos // 2 + 1, silos + 1):
        most = most_in_league(SecureAggregation(threshold=threshold), silos)
        assert 0 <= most < threshold
        for league in (most, most + 1):
            shared_out = (silos - league) // 2  # honest silos that can be had for the set that gets fewer
            assert (league + shared_out >= threshold) == (league > most)


def test_rounds_that_noise_is_planned_for_are_agreed_on(tmp_path: Path) -> None:
    def agreed(**sections: Any) -> Any:
        return Federation.load(written(tmp_path, **sections)).agreement("b", "t")

    planned = agreed(privacy={"epsilon": 8.0}, rounds={"total": 6})
    assert planned.privacy.rounds == 6
    assert planned.changes(agreed(privacy={"epsilon": 8.0}, rounds={"total": 7})) == ["privacy.rounds"]
    fixed = agreed(privacy={"epsilon": 8.0, "rounds": 9}, rounds={"total": 6})
    assert fixed.changes(agreed(privacy={"epsilon": 8.0, "rounds": 9}, rounds={"total": 7})) == []
    assert agreed(rounds={"total": 6}).changes(agreed(rounds={"total": 7})) == [], "without a promise, rounds are free"
