"""silotune audit-privacy on whole federations: one that has learned its records by heart, one that is private, and one that only says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from silotune.components.errors import RefusedError
from silotune.components.federation import Federation
from silotune.components.learning.privacy import private_gradient
from silotune.pipelines import cli
from silotune.pipelines.simulate import Simulation
from silotune.pipelines.steward import leakage, leakage_view

LORA = {"r": 2, "alpha": 4, "target_modules": ["q_proj", "down_proj"]}


def made(folder: Path, base: Path, silos: tuple[str, ...] = ("east", "north"), **sections: Any) -> Path:
    """Silos with records whose answers nobody can guess."""
    draw = np.random.default_rng(0)
    entries: list[dict[str, Any]] = []
    for silo in silos:
        entry = {"id": silo, "canaries": 24}
        for split, count in (("train", 60), ("valid", 8), ("test", 60)):
            file = folder / f"{silo}-{split}.jsonl"
            answers = ("".join(draw.choice(list("abcdefgh"), 8)) for _ in range(count))
            file.write_text("".join(json.dumps({"prompt": f"case {i}?", "response": answer}) + "\n" for i, answer in enumerate(answers)))
            entry[split] = str(file)
        entries.append(entry)
    terms: dict[str, Any] = {
        "name": "tiny", "model": {"base": str(base), "lora": LORA}, "data": {"max_length": 64}, "silos": entries, "rounds": {"total": 1},
        "tracking": {"uri": "none"},
    }  # fmt: skip
    (folder / "federation.yaml").write_text(yaml.safe_dump(terms | sections))
    return folder / "federation.yaml"


@pytest.fixture(scope="module")
def by_heart(tiny_llama: Path, tmp_path_factory: Any) -> Path:
    model = {"base": str(tiny_llama), "method": "full"}
    training = {"steps": 150, "batch_size": 8, "learning_rate": 4e-3}
    file = made(tmp_path_factory.mktemp("heart"), tiny_llama, ("east",), model=model, training=training)
    list(Simulation(file).run())
    return file


@pytest.fixture(scope="module")
def private(tiny_llama: Path, tmp_path_factory: Any) -> Path:
    training = {"steps": 12, "batch_size": 8, "learning_rate": 2e-3}
    file = made(tmp_path_factory.mktemp("private"), tiny_llama, training=training, privacy={"epsilon": 2.0})
    list(Simulation(file).run())
    return file


@pytest.fixture(autouse=True)
def same_coins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the auditor, so that its chance of error is not this test's."""
    monkeypatch.setattr(leakage.secrets, "token_bytes", lambda count: np.random.default_rng(count).bytes(count))


def test_a_model_that_has_its_records_by_heart_is_found_out(by_heart: Path) -> None:
    found = leakage.measure(Federation.load(by_heart), ["east"])
    one = found.silos["east"]
    assert one.membership.auc > 0.8
    assert one.membership.surprising
    assert one.exposure is not None
    assert one.exposure.surprising
    assert one.exposure.mean > 3
    assert one.shown is not None
    assert one.shown.epsilon > 0.1
    assert one.update is not None
    assert one.update.membership.auc > 0.8
    assert one.update.exposure is not None
    assert found.claimed is None
    assert found.training is None
    assert any("can be told from others" in line for line in leakage_view.words(found))
    assert any("Nothing is claimed" in line for line in leakage_view.words(found))


def test_a_private_model_tells_nothing_and_its_claim_stands(private: Path) -> None:
    result = CliRunner().invoke(cli.app, ["audit-privacy", str(private), "--canaries", "400", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)["as it is"]
    assert set(found["silos"]) == {"east", "north"}
    assert found["claimed"] == 2.0
    assert found["training"]["epsilon"] < 2.0
    for one in found["silos"].values():
        assert one["exposure"]["mean"] < one["exposure"]["by_chance"] + 4 * one["exposure"]["error"]
        assert one["shown"]["epsilon"] < 2.0
        assert abs(one["membership"]["auc"] - 0.5) < 5 * one["membership"]["error"]


def test_what_a_terminal_shows(private: Path) -> None:
    result = CliRunner().invoke(cli.app, ["audit-privacy", str(private), "--silo", "north", "--canaries", "0"])
    assert result.exit_code == 0, result.output
    assert "epsilon that is claimed" in result.output
    assert "Nothing measured contradicts epsilon 2 at delta 1e-05." in result.output


@pytest.mark.parametrize("broken", ["noise", "clipping"])
def test_a_promise_that_is_broken_ends_in_exit_code_4(private: Path, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == "clipping":
        monkeypatch.setattr(private_gradient, "clip_left", lambda clip, deviation, numbers: 1e9)
    else:
        whole = private_gradient.add_noise
        monkeypatch.setattr(private_gradient, "add_noise", lambda total, deviation, normals: whole(total, deviation / 4, normals))
    with pytest.raises(RefusedError, match=r"a promise of privacy does not hold:\n  private training show") as caught:
        CliRunner().invoke(cli.app, ["audit-privacy", str(private), "--silo", "north", "--json"], catch_exceptions=False)
    assert caught.value.exit_code == 4
    assert caught.value.reason == "privacy broken"


def test_the_same_federation_without_privacy_beside_it(private: Path) -> None:
    result = CliRunner().invoke(cli.app, ["audit-privacy", str(private), "--silo", "east", "--canaries", "0", "--without", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) == {"as it is", "without privacy"}
    assert found["without privacy"]["claimed"] is None
    assert found["without privacy"]["outgoing"] != found["as it is"]["outgoing"]


def test_a_machine_without_shards_is_told_so(tiny_llama: Path, tmp_path: Path) -> None:
    file = made(tmp_path, tiny_llama)
    result = CliRunner().invoke(cli.app, ["audit-privacy", str(file)])
    assert "no silo's shards are on this machine" in str(result.exception)
