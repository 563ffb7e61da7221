"""The chaos suite: seeded scenarios in parallel workers, and a report of what was done to the federations and what it cost.

    python tests/chaos/run.py                      200 scenarios in 2 workers
    python tests/chaos/run.py --seed 17            one scenario again
    python tests/chaos/run.py --scenarios 12       the first 12
    python tests/chaos/run.py --secure --scenarios 40    the first 40 of those that sum securely

Exit code 1 where an invariant is broken. The folder of a broken scenario stays, with every life's log.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import traps
from scenario import draw

HERE = Path(__file__).resolve()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--secure", action="store_true", help="only federations that sum securely")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where federations are; default: a new temporary one")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    asked = parser.parse_args()
    every = (seed for seed in itertools.count(asked.first) if not asked.secure or draw(seed).secure)
    seeds = [asked.seed] if asked.seed is not None else list(itertools.islice(every, asked.scenarios))
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="silotune-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{len(seeds)} scenarios in {folder}; traps: {traps.how()}", flush=True)
    began = time.monotonic()
    results = play(seeds, folder, min(asked.workers, len(seeds)))
    seconds = time.monotonic() - began
    tally = sum((collections.Counter(r["tally"]) for r in results), collections.Counter())
    broken = [r for r in results if r["problem"]]
    report(results, tally, seconds)
    if asked.json:
        numbers = {
            "scenarios": len(results),
            "broken": len(broken),
            "seconds": seconds,
            "traps": traps.how(),
            **dict(sorted(tally.items())),
        }
        asked.json.write_text(json.dumps(numbers, indent=1))
    for result in broken:
        print(f"\nBROKEN: repeat with {sys.executable} {HERE} --seed {result['seed']}\n{result['problem'][:6000]}", flush=True)
    if len(results) < len(seeds):
        print(f"\nBROKEN: {len(seeds) - len(results)} scenarios were not played, a worker has died", flush=True)
    return int(bool(broken) or len(results) < len(seeds))


def play(seeds: list[int], folder: Path, workers: int) -> list[dict[str, Any]]:
    """Hand each worker the next seed when it has done with the last. Whole runs, which take longest, come first."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for seed in sorted(seeds, key=lambda s: not draw(s).whole_run):
        waiting.put(seed)
    results: list[dict[str, Any]] = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def work(number: int) -> None:
        with (folder / f"worker-{number}.log").open("w") as log:
            worker = subprocess.Popen(
                [sys.executable, str(HERE.with_name("worker.py")), str(folder)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            )  # fmt: skip
            assert worker.stdin
            assert worker.stdout
            with worker.stdin, worker.stdout:
                while True:
                    try:
                        seed = waiting.get_nowait()
                    except queue.Empty:
                        break
                    worker.stdin.write(f"{seed}\n")
                    worker.stdin.flush()
                    line = worker.stdout.readline()
                    if not line:
                        print(f"seed {seed}: the worker died, see {log.name}", flush=True)
                        return
                    results.append(found := json.loads(line))
                    if len(results) % 25 == 0:
                        print(f"{len(results)} of {len(seeds)}", flush=True)
                    if found["problem"]:
                        print(f"seed {seed}: BROKEN: {found['problem'][:200]}", flush=True)
            worker.wait()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(results, key=lambda r: int(r["seed"]))


def report(results: list[dict[str, Any]], tally: collections.Counter[str], seconds: float) -> None:
    whole = sum(r["whole run"] for r in results)
    lost = sum(r["problem"].startswith("LOST") for r in results)
    print(
        f"\nscenarios {len(results)} ({whole} whole runs through KFP, {sum(draw(r['seed']).secure for r in results)} that sum securely), broken {sum(bool(r['problem']) for r in results)}, {seconds:.0f} s"
    )
    print(
        f"lives {tally['lives']}, of which {tally['lives that fail']} say why they fail; second runs at once {tally['second runs at once']}"
    )
    print(f"rounds lost {lost}; secure sums opened, exact to the last bit {tally['secure sums opened']}")
    print("faults injected")
    for name, count in sorted(tally.items()):
        if name.startswith("fault: "):
            print(f"  {name.removeprefix('fault: '):<24}{count:>8}")
    print("kills by box and call")
    boxes: dict[str, dict[str, int]] = {}
    for name, count in tally.items():
        if name.startswith("killed: "):
            box, _, call = name.removeprefix("killed: ").partition(" ")
            boxes.setdefault(box, {})[call] = count
    for box, calls in sorted(boxes.items()):
        print(f"  {box:<12}{sum(calls.values()):>5}   " + ", ".join(f"{call} {n}" for call, n in sorted(calls.items())))
    print("damage to stored objects")
    for name in ("mended by itself", "refusals that name the object", "restored from a backup", "mended by hand"):
        print(f"  {name:<32}{tally[name]:>8}")
    print("cost")
    for name, of in (("trainings repeated", "trainings"), ("steps repeated", "steps"), ("bytes sent again", "bytes stored")):
        print(f"  {name:<24}{tally[name]:>12} of {tally[of]} {of}")


if __name__ == "__main__":
    sys.exit(main())
