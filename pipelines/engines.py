"""Engines: where a federation's pipeline runs. Here: this machine, by `kfp.local`, every task a subprocess (containers: `docker_engine`).

    start(federation, rounds)              launch a run; returns a `LocalRun` to watch and to stop
    launch(federation, module, arguments)  the same for any engine: a module run in a process session of its own
    python -m silotune.pipelines.engines FEDERATION RUN_FOLDER ROUNDS warm|cold      what that session executes

A run folder under ``.silotune/runs`` holds the run's events, its log and KFP's own outputs. The starter holds a lock on it; whatever belongs
to the run ends by itself when the lock is gone, so that nothing outlives a killed terminal. The truth about a run is in the store.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from silotune.components.errors import RefusedError, SilotuneError
from silotune.components.federation import Federation
from silotune.components.process.child import WARM_VARIABLE, die_with
from silotune.components.process.progress import RUN_VARIABLE

KEEP = 10  # run folders kept


@dataclass
class LocalRun:
    """A run on this machine, as its starter sees it."""

    folder: Path
    process: subprocess.Popen[bytes]
    began: float = field(default_factory=time.time)
    clean: Callable[[], None] = lambda: None  # after a stop: what does not end with the process, such as containers

    @property
    def log(self) -> Path:
        return self.folder / "run.log"

    def running(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        """End the run and everything in it; what is committed stays."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=3)
        self.clean()

    def result(self) -> dict[str, Any]:
        """After the end: {"exit_code", "message", "output"}."""
        try:
            return dict(json.loads((self.folder / "result.json").read_text()))
        except (OSError, ValueError):
            return {"exit_code": 1, "message": f"the run ended without a result; see {self.log}", "output": ""}


def start(federation: Federation, rounds: int, *, warm: bool = True) -> LocalRun:
    """Launch a run of ``rounds`` rounds. ``warm`` starts a warm parent, which saves every step its imports.

    Raises:
        RefusedError: as of `launch`.
    """
    return launch(federation, "silotune.pipelines.engines", str(rounds), "warm" if warm else "cold")


def launch(federation: Federation, module: str, *arguments: str) -> LocalRun:
    """Run a module in a process session of its own, with the federation file, a new run folder and ``arguments``; its `main` is `in_session`.

    Raises:
        RefusedError: a run of this file is going on; two would write the same silo folders.
    """
    runs = federation.work / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    going = (federation.work / "run.lock").open("w")
    try:
        fcntl.flock(going, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        going.close()
        raise RefusedError(f"{federation.file.name}: a run of it is going on; wait for its end, or stop it") from None
    for old in sorted(p for p in runs.iterdir() if p.is_dir())[:-KEEP]:
        _remove(old)
    folder = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=runs))
    with (folder / "run.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(federation.file), str(folder), *arguments],
            stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[going.fileno()],
        )  # fmt: skip
    going.close()  # from here on the run itself holds the lock, for as long as it lives
    return LocalRun(folder, process)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def execute(file: str, folder: Path, rounds: str, warmth: str) -> dict[str, Any]:
    """In the run's own session: execute the pipeline, and say how it ended from what the boxes told."""
    with contextlib.ExitStack() as stack:
        if warmth == "warm":
            stack.enter_context(_warm_parent())
        from kfp import local

        from silotune.pipelines.federated_finetuning import federated_finetuning

        try:
            pipeline = federated_finetuning(Federation.load(file), int(rounds))
        except SilotuneError as error:
            return {"exit_code": error.exit_code, "message": str(error), "output": ""}
        local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(folder / "kfp"), raise_on_error=True)
        try:
            return {"exit_code": 0, "message": "", "output": pipeline(federation=file).output}
        except RuntimeError as error:  # a task failed; which one and why is among the events
            return failure(folder) or {"exit_code": 1, "message": f"the pipeline failed: {error}", "output": ""}


def failure(folder: Path) -> dict[str, Any] | None:
    """The result of a run whose coordinator's box told that it broke; None where none did."""
    from silotune.components.process.progress import read_events

    for event in reversed(read_events(folder, 0)[0]):
        if event["what"] == "broke":
            return {"exit_code": event["exit_code"], "message": event["detail"], "output": ""}
    return None


@contextlib.contextmanager
def _warm_parent() -> Any:
    with tempfile.TemporaryDirectory(prefix="silotune-") as folder:
        address = f"{folder}/warm"
        process = subprocess.Popen([sys.executable, "-m", "silotune.components.process.warm_parent", address], stdin=subprocess.PIPE)
        while not os.path.exists(address) and process.poll() is None:
            time.sleep(0.02)
        os.environ[WARM_VARIABLE] = address
        try:
            yield
        finally:
            process.kill()
            process.wait()


def in_session(execute: Callable[..., dict[str, Any]]) -> None:
    """The main of an engine's session: ``execute(file, run folder, *arguments)``, alive for as long as its starter, then leave its result."""
    die_with(sys.stdin.fileno())
    file, folder = sys.argv[1], Path(sys.argv[2])
    os.environ[RUN_VARIABLE] = str(folder)
    with (folder / "alive.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome = execute(file, folder, *sys.argv[3:])
    (folder / "result.part").write_text(json.dumps(outcome))
    (folder / "result.part").replace(folder / "result.json")
    sys.stdout.flush()
    os._exit(outcome["exit_code"])


if __name__ == "__main__":
    in_session(execute)
