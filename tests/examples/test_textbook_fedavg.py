"""The textbook example does what its first line says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "textbook_fedavg.py"


def test_it_learns_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("textbook_fedavg", EXAMPLE)
    assert spec
    assert spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    losses = example.main(tmp_path)
    assert len(losses) == 6
    assert losses[-1] < 0.6 * losses[0]
    assert "round 5: loss" in capsys.readouterr().out
