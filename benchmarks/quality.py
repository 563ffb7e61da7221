"""Is federating worth it? Base, each silo alone, federated and centralised, on seven silos of real text.

    python benchmarks/quality.py [--data ../shared/data] [--model ../shared/models/silotiny-3m] [--seeds 17 18 19] [--out FOLDER]

Everything starts from `examples/medquad.yaml` and goes through the Python door. What is compared:

    alone         a silo by itself, on the tokens it would have trained on in the federation
    federated     the file as it stands, which names no strategy: with the default on adapters
    fedavg        the same with aggregation.strategy fedavg, the plainest; benchmarks/noniid.py compares more
    centralised   one model on all records: same rank, as many tokens as all silos together, rates as in --rates, the best by validation

All are scored on the whole test split of every silo; for the single models the learning rate is the centralised one's best. Finished parts
are kept in --out, so that the command can be stopped and started again. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
SINGLE_BATCH = 4


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", default=str(ROOT.parent / "shared" / "models" / "silotiny-3m"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-3, 6e-3, 8e-3])
    parser.add_argument("--rounds", type=int, help="instead of the file's; for a quick look")
    parser.add_argument("--report", action="store_true", help="only print what is finished, with the first of --rates as reference")
    parser.add_argument("--out", type=Path, default=ROOT / ".silotune" / "quality")
    return parser.parse_args()


def seeded_file(given: argparse.Namespace, seed: int, strategy: str = "") -> Path:
    """The example's federation with another seed, in a folder of its own; with a strategy, where one is named."""
    folder = given.out / "-".join(filter(None, [f"seed-{seed}", strategy]))
    folder.mkdir(parents=True, exist_ok=True)
    terms = yaml.safe_load((ROOT / "examples" / "medquad.yaml").read_text())
    terms["training"]["seed"] = seed
    terms["training"]["learning_rate"] = float(terms["training"]["learning_rate"])
    terms["tracking"] = {"uri": "none"}
    if strategy:
        terms["aggregation"]["strategy"] = strategy
    if given.rounds:
        terms["rounds"]["total"] = given.rounds
    file = folder / "federation.yaml"
    file.write_text(yaml.safe_dump(terms))
    return file


def summary(scores: dict[str, Any], tokens: int, began: float, curve: list[float]) -> dict[str, Any]:
    pooled = sum(s.loss_sum for s in scores.values()) / sum(s.tokens for s in scores.values())
    return {
        "pooled": pooled,
        "silos": {silo: s.loss for silo, s in scores.items()},
        "tokens": tokens,
        "seconds": time.process_time() - began,
        "curve": curve,
    }


def trained(simulation: Any, judge: Any) -> dict[str, Any]:
    """Run to the end, then score the best round by validation on the judge's test splits."""
    began = time.process_time()
    curve = [r.loss for r in simulation.run()] or [r.loss for r in simulation.results()[1:]]
    tokens = sum(c.tokens for commit in simulation.rounds.commits() for c in commit.contributions.values())
    return summary(judge.scores(of=simulation), tokens, began, curve)


def single(simulation: Any, silo_id: str | None, rate: float) -> dict[str, Any]:
    """Terms of one uninterrupted training, as a single model is usually trained: warm-up and cosine, examples four at a time."""
    federation = simulation.federation
    silos = [s for s in federation.silos if silo_id in (None, s.id)]
    examples = (
        federation.rounds.total * sum((s.training.steps or federation.training.steps) for s in silos) * federation.training.batch_size
    )
    steps = -(-examples // SINGLE_BATCH)
    warmup = min(20, steps // 5)
    return {
        "rounds": 1, "steps": steps, "batch_size": SINGLE_BATCH, "learning_rate": rate, "schedule": "cosine", "warmup_steps": warmup,
        "round_schedule": "constant",
    }  # fmt: skip


def measure(given: argparse.Namespace, results: dict[int, dict[str, Any]], save: Any) -> float:
    """All parts of all seeds that are not there yet; returns the centralised rate that validated best with the first seed."""
    from silotune.pipelines.simulate import Simulation

    def once(seed: int, name: str, make: Any) -> None:
        if name not in results[seed]:
            results[seed][name] = make()
            save()
            print(f"seed {seed} {name}: {results[seed][name]['pooled']:.4f}", file=sys.stderr, flush=True)

    simulations = {seed: Simulation(seeded_file(given, seed)) for seed in given.seeds}
    rate = None
    for seed, simulation in simulations.items():
        once(seed, "federated", lambda s=simulation: trained(s, s))
        once(seed, "base", lambda s=simulation: summary(s.scores(round_number=0), 0, time.process_time(), []))
        for candidate in given.rates if rate is None else [rate]:
            name = f"centralised {candidate:g}"
            once(seed, name, lambda s=simulation, c=candidate: trained(s.centralised(**single(s, None, c)), s))
        swept = [f"centralised {candidate:g}" for candidate in given.rates]
        rate = rate or float(min(swept, key=lambda n: results[seed][n]["curve"][-1]).split()[1])
    for seed, simulation in simulations.items():
        plain = Simulation(seeded_file(given, seed, "fedavg"))
        once(seed, "fedavg", lambda s=plain: trained(s, s))
        for silo in simulation.federation.silo_ids:
            once(seed, f"alone {silo}", lambda s=simulation, silo=silo: trained(s.alone(silo, **single(s, silo, rate)), s))
    assert rate
    return rate


def table(results: dict[int, dict[str, Any]], rate: float) -> str:
    """Means over seeds ± standard deviation."""
    seeds = list(results)
    silos = sorted(results[seeds[0]]["base"]["silos"])

    def spread(values: list[float], digits: int = 3) -> str:
        deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{deviation}"

    def deciles(losses: dict[str, float]) -> list[float]:
        values = sorted(math.exp(x) for x in losses.values())
        cuts = statistics.quantiles(values, n=10, method="inclusive")
        return [cuts[0], cuts[4], cuts[8]]

    central = f"centralised {rate:g}"
    names = ["base", *(f"alone {s}" for s in silos), "fedavg", "federated", central]
    lines = [
        "| model | seeds | pooled test loss | perplexity | silos' perplexity: 10th | 50th | 90th | tokens | CPU s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in names:
        rows = [results[s][name] for s in seeds if name in results[s]]
        if rows:
            cuts = [spread([deciles(r["silos"])[i] for r in rows], 1) for i in range(3)]
            pooled = [r["pooled"] for r in rows]
            perplexities = spread([math.exp(p) for p in pooled], 1)
            seconds = statistics.mean(r["seconds"] for r in rows)
            cells = [name, str(len(rows)), spread(pooled), perplexities, *cuts, f"{rows[0]['tokens']:,}", f"{seconds:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    gaps, leads = [], []
    for r in results.values():
        gaps.append((r["base"]["pooled"] - r["federated"]["pooled"]) / (r["base"]["pooled"] - r[central]["pooled"]))
        if all(f"alone {s}" in r for s in silos):
            leads.append(min(r[f"alone {s}"]["pooled"] for s in silos) - r["federated"]["pooled"])
    each = ", ".join(f"{100 * gap:.1f}" for gap in gaps)
    lines += [
        "",
        f"Federated closes {spread([100 * g for g in gaps], 1)} % of the gap from base to centralised in pooled loss per token ({each}).",
    ]
    if leads:
        lines += [f"It beats the best single silo on the pooled test by {spread(leads)} nats per token ({len(leads)} seeds)."]
    lines += ["", "| silo's own test | base | its own adapter | federated | centralised |", "|---|--:|--:|--:|--:|"]
    for silo in silos:
        found = [
            [results[s][name]["silos"][silo] for s in seeds if name in results[s]]
            for name in ("base", f"alone {silo}", "federated", central)
        ]
        lines.append(f"| {silo} | " + " | ".join(spread(values) if values else "" for values in found) + " |")
    curve = " ".join(f"{v:.3f}" for v in results[seeds[0]]["federated"]["curve"])
    lines += ["", f"Validation loss after each round, federated, first seed: {curve}"]
    sweep = {n.split()[1]: results[seeds[0]][n]["pooled"] for n in results[seeds[0]] if n.startswith("centralised")}
    return "\n".join([*lines, "Centralised by rate, first seed, test: " + ", ".join(f"{r}: {v:.3f}" for r, v in sweep.items())])


def main() -> None:
    given = options()
    os.environ["SILOTUNE_DATA"], os.environ["SILOTUNE_MODEL"] = str(given.data.resolve()), str(given.model)
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "results.json"
    results: dict[int, dict[str, Any]] = {seed: {} for seed in given.seeds}
    if file.exists():
        results |= {int(seed): known for seed, known in json.loads(file.read_text()).items()}
    rate = given.rates[0] if given.report else measure(given, results, lambda: file.write_text(json.dumps(results)))
    print(table({seed: results[seed] for seed in given.seeds if f"centralised {rate:g}" in results[seed]}, rate))


if __name__ == "__main__":
    main()
