"""Engines: where a federation's pipeline runs. For now this machine: `kfp.local`, every task a subprocess.

    start(federation, rounds)      launch a run in a process session of its own; returns a `LocalRun` to watch and to stop
    python -m silotune.pipelines.engines FEDERATION ROUNDS RUN_FOLDER      what that session executes

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from silotune.components.child import WARM_VARIABLE, die_with
from silotune.components.errors import RefusedError, SilotuneError
from silotune.components.federation import Federation
from silotune.components.progress import RUN_VARIABLE

KEEP = 10  # run folders kept


@dataclass
class LocalRun:
    """A run on this machine, as its starter sees it."""

    folder: Path
    process: subprocess.Popen[bytes]
    began: float = field(default_factory=time.time)

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

    def result(self) -> dict[str, Any]:
        """After the end: {"exit_code", "message", "output"}."""
        try:
            return dict(json.loads((self.folder / "result.json").read_text()))
        except (OSError, ValueError):
            return {"exit_code": 1, "message": f"the run ended without a result; see {self.log}", "output": ""}


def start(federation: Federation, rounds: int, *, warm: bool = True) -> LocalRun:
    """Launch a run of ``rounds`` rounds. ``warm`` starts a warm parent, which saves every step its imports.

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
    arguments = [str(federation.file), str(rounds), str(folder), "warm" if warm else "cold"]
    with (folder / "run.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "silotune.pipelines.engines", *arguments],
            stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[going.fileno()],
        )  # fmt: skip
    going.close()  # from here on the run itself holds the lock, for as long as it lives
    return LocalRun(folder, process)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def execute(file: str, rounds: int, folder: Path, warm: bool) -> dict[str, Any]:
    """In the run's own session: execute the pipeline, and say how it ended from what the boxes told."""
    os.environ[RUN_VARIABLE] = str(folder)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context((folder / "alive.lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        if warm:
            stack.enter_context(_warm_parent())
        from kfp import local

        from silotune.pipelines.federated_finetuning import federated_finetuning

        try:
            pipeline = federated_finetuning(Federation.load(file), rounds)
        except SilotuneError as error:
            return {"exit_code": error.exit_code, "message": str(error), "output": ""}
        local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(folder / "kfp"), raise_on_error=True)
        try:
            return {"exit_code": 0, "message": "", "output": pipeline(federation=file).output}
        except RuntimeError as error:  # a task failed; which one and why is among the events
            return _failure(folder) or {"exit_code": 1, "message": f"the pipeline failed: {error}", "output": ""}


def _failure(folder: Path) -> dict[str, Any] | None:
    from silotune.components.progress import read_events

    for event in reversed(read_events(folder, 0)[0]):
        if event["what"] == "broke":
            return {"exit_code": event["exit_code"], "message": event["detail"], "output": ""}
    return None


@contextlib.contextmanager
def _warm_parent() -> Any:
    with tempfile.TemporaryDirectory(prefix="silotune-") as folder:
        address = f"{folder}/warm"
        process = subprocess.Popen([sys.executable, "-m", "silotune.components.warm_parent", address], stdin=subprocess.PIPE)
        while not os.path.exists(address) and process.poll() is None:
            time.sleep(0.02)
        os.environ[WARM_VARIABLE] = address
        try:
            yield
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    die_with(sys.stdin.fileno())
    run_folder = Path(sys.argv[3])
    outcome = execute(sys.argv[1], int(sys.argv[2]), run_folder, sys.argv[4] == "warm")
    (run_folder / "result.part").write_text(json.dumps(outcome))
    (run_folder / "result.part").replace(run_folder / "result.json")
    sys.stdout.flush()
    os._exit(outcome["exit_code"])
