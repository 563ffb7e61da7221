"""Every strategy from the first round to the exported model, by the steps that a pipeline calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trials

from silotune.components.aggregate import lost_global
from silotune.components.aggregate import step as aggregate
from silotune.components.errors import FederationError, SilotuneError
from silotune.components.evaluate import step as evaluate
from silotune.components.learning import evaluation
from silotune.components.learning import model as models
from silotune.components.learning.aggregation.factors import CORE, DELTA, A, B
from silotune.components.learning.aggregation.server_optimizer import fedadam
from silotune.components.learning.exchange import held
from silotune.components.learning.tensor_file import open_tensor_file
from silotune.components.protocol import Commit
from silotune.components.provenance import chain
from silotune.components.rounds import Rounds
from silotune.components.silo_job import silo_home
from silotune.components.store.content import file_digest
from silotune.components.terms.strategies import STRATEGIES
from silotune.components.train import step as train
from silotune.pipelines.simulate import Simulation

STATEFUL = {n for n, s in STRATEGIES.items() if s.server != "add"}
VARIANTS = {"product-carry": ("product", {"carry": True})}


def chosen(name: str) -> tuple[str, dict[str, Any]]:
    return VARIANTS.get(name, (name, {}))


def run(make_federation: Any, folder: Path, base: Path, name: str, **sections: Any) -> Simulation:
    folder.mkdir(exist_ok=True)
    simulation = Simulation(make_federation(folder, **trials.terms(base, *chosen(name), **sections)))
    list(simulation.run())
    return simulation


@pytest.mark.parametrize("name", [*STRATEGIES, "product-carry"])
def test_a_strategy_from_start_to_export(make_federation: Any, tiny_llama: Path, tmp_path: Path, name: str) -> None:
    simulation = run(make_federation, tmp_path / "one", tiny_llama, name)
    rounds, commits = simulation.rounds, list(simulation.rounds.commits())
    strategy = STRATEGIES[chosen(name)[0]]

    losses = [r.loss for r in simulation.results()]
    assert len(losses) == 4
    assert losses[-1] < losses[1] < losses[0]
    assert all(not c.missing and c.contributions.keys() == set(trials.SILOS) for c in commits[1:])
    carried = {"optimizer"} if name in STATEFUL else {"rest"} if name == "product-carry" else set()
    assert all(c.server_state.keys() == carried for c in commits[1:])
    assert all((c.spectrum is not None) == (strategy.combine == "product") for c in commits[1:])
    assert len({c.server_state.get("optimizer") for c in commits[1:]}) == (3 if name in STATEFUL else 1)

    assert not chain.verify(rounds, deep=True).breaks
    for commit in commits[1:]:  # each from its own updates and the state before
        lost_and_made_again(rounds, commit, tmp_path)
    assert not chain.verify(rounds, deep=True).breaks

    for silo in trials.SILOS:
        assert evaluate.work(str(simulation.file), silo, "done:") == f"{silo} ok"
    where = Path(simulation.export())
    state = open_tensor_file(rounds.fetch_object(simulation._commit(None).outgoing, tmp_path / "global")).read_all()
    agreement = rounds.agreement(commits[-1].agreement)
    held = models.load_with_state(tiny_llama, agreement.model, state, trained=())
    np.testing.assert_allclose(logits(exported(where, tiny_llama, strategy.folds)), logits(held), rtol=1e-4, atol=1e-4)
    moved = np.abs(logits(held) - logits(models.load_base(tiny_llama, "float32"))).max()
    assert moved > 1e-3, "else there would be nothing to compare"


def lost_and_made_again(rounds: Rounds, commit: Commit, folder: Path) -> None:
    rounds.store.delete(rounds.object_key(commit.outgoing))
    path = folder / "again.safetensors"
    lost_global.fetch_global(rounds, commit, path)
    assert file_digest(path) == commit.outgoing
    assert rounds.object_size(commit.outgoing) == path.stat().st_size, "and it is back in the store"


def exported(where: Path, base: Path, merged: bool) -> Any:
    """As somebody loads it who has never heard of silotune."""
    from transformers import AutoModelForCausalLM

    if merged:
        return AutoModelForCausalLM.from_pretrained(where)
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), where)


def logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return np.asarray(model.eval()(input_ids=torch.arange(3, 40)[None]).logits.float().numpy())


# fedadam's stands for all of the server's optimisers: they differ in one function, which is tested by itself.
AGAIN = ["scaffold", "feddyn", "fedadam", "product-carry", "flora", "rolora", "fed-sb"]


@pytest.mark.parametrize("name", [n if n in ("scaffold", "flora") else pytest.param(n, marks=pytest.mark.slow) for n in AGAIN])
def test_a_second_run_and_a_killed_aggregation_give_the_same_bytes(
    make_federation: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rounds = {"total": 2, "quorum": 1}
    clean = run(make_federation, tmp_path / "one", tiny_llama, name, rounds=rounds)
    (tmp_path / "two").mkdir()
    file = make_federation(tmp_path / "two", **trials.terms(tiny_llama, *chosen(name), rounds=rounds))
    list(Simulation(file).run(rounds=1))
    turn = trials.begin(file)
    statuses = [train.work(str(file), silo, turn.text) for silo in trials.SILOS]
    with monkeypatch.context() as patch:
        patch.setattr(Rounds, "write_commit", lambda *_: (_ for _ in ()).throw(SilotuneError("killed")))
        with pytest.raises(SilotuneError, match="killed"):
            aggregate.work(str(file), turn.text, *statuses)
    trials.close(file, turn, *statuses)
    for one, two in zip(clean.rounds.commits(), trials.rounds_of(file).commits(), strict=True):
        assert (one.outgoing, one.server_state, one.spectrum) == (two.outgoing, two.server_state, two.spectrum)


# Unequal ranks

RANKS = {"east": 8, "north": 4, "south": 2}


@pytest.mark.parametrize("name", ["product", "flora"])
def test_silos_of_unequal_ranks(make_federation: Any, tiny_llama: Path, tmp_path: Path, name: str) -> None:
    lora = {"r": 8, "alpha": 16}
    file = make_federation(**trials.terms(tiny_llama, name, lora=lora, rounds={"total": 2, "quorum": 1}))
    for silo, rank in RANKS.items():
        trials.edit_silo(file, silo, lora={"r": rank})
    simulation = Simulation(file)
    results = list(simulation.run())
    assert results[-1].loss < results[0].loss < simulation.results()[0].loss
    rounds = simulation.rounds
    for number in (1, 2):
        commit = rounds.commit(number)
        before, after = (trials.state(rounds, d, tmp_path) for d in (commit.incoming or "", commit.outgoing))
        sent, weights = trials.updates(rounds, commit, tmp_path), trials.shares(commit)
        for silo, rank in RANKS.items():
            assert {a.shape[0] for n, a in sent[silo].items() if n.endswith(A)} == {rank}
            assert {a.shape[1] for n, a in sent[silo].items() if n.endswith(B)} == {rank}
        assert {a.shape[0] for n, a in after.items() if n.endswith(A)} == {8}
        size = {silo: c.bytes for silo, c in commit.contributions.items()}
        tensors = {silo: sum(a.nbytes for a in sent[silo].values()) for silo in RANKS}
        assert tensors["east"] == 2 * tensors["north"] == 4 * tensors["south"]
        assert size["east"] > size["north"] > size["south"]
        for module in trials.modules(before):
            mean = sum(weights[silo] * _own_product(before, sent[silo], module, rank) for silo, rank in RANKS.items())
            if name == "flora":
                old = before.get(module + DELTA, np.zeros_like(mean))
                assert not after[module + B].any()
                np.testing.assert_allclose(after[module + DELTA], old + trials.SCALE * mean, rtol=1e-5, atol=1e-7)
            else:
                u, s, v = np.linalg.svd(np.asarray(mean))
                best = (u[:, :8] * s[:8]) @ v[:8]
                np.testing.assert_allclose(trials.product(after, module), best, rtol=1e-4, atol=1e-6)
                for rank in RANKS.values():  # what a silo of that rank gets is the best of that rank
                    first = trials.product(held(after, rank), module)
                    np.testing.assert_allclose(first, (u[:, :rank] * s[:rank]) @ v[:rank], rtol=1e-3, atol=1e-5)


def _own_product(before: trials.Arrays, sent: trials.Arrays, module: str, rank: int) -> np.ndarray:
    """BᵢAᵢ of a silo, and what of the incoming product it could not hold."""
    b, a = before[module + B].astype(np.float64), before[module + A].astype(np.float64)
    own = (b[:, :rank] + sent[module + B]) @ (a[:rank] + sent[module + A])
    return np.asarray(own + b[:, rank:] @ a[rank:])


# What strategies send, and what comes of it


def test_fednova_counts_by_steps(make_federation: Any, tiny_llama: Path, tmp_path: Path) -> None:
    file = make_federation(**trials.terms(tiny_llama, "fednova", rounds={"total": 1, "quorum": 1}))
    trials.edit_silo(file, "north", training={"steps": 5})
    simulation = Simulation(file)
    list(simulation.run())
    commit = simulation.rounds.commit(1)
    steps = {silo: c.steps for silo, c in commit.contributions.items()}
    assert steps == {"east": 2, "north": 5, "south": 2}
    before, after = (trials.state(simulation.rounds, d, tmp_path) for d in (commit.incoming or "", commit.outgoing))
    sent, weights = trials.updates(simulation.rounds, commit, tmp_path), trials.shares(commit)
    effective = sum(weights[s] * steps[s] for s in steps)
    for name in after:
        step = effective * sum(weights[s] * sent[s][name].astype(np.float64) / steps[s] for s in steps)
        np.testing.assert_allclose(after[name], before[name] + step, rtol=1e-5, atol=1e-7)


def test_ffa_and_rolora_send_one_factor(make_federation: Any, tiny_llama: Path, tmp_path: Path) -> None:
    for name, endings in (("ffa", [{B}, {B}, {B}]), ("rolora", [{B}, {A}, {B}])):
        simulation = run(make_federation, tmp_path / name, tiny_llama, name)
        commits = list(simulation.rounds.commits())
        globals_ = [trials.state(simulation.rounds, c.outgoing, tmp_path) for c in commits]
        for commit, before, after, sent in zip(commits[1:], globals_, globals_[1:], endings, strict=False):
            for update in trials.updates(simulation.rounds, commit, tmp_path).values():
                assert {n[n.rindex(".lora") :] for n in update} == sent
            changed = {n[n.rindex(".lora") :] for n in after if not np.array_equal(before[n], after[n])}
            assert changed == sent


def test_rolora_takes_turns_by_the_rounds_that_came_to_something(make_federation: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """B is zero at first: in a round that trained A before any has trained B nothing would move, and the federation would stand still."""
    file = make_federation(**trials.terms(tiny_llama, "rolora", rounds={"total": 4, "quorum": 3, "on_missing_quorum": "skip"}))
    turn = trials.begin(file)
    assert trials.close(file, turn, *(f"{s} failed: killed by signal 9" for s in trials.SILOS)).outcome == "skipped"
    simulation = Simulation(file)
    list(simulation.run())
    commits = list(simulation.rounds.commits())
    assert [c.outcome for c in commits[1:]] == ["skipped", "aggregated", "aggregated", "aggregated"]
    sent = [next(iter(trials.updates(simulation.rounds, c, tmp_path).values())) for c in commits[2:]]
    assert [{n[n.rindex(".lora") :] for n in update} for update in sent] == [{B}, {A}, {B}]


def test_fed_sb_sends_cores_only(make_federation: Any, tiny_llama: Path, tmp_path: Path) -> None:
    simulation = run(make_federation, tmp_path / "one", tiny_llama, "fed-sb", lora={"r": 4, "alpha": 8})
    rounds, commit = simulation.rounds, simulation.rounds.commit(3)
    first, last = trials.state(rounds, rounds.commit(0).outgoing, tmp_path), trials.state(rounds, commit.outgoing, tmp_path)
    for update in trials.updates(rounds, commit, tmp_path).values():
        assert {n.removesuffix(CORE) for n in update} == set(trials.modules(last))
        assert sum(a.nbytes for a in update.values()) == 4 * 4 * 4 * len(trials.modules(last))
    assert all(np.array_equal(first[n], last[n]) for n in first if not n.endswith(CORE))
    # Round 3 was scored by the coordinator as plain pairs; here as silos hold it.
    agreement = rounds.agreement(commit.agreement)
    model = models.load_with_state(tiny_llama, agreement.model, last, trained=())
    known, pad = rounds.evaluations(commit.outgoing, "valid"), models.pad_id(models.load_tokenizer(tiny_llama))
    for silo, scored in known.items():
        shard = train.open_split(silo_home(simulation.federation, simulation.federation.silo(silo)), "valid")
        indices = evaluation.chosen(shard, None, agreement.federation, agreement.training.seed, silo, "valid")
        assert evaluation.evaluate(model, shard, indices, 8, 64, pad).loss_sum == pytest.approx(scored.loss_sum, rel=1e-5)


@pytest.mark.parametrize("name", ["fedex", "flora"])
def test_folded_into_the_base_the_mean_of_products_is_whole(make_federation: Any, tiny_llama: Path, tmp_path: Path, name: str) -> None:
    simulation = run(make_federation, tmp_path / "one", tiny_llama, name, rounds={"total": 2, "quorum": 1})
    rounds = simulation.rounds
    weights = dict(models.load_base(tiny_llama, "float32").named_parameters())
    merged: dict[str, np.ndarray] = {}
    for number in (1, 2):
        commit = rounds.commit(number)
        before, sent = trials.state(rounds, commit.incoming or "", tmp_path), trials.updates(rounds, commit, tmp_path)
        model, _ = simulation.model(number)
        found = {n: p.detach().numpy() for n, p in model.merge_and_unload().named_parameters()}
        for module in trials.modules(before):
            weight = module.removeprefix("base_model.model.") + ".weight"
            mean = sum(
                share
                * (before[module + B].astype(np.float64) + sent[s][module + B])
                @ (before[module + A].astype(np.float64) + sent[s][module + A])
                for s, share in trials.shares(commit).items()
            )
            at = weights[weight].detach().numpy() + before.get(module + DELTA, 0.0)
            merged[weight] = at + trials.SCALE * mean
            np.testing.assert_allclose(found[weight], merged[weight], atol=1e-5)
            assert np.abs(trials.SCALE * mean).max() > 1e-3


def test_diloco_moves_whole_models_by_nesterov(make_federation: Any, tiny_llama: Path, tmp_path: Path) -> None:
    sections = {"model": {"base": str(tiny_llama), "method": "full"}, "aggregation": {"strategy": "diloco"}}
    simulation = Simulation(make_federation(**sections, rounds={"total": 2, "quorum": 1}))
    losses = [r.loss for r in simulation.run()]
    rounds, commits = simulation.rounds, list(simulation.rounds.commits())
    assert losses[-1] < simulation.results()[0].loss
    velocity: dict[str, Any] = {}
    for commit in commits[1:]:
        before, after = (trials.state(rounds, d, tmp_path) for d in (commit.incoming or "", commit.outgoing))
        sent, shares = trials.updates(rounds, commit, tmp_path), trials.shares(commit)
        assert sent["east"].keys() == before.keys() == dict(models.load_base(tiny_llama, "float32").named_parameters()).keys()
        for name, array in before.items():
            mean = sum(share * sent[s][name].astype(np.float64) for s, share in shares.items())
            velocity[name] = 0.9 * velocity.get(name, 0.0) + mean
            np.testing.assert_allclose(after[name], array + 0.7 * (mean + 0.9 * velocity[name]), rtol=1e-5, atol=1e-7)


# Rank


def test_the_spectrum_is_tracked_over_the_rounds_and_a_lost_rank_is_told(
    make_federation: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silos send one direction only, so large that it drowns the others."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    more = {"lora": {"r": 4, "alpha": 8}, "rounds": {"total": 9, "quorum": 1, "guards": {"norm_band": None}}, "tracking": {"uri": uri}}
    file = make_federation(**trials.terms(tiny_llama, "product", **more))
    said: list[str] = []
    monkeypatch.setattr(aggregate, "tell", lambda box, what, silo="", detail="", **_: said.append(detail))
    commits = []
    for number in (1, 2, 3):
        turn = trials.begin(file)
        rounds = trials.rounds_of(file)
        for i, silo in enumerate(trials.SILOS):
            tensors = trials.made_up(rounds, turn.round, silo, i if number < 3 else 9, 0.1)
            if number == 3:
                only = 100 * np.eye(4, dtype=np.float32)[0]
                tensors = {n: a * (only[:, None] if n.endswith(A) else only) for n, a in tensors.items()}
            trials.send(rounds, silo, tensors, tmp_path, turn.round)
        commits.append(trials.close(file, turn))
        assert any("effective rank has fallen to" in why for why in said) == (number == 3)
    from mlflow.tracking import MlflowClient

    run = trials.rounds_of(file).tracking_run()
    assert run
    client = MlflowClient(tracking_uri=uri)
    for name, values in {
        "aggregate/residual": [c.spectrum.residual for c in commits if c.spectrum],
        "aggregate/effective_rank": [c.spectrum.effective_rank for c in commits if c.spectrum],
        "aggregate/least_effective_rank": [c.spectrum.least_effective_rank for c in commits if c.spectrum],
        "aggregate/singular_value/01": [c.spectrum.values[0] for c in commits if c.spectrum],
        "aggregate/singular_value/03": [c.spectrum.values[2] for c in commits if c.spectrum],
    }.items():
        assert len(values) == 3
        assert [(m.step, m.value) for m in client.get_metric_history(run.run, name)] == list(enumerate(values, 1))


# Amendments


def test_the_strategy_can_be_amended_from_round_to_round(make_federation: Any, tiny_llama: Path, tmp_path: Path) -> None:
    order = ["fedavg", "product", "fedavgm", "fedadam", "fedex", "product", "fedavgm", "flora", "scaffold", "feddyn", "scaffold"]
    file = make_federation(**trials.terms(tiny_llama, order[0], rounds={"total": 50, "quorum": 1, "guards": {"norm_band": None}}))
    made: list[Commit] = []
    folder = tmp_path / "sent"
    folder.mkdir()
    for at, name in enumerate(order):
        trials.edit(file, aggregation={"strategy": name}, export={"merge": True})
        for _ in range(2):  # the second round goes on with what the first has carried
            turn = trials.begin(file)
            rounds = trials.rounds_of(file)
            for i, silo in enumerate(trials.SILOS):
                trials.send(rounds, silo, trials.made_up(rounds, turn.round, silo, 100 * at + i), folder, turn.round)
            made.append(trials.close(file, turn))
            assert made[-1].server_state.keys() == ({"optimizer"} if name in STATEFUL else set())
    rounds = trials.rounds_of(file)
    assert not chain.verify(rounds, deep=True).breaks
    assert [c.outcome for c in rounds.commits()].count("amended") == len(order) - 1
    kept = [{n: a for n, a in trials.state(rounds, c.outgoing, tmp_path).items() if n.endswith(DELTA)} for c in made]
    assert not any(kept[:8])
    assert all(deltas.keys() == kept[8].keys() != set() for deltas in kept[8:]), "deltas stay"
    for one, two in ((9, 13), (15, 21)):  # product and fedavgm after fedex; scaffold and feddyn after flora
        assert all(np.array_equal(kept[one][n], kept[two][n]) for n in kept[one])
    # Of fedadam's first round, the state and the step are those of no state at all.
    first = made[6]
    before, after = (trials.state(rounds, d, tmp_path) for d in (first.incoming or "", first.outgoing))
    sent, adam = trials.updates(rounds, first, tmp_path), fedadam(0.01)
    for name in after:
        mean = np.mean([sent[s][name].astype(np.float64) for s in trials.SILOS], axis=0)
        step, _ = adam.step(mean, {kind: np.full(mean.shape, value) for kind, value in adam.initial.items()})
        np.testing.assert_allclose(after[name], before[name] + step, rtol=1e-5, atol=1e-7)
    state = trials.state(rounds, first.server_state["optimizer"], tmp_path)
    assert not any(DELTA in name for name in state), "nothing is carried of what no silo sends"
    # scaffold, feddyn, scaffold: the second time its control variate is the mean of that time's own rounds alone.
    control = trials.state(rounds, made[-1].server_state["optimizer"], tmp_path)
    total = [trials.updates(rounds, c, tmp_path) for c in made[-2:]]
    for name, found in control.items():
        own = sum(np.mean([u[s]["memory." + name.removeprefix("control.")] for s in trials.SILOS], axis=0) for u in total)
        np.testing.assert_allclose(found, own, atol=1e-7)


def test_what_adds_to_the_base_cannot_be_exported_as_an_adapter(make_federation: Any, tiny_llama: Path, tmp_path: Path) -> None:
    file = make_federation(**trials.terms(tiny_llama, "fedex", rounds={"total": 1, "quorum": 1}))
    list(Simulation(file).run())
    trials.edit(file, aggregation={"strategy": "fedavg"}, export={"merge": False})
    with pytest.raises(FederationError, match=r"export\.merge: must be true"):
        Simulation(file).export()
    trials.edit(file, export={"merge": True})
    assert (Path(Simulation(file).export()) / "model.safetensors").exists()


@pytest.mark.parametrize("order", [("fedavg", "fed-sb"), ("fed-sb", "product")])
def test_cores_come_and_go_with_a_new_federation_only(make_federation: Any, tiny_llama: Path, order: tuple[str, str]) -> None:
    file = make_federation(**trials.terms(tiny_llama, order[0]))
    trials.begin(file)
    trials.edit(file, aggregation={"strategy": order[1]})
    with pytest.raises(FederationError, match=r"aggregation\.strategy changed, which makes a new federation"):
        trials.begin(file)


# Baselines


def test_baselines_are_those_of_one_silo_whatever_the_strategy(make_federation: Any, tiny_llama: Path) -> None:
    robust = {"robust": {"rule": "fltrust", "trusted": "east"}}
    file = make_federation(**trials.terms(tiny_llama, "product", robust, lora={"r": 4, "alpha": 8}, rounds={"total": 1, "quorum": 1}))
    trials.edit_silo(file, "north", lora={"r": 2})
    simulation = Simulation(file)
    alone, together = simulation.alone("north"), simulation.centralised()
    assert (alone.federation.model.lora.r, alone.federation.model.lora.alpha) == (2, 4)
    assert together.federation.model.lora.r == 4
    for baseline in (alone, together):
        (result,) = baseline.run()
        assert result.loss < baseline.results()[0].loss


# Training


def test_a_kept_model_trains_what_the_next_strategy_trains(make_federation: Any, tiny_llama: Path) -> None:
    import torch

    terms = {"method": "lora", "dtype": "float32", "lora": {**trials.LORA, "dropout": 0.0}}
    state = models.initial_state(tiny_llama, terms, 1)
    only_b = [n for n in state if n.endswith(B)]
    with models.kept():
        first = models.load_with_state(tiny_llama, terms, state, only_b)
        assert sorted(models.trainable(first)) == sorted(only_b)
        for tensor in models.trainable(first).values():
            tensor.grad = torch.full_like(tensor, float("nan"))  # as a training leaves it whose loss was not finite
        again = models.load_with_state(tiny_llama, terms, state)
        assert again is first
        assert sorted(models.trainable(again)) == sorted(state)
        assert all(tensor.grad is None for tensor in models.trainable(again).values())
        only_a = [n for n in state if n.endswith(A)]
        assert sorted(models.trainable(models.load_with_state(tiny_llama, terms, state, only_a))) == sorted(only_a)
