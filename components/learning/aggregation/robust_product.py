"""Updates of LoRA's factors under robust rules: what a rule makes of the products BA, as the next global's pair.

Rules that weigh silos come here with their coefficients (`weighed_product`). Rules that work number by number need numbers that mean the same
for all silos (`rule_on_products`). The entries of A and B do not: A→cA, B→B/c is the same model. The entries of BA do, but are out × in. So the
changes ΔPᵢ of the products are written in a basis common to all silos, in which they are small matrices Cᵢ = UᵀΔPᵢV, the cores: U and V are the
eigenvectors of Σ ΔPᵢΔPᵢᵀ/‖ΔPᵢ‖² and Σ ΔPᵢᵀΔPᵢ/‖ΔPᵢ‖². Each silo counts in them as one, however large its update is, and whatever factors it has
chosen for its product. The rule on the cores' entries gives C, and the next global is the best pair of its rank for B₀A₀ + UCVᵀ. Eigenvectors
have no sign, and need none: but for ties in Bulyan's choice, the rules make of -x what they make of x, with its sign turned.

A rule in another basis than the weights' own is another rule. What it keeps: any number of silos up to the rule's bound may send what they
like, and each entry of C stays within the range of the others' entries.

The basis is found among the columns of [ΔB₁ … ΔB_K B₀] and the rows of [ΔA₁; …; ΔA_K; A₀], by one thin QR of each, so that all the rest is done
with matrices of n × n, n = Σ rᵢ + R. In memory: those stacks in float64, twice, and K strips of the cores.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from silotune.components.learning.aggregation.coordinates import Rule
from silotune.components.learning.aggregation.factors import LoraPair
from silotune.components.learning.aggregation.gram import places
from silotune.components.learning.aggregation.product import Best, best_of_rank

STRIP = 1 << 17  # numbers of all silos' cores together that a rule is given at a time: 1 MiB of float64


def weighed_product(incoming: LoraPair, differences: Mapping[str, LoraPair], coefficients: Mapping[str, float]) -> Best:
    """The best pair of the incoming one's rank for B₀A₀ + Σ cᵢΔPᵢ, of coefficients that need not sum to 1.

    Args:
        differences: by silo, what training changed, of ranks up to the incoming one's.
        coefficients: by silo, as in a `Verdict`.
    """
    silos = sorted(differences)
    b0, a0 = incoming.b.astype(np.float64), incoming.a.astype(np.float64)
    left, right, last = [], [], a0.copy()
    for silo in silos:
        pair, c = differences[silo], coefficients[silo]
        left.append(c * pair.b.astype(np.float64))  # Σ cᵢΔPᵢ = Σ cᵢΔBᵢ(A₀+ΔAᵢ) + B₀ Σ cᵢΔAᵢ
        right.append(a0[: pair.rank] + pair.a)
        last[: pair.rank] += c * pair.a.astype(np.float64)
    return best_of_rank(np.hstack([*left, b0]), np.vstack([*right, last]), incoming.rank)


def rule_on_products(
    incoming: LoraPair, differences: Mapping[str, LoraPair], rule: Rule, factors: Mapping[str, float] | None = None
) -> Best:
    """The best pair of the incoming one's rank for B₀A₀ + what a rule makes of the ΔPᵢ in their common basis.

    Args:
        differences: by silo, what training changed, of ranks up to the incoming one's.
        rule: of `coordinates`; silos' rows stand in sorted order.
        factors: by which each silo's ΔPᵢ is multiplied before (`bounds`).
    """
    silos = sorted(differences)
    pairs = [differences[silo] for silo in silos]
    own, base = places([pair.rank for pair in pairs], incoming.rank)
    q_left, r_left = np.linalg.qr(np.hstack([*(pair.b for pair in pairs), incoming.b]).astype(np.float64))
    q_right, r_right = np.linalg.qr(np.vstack([*(pair.a for pair in pairs), incoming.a]).astype(np.float64).T)
    lefts, rights = [], []  # silo by silo, ΔPᵢ = [ΔBᵢ  B₀] · [A₀+ΔAᵢ; ΔAᵢ], in the columns of q_left and q_right
    for o, b in zip(own, base, strict=True):
        lefts.append(np.hstack([r_left[:, o], r_left[:, b]]))
        rights.append(np.hstack([r_right[:, b] + r_right[:, o], r_right[:, o]]).T)
    u, v = _basis(lefts, rights)
    scales = np.ones(len(silos)) if factors is None else np.array([factors[silo] for silo in silos])
    cores = _combined([c * (u.T @ x) for c, x in zip(scales, lefts, strict=True)], [y @ v for y in rights], rule)
    full = r_left[:, -incoming.rank :] @ r_right[:, -incoming.rank :].T + u @ cores @ v.T
    return best_of_rank(q_left @ full, q_right.T, incoming.rank)


def _basis(lefts: list[np.ndarray], rights: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvectors of Σ ΔPᵢΔPᵢᵀ/‖ΔPᵢ‖² and of Σ ΔPᵢᵀΔPᵢ/‖ΔPᵢ‖², by falling eigenvalues."""
    sums = [np.zeros((len(lefts[0]),) * 2), np.zeros((rights[0].shape[1],) * 2)]
    for x, y in zip(lefts, rights, strict=True):
        rows, columns = x.T @ x, y @ y.T
        square = float(np.sum(rows * columns))  # ‖ΔPᵢ‖²
        if square > 0:
            sums[0] += x @ columns @ x.T / square
            sums[1] += y.T @ rows @ y / square
    found = [np.linalg.eigh(total)[1][:, ::-1] for total in sums]
    return found[0], found[1]


def _combined(lefts: list[np.ndarray], rights: list[np.ndarray], rule: Rule) -> np.ndarray:
    """What the rule makes of the products of some factors, strip by strip."""
    height, width = len(lefts[0]), rights[0].shape[1]
    out = np.empty((height, width))
    step = max(1, STRIP // (width * len(lefts)))
    for start in range(0, height, step):
        strips = [(x[start : start + step] @ y).reshape(-1) for x, y in zip(lefts, rights, strict=True)]
        out[start : start + step] = rule(np.stack(strips)).reshape(-1, width)
    return out
