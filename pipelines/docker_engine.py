"""The Docker engine: a federation's pipeline on this machine, by `kfp.local`, every task a container of the image it belongs to.

    start(federation, rounds, images)      launch a run; returns a `LocalRun` to watch and to stop
    python -m silotune.pipelines.docker_engine FEDERATION RUN_FOLDER ROUNDS SILO_IMAGE COORDINATOR_IMAGE      what its session executes

A container runs as the caller, with no capability, a read-only root and what `container_plan` gives its party; a silo's container therefore sees
the records of that silo only. What KFP says of a task's end is not believed, since its runner takes a container that was gone before it could
look for one that did well: what a run came to is read from the store.
"""

from __future__ import annotations

import copy
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from silotune.components.errors import FederationError, SilotuneError, UnreachableError
from silotune.components.federation import Federation
from silotune.components.process.progress import read_events, tell
from silotune.components.rounds import Rounds
from silotune.pipelines import container_plan, engines, status
from silotune.pipelines.container_plan import PARTY_VARIABLE, Images

if TYPE_CHECKING:
    from docker.client import DockerClient

FEDERATION_LABEL, RUN_LABEL = "silotune.federation", "silotune.run"  # the federation file's path; the run folder's name
LOOKS = 20  # for containers to be gone; what cannot be removed is left to the next run
SURE = 0.5  # seconds within which an engine has made a container that it was asked for before its caller was killed


class Ended(NamedTuple):
    """What `kfp.local` said."""

    output: str
    error: str


def chosen_images(silo: str | None, coordinator: str | None) -> Images:
    """The images asked for, else those that `make images` makes of this version."""
    made = version("silotune")
    return Images(silo or f"silotune-silo:{made}", coordinator or f"silotune-coordinator:{made}")


def start(federation: Federation, rounds: int, images: Images) -> engines.LocalRun:
    """Launch a run of ``rounds`` rounds in containers.

    Raises:
        FederationError: Docker's client is not installed, its engine is elsewhere, or an image is not there.
        UnreachableError: no engine answers.
        RefusedError: a run of this file is going on.
    """
    client = connect()
    found = Images(silo=find_image(client, images.silo, "silo"), coordinator=find_image(client, images.coordinator, "coordinator"))
    run = engines.launch(federation, "silotune.pipelines.docker_engine", str(rounds), found.silo, found.coordinator)
    run.clean = lambda: remove(client, f"{RUN_LABEL}={run.folder.name}")
    return run


def connect() -> DockerClient:
    """A client of this machine's engine, which has answered. Raises as `start` does."""
    try:
        from docker.client import DockerClient
        from docker.errors import DockerException
    except ImportError:
        raise FederationError("--engine docker: needs the Python package docker; pip install 'silotune[docker]'") from None
    host = os.environ.get("DOCKER_HOST", "")
    if host and not host.startswith("unix://"):
        raise FederationError(
            f"--engine docker: the engine must be on this machine, whose folders it mounts; DOCKER_HOST is {host}; unset it"
        )
    try:
        client = DockerClient.from_env()
        client.ping()
    except (DockerException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UnreachableError(
            f"--engine docker: no Docker engine answers at {host or 'unix:///var/run/docker.sock'}: {reason}; "
            "install and start it, give this user access to its socket (`docker info` shows it), or run with --engine local"
        ) from None
    return client


def find_image(client: DockerClient, name: str, kind: str) -> str:
    """The image's name as the engine lists it: `kfp.local` would try to pull any other.

    Raises:
        FederationError: it is not there, or has no name.
    """
    from docker.errors import ImageNotFound

    try:
        image = client.images.get(name)
    except ImageNotFound:
        raise FederationError(
            f"--engine docker: there is no image {name}; run `make images`, or name one that is there with --{kind}-image"
        ) from None
    known = [*image.tags, *image.attrs.get("RepoDigests", [])]
    for candidate in (name, f"{name}:latest", *known):
        if candidate in known:
            return candidate
    raise FederationError(f"--engine docker: image {name} has no tag, and goes by its tag here; give it one with `docker tag`")


def remove(client: DockerClient, label: str) -> None:
    """Stop and remove all containers that bear a label, also those that are just being made."""
    from docker.errors import DockerException, NotFound

    empty = 0
    for _ in range(LOOKS):
        try:
            found = client.containers.list(all=True, filters={"label": label}, ignore_removed=True)
            for container in found:
                try:
                    container.remove(force=True)
                except NotFound:
                    continue
                except DockerException as error:
                    if getattr(error, "status_code", 0) != 409:  # its removal is in progress
                        raise
        except (DockerException, OSError):  # the engine is gone, and cannot be asked
            return
        empty = 0 if found else empty + 1
        if empty > 1:
            return
        time.sleep(SURE)


def execute(file: str, folder: Path, rounds: str, silo_image: str, coordinator_image: str) -> dict[str, Any]:
    """In the run's own session: execute the pipeline, and say how it ended from what the store shows."""
    from silotune.pipelines.federated_finetuning import federated_finetuning

    try:
        federation = Federation.load(file)
        store = Rounds.of(federation)
        before = sum(commit.counts for commit in store.commits())
        client = connect()
        remove(client, f"{FEDERATION_LABEL}={federation.file}")  # left by a run that was killed: no other one can be going on
        container_plan.make_folders(federation)
        _prepare(client, federation, folder)
        pipeline = federated_finetuning(federation, int(rounds), images=Images(silo_image, coordinator_image))
        try:
            ended = Ended(str(pipeline(federation=file).output), "")
        except (RuntimeError, ValueError, LookupError, TypeError) as error:  # of kfp: a task failed, or its output is missing
            ended = Ended("", str(error))
        finally:
            remove(client, f"{RUN_LABEL}={folder.name}")
        return verdict(federation, store, before, int(rounds), folder, ended)
    except (SilotuneError, OSError) as error:
        return {"exit_code": getattr(error, "exit_code", 1), "message": str(error), "output": ""}


def verdict(federation: Federation, store: Rounds, before: int, rounds: int, folder: Path, ended: Ended) -> dict[str, Any]:
    """What a run came to, from the store; why, from the events in its folder.

    Args:
        before: rounds that were committed when it began.
        rounds: it was to work on.
        ended: what the runner says; only shown.
    """
    if broke := engines.failure(folder):
        return broke
    commits = list(store.commits())
    made = sum(commit.counts for commit in commits) - before
    missing = []
    if made < rounds and not (commits and commits[-1].converged and federation.rounds.until):
        missing.append(f"{max(0, made)} of {rounds} rounds are committed")
    exported = status.export(federation, store) if commits else None
    if exported is None or not status.is_current(federation, store, exported):
        missing.append("the model is not exported")
    if not missing:
        assert exported
        return {"exit_code": 0, "message": "", "output": exported.location}
    said = f"the pipeline failed: {ended.error}" if ended.error else "the pipeline says that it went well, but it did not"
    why = [f"{box}'s container ended without a result (killed, out of memory, or unable to start)" for box in unfinished(folder)]
    return {"exit_code": 1, "message": "; ".join([said, f"in the store {' and '.join(missing)}", *why]), "output": ""}


def unfinished(folder: Path) -> list[str]:
    """The boxes that told of their start and not of their end."""
    begun: dict[str, int] = {}
    for event in read_events(folder, 0)[0]:
        box = f"{event['box']} {event['silo']}".rstrip()
        begun[box] = begun.get(box, 0) + {"started": 1, "ended": -1, "broke": -1}.get(event["what"], 0)
    return [box for box, count in begun.items() if count > 0]


def _prepare(client: DockerClient, federation: Federation, folder: Path) -> None:
    """Have `kfp.local` run tasks in containers, each with what its own party gets."""
    from docker.errors import DockerException
    from docker.types import Mount
    from kfp import local
    from kfp.local import docker_task_handler
    from kfp.local.status import Status

    plans = {party: container_plan.plan(federation, party, folder) for party in (container_plan.COORDINATOR, *federation.silo_ids)}
    options = client.info().get("SecurityOptions") or []

    class Handler(docker_task_handler.DockerTaskHandler):
        """One task. KFP gives all tasks of a run the same folders and network; here they are those of its party."""

        def __init__(self, image: str, full_command: list[str], pipeline_root: str, runner: Any, env_vars: dict[str, str]) -> None:
            plan = plans[env_vars[PARTY_VARIABLE]]
            runner = copy.copy(runner)
            mounts = [Mount(str(p), str(p), type="bind", read_only=True) for p in plan.read]
            mounts += [Mount(str(p), str(p), type="bind") for p in plan.write]
            runner.container_run_args = runner.container_run_args | {"mounts": mounts, "network_mode": plan.network}
            super().__init__(image, full_command, pipeline_root, runner, env_vars | plan.environment)

        def get_volumes_to_mount(self, client: Any = None) -> dict[str, Any]:
            return {}  # the run folder, where outputs go, is among the party's

        def run(self) -> Any:
            try:
                return super().run()
            except (DockerException, OSError) as error:
                print(f"the Docker engine: {error}", flush=True)
                code = 1 if isinstance(error, DockerException) else UnreachableError.exit_code  # it refused, or has gone away
                tell("container", "broke", exit_code=code, detail=f"the Docker engine could not run a task: {error}")
                return Status.FAILURE

    docker_task_handler.DockerTaskHandler = Handler
    local.init(
        runner=local.DockerRunner(**restrictions(options), labels={FEDERATION_LABEL: str(federation.file), RUN_LABEL: folder.name}),
        pipeline_root=str(folder / "kfp"),
        workspace_root=str(folder / "kfp"),
        raise_on_error=True,
    )


def restrictions(options: list[str]) -> dict[str, Any]:
    """What every container is run with, whatever its party; it reaches nothing and nobody unless the party's plan says so.

    Args:
        options: the engine's security options, as in `docker info`.
    """
    rootless = any("rootless" in option for option in options)  # there, root is the caller
    selinux = any("selinux" in option for option in options)  # whose labels the caller's folders do not have
    return {
        "user": "0:0" if rootless else f"{os.getuid()}:{os.getgid()}",
        "group_add": [] if rootless else [str(group) for group in os.getgroups()],
        "network_mode": "none",
        "read_only": True,
        "tmpfs": {"/tmp": "mode=1777"},  # noqa: S108 (in the container)
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges", *(["label=disable"] if selinux else [])],
        "init": True,  # passes signals on, and lets the container end with its box
        "entrypoint": [""],  # of the image: none
    }


if __name__ == "__main__":
    engines.in_session(execute)
