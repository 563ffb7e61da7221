"""How much faster do several processes train one silo? Steps per second of 1 and 2 processes on CPUs, one thread each.

    python benchmarks/processes.py [--data ../shared/data/medquad] [--model ../shared/models/silotiny-3m] [--steps 60]

Forked processes that do what a worker of the train step does, past loading: LoRA on one silo's records, the same steps, packed rows, added-up
gradients. Each number of processes has three tries in turn, and the fastest counts. Run it on an idle machine with a core per process:
a step is as slow as its slowest process. Prints Markdown.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

LENGTH, BATCH, TRIES = 128, 16, 3
PACKAGES = ("torch.distributed", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama", "peft", "accelerate")


def shard_of(data: Path, model: Path, folder: Path) -> Path:
    """The records of one silo as preprocess lays them."""
    from silotune.components.learning import model as models
    from silotune.components.learning.tokens import Tokeniser, write_shard

    records = [json.loads(line) for line in (data / "ninds" / "train.jsonl").read_text().splitlines()]
    lines = ((f"ninds:{i}", {"prompt": r["prompt"], "response": r["response"]}) for i, r in enumerate(records))
    tokeniser = Tokeniser(models.load_tokenizer(model), "{prompt}\n{response}", LENGTH, "truncate")
    write_shard(folder, lines, tokeniser, "ninds")
    return folder


def rank_of(rank: int, size: int, port: int, shard: Path, base: Path, steps: int) -> float:
    """In a process of its own: steps per second after the first ten."""
    import torch

    from silotune.components.learning import model as models
    from silotune.components.learning.ranks import joined
    from silotune.components.learning.tokens import open_shard
    from silotune.components.learning.training import Stretch, train
    from silotune.components.terms.training import Training

    torch.set_num_threads(1)
    lora = {"r": 8, "alpha": 16.0, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    model = models.load_trainable(base, {"method": "lora", "dtype": "float32", "lora": lora}, 0)
    terms = Training(steps=steps, batch_size=BATCH, precision="float32")
    times: list[float] = []
    with joined(rank, size, "127.0.0.1", port) as ranks:
        train(
            model,
            open_shard(shard),
            Stretch(("benchmark",), 0),
            terms,
            1e-3,
            LENGTH,
            0,
            lambda *_: times.append(time.perf_counter()),
            ranks=ranks,
        )
        ranks.leave()
    return (len(times) - 11) / (times[-1] - times[10])


def measure(size: int, shard: Path, base: Path, steps: int) -> float:
    """Steps per second of so many processes; they are all forked, so that each starts anew."""
    from silotune.components.process.nodes import Layout, Table

    for package in PACKAGES:  # once, before the fork
        importlib.import_module(package)
    table = Table.kept(Layout(1, size), {})
    children = []
    gate, opener = os.pipe()  # a fork while the table's thread answers another rank could inherit a lock of glibc's that nobody opens
    for rank in range(size):
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(opener)
                os.read(gate, 1)
                os.write(theirs, str(rank_of(rank, size, table.port, shard, base, steps)).encode())
            finally:
                os._exit(0)
        os.close(theirs)
        children.append((pid, ours))
    os.close(opener)
    found = [os.read(pipe, 100) for _, pipe in children]
    for pid, pipe in children:
        os.waitpid(pid, 0)
        os.close(pipe)
    os.close(gate)
    return float(found[0])


def main() -> None:
    root = Path(__file__).resolve().parents[2] / "shared"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=root / "data" / "medquad")
    parser.add_argument("--model", type=Path, default=root / "models" / "silotiny-3m")
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shard = shard_of(given.data, given.model, Path(folder) / "shard")
        tries = [[measure(size, shard, given.model, given.steps) for size in (1, 2)] for _ in range(TRIES)]
    one, two = (max(t[i] for t in tries) for i in (0, 1))
    print("| processes | steps/s | ratio |\n|--:|--:|--:|")
    print(f"| 1 | {one:.2f} | |\n| 2 | {two:.2f} | {two / one:.2f} |")
    print("\nAll tries: " + "; ".join(f"{a:.2f} and {b:.2f}" for a, b in tries) + f". Load average at the end: {os.getloadavg()[0]:.1f}.")


if __name__ == "__main__":
    main()
