"""Schedules: one recurring run per federation, changed, not doubled, when it is asked for again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from silotune.components.federation import Federation
from silotune.components.recurrence import title
from silotune.pipelines.kubeflow.cluster_fit import FEDERATION_PATH, require_fit
from silotune.pipelines.kubeflow.cron import require_zone, six_fields
from silotune.pipelines.kubeflow.kfp_api import Cluster, experiment_of, make_experiment, named, speaking
from silotune.pipelines.kubeflow.submission import Reference, upload


@dataclass(frozen=True)
class Schedule:
    """The recurring run of a federation."""

    identity: str
    url: str
    cron: str  # of six fields, in the scheduler's zone
    timezone: str
    change: Literal["created", "changed", "enabled", "unchanged"]
    notes: tuple[str, ...] = ()


def schedule(
    cluster: Cluster,
    federation: Federation,
    cron: str,
    rounds: int,
    *,
    timezone: str = "UTC",
    path: str = FEDERATION_PATH,
    service_account: str | None = None,
) -> Schedule:
    """Run a federation again and again, one run at a time, without making up for missed ones.

    Kubeflow cannot change a recurring run. So the old one is disabled, the new one made, then the old one deleted; where making fails, the
    old one is enabled again.

    Args:
        cron: six fields (second, minute, hour, day of month, month, day of week), or the five of a crontab.
        timezone: the zone that ``cron`` is meant in; must be the scheduler's (KFP_TIMEZONE).

    Raises:
        FederationError: cron, time zone, or the federation cannot run on a cluster as it stands.
        UnreachableError: Kubeflow Pipelines.
    """
    expression = six_fields(cron)
    zone = require_zone(timezone)
    require_fit(federation, path)
    account = service_account or os.environ.get("KFP_SERVICE_ACCOUNT") or None
    client = cluster.client
    with speaking(cluster.endpoint):
        experiment = make_experiment(cluster, federation)
        reference = upload(cluster, federation, rounds)
        old = recurring_of(cluster, federation, experiment)
        same = [r for r in old if _does(r, expression, reference, path, account)]
        if same:
            kept, change = same[0], "unchanged"
            for other in (r for r in old if r is not kept):
                client.delete_recurring_run(other.recurring_run_id)
            if kept.status != "ENABLED":
                client.enable_recurring_run(kept.recurring_run_id)
                change = "enabled"
        else:
            with _disabled(client, old):
                kept = client.create_recurring_run(
                    experiment_id=experiment,
                    job_name=title(federation.name),
                    description=f"silotune federation {federation.name}",
                    cron_expression=expression,
                    max_concurrency=1,
                    no_catchup=True,
                    params={"federation": path},
                    pipeline_id=reference.pipeline,
                    version_id=reference.version,
                    service_account=account,
                )
            for other in old:
                client.delete_recurring_run(other.recurring_run_id)
            change = "changed" if old else "created"
    identity = str(kept.recurring_run_id)
    return Schedule(identity, cluster.url("recurringrun", identity), expression, zone, change, reference.notes)  # type: ignore[arg-type]


@contextmanager
def _disabled(client: Any, recurring: list[Any]) -> Iterator[None]:
    enabled = [r.recurring_run_id for r in recurring if r.status == "ENABLED"]
    for identity in enabled:
        client.disable_recurring_run(identity)
    try:
        yield
    except BaseException:  # Ctrl-C, too, leaves the old schedule as it was
        for identity in enabled:
            client.enable_recurring_run(identity)
        raise


def recurring_of(cluster: Cluster, federation: Federation, experiment: str) -> list[Any]:
    """The federation's recurring runs; one, unless somebody was interrupted."""
    return named(cluster.client.list_recurring_runs, "recurring_runs", title(federation.name), experiment_id=experiment)


def _does(recurring: Any, cron: str, reference: Reference, path: str, account: str | None) -> bool:
    trigger, pinned = recurring.trigger.cron_schedule, recurring.pipeline_version_reference
    return (
        trigger is not None
        and trigger.cron == cron
        and (trigger.start_time, trigger.end_time) == (None, None)
        and pinned is not None
        and pinned.pipeline_version_id == reference.version
        and recurring.runtime_config.parameters == {"federation": path}
        and str(recurring.max_concurrency) == "1"
        and bool(recurring.no_catchup)
        and (account is None or recurring.service_account == account)
    )


def unschedule(cluster: Cluster, federation: Federation) -> int:
    """Delete the federation's recurring run; returns how many there were. A run that is going on goes on.

    Raises:
        UnreachableError: Kubeflow Pipelines.
    """
    with speaking(cluster.endpoint):
        experiment = experiment_of(cluster, federation)
        found = recurring_of(cluster, federation, experiment) if experiment else []
        for recurring in found:
            cluster.client.delete_recurring_run(recurring.recurring_run_id)
    return len(found)
