"""The best pair of a given rank for a mean of products, without the d × d matrix.

With stacks B (out × n) and A (n × in) of `factors.stacked`, W = BA is the mean. W's nonzero singular values are those of a matrix of n × n:

    Gram    G = BᵀB and H = AAᵀ in float64, H = LLᵀ (Cholesky); σ² are the eigenvalues of LᵀGL, and an eigenvector x gives W's left singular
            vector as BLx/σ. Two symmetric products, one Cholesky, one eigh: some four times as fast as QR.
    QR      R_B and R_A of the thin QRs of B and Aᵀ, one SVD of R_B·R_Aᵀ. Where silos' products cancel out, so that squaring would lose what is left.
    dense   W and its smaller Gram matrix, where n is no less than out or in.

All three only have to find the span Q of the leading left singular vectors. What follows is common: the SVD of QᵀW, in float64, so that what is
returned is the projection of W on that span to the last digit (Rayleigh-Ritz; Halko, Martinsson & Tropp 2011, arXiv:0909.4061, section 5.1), and
an error of the span enters the residual squared. Columns of B and rows of A are scaled to equal norms first, so that no silo's choice of how to
spread a product over its factors counts.

Determinism: silos are taken in sorted order, and LAPACK is deterministic: the same updates give the same bytes on one kind of processor with
one version of numpy and one thread, which `combination` sees to; elsewhere the last digits may differ. Among equal singular values any basis is as good as another and LAPACK
chooses one; the product is the same but for a tie between rank R and the next one, where the best product itself is not unique.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from silotune.components.errors import SilotuneError
from silotune.components.learning.aggregation.factors import LoraPair, stacked
from silotune.components.learning.aggregation.spectrum import FLOOR, Spectrum

EPS = float(np.finfo(np.float64).eps)
CANCELLATION = 1e3  # ‖G‖·‖H‖/σ₁², up to which Gram matrices are as good as QR


@dataclass(frozen=True)
class Best:
    """The best approximation of a product by one of rank R."""

    pair: LoraPair  # float32, rank R, balanced: B = U√S, A = √S·Vᵀ with falling S
    rest: LoraPair | None  # the next singular triples, the same way: what can be carried to the next round
    spectrum: Spectrum


def mean_product(
    incoming: LoraPair, differences: Mapping[str, LoraPair], weights: Mapping[str, float], carried: LoraPair | None = None, *,
    carry: bool = False,
) -> Best:  # fmt: skip
    """The best pair of the incoming one's rank, balanced, for Σ wᵢ(BᵢAᵢ + tailᵢ) / Σ wᵢ + what is carried.

    Args:
        incoming: what silos began from, each with its own first rows and columns; ordered as `Best.pair` is, or of a zero product.
        differences: by silo, what training changed, of ranks up to the incoming one's.
        weights: by silo, in any unit.
        carried: the last round's ``rest``.
        carry: whether to return a ``rest``, of at most the same rank; what is beyond it is dropped, as without carrying all is.

    Raises:
        ValueError: shapes or weights do not fit.
        SilotuneError: a factor overflows float32.
    """
    b, a = stacked(incoming, differences, weights, carried)
    return best_of_rank(b, a, incoming.rank, incoming.rank if carry else 0)


def kept_alive(pair: LoraPair, incoming: LoraPair) -> LoraPair:
    """The same product, with the incoming rows of A where the pair has none: where both factors are zero no gradient would ever move them."""
    dead = np.abs(pair.b).max(axis=0) == 0
    return LoraPair(pair.b, np.where(dead[:, None], incoming.a, pair.a))


def best_of_rank(b: np.ndarray, a: np.ndarray, rank: int, beyond: int = 0) -> Best:
    """The truncated SVD of BA (Eckart & Young 1936), in balanced factors.

    Signs: of each column of B, the entry of largest size, the first of such, is positive. Singular values below `FLOOR` of the largest, and those
    that a product of lower rank does not have, are zero columns and rows.

    Args:
        b: (out, n) float64.
        a: (n, in) float64.
        rank: R.
        beyond: of how many more singular triples the ``rest`` is made.

    Raises:
        ValueError: the rank is not positive.
        SilotuneError: a factor overflows float32.
    """
    if rank < 1:
        raise ValueError(f"rank: must be 1 or more, got {rank}")
    if a.shape[1] < b.shape[0] and a.shape[1] <= a.shape[0]:  # dense, and the Gram matrix of Wᵀ is the smaller one
        found, values, energy = _leading(a.T, b.T, rank + beyond)
        v, s, ut = _ritz(found, a.T, b.T)
        u, vt = ut.T, v.T
    else:
        found, values, energy = _leading(b, a, rank + beyond)
        u, s, vt = _ritz(found, b, a)
    top = values[0] if values.size else 0.0
    values = np.where(values > FLOOR * top, values, 0.0)
    s = np.where(s > FLOOR * top, s, 0.0)
    held = float(np.sum(np.square(s[:rank])))
    residual = min(1.0, max(0.0, 1 - held / energy)) if held else 0.0
    pivots = u[np.abs(u).argmax(axis=0), np.arange(len(s))]
    root = np.sqrt(s)
    left, right = u * (root * np.where(pivots < 0, -1.0, 1.0)), vt * (root * np.where(pivots < 0, -1.0, 1.0))[:, None]
    rest = _pair(left[:, rank:], right[rank:], beyond) if beyond else None
    return Best(_pair(left[:, :rank], right[:rank], rank), rest, Spectrum(values, rank, residual))


def _leading(b: np.ndarray, a: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, float]:
    """(columns that span the leading left singular vectors of BA, its singular values, ‖BA‖²)."""
    if b.shape[1] >= min(b.shape[0], a.shape[1]):
        return _by_dense(b, a, count)
    return _by_gram(b, a, count) or _by_qr(b, a, count)


def _by_gram(b: np.ndarray, a: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, float] | None:
    """None where too much cancels out for matrices that hold squares."""
    g, h = b.T @ b, a @ a.T
    live = (g.diagonal() > 0) & (h.diagonal() > 0)
    if not live.any():
        return _nothing(b)
    ratio = np.where(live, h.diagonal(), 1.0) / np.where(live, g.diagonal(), 1.0)
    balance = np.where(live, ratio**0.25, 0.0)
    g *= np.outer(balance, balance)
    h *= np.outer(*[np.where(live, ratio**-0.25, 0.0)] * 2)
    size_g, size_h = (float(np.abs(m).sum(axis=0).max()) for m in (g, h))  # bounds of their spectral norms
    low = _cholesky(h, size_h)
    if low is None:
        return None
    squares, x = np.linalg.eigh(low.T @ (g @ low))
    if not squares[-1] * CANCELLATION > size_g * size_h:
        return None
    span = b @ (balance[:, None] * (low @ x[:, : -count - 1 : -1]))
    return span, np.sqrt(np.maximum(squares[::-1], 0.0)), float(np.sum(g * h))


def _cholesky(h: np.ndarray, size: float) -> np.ndarray | None:
    """L of a positive semidefinite matrix, singular or not, to within what rounding has done to it."""
    for grains in (4, 16, 64):
        try:
            return np.linalg.cholesky(h + np.diag(np.full(len(h), grains * EPS * size)))
        except np.linalg.LinAlgError:
            continue
    return None


def _by_qr(b: np.ndarray, a: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, float]:
    r_b, r_a = np.asarray(np.linalg.qr(b, mode="r")), np.asarray(np.linalg.qr(a.T, mode="r"))
    m = r_b @ r_a.T
    _, values, yt = np.linalg.svd(m)
    if values[0] <= _noise(b, a):
        return _nothing(b)
    return b @ (r_a.T @ yt[:count].T), values, float(np.sum(np.square(values)))


def _by_dense(b: np.ndarray, a: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, float]:
    w = b @ a
    squares, x = np.linalg.eigh(w @ w.T)
    values = np.sqrt(np.maximum(squares[::-1], 0.0))
    if values[0] <= _noise(b, a):
        return _nothing(b)
    return x[:, : -count - 1 : -1], values, float(np.sum(np.square(w)))


def _noise(b: np.ndarray, a: np.ndarray) -> float:
    """What rounding leaves of a product in which all cancels out, at most."""
    return b.shape[1] * EPS * float(np.sum(np.linalg.norm(b, axis=0) * np.linalg.norm(a, axis=1)))


def _nothing(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    return b[:, :0], np.zeros(min(b.shape)), 0.0


def _ritz(span: np.ndarray, b: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The SVD of BA's projection on a span of columns."""
    q = np.linalg.qr(span)[0]
    x, s, vt = np.linalg.svd((q.T @ b) @ a, full_matrices=False)
    return q @ x, s, vt


def _pair(left: np.ndarray, right: np.ndarray, rank: int) -> LoraPair:
    """In float32, filled up with zeros to a rank."""
    b, a = np.zeros((left.shape[0], rank), np.float32), np.zeros((rank, right.shape[1]), np.float32)
    with np.errstate(over="ignore"):
        b[:, : left.shape[1]], a[: right.shape[0]] = left, right
    if not (np.isfinite(b).all() and np.isfinite(a).all()):
        raise SilotuneError("the mean product is not finite in float32; lower training.learning_rate", "non-finite mean")
    return LoraPair(b, a)


def distance(one: LoraPair, other: LoraPair) -> float:
    """‖B₁A₁ - B₂A₂‖, Frobenius, without either product; to some 1e-8 of their norms."""
    b, a = np.hstack([one.b, -other.b]).astype(np.float64), np.vstack([one.a, other.a]).astype(np.float64)
    return math.sqrt(max(0.0, float(np.sum((b.T @ b) * (a @ a.T)))))
