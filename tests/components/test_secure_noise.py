"""Silo-level privacy with nobody to trust: the noise that silos add, what it leaves of the mean, and when it is spent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from secure_courses import CLIP, SecureCourse, quantised_mean

from silotune.components import silo_promise
from silotune.components.errors import QuorumError, RefusedError
from silotune.components.learning.privacy import gaussian
from silotune.components.learning.privacy.discrete_gaussian import Noise, concentrated_epsilon
from silotune.components.learning.tensor_file import open_tensor_file
from silotune.components.protocol import Commit, Turn
from silotune.components.secure_sum import terms as secure_terms

SILOS = ("ada", "bo", "cy", "di")
SHAPES = {"w": (300, 100)}
NOISY = {"secure_aggregation": {}, "silo": {"epsilon": 4.0, "delta": 1e-5, "mechanism": "discrete-gaussian"}, "rounds": 2}


def course_of(folder: Path) -> SecureCourse:
    return SecureCourse(folder, SILOS, privacy=NOISY, shapes=SHAPES)


def noise_of(course: SecureCourse, commit: Commit, updates: dict[str, dict[str, np.ndarray]]) -> np.ndarray:
    """What the global moved by, beyond the quantised mean; in quanta of the sum."""
    before, after = (
        open_tensor_file(course.rounds.fetch_object(d, course.folder / "state")).read("w").astype(np.float64)
        for d in (commit.incoming or "", commit.outgoing)
    )
    mean = quantised_mean(updates, dict.fromkeys(updates, 1.0), bits=secure_terms.NOISY_BITS)["w"]
    return (after - before - mean) * len(updates) / (CLIP / 2**secure_terms.NOISY_BITS)


def test_the_sum_has_the_noise_of_all_and_the_commit_says_what_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    course = course_of(tmp_path)
    schema = {n: list(s) for n, s in SHAPES.items()}
    scale = secure_terms.fixed_point(course.agreement, schema).noise
    spent = []
    for dead in ({}, {"mask": ["bo"]}):
        updates = {s: course.tensors(s) for s in SILOS}
        commit = course.try_round(dead)
        noise = noise_of(course, commit, {s: updates[s] for s in commit.contributions})
        assert noise.std() == pytest.approx(scale * len(commit.contributions) ** 0.5, rel=0.02)
        assert abs(noise.mean()) < 4 * scale * 2 / noise.size**0.5
        spent.append(commit.guards["silo epsilon"])
    assert 0 < spent[0] < spent[1] == pytest.approx(4.0, rel=0.01)
    assert "planned for 2 rounds; for more of them raise privacy.silo.epsilon and privacy.rounds together" in Turn.parse(course.turn).done
    monkeypatch.setattr(silo_promise, "spent_out", lambda *_: "")
    course.open()
    statuses = [course.train(s) for s in SILOS]
    with pytest.raises(RefusedError, match="another sum would bring epsilon to"):
        course.stage("share", statuses=statuses)


def test_a_silo_counts_by_itself_what_it_has_helped_to_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that counts nothing gets no vector once the promise is spent."""
    course = course_of(tmp_path)
    for _ in range(2):
        course.try_round()
    monkeypatch.setattr(silo_promise, "spent_out", lambda *_: "")
    monkeypatch.setattr(silo_promise, "secure_epsilon_with", lambda *_: None)
    course.open()
    course.stage("share", statuses=[course.train(s) for s in SILOS])
    assert course.stage("mask") == [f"{s} refused: silo privacy spent" for s in SILOS]


@pytest.mark.parametrize("first", ["gaussian", "discrete-gaussian"])
def test_what_was_spent_under_one_kind_of_noise_counts_under_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """Terms that are amended in the middle: ε of both kinds together, by coordinator and silos alike."""
    normal = {"silo": {"epsilon": 4.0, "delta": 1e-5}, "rounds": 2}
    kinds = [normal, NOISY] if first == "gaussian" else [NOISY, normal]
    kinds[1] = kinds[1] | {"silo": kinds[1]["silo"] | {"epsilon": 5.0}}
    course, spent, rho = SecureCourse(tmp_path, SILOS, privacy=kinds[0], shapes=SHAPES), [], 0.0
    for privacy in kinds:
        course.amend(privacy=privacy)
        if "secure_aggregation" in privacy:
            commit = course.try_round()
            rho += secure_terms.silo_rho(course.agreement, {n: list(s) for n, s in SHAPES.items()})
        else:
            course.deliver(*SILOS)
            commit = course.aggregate()
            rho += 0.5 / gaussian.noise_multiplier_of(privacy["silo"]["epsilon"], 1e-5, 2) ** 2
        spent.append(commit.guards["silo epsilon"])
    assert spent[1] == pytest.approx(concentrated_epsilon(rho, 1e-5), rel=1e-6)
    assert spent[0] < 3.2 < 4.0 < spent[1] <= 5.0
    assert "planned for 2 rounds" in Turn.parse(course.turn).done  # neither kind has room for a third
    monkeypatch.setattr(silo_promise, "spent_out", lambda *_: "")
    course.open()
    if first == "gaussian":
        monkeypatch.setattr(silo_promise, "secure_epsilon_with", lambda *_: None)
        course.stage("share", statuses=[course.train(s) for s in SILOS])
        assert course.stage("mask") == [f"{s} refused: silo privacy spent" for s in SILOS]
    else:
        course.deliver(*SILOS)
        with pytest.raises(RefusedError, match="was planned for 2 rounds"):
            course.aggregate()


def test_another_attempt_has_the_same_noise(tmp_path: Path) -> None:
    """Else it could be averaged out over attempts: that of the first, which came to nothing, is in the sum that the second opens."""
    course = course_of(tmp_path)
    updates = {s: course.tensors(s) for s in SILOS}
    with pytest.raises(QuorumError):
        course.try_round({"mask": ["ada", "bo"]})
    plan = course.rounds.plan(1)
    assert plan is not None
    scale = secure_terms.fixed_point(course.agreement, {n: list(s) for n, s in SHAPES.items()}).noise
    drawn = [Noise(course.part(s).view.secrets.noise(1, plan.digest), scale).take(30_000).reshape(300, 100) for s in SILOS]
    course.open()
    found = noise_of(course, course.try_round(), updates)
    np.testing.assert_allclose(found, sum(drawn), atol=4)  # quanta: a global is held in float32
    assert np.abs(sum(drawn)).mean() > 1e4
