"""keys, verify and gc on federations that have really trained: what holds, what is told, and what is made good."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from silotune.components import keys
from silotune.components.aggregate import step as aggregate
from silotune.components.errors import FederationError, QuorumError, RefusedError
from silotune.components.federation import Federation
from silotune.components.initialize import step as initialize
from silotune.components.preprocess import step as preprocess
from silotune.components.protocol import Attempt, Record, Report, Turn, UpdateManifest
from silotune.components.rounds import Rounds
from silotune.components.train import step as train
from silotune.pipelines.simulate import Simulation

SILOS = ("east", "north", "south")
PARTIES = ("coordinator", *SILOS)
Call = Callable[..., tuple[int, str, str]]
_trained: dict[str, Path] = {}


@pytest.fixture
def trained(make_federation: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two rounds and an export, with MLflow. Not to be written to."""
    if "folder" not in _trained:
        folder = tmp_path_factory.mktemp("trained") / "fed"
        simulation = Simulation(make_federation(folder, tracking={}))
        list(simulation.run())
        simulation.export()
        _trained["folder"] = folder
    return _trained["folder"]


@pytest.fixture
def file(trained: Path, tmp_path: Path) -> Path:
    """Its federation file, in a copy."""
    shutil.copytree(trained, tmp_path / "fed")
    return tmp_path / "fed/federation.yaml"


def edit(file: Path, **sections: Any) -> None:
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | sections))


def rounds_of(file: Path) -> Rounds:
    return Rounds.of(Federation.load(file))


def place(file: Path, number: int) -> Path:
    """The file of a round's global in the store."""
    return file.parent / ".silotune/store/tiny/objects" / rounds_of(file).commit(number).outgoing


def flip(path: Path) -> bytes:
    """Returns what was there."""
    before = path.read_bytes()
    path.write_bytes(before[:-3] + bytes([before[-3] ^ 1]) + before[-2:])
    return before


# verify


def test_a_good_federation_is_unbroken(file: Path, silotune: Call) -> None:
    for options in ((), ("--deep",), ("--repair",)):
        code, out, err = silotune("verify", file, *options)
        assert code == 0, err
        assert "tiny: unbroken from round 2 back to the base" in out
        assert "custody: local. All keys were made on this machine" in err


def test_a_federation_without_rounds_is_no_break(make_federation: Any, silotune: Call) -> None:
    code, _, err = silotune("verify", make_federation())
    assert (code, "has no round yet; run it first" in err) == (2, True)


def test_a_federation_whose_commits_were_all_deleted_is_broken(file: Path, silotune: Call) -> None:
    for commit in (file.parent / ".silotune/store/tiny/rounds").glob("*/commit.json"):
        commit.unlink()
    code, _, err = silotune("verify", file)
    assert code == 4
    assert "round 0: its commit is gone" in err


@pytest.mark.parametrize("number", [1, 2])
def test_a_flipped_global_is_made_again_to_the_bit(file: Path, silotune: Call, number: int) -> None:
    before = flip(place(file, number))
    assert silotune("verify", file)[0] == 0
    code, _, err = silotune("verify", file, "--deep")
    assert code == 4
    assert f"object 'tiny/objects/{place(file, number).name}': its bytes have the digest" in err
    code, out, err = silotune("verify", file, "--repair")
    assert code == 0, err
    assert f"round {number}: its global was made again from its updates" in out
    assert place(file, number).read_bytes() == before


def test_globals_that_are_gone_are_made_again_to_the_bit(file: Path, silotune: Call) -> None:
    """The second one from the first one, which is gone as well."""
    before = {n: place(file, n).read_bytes() for n in (1, 2)}
    for number in (1, 2):
        place(file, number).unlink()
    code, _, err = silotune("verify", file)
    assert code == 4
    assert "round 1: its global" in err
    assert "round 2: its global" in err
    assert silotune("verify", file, "--repair")[0] == 0
    assert {n: place(file, n).read_bytes() for n in (1, 2)} == before


@pytest.mark.parametrize("damage", [Path.unlink, flip])
def test_a_global_is_not_made_again_where_an_update_is_gone_too(file: Path, silotune: Call, damage: Callable[[Path], Any]) -> None:
    commit = rounds_of(file).commit(1)
    place(file, 1).unlink()
    damage(file.parent / ".silotune/store/tiny/contributions/north" / commit.contributions["north"].object)
    code, _, err = silotune("verify", file, "--repair")
    assert code == 4
    assert f"object {commit.outgoing[:12]}…, the global of round 1, is lost or damaged, and so is the update of north" in err
    assert not place(file, 1).exists()


def test_the_initial_global_cannot_be_made_again_from_updates(file: Path, silotune: Call) -> None:
    place(file, 0).unlink()
    code, _, err = silotune("verify", file, "--repair")
    assert code == 4
    assert "the global of round 0, is lost or damaged, and nothing is stored that it could be made from; restore it from a backup" in err


def test_the_lineage_of_a_global_is_told(file: Path, silotune: Call) -> None:
    commits = list(rounds_of(file).commits())
    code, out, _ = silotune("verify", file, commits[1].outgoing[:9])
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("round")] == ["round 1", "round 0"]
    for silo, contribution in commits[1].contributions.items():
        assert f"  {silo}: update {contribution.object[:12]}… weight {contribution.weight:.3f}, 6 examples" in out
    code, _, err = silotune("verify", file, "0123456789")
    assert (code, "no committed global begins with this digest" in err) == (4, True)


def exported(file: Path) -> Path:
    record = next(iter(rounds_of(file).exports()))
    return next((file.parent / ".silotune/store/tiny/exports").glob(f"{record.commit[:16]}-*"))


def test_the_lineage_of_an_exported_model_is_told(file: Path, silotune: Call, tmp_path: Path) -> None:
    shutil.copytree(exported(file), tmp_path / "model")
    record = next(iter(rounds_of(file).exports()))
    code, out, err = silotune("verify", file, tmp_path / "model")
    assert code == 0, err
    assert f"round {record.round}: global {record.outgoing[:12]}…" in out


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda model: flip(model / "adapter_model.safetensors"), "adapter_model.safetensors is not as it was exported from round"),
        (lambda model: (model / "README.md").write_text("better"), "README.md is not as it was exported"),
        (lambda model: (model / "tokenizer.json").unlink(), "tokenizer.json is not as it was exported"),
        (lambda model: (model / "modeling.py").write_text("import os"), "modeling.py is not as it was exported"),
    ],
)
def test_an_altered_export_is_refused(file: Path, silotune: Call, tmp_path: Path, change: Callable[[Path], Any], told: str) -> None:
    shutil.copytree(exported(file), tmp_path / "model")
    change(tmp_path / "model")
    code, _, err = silotune("verify", file, tmp_path / "model")
    assert code == 4
    assert told in err


# Custody


def test_commits_say_who_held_the_keys(file: Path) -> None:
    assert [c.custody for c in rounds_of(file).commits()] == ["local"] * 3


def test_no_private_key_leaves_its_folder(trained: Path) -> None:
    federation = Federation.load(trained / "federation.yaml")
    needles = {}
    for party in PARTIES:
        path = federation.key_folder(party) / f"{party}.pem"
        seed = keys.private_key(path).private_bytes_raw()
        needles |= {seed: party, base64.b64encode(seed).rstrip(b"=")[:42]: party, seed.hex().encode(): party}
        needles[path.read_bytes().splitlines()[1][-40:]] = party  # as PEM: a header in front shifts the base64
        assert needles[path.read_bytes().splitlines()[1][-40:]] == party
    searched = [p for p in trained.rglob("*") if p.is_file() and p.suffix != ".pem"]
    assert {".db", ".pub", ".json"} <= {p.suffix for p in searched}, "MLflow's database and the store are among them"
    for path in searched:
        data = path.read_bytes()
        assert not [party for needle, party in needles.items() if needle in data], path
        assert b"PRIVATE KEY" not in data, path
    for party in PARTIES:
        assert list(trained.rglob(f"{party}.pem")) == [federation.key_folder(party) / f"{party}.pem"]


def test_signing_off_is_loud(make_federation: Any, silotune: Call) -> None:
    file = make_federation(security={"signing": False}, rounds={"total": 1})
    simulation = Simulation(file)
    list(simulation.run())
    simulation.export()
    assert [c.custody for c in simulation.rounds.commits()] == ["none", "none"]
    _, out, err = silotune("run", file)
    assert "nothing is signed, and whoever can write to the store can forge rounds and models" in err
    _, out, err = silotune("check", file)
    assert "UNSIGNED: whoever can write to the store can forge plans, updates and models" in out
    code, _, err = silotune("verify", file)
    assert (code, "signing: off. Nothing is signed" in err) == (0, True)
    edit(file, security={"signing": True})
    keys.ensure(Federation.load(file))
    code, _, err = silotune("verify", file)
    assert code == 4
    assert "round 0: its commit cannot be believed: tiny/rounds/00000/commit.json: must be signed by coordinator, has no signature" in err
    with pytest.raises(RefusedError, match="has no signature"):
        list(rounds_of(file).commits())


def test_a_run_in_local_custody_says_so(file: Path, silotune: Call) -> None:
    code, out, err = silotune("run", file)
    assert (code, "nothing left to do" in out) == (0, True)
    assert "custody: local; every party's key is made and held on this machine" in err


def pasted(file: Path, silotune: Call) -> None:
    """Put what `keys show` prints into the file."""
    code, out, err = silotune("keys", "show", file)
    assert code == 0, err
    edit(file, **yaml.safe_load(out))


def test_parties_with_keys_of_their_own(make_federation: Any, silotune: Call) -> None:
    file = make_federation()
    for party in PARTIES:
        code, out, err = silotune("keys", "new", party, "--file", file)
        assert code == 0
        assert f"  {party}: ed25519:" in out
        assert f"{party}/keys/{party}.pem (mode 600" in err or f".silotune/keys/{party}.pem (mode 600" in err
    pasted(file, silotune)
    assert Federation.load(file).custody == "parties"
    simulation = Simulation(file)
    assert [r.round for r in simulation.run()] == [1, 2]
    assert [c.custody for c in simulation.rounds.commits()] == ["parties"] * 3
    code, out, err = silotune("verify", file, "--deep")
    assert (code, "custody" in err) == (0, False)


def test_a_local_federation_goes_over_to_its_parties(file: Path, silotune: Call) -> None:
    pasted(file, silotune)
    edit(file, rounds={"total": 3, "quorum": 2})
    assert [r.round for r in Simulation(file).run()] == [3]
    assert [c.custody for c in rounds_of(file).commits()] == ["local", "local", "local", "parties"]
    code, _, err = silotune("verify", file, "--deep")
    assert code == 0
    assert "up to round 2: custody: local" in err, "what was signed before is worth no more than it was"


def test_a_rotation_by_the_printed_lines(file: Path, silotune: Call) -> None:
    pasted(file, silotune)
    rotated: dict[str, Any] = {}
    before = {p: k[0].public for p, k in Federation.load(file).public_keys.items()}
    for party in PARTIES:
        code, out, _ = silotune("keys", "new", party, "--file", file, "--replace")
        assert code == 0
        lines = out.partition("rounds of each:\n")[2].replace("<last round>", "2").replace("<the round after>", "3")
        rotated |= yaml.safe_load(lines)
        assert rotated[party][0] == {"public": before[party], "until": 2}
    edit(file, security={"keys": rotated}, rounds={"total": 3, "quorum": 3})
    assert [r.round for r in Simulation(file).run()] == [3]
    code, _, err = silotune("verify", file, "--deep")
    assert code == 0, err
    shown = yaml.safe_load(silotune("keys", "show", file)[1])["security"]["keys"]
    assert shown == rotated


def test_a_silo_whose_key_is_not_in_the_file_is_told_how(file: Path, silotune: Call) -> None:
    pasted(file, silotune)
    silotune("keys", "new", "north", "--file", file, "--replace")
    (Federation.load(file).key_folder("north") / "north.1.pem").unlink()  # else it would go on with the one that the file names
    edit(file, rounds={"total": 3, "quorum": 3})
    simulation = Simulation(file)
    with pytest.raises((QuorumError, FederationError), match="north"):
        list(simulation.run())
    assert "is not among security.keys.north for round 3; add it there" in simulation.details["north"]


@pytest.mark.parametrize("party", ["North", "../north", "north/..", ""])
def test_a_party_must_have_a_name(party: str, silotune: Call, tmp_path: Path) -> None:
    code, _, err = silotune("keys", "new", party, "--folder", tmp_path)
    assert (code, "must be coordinator or a silo's id" in err) == (2, True)
    assert not list(tmp_path.iterdir())


def test_keys_are_made_in_a_folder_and_never_over_others(silotune: Call, tmp_path: Path) -> None:
    assert silotune("keys", "new", "north", "--folder", tmp_path)[0] == 0
    code, _, err = silotune("keys", "new", "north", "--folder", tmp_path)
    assert (code, "has a key already; rotate it with --replace" in err) == (4, True)


def test_without_keys_there_is_nothing_to_show(make_federation: Any, silotune: Call) -> None:
    code, _, err = silotune("keys", "show", make_federation())
    assert (code, "no party has a key yet; `silotune keys new` makes one" in err) == (2, True)


# Forging


class Open:
    """A federation with round 1 open."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.turn = self.begin()
        self.rounds = rounds_of(file)

    def begin(self) -> str:
        return initialize.work(str(self.file), *(preprocess.work(str(self.file), s) for s in SILOS))

    def train(self, *silos: str) -> list[str]:
        return [train.work(str(self.file), silo, self.turn) for silo in silos]

    def aggregate(self, *statuses: str) -> str:
        return aggregate.work(str(self.file), self.turn, *statuses)

    def forge(self, record: Record, *parts: str) -> str:
        """A record with the signature of north, in a place of round 1 that is not north's. Returns its key."""
        key = self.rounds.key("rounds", "00001", *parts)
        path = self.rounds.keyring.federation.key_folder("north") / "north.pem"  # type: ignore[union-attr]
        signature = base64.b64encode(keys.private_key(path).sign(record.message(key))).decode()
        assert self.rounds.store.create(key, record.model_copy(update={"signature": signature}).encode())
        return key


@pytest.fixture
def opened(make_federation: Any) -> Open:
    return Open(make_federation())


def committed(opened: Open, number: int = 1) -> set[str]:
    return set(rounds_of(opened.file).commit(number).contributions)


def test_a_manifest_that_another_silo_forged_costs_its_victim_one_attempt(opened: Open) -> None:
    statuses = opened.train("north")
    mine = opened.rounds.update(1, "north")
    assert mine
    opened.forge(mine.model_copy(update={"silo": "south"}), "updates", "south.json")
    with pytest.raises(RefusedError, match=r"updates/south\.json: must be signed by south"):
        opened.train("south")
    edit(opened.file, rounds={"total": 2, "quorum": 3})
    with pytest.raises(QuorumError, match=r"south\s+refused: its manifest is not the silo's"):
        opened.aggregate(*statuses, "south refused: bad signature", "east failed: disk full")
    opened.turn = opened.begin()
    assert Turn.parse(opened.turn).attempt == 2
    opened.aggregate(*opened.train("south", "east"))
    assert committed(opened) == set(SILOS)
    assert opened.rounds.store.size(opened.rounds.key("rounds", "00001", "updates", "south.2.json"))


def test_the_round_goes_on_with_the_honest_silos(opened: Open) -> None:
    opened.forge(_manifest(opened), "updates", "south.json")
    statuses = opened.train("north", "east")
    opened.aggregate(*statuses, "south refused: bad signature")
    commit = rounds_of(opened.file).commit(1)
    assert set(commit.contributions) == {"north", "east"}
    assert commit.missing == {"south": "refused: its manifest is not the silo's"}


def _manifest(opened: Open) -> UpdateManifest:
    return UpdateManifest(
        round=1, silo="south", agreement="a", plan="p", incoming="g", object="o" * 64, header="h" * 64, bytes=1, examples=1, tokens=1, steps=1, cursor=1,
        codec="float32", norm=1.0, loss=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("junk", [b"", b"{", b"[]", b'{"round":1}', b"\xff\xfe", b'{"format":1,' * 9999])
def test_garbage_in_a_silos_slot_makes_room_for_its_next_one(opened: Open, junk: bytes) -> None:
    opened.rounds.store.create(opened.rounds.key("rounds", "00001", "updates", "south.json"), junk)
    opened.aggregate(*opened.train("north", "east"), "south refused: against the protocol")
    assert committed(opened) == {"north", "east"}
    assert rounds_of(opened.file).refusal(1, "south")


def test_a_report_that_another_silo_forged_is_passed_over(opened: Open) -> None:
    key = opened.forge(Report(round=1, silo="south", attempt=1, status="failed", reason="a lie"), "reports", "1", "south.json")
    statuses = opened.train("north", "east")
    assert set(opened.rounds.reports(1, 1)) == {"north", "east"}
    assert "must be signed by south" in opened.rounds.refused[key]
    opened.aggregate(*statuses, "south failed: disk full")
    assert rounds_of(opened.file).commit(1).missing == {"south": "failed: disk full"}


@pytest.mark.parametrize("what", ["commit", "attempt", "plan"])
def test_a_coordinators_record_that_a_silo_forged_is_refused_and_can_be_removed(opened: Open, what: str) -> None:
    """Where a store lets a silo write there at all: `silotune policies` does not."""
    plan = opened.rounds.plan(1)
    assert plan
    if what == "commit":
        before = opened.rounds.commit(0)
        record: Record = before.model_copy(update={"round": 1, "outcome": "aggregated", "previous": before.digest, "plan": plan.digest})
        key = opened.forge(record, "commit.json")
    elif what == "attempt":
        key = opened.forge(Attempt(round=1, attempt=2, asked=["north"], at=1.0), "attempts", "2.json")
    else:
        key = opened.rounds.key("rounds", "00001", "plan.json")
        opened.rounds.store.delete(key)
        opened.forge(plan.model_copy(update={"learning_rate": 1e9}), "plan.json")
    with pytest.raises(RefusedError, match=f"{key}: must be signed by coordinator"):
        opened.aggregate(*opened.train(*SILOS))
    assert rounds_of(opened.file).store.size(rounds_of(opened.file).key("rounds", "00002", "plan.json")) is None
    opened.rounds.store.delete(key)
    opened.turn = opened.begin()
    opened.aggregate(*opened.train(*SILOS))
    assert committed(opened) == set(SILOS)


# gc


def test_gc_says_what_it_would_do_does_it_and_verify_tells(file: Path, silotune: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(file, storage={"retention": {"updates": 1}})
    updates = file.parent / ".silotune/store/tiny/contributions"
    monkeypatch.setenv("LOGNAME", "alice")
    code, out, _ = silotune("gc", file, "--dry-run")
    assert (code, out) == (0, "3 update files would be erased, 1 of east, 1 of north, 1 of south\n")
    assert len(list(updates.glob("*/*"))) == 6
    assert silotune("gc", file)[1] == "3 update files erased, 1 of east, 1 of north, 1 of south\n"
    assert {p.name for p in updates.glob("*/*")} == {c.object for c in rounds_of(file).commit(2).contributions.values()}
    assert silotune("gc", file)[1] == "0 update files erased\n"
    code, out, err = silotune("verify", file, "--deep")
    assert code == 0, err
    assert out.startswith("3 update files erased on 20")
    assert "by alice: storage.retention.updates is 1" in out
    place(file, 1).unlink()
    code, _, err = silotune("verify", file, "--repair")
    assert (code, "and so is the update of east" in err) == (4, True)


def test_gc_keeps_a_reason(file: Path, silotune: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container, whose user has no name."""

    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1000660000")

    monkeypatch.setattr("getpass.getuser", nobody)
    edit(file, storage={"retention": {"updates": 1}})
    assert silotune("gc", file, "--reason", "the contract ended")[0] == 0
    out = silotune("verify", file)[1]
    assert "by user " in out
    assert ": the contract ended" in out


def test_gc_without_a_term_erases_nothing(file: Path, silotune: Call) -> None:
    code, _, err = silotune("gc", file)
    assert (code, "storage.retention.updates: is not set, so that all is kept" in err) == (2, True)


def test_gc_refuses_a_silo_that_has_not_left(file: Path, silotune: Call) -> None:
    code, _, err = silotune("gc", file, "--silo", "north")
    assert (code, "is part of the federation" in err) == (2, True)


def test_gc_erases_a_silo_that_has_left(file: Path, silotune: Call) -> None:
    terms = yaml.safe_load(file.read_text())
    edit(file, silos=[s for s in terms["silos"] if s["id"] != "north"], rounds={"total": 3, "quorum": 2})
    assert [r.round for r in Simulation(file).run()] == [3]
    code, out, _ = silotune("gc", file, "--silo", "north")
    assert (code, out) == (0, "2 update files erased, 2 of north\n")
    assert not list((file.parent / ".silotune/store/tiny/contributions/north").iterdir())
    code, out, err = silotune("verify", file, "--deep")
    assert code == 0, err
    assert ": north has left" in out
    log = [json.loads(p.read_text()) for p in sorted((file.parent / ".silotune/store/tiny/audit").iterdir())]
    assert [e["kind"] for e in log][-1] == "erasure"
    assert list(log[-1]["erased"]) == ["north"]
