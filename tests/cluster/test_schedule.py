"""A recurring run: the second goes on from what the first has committed, the last one ends the schedule, and one more has nothing to do."""

from __future__ import annotations

import os
from typing import Any

import pytest
from trial.trial import RUN, Trial
from trial.waiting import Hopeless, wait_for

from silotune.components.federation import Federation
from silotune.pipelines.kubeflow import runs, schedules
from silotune.pipelines.kubeflow.kfp_api import experiment_of

pytestmark = pytest.mark.cluster


def test_a_recurring_run_goes_on_from_the_last_commit_and_ends_itself(trial: Trial) -> None:
    federation = trial.begin("recurring", rounds={"total": 2, "per_run": 1})
    zone = os.environ.get("KFP_TIMEZONE") or "UTC"
    schedules.schedule(trial.cluster, federation, "0 * * * * *", 1, timezone=zone, service_account=trial.place.ours)
    try:
        for number in (1, 2):
            ended = ends(trial, federation, number)
            assert [r.state for r in ended] == ["SUCCEEDED"] * number
            assert trial.committed(federation) == number
        first, second = (trial.rounds(federation).commit(n) for n in (1, 2))
        assert second.previous == first.digest
        if trial.cluster.multi_user:  # its own end needs a PodDefault (docs/kubernetes.md); without, runs go on idly
            assert ends(trial, federation, 3)[-1].scheduled
        else:
            wait_for("the schedule to be disabled", lambda: recurring(trial, federation).status == "DISABLED", 120)
            idle = trial.submit(federation)
            assert trial.ended(idle) == "SUCCEEDED", trial.tasks(idle)
        assert trial.committed(federation) == 2, "a run with nothing to do commits nothing"
    finally:
        schedules.unschedule(trial.cluster, federation)
        runs.cancel(trial.cluster, federation)


def ends(trial: Trial, federation: Federation, count: int) -> list[runs.Run]:
    """The first ``count`` runs of the schedule, once they have ended, the oldest first."""

    def look() -> list[runs.Run] | None:
        ended = sorted((r for r in found() if r.state not in runs.GOING), key=lambda r: str(r.created))
        if any(r.state != "SUCCEEDED" for r in ended):
            raise Hopeless(f"a run has failed: {[(r.identity, r.state) for r in ended]}")
        return ended[:count] if len(ended) >= count else None

    def found() -> list[runs.Run]:
        return runs.runs(trial.cluster, federation, limit=20)

    return wait_for(f"run {count} of the schedule to end", look, RUN, seen=lambda: [(r.name, r.state) for r in found()], every=10)


def recurring(trial: Trial, federation: Federation) -> Any:
    (one,) = schedules.recurring_of(trial.cluster, federation, experiment_of(trial.cluster, federation) or "")
    return one
