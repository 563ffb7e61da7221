"""Strategies whose silos have a memory, against the papers' loops written out: SCAFFOLD's control variates, FedDyn's dual, and what both rest on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trials
import yaml

from silotune.components import opening
from silotune.components.errors import RefusedError
from silotune.components.evaluate import step as evaluate
from silotune.components.federation import Agreement, Federation
from silotune.components.learning import model as models
from silotune.components.learning.aggregation.summation import MEMORY
from silotune.components.learning.batches import batches, seed_of, stream, target_count
from silotune.components.learning.schedule import rate
from silotune.components.learning.training import token_losses
from silotune.components.preprocess import step as preprocess
from silotune.components.protocol import Commit
from silotune.components.provenance import retention
from silotune.components.silo_job import silo_home
from silotune.components.train import step as train
from silotune.components.train.memory import FILE, own_sum
from silotune.pipelines.simulate import Simulation

ALPHA = 0.5
MORE = {"rounds": {"total": 9, "quorum": 1, "guards": {"norm_band": None}}}


class Lab:
    """A federation of two silos, each of whose rounds may miss one of them."""

    def __init__(self, make_federation: Any, base: Path, folder: Path, strategy: str, **sections: Any) -> None:
        folder.mkdir(exist_ok=True)
        aggregation = {"mu": ALPHA} if strategy in ("feddyn", "fedprox") else {}
        self.base, self.silos, self.folder = base, ("east", "north"), folder
        self.file: Path = make_federation(folder, silos=self.silos, **trials.terms(base, strategy, aggregation, **MORE | sections))
        for silo in self.silos:
            preprocess.work(str(self.file), silo)
        self.federation, self.rounds = Federation.load(self.file), trials.rounds_of(self.file)

    def round(self, *present: str) -> Commit:
        turn = trials.begin(self.file)
        statuses = [train.work(str(self.file), s, turn.text) if s in present else f"{s} failed: killed by signal 9" for s in self.silos]
        return trials.close(self.file, turn, *statuses)

    def state(self, digest: str | None, silo: str | None = None) -> trials.Arrays:
        return trials.state(self.rounds, digest or "", self.folder, silo)

    def sent(self, commit: Commit) -> dict[str, trials.Arrays]:
        return trials.updates(self.rounds, commit, self.folder)

    def home(self, silo: str) -> Path:
        return silo_home(self.federation, self.federation.silo(silo))

    def agreement(self, latest: Commit) -> Agreement:
        """Of the open round, else of the last one."""
        plan = self.rounds.plan(latest.round + 1)
        return self.rounds.agreement(plan.agreement if plan else latest.agreement)

    def own(self, silo: str) -> trials.Arrays:
        latest = self.rounds.latest()
        assert latest is not None
        return own_sum(self.rounds, latest, self.agreement(latest), silo, self.home(silo))

    def textbook(self, commit: Commit, silo: str, offset: trials.Arrays, mu: float) -> tuple[trials.Arrays, trials.Arrays]:
        """(θ - θ₀, mean raw gradient) of a loop of torch's own AdamW, in which g + offset + μ(θ - θ₀) stands for g."""
        import torch

        agreement, plan = self.rounds.agreement(commit.agreement), self.rounds.plan(commit.round)
        assert plan is not None
        terms, before = agreement.training, self.state(commit.incoming)
        model = models.load_with_state(self.base, agreement.model, before).train()
        named = models.trainable(model)
        optimizer = torch.optim.AdamW(named.values(), lr=1.0, weight_decay=terms.weight_decay)
        shard, cursor, seen = train.open_split(self.home(silo), "train"), plan.participants[silo].cursor, dict.fromkeys(named, 0.0)
        pad = models.pad_id(models.load_tokenizer(self.base))
        torch.manual_seed(seed_of(agreement.federation, terms.seed, plan.round, silo, "dropout"))
        for step in range(terms.steps):
            indices = stream(len(shard), cursor, terms.batch_size, agreement.federation, terms.seed, silo)
            optimizer.zero_grad()
            for part in batches(shard, indices, terms.accumulation, agreement.data["max_length"], pad, terms.packing, (0, 1)):
                (token_losses(model, part).sum() / target_count(shard, indices)).backward()
            for name, p in named.items():
                seen[name] = seen[name] + p.grad.numpy().astype(np.float64) / terms.steps
                p.grad += torch.tensor(offset.get(name, np.zeros(p.shape, np.float32))).float() + mu * (
                    p.detach() - torch.tensor(before[name])
                )
            torch.nn.utils.clip_grad_norm_(named.values(), terms.max_grad_norm)
            optimizer.param_groups[0]["lr"] = rate(step, terms.steps, plan.learning_rate, terms.schedule, terms.warmup_steps)
            optimizer.step()
            cursor += terms.batch_size
        return {n: p.detach().numpy() - before[n] for n, p in named.items()}, seen


def close(found: trials.Arrays, wanted: trials.Arrays, atol: float = 1e-6) -> None:
    assert found.keys() == wanted.keys() != set()
    for name in found:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5 if atol else 0, atol=atol, err_msg=name)


def test_scaffold_is_the_papers(make_federation: Any, tiny_llama: Path, tmp_path: Path) -> None:
    lab = Lab(make_federation, tiny_llama, tmp_path / "lab", "scaffold")
    own: dict[str, trials.Arrays] = {silo: {} for silo in lab.silos}  # cᵢ
    common: trials.Arrays = {}  # c
    for present in (lab.silos, ("east",), lab.silos, lab.silos):  # a silo that misses a round keeps its cᵢ
        commit = lab.round(*present)
        sent = lab.sent(commit)
        assert sent.keys() == set(present)
        for silo in present:
            offset = {n: (common[n] - own[silo].get(n, 0.0)).astype(np.float32) for n in common}
            delta, gradient = lab.textbook(commit, silo, offset, 0.0)
            close({n: a for n, a in sent[silo].items() if not n.startswith(MEMORY)}, delta, 1e-5)
            close(
                {
                    n.removeprefix(MEMORY): a + own[silo].get(n.removeprefix(MEMORY), 0.0)
                    for n, a in sent[silo].items()
                    if n.startswith(MEMORY)
                },
                gradient,
            )
            own[silo] = gradient
        common = {n: sum(own[s].get(n, 0.0) for s in lab.silos) / len(lab.silos) for n in own["east"]}
        close({n.removeprefix("control."): a for n, a in lab.state(commit.server_state["optimizer"]).items()}, common)
        for silo in lab.silos:
            if own[silo]:
                close(lab.own(silo), own[silo])
        before, after = lab.state(commit.incoming), lab.state(commit.outgoing)
        shares = trials.shares(commit)
        close(after, {n: before[n] + sum(shares[s] * sent[s][n].astype(np.float64) for s in present) for n in before})
    assert max(np.abs(a).max() for a in common.values()) > 1e-3, "else nothing was compared"


def test_feddyn_is_the_papers(make_federation: Any, tiny_llama: Path, tmp_path: Path) -> None:
    lab = Lab(make_federation, tiny_llama, tmp_path / "lab", "feddyn")
    dual: dict[str, dict[str, Any]] = {silo: {} for silo in lab.silos}  # λᵢ = -α Σ Δᵢ, the gradient at the silo's own last model
    h: dict[str, Any] = {}
    for present in (lab.silos, ("north",), lab.silos):
        commit = lab.round(*present)
        sent, before = lab.sent(commit), lab.state(commit.incoming)
        for silo in present:
            delta, _ = lab.textbook(commit, silo, {n: np.asarray(-a, np.float32) for n, a in dual[silo].items()}, ALPHA)
            close(sent[silo], delta, 1e-5)
            dual[silo] = {n: dual[silo].get(n, 0.0) - ALPHA * sent[silo][n].astype(np.float64) for n in sent[silo]}
        h = {n: h.get(n, 0.0) - ALPHA / len(lab.silos) * sum(sent[s][n].astype(np.float64) for s in present) for n in before}
        close({n.removeprefix("h."): a for n, a in lab.state(commit.server_state["optimizer"]).items()}, h)
        mean = {n: np.mean([before[n] + sent[s][n] for s in present], axis=0) for n in before}
        close(lab.state(commit.outgoing), {n: mean[n] - h[n] / ALPHA for n in before}, 1e-5)
        assert {c.weight for c in commit.contributions.values()} == {1 / len(present)}


def test_fedprox_holds_silos_near_the_global(make_federation: Any, tiny_llama: Path, tmp_path: Path) -> None:
    lab = Lab(make_federation, tiny_llama, tmp_path / "lab", "fedprox")
    commit = lab.round(*lab.silos)
    plain = 0.0
    for silo, found in lab.sent(commit).items():
        close(found, lab.textbook(commit, silo, {}, ALPHA)[0], 1e-5)
        without, _ = lab.textbook(commit, silo, {}, 0.0)
        plain += max(np.abs(without[n] - found[n]).max() for n in found)
    assert plain > 1e-4, "else the term does nothing"


@pytest.mark.parametrize("strategy", ["scaffold", "feddyn"])
def test_a_lost_folder_is_made_again_from_the_store(make_federation: Any, tiny_llama: Path, tmp_path: Path, strategy: str) -> None:
    lab = Lab(make_federation, tiny_llama, tmp_path / "lab", strategy)
    for _ in range(3):
        lab.round(*lab.silos)
    known = lab.own("east")  # on top of what two rounds have left in the folder
    kept = (lab.home("east") / FILE).read_bytes()
    for damage in (b"", kept[:100], kept.replace(b"through", b"througt")):
        (lab.home("east") / FILE).write_bytes(damage)
        assert {n: a.tobytes() for n, a in lab.own("east").items()} == {n: a.tobytes() for n, a in known.items()}
        assert (lab.home("east") / FILE).read_bytes() == kept


@pytest.mark.parametrize("strategy", ["scaffold", "feddyn"])
def test_what_a_rollback_leaves_behind_never_happened(make_federation: Any, tiny_llama: Path, tmp_path: Path, strategy: str) -> None:
    rounds = {"total": 9, "quorum": 1, "guards": {"norm_band": None}, "rollback": {"max_loss_increase": 0.01}}
    lab = Lab(make_federation, tiny_llama, tmp_path / "lab", strategy, rounds=rounds)
    good = lab.round(*lab.silos)
    turn = trials.begin(lab.file)
    for i, silo in enumerate(lab.silos):
        evaluate.work(str(lab.file), silo, turn.text)  # of the good one; by training it would be done on the way
        trials.send(lab.rounds, silo, trials.made_up(lab.rounds, 2, silo, i, 3.0), tmp_path, 2)
    bad = trials.close(lab.file, turn)
    spoiled = lab.own("east")
    back = lab.round(*lab.silos)
    assert (back.outcome, back.back_to) == ("rolled-back", 1)
    own = lab.own("east")
    sent = lab.sent(good)["east"]
    close(own, {n.removeprefix(MEMORY): a for n, a in sent.items() if n.startswith(MEMORY) == (strategy == "scaffold")}, 0)
    assert any(np.abs(spoiled[n] - own[n]).max() > 1 for n in own), "the folder did hold what was left behind"
    plan = lab.rounds.plan(4)
    assert plan is not None
    assert plan.server_state == good.server_state != bad.server_state
    assert [c.round for c in opening.lineage(lab.rounds, back)] == [3, 1]
    assert lab.round(*lab.silos).outcome == "aggregated"


@pytest.mark.parametrize("strategy", ["scaffold", "feddyn", "fedavg"])
def test_retention_keeps_what_silos_still_need(make_federation: Any, tiny_llama: Path, tmp_path: Path, strategy: str) -> None:
    lab = Lab(make_federation, tiny_llama, tmp_path / "lab", strategy, storage={"retention": {"updates": 1}})
    for number in (1, 2, 3):
        _made_up_round(lab, number)
    due = retention.due(lab.federation, lab.rounds)
    if strategy == "fedavg":
        assert {silo: len(files) for silo, files in due.items()} == {"east": 2, "north": 2}
        return
    assert due == {}
    trials.edit(lab.file, aggregation={"strategy": "fedavg"})
    trials.begin(lab.file)
    due = retention.due(Federation.load(lab.file), lab.rounds)
    assert {silo: len(files) for silo, files in due.items()} == {"east": 3, "north": 3}, "nobody needs them any more"


def test_a_memory_that_is_gone_everywhere_is_refused_by_name(make_federation: Any, tiny_llama: Path, tmp_path: Path) -> None:
    lab = Lab(make_federation, tiny_llama, tmp_path / "lab", "scaffold")
    commits = [_made_up_round(lab, number) for number in (1, 2)]
    retention.erase(lab.rounds, {"east": [commits[0].contributions["east"].object]}, "asked for", "test")
    turn = trials.begin(lab.file)
    with pytest.raises(RefusedError, match=r"silo 'east': its update of round 1 is needed .* cannot be had") as caught:
        train.work(str(lab.file), "east", turn.text)
    assert caught.value.reason == "own rounds lost"
    assert train.work(str(lab.file), "north", turn.text).startswith("north ok")


def test_other_terms_begin_anew_on_both_sides(make_federation: Any, tiny_llama: Path, tmp_path: Path) -> None:
    lab = Lab(make_federation, tiny_llama, tmp_path / "lab", "scaffold")

    def amend(**aggregation: Any) -> None:
        trials.edit(lab.file, aggregation=aggregation)
        lab.federation = Federation.load(lab.file)

    lab.round(*lab.silos)
    lab.round(*lab.silos)  # the folder holds a sum now
    amend(strategy="scaffold", weights="uniform")
    third = lab.round(*lab.silos)
    number = third.round
    plan = lab.rounds.plan(number)
    assert plan is not None
    assert plan.server_state == {}, "no control variate of other terms"
    close(lab.own("east"), {n.removeprefix(MEMORY): a for n, a in lab.sent(third)["east"].items() if n.startswith(MEMORY)}, 0)
    amend(strategy="feddyn")
    trials.begin(lab.file)
    assert lab.own("east") == {}, "control variates are no dual"
    amend(strategy="scaffold", weights="uniform")
    trials.begin(lab.file)
    assert lab.own("east") == {}, "and both sides have begun anew in between"
    fourth = lab.round(*lab.silos)
    close(lab.own("east"), {n.removeprefix(MEMORY): a for n, a in lab.sent(fourth)["east"].items() if n.startswith(MEMORY)}, 0)


@pytest.mark.parametrize("strategy", ["scaffold", "feddyn", "fedadam"])
def test_where_silos_come_or_go_what_is_a_mean_over_all_of_them_begins_anew(
    make_federation: Any, tiny_llama: Path, tmp_path: Path, strategy: str
) -> None:
    """With the memory of one that has left, the server's would be off by it for good. A momentum is no silo's, and goes on."""
    lab = Lab(make_federation, tiny_llama, tmp_path / "lab", strategy)
    mean = strategy != "fedadam"

    def opened() -> tuple[bool, bool]:
        """Whether the server goes on with its state, and the silo with what its rounds have added up to."""
        trials.begin(lab.file)
        latest = lab.rounds.latest()
        assert latest is not None
        return bool(opening.carried_on(lab.rounds, latest, lab.agreement(latest))), mean and bool(lab.own("east"))

    made = _made_up_round(lab, 1)
    assert made.server_state
    trials.edit(lab.file, training={"steps": 3, "batch_size": 4, "learning_rate": 0.02})
    assert opened() == (True, mean), "all silos' parts are what they were"
    silos = yaml.safe_load(lab.file.read_text())["silos"]
    trials.edit(lab.file, silos=[s for s in silos if s["id"] == "east"])
    assert opened() == (not mean, False)
    trials.edit(lab.file, silos=silos)
    assert opened() == (not mean, False), "who comes again is new"
    _made_up_round(lab, 9)
    trials.edit_silo(lab.file, "north", training={"steps": 9})
    assert opened() == (strategy != "scaffold", strategy == "feddyn"), "another part of the mean by examples; feddyn counts all alike"


def _made_up_round(lab: Lab, number: int) -> Commit:
    turn = trials.begin(lab.file)
    for i, silo in enumerate(lab.silos):
        trials.send(lab.rounds, silo, trials.made_up(lab.rounds, turn.round, silo, 10 * number + i), lab.folder, turn.round)
    return trials.close(lab.file, turn)


def test_the_same_bytes_from_the_simulation(make_federation: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """It keeps one model for all silos; the lab loads it anew for each."""
    lab = Lab(make_federation, tiny_llama, tmp_path / "lab", "scaffold", rounds={"total": 2, "quorum": 1})
    other = Lab(make_federation, tiny_llama, tmp_path / "other", "scaffold", rounds={"total": 2, "quorum": 1})
    made = [lab.round(*lab.silos) for _ in range(2)]
    list(Simulation(other.file).run())
    assert [c.outgoing for c in made] == [other.rounds.commit(n).outgoing for n in (1, 2)]
