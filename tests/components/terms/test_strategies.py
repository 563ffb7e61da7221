"""What of aggregation can be combined, and what is refused before anything runs."""

from pathlib import Path

import pytest
import yaml

from silotune.components.errors import FederationError
from silotune.components.federation import Federation
from silotune.components.terms import strategies
from silotune.components.terms.strategies import RULES, STRATEGIES, Aggregation, Robust


def written(folder: Path, *, silos: int = 3, ranks: dict[int, int] | None = None, **sections: object) -> Path:
    file = folder / "federation.yaml"
    parts = [{"id": f"silo-{i}", "train": f"{i}.jsonl"} for i in range(silos)]
    for i, rank in (ranks or {}).items():
        parts[i]["lora"] = {"r": rank}
    file.write_text(yaml.safe_dump({"name": "trial", "model": {"base": "./base"}, "silos": parts} | sections))
    return file


def problems(folder: Path, **given: object) -> str:
    with pytest.raises(FederationError) as caught:
        Federation.load(written(folder, **given))
    return str(caught.value)


def test_the_field_offers_what_the_table_holds_and_nothing_else():
    assert set(Aggregation.model_fields["strategy"].annotation.__args__) == set(STRATEGIES)
    assert set(Robust.model_fields["rule"].annotation.__args__) == set(RULES)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_can_be_chosen(tmp_path, name):
    export = {"merge": True} if STRATEGIES[name].folds else {}
    loaded = Federation.load(written(tmp_path, aggregation={"strategy": name}, export=export))
    assert loaded.aggregation.traits is STRATEGIES[name]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "product"),
        ({"ranks": {1: 4}}, "product"),
        ({"aggregation": {"robust": {"rule": "median"}}}, "product"),
        ({"aggregation": {"fan_in": 2}}, "fedavg"),
        ({"model": {"base": "./base", "method": "full"}}, "fedavg"),
        ({"privacy": {"epsilon": 8}}, "product"),
        ({"privacy": {"secure_aggregation": {}}, "aggregation": {"clip": {"norm": 1.0}}}, "fedavg"),
        ({"privacy": {"silo": {"epsilon": 8}}, "aggregation": {"clip": {"norm": 1.0}, "weights": "uniform"}}, "fedavg"),
        ({"aggregation": {"strategy": "ffa"}}, "ffa"),
    ],
)
def test_where_a_file_names_no_strategy_it_is_the_one_that_did_best_and_can_hold(tmp_path, given, name):
    federation = Federation.load(written(tmp_path, **given))
    assert federation.aggregation.strategy == name
    assert federation.agreement("b", "t").aggregation.strategy == name


@pytest.mark.parametrize("name", RULES)
def test_every_rule_can_be_chosen_with_product(tmp_path, name):
    robust = {"rule": name, "hostile": 1} | ({"trusted": "silo-0"} if name == "fltrust" else {})
    Federation.load(written(tmp_path, silos=7, aggregation={"strategy": "product", "robust": robust}))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"model": {"base": "./base", "method": "full"}, "aggregation": {"strategy": "product"}}, "product is for LoRA"),
        ({"ranks": {1: 4}, "aggregation": {"strategy": "fedavg"}}, "silos[1].lora.r: must be model.lora.r, 8, with aggregation.strategy"),
        ({"ranks": {1: 16}, "aggregation": {"strategy": "product"}}, "silos[1].lora.r: must be at most model.lora.r, 8, got 16"),
        ({"model": {"base": "./base", "method": "full"}, "ranks": {0: 4}}, "silos[0].lora.r: is for LoRA"),
        ({"aggregation": {"strategy": "fedex"}}, "export.merge: must be true"),
        ({"aggregation": {"strategy": "product", "mu": 0.1}}, "aggregation.mu: is for fedprox and feddyn"),
        ({"aggregation": {"strategy": "fedavg", "server": {"beta1": 0.5}}}, "aggregation.server: is for"),
        ({"aggregation": {"strategy": "fedadagrad", "server": {"beta1": 0.5}}}, "aggregation.server.beta1: has no part in fedadagrad"),
        ({"aggregation": {"strategy": "diloco", "server": {"beta2": 0.9}}}, "aggregation.server.beta2: has no part in diloco"),
        ({"aggregation": {"strategy": "fedavgm", "server": {"tau": 0.1}}}, "aggregation.server.tau: has no part in fedavgm"),
        ({"aggregation": {"strategy": "feddyn", "weights": "tokens"}}, "aggregation.weights: feddyn counts every silo as one, got tokens"),
        ({"aggregation": {"strategy": "scaffold", "weights": "tokens"}}, "aggregation.weights: tokens are not known beforehand"),
        ({"aggregation": {"strategy": "fedavg", "carry": True}}, "aggregation.carry: is for product"),
        ({"aggregation": {"clip": {"norm": 1.0, "quantile": 0.5}}}, "aggregation.clip: must hold either"),
        ({"aggregation": {"clip": {}}}, "aggregation.clip: must hold either"),
        ({"aggregation": {"strategy": "scaffold", "zeroing": True}}, "aggregation.zeroing: cannot hold with scaffold"),
        (
            {"aggregation": {"fan_in": 2, "strategy": "product"}},
            "aggregation.fan_in: is for means, which groups of silos can make apart, got 2 with product",
        ),
        ({"silos": 5, "aggregation": {"fan_in": 2, "robust": {"rule": "krum"}}}, "aggregation.fan_in: cannot hold with robust"),
        ({"aggregation": {"fan_in": 2, "clip": {"norm": 1.0}, "zeroing": True}}, "aggregation.fan_in: cannot hold with clip and zeroing"),
        (
            {"silos": 9, "aggregation": {"strategy": "scaffold", "robust": {"rule": "krum"}}},
            "aggregation.robust: cannot hold with scaffold",
        ),
        ({"aggregation": {"strategy": "fedit", "robust": {"rule": "median"}}}, "set aggregation.strategy: product"),
        ({"aggregation": {"strategy": "product", "robust": {"rule": "krum"}}}, "krum needs 5 silos against 1 hostile, got 3"),
        ({"aggregation": {"strategy": "product", "robust": {"rule": "fltrust"}}}, "trusted: must be the id of a silo"),
        ({"aggregation": {"strategy": "product", "robust": {"rule": "median", "trusted": "silo-0"}}}, "trusted: is for fltrust"),
        ({"aggregation": {"strategy": "product", "robust": {"rule": "median", "bound": 1.0}}}, "bound: is for norm-bound"),
        ({"aggregation": {"strategy": "fedsgd"}}, "aggregation.strategy"),
    ],
)
def test_what_cannot_hold_is_refused_with_its_place_and_the_cure(tmp_path, given, told):
    assert told in problems(tmp_path, **given)


def test_unequal_ranks_are_taken_by_the_strategies_that_say_so(tmp_path):
    for name, strategy in STRATEGIES.items():
        file = written(tmp_path, ranks={1: 4}, aggregation={"strategy": name}, export={"merge": strategy.folds})
        if strategy.unequal_ranks:
            agreement = Federation.load(file).agreement("b" * 64, "t" * 64)
            assert [agreement.rank_of(f"silo-{i}") for i in range(3)] == [8, 4, 8]
        else:
            with pytest.raises(FederationError, match="unequal ranks"):
                Federation.load(file)


def test_a_malformed_section_is_left_to_the_models(tmp_path):
    for raw in (
        {"aggregation": []},
        {"aggregation": {"strategy": 3}},
        {"model": 7},
        {"silos": [3]},
        {"aggregation": {"robust": 3, "clip": 2}},
    ):
        assert list(strategies.conflicts(raw)) == []


def test_a_rank_is_part_of_the_agreement(tmp_path):
    terms = {"aggregation": {"strategy": "product"}}
    equal = Federation.load(written(tmp_path, **terms)).agreement("b", "t")
    unequal = Federation.load(written(tmp_path, ranks={2: 4}, **terms)).agreement("b", "t")
    assert equal.changes(unequal) == ["silos.silo-2.lora"]
    assert equal.forbids(unequal) == []


@pytest.mark.parametrize(
    "aggregation", [{"fan_in": 3, "strategy": "product"}, {"strategy": "product"}, {"fan_in": 2}, {"fan_in": 16, "zeroing": True}]
)
def test_fan_in_hurts_nobody_who_has_no_need_of_groups_or_can_have_them(tmp_path, aggregation):
    Federation.load(written(tmp_path, silos=3, aggregation=aggregation))
