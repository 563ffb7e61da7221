"""What does record-level privacy cost: in speed, and in quality at ε = 1, 3, 8 and without?

    python benchmarks/privacy.py [--data ../shared/data] [--model ../shared/models/silotiny-3m] [--seeds 17 18 19] [--out FOLDER] [speed] [quality]

speed     tokens per second of the processor's time for steps on 32 records: plain, private, and with Opacus alone
quality   three institutes of medquad, LoRA: every scheme at ε = 8, two of them at every ε and without; loss on all test splits, over seeds

Finished parts are kept in --out, so that the command can be stopped and started again. Prints Markdown. Times are the processor's (one thread),
and ratios are of runs that alternate, since others may use the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[1]
LORA = {"r": 16, "alpha": 32.0, "dropout": 0.0, "target_modules": "all-linear"}
SILOS = ("gard", "ghr", "niddk")
UNITS, WIDTH, STEPS, TURNS = 32, 128, 3, 5
WIDTH_OF_QUALITY = 48  # tokens
EPSILONS = (1.0, 3.0, 8.0)
SCHEMES = ("fedit", "product", "ffa", "rolora")
RATE = 1e-2  # the best of 5e-3 and 1e-2 for ffa at ε = 8, first seed


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["speed", "quality"])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", type=Path, default=ROOT.parent / "shared" / "models" / "silotiny-3m")
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--out", type=Path, default=ROOT / ".silotune" / "privacy")
    return parser.parse_args()


# Speed


def shard_of(given: argparse.Namespace) -> Any:
    from silotune.components.learning.model import load_tokenizer
    from silotune.components.learning.records import read_records
    from silotune.components.learning.tokens import Tokeniser, open_shard, write_shard

    folder = given.out / "shard"
    if not folder.exists():
        records = read_records(given.data / "medquad" / "gard" / "train.jsonl", "prompt-response", {})
        chosen = [record for _, record in zip(range(UNITS), records, strict=False)]
        write_shard(
            folder, chosen, Tokeniser(load_tokenizer(given.model), "Question: {prompt}\nAnswer: {response}", WIDTH, "truncate"), "gard"
        )
    return open_shard(folder)


def timed(
    given: argparse.Namespace, shard: Any, method: str, clipping: str | None, packing: bool, checkpointing: bool = False
) -> Callable[[], float]:
    """Seconds of `STEPS` steps through silotune's own training."""
    from silotune.components.learning import model as models
    from silotune.components.learning.privacy.accounting import Mechanism
    from silotune.components.learning.privacy.private_gradient import Private
    from silotune.components.learning.training import Stretch, train
    from silotune.components.terms.training import Training

    model = models.load_trainable(given.model, {"method": method, "dtype": "float32", "lora": LORA}, 0)
    terms = Training(
        steps=STEPS, batch_size=len(shard), accumulation=4, packing=packing, precision="float32", gradient_checkpointing=checkpointing
    )
    private = None
    if clipping:
        quantile = 2.0 if clipping == "adaptive" else None
        mechanism = Mechanism(sampling_probability=1.0, noise_multiplier=1.0, steps=STEPS, quantile_noise_multiplier=quantile)
        private = Private(mechanism, 1.0, clipping, bytes(32))  # type: ignore[arg-type]

    def once() -> float:
        began = time.process_time()
        train(model, shard, Stretch((1,), 0), terms, 1e-4, WIDTH, 1, private=private)
        return time.process_time() - began

    return once


def opacus(given: argparse.Namespace, shard: Any, ghost: bool, method: str = "lora") -> Callable[[], float]:
    """The same with Opacus alone, which knows one unit a row: per-sample gradients, or their norms first and a second pass backward."""
    import torch
    from opacus import GradSampleModule
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    from silotune.components.learning import model as models
    from silotune.components.learning.batches import collate

    model = models.load_trainable(given.model, {"method": method, "dtype": "float32", "lora": LORA}, 0).train()
    model.config.use_cache = False
    parameters = list(models.trainable(model).values())
    kind = {"max_grad_norm": 1.0, "use_ghost_clipping": True} if ghost else {}
    wrapped = (GradSampleModuleFastGradientClipping if ghost else GradSampleModule)(model, loss_reduction="sum", strict=False, **kind)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    parts = np.array_split(np.arange(len(shard)), 4)

    def losses(indices: np.ndarray) -> Any:
        batch = collate(shard, [[int(i)] for i in indices], 1)
        out = wrapped(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False)
        wanted = batch.targets[:, 1:]
        lost = torch.nn.functional.cross_entropy(out.logits[:, :-1].transpose(1, 2), batch.input_ids[:, 1:], reduction="none")
        return (lost * wanted).sum(1) / wanted.sum(1)

    def step() -> None:
        sums = [torch.zeros_like(p) for p in parameters]
        for indices in parts:
            lost = losses(indices)
            if ghost:
                lost.sum().backward(retain_graph=True)
                factor = wrapped.get_clipping_coef()
                optimizer.zero_grad()
                wrapped.disable_hooks()
                (lost * factor).sum().backward()
                wrapped.enable_hooks()
                for total, p in zip(sums, parameters, strict=True):
                    total += p.grad
            else:
                lost.sum().backward()
                norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in parameters]).norm(dim=0)
                factor = (1.0 / (norms + 1e-6)).clamp(max=1.0)
                for total, p in zip(sums, parameters, strict=True):
                    total += torch.einsum("u,u...", factor, p.grad_sample)
                    p.grad_sample = None
            for p in parameters:
                p.grad = None
        for total, p in zip(sums, parameters, strict=True):
            p.grad = (total + torch.randn_like(total)) / len(shard)
        optimizer.step()
        optimizer.zero_grad()

    def once() -> float:
        began = time.process_time()
        for _ in range(STEPS):
            step()
        return time.process_time() - began

    return once


def speed(given: argparse.Namespace) -> dict[str, list[float]]:
    shard = shard_of(given)
    ways = {
        "plain, packed": timed(given, shard, "lora", None, True),
        "plain, a record a row": timed(given, shard, "lora", None, False),
        "private, packed": timed(given, shard, "lora", "flat", True),
        "private, packed, per-layer": timed(given, shard, "lora", "per-layer", True),
        "private, packed, automatic": timed(given, shard, "lora", "automatic", True),
        "private, packed, adaptive": timed(given, shard, "lora", "adaptive", True),
        "private, a record a row": timed(given, shard, "lora", "flat", False),
        "Opacus, per-sample gradients": opacus(given, shard, False),
        "Opacus, ghost clipping": opacus(given, shard, True),
        "all weights: plain, packed": timed(given, shard, "full", None, True),
        "all weights: private, one unit at a time": timed(given, shard, "full", "flat", False),
        "plain, packed, checkpointing": timed(given, shard, "lora", None, True, True),
        "private, packed, checkpointing": timed(given, shard, "lora", "flat", True, True),
    }
    for once in ways.values():
        once()  # warm
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, once in ways.items():
            seconds[name].append(once())
    tokens = int(shard.offsets[-1]) * STEPS
    return {name: [tokens / s for s in found] for name, found in seconds.items()}


def speed_table(rates: dict[str, list[float]]) -> str:
    lines = ["| step on 32 records | tokens per second | of plain |", "|---|--:|--:|"]
    for name, found in rates.items():
        against = (
            "all weights: plain, packed"
            if name.startswith("all")
            else "plain, packed" + (", checkpointing" if "checkpointing" in name else "")
        )
        ratio = statistics.median(a / b for a, b in zip(found, rates[against], strict=True))
        lines.append(f"| {name} | {statistics.median(found):,.0f} | {ratio:.2f} |")
    return "\n".join(lines)


# Quality


def federation(given: argparse.Namespace, strategy: str, epsilon: float | None, seed: int, folder: Path) -> Path:
    silos = [
        {"id": s} | {split: str(given.data.resolve() / "medquad" / s / f"{split}.jsonl") for split in ("train", "valid", "test")}
        for s in SILOS
    ]
    terms: dict[str, Any] = {
        "name": "private", "model": {"base": str(given.model.resolve()), "lora": {"r": 8, "alpha": 16, "target_modules": "all-linear"}},
        "data": {"max_length": WIDTH_OF_QUALITY}, "silos": silos, "rounds": {"total": 3}, "aggregation": {"strategy": strategy, "weights": "uniform"},
        "training": {"steps": 6, "batch_size": 32, "accumulation": 2, "learning_rate": RATE, "seed": seed},
        "evaluation": {"max_examples": 4}, "tracking": {"uri": "none"}, "security": {"signing": False},
    }  # fmt: skip
    if epsilon is not None:
        terms["privacy"] = {"epsilon": epsilon, "delta": 1e-5, "clip": 0.5}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "federation.yaml"
    file.write_text(yaml.safe_dump(terms))
    return file


def score(simulation: Any, round_number: int | None, most: int = 60) -> float:
    """Pooled loss on ``most`` records of every test split, nats per token."""
    from silotune.components.learning import model as models
    from silotune.components.learning.batches import stream
    from silotune.components.learning.evaluation import evaluate
    from silotune.components.silo_job import silo_home
    from silotune.components.train.order import open_split

    model, tokenizer = simulation.model(round_number) if round_number is not None else simulation.model()
    total = tokens = 0.0
    for silo in simulation.federation.silos:
        shard = open_split(silo_home(simulation.federation, silo), "test")
        found = evaluate(model, shard, stream(len(shard), 0, min(most, len(shard)), "test"), 16, WIDTH_OF_QUALITY, models.pad_id(tokenizer))
        total, tokens = total + found.loss_sum, tokens + found.tokens
    return total / tokens


def quality(given: argparse.Namespace, results: dict[str, Any], save: Callable[[], None]) -> None:
    from silotune.pipelines.simulate import Simulation

    wanted = [(s, 8.0) for s in SCHEMES] + [("ffa", None), ("fedit", None), ("ffa", 3.0), ("ffa", 1.0), ("fedit", 3.0), ("fedit", 1.0)]
    for seed in given.seeds:
        for strategy, epsilon in wanted:
            name = f"{strategy} {epsilon or 'none'} {seed}"
            if name in results:
                continue
            began = time.process_time()
            simulation = Simulation(federation(given, strategy, epsilon, seed, given.out / name.replace(" ", "-")))
            for _ in simulation.run():
                pass
            base = f"base none {seed}"
            if base not in results:
                results[base] = {"loss": score(simulation, 0)}
            results[name] = {"loss": score(simulation, simulation.rounds.latest().round), "seconds": time.process_time() - began}
            save()
            print(
                f"{name}: {results[name]['loss']:.4f} in {results[name]['seconds']:.0f} s (base {results[base]['loss']:.4f})",
                file=sys.stderr,
                flush=True,
            )


def quality_table(results: dict[str, Any], seeds: list[int]) -> str:
    def cell(strategy: str, epsilon: object) -> str:
        found = [results[n]["loss"] for s in seeds if (n := f"{strategy} {epsilon} {s}") in results]
        spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
        return f"{statistics.mean(found):.3f}{spread}" if found else ""

    lines = ["| scheme | ε = 1 | ε = 3 | ε = 8 | without |", "|---|--:|--:|--:|--:|"]
    lines += [f"| {s} | " + " | ".join(cell(s, e) for e in (*EPSILONS, "none")) + " |" for s in SCHEMES]
    return "\n".join([*lines, "", f"The base: {cell('base', 'none')}. {len(seeds)} seeds."])


def main() -> None:
    given = options()
    given.out.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    file = given.out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def save() -> None:
        file.write_text(json.dumps(results))

    if "speed" in given.parts:
        results["speed"] = speed(given)
        save()
        print(speed_table(results["speed"]))
    if "quality" in given.parts:
        quality(given, results, save)
        print(quality_table(results, given.seeds))


if __name__ == "__main__":
    main()
