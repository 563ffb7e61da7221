"""The part `robust` of benchmarks/aggregation.py: what robust rules cost beside plain numpy that does the same, block by block.

Both sides read every tensor of all updates from files and make the combined update in memory. Beside them stands the whole step of the aggregate
box, which also checks digests, norms and finiteness, moves the global and writes it. LoRA's products are timed by themselves.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TRIM, HOSTILE = 3, 3
RULES = ("median", "trimmed-mean", "krum", "multi-krum", "bulyan", "geometric-median")
REFERENCE_BLOCK = 1 << 13  # numbers of one silo; the fastest of 2^11 to 2^16 for numpy, too


def measure_robust(what: str, folder: str, silos: int, numbers: int) -> dict[str, float]:
    # All that is imported on the way, before the clock and the memory count.
    from turns import timed

    from silotune.components.learning import tensor_file  # noqa: F401
    from silotune.components.learning.aggregation import robust as rules  # noqa: F401
    from silotune.components.learning.aggregation import robust_product  # noqa: F401

    rule, _, side = what.partition(" ")
    if rule == "lora":
        return timed(lora_work(side, silos))
    if side == "step":
        return timed(step(rule, Path(folder), silos))
    return timed(lambda: (reference if side else ours)(rule, Path(folder), silos))


def step(rule: str, folder: Path, silos: int) -> Any:
    """What the aggregate box does with accepted updates."""
    from silotune.components.learning.aggregation.combination import Round, combine
    from silotune.components.learning.tensor_file import open_tensor_file
    from silotune.components.learning.update import Update, read_header
    from silotune.components.terms.strategies import Aggregation

    robust = {"rule": rule, "hostile": HOSTILE}
    terms = Aggregation.model_validate({"strategy": "fedavg", "weights": "uniform", "robust": robust})
    updates = {f"{k:04d}": Update(read_header(folder / f"{k:04d}"), open_tensor_file(folder / f"{k:04d}")) for k in range(silos)}
    return lambda: combine(Round(terms, open_tensor_file(folder / "incoming"), silos), updates, folder)


def tensors(folder: Path, silos: int) -> Iterator[tuple[str, list[Any]]]:
    """Tensor by tensor, that of all silos."""
    from silotune.components.learning.tensor_file import open_tensor_file

    files = [open_tensor_file(folder / f"{k:04d}") for k in range(silos)]
    for name in files[0].entries:
        yield name, [file.read(name).reshape(-1) for file in files]


def ours(rule: str, folder: Path, silos: int) -> dict[str, Any]:
    import numpy as np

    from silotune.components.learning.aggregation.coordinates import combine, mean_around_median, median, trimmed_mean
    from silotune.components.learning.aggregation.gram import Gram, tensor_gram
    from silotune.components.learning.aggregation.robust import bulyan_selection, geometric_median, krum, multi_krum

    if rule in ("median", "trimmed-mean"):
        by_number = median() if rule == "median" else trimmed_mean(TRIM)
        return {name: combine(rows, by_number) for name, rows in tensors(folder, silos)}
    ids = tuple(f"{k:04d}" for k in range(silos))
    gram = Gram(ids, np.sum([tensor_gram(rows) for _, rows in tensors(folder, silos)], axis=0))
    if rule == "bulyan":
        chosen = [k for k, c in enumerate(bulyan_selection(gram, HOSTILE).coefficients.values()) if c]
        by_number = mean_around_median(silos - 4 * HOSTILE)
        return {name: combine([rows[k] for k in chosen], by_number) for name, rows in tensors(folder, silos)}
    equal = dict.fromkeys(ids, 1.0)
    made = {"krum": lambda: krum(gram, HOSTILE), "multi-krum": lambda: multi_krum(gram, equal, HOSTILE)}
    verdict = made.get(rule, lambda: geometric_median(gram, equal))()
    return weighed(np.array([verdict.coefficients[silo] for silo in ids]), folder, silos)


def weighed(coefficients: Any, folder: Path, silos: int) -> dict[str, Any]:
    """Σ cᵢΔᵢ; both sides make it the same way."""
    import numpy as np

    from silotune.components.learning.tensor_file import open_tensor_file

    files = [(open_tensor_file(folder / f"{k:04d}"), np.float32(c)) for k, c in enumerate(coefficients) if c]
    found = {}
    for name in files[0][0].entries:
        total = np.zeros(1, np.float32)
        for file, c in files:
            total = total + c * file.read(name).reshape(-1)
        found[name] = total
    return found


def reference(rule: str, folder: Path, silos: int) -> dict[str, Any]:
    """As one would write it with numpy, in blocks."""
    import numpy as np

    def blocks(rows: list[Any]) -> Iterator[Any]:
        for start in range(0, rows[0].size, REFERENCE_BLOCK):
            yield np.stack([row[start : start + REFERENCE_BLOCK] for row in rows])

    if rule == "median":
        return {name: np.concatenate([np.median(x, axis=0) for x in blocks(rows)]) for name, rows in tensors(folder, silos)}
    if rule == "trimmed-mean":
        return {
            name: np.concatenate([np.sort(x, axis=0)[TRIM:-TRIM].mean(axis=0) for x in blocks(rows)])
            for name, rows in tensors(folder, silos)
        }
    gram = np.zeros((silos, silos))
    for _, rows in tensors(folder, silos):
        for x in blocks(rows):
            gram += x @ x.T
    squares = np.diagonal(gram)
    distances = np.maximum(squares[:, None] + squares - 2 * gram, 0)

    def scores(some: list[int]) -> Any:
        return np.sort(distances[np.ix_(some, some)], axis=1)[:, 1 : max(2, len(some) - HOSTILE - 1)].sum(axis=1)

    every = list(range(silos))
    if rule == "krum":
        return weighed(np.arange(silos) == scores(every).argmin(), folder, silos)
    if rule == "multi-krum":
        best = np.argsort(scores(every))[: silos - HOSTILE]
        return weighed(np.isin(np.arange(silos), best) / len(best), folder, silos)
    if rule == "bulyan":
        left = list(every)
        chosen = [left.pop(int(scores(left).argmin())) for _ in range(silos - 2 * HOSTILE)]

        def around(x: Any) -> Any:
            near = np.argsort(np.abs(x - np.median(x, axis=0)), axis=0)[: silos - 4 * HOSTILE]
            return np.take_along_axis(x, near, 0).mean(axis=0)

        found = ((name, [rows[k] for k in chosen]) for name, rows in tensors(folder, silos))
        return {name: np.concatenate([around(x) for x in blocks(rows)]) for name, rows in found}
    c = np.full(silos, 1 / silos)
    for _ in range(100):
        c = 1 / np.sqrt(np.maximum(distances @ c - c @ distances @ c / 2, 1e-12))
        c /= c.sum()
    return weighed(c, folder, silos)


def lora_work(side: str, silos: int) -> Any:
    """On one module of 4096 × 4096, rank 16."""
    import numpy as np

    from silotune.components.learning.aggregation.coordinates import median
    from silotune.components.learning.aggregation.factors import LoraPair
    from silotune.components.learning.aggregation.gram import product_gram
    from silotune.components.learning.aggregation.robust_product import rule_on_products

    rng = np.random.default_rng(0)
    pairs = [
        LoraPair(rng.standard_normal((4096, 16), dtype=np.float32), rng.standard_normal((16, 4096), dtype=np.float32))
        for _ in range(silos + 1)
    ]
    if side == "gram":
        return lambda: product_gram(pairs[0], pairs[1:])
    return lambda: rule_on_products(pairs[0], {f"{k:04d}": p for k, p in enumerate(pairs[1:])}, median())


def part_robust(options: argparse.Namespace) -> None:
    from turns import MIB, in_turns
    from updates import make_updates

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        make_updates(Path(folder), options.silos, options.numbers)
        about = {"folder": folder, "silos": options.silos, "numbers": options.numbers}
        sides = [f"{rule}{side}" for rule in RULES for side in ("", " numpy", " step")]
        found = in_turns("robust", sides, about, options.repeats)
        hashing = in_turns("mean", ["hash"], about | {"files": options.silos}, options.repeats)["hash"]
        few = in_turns("robust", ["lora gram", "lora median"], about | {"silos": 8}, options.repeats)
        many = in_turns("robust", ["lora gram", "lora median"], about, options.repeats)
    size = options.numbers * 4 / MIB
    most = options.silos * size / 20 + 3 * size
    print(f"\n{options.silos} updates of {options.numbers:,} float32 numbers ({size:.0f} MiB each) in 20 tensors, one thread\n")
    print(
        f"| rule | CPU s | numpy's | ratio, at most 1.5 | ratio by the clock | memory above the start, MiB, at most {most:.0f} | held "
        "| whole step, CPU s | its memory |\n|---|--:|--:|--:|--:|--:|---|--:|--:|"
    )
    for rule in RULES:
        one, other, whole = found[rule], found[f"{rule} numpy"], found[f"{rule} step"]
        wall, cpu = (one[key] / other[key] for key in ("wall", "cpu"))
        memory, its = one["peak"] - one["base"], whole["peak"] - whole["base"]
        held = "yes" if cpu <= 1.5 and max(memory, its) <= most else "NO"
        print(
            f"| {rule} | {one['cpu']:.2f} | {other['cpu']:.2f} | {cpu:.2f} | {wall:.2f} | {memory:.0f} | {held} | {whole['cpu']:.2f} | {its:.0f} |"
        )
    print(f"\nHashing all updates once: {hashing['cpu']:.2f} CPU s; every rule but the first two reads them twice.")
    print("\nOne LoRA module of 4096 × 4096, rank 16\n\n| | silos | CPU s | memory above the start, MiB |\n|---|--:|--:|--:|")
    for silos, runs in ((8, few), (options.silos, many)):
        for name, label in (("lora gram", "Gram matrix of the products' changes"), ("lora median", "median of the products")):
            print(f"| {label} | {silos} | {runs[name]['cpu']:.2f} | {runs[name]['peak'] - runs[name]['base']:.0f} |")
