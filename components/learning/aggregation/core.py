"""Cores: fed-sb trains one small matrix R (r × r) between two fixed bases, s·B·R·A (Singhal et al. 2025, arXiv:2502.15436).

The bases are fixed and the same everywhere, so the mean of the cores gives the mean of the products exactly, silos send r² numbers a module, and
noise that is added to R is not multiplied by other noise. R begins at zero, and its gradient there is s·BᵀGAᵀ, the weight's gradient seen through
the bases.

The paper takes B and A from the singular vectors of a first gradient. Here that gradient would be one of some silo's records: whoever has the
bases could read off them what the records look like, before any privacy mechanism has begun, and a mean of all silos' first gradients would be
sent in full, out × in. So the bases are those of LoRA-XS (Bałazy et al. 2024, arXiv:2405.17604), the leading singular vectors of the base weight,
which everyone knows; without the singular values, as orthonormal bases keep steps of R equal to steps of the weight in norm (LoRA-SB, Ponkshe et
al. 2024, arXiv:2411.19557). The coordinator should compute them once and send them with the first global: computed anew elsewhere
they may differ in the last digits, and in more where singular values are equal.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from silotune.components.learning.aggregation.factors import CORE, A, B, LoraPair, modules

OVERSAMPLE = 16  # columns more than are asked for
PASSES = 12  # over the weight, twice each


def core_bases(weight: np.ndarray, rank: int, seed: int = 0) -> LoraPair:
    """B (out × r) and A (r × in): leading left and right singular vectors of a weight, in float32, with orthonormal columns and rows.

    By subspace iteration from random columns (Halko, Martinsson & Tropp 2011, arXiv:0909.4061, Algorithm 4.4), since a whole SVD of a
    4096 × 4096 weight takes minutes. Exact where the rank is near the weight's size. Elsewhere close: directions of nearly equal singular
    values may be mixed, which is as good a basis. Signs: of each column of B, the entry of largest size is positive.

    Args:
        weight: (out, in).
        seed: of the random columns.

    Raises:
        ValueError: the rank is not from 1 to the smaller side, or the weight is not finite.
    """
    if weight.ndim != 2 or not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank: must be from 1 to the smaller side of a weight of shape {weight.shape}, got {rank}")
    if not np.isfinite(weight).all():
        raise ValueError("weight: is not finite")
    w = weight.astype(np.float32, copy=False)
    top = float(np.abs(w).max())
    w = w / np.float32(top) if top > 0 else w  # so that no square over- or underflows
    count = min(*w.shape, rank + OVERSAMPLE)
    columns = np.random.default_rng(seed).standard_normal((w.shape[1], count)).astype(np.float32)
    for _ in range(PASSES):
        columns = np.linalg.qr(w.T @ np.linalg.qr(w @ columns)[0])[0]
    span = np.linalg.qr(columns.astype(np.float64))[0]
    x, _, vt = np.linalg.svd(w @ span, full_matrices=False)
    b, a = x[:, :rank], (vt @ span.T)[:rank]
    signs = np.where(b[np.abs(b).argmax(axis=0), np.arange(rank)] < 0, -1.0, 1.0)
    return LoraPair((b * signs).astype(np.float32), (a * signs[:, None]).astype(np.float32))


def plain_pair(bases: LoraPair, core: np.ndarray) -> LoraPair:
    """B·R·A as one LoRA pair of the same rank and scale, for tools that know no core: with R = XSYᵀ, B·X√S and √S·Yᵀ·A, in float32.

    Args:
        core: R (r, r).

    Raises:
        ValueError: the core is not of the bases' rank.
    """
    if core.shape != (bases.rank, bases.rank):
        raise ValueError(f"core: must be of shape {(bases.rank, bases.rank)}, got {core.shape}")
    x, s, yt = np.linalg.svd(core.astype(np.float64))
    root = np.sqrt(s)
    return LoraPair((bases.b @ (x * root)).astype(np.float32), ((root[:, None] * yt) @ bases.a).astype(np.float32))


def plain_state(bases: Mapping[str, np.ndarray], cores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`plain_pair` of every module, by tensor name: what peft loads as an adapter.

    Args:
        bases: ``….lora_A.weight`` and ``….lora_B.weight``.
        cores: ``….lora_core.weight``.

    Raises:
        ValueError: bases and cores are not of the same modules.
    """
    found = modules(bases)
    if odd := sorted({module + CORE for module in found} ^ cores.keys()):
        raise ValueError(f"cores: are not of the bases' modules, such as {odd[0]!r}")
    state: dict[str, np.ndarray] = {}
    for module in found:
        pair = plain_pair(LoraPair(bases[module + B], bases[module + A]), cores[module + CORE])
        state |= {module + A: pair.a, module + B: pair.b}
    return state
