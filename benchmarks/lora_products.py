"""What does the exact mean of LoRA products cost, beside the linear algebra that it cannot do without?

    python benchmarks/lora_products.py [--size 4096] [--rank 16] [--silos 32] [--modules 64] [--rivals 4] [--dense 1024]

All in one thread, in seconds of the processor, on the same stacks: silos share part of what they have learned, the rest is noise of their own. Ways to be compared take turns
on each module; per module the median and the least time over modules, and how much energy the result leaves beyond the least that any pair of
that rank must leave. The ways:

    product        `mean_product`, from float32 pairs to float32 factors: stacks, Gram matrices, spectrum, balanced factors
    QR and SVD     numpy's bare calls on ready stacks: two thin QRs, one SVD of R_B·R_Aᵀ, and the factors; in float64 and in float32
    svd_lowrank    torch's randomized SVD of the dense matrix in float32 (2 power iterations), with and without making that matrix
    dense SVD      of a smaller module, since it takes minutes on a large one

and for fedex and flora, which do make the dense matrix: theirs in blocks of rows, beside one product of the stacks in float64.

Prints Markdown.
"""

from __future__ import annotations

import os

os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from silotune.components.learning.aggregation.factors import LoraPair, stacked
from silotune.components.learning.aggregation.product import mean_product
from silotune.components.learning.aggregation.stacking import added, product_blocks

torch.set_num_threads(1)


def silos(size: int, rank: int, count: int, seed: int) -> tuple[LoraPair, dict[str, LoraPair]]:
    """An incoming pair, and differences of which a third is common to all silos."""
    rng = np.random.default_rng(seed)

    def pair(scale: float) -> LoraPair:
        b, a = rng.standard_normal((size, rank), np.float32), rng.standard_normal((rank, size), np.float32)
        return LoraPair(np.float32(scale) * b, np.float32(scale) * a)

    common = pair(0.3)
    own = {f"silo{i:03d}": pair(0.6) for i in range(count)}
    return pair(0.2), {s: LoraPair(p.b + common.b, p.a + common.a) for s, p in own.items()}


def bare(b: np.ndarray, a: np.ndarray, rank: int) -> LoraPair:
    """The calls that stand in every description of the method, and nothing else."""
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    x, s, yt = np.linalg.svd(r_b @ r_a.T)
    root = np.sqrt(s[:rank])
    return LoraPair(q_b @ (x[:, :rank] * root), (root[:, None] * yt[:rank]) @ q_a.T)


def low_rank(w: torch.Tensor, rank: int) -> LoraPair:
    u, s, v = torch.svd_lowrank(w, q=rank, niter=2)
    root = s.sqrt()
    return LoraPair((u * root).numpy(), (v * root).T.numpy())


def excess(b: np.ndarray, a: np.ndarray, pair: LoraPair, least: float) -> float:
    """‖W - B'A'‖² / ‖W‖² beyond the least, without W."""
    both, other = np.hstack([b, -pair.b.astype(np.float64)]), np.vstack([a, pair.a.astype(np.float64)])
    left, right = both.T @ both, other @ other.T
    n = b.shape[1]
    return float(np.sum(left * right) / np.sum(left[:n, :n] * right[:n, :n]) - least)


def clock(work: Callable[[], LoraPair]) -> tuple[float, LoraPair]:
    begin = time.process_time()
    found = work()
    return time.process_time() - begin, found


def compare(options: argparse.Namespace) -> None:
    times: dict[str, list[float]] = {}
    left: dict[str, list[float]] = {}
    residuals = []
    for module in range(options.modules):
        incoming, differences = silos(options.size, options.rank, options.silos, module)
        weights = {silo: 1.0 + i for i, silo in enumerate(differences)}
        b, a = stacked(incoming, differences, weights)
        b32, a32 = b.astype(np.float32), a.astype(np.float32)
        best = mean_product(incoming, differences, weights)
        residuals.append(best.spectrum.residual)
        ways: dict[str, Callable[[], LoraPair]] = {"product": lambda: mean_product(incoming, differences, weights).pair}  # noqa: B023
        if module < options.rivals:
            w = torch.from_numpy(b32) @ torch.from_numpy(a32)
            ways |= {
                "QR and SVD, float64": lambda: bare(b, a, options.rank),  # noqa: B023
                "QR and SVD, float32": lambda: bare(b32, a32, options.rank),  # noqa: B023
                "svd_lowrank, with making the matrix": lambda: low_rank(torch.from_numpy(b32) @ torch.from_numpy(a32), options.rank),  # noqa: B023
                "svd_lowrank, matrix given": lambda: low_rank(w, options.rank),  # noqa: B023
            }
        for name, way in ways.items():
            seconds, pair = clock(way)
            times.setdefault(name, []).append(seconds)
            left.setdefault(name, []).append(excess(b, a, pair, best.spectrum.residual))
    print(f"\nOut and in {options.size}, rank {options.rank}, {options.silos} silos; energy beyond rank: {median(residuals):.4f}.\n")
    print("| way | modules | s a module, median | least | beside product | energy left beyond the least |\n|---|---|---|---|---|---|")
    for name, found in times.items():
        ratio = min(found) / min(times["product"][: len(found)])  # on the same modules
        print(f"| {name} | {len(found)} | {median(found):.3f} | {min(found):.3f} | {ratio:.2f} | {max(left[name]):.1e} |")
    print(f"\n{options.modules} modules: {sum(times['product']):.1f} s.")


def compare_dense(options: argparse.Namespace) -> None:
    incoming, differences = silos(options.dense, options.rank, options.silos, 0)
    weights = dict.fromkeys(differences, 1.0)
    b, a = stacked(incoming, differences, weights)
    begin = time.process_time()
    u, s, vt = np.linalg.svd(b @ a, full_matrices=False)
    dense = time.process_time() - begin
    seconds, pair = clock(lambda: mean_product(incoming, differences, weights).pair)
    exact = (u[:, : options.rank] * s[: options.rank]) @ vt[: options.rank]
    error = np.linalg.norm(pair.product() - exact) / np.linalg.norm(exact)
    print(f"\nOut and in {options.dense}: dense SVD {dense:.2f} s, product {seconds:.3f} s; they differ by {error:.1e} of the norm.")


def compare_fold(options: argparse.Namespace) -> None:
    incoming, differences = silos(options.size, options.rank, options.silos, 0)
    b, a = stacked(incoming, differences, dict.fromkeys(differences, 1.0))

    def fold() -> None:
        for _, block in product_blocks(b, a):
            added(None, block, 2.0, "module")

    found: dict[str, list[float]] = {"blocks": [], "one": []}
    for _ in range(3):
        for name, work in (("blocks", fold), ("one", lambda: b @ a)):
            begin = time.process_time()
            work()
            found[name].append(time.process_time() - begin)
    blocks, one = min(found["blocks"]), min(found["one"])
    print(f"\nfedex and flora: delta of {options.size} × {options.size} in blocks {blocks:.2f} s, one product {one:.2f} s.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="out and in of a module")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--silos", type=int, default=32)
    parser.add_argument("--modules", type=int, default=64)
    parser.add_argument("--rivals", type=int, default=4, help="modules on which the other ways are measured, too")
    parser.add_argument("--dense", type=int, default=1024, help="size of the module that a dense SVD is made of; 0: none")
    options = parser.parse_args()
    compare(options)
    if options.dense:
        compare_dense(options)
    compare_fold(options)


if __name__ == "__main__":
    main()
