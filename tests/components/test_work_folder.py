"""The coordinator's steps in pods: the federation file lies where nobody can write, and no step finds what another one left on its disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from silotune.components.aggregate import step as aggregate
from silotune.components.evaluate import step as evaluate
from silotune.components.export import step as export
from silotune.components.federation import WORK_VARIABLE, Federation
from silotune.components.initialize import step as initialize
from silotune.components.preprocess import step as preprocess
from silotune.components.train import step as train


def test_every_box_works_in_a_folder_of_its_own_that_was_empty(
    make_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = {"root": str(tmp_path / "elsewhere" / "store")}
    file = make_federation(storage=store, security={"signing": False}, tracking={"uri": "none"}, rounds={"total": 1})
    silos = Federation.load(file).silo_ids

    def in_a_pod(step: Any, *arguments: str) -> str:
        monkeypatch.setenv(WORK_VARIABLE, str(tmp_path / "pods" / step.__name__ / "tmp" / "silotune"))
        return str(step.work(str(file), *arguments))

    turn = in_a_pod(initialize, *(preprocess.work(str(file), s) for s in silos))
    turn = in_a_pod(aggregate, turn, *(train.work(str(file), s, turn) for s in silos))
    for silo in silos:
        evaluate.work(str(file), silo, turn)
    assert (Path(in_a_pod(export, turn)) / "adapter_model.safetensors").is_file()
    assert not (file.parent / ".silotune").exists()
