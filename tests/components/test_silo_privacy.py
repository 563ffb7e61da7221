"""Silo-level privacy in whole rounds: what noise a global has, what is spent, and what nobody is told."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trials

from silotune.components import silo_promise, tracking
from silotune.components.aggregate import lost_global, releases
from silotune.components.errors import FederationError, RefusedError, SilotuneError, UnreachableError
from silotune.components.federation import Federation
from silotune.components.learning.privacy import gaussian, prefix_tree
from silotune.components.learning.privacy.accounting import Mechanism, epsilon
from silotune.components.learning.privacy.noise import grid_of
from silotune.components.learning.privacy.silo_noise import SHARE
from silotune.components.provenance import chain
from silotune.components.rounds import Rounds

CLIP, EPSILON, DELTA, TOTAL = 0.05, 2.0, 1e-5, 3
SILO = {"epsilon": EPSILON, "delta": DELTA}
Z = gaussian.noise_multiplier_of(EPSILON, DELTA, TOTAL)


@pytest.fixture
def file(make_federation: Any, tiny_llama: Path, tmp_path: Path) -> Any:
    def made(clip: Any = None, silo: Any = None, strategy: str = "fedavg", **sections: Any) -> Path:
        aggregation = {"weights": "uniform", "clip": clip or {"norm": CLIP}}
        sections = {"rounds": {"total": TOTAL, "quorum": 1}, "privacy": {"silo": SILO | (silo or {})}} | sections
        return Path(make_federation(tmp_path, silos=trials.SILOS, **trials.terms(tiny_llama, strategy, aggregation, **sections)))

    return made


def sent(file: Path, turn: Any, folder: Path, silos: Any = trials.SILOS, size: float = 0.01) -> dict[str, trials.Arrays]:
    rounds = trials.rounds_of(file)
    found = {s: trials.made_up(rounds, turn.round, s, seed=10 * turn.round + i, size=size * (i + 1)) for i, s in enumerate(silos)}
    for silo, tensors in found.items():
        trials.send(rounds, silo, tensors, folder, turn.round)
    return found


def clipped_mean(updates: dict[str, trials.Arrays], bound: float = CLIP) -> trials.Arrays:
    """As a plain loop has it."""
    total: dict[str, Any] = {}
    for tensors in updates.values():
        norm = math.sqrt(sum(float(np.sum(np.square(a, dtype=np.float64))) for a in tensors.values()))
        for name, array in tensors.items():
            total[name] = total.get(name, 0.0) + array.astype(np.float64) * min(1.0, bound / norm)
    return {name: array / len(updates) for name, array in total.items()}


def noise_of(file: Path, number: int, updates: dict[str, trials.Arrays], folder: Path, bound: float = CLIP) -> np.ndarray:
    """What the sum behind a global has beside the clipped updates."""
    rounds = trials.rounds_of(file)
    commit = rounds.commit(number)
    before, after = (trials.state(rounds, digest, folder) for digest in (commit.incoming, commit.outgoing))
    mean = clipped_mean(updates, bound)
    return np.concatenate([((after[n].astype(np.float64) - before[n] - mean[n]) * len(updates)).ravel() for n in sorted(mean)])


def test_a_global_is_the_clipped_mean_and_noise_of_the_planned_deviation(file: Any, tmp_path: Path) -> None:
    path = file()
    turn = trials.begin(path)
    updates = sent(path, turn, tmp_path)
    commit = trials.close(path, turn)
    noise = noise_of(path, 1, updates, tmp_path) / (Z * CLIP)
    count = len(noise)
    assert abs(noise.mean()) < 4 / math.sqrt(count)
    assert noise.std() == pytest.approx(1, abs=4 / math.sqrt(2 * count))
    assert [c.weight for c in commit.contributions.values()] == pytest.approx([1 / 3] * 3)


def test_nobody_is_told_what_no_noise_covers(file: Any, tmp_path: Path) -> None:
    path = file()
    turn = trials.begin(path)
    sent(path, turn, tmp_path)
    commit = trials.close(path, turn)
    assert all(c.norm is None and c.told == "" and c.score is None for c in commit.contributions.values())
    assert not {"least norm", "greatest norm"} & set(commit.guards)
    assert not any("update_norm" in name for (name, _), _ in tracking.metrics(trials.rounds_of(path), complete=True))


def test_rounds_spend_epsilon_up_to_what_was_promised_and_no_more(file: Any, tmp_path: Path) -> None:
    path = file(silo={}, rounds={"total": TOTAL, "quorum": 1})
    for number in range(1, TOTAL + 1):
        turn = trials.begin(path)
        sent(path, turn, tmp_path)
        commit = trials.close(path, turn)
        assert commit.guards["silo epsilon"] == pytest.approx(gaussian.epsilon_of(DELTA, math.sqrt(number) / Z), rel=1e-6)
    assert commit.guards["silo epsilon"] == pytest.approx(EPSILON, rel=1e-6)
    assert commit.guards["silo epsilon"] <= EPSILON * (1 + 1e-8)
    found = {
        step: value
        for (name, step), (value, _) in tracking.metrics(trials.rounds_of(path), complete=True)
        if name == "privacy/silo_epsilon"
    }
    assert sorted(found) == [1, 2, 3]
    assert sorted(found.values()) == list(found.values())
    # Two rounds more under the same promise: noise is planned anew, but there is nothing left to spend, so that nobody trains.
    trials.edit(path, rounds={"total": TOTAL + 2, "quorum": 1})
    turn = trials.begin(path)
    assert turn.done == (
        "2 of privacy.silo's epsilon 2 is spent, planned for 5 rounds; for more of them raise privacy.silo.epsilon and privacy.rounds together, "
        "if all silos agree"
    )
    assert trials.rounds_of(path).plan(TOTAL + 1) is None


@pytest.mark.parametrize("mechanism", ["gaussian", "tree"])
def test_a_round_beyond_the_planned_ones_is_not_opened(file: Any, tmp_path: Path, mechanism: str) -> None:
    """Two planned, three asked for: the run ends with the second, so that it is evaluated and exported, and nobody trains a third."""
    path = file(privacy={"silo": SILO | {"mechanism": mechanism}, "rounds": 2})
    for number in (1, 2):
        turn = trials.begin(path)
        assert turn.round == number
        sent(path, turn, tmp_path)
        trials.close(path, turn)
    assert trials.rounds_of(path).plan(3) is None
    assert "planned for 2 rounds; for more of them raise" in trials.begin(path).done
    trials.edit(path, privacy={"silo": SILO | {"mechanism": mechanism, "epsilon": 2 * EPSILON}, "rounds": 3})
    assert trials.begin(path).round == 3


def test_a_sum_that_the_budget_does_not_hold_is_not_published(file: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Whoever opens the round: the release itself is refused."""
    path = file(privacy={"silo": SILO, "rounds": 1})
    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(silo_promise, "spent_out", lambda *_: "")
            turn = trials.begin(path)
        sent(path, turn, tmp_path)
        if turn.round == 1:
            trials.close(path, turn)
    with pytest.raises(
        RefusedError, match=r"privacy\.silo: epsilon 2 at delta 1e-05 was planned for 1 rounds, and 2 of it is spent"
    ) as caught:
        trials.close(path, turn)
    assert caught.value.reason == "budget"
    assert trials.rounds_of(path).latest().round == 1


@pytest.mark.parametrize("mechanism", ["gaussian", "tree"])
def test_the_coordinator_needs_no_accountant_for_it(file: Any, tmp_path: Path, monkeypatch: Any, mechanism: str) -> None:
    """Its image is without dp-accounting and SciPy."""
    for name in ("dp_accounting", "scipy"):
        monkeypatch.setitem(sys.modules, name, None)
    path = file(silo={"mechanism": mechanism})
    turn = trials.begin(path)
    sent(path, turn, tmp_path)
    assert trials.close(path, turn).guards["silo epsilon"] > 0
    with pytest.raises(SilotuneError, match=r"dp-accounting: is needed .* in the silo's image"):
        epsilon([Mechanism(sampling_probability=0.01, noise_multiplier=1.37, steps=3)], DELTA)


def test_a_higher_promise_goes_on_from_what_is_spent(file: Any, tmp_path: Path) -> None:
    path = file(rounds={"total": 1, "quorum": 1})
    turn = trials.begin(path)
    sent(path, turn, tmp_path)
    trials.close(path, turn)
    trials.edit(path, rounds={"total": 2, "quorum": 1}, privacy={"silo": SILO | {"epsilon": 8.0}})
    turn = trials.begin(path)
    sent(path, turn, tmp_path)
    commit = trials.close(path, turn)
    first, second = gaussian.mu_of(EPSILON, DELTA), 1 / gaussian.noise_multiplier_of(8.0, DELTA, 2)
    assert commit.guards["silo epsilon"] == pytest.approx(gaussian.epsilon_of(DELTA, gaussian.composed([first, second])), rel=1e-6)
    assert EPSILON < commit.guards["silo epsilon"] < 8.0


def test_the_same_sum_has_the_same_noise_and_any_other_fresh_noise(file: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """A crash after the global was stored: a silo that delivers in the meantime is not summed with, and nothing is spent twice."""
    path = file()
    turn = trials.begin(path)
    updates = sent(path, turn, tmp_path, silos=("east", "north"))
    stored: list[str] = []

    def die(self: Rounds, commit: Any) -> Any:
        stored.append(commit.outgoing)
        raise UnreachableError("the store is gone")

    with monkeypatch.context() as patched:
        patched.setattr(Rounds, "write_commit", die)
        with pytest.raises(UnreachableError):
            trials.close(path, turn, "south late")
    trials.send(trials.rounds_of(path), "south", trials.made_up(trials.rounds_of(path), 1, "south", seed=5), tmp_path, 1)
    commit = trials.close(path, turn, "south late")
    assert commit.outgoing == stored[0]
    assert set(commit.contributions) == set(updates)
    assert commit.missing["south"] == "late: the round was summed before its update came"
    assert len(list(trials.rounds_of(path).releases())) == 1
    noise = noise_of(path, 1, updates, tmp_path)
    turn = trials.begin(path)
    updates = sent(path, turn, tmp_path)
    trials.close(path, turn)
    other = noise_of(path, 2, updates, tmp_path)
    assert abs(np.corrcoef(noise, other)[0, 1]) < 5 / math.sqrt(len(noise))


@pytest.mark.parametrize("mechanism", ["gaussian", "tree"])
def test_a_lost_global_is_made_again_with_its_noise(file: Any, tmp_path: Path, mechanism: str) -> None:
    path = file(silo={"mechanism": mechanism})
    for _ in range(2):
        turn = trials.begin(path)
        sent(path, turn, tmp_path)
        commit = trials.close(path, turn)
    rounds, terms = trials.rounds_of(path), Federation.load(path)
    rounds.store.delete(rounds.object_key(commit.outgoing))
    with pytest.raises(RefusedError, match="its noise is made of the coordinator's secret"):
        lost_global.fetch_global(rounds, commit, tmp_path / "again")
    lost_global.fetch_global(rounds, commit, tmp_path / "again", terms)
    assert hashlib.sha256((tmp_path / "again").read_bytes()).hexdigest() == commit.outgoing
    assert not chain.verify(rounds, deep=True).breaks


def test_without_the_secret_nothing_a_coordinator_publishes_gives_the_noise(file: Any, tmp_path: Path) -> None:
    """Another secret, all else equal: other noise. And it is nobody else's to read."""
    path = file()
    turn = trials.begin(path)
    sent(path, turn, tmp_path)
    commit = trials.close(path, turn)
    rounds, terms = trials.rounds_of(path), Federation.load(path)
    key = terms.work / "secrets" / "noise.key"
    assert key.stat().st_mode & 0o777 == 0o600
    for stored in rounds.store.list(""):
        assert key.read_bytes() not in rounds.store.get(stored)
    rounds.store.delete(rounds.object_key(commit.outgoing))
    key.unlink()
    with pytest.raises(RefusedError, match="made again it has the digest"):
        lost_global.fetch_global(rounds, commit, tmp_path / "again", terms)


def test_on_a_cluster_the_secret_is_mounted_or_nothing_is_done(file: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path = file()
    turn = trials.begin(path)
    sent(path, turn, tmp_path)
    folder = Federation.load(path).work / "keys"
    monkeypatch.setenv("SILOTUNE_KEYS", str(folder))
    with pytest.raises(FederationError, match=r"coordinator\.noise: the secret of privacy\.silo's noise cannot be read.*head -c 32"):
        releases.secret_of(Federation.load(path))
    (folder / "coordinator.noise").write_bytes(b"short")
    with pytest.raises(FederationError, match="must hold 32 random bytes, got 5"):
        releases.secret_of(Federation.load(path))
    secret = os.urandom(32)
    (folder / "coordinator.noise").write_bytes(secret)
    assert releases.secret_of(Federation.load(path)) == secret
    assert not (Federation.load(path).work / "secrets").exists()


def test_the_bound_follows_the_quantile_by_a_noisy_count(file: Any, tmp_path: Path) -> None:
    path, epsilon = file(clip={"quantile": 0.5, "initial": 0.58}, silo={"epsilon": 200.0}), 200.0
    z = gaussian.noise_multiplier_of(epsilon, DELTA, TOTAL)
    bounds, counts = [0.58], []
    for _ in range(TOTAL):
        turn = trials.begin(path)
        updates = sent(path, turn, tmp_path)
        commit = trials.close(path, turn)
        rounds = trials.rounds_of(path)
        norms = [math.sqrt(sum(float(np.sum(np.square(a, dtype=np.float64))) for a in t.values())) for t in updates.values()]
        bound = rounds.json_object(commit.server_state["numbers"])["clip"]
        counts.append(0.5 - math.log(bound / bounds[-1]) / 0.2)
        true = float(np.mean([n <= bounds[-1] for n in norms]))
        assert 0 < true < 1, norms
        assert counts[-1] != pytest.approx(true, abs=1e-4)
        assert counts[-1] == pytest.approx(true, abs=5 * z / (2 * math.sqrt(SHARE)) / len(norms))
        noise = noise_of(path, turn.round, updates, tmp_path, bounds[-1])
        assert noise.std() == pytest.approx(z / math.sqrt(0.9) * bounds[-1], rel=4 / math.sqrt(2 * len(noise)))
        bounds.append(bound)
    assert commit.guards["silo epsilon"] == pytest.approx(epsilon, rel=1e-6)
    assert all(-0.5 - 1e-5 <= c <= 1.5 + 1e-5 for c in counts)


def test_the_noise_of_a_tree_is_that_of_its_prefixes(file: Any, tmp_path: Path) -> None:
    """After round t the global holds the sum of all clipped updates and the noise of few nodes; what is in between cancels."""
    path = file(silo={"mechanism": "tree"})
    held, sums = [], []
    for _ in range(TOTAL):
        turn = trials.begin(path)
        updates = sent(path, turn, tmp_path)
        commit = trials.close(path, turn)
        sums.append(noise_of(path, turn.round, updates, tmp_path))
        held.append(np.sum(sums, axis=0))
    whole = sum(prefix_tree.squared_sensitivity(n) for n in range(1, TOTAL + 1))
    node = CLIP * math.sqrt(whole) / gaussian.mu_of(EPSILON, DELTA)
    for number, noise in enumerate(held, 1):
        assert noise.std() == pytest.approx(node * math.sqrt(number.bit_count()), rel=6 / math.sqrt(2 * len(noise)))
    # Of node (1, 0), which is all of rounds 1 and 2, nothing of node (0, 0) is left; round 3 adds a node of its own to it.
    assert abs(np.corrcoef(held[0], held[1])[0, 1]) < 6 / math.sqrt(len(held[0]))
    assert np.corrcoef(held[1], held[2])[0, 1] == pytest.approx(math.sqrt(0.5), abs=0.05)
    assert np.abs(sums[0]).min() >= 0
    assert grid_of(node) > 0
    assert commit.guards["silo epsilon"] == pytest.approx(EPSILON, rel=1e-6)
    found = list(trials.rounds_of(path).releases())
    assert [r.leaf for r in found] == [1, 2, 3]
    assert len({r.tree for r in found}) == 1


def test_a_round_that_is_skipped_takes_no_leaf_and_costs_nothing(file: Any, tmp_path: Path) -> None:
    path = file(silo={"mechanism": "tree"}, rounds={"total": TOTAL, "quorum": 2, "on_missing_quorum": "skip"})
    turn = trials.begin(path)
    sent(path, turn, tmp_path)
    trials.close(path, turn)
    turn = trials.begin(path)
    assert trials.close(path, turn, *(f"{s} late" for s in trials.SILOS)).outcome == "skipped"
    turn = trials.begin(path)
    sent(path, turn, tmp_path)
    trials.close(path, turn)
    assert [(r.round, r.leaf) for r in trials.rounds_of(path).releases()] == [(1, 1), (3, 2)]


def test_a_run_begun_anew_under_the_same_name_has_another_tree(file: Any, tmp_path: Path) -> None:
    """The same secret, the same terms, and other updates: with the same noise, their difference would be bare."""
    import shutil

    path = file(silo={"mechanism": "tree"})
    trees = []
    for _ in range(2):
        turn = trials.begin(path)
        sent(path, turn, tmp_path)
        trials.close(path, turn)
        trees.append(next(iter(trials.rounds_of(path).releases())).tree)
        shutil.rmtree(tmp_path / ".silotune" / "store")
    assert trees[0] != trees[1]


def test_a_release_that_is_gone_is_missed(file: Any, tmp_path: Path) -> None:
    path = file()
    turn = trials.begin(path)
    sent(path, turn, tmp_path)
    trials.close(path, turn)
    rounds = trials.rounds_of(path)
    rounds.store.delete(rounds.key("releases", "00001.json"))
    assert any("no release 1 of its updates stands" in b for b in chain.verify(rounds).breaks)
    turn = trials.begin(path)
    sent(path, turn, tmp_path)
    with pytest.raises(RefusedError, match=r"releases/ hold 0, and commits know of 1"):
        trials.close(path, turn)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"rounds": {"total": 3, "guards": {"norm_band": 5.0}}}, "rounds.guards.norm_band: cannot hold with privacy.silo"),
    ],
)
def test_what_cannot_hold_is_refused(file: Any, sections: dict[str, Any], told: str) -> None:
    with pytest.raises(SilotuneError, match=told):
        Federation.load(file(**sections))


def test_a_tree_needs_the_same_tensors_in_every_round(file: Any) -> None:
    with pytest.raises(SilotuneError, match=r"tree needs the same tensors in every round, got aggregation\.strategy rolora"):
        Federation.load(file(strategy="rolora", silo={"mechanism": "tree"}))


@pytest.mark.parametrize("strategy", ["ffa", "fedavgm", "fed-sb"])
def test_other_sums_have_noise_on_what_is_trained_only(file: Any, tmp_path: Path, strategy: str) -> None:
    path = file(strategy=strategy)
    turn = trials.begin(path)
    updates = sent(path, turn, tmp_path)
    commit = trials.close(path, turn)
    rounds = trials.rounds_of(path)
    before, after = (trials.state(rounds, digest, tmp_path) for digest in (commit.incoming, commit.outgoing))
    trained = set(next(iter(updates.values())))
    assert {n for n in after if not np.array_equal(before[n], after[n])} == trained
    noise = noise_of(path, 1, updates, tmp_path)
    assert noise.std() == pytest.approx(Z * CLIP, rel=5 / math.sqrt(2 * len(noise)))
