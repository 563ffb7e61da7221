"""What does a run cost beyond its arithmetic? `silotune run` against one bare torch process that does the same training and scoring.

    python benchmarks/overhead.py [--data ../shared/data/medquad] [--model ../shared/models/silotiny-3m] [--cold]

3 silos × 3 rounds × 20 steps of LoRA. The floor imports once, loads the model once, and then only trains, averages and scores: same examples,
same batches, same number of evaluations. Beyond it a run pays, 20 times, for interpreters, imports, model loads, KFP, the store and
tracking. Run it on an idle machine. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
SILOS = ("cancergov", "niddk", "ninds")
ROUNDS, STEPS, VALID = 3, 20, 40


def write_file(folder: Path, data: Path, model: str) -> Path:
    """A federation whose test splits are as small as its valid ones, so that scoring does not drown what is measured."""
    silos = []
    for silo in SILOS:
        (folder / silo).mkdir()
        for split, most in (("train", 10**9), ("valid", VALID), ("test", VALID)):
            lines = (data / silo / f"{split}.jsonl").read_text().splitlines(keepends=True)
            (folder / silo / f"{split}.jsonl").write_text("".join(lines[:most]))
        silos.append({"id": silo} | {split: f"./{silo}/{split}.jsonl" for split in ("train", "valid", "test")})
    terms = {
        "name": "overhead",
        "model": {"base": model, "lora": {"r": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"]}},
        "data": {"max_length": 128},
        "silos": silos,
        "rounds": {"total": ROUNDS},
        "training": {"steps": STEPS, "batch_size": 8},
    }
    (folder / "federation.yaml").write_text(yaml.safe_dump(terms))
    return folder / "federation.yaml"


def timed(command: list[str]) -> tuple[float, float]:
    """(wall, CPU) seconds of a command and all it starts."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def floor(file: str) -> None:
    """The bare process: plain torch on the shards of a finished run. Prints its seconds in arithmetic."""
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from silotune.components.federation import Federation
    from silotune.components.learning.batches import batches, stream
    from silotune.components.silo_job import silo_home
    from silotune.components.train.step import open_split

    federation = Federation.load(file)
    terms = federation.training
    base = AutoModelForCausalLM.from_pretrained(federation.model.base)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    shards = {s: {p: open_split(silo_home(federation, federation.silo(s)), p) for p in ("train", "valid", "test")} for s in SILOS}
    length = federation.data.max_length
    began = time.perf_counter()

    def loss_of(batch: Any) -> Any:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids).logits
        wanted = batch.targets[:, 1:]
        return torch.nn.functional.cross_entropy(logits[:, :-1][wanted].float(), batch.input_ids[:, 1:][wanted])

    def score(shard: Any) -> None:
        model.eval()
        order = np.argsort(shard.lengths(np.arange(len(shard))), kind="stable")
        with torch.inference_mode():
            for start in range(0, len(order), federation.evaluation.batch_size):
                for batch in batches(shard, order[start : start + federation.evaluation.batch_size], 1, length, 1, packing=True):
                    loss_of(batch)

    incoming = [p.detach().clone() for p in parameters]
    for number in range(ROUNDS):
        updates = []
        for silo in SILOS:
            with torch.no_grad():
                for p, value in zip(parameters, incoming, strict=True):
                    p.copy_(value)
            score(shards[silo]["valid"])
            model.train()
            optimizer = torch.optim.AdamW(parameters, lr=terms.learning_rate, weight_decay=0.0)
            for step in range(STEPS):
                at = (number * STEPS + step) * terms.batch_size
                indices = stream(len(shards[silo]["train"]), at, terms.batch_size, federation.name, terms.seed, silo)
                (batch,) = batches(shards[silo]["train"], indices, 1, length, 1, packing=True)
                loss_of(batch).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            updates.append([p.detach() - value for p, value in zip(parameters, incoming, strict=True)])
        incoming = [value + sum(parts) / len(parts) for value, *parts in zip(incoming, *updates, strict=True)]
    for silo in SILOS:  # the evaluate boxes: valid of the last, test of first and last
        for split in ("valid", "test", "test"):
            score(shards[silo][split])
    print(json.dumps({"arithmetic": time.perf_counter() - began}))


def parts(file: Path) -> dict[str, float]:
    """Seconds of single ingredients, each measured by itself in a process that has what it needs already imported."""
    from silotune.components import tracking
    from silotune.components.federation import Federation
    from silotune.components.learning import model as models
    from silotune.components.rounds import Rounds

    federation = Federation.load(file)
    rounds = Rounds.of(federation)
    folder = Path(federation.model.base)
    commit = rounds.commit(1)
    agreement = rounds.agreement(commit.agreement)
    models.load_trainable(folder, agreement.model, 0)
    tracking.sync(federation, rounds, complete=True)

    def once(what: Any, times: int = 5) -> float:
        began = time.perf_counter()
        for _ in range(times):
            what()
        return (time.perf_counter() - began) / times

    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "x"

        def store() -> None:
            rounds.fetch_object(commit.outgoing, target)
            rounds.store.put_file(rounds.key("objects", f"probe-{time.time_ns()}"), target)
            rounds.latest()
            rounds.plan(1)
            rounds.store.create(rounds.key(f"probe-{time.time_ns()}"), b"{}")

        return {
            "model and tokenizer load": once(lambda: (models.load_tokenizer(folder), models.load_trainable(folder, agreement.model, 0))),
            "store: fetch, put, read, create": once(store),
            "tracking: one sync": once(lambda: tracking.sync(federation, rounds, complete=True)),
            "interpreter": once(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True)),
            "import kfp's executor": once(
                lambda: subprocess.run(
                    [sys.executable, "-c", "import os; os.environ['_KFP_RUNTIME'] = 'true'; import kfp.dsl.executor_main"], check=True
                )
            ),
            "import federation, rounds, silo_job": once(
                lambda: subprocess.run([sys.executable, "-c", "import silotune.components.silo_job"], check=True)
            ),
            "import torch, transformers, peft, MLflow (once a run)": once(
                lambda: subprocess.run(
                    [
                        sys.executable,
                        "-c",
                        "import torch, transformers, peft, mlflow.tracking; import transformers.models.llama.modeling_llama",
                    ],
                    check=True,
                ),
                1,
            ),
        }


def report(run: tuple[float, float], bare: tuple[float, float], arithmetic: float, ingredients: dict[str, float], folder: Path) -> str:
    events = [json.loads(line) for line in next((folder / ".silotune" / "runs").glob("*/events.jsonl")).read_text().splitlines()]
    inside = [e for e in events if e["what"] == "ended"]
    tasks = len(inside)
    within = sum(e["seconds"] for e in inside)
    beyond = run[0] - bare[0]
    lines = ["| | wall s | CPU s |", "|---|--:|--:|"]
    lines += [
        f"| `silotune run`, {tasks} tasks | {run[0]:.1f} | {run[1]:.1f} |",
        f"| floor: one bare process | {bare[0]:.1f} | {bare[1]:.1f} |",
    ]
    lines += [
        f"| ratio | {run[0] / bare[0]:.2f} | {run[1] / bare[1]:.2f} |",
        f"| beyond the floor | {beyond:.1f} | {run[1] - bare[1]:.1f} |",
    ]
    lines += [f"| beyond the floor, a task | {beyond / tasks:.2f} | {(run[1] - bare[1]) / tasks:.2f} |", ""]
    lines += ["| where a run's wall time goes | s |", "|---|--:|", f"| inside the boxes' work | {within:.1f} |"]
    lines += [
        f"| of it the floor's arithmetic | {arithmetic:.1f} |",
        f"| first box, waiting for the warm parent's imports | {inside[0]['seconds']:.1f} |",
    ]
    lines += [f"| outside: KFP, interpreters, start and end of the command | {run[0] - within:.1f} |", ""]
    lines += [
        "| ingredient, measured by itself | s |",
        "|---|--:|",
        *(f"| {name} | {seconds:.3f} |" for name, seconds in ingredients.items()),
    ]
    by_box: dict[str, list[float]] = {}
    for event in inside:
        by_box.setdefault(event["box"], []).append(event["seconds"])
    lines += ["", "| box | tasks | mean s inside |", "|---|--:|--:|"]
    return "\n".join([*lines, *(f"| {box} | {len(s)} | {sum(s) / len(s):.2f} |" for box, s in by_box.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "medquad")
    parser.add_argument("--model", default=str(ROOT.parent / "shared" / "models" / "silotiny-3m"))
    parser.add_argument("--cold", action="store_true", help="without the warm parent")
    parser.add_argument("--floor", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.floor:
        floor(given.floor)
        return
    with tempfile.TemporaryDirectory() as name:
        file = write_file(Path(name), given.data.resolve(), given.model)
        run = timed([sys.executable, "-m", "silotune.pipelines.cli", "run", str(file), *(["--no-warm"] if given.cold else [])])
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        told = subprocess.run([sys.executable, __file__, "--floor", str(file)], capture_output=True, text=True, check=True).stdout
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        bare = (time.perf_counter() - started, ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime)
        print(report(run, bare, json.loads(told.splitlines()[-1])["arithmetic"], parts(file), Path(name)))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
