"""The composition table that `silotune strategies` prints is the one that `silotune check` refuses by."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from silotune.components.errors import FederationError
from silotune.components.federation import Federation
from silotune.components.terms.strategies import RULES, STRATEGIES
from silotune.pipelines.checkup import composition_tables

CLIP = {"clip": {"norm": 1.0}, "weights": "uniform"}
ASKED: dict[str, dict[str, Any]] = {  # column -> sections of a file that ask for it
    "unequal ranks": {"unequal": True},
    "full": {"model": {"base": "./base", "method": "full"}},
    "robust rules": {"aggregation": {"robust": {"rule": "multi-krum"}}},
    "one sum: tree": {"aggregation": {"fan_in": 2}},
    "secure sum": {"aggregation": CLIP, "privacy": {"secure_aggregation": {}}},
    "silo DP": {"aggregation": CLIP, "privacy": {"silo": {"epsilon": 8}}},
    "record DP": {"privacy": {"epsilon": 8}},
}


def told() -> dict[str, dict[str, str]]:
    """Strategy -> column -> what the table says."""
    holds, _, _ = composition_tables()
    columns = {str(c.header): [str(cell) for cell in c.cells] for c in holds.columns}  # type: ignore[attr-defined]
    return {name: {key: cells[i] for key, cells in columns.items()} for i, name in enumerate(columns["strategy"])}


def can_be_had(folder: Path, strategy: str, unequal: bool = False, **sections: Any) -> bool:
    silos = [{"id": f"s{i}", "train": f"{i}.jsonl"} | ({"lora": {"r": 4}} if unequal and i == 1 else {}) for i in range(5)]
    terms = {"name": "t", "model": {"base": "./base"}, "silos": silos, "export": {"merge": STRATEGIES[strategy].folds}} | sections
    terms["aggregation"] = {**sections.get("aggregation", {}), "strategy": strategy}
    file = folder / "federation.yaml"
    file.write_text(yaml.safe_dump(terms))
    with suppress(FederationError):
        Federation.load(file)
        return True
    with pytest.raises(FederationError, match=rf"\b{re.escape(strategy)}\b"):  # it is the strategy that is refused
        Federation.load(file)
    return False


@pytest.mark.parametrize("column", ASKED)
@pytest.mark.parametrize("name", STRATEGIES)
def test_what_the_table_says_is_what_can_be_had(tmp_path: Path, name: str, column: str) -> None:
    assert can_be_had(tmp_path, name, **ASKED[column]) == (told()[name][column] == "yes")


def test_the_command_prints_all_of_it_in_a_narrow_terminal(silotune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = silotune("strategies")
    assert code == 0
    for name in (*STRATEGIES, *RULES):
        assert re.search(rf"^{re.escape(name)} ", out, re.MULTILINE)
    for entry in (*STRATEGIES.values(), *RULES.values()):
        assert entry.paper.split()[-1] in out, "the address is in one piece"
