"""Keys: how they are made and kept, and that a signature holds for one record of one party in one place and nowhere else."""

from __future__ import annotations

import base64
import multiprocessing
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ed448, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from silotune.components import keys
from silotune.components.errors import FederationError, RefusedError
from silotune.components.federation import Federation, canonical_json
from silotune.components.protocol import (
    Attempt,
    Commit,
    Evaluation,
    Exported,
    Exposed,
    Partial,
    Participant,
    Plan,
    Record,
    Refusal,
    Release,
    Report,
    TrackingRun,
    UpdateManifest,
)
from silotune.components.provenance import audit
from silotune.components.rounds import Rounds
from silotune.components.secure_sum.records import Confirmation, MaskedVector, MaskKeys, Opening, Roster, SealedShares, Survivors
from silotune.components.steward import ledger
from silotune.components.store.directory_store import DirectoryStore
from silotune.components.terms.security import PublicKey

ORDER = 2**252 + 27742317777372353535851937790883648493  # of Ed25519's base point


def load(folder: Path, name: str = "fed", **security: Any) -> Federation:
    terms = {
        "name": name,
        "model": {"base": "./base"},
        "silos": [{"id": s, "train": f"./{s}.jsonl"} for s in ("north", "south")],
        "security": security,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "f.yaml").write_text(yaml.safe_dump(terms))
    return Federation.load(folder / "f.yaml")


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """In local custody, with all its keys."""
    found = load(tmp_path)
    keys.ensure(found)
    return found


def pem(key: Any, encryption: Any = None) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())


# Making and keeping


def test_a_private_key_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    public = keys.new(tmp_path / "keys", "north")
    assert stat.S_IMODE((tmp_path / "keys/north.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    assert (tmp_path / "keys/north.pub").read_text().strip() == public == keys.text_of(keys.private_key(tmp_path / "keys/north.pem"))
    PublicKey(public=public)


def test_a_scratch_file_that_others_may_read_never_becomes_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getpid", lambda: 7)
    (tmp_path / ".north.pem.7").write_text("")
    (tmp_path / ".north.pem.7").chmod(0o666)
    keys.new(tmp_path, "north")
    assert stat.S_IMODE((tmp_path / "north.pem").stat().st_mode) == 0o600


def test_a_key_is_never_written_over(tmp_path: Path) -> None:
    keys.new(tmp_path, "north")
    before = (tmp_path / "north.pem").read_bytes()
    with pytest.raises(RefusedError, match=r"north\.pem: north has a key already; rotate it with --replace"):
        keys.new(tmp_path, "north")
    assert (tmp_path / "north.pem").read_bytes() == before


def test_a_rotation_keeps_every_key_that_was(tmp_path: Path) -> None:
    made = [keys.new(tmp_path, "north", replace=True) for _ in range(3)]
    kept = [keys.text_of(keys.private_key(tmp_path / name)) for name in ("north.1.pem", "north.2.pem", "north.pem")]
    assert kept == made
    assert len(set(made)) == 3
    assert (tmp_path / "north.pub").read_text().strip() == made[-1]
    assert stat.S_IMODE((tmp_path / "north.1.pem").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (lambda: pem(rsa.generate_private_key(65537, 2048)), "must be an Ed25519 key, is .*RSAPrivateKey"),
        (lambda: pem(ed448.Ed448PrivateKey.generate()), "must be an Ed25519 key, is .*Ed448PrivateKey"),
        (lambda: pem(Ed25519PrivateKey.generate(), BestAvailableEncryption(b"pw")), "is no unencrypted PEM private key"),
        (lambda: b"\x00garbage", "is no unencrypted PEM private key"),
        (lambda: b"", "is no unencrypted PEM private key"),
        (lambda: pem(Ed25519PrivateKey.generate())[:-40], "is no unencrypted PEM private key"),
    ],
    ids=["rsa", "ed448", "encrypted", "garbage", "empty", "cut-short"],
)
def test_a_file_that_holds_no_ed25519_key_is_named_with_the_cure(federation: Federation, content: Callable[[], bytes], rule: str) -> None:
    path = federation.key_folder("north") / "north.pem"
    path.write_bytes(content())
    with pytest.raises(FederationError, match=rf"north/keys/north\.pem: {rule}; make one with `silotune keys new`"):
        keys.Keyring(federation).sign("north", 1, b"m")


def test_a_missing_key_is_named_with_the_cure(federation: Federation) -> None:
    (federation.key_folder("north") / "north.pem").unlink()
    with pytest.raises(FederationError, match=r"north\.pem: the private key cannot be read: No such file.*keys new`, or set SILOTUNE_KEYS"):
        keys.Keyring(federation).sign("north", 1, b"m")


def test_a_replaced_file_is_read_anew(federation: Federation) -> None:
    ring = keys.Keyring(federation)
    before = ring.sign("north", 1, b"m")
    keys.new(federation.key_folder("north"), "north", replace=True)
    assert ring.sign("north", 1, b"m") != before


def test_keys_are_taken_from_a_mounted_folder(federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted = tmp_path / "secret"
    named = {p: keys.new(mounted, p) for p in ("coordinator", "north", "south")}
    listed = load(tmp_path, keys=named)
    with pytest.raises(FederationError, match=r"is not among security\.keys.north for round 1"):
        keys.Keyring(listed).sign("north", 1, b"m")  # the one in the silo's storage
    monkeypatch.setenv(keys.FOLDER_VARIABLE, str(mounted))
    ring = keys.Keyring(listed)
    assert ring.trusts("north", 1, b"m", ring.sign("north", 1, b"m"))


def _ensure(file: str, gate: Any) -> None:
    federation = Federation.load(file)
    gate.wait()
    keys.ensure(federation)


def test_processes_that_begin_together_agree_on_one_key(tmp_path: Path) -> None:
    federation = load(tmp_path)
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(4)
    processes = [context.Process(target=_ensure, args=(str(federation.file), gate)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [p.exitcode for p in processes] == [0] * 4
    for party in ("coordinator", "north", "south"):
        folder = federation.key_folder(party)
        assert sorted(p.name for p in folder.iterdir()) == [".lock", f"{party}.pem", f"{party}.pub"]
        assert keys.text_of(keys.private_key(folder / f"{party}.pem")) == (folder / f"{party}.pub").read_text().strip()


def test_making_keys_waits_for_whoever_makes_them_there(tmp_path: Path) -> None:
    """Else two would see no key, and the second one would write over the first one's."""
    federation = load(tmp_path)
    folder = federation.key_folder("north")
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(2)
    process = context.Process(target=_ensure, args=(str(federation.file), gate))
    process.start()
    with keys._alone(folder):
        gate.wait()
        process.join(0.5)
        assert process.is_alive()
        mine = keys._make(folder, "north")
    process.join(30)
    assert process.exitcode == 0
    assert federation.public_keys["north"][0].public == mine


def test_a_lost_public_half_is_written_again(federation: Federation) -> None:
    before = federation.public_keys
    (federation.key_folder("north") / "north.pub").unlink()
    keys.ensure(federation)
    assert federation.public_keys == before


def test_keys_are_made_in_local_custody_only(tmp_path: Path) -> None:
    keys.ensure(load(tmp_path, signing=False))
    keys.ensure(load(tmp_path, keys={p: keys.new(tmp_path / "k", p) for p in ("coordinator", "north", "south")}))
    assert not (tmp_path / ".silotune").exists()
    assert not (tmp_path / ".silotune-private").exists()


def test_a_silo_whose_storage_cannot_be_written_stays_without(tmp_path: Path) -> None:
    federation = load(tmp_path)
    (tmp_path / ".silotune-private").mkdir()
    (tmp_path / ".silotune-private/north").write_text("in the way")
    keys.ensure(federation)
    assert set(federation.public_keys) == {"coordinator", "south"}


def test_a_signature_costs_the_key_of_one_party_however_many_there_are(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    plain = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *a, **k: (read.append(path.name), plain(path, *a, **k))[1])
    keyring = keys.Keyring(federation)
    signed = keyring.sign("north", 1, b"message")
    assert keyring.trusts("north", 1, b"message", signed)
    assert not keyring.trusts("south", 1, b"message", signed)
    assert read == ["north.pub", "north.pub", "south.pub"]


def test_who_is_no_party_has_no_key(federation: Federation, tmp_path: Path) -> None:
    (tmp_path / "east.pub").write_text(federation.public_keys["north"][0].public)
    for party in ("east", "../east", str(tmp_path / "east")):
        assert federation.public_keys_of(party) == []


# Rounds


def test_rotated_keys_sign_and_verify_each_for_its_own_rounds(tmp_path: Path) -> None:
    folder = load(tmp_path).key_folder("north")
    old = keys.new(folder, "north")
    others = {p: keys.new(tmp_path / "others", p) for p in ("coordinator", "south")}
    before = keys.Keyring(load(tmp_path, keys={**others, "north": old}))
    signed = {n: before.sign("north", n, b"m") for n in (3, 4)}
    new = keys.new(folder, "north", replace=True)
    ring = keys.Keyring(load(tmp_path, keys={**others, "north": [{"public": old, "until": 3}, {"public": new, "since": 4}]}))
    assert ring.trusts("north", 3, b"m", signed[3])
    assert not ring.trusts("north", 4, b"m", signed[4]), "a key that was rotated out"
    now = ring.sign("north", 4, b"m")
    assert ring.trusts("north", 4, b"m", now)
    assert not ring.trusts("north", 3, b"m", now), "a key before its time"
    assert ring.sign("north", 3, b"m") == signed[3], "the key that was put aside goes on signing for the rounds that are its own"


def test_a_key_that_the_file_does_not_name_is_refused_at_signing_with_its_cure(tmp_path: Path) -> None:
    named = {p: keys.new(tmp_path / "given", p) for p in ("coordinator", "north", "south")}
    federation = load(tmp_path, keys=named)
    mine = keys.new(federation.key_folder("north"), "north")
    with pytest.raises(FederationError, match=r"is not among security\.keys.north for round 2; add it there") as refused:
        keys.Keyring(federation).sign("north", 2, b"m")
    assert mine in str(refused.value), "what is to be added"
    assert refused.value.reason == "signing key not registered"
    late = load(tmp_path, keys={**named, "north": [{"public": mine, "since": 5}]})
    with pytest.raises(FederationError, match=r"not among security\.keys.north for round 4"):
        keys.Keyring(late).sign("north", 4, b"m")
    assert keys.Keyring(late).sign("north", 5, b"m")


# What a signature is over

MANIFEST: dict[str, Any] = {
    "agreement": "a", "plan": "p", "incoming": "g", "object": "o", "header": "h", "bytes": 1, "examples": 1, "tokens": 1, "steps": 1, "cursor": 1,
    "codec": "float32", "norm": 1.0, "loss": 1.0,
}  # fmt: skip
SCORE: dict[str, Any] = {
    "outgoing": "g", "split": "valid", "split_digest": "d" * 64, "examples": 1, "tokens": 1, "loss_sum": 1.0, "correct": 0, "at": 1.0
}  # fmt: skip
COMMIT: dict[str, Any] = {
    "outcome": "initialized", "custody": "local", "agreement": "a", "plan": None, "attempt": 0, "contributions": {}, "missing": {},
    "previous": None, "incoming": None, "outgoing": "g", "best": 0, "started": 1.0, "at": 1.0,
}  # fmt: skip
PART: dict[str, Any] = {"round": 1, "silo": "north", "attempt": 1, "plan": "p"}
# A record of every kind, where it lies, and a place of another round, silo or number.
RECORDS: list[tuple[Record, str, str]] = [
    (
        Plan(round=1, agreement="a", base="b", tensors="t", incoming="g", accepted=[(1, "g")], participants={"north": Participant(tensors="t", cursor=0)},
             learning_rate=0.1, code="1"),
        "fed/rounds/00001/plan.json", "fed/rounds/00002/plan.json",
    ),
    (Attempt(round=1, attempt=1, asked=["north"], at=1.0), "fed/rounds/00001/attempts/1.json", "fed/rounds/00001/attempts/2.json"),
    (Report(round=1, silo="north", attempt=1, status="ok"), "fed/rounds/00001/reports/1/north.json", "fed/rounds/00001/reports/1/south.json"),
    (UpdateManifest(round=1, silo="north", **MANIFEST), "fed/rounds/00001/updates/north.json", "fed/rounds/00001/updates/south.json"),
    (
        Refusal(round=1, silo="north", manifest="m", rule="r", resend=False, at=1.0),
        "fed/rounds/00001/refusals/north.json", "fed/rounds/00001/refusals/south.json",
    ),
    (Partial(round=1, attempt=1, group=1, object="o", silos={}, at=1.0), "fed/rounds/00001/partials/1/1.json", "fed/rounds/00001/partials/1/2.json"),
    (
        Release(round=1, number=1, plan="p", silos={}, mechanism="gaussian", tree="", leaf=0, noise_multiplier=1.0, mu_squared=1.0, epsilon=1.0,
                delta=1e-5, at=1.0),
        "fed/releases/00001.json", "fed/releases/00002.json",
    ),
    (Commit(round=1, **COMMIT), "fed/rounds/00001/commit.json", "fed/rounds/00002/commit.json"),
    (Evaluation(round=1, silo="north", **SCORE), "fed/evaluations/g/north/valid-dd.json", "fed/evaluations/h/north/valid-dd.json"),
    (
        Exposed(round=1, silo="north", outgoing="g", planted="p", canaries=1, references=1, exposure=1.0, at=1.0),
        "fed/evaluations/g/north/exposure-p.json", "fed/evaluations/h/north/exposure-p.json",
    ),
    (Exported(commit="c", round=1, outgoing="g", location="/x", files={}), "fed/exports/c.json", "fed/exports/d.json"),
    (TrackingRun(experiment="1", run="2"), "fed/tracking.json", "fed/tracking2.json"),
    (audit.Entry(number=1, previous=None, kind="commit", round=0, at=1.0), "fed/audit/000001.json", "fed/audit/000002.json"),
    (MaskKeys(**PART, sealing="5" * 64, masking="6" * 64), "fed/rounds/00001/secagg/1/keys/north.json", "fed/rounds/00001/secagg/2/keys/north.json"),
    (SealedShares(**PART, roster="r", seed="5" * 64, shares={}), "fed/rounds/00001/secagg/1/shares/north.json", "fed/rounds/00001/secagg/1/shares/south.json"),
    (MaskedVector(**PART, roster="r", object="o", bytes=1, cursor=1), "fed/rounds/00001/secagg/1/masked/north.json", "fed/rounds/00001/secagg/2/masked/north.json"),
    (Confirmation(**PART, survivors="s"), "fed/rounds/00001/secagg/1/confirmations/north.json", "fed/rounds/00001/secagg/2/confirmations/north.json"),
    (Opening(**PART, survivors="s", seeds={}, keys={}), "fed/rounds/00001/secagg/1/openings/north.json", "fed/rounds/00001/secagg/2/openings/north.json"),
    (
        Roster(round=1, attempt=1, stage="share", plan="p", members={}, at=1.0),
        "fed/rounds/00001/secagg/1/rosters/share.json", "fed/rounds/00001/secagg/1/rosters/mask.json",
    ),
    (
        Survivors(round=1, attempt=1, plan="p", roster="r", members={}, missing={}, at=1.0),
        "fed/rounds/00001/secagg/survivors.json", "fed/rounds/00002/secagg/survivors.json",
    ),
]  # fmt: skip
kinds = pytest.mark.parametrize(("record", "place", "elsewhere"), RECORDS, ids=[type(r).__name__ for r, _, _ in RECORDS])


def test_the_kinds_below_are_all_there_are() -> None:
    def leaves(kind: type[Record]) -> set[type[Record]]:
        below = kind.__subclasses__()
        return set().union(*map(leaves, below)) if below else {kind}

    in_no_store = {ledger.Entry}  # a silo's own, which `test_ledger` tries
    assert leaves(Record) - in_no_store == {type(record) for record, _, _ in RECORDS}


@pytest.fixture
def rounds(federation: Federation) -> Rounds:
    return Rounds.of(federation)


def fresh(rounds: Rounds) -> Rounds:
    """As another process reads it."""
    return Rounds(rounds.store, rounds.federation, rounds.keyring)


def refused(rounds: Rounds, kind: type[Record], place: str, data: bytes, why: str) -> None:
    rounds.store.delete(place)
    rounds.store.create(place, data)
    with pytest.raises(RefusedError, match=why) as told:
        fresh(rounds).read(kind, place)
    assert place in str(told.value)


@kinds
def test_a_signed_record_is_believed_in_its_place(rounds: Rounds, record: Record, place: str, elsewhere: str) -> None:
    signed = rounds.create(record, place)
    assert fresh(rounds).read(type(record), place) == signed
    assert signed.signature


@kinds
def test_a_copy_in_another_place_is_refused(rounds: Rounds, record: Record, place: str, elsewhere: str) -> None:
    data = rounds.create(record, place).encode()
    refused(rounds, type(record), elsewhere, data, "no key of security.keys|must be of the silo that it is filed under")


@kinds
def test_a_copy_in_another_federation_of_the_same_parties_is_refused(
    rounds: Rounds, record: Record, place: str, elsewhere: str, tmp_path: Path
) -> None:
    data = rounds.create(record, place).encode()
    keyring = keys.Keyring(load(tmp_path, "other"))
    other = Rounds(rounds.store, "other", keyring)
    assert keyring.federation.public_keys == rounds.keyring.federation.public_keys  # type: ignore[union-attr]
    refused(other, type(record), place.replace("fed/", "other/"), data, "no key of security.keys")


@kinds
def test_a_signature_for_another_kind_is_refused(rounds: Rounds, record: Record, place: str, elsewhere: str) -> None:
    kind = Report if not isinstance(record, Report) else UpdateManifest
    message = record.message(place)
    assert message.startswith(f"silotune {type(record).__name__} 1\n{place}\n".encode())
    party, number = record.signer
    other = message.replace(type(record).__name__.encode(), kind.__name__.encode(), 1)
    forged = record.model_copy(update={"signature": rounds.keyring.sign(party, number, other)})  # type: ignore[union-attr]
    refused(rounds, type(record), place, forged.encode(), "no key of security.keys")


@kinds
def test_an_unsigned_record_is_refused(rounds: Rounds, record: Record, place: str, elsewhere: str) -> None:
    refused(rounds, type(record), place, record.encode(), "has no signature; whoever wrote it is not a party")
    unsigned = Rounds(rounds.store, "fed")  # a federation with signing off writes and reads it
    assert unsigned.read(type(record), place) == record


@kinds
def test_the_signature_of_another_party_is_refused(rounds: Rounds, record: Record, place: str, elsewhere: str) -> None:
    signature = rounds.keyring.sign("south", 1, record.message(place))  # type: ignore[union-attr]
    refused(rounds, type(record), place, record.model_copy(update={"signature": signature}).encode(), "no key of security.keys")


@kinds
def test_every_field_is_signed(rounds: Rounds, record: Record, place: str, elsewhere: str) -> None:
    signed = rounds.create(record, place)
    changed = 0
    for name, value in signed.model_dump().items():
        if name in ("format", "signature", "silo"):
            continue
        for other in (7, 7.5, "x", "test", "failed", "export", "skipped", "none", True, ["x"], {"x": "y"}, {"x": 1.0}, None):
            if other == value:
                continue
            try:
                altered = type(signed).decode(canonical_json(signed.model_dump() | {name: other}), place)
            except RefusedError:
                continue
            refused(rounds, type(record), place, altered.encode(), "no key of security.keys")
            changed += 1
            break
    assert changed >= len(type(record).model_fields) - 5


def test_one_signature_has_one_text(rounds: Rounds) -> None:
    record, place, _ = RECORDS[2]
    signed = rounds.create(record, place)
    text = signed.signature or ""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    last = alphabet[alphabet.index(text[-3]) ^ 1]  # 64 bytes leave four bits of the last character unused
    raw = base64.b64decode(text)
    beyond = raw[:32] + (int.from_bytes(raw[32:], "little") + ORDER).to_bytes(32, "little")
    others = [
        text[:-3] + last + "==", text + "\n", " " + text, text[:-1], text.rstrip("="), text + "=", text[:40] + "\n" + text[40:],
        text.replace("+", "-").replace("/", "_") if set("+/") & set(text) else text + "-", base64.b64encode(beyond).decode(),
        base64.b64encode(raw + b"\0").decode(), base64.b64encode(raw[:63]).decode(), "", "ä",
    ]  # fmt: skip
    assert base64.b64decode(others[0]) == raw
    for other in others:
        assert other != text
        refused(rounds, Report, place, signed.model_copy(update={"signature": other}).encode(), "no key of security.keys")


def test_a_silo_that_left_or_rotated_is_believed_by_the_terms_of_the_time(federation: Federation, rounds: Rounds) -> None:
    terms = rounds.put_agreement(federation.agreement("b", "t"))
    rounds.write_commit(Commit(round=0, **COMMIT | {"agreement": terms}))
    rounds.open_round(RECORDS[0][0].model_copy(update={"agreement": terms}))  # type: ignore[arg-type]
    record, place, _ = RECORDS[3]
    signed = rounds.create(record, place)
    keys.new(federation.key_folder("north"), "north", replace=True)
    assert fresh(rounds).read(UpdateManifest, place) == signed
    rounds.store.delete("fed/rounds/00001/plan.json")
    rounds.store.delete("fed/rounds/00000/commit.json")
    with pytest.raises(RefusedError, match=r"no key of security\.keys\.north"):
        fresh(rounds).read(UpdateManifest, place)


# What rounds.py lets through


def put(store: DirectoryStore, place: str, record: Record) -> None:
    store.delete(place)
    store.create(place, record.encode())


def test_a_key_that_was_taken_out_of_the_file_signs_no_later_round(federation: Federation, rounds: Rounds) -> None:
    terms = rounds.put_agreement(federation.agreement("b", "t"))
    rounds.write_commit(Commit(round=0, **COMMIT | {"agreement": terms}))
    leaked = keys.private_key(federation.key_folder("north") / "north.pem")
    keys.new(federation.key_folder("north"), "north", replace=True)
    amended = rounds.put_agreement(federation.agreement("b", "t"))
    rounds.write_commit(Commit(round=1, **COMMIT | {"agreement": amended}))
    rounds.open_round(RECORDS[0][0].model_copy(update={"agreement": amended, "round": 2}))  # type: ignore[arg-type]
    place = "fed/rounds/00002/updates/north.json"
    forged = UpdateManifest(round=2, silo="north", **MANIFEST)
    signature = base64.b64encode(leaked.sign(forged.message(place))).decode()
    refused(rounds, UpdateManifest, place, forged.model_copy(update={"signature": signature}).encode(), "no key of security.keys.north")


def test_a_coordinators_key_that_was_rotated_out_cannot_commit_by_naming_an_earlier_round(tmp_path: Path) -> None:
    old = keys.new(tmp_path / "old", "coordinator")
    new = keys.new(tmp_path / "new", "coordinator")
    others = {p: keys.new(tmp_path / "others", p) for p in ("north", "south")}
    rotated = [{"public": old, "until": 3}, {"public": new, "since": 4}]
    rounds = Rounds.of(load(tmp_path, keys={**others, "coordinator": rotated}))
    place = "fed/rounds/00007/commit.json"
    forged = Commit(round=2, **COMMIT)
    signature = keys.private_key(tmp_path / "old/coordinator.pem").sign(forged.message(place))
    refused(
        rounds, Commit, place, forged.model_copy(update={"signature": base64.b64encode(signature).decode()}).encode(), "must be of|round"
    )


@pytest.mark.parametrize(
    ("record", "place"),
    [
        (UpdateManifest(round=1, silo="north", **MANIFEST), "fed/rounds/00001/updates/south.json"),
        (Report(round=1, silo="north", attempt=1, status="ok"), "fed/rounds/00001/reports/1/south.json"),
        (Evaluation(round=1, silo="north", **SCORE), "fed/evaluations/g/south/valid-dddddddddddddddd.json"),
    ],
    ids=["manifest", "report", "evaluation"],
)
def test_a_silo_cannot_put_a_record_of_its_own_into_anothers_place(rounds: Rounds, record: Record, place: str) -> None:
    signature = rounds.keyring.sign("north", 1, record.message(place))  # type: ignore[union-attr]
    refused(rounds, type(record), place, record.model_copy(update={"signature": signature}).encode(), "must be of|round")
