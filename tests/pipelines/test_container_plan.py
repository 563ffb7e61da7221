"""What each party's containers get of this machine, from federation files of many kinds; no engine is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from silotune.components import keys
from silotune.components.federation import Federation
from silotune.components.federation_file import COORDINATOR
from silotune.pipelines.container_plan import ContainerPlan, make_folders, plan


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "AWS_PROFILE",
        "AWS_ACCESS_KEY_ID",
        "AWS_CONFIG_FILE",
        "MLFLOW_TRACKING_TOKEN",
        "SILOTUNE_KEYS",
        "HTTP_PROXY",
        "HTTPS_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def planned(make_federation: Any) -> Any:
    """(federation, plan of a party) of a file with changed sections; its folders are made."""

    def make(party: str, **sections: Any) -> tuple[Federation, ContainerPlan]:
        federation = Federation.load(make_federation(**sections))
        make_folders(federation)
        run = federation.work / "runs" / "now"
        run.mkdir(parents=True, exist_ok=True)
        return federation, plan(federation, party, run)

    return make


def reaches(found: ContainerPlan, path: Path) -> bool:
    """Whether a path of this machine is seen in the party's containers."""
    return any(path == place or place in path.parents for place in (*found.read, *found.write))


def test_a_silo_gets_its_own_records_and_storage_and_nobody_elses(planned: Any) -> None:
    federation, found = planned("north")
    own, other = federation.silo("north"), federation.silo("east")
    for place in (own.train, own.valid, own.test):
        assert Path(place) in found.read
    assert Path(own.storage) in found.write
    for place in (other.train, other.valid, other.test, other.storage, str(Path(other.storage) / "keys" / "east.pem")):
        assert not reaches(found, Path(place))
    assert not reaches(found, federation.key_folder(COORDINATOR) / "coordinator.pem")
    assert reaches(found, Path(federation.storage.root))
    assert found.network == "none"


def test_the_coordinator_gets_its_own_folder_and_no_records(planned: Any) -> None:
    federation, found = planned(COORDINATOR)
    assert federation.work in found.write
    for silo in federation.silos:
        assert not reaches(found, Path(silo.train))
        assert not reaches(found, Path(silo.storage) / "keys" / f"{silo.id}.pem")
    assert found.network == "none"


def test_in_local_custody_each_party_sees_the_public_keys_of_all(planned: Any) -> None:
    for party in (COORDINATOR, "east", "south"):
        federation, found = planned(party)
        for other in (COORDINATOR, *federation.silo_ids):
            assert reaches(found, federation.key_folder(other) / f"{other}.pub")


def test_a_silo_may_write_its_storage_the_store_and_the_run_folder_only(planned: Any) -> None:
    federation, found = planned("south")
    assert set(found.write) == {Path(federation.silo("south").storage), Path(federation.storage.root), federation.work / "runs" / "now"}


def test_keys_in_one_folder_are_given_out_singly(planned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "all-keys"
    for party in (COORDINATOR, "east", "north", "south"):
        keys.new(folder, party)
    keys.new(folder, "north", replace=True)
    monkeypatch.setenv("SILOTUNE_KEYS", str(folder))
    _, found = planned("north")
    assert {p.name for p in found.read if p.parent == folder} == {"north.pem", "north.1.pem"}
    assert found.environment["SILOTUNE_KEYS"] == str(folder)


def test_the_ledger_lies_where_the_policy_says_and_not_in_a_container(
    planned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"dataset: notes\nledger: {{at: {tmp_path / 'books'}}}\n")
    monkeypatch.setenv("SILOTUNE_POLICY", str(policy))
    (_, silo), (_, coordinator) = planned("north"), planned("coordinator")
    assert tmp_path / "books" in silo.write
    assert tmp_path / "books" not in coordinator.write
    assert silo.network == "none"
    policy.write_text("dataset: notes\nledger: {at: 's3://books/north'}\n")
    assert planned("north")[1].network == "host"


def test_the_policy_of_this_machine_holds_in_a_silos_container(planned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("dataset: notes\n")
    monkeypatch.setenv("SILOTUNE_POLICY", str(policy))
    (_, silo), (_, coordinator) = planned("north"), planned("coordinator")
    assert silo.environment["SILOTUNE_POLICY"] == str(policy)
    assert policy in silo.read
    assert "SILOTUNE_POLICY" not in coordinator.environment


def test_s3_needs_the_network_and_its_variables(planned: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "home" / ".aws").mkdir(parents=True)
    profile = tmp_path / "home" / ".aws" / "config"
    profile.write_text("[default]\n")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    monkeypatch.setenv("UNRELATED_SECRET", "x")
    for party in ("north", COORDINATOR):
        _, found = planned(party, storage={"root": "s3://bucket/prefix"})
        assert found.network == "host"
        assert found.environment["AWS_ENDPOINT_URL"] == "http://127.0.0.1:9000"
        assert found.environment["AWS_CONFIG_FILE"] == str(profile)
        assert profile in found.read
        assert "UNRELATED_SECRET" not in found.environment
    _, found = planned("north")
    assert "AWS_ENDPOINT_URL" not in found.environment
    assert profile not in found.read


def test_records_in_s3_open_the_network_to_their_silo_only(make_federation: Any) -> None:
    file = make_federation()
    file.write_text(file.read_text().replace(str(file.parent / "data" / "east" / "train.jsonl"), "s3://east/train.jsonl"))
    federation = Federation.load(file)
    make_folders(federation)
    assert [plan(federation, p, federation.work).network for p in ("east", "north", COORDINATOR)] == ["host", "none", "none"]


def test_a_tracking_server_is_for_the_coordinator(planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t")
    tracking = {"uri": "http://127.0.0.1:5000"}
    _, found = planned(COORDINATOR, tracking=tracking)
    assert (found.network, found.environment["MLFLOW_TRACKING_TOKEN"]) == ("host", "t")
    _, found = planned("north", tracking=tracking)
    assert (found.network, "MLFLOW_TRACKING_TOKEN" in found.environment) == ("none", False)


def test_a_tracking_file_brings_its_folder(planned: Any, tmp_path: Path) -> None:
    _, found = planned(COORDINATOR, tracking={"uri": f"sqlite:///{tmp_path}/elsewhere/mlflow.db"})
    assert tmp_path / "elsewhere" in found.write
    assert found.network == "none"
    _, found = planned("north", tracking={"uri": f"sqlite:///{tmp_path}/elsewhere/mlflow.db"})
    assert not reaches(found, tmp_path / "elsewhere")


def test_links_out_of_a_base_folder_lead_somewhere(planned: Any, tmp_path: Path, tiny_llama: Path) -> None:
    base, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    base.mkdir()
    blobs.mkdir()
    for file in tiny_llama.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (base / file.name).symlink_to(Path("..") / "blobs" / file.name)
    _, found = planned("north", base=base)
    assert all(reaches(found, file.resolve()) for file in base.iterdir())


def test_a_base_of_the_hub_is_read_from_the_cache_it_was_fetched_to(
    planned: Any, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "hub" / "models--org--tiny"
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    for file in tiny_llama.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    _, found = planned("north", model={"base": "org/tiny"})
    assert model in found.read
    assert found.environment["HF_HUB_CACHE"] == str(tmp_path / "hub")
    assert found.environment["HF_HUB_OFFLINE"] == "1"
    assert found.network == "none"


def test_variables_that_the_file_names_are_handed_on(make_federation: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = make_federation()
    file.write_text(file.read_text().replace(str(tmp_path), "${HERE}"))
    monkeypatch.setenv("HERE", str(tmp_path))
    federation = Federation.load(file)
    make_folders(federation)
    assert plan(federation, "north", federation.work).environment["HERE"] == str(tmp_path)


def test_what_does_not_exist_is_left_out(make_federation: Any) -> None:
    federation = Federation.load(make_federation())
    make_folders(federation)
    Path(federation.silo("north").train).unlink()
    found = plan(federation, "north", federation.work)
    assert Path(federation.silo("north").train) not in found.read
    assert all(path.exists() for path in (*found.read, *found.write))
