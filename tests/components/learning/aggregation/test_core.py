"""Bases and cores of fed-sb."""

from __future__ import annotations

import numpy as np
import pytest

from silotune.components.learning.aggregation.core import core_bases, plain_pair
from silotune.components.learning.aggregation.factors import LoraPair


def weight(out: int, into: int, decay: float = 0.8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    n = min(out, into)
    u, v = np.linalg.qr(rng.standard_normal((out, n)))[0], np.linalg.qr(rng.standard_normal((into, n)))[0]
    return ((u * decay ** np.arange(n)) @ v.T).astype(np.float32)


@pytest.mark.parametrize(("out", "into"), [(60, 90), (90, 60), (12, 50)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_bases_are_the_leading_singular_vectors(out: int, into: int, scale: float) -> None:
    w = np.float32(scale) * weight(out, into)
    found = core_bases(w, 4)
    u, _, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    assert (found.b.shape, found.a.shape) == ((out, 4), (4, into))
    for i in range(4):
        assert abs(u[:, i] @ found.b[:, i]) == pytest.approx(1, abs=1e-5)
        assert abs(vt[i] @ found.a[i]) == pytest.approx(1, abs=1e-5)
        assert u[:, i] @ found.b[:, i] * (vt[i] @ found.a[i]) > 0
        assert found.b[np.abs(found.b[:, i]).argmax(), i] > 0


@pytest.mark.parametrize("w", [weight(80, 70, 1.0), weight(80, 70, 0.999), weight(30, 30, 0.0), np.zeros((20, 30), np.float32)])
def test_bases_are_orthonormal_whatever_the_weight(w: np.ndarray) -> None:
    """Equal singular values, nearly equal ones, one only, none."""
    found = core_bases(w, 6)
    np.testing.assert_allclose(found.b.T @ found.b, np.eye(6), atol=1e-6)
    np.testing.assert_allclose(found.a @ found.a.T, np.eye(6), atol=1e-6)


def test_bases_of_noise_hold_nearly_as_much_as_the_best() -> None:
    """The hardest spectrum for subspace iteration, and the least interesting one for a base."""
    w = np.random.default_rng(0).standard_normal((300, 400)).astype(np.float32)
    found = core_bases(w, 8)
    best = np.linalg.svd(w, compute_uv=False)[:8]
    held = np.linalg.norm(found.b.T @ w.astype(np.float64) @ found.a.T)
    assert 0.97 * np.linalg.norm(best) < held <= np.linalg.norm(best) * (1 + 1e-6)


def test_whole_rank_and_the_same_each_time() -> None:
    w = weight(10, 14)
    found = core_bases(w, 10)
    np.testing.assert_allclose(found.b @ (found.b.T @ w @ found.a.T) @ found.a, w, atol=1e-5)
    assert core_bases(w, 10).b.tobytes() == found.b.tobytes()


def test_no_such_rank_and_no_such_weight() -> None:
    with pytest.raises(ValueError, match=r"rank: must be from 1 to the smaller side of a weight of shape \(10, 14\), got 11"):
        core_bases(weight(10, 14), 11)
    with pytest.raises(ValueError, match="weight: is not finite"):
        core_bases(np.full((3, 3), np.nan, np.float32), 1)


def test_mean_of_cores_is_the_mean_of_products() -> None:
    bases = core_bases(weight(30, 20), 4)
    cores = np.random.default_rng(1).standard_normal((5, 4, 4))
    mean = np.mean([bases.b.astype(float) @ r @ bases.a.astype(float) for r in cores], axis=0)
    np.testing.assert_allclose(bases.b @ cores.mean(0) @ bases.a, mean, atol=1e-12)


@pytest.mark.parametrize(
    "core", [np.random.default_rng(2).standard_normal((4, 4)), np.zeros((4, 4)), np.outer([1, 2, 3, 4], [1, 0, -1, 5])]
)
def test_plain_pair_is_the_same_product(core: np.ndarray) -> None:
    bases = core_bases(weight(30, 20), 4)
    found = plain_pair(bases, core)
    np.testing.assert_allclose(found.product(), bases.b.astype(float) @ core @ bases.a.astype(float), atol=2e-6)
    np.testing.assert_allclose(found.b.T @ found.b, found.a @ found.a.T, atol=1e-5)
    assert found.b.dtype == found.a.dtype == np.float32


def test_core_of_another_rank() -> None:
    with pytest.raises(ValueError, match=r"core: must be of shape \(2, 2\), got \(3, 3\)"):
        plain_pair(LoraPair(np.zeros((4, 2)), np.zeros((2, 4))), np.eye(3))
