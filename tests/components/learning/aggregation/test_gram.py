"""Gram matrices against inner products of whole updates in float64, of plain tensors and of LoRA's products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from silotune.components.learning.aggregation.factors import LoraPair
from silotune.components.learning.aggregation.gram import BLOCK, Gram, product_gram, tensor_gram, updates_gram

OUT, IN, R = 9, 13, 4


def pair(seed: int, rank: int = R, scale: float = 1.0) -> LoraPair:
    rng = np.random.default_rng(seed)
    return LoraPair(
        (scale * rng.standard_normal((OUT, rank))).astype(np.float32), (scale * rng.standard_normal((rank, IN))).astype(np.float32)
    )


def change(incoming: LoraPair, difference: LoraPair) -> np.ndarray:
    """ΔP, dense: what the silo was given is cut to its rank."""
    b0, a0 = (x.astype(np.float64) for x in (incoming.b[:, : difference.rank], incoming.a[: difference.rank]))
    return (b0 + difference.b) @ (a0 + difference.a) - b0 @ a0


def dense_gram(changes: list[np.ndarray]) -> np.ndarray:
    return np.array([[sum(x * y for x, y in zip(a.ravel(), b.ravel(), strict=True)) for b in changes] for a in changes])


@pytest.mark.parametrize("shape", [(7,), (3, 5, 2), (BLOCK // 3 + 17,), (0,)])
def test_of_a_tensor(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    rows = [(s * rng.standard_normal(shape)).astype(np.float32) for s in (1, 1e-3, 40)]
    wanted = np.array([[np.vdot(a.astype(np.float64), b.astype(np.float64)) for b in rows] for a in rows])
    lengths = np.sqrt(np.diagonal(wanted))
    assert np.abs(tensor_gram(rows) - wanted).max(initial=0) <= 1e-6 * lengths.max() ** 2
    assert (np.abs(tensor_gram(rows) - wanted) <= 1e-6 * np.outer(lengths, lengths)).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_of_numbers_whose_squares_float32_cannot_hold(scale: float) -> None:
    rng = np.random.default_rng(1)
    rows = [rng.standard_normal(500).astype(np.float32), (scale * rng.standard_normal(500)).astype(np.float32), np.zeros(500, np.float32)]
    wanted = np.array([[np.vdot(a.astype(np.float64), b.astype(np.float64)) for b in rows] for a in rows])
    np.testing.assert_allclose(tensor_gram(rows), wanted, rtol=1e-9)


@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 4, 2)])
@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_of_products(ranks: tuple[int, ...], scale: float) -> None:
    """Right to ten digits also where the change is a hundred thousandth of the product."""
    incoming = pair(0)
    differences = [pair(i, rank, scale) for i, rank in enumerate(ranks, 1)]
    wanted = dense_gram([change(incoming, d) for d in differences])
    np.testing.assert_allclose(product_gram(incoming, differences), wanted, rtol=1e-9 / scale**0.5, atol=1e-12 * wanted.max())


def test_of_wide_products_in_blocks() -> None:
    rng = np.random.default_rng(2)
    incoming = LoraPair(rng.standard_normal((BLOCK // 40, 4)), rng.standard_normal((4, 3)))
    differences = [LoraPair(rng.standard_normal((BLOCK // 40, 4)), rng.standard_normal((4, 3))) for _ in range(9)]
    moved = np.stack([change(incoming, d).ravel() for d in differences])
    np.testing.assert_allclose(
        product_gram(incoming, differences), moved @ moved.T, rtol=1e-9, atol=1e-9 * np.square(moved).sum(axis=1).max()
    )


@pytest.mark.parametrize("c", [1e-3, -7.0, 1e3])
def test_other_factors_of_the_same_product_change_nothing(c: float) -> None:
    incoming, first, second = pair(0), pair(1), pair(2)
    b, a = (x.astype(np.float64) for x in (incoming.b, incoming.a))
    turned = LoraPair((b + second.b) / c - b, c * (a + second.a) - a)
    np.testing.assert_allclose(product_gram(incoming, [first, turned]), product_gram(incoming, [first, second]), rtol=1e-6)


def rows(sent: dict[str, dict[str, np.ndarray]], names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    for name in names:
        yield {silo: tensors[name].astype(np.float32) for silo, tensors in sent.items()}


def test_of_updates_with_plain_tensors_and_factors() -> None:
    rng = np.random.default_rng(5)
    incoming = {"m.lora_B.weight": pair(0).b, "m.lora_A.weight": pair(0).a, "n.lora_B.weight": pair(9).b, "n.lora_A.weight": pair(9).a}
    sent = {
        silo: {
            "m.lora_B.weight": pair(i).b,
            "m.lora_A.weight": pair(i).a,
            "n.lora_B.weight": pair(i + 20).b,
            "head": rng.standard_normal(6),
        }
        for i, silo in enumerate(("west", "east", "north"), 1)
    }
    found = updates_gram(sent, sent["west"], lambda names: rows(sent, names), incoming.__getitem__)
    assert found.silos == ("east", "north", "west")
    flat = []
    for silo in found.silos:
        s = sent[silo]
        only_b = LoraPair(s["n.lora_B.weight"], np.zeros((R, IN), np.float32))
        m = change(pair(0), LoraPair(s["m.lora_B.weight"], s["m.lora_A.weight"]))
        flat.append(np.concatenate([m.ravel(), change(pair(9), only_b).ravel(), s["head"].astype(np.float32)]))
    np.testing.assert_allclose(found.matrix, np.stack(flat) @ np.stack(flat).T, rtol=1e-6)
    plain = updates_gram(sent, ["head"], lambda names: rows(sent, names))
    np.testing.assert_allclose(
        plain.matrix, [[np.dot(sent[a]["head"], sent[b]["head"]) for b in plain.silos] for a in plain.silos], rtol=1e-6
    )


def test_order_of_arrival_changes_no_byte() -> None:
    rng = np.random.default_rng(6)
    sent = {silo: rng.standard_normal(1000).astype(np.float32) for silo in ("b", "a", "c")}
    one, other = (updates_gram(order, ["x"], lambda _: [sent]) for order in (["b", "a", "c"], ["c", "b", "a"]))
    assert one.silos == other.silos
    assert one.matrix.tobytes() == other.matrix.tobytes()


def test_norms_distances_and_cosines() -> None:
    x = np.array([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    gram = Gram(("a", "b", "c"), x @ x.T)
    assert gram.norms == {"a": 5.0, "b": 2.0, "c": 0.0}
    np.testing.assert_allclose(gram.distances, [[0, 13, 25], [13, 0, 4], [25, 4, 0]])
    np.testing.assert_allclose(gram.cosines, [[1, 0.8, 0], [0.8, 1, 0], [0, 0, 0]])
    assert gram.scaled({"a": 0.5, "b": 1.0, "c": 1.0}).norms == {"a": 2.5, "b": 2.0, "c": 0.0}


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="sorted"):
        Gram(("b", "a"), np.eye(2))
    with pytest.raises(ValueError, match="2 × 2"):
        Gram(("a", "b"), np.eye(3))
    with pytest.raises(ValueError, match="one shape"):
        tensor_gram([np.zeros(3, np.float32), np.zeros(4, np.float32)])
    with pytest.raises(ValueError, match="from 1 to that of the global, 4"):
        product_gram(pair(0), [pair(1, 5)])
