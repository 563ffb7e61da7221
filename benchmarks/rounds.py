"""What does a round with many silos cost the coordinator, by the protocol?

    python benchmarks/rounds.py [--silos 10 100 1000] [--numbers 20000] [--fan-in 16] [--folder FOLDER]

Silos' updates are made up in numpy, each signed with a key of its own, and lie in a store in a folder with their signed manifests. Measured are the
very steps that a pipeline calls, each in a process of its own on one thread: ``combine`` for every group, then ``aggregate``, which reads the
groups' sums; and, on a twin of the federation, ``aggregate`` alone, which reads all updates. Both must come to the same global. A step reads
manifests, headers and tensors, checks digests, norms and signatures, and ``aggregate`` commits the round and opens the next one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
TENSORS = 20


def make(folder: Path, count: int, numbers: int, fan_in: int) -> str:
    """A federation whose silos have all delivered to round 1; returns the turn."""
    import numpy as np
    import yaml

    from silotune.components import keys, opening
    from silotune.components.federation import Federation
    from silotune.components.learning.tensor_file import open_tensor_file, to_bytes, write_tensor_file
    from silotune.components.learning.update import Codec, Header, write_update
    from silotune.components.protocol import Commit, UpdateManifest
    from silotune.components.rounds import Rounds

    silos = [{"id": f"s{k:04d}", "train": "./t.jsonl"} for k in range(count)]
    terms = {"name": "many", "model": {"base": "./base", "method": "full"}, "silos": silos, "aggregation": {"fan_in": fan_in},
             "rounds": {"total": 2}, "tracking": {"uri": "none"}}  # fmt: skip
    (folder / "f.yaml").write_text(yaml.safe_dump(terms))
    federation = Federation.load(folder / "f.yaml")
    keys.ensure(federation)
    rounds, agreement = Rounds.of(federation), federation.agreement("b" * 64, "t" * 64)
    rounds.put_agreement(agreement)
    shapes = {f"layers.{n:02d}.weight": (numbers // TENSORS,) for n in range(TENSORS)}
    ones = ((n, to_bytes(np.ones(s, np.float32), "F32")) for n, s in sorted(shapes.items()))
    write_tensor_file(folder / "initial", shapes, "F32", ones, {"format": "pt"})
    first = Commit(
        round=0, outcome="initialized", custody=federation.custody, best=0, agreement=agreement.digest, plan=None, attempt=0, contributions={},
        missing={}, previous=None, incoming=None, outgoing=rounds.put_object(folder / "initial"), started=1.0, at=1.0,
    )  # fmt: skip
    turn = opening.open_next(federation, rounds, rounds.write_commit(first), agreement, {})
    plan = rounds.plan(1)
    assert plan is not None
    for k, silo in enumerate(federation.silo_ids):
        rng, examples = np.random.default_rng(k), 1 + k % agreement.training.steps
        header = Header(
            federation="many", agreement=plan.agreement, round=1, silo=silo, plan=plan.digest, base=plan.base, incoming=plan.incoming, steps=1,
            examples=examples, tokens=examples, cursor=examples, loss=1.0, norm=0.0, codec=Codec(name="float32"), tensors={},
        )  # fmt: skip
        tensors = {n: 1e-3 * rng.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}
        path = folder / "update"
        header = write_update(path, header, tensors, lambda message, silo=silo: rounds.sign(silo, 1, message))
        rounds.write_update(
            UpdateManifest(
                round=1, silo=silo, agreement=plan.agreement, plan=plan.digest, incoming=plan.incoming, object=rounds.put_object(path, silo),
                header=open_tensor_file(path).header_digest, bytes=path.stat().st_size, examples=examples, tokens=examples, steps=1,
                cursor=examples, codec="float32", norm=header.norm, loss=1.0,
            )
        )  # fmt: skip
    return turn.text


def prepared(*what: Any) -> str:
    """The same without waiting for the disk, which nobody measures: four times for each silo."""
    fsync, os.fsync = os.fsync, lambda _: None
    try:
        return make(*what)
    finally:
        os.fsync = fsync


def measure(box: str, file: str, turn: str, *arguments: str) -> dict[str, float]:
    """One step in this process: seconds by the clock and of the processor, and MiB at the step's start and at the peak."""
    import importlib

    work = importlib.import_module(f"silotune.components.{box}.step").work

    def memory() -> float:
        line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    base, cpu, wall = memory(), time.process_time(), time.perf_counter()
    work(file, turn, *arguments)
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "base": base, "peak": memory()}


def measured(*words: str) -> dict[str, float]:
    """The same in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", *words], env=os.environ | THREADS, stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def outgoing(folder: Path) -> str:
    commit = json.loads((folder / ".silotune/store/many/rounds/00001/commit.json").read_bytes())
    return f"{commit['outgoing']} of {len(commit['contributions'])}"


def row(what: str, silos: int, found: list[dict[str, float]]) -> str:
    wall, cpu = (sum(m[key] for m in found) for key in ("wall", "cpu"))
    most = max(m["peak"] - m["base"] for m in found)
    return f"| {silos} | {what} | {wall:.2f} | {cpu:.2f} | {1000 * cpu / silos:.1f} | {most:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--silos", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--numbers", type=int, default=20_000, help="of each update")
    parser.add_argument("--fan-in", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where the federations are made")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    print(f"Updates of {options.numbers:,} numbers in {TENSORS} tensors, fan_in {options.fan_in}\n")
    print("| silos | step | wall s | CPU s | CPU ms per silo | memory above the start, MiB |\n|--:|---|--:|--:|--:|--:|", flush=True)
    for count in options.silos:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            boxed, alone = Path(name) / "boxed", Path(name) / "alone"
            boxed.mkdir()
            turn = prepared(boxed, count, options.numbers, options.fan_in)
            shutil.copytree(boxed, alone)
            groups = -(-count // options.fan_in) if count > options.fan_in else 0
            if groups:
                found = [measured("combine", str(boxed / "f.yaml"), turn, str(n)) for n in range(1, groups + 1)]
                print(row(f"combine, {groups} groups", count, found))
                print(row("aggregate of the groups' sums", count, [measured("aggregate", str(boxed / "f.yaml"), turn)]), flush=True)
            print(row("aggregate alone", count, [measured("aggregate", str(alone / "f.yaml"), turn)]), flush=True)
            if groups and outgoing(boxed) != outgoing(alone):
                sys.exit("the globals differ")


if __name__ == "__main__":
    main()
