"""Runs federations to their end in forks, and kills each at a chosen moment of a chosen write to the store.

    python crashing.py < scenarios      a line a scenario: {"file": federation, "event": number or null}; prints a JSON line for each

With an event, one life is killed at its so-manieth moment and another then lives to the end. Without, the life is undisturbed, and the line
says which box made which write. Every write has three moments: before it, during it (the bytes are on disk under a temporary name), after it.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from silotune.components import best_global
from silotune.components.rounds import Rounds
from silotune.components.store import directory_store
from silotune.pipelines.simulate import Simulation

MOMENTS = ("before", "during", "after")
box = "none"
seen: list[tuple[str, str, str]] = []  # (box, moment, what)


def watch(kill_at: int | None) -> None:
    """Note every moment; kill this process at one."""

    def moment(which: str, what: str) -> None:
        seen.append((box, which, what))
        if kill_at is not None and len(seen) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(name: str) -> None:
        inner = getattr(directory_store.DirectoryStore, name)

        def write(self: Any, key: str, *rest: Any) -> Any:
            moment("before", key)
            result = inner(self, key, *rest)
            moment("after", key)
            return result

        setattr(directory_store.DirectoryStore, name, write)

    link, replace = os.link, Path.replace

    def linking(source: Any, target: Any, **options: Any) -> None:
        moment("during", str(target))
        link(source, target, **options)

    def replacing(source: Path, target: Any) -> Path:
        moment("during", str(target))
        return replace(source, target)

    around("create")
    around("put_file")
    directory_store.os.link = linking
    Path.replace = replacing  # type: ignore[method-assign]


def name_boxes() -> None:
    """Remember which box is at work."""
    for name in ("preprocess", "initialize", "train", "aggregate", "evaluate", "export"):
        step = importlib.import_module(f"silotune.components.{name}.step")

        def work(*arguments: str, inner: Any = step.work, name: str = name) -> str:
            global box
            box = name
            return str(inner(*arguments))

        step.work = work


def live(file: str) -> dict[str, Any]:
    simulation = Simulation(file)
    for _ in simulation.run():
        pass
    simulation.test()
    simulation.export()
    rounds: Rounds = simulation.rounds
    commits = list(rounds.commits())
    return {
        "globals": [c.outgoing for c in commits],
        "chained": all(c.previous == p.digest for p, c in itertools.pairwise(commits)),
        "best": best_global.best_round(rounds),
        "attempts": {c.round: len(rounds.attempts(c.round)) for c in commits if c.round},
    }


def scenario(file: str, event: int | None) -> dict[str, Any]:
    if event is None:
        watch(None)
        return live(file) | {"seen": seen}
    pid = os.fork()
    if pid == 0:
        watch(event)
        live(file)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    return live(file) | {"killed": killed}


def main() -> None:
    for package in ("torch", "transformers", "accelerate", "peft"):
        importlib.import_module(package)
    name_boxes()
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what steps print belongs to no result
    for line in sys.stdin:
        if os.fork() == 0:  # each scenario in a process of its own, with nothing used yet
            print(json.dumps(scenario(**json.loads(line))), file=results, flush=True)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.wait()[1]):
            raise SystemExit(f"a life that was not to be killed ended badly: {line}")


if __name__ == "__main__":
    main()
