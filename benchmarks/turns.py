"""Measurements, each in a process of its own so that its peak memory is its own, that take turns so that a busy moment falls on all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
MIB = 1 << 20
Measured = dict[str, float]  # wall and cpu in seconds, base and peak in MiB


def peak_memory() -> float:
    """This process's, so far, in MiB."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def timed(work: Callable[[], object]) -> Measured:
    base, cpu, wall = peak_memory(), time.process_time(), time.perf_counter()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "base": base, "peak": peak_memory()}


def measured(part: str, what: str, arguments: dict[str, Any]) -> Measured:
    """One measurement in a process of its own."""
    command = [sys.executable, sys.argv[0], part, "--measure", what, "--arguments", json.dumps(arguments)]
    done = subprocess.run(command, env=os.environ | THREADS, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def in_turns(part: str, names: list[str], arguments: dict[str, Any], repeats: int) -> dict[str, Measured]:
    """The fastest of some runs of each."""
    runs: dict[str, list[Measured]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            runs[name].append(measured(part, name, arguments))
    return {name: {key: min(run[key] for run in found) for key in found[0]} for name, found in runs.items()}
