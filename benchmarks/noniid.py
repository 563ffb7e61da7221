"""Which strategy helps when silos differ? Eight strategies, and unequal ranks, on two sets of skewed silos at equal rounds.

    python benchmarks/noniid.py RESULTS [--data ../shared/data] [--model ../shared/models/silotiny-3m] [--seeds 17 18 19] [--processes 2]

MedQuAD's seven silos are institutes, BANKING77's five are banks with intents of their own (Dirichlet, alpha 0.3). Everything starts from
`examples/medquad.yaml` and `examples/banking77.yaml`, shortened by `SETS`, and goes through the Python door:

    rates      with the first seed, at rank 8, each strategy's learning rate is doubled or halved until validation gets worse on both sides;
               fedadam's server rate likewise, by factors of three, before
    seeds      the best rates again with the other seeds
    ranks      ranks 4, 8 and 16 by the size of the silo where the strategy takes them, against 4 and 16 for all, at the rates of rank 8

Scored is the last global, on a part of every silo's test split. Each finished run is a line of RESULTS, so that the command can be stopped
and started again. It also checks that fedavg and fedit are one strategy on adapters. Prints Markdown.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 6
EQUAL = "8"
UNEQUAL = "4/8/16"
STRATEGIES = ("fedadam", "fedit", "product", "flora", "fedex", "ffa", "rolora", "scaffold")
RANKED = [(s, UNEQUAL) for s in ("product", "flora")] + [(s, r) for s in ("fedit", "product") for r in ("4", "16")]
FIRST_RATE = 1e-2
FIRST_SERVER_RATE = 1e-2


@dataclass(frozen=True)
class Set:
    """How much of a set is used, and which silo has which rank: the more records, the higher."""

    every: dict[str, int]  # split -> one record of so many
    max_length: int
    steps: float  # times the example's
    batch_size: int
    ranks: dict[str, int]


SETS = {
    "medquad": Set(
        {"train": 8, "valid": 12, "test": 6}, 64, 0.5, 2,
        {"gard": 16, "ghr": 16, "niddk": 8, "ninds": 8, "mplus-health-topics": 8, "cancergov": 4, "seniorhealth": 4},
    ),
    "banking77": Set(
        {"train": 4, "valid": 8, "test": 2}, 96, 0.5, 4, {"bank-d": 16, "bank-e": 16, "bank-a": 8, "bank-c": 8, "bank-b": 4}
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One federation, from the first round to the last."""

    data: str
    strategy: str
    ranks: str
    rate: float
    server_rate: float | None
    seed: int
    rounds: int = ROUNDS
    validated: bool = True  # each round, as choosing a rate needs; training is the same without


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON lines, one a run; made if absent, gone on with if not")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", default=str(ROOT.parent / "shared" / "models" / "silotiny-3m"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only print what is finished")
    return parser.parse_args()


def federation(run: Run, data: Path, model: str, folder: Path) -> Path:
    """The example's file with the run's terms, and the part of its records that is used, in a folder."""
    part = SETS[run.data]
    text = (ROOT / "examples" / f"{run.data}.yaml").read_text().replace("${SILOTUNE_DATA}", str(data)).replace("${SILOTUNE_MODEL}", model)
    terms = yaml.safe_load(text)
    usual = terms["training"].get("steps", 0)
    rank = max(part.ranks.values()) if run.ranks == UNEQUAL else int(run.ranks)
    for silo in terms["silos"]:
        for split, every in part.every.items():
            lines = Path(silo[split]).read_text(encoding="utf-8").splitlines()[::every]
            silo[split] = str(folder / f"{silo['id']}-{split}.jsonl")
            Path(silo[split]).write_text("\n".join(lines) + "\n", encoding="utf-8")
        silo["training"] = {"steps": math.ceil(part.steps * silo.get("training", {}).get("steps", usual))}
        if run.ranks == UNEQUAL:
            silo["lora"] = {"r": part.ranks[silo["id"]]}
    terms["model"]["lora"] |= {"r": rank, "alpha": 2 * rank}
    terms["data"]["max_length"] = part.max_length
    terms["training"] |= {"batch_size": part.batch_size, "learning_rate": run.rate, "seed": run.seed}
    terms["aggregation"] = {"strategy": run.strategy, "weights": "examples"}
    if run.server_rate is not None:
        terms["aggregation"]["server"] = {"learning_rate": run.server_rate}
    terms["rounds"] = {"total": ROUNDS, "per_run": run.rounds, "quorum": len(terms["silos"]), "checkpoint_every": 0}
    terms |= {"evaluation": {"max_examples": None if run.validated else 1}, "export": {"merge": True}}
    terms |= {"tracking": {"uri": "none"}, "security": {"signing": False}}
    file = folder / "federation.yaml"
    file.write_text(yaml.safe_dump(terms))
    return file


def scores(simulation: Any, number: int) -> dict[str, dict[str, float]]:
    """Sums of a global on every silo's test split. An answer is exact if each of its tokens is the likeliest: greedy decoding gives it."""
    import numpy as np
    import torch

    from silotune.components.learning.batches import batches
    from silotune.components.learning.model import pad_id
    from silotune.components.learning.training import target_logits
    from silotune.components.silo_job import silo_home
    from silotune.components.train.order import open_split

    model, tokenizer = simulation.model(number)
    found = {}
    for silo in simulation.federation.silos:
        shard = open_split(silo_home(simulation.federation, silo), "test")
        order = np.argsort(shard.lengths(np.arange(len(shard))), kind="stable")
        sums = {"examples": len(shard), "tokens": 0, "loss": 0.0, "correct": 0, "exact": 0}
        for start in range(0, len(order), 16):
            for batch in batches(shard, order[start : start + 16], 1, simulation.federation.data.max_length, pad_id(tokenizer), False):
                with torch.inference_mode():
                    logits, wanted = target_logits(model, batch)
                    right = logits.argmax(-1) == wanted
                    sums["loss"] += float(torch.nn.functional.cross_entropy(logits.double(), wanted, reduction="sum"))
                sums["tokens"] += batch.tokens
                sums["correct"] += int(right.sum())
                sums["exact"] += sum(bool(row.all()) for row in right.split(batch.targets[:, 1:].sum(1).tolist()))
        found[silo.id] = sums
    return found


def measured(run: Run, given: argparse.Namespace) -> dict[str, Any]:
    """What became of a run, which is appended to the results; taken from there where it is done."""
    for known in results(given.results):
        if Run(**known["run"]) in (run, replace(run, validated=True)):
            return known
    from silotune.components.errors import SilotuneError
    from silotune.pipelines.simulate import Simulation

    began = time.process_time()
    found: dict[str, Any] = {"run": asdict(run), "valid": math.inf, "curve": [], "error": ""}
    with tempfile.TemporaryDirectory() as folder:
        simulation = Simulation(federation(run, given.data.resolve(), given.model, Path(folder)))
        try:
            found["curve"] = [r.loss for r in simulation.run(run.rounds)]
        except SilotuneError as error:  # such as a rate at which training runs away: a result, too
            found["error"] = str(error)
        else:
            commits = list(simulation.rounds.commits())
            found |= {"valid": found["curve"][-1], "test": scores(simulation, commits[-1].round)}
            found |= {"globals": [c.outgoing for c in commits], "up": [c.bytes_up for c in commits[1:]]}
            found |= {"down": [c.bytes_down for c in commits[1:]]}
            if run.strategy == "fedit" and run.ranks == EQUAL and run.validated:
                found["base"] = scores(simulation, 0)
    found["seconds"] = time.process_time() - began
    line = json.dumps(found)
    with given.results.open("a") as out:
        fcntl.flock(out, fcntl.LOCK_EX)
        out.write(line + "\n")
    spent = f"{found['valid']:.4f} {found['seconds']:.0f} s {found['error'][:200]}"
    print(f"{time.strftime('%H:%M:%S')} {' '.join(map(str, asdict(run).values()))}: {spent}", file=sys.stderr, flush=True)
    return json.loads(line)  # type: ignore[no-any-return]


def results(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    with file.open() as lines:
        fcntl.flock(lines, fcntl.LOCK_SH)
        return [json.loads(line) for line in lines]


def best(loss: Callable[[float], float], start: float, factor: float, most: int = 5) -> float:
    """The rate with the least loss, from ``start`` up or down by ``factor`` until it gets worse; at most ``most`` tries."""
    tried = {0: loss(start), 1: loss(start * factor)}
    way = 1 if tried[1] < tried[0] else -1
    at = max(tried) if way > 0 else 0
    while at == (max(tried) if way > 0 else min(tried)) and len(tried) < most:
        tried[at + way] = loss(float(f"{start * factor ** (at + way):.4g}"))
        at = min(tried, key=lambda k: (tried[k], k))
    return float(f"{start * factor**at:.4g}")


def tuned(run: Run, given: argparse.Namespace) -> Run:
    """The run with the rates that validate best."""
    if run.strategy == "fedadam":
        server = best(lambda rate: measured(replace(run, server_rate=rate), given)["valid"], FIRST_SERVER_RATE, 3, 4)
        run = replace(run, server_rate=server)
    return replace(run, rate=best(lambda rate: measured(replace(run, rate=rate), given)["valid"], run.rate, 2))


def measure(given: argparse.Namespace) -> None:
    """All that is not there yet, what matters most first."""
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:

        def every(work: Callable[..., Any], runs: Iterable[Run]) -> list[Any]:
            return list(pool.map(partial(work, given=given), runs))

        chosen: list[Run] = every(tuned, [Run(d, s, EQUAL, FIRST_RATE, None, given.seeds[0]) for s in STRATEGIES for d in SETS])
        check_fedavg(given, [run for run in chosen if run.strategy == "fedit"], every)
        every(measured, [replace(run, seed=seed, validated=False) for seed in given.seeds for run in chosen])
        ranked = [replace(run, ranks=ranks, validated=False) for strategy, ranks in RANKED for run in chosen if run.strategy == strategy]
        every(measured, [replace(run, seed=seed) for seed in given.seeds for run in ranked])


def check_fedavg(given: argparse.Namespace, fedit: list[Run], every: Callable[..., list[Any]]) -> None:
    """On adapters fedavg is fedit, byte by byte."""
    same = [replace(run, strategy="fedavg", rounds=2, validated=False) for run in fedit]
    for run, found, other in zip(same, every(measured, same), every(measured, fedit), strict=True):
        assert found["globals"] == other["globals"][:3], f"{run}: fedavg gives other globals than fedit"
        assert found["up"] == other["up"][:2], f"{run}: fedavg sends other bytes than fedit"


def pooled(test: dict[str, dict[str, float]], what: str, per: str) -> float:
    return sum(s[what] for s in test.values()) / sum(s[per] for s in test.values())


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def table(name: str, found: list[dict[str, Any]], seeds: list[int]) -> str:
    """Means over seeds ± standard deviation, at the rates that validated best with the first seed."""
    ours = [(Run(**f["run"]), f) for f in found if f["run"]["data"] == name]
    swept = [(r, f["valid"]) for r, f in ours if r.seed == seeds[0] and r.ranks == EQUAL and r.validated]
    tried = {s: sorted(((r, loss) for r, loss in swept if r.strategy == s), key=_rates) for s in STRATEGIES}
    chosen = {s: min(known, key=lambda t: t[1])[0] for s, known in tried.items() if known}

    def tests(strategy: str, ranks: str) -> dict[int, dict[str, Any]]:
        like = replace(chosen[strategy], ranks=ranks)
        wanted = [replace(like, seed=seed, validated=flag) for seed in seeds for flag in (True, False)]
        return {r.seed: f for r, f in ours if r in wanted and not f["error"]}

    lines = [
        "| strategy | rank | rate | seeds | test loss | below fedit 8, same seed | silos' mean | tokens right, % | answers right, % "
        "| MB up | MB down |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    reference = tests("fedit", EQUAL)
    base = reference[seeds[0]] | {"test": reference[seeds[0]]["base"], "up": [0], "down": [0]}
    rows = [("base", "", {0: base}), *((s, EQUAL, tests(s, EQUAL)) for s in chosen)]
    rows += [(s, ranks, tests(s, ranks)) for s, ranks in RANKED if s in chosen]
    for strategy, ranks, seen in rows:
        if not seen:
            continue
        run = chosen.get(strategy)
        rate = f"{run.rate:g}{f'; {run.server_rate:g}' if run.server_rate else ''}" if run else ""
        losses = {seed: pooled(f["test"], "loss", "tokens") for seed, f in seen.items()}
        below = [pooled(reference[seed]["test"], "loss", "tokens") - loss for seed, loss in losses.items() if seed in reference]
        cells = [
            strategy, ranks, rate, str(len(seen)) if run else "", spread(list(losses.values())), spread(below) if below else "",
            spread([statistics.mean(s["loss"] / s["tokens"] for s in f["test"].values()) for f in seen.values()]),
            spread([100 * pooled(f["test"], "correct", "tokens") for f in seen.values()], 1),
            spread([100 * pooled(f["test"], "exact", "examples") for f in seen.values()], 1),
            *(f"{statistics.mean(statistics.mean(f[way]) for f in seen.values()) / 1e6:.2f}" for way in ("up", "down")),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Validation loss by rate, rank 8, first seed:", ""]
    for strategy, known in tried.items():
        texts = (f"{r.rate:g}{f' (server {r.server_rate:g})' if r.server_rate else ''}: {loss:.3f}" for r, loss in known)  # inf: stopped
        lines.append(f"- {strategy}: " + ", ".join(texts))
    return "\n".join(lines)


def _rates(tried: tuple[Run, float]) -> tuple[float, float]:
    return tried[0].server_rate or 0.0, tried[0].rate


def main() -> None:
    given = options()
    os.environ["OMP_NUM_THREADS"] = "1"
    given.results.parent.mkdir(parents=True, exist_ok=True)
    if not given.report:
        measure(given)
    found = results(given.results)
    for name in SETS:
        print(f"### {name}\n\n{table(name, found, given.seeds)}\n")


if __name__ == "__main__":
    main()
