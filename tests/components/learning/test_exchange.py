"""What of a global silos get, train and send."""

from __future__ import annotations

import numpy as np
import pytest

from silotune.components.learning.exchange import held, held_shape, trained_names, update_schema
from silotune.components.terms.strategies import STRATEGIES

SHAPES = {
    "m.q.delta.weight": [6, 5], "m.q.lora_A.weight": [4, 5], "m.q.lora_B.weight": [6, 4], "m.v.lora_A.weight": [4, 5],
    "m.v.lora_B.weight": [3, 4],
}  # fmt: skip
CORES = {"m.q.lora_A.weight": [4, 5], "m.q.lora_B.weight": [6, 4], "m.q.lora_core.weight": [4, 4]}
BOTH = ["m.q.lora_A.weight", "m.q.lora_B.weight", "m.v.lora_A.weight", "m.v.lora_B.weight"]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("turn", [1, 2, 3])
def test_what_is_trained(name: str, turn: int) -> None:
    strategy = STRATEGIES[name]
    if name == "fed-sb":
        assert trained_names(strategy, turn, CORES) == ["m.q.lora_core.weight"]
        return
    wanted = {"ffa": BOTH[1::2], "rolora": BOTH[1::2] if turn % 2 else BOTH[::2]}.get(name, BOTH)
    assert trained_names(strategy, turn, reversed(SHAPES)) == wanted
    schema = update_schema(SHAPES, strategy, turn, 4)
    memory = {f"memory.{n}" for n in wanted} if name == "scaffold" else set()
    assert schema.keys() == set(wanted) | memory
    assert all(schema[n] == SHAPES[n.removeprefix("memory.")] for n in schema)


def test_all_weights_are_trained_where_there_are_no_adapters() -> None:
    assert update_schema({"w": [2, 3], "b": [2]}, STRATEGIES["fedavg"], 1, 0) == {"w": [2, 3], "b": [2]}


@pytest.mark.parametrize("rank", [1, 2, 4, 9])
def test_a_lower_rank_holds_the_first_rows_and_columns(rank: int) -> None:
    rng = np.random.default_rng(0)
    state = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    got, most = held(state, rank), min(rank, 4)
    assert {n: list(a.shape) for n, a in got.items()} == {n: held_shape(n, s, rank) for n, s in SHAPES.items()}
    assert np.array_equal(got["m.q.delta.weight"], state["m.q.delta.weight"]), "the base is the same for all"
    assert np.array_equal(got["m.q.lora_A.weight"], state["m.q.lora_A.weight"][:most])
    assert np.array_equal(got["m.q.lora_B.weight"], state["m.q.lora_B.weight"][:, :most])
    schema = update_schema(SHAPES, STRATEGIES["product"], 1, rank)
    assert schema == {n: list(got[n].shape) for n in BOTH}
    assert held(state, 0).keys() == state.keys()
