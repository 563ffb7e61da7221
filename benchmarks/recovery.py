"""What does a crash cost? A run is killed in the middle of a long local training, and started again.

    python benchmarks/recovery.py [--data ../shared/data/medquad] [--model ../shared/models/silotiny-3m] [--kills 3]

One silo trains for 240 steps with a checkpoint every 20; the whole process group of `silotune run` is killed with SIGKILL at a random step, and
the same command is given again. Measured, each as a ratio to a named baseline of the same run:

    recovery      from giving the command again to the first step that had not been done before, beside starting the same command afresh and
                  coming to its first step
    repeated      steps done twice, beside the steps a run without checkpoints does twice (all of them)
    checkpoints   the undisturbed run's training, beside the same one without checkpoints
    signing       signing and verifying the header of an 80 MB update, beside hashing its bytes

Prints Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[1]
SILO, STEPS, EVERY = "ninds", 240, 20


def write_file(folder: Path, data: Path, model: str, every: int) -> Path:
    folder.mkdir()
    terms = {
        "name": "recovery",
        "model": {"base": model, "lora": {"r": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"]}},
        "data": {"max_length": 128},
        "silos": [{"id": SILO} | {split: str(data / SILO / f"{split}.jsonl") for split in ("train", "valid")}],
        "rounds": {"total": 1, "checkpoint_every": every},
        "training": {"steps": STEPS, "batch_size": 8},
        "evaluation": {"max_examples": 40},
        "tracking": {"uri": "none"},
    }
    (folder / "federation.yaml").write_text(yaml.safe_dump(terms))
    return folder / "federation.yaml"


def start(file: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "silotune.pipelines.cli", "run", str(file)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)


def step_of(file: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        beat = json.loads((file.parent / ".silotune-private" / SILO / "recovery" / "heartbeat.json").read_text())
        if beat["box"] == "train":
            return int(beat["step"])
    return 0


def wait_for(process: subprocess.Popen[bytes], file: Path, step: int) -> tuple[int, float]:
    """(step, seconds of this clock) when the training is first seen at ``step`` or beyond."""
    while process.poll() is None:
        if (seen := step_of(file)) >= step:
            return seen, time.perf_counter()
        time.sleep(0.01)
    raise SystemExit(f"the run ended before step {step}: exit code {process.returncode}")


def kill_group(process: subprocess.Popen[bytes], file: Path) -> None:
    """SIGKILL to the command's group and to that of the run it started, as when a machine loses power."""
    run = subprocess.run(["pgrep", "-f", f"silotune.pipelines.engines {file}"], capture_output=True, text=True, check=False).stdout.split()
    for pid in (process.pid, *map(int, run)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(os.getpgid(pid), signal.SIGKILL)
    process.wait()


def finish(file: Path) -> tuple[float, str]:
    """Run to the end: (seconds from the first step to the last, digest of the global)."""
    process = start(file)
    _, first = wait_for(process, file, 1)
    _, last = wait_for(process, file, STEPS)
    if process.wait():
        raise SystemExit(f"the run failed: exit code {process.returncode}")
    return last - first, outgoing(file)


def outgoing(file: Path) -> str:
    commit = file.parent / ".silotune" / "store" / "recovery" / "rounds" / "00001" / "commit.json"
    return str(json.loads(commit.read_text())["outgoing"])


def disturbed(file: Path, at: int) -> dict[str, float]:
    """Kill once at a step, start again, run to the end."""
    began = time.perf_counter()
    process = start(file)
    _, first = wait_for(process, file, 1)
    seen, _ = wait_for(process, file, at)
    kill_group(process, file)
    private = file.parent / ".silotune-private" / SILO / "recovery"
    (private / "heartbeat.json").unlink()
    again = time.perf_counter()
    process = start(file)
    resumed, _ = wait_for(process, file, 1)
    _, useful = wait_for(process, file, seen + 1)
    process.wait()
    return {"fresh": first - began, "recovery": useful - again, "killed": seen, "repeated": seen - (resumed - 1)}


def signing() -> dict[str, float]:
    """Seconds for an update of 20 million float32 numbers."""
    from silotune.components import keys
    from silotune.components.learning.update import Codec, Header, signed_bytes, write_update
    from silotune.components.terms.security import PublicKey

    rng = np.random.default_rng(0)
    tensors = {f"layers.{i}.lora": rng.standard_normal((1000, 1000), np.float32) for i in range(20)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        public = [PublicKey(public=keys.new(folder, "north"))]
        private = keys.private_key(folder / "north.pem")
        common: dict[str, Any] = {"federation": "f", "silo": "north"} | dict.fromkeys(("agreement", "plan", "base", "incoming"), "0" * 64)
        counts: dict[str, Any] = {"round": 1, "examples": 1, "tokens": 1, "steps": 1, "cursor": 1, "loss": 1.0, "norm": 1.0}
        header = write_update(folder / "update", Header(**common, **counts, codec=Codec(name="float32"), tensors={}), tensors)
        message = signed_bytes(header)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            hashlib.sha256((folder / "update").read_bytes()).digest()
            hashed = time.perf_counter()
            signature = keys.signature(private, message)
            if not keys.verify(public, 1, message, signature):
                raise SystemExit("the signature does not hold")
            times.append((hashed - began, time.perf_counter() - hashed))
    return {"hashing": median(t[0] for t in times), "signing": median(t[1] for t in times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "medquad")
    parser.add_argument("--model", default=str(ROOT.parent / "shared" / "models" / "silotiny-3m"))
    parser.add_argument("--kills", type=int, default=3)
    given = parser.parse_args()
    rng = random.Random(17)
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name), given.data.resolve()
        with_checkpoints, reference = finish(write_file(folder / "undisturbed", data, given.model, EVERY))
        without, _ = finish(write_file(folder / "without", data, given.model, 0))
        kills = []
        for i in range(given.kills):
            file = write_file(folder / f"kill-{i}", data, given.model, EVERY)
            kills.append(disturbed(file, rng.randrange(EVERY, STEPS - EVERY)))
            if outgoing(file) != reference:
                raise SystemExit("the disturbed run ended in other bytes than the undisturbed one")
    times = signing()
    print("| killed at step | recovery s | a fresh start s | ratio | steps repeated | without checkpoints | ratio |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for k in kills:
        print(
            f"| {k['killed']:.0f} | {k['recovery']:.1f} | {k['fresh']:.1f} | {k['recovery'] / k['fresh']:.2f} | {k['repeated']:.0f} "
            f"| {k['killed']:.0f} | {k['repeated'] / k['killed']:.2f} |"
        )
    print(f"\nAll ended in the bytes of the undisturbed run. Checkpoints are {EVERY} steps apart.\n")
    print("| | s | baseline | s | ratio |\n|---|--:|---|--:|--:|")
    print(f"| {STEPS} steps with checkpoints | {with_checkpoints:.2f} | without | {without:.2f} | {with_checkpoints / without:.3f} |")
    print(
        f"| sign and verify an 80 MB update | {times['signing']:.5f} | hash it | {times['hashing']:.4f} "
        f"| {times['signing'] / times['hashing']:.4f} |"
    )


if __name__ == "__main__":
    main()
