"""Runs scenarios: reads a seed a line, and answers each with a line of JSON. Imports the heavy packages once; each life is a fork.

python worker.py FOLDER < seeds
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "components"))  # where the faults of stores and networks are

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")  # a fork must not inherit a pool of threads

from course import Broken, Scene, World, fixtures
from scenario import draw
from whole_run import WholeRun

from silotune.components.process.warm_parent import PACKAGES


def make_base(world: World) -> None:
    """The base model and what lies beside it, unless another worker has; in a fork, since it uses what lives must find unused."""
    with (world.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if world.base.exists():
            return
        (world.folder / "references").mkdir()
        if (pid := os.fork()) == 0:

            class Factory:
                def mktemp(self, _: str) -> Path:
                    part = world.folder / "base.part"
                    part.mkdir()
                    return part

            fixtures.tiny_llama.__wrapped__(Factory()).rename(world.base)
            os._exit(0)
        os.waitpid(pid, 0)


def play(seed: int, world: World) -> dict[str, Any]:
    scenario, began = draw(seed), time.monotonic()
    folder = world.folder / f"seed-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    problem = ""
    scene = (WholeRun if scenario.whole_run else Scene)(scenario, world, folder)
    try:
        scene.run()
    except Broken as error:
        problem = str(error)
    except Exception as error:  # what an invariant's own reading raises breaks the scenario as well, not the worker
        problem = f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}"
    if problem:
        problem += f"\n{scenario}\nlogs: {folder}\n{tails(folder)}"
    else:
        shutil.rmtree(folder)
    tally = dict(scene.tally)
    return {"seed": seed, "problem": problem, "tally": tally, "seconds": time.monotonic() - began, "whole run": scenario.whole_run}


def tails(folder: Path) -> str:
    """The last lines of every life's log and events."""
    files = sorted([*folder.glob("*.log"), *folder.glob("*.run/events.jsonl")], key=lambda p: p.stat().st_mtime)
    return "\n".join(f"--- {p.relative_to(folder)}\n{p.read_text(errors='replace')[-1500:]}" for p in files)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the answers stand alone: what is told on the way goes to the log
    world = World(Path(sys.argv[1]))
    for package in PACKAGES:
        if not package.startswith("mlflow"):  # lives track nothing
            importlib.import_module(package)
    make_base(world)
    try:
        for line in sys.stdin:
            print(json.dumps(play(int(line), world)), file=answers, flush=True)
    finally:
        world.close()


if __name__ == "__main__":
    main()
