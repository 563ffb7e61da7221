"""The affinity map: who may reach what, and what two parties may reach that only one should."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from silotune.components import keys
from silotune.components.federation import Federation
from silotune.pipelines.diagnosis.findings import Finding
from silotune.pipelines.membership import access_map

SILO = """
  - id: {0}
    train: /silo/train.jsonl
    storage: /silo/storage-{0}
    placement: {{namespace: silotune-{0}, image: "registry.example/silo@sha256:{1}"}}"""
FILE = f"""
name: ward
model: {{base: s3://models/base}}
silos:{SILO.format("north", "a" * 64)}{SILO.format("south", "a" * 64)}
storage: {{root: s3://store/federations}}
tracking: {{uri: none}}
security: {{keys: KEYS}}
"""


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Federation]:
    """The federation, with texts replaced."""
    public = {party: keys.new(tmp_path / "keys", party) for party in ("coordinator", "north", "south")}

    def load(*changes: tuple[str, str]) -> Federation:
        text = FILE.replace("KEYS", json.dumps(public))
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "ward.yaml").write_text(text)
        return Federation.load(tmp_path / "ward.yaml")

    return load


def violations(federation: Federation, namespace: str | None = None) -> list[Finding]:
    return [f for f in access_map.affinity(federation, namespace) if f.level == "fail"]


def test_it_tells_who_may_touch_what(make: Callable[..., Federation]) -> None:
    lines = {(a.party, a.place): a.rights for a in access_map.access(make(("train: /silo/train.jsonl", "train: s3://records/all.jsonl")))}
    assert lines["coordinator", "s3://store/federations/ward/"].startswith("read")
    assert lines["north", "s3://records/all.jsonl"] == "read"
    assert {lines[party, "s3://models/base"] for party in ("coordinator", "north", "south")} == {"read"}
    assert lines["north", "volume silotune-north/silotune-silo at /silo"] == "read, write"
    assert lines["south", "secret silotune-south/silotune-keys"] == "use"
    assert not any(party == "south" and "north" in place for party, place in lines)


def test_the_table_has_every_access_and_each_party_once(make: Callable[..., Federation]) -> None:
    federation, console = make(), Console(width=240, record=True, file=io.StringIO())
    console.print(access_map.render(federation))
    text = console.export_text()
    assert all(line.place in text for line in access_map.access(federation))
    assert [line.split()[0] for line in text.splitlines()[1:] if not line.startswith(" ")] == ["coordinator", "north", "south"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([("silotune-south", "silotune-north")], ["namespace silotune-north", "volume silotune-north/silotune-silo", "secret silotune-north/silotune-keys", "secret silotune-north/silotune-s3"]),
        ([("/silo/storage-south", "s3://store/federations/ward/south")], ["south's storage, s3://store/federations/ward/south, and the store"]),
        ([("/silo/storage-south", "s3://store")], ["south's storage, s3://store, and the store"]),
        ([("/silo/storage-north", "s3://own/a"), ("/silo/storage-south", "s3://own/a/b")], ["north's storage, s3://own/a, and south's storage, s3://own/a/b"]),
        ([("/silo/storage-north", "s3://own/a"), ("/silo/storage-south", "s3://own/ab")], []),
        ([("namespace: silotune-south", "namespace: kubeflow")], ["namespace kubeflow of silo south is the one where the coordinator's tasks run"]),
        ([("namespace: silotune-south, ", ""), ("namespace: silotune-north, ", "")], []),  # what is missing is told as that
    ],
)  # fmt: skip
def test_whatever_two_parties_share_is_a_violation(
    make: Callable[..., Federation], changes: list[tuple[str, str]], told: list[str]
) -> None:
    found = violations(make(*changes))
    assert len(found) == len(told)
    assert all(text in f.what for text, f in zip(told, found, strict=True))


def test_the_profile_of_the_runs_is_no_place_for_a_silo(make: Callable[..., Federation]) -> None:
    assert [f.cure for f in violations(make(), "silotune-north")] == ["give the silo a namespace of its own"]


def test_the_same_names_in_two_clusters_are_two_places(make: Callable[..., Federation]) -> None:
    apart = make(("namespace: silotune-south", "kubeconfig_secret: south-cluster, namespace: silotune-north"))
    assert [f.level for f in access_map.affinity(apart)] == ["ok"]
