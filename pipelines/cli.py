"""silotune: the command line.

    silotune new DIR          a federation file to start from
    silotune check FILE       is it right, and what would an edit mean
    silotune run FILE         run it on this machine
    silotune status FILE      where it stands
    silotune compile FILE     the pipeline, for Kubeflow
    silotune sync | ui FILE   MLflow
    silotune keys, policies   who may sign and store what
    silotune policy, review, dry-run, privacy      for a silo's steward: what is allowed, asked for, sent and spent
    silotune audit-privacy    what the model tells about records, measured
    silotune verify | gc      the chain back to the base; erasing old updates
    silotune onboard, offboard, doctor, submit, schedule, runs, logs, cancel, unschedule      on a Kubeflow cluster
    silotune schema           the file's JSON Schema

Whatever a command does not need is not imported: `--help` answers at once. Errors leave as one message and the exit code of `errors`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from silotune.components.errors import FederationError, SilotuneError
from silotune.pipelines.commands import cluster, integrity, leakage_audit, steward
from silotune.pipelines.commands.listing import Listing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from silotune.components.base_model import Base
    from silotune.components.federation import Federation
    from silotune.components.rounds import Rounds
    from silotune.pipelines.engines import LocalRun
    from silotune.pipelines.progress_view import Course

app = typer.Typer(
    cls=Listing,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fine-tunes large language models across organisations that may not share their records.",
)

File = integrity.File
PerRun = Annotated[int | None, typer.Option("--rounds", min=1, help="Rounds to work on; default: rounds.per_run, or all that are left.")]


class Engine(StrEnum):
    """Where a run works."""

    local = "local"
    docker = "docker"


class Terminated(BaseException):
    """SIGTERM came."""


def main() -> None:
    """The console script."""
    try:
        app(prog_name="silotune")
    except SilotuneError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        _fail(f"{error.filename or 'a local file'}: {error.strerror or error}", 1)


def _fail(message: str, code: int) -> None:
    typer.echo(f"{typer.style('error:', fg='red')} {message}", err=True)
    raise SystemExit(code)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"silotune {version('silotune')}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command()
def new(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the file; made if absent.")]) -> None:
    """Write a commented federation file to start from."""
    from silotune.pipelines import starter

    file = starter.write(folder)
    typer.echo(f"{file} written; name your model and silos in it, then: silotune check {quote(str(file))}")


@app.command()
def check(
    file: File,
    data: Annotated[bool, typer.Option("--data", help="Also read every record on this machine.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also tokenise them, and tell how many would be cut or left out.")] = False,
) -> None:
    """Check a federation file, and say what an edit of it would mean."""
    from silotune.pipelines import checkup

    federation, console = _load(file, check_files=True), _console()
    base = checkup.local_base(federation)
    console.print(f"[bold]{federation.name}[/]: {file} is valid", highlight=False)
    console.print(checkup.terms_table(federation, base))
    if data or tokens:
        if tokens and base is None:
            raise FederationError(f"--tokens: needs a base model in a folder, got {federation.model.base}; fetch it first, or use --data")
        _check_data(federation, base if tokens else None, console)
    for line in checkup.edit_lines(federation, _rounds(federation), base):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _check_data(federation: Federation, base: Base | None, console: Console) -> None:
    from silotune.pipelines.checkup import readings

    problems = []
    for r in readings(federation, base):
        if r.told:
            console.print(f"{r.silo} {r.split}: {r.told}", markup=False, highlight=False, soft_wrap=True)
        else:
            problems.append(f"{r.silo} {r.split}: {r.problem}")
    if problems:
        raise FederationError("\n  ".join(["the records of these silos cannot be used:", *problems]))


@app.command()
def run(
    file: File,
    rounds: PerRun = None,
    engine: Annotated[
        Engine, typer.Option(help="Tasks as processes, or each in a container that sees its own party's files only.")
    ] = Engine.local,
    warm: Annotated[bool, typer.Option("--warm/--no-warm", help="local: keep one process with the imports done; faster.")] = True,
    silo_image: Annotated[
        str | None, typer.Option(metavar="TAG", help="docker: image with PyTorch; default: that of `make images`.")
    ] = None,
    coordinator_image: Annotated[str | None, typer.Option(metavar="TAG", help="docker: image of aggregate; default: likewise.")] = None,
) -> None:
    """Run a federation on this machine, from where it stands."""
    from silotune.pipelines import status as stand

    if engine is Engine.local and (silo_image or coordinator_image):
        raise FederationError("--silo-image and --coordinator-image: need --engine docker; the local engine runs no image")
    federation, console = _load(file, check_files=True), _console()
    _tell_custody(federation)
    store = _rounds(federation)
    slots = _slots(federation, store, rounds)
    exported = stand.export(federation, store) if not slots and store.latest() else None
    if exported and stand.is_current(federation, store, exported):
        console.print("nothing left to do: all rounds are committed, and the model is exported", highlight=False)
    else:

        def start() -> LocalRun:
            if engine is Engine.docker:
                from silotune.pipelines import docker_engine

                return docker_engine.start(federation, slots, docker_engine.chosen_images(silo_image, coordinator_image))
            from silotune.pipelines import engines

            return engines.start(federation, slots, warm=warm)

        _run_here(federation, store, slots, start, file, console)
        exported = stand.export(federation, store)
    if found := stand.comparison(federation, store):
        console.print(stand.comparison_table(found))
    if exported:
        console.print(f"model: {exported.location}", highlight=False, soft_wrap=True)
    if federation.tracking.uri != "none":
        console.print(f"MLflow: silotune ui {quote(str(file))}", highlight=False, soft_wrap=True)


def _tell_custody(federation: Federation) -> None:
    """Loudly where nothing is signed; one line where this machine holds all keys."""
    if federation.custody == "none":
        warning = "security.signing is off: nothing is signed, and whoever can write to the store can forge rounds and models"
        typer.echo(typer.style(warning, fg="red", bold=True), err=True)
    elif federation.custody == "local":
        typer.echo("custody: local; every party's key is made and held on this machine (see `silotune keys`)", err=True)


def _slots(federation: Federation, store: Rounds, asked: int | None) -> int:
    """How many rounds to work on: at most those that are left."""
    commits = list(store.commits())
    if commits and commits[-1].converged and federation.rounds.until:
        return 0
    left = max(0, federation.rounds.total - sum(c.counts for c in commits))
    return min(left, asked or federation.rounds.per_run or left)


def _run_here(federation: Federation, store: Rounds, slots: int, start: Callable[[], LocalRun], file: Path, console: Console) -> None:
    from silotune.pipelines.progress_view import watch

    with _terminable():
        going = None
        try:
            going = start()
            course = watch(going, federation, store, slots, console)
        except (KeyboardInterrupt, Terminated) as why:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            if going:
                going.stop()
            typer.echo(f"\nstopped; nothing committed is lost, `silotune run {quote(str(file))}` goes on from there", err=True)
            raise typer.Exit(143 if isinstance(why, Terminated) else 130) from None
        except BaseException:  # whatever ends the command, a run does not outlive it
            if going:
                going.stop()
            raise
    result = going.result()
    _tell_troubles(course, console)
    if code := result["exit_code"]:
        log = f"\nlog: {going.log}" if code == 1 and str(going.log) not in result["message"] else ""
        again = "" if code == FederationError.exit_code else f"\n`silotune run {quote(str(file))}` goes on from what is committed"
        _fail(f"{result['message']}{log}{again}", code)


def _tell_troubles(course: Course, console: Console) -> None:
    for silo, texts in sorted(course.troubles.items()):
        for text in texts:
            console.print(f"[yellow]warning:[/] {silo}", end=": " if silo else "", highlight=False)
            console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM as an exception, so that a run is stopped before its starter leaves."""

    def terminate(*_: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command()
def status(file: File, as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False) -> None:
    """Say where a federation stands, from its store."""
    from silotune.pipelines import status as stand

    federation = _load(file)
    found = stand.status(federation, _rounds(federation))
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2, allow_nan=False))
    else:
        console = _console()
        console.print(stand.status_table(found, len(federation.silos), console.width))
        for line in stand.notes(found):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def compile(
    file: File,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write it; ends with .yaml.")],
    rounds: PerRun = None,
) -> None:
    """Compile the pipeline of a federation for Kubeflow."""
    if output.suffix not in (".yaml", ".yml"):
        raise FederationError(f"--output: must end with .yaml, got {output}; Kubeflow reads no other kind")
    federation = _load(file)
    slots = rounds or federation.rounds.per_run or federation.rounds.total

    from kfp import compiler

    from silotune.components.terms.placement import Placement
    from silotune.pipelines.federated_finetuning import federated_finetuning

    output.parent.mkdir(parents=True, exist_ok=True)
    placed = federation.coordinator_image is not None or any(silo.placement != Placement() for silo in federation.silos)
    compiler.Compiler().compile(federated_finetuning(federation, slots, placed=placed), str(output))
    typer.echo(f"{output}: {len(federation.silos)} silos, {slots} rounds; its parameter `federation` is the file's path where tasks run")
    if not placed:
        typer.echo("no silo has a `placement`: the tasks name no image that holds silotune, and are for reading", err=True)


@app.command()
def sync(file: File) -> None:
    """Bring MLflow up to date with the store; prints the MLflow run's id."""
    from silotune.components import tracking
    from silotune.pipelines import status as stand

    federation = _load(file)
    store = _rounds(federation)
    latest = store.latest()
    if latest is None:
        raise FederationError(f"federation {federation.name!r} has no round yet, so that there is nothing to sync; run it first")
    last = stand.round_status(federation, store, latest, latest.round)
    typer.echo(tracking.sync(federation, store, complete=set(store.agreement(latest.agreement).silos) <= set(last.scores)))


@app.command()
def ui(file: File, port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000) -> None:
    """Open MLflow on the federation's tracking store."""
    federation = _load(file)
    uri = federation.tracking.uri
    if uri.startswith(("http://", "https://")):
        typer.echo(f"MLflow is at {uri}")
        return
    if uri == "none":
        raise FederationError("tracking.uri: is none, so that nothing is tracked; name a file or a server, then: silotune sync FILE")
    folder = Path(uri.removeprefix("sqlite:///"))
    if not folder.exists():
        raise FederationError(f"tracking.uri {uri!r}: nothing is tracked there yet; `silotune run {quote(str(file))}` makes it")
    named = _rounds(federation).tracking_run()
    where = f"/#/experiments/{named.experiment}/runs/{named.run}/model-metrics" if named else ""
    typer.echo(f"MLflow is coming up, in half a minute or less, at http://127.0.0.1:{port}{where}\nCtrl-C ends it", err=True)
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # else it starts seven more processes
    os.chdir(folder.parent)  # where MLflow drops what it writes beside its database
    words = ["-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    os.execv(sys.executable, [sys.executable, *words])  # noqa: S606 (no shell is wanted)


@app.command()
def strategies() -> None:
    """Say which ways of aggregation there are, and what each can be combined with."""
    from silotune.pipelines.checkup import composition_tables

    console = _console()
    holds, ways, rules = composition_tables()
    console.print(holds)
    console.print()
    console.print(ways)
    console.print("\naggregation.robust.rule", style="bold")
    console.print(rules)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the federation file, for editors."""
    from silotune.components.federation import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


for command in (
    *(
        steward.review,
        steward.privacy,
        integrity.verify,
        integrity.gc,
        integrity.policies,
        cluster.onboard,
        cluster.offboard,
        cluster.doctor,
    ),
    *(cluster.submit, cluster.schedule, cluster.runs, cluster.logs, cluster.cancel, cluster.unschedule),
):
    app.command()(command)
app.command("dry-run")(steward.dry_run)
app.command("audit-privacy")(leakage_audit.audit_privacy)
app.add_typer(integrity.keys, name="keys")
app.add_typer(steward.policy, name="policy")


def _load(file: Path, *, check_files: bool = False) -> Federation:
    from silotune.components.federation import Federation

    return Federation.load(file, check_files=check_files)


def _rounds(federation: Federation) -> Rounds:
    from silotune.components.rounds import Rounds

    return Rounds.of(federation)


def _console() -> Console:
    """Of the terminal's width; where it is none, wide enough that no path or number is broken or cut."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=200)


if __name__ == "__main__":
    main()
