"""The commands for a Kubeflow cluster and its silos: doctor, submit, schedule, runs, logs, cancel, unschedule, onboard, offboard.

Where the cluster is and as whom one speaks comes from the environment (see `kfp_api`), since secrets are no options.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from silotune.components.errors import FederationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from silotune.components.federation import Federation

File = Annotated[Path, typer.Argument(metavar="FILE", help="The federation file.")]
Endpoint = Annotated[str | None, typer.Option(help="Address of Kubeflow Pipelines; default: KFP_ENDPOINT.")]
Namespace = Annotated[str | None, typer.Option(help="Profile namespace; default: KFP_NAMESPACE.")]
RoundsPerRun = Annotated[
    int | None, typer.Option("--rounds", min=1, help="Rounds one run works on; default: rounds.per_run, or rounds.total.")
]
Account = Annotated[str | None, typer.Option(help="Service account of the runs; default: KFP_SERVICE_ACCOUNT.")]
RunId = Annotated[str | None, typer.Argument(metavar="[RUN]", help="Default: the one that is going on.")]


def doctor(file: File, endpoint: Endpoint = None, namespace: Namespace = None) -> None:
    """Look at store, MLflow, Kubeflow, images and every silo's namespace before anything is submitted."""
    from rich.console import Console

    from silotune.pipelines.diagnosis import doctor as examination
    from silotune.pipelines.membership import access_map

    federation, console = _load(file), Console()
    findings = examination.examine(federation, endpoint=endpoint, namespace=namespace)
    console.print(access_map.render(federation))
    console.print()
    console.print(examination.render(findings))
    raise typer.Exit(examination.exit_code(findings))


def submit(
    file: File, rounds: RoundsPerRun = None, endpoint: Endpoint = None, namespace: Namespace = None, service_account: Account = None
) -> None:
    """Start a run on Kubeflow."""
    from silotune.pipelines.kubeflow import submission
    from silotune.pipelines.kubeflow.cluster_fit import require_fit
    from silotune.pipelines.kubeflow.kfp_api import connect

    federation = _load(file)
    require_fit(federation)
    found = submission.submit(connect(endpoint, namespace), federation, _rounds(federation, rounds), service_account=service_account)
    _warn(found.notes)
    typer.echo(f"run {found.run} of pipeline version {found.version}\n{found.url}")


def schedule(
    file: File,
    cron: Annotated[str, typer.Option("--cron", help="Six fields, seconds first, or a crontab's five: '0 3 * * *'.")],
    timezone: Annotated[str, typer.Option(help="Zone of the cron line; must be the scheduler's.")] = "UTC",
    rounds: RoundsPerRun = None,
    endpoint: Endpoint = None,
    namespace: Namespace = None,
    service_account: Account = None,
) -> None:
    """Have a run started again and again; each goes on from the last commit."""
    from silotune.pipelines.kubeflow import schedules
    from silotune.pipelines.kubeflow.cluster_fit import require_fit
    from silotune.pipelines.kubeflow.cron import require_zone, six_fields
    from silotune.pipelines.kubeflow.kfp_api import connect

    federation = _load(file)
    require_fit(federation)
    six_fields(cron)  # what is wrong with the command is told whether or not Kubeflow answers
    require_zone(timezone)
    found = schedules.schedule(
        connect(endpoint, namespace),
        federation,
        cron,
        _rounds(federation, rounds),
        timezone=timezone,
        service_account=service_account,
    )
    _warn(found.notes)
    typer.echo(f"{found.change}: {found.cron} {found.timezone}\n{found.url}")


def unschedule(file: File, endpoint: Endpoint = None, namespace: Namespace = None) -> None:
    """End the recurring runs of a federation; one that is going on goes on."""
    from silotune.pipelines.kubeflow import schedules
    from silotune.pipelines.kubeflow.kfp_api import connect

    count = schedules.unschedule(connect(endpoint, namespace), _load(file))
    typer.echo(f"{count} recurring run{'s' * (count != 1)} removed")


def cancel(file: File, run: RunId = None, endpoint: Endpoint = None, namespace: Namespace = None) -> None:
    """Stop a run on Kubeflow; nothing committed is lost."""
    from silotune.pipelines.kubeflow import runs as pipeline_runs
    from silotune.pipelines.kubeflow.kfp_api import connect

    stopped = pipeline_runs.cancel(connect(endpoint, namespace), _load(file), run)
    typer.echo(f"stopped: {', '.join(stopped)}" if stopped else "no run is going on")


def runs(
    file: File,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many, newest first.")] = 5,
    endpoint: Endpoint = None,
    namespace: Namespace = None,
) -> None:
    """Show the latest runs on Kubeflow and how their tasks stand."""
    from silotune.pipelines.kubeflow import runs as pipeline_runs
    from silotune.pipelines.kubeflow.kfp_api import connect

    for run in pipeline_runs.runs(connect(endpoint, namespace), _load(file), limit=limit):
        typer.echo(f"{run.identity}  {run.state}  {run.name}")
        for task in run.tasks:
            typer.echo(f"  {task.name:<24} {task.state}")


def logs(file: File, run: RunId = None, endpoint: Endpoint = None, namespace: Namespace = None) -> None:
    """Print the logs of the coordinator's tasks; a silo's stay in its storage."""
    from silotune.pipelines.kubeflow import runs as pipeline_runs
    from silotune.pipelines.kubeflow.kfp_api import connect

    federation = _load(file)
    found = pipeline_runs.logs(connect(endpoint, namespace), federation, run)
    if not found:
        typer.echo("no task of the coordinator has begun")
    for log in found:
        typer.echo(f"--- {log.task} ({log.state})\n{log.text or log.problem}")
    for line in pipeline_runs.silo_logs(federation):
        typer.echo(line)


def onboard(
    file: File,
    silo: Annotated[str, typer.Argument(metavar="SILO", help="Its id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; absent or empty.")],
    image: Annotated[
        list[str] | None, typer.Option(help="What may run on its records, by digest; may be given again. Default: placement.image.")
    ] = None,
    store_cidr: Annotated[list[str] | None, typer.Option(help="Addresses of the store, all that its Jobs can reach.")] = None,
    endpoint_url: Annotated[str, typer.Option(help="The store's URL; default: AWS.")] = "",
    own_cluster: Annotated[bool, typer.Option("--own-cluster", help="The silo has a cluster of its own.")] = False,
    own_cidr: Annotated[
        list[str] | None, typer.Option(help="Addresses of its own S3, where that is another one; may be given again.")
    ] = None,
    own_endpoint_url: Annotated[str, typer.Option(help="URL of the S3 that holds its own records; default: the store's.")] = "",
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs that its Jobs may use together; default: those of one training.")] = None,
    priority_class: Annotated[list[str] | None, typer.Option(help="Priority class that its Jobs may name; may be given again.")] = None,
    launcher: Annotated[
        str | None, typer.Option(help="NAMESPACE/ACCOUNT of the coordinator's tasks in this cluster; default: silotune/silotune-launcher.")
    ] = None,
) -> None:
    """Write what a silo applies to its cluster, with a README of what it grants."""
    from silotune.pipelines.membership import onboarding

    written = onboarding.write_silo(
        _load(file), silo, output, images=image or (), store_cidrs=store_cidr or (), endpoint=endpoint_url, own_cluster=own_cluster, gpus=gpus,
        own_endpoint=own_endpoint_url, own_cidrs=own_cidr or (),
        priority_classes=priority_class or (), launcher=launcher or onboarding.ACCOUNT,
    )  # fmt: skip
    typer.echo(f"{len(written)} files in {output}; read {output / 'README.md'}, then: kubectl apply -k {output}")


def offboard(
    file: File,
    silo: Annotated[str, typer.Argument(metavar="SILO", help="Its id.")],
    write: Annotated[bool, typer.Option("--write", help="Take the silo out of the file; else only say what that means.")] = False,
) -> None:
    """A silo leaves: take it out of the file, and say what ends when and what is to be deleted."""
    from silotune.components.rounds import Rounds
    from silotune.pipelines.membership import offboarding

    federation = _load(file)
    text = offboarding.without_silo(federation, silo)
    latest = Rounds.of(federation).latest()
    typer.echo(offboarding.offboard_text(federation, silo, latest.round + 1 if latest else None))
    if write:
        scratch = file.with_name(f".{file.name}.part")
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(file)
        typer.echo(f"{file}: {silo} is taken out")


def _rounds(federation: Federation, asked: int | None) -> int:
    return asked or federation.rounds.per_run or federation.rounds.total


def _warn(notes: Iterable[str]) -> None:
    for note in notes:
        typer.echo(f"{typer.style('warning:', fg='yellow')} {note}", err=True)


def _load(file: Path) -> Federation:
    from silotune.components.federation import Federation

    if not file.exists():
        raise FederationError(f"{file}: no such federation file; `silotune new DIR` writes one to start from")
    return Federation.load(file)
