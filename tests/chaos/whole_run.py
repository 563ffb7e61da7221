"""A whole run, as a user has it: `silotune run` through KFP, killed with all its process group, and run again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import invariants
from course import Scene
from invariants import require

SILOTUNE = [sys.executable, "-m", "silotune.pipelines.cli"]
RUN_SECONDS = 300.0
STARTING = 5.0  # seconds within which a run starts up, before it tells of any event


class WholeRun(Scene):
    """One such scenario."""

    def run(self) -> None:
        for number, moment in enumerate(self.scenario.kills):
            self._killed(number, moment)
            self._hold()
        self.tally["lives"] += 1
        log = self.folder / "last.log"
        with log.open("wb") as out:
            last = subprocess.run([*SILOTUNE, "run", str(self.file)], stdout=out, stderr=out, timeout=RUN_SECONDS, check=False)
        require(last.returncode == 0, f"the last run fails: {log.read_text(errors='replace')}")
        require(soon(lambda: not belonging(self.folder)), f"processes outlive a run: {belonging(self.folder)}")
        self._hold()
        invariants.unbroken(self.federation, self.rounds, [], self.folder / "rebuilt")
        require(len(self.committed) == self.scenario.rounds + 1, f"{len(self.committed) - 1} rounds are committed")

    def _killed(self, number: int, moment: float) -> None:
        """One run, killed so many events after its beginning; where the moment is below 1, while it starts up."""
        seen = self._events()
        self.tally["lives"] += 1
        with (self.folder / f"run-{number}.log").open("wb") as out:
            run = subprocess.Popen([*SILOTUNE, "run", str(self.file)], stdout=out, stderr=out, start_new_session=True)
            try:
                if moment >= 1:
                    soon(lambda: self._events() >= seen + int(moment) or run.poll() is not None, RUN_SECONDS)
                time.sleep(moment % 1 * (0.5 if moment >= 1 else STARTING))
            finally:
                over = run.poll() is not None
                if not over:
                    os.killpg(run.pid, signal.SIGKILL)
                run.wait()
        if not over:
            self.tally["fault: kill -9 of a whole run"] += 1
            self.tally[f"killed: whole-run {'starting' if self._events() == seen else 'at work'}"] += 1
        require(soon(lambda: not belonging(self.folder)), f"processes outlive a run: {belonging(self.folder)}")

    def _events(self) -> int:
        """Lines that all runs of this federation have told."""
        return sum(path.read_bytes().count(b"\n") for path in self.folder.glob(".silotune/runs/*/events.jsonl"))


def soon(what: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def belonging(folder: Path) -> list[int]:
    """Processes whose command line or environment names a federation's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"{folder}/".encode() in text:
                found.append(int(entry.name))
    return found
