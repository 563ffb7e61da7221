"""The ledger: nothing in it can be altered, taken out or moved unnoticed, and a write that was killed is there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ledgers
import pytest

from silotune.components import keys
from silotune.components.errors import FederationError, RefusedError
from silotune.components.federation import Federation, canonical_json
from silotune.components.steward import ledger as module
from silotune.components.steward.entry import Charge, Entry
from silotune.components.steward.ledger import Ledger
from silotune.components.steward.policy import Policy
from silotune.components.store.object_store import ObjectStore

AT = 1_800_000_000.0


def filled(store: ObjectStore, folder: Path, count: int = 5, dataset: str = "notes") -> Ledger:
    book = ledgers.ledger(store, folder, dataset)
    book.entries()
    for number in range(1, count + 1):
        assert book.append(ledgers.charge(number), AT + number)
    return book


def replace(store: ObjectStore, key: str, data: bytes) -> None:
    store.delete(key)
    assert store.create(key, data)


def test_entries_come_back_in_order_each_naming_the_one_before(store: ObjectStore, tmp_path: Path) -> None:
    filled(store, tmp_path)
    found = ledgers.ledger(store, tmp_path).entries()
    assert [e.charge.round for e in found] == [1, 2, 3, 4, 5]
    assert [e.previous for e in found] == [None, *(e.digest for e in found[:-1])]
    assert [e.at for e in found] == [AT + n for n in range(1, 6)]
    assert list(store.list("ledger/")) == [f"ledger/notes/{n:06d}.json" for n in range(1, 6)]


def test_a_ledger_that_is_not_there_is_empty(store: ObjectStore, tmp_path: Path) -> None:
    assert ledgers.ledger(store, tmp_path).entries() == []
    assert ledgers.ledger(store, tmp_path).datasets() == []


def test_what_others_append_is_seen(folder: ObjectStore, tmp_path: Path) -> None:
    book = filled(folder, tmp_path, 2)
    other = ledgers.ledger(folder, tmp_path)
    other.entries()
    assert other.append(ledgers.charge(3), AT + 9)
    assert book.append(ledgers.charge(4), AT + 9) is None  # the place is taken
    assert [e.charge.round for e in book.entries()] == [1, 2, 3]
    assert book.append(ledgers.charge(4), AT + 9)


def test_time_never_goes_back(folder: ObjectStore, tmp_path: Path) -> None:
    book = filled(folder, tmp_path, 1)
    for at in (AT + 500, AT - 10**7, AT + 100, AT + 600):
        book.append(ledgers.charge(), at)
    assert [e.at - AT for e in ledgers.ledger(folder, tmp_path).entries()] == [1, 500, 500, 500, 600]


def forged(entry: Entry, **changes: Any) -> bytes:
    return entry.model_copy(update=changes).encode()


def cheaper(entry: Entry, dataset: str = "notes") -> dict[str, Any]:
    """The same training, said to have cost less, in all places where that stands."""
    less = entry.charge.model_copy(update={"mechanism": entry.charge.mechanism.model_copy(update={"noise_multiplier": 400.0})})  # type: ignore[union-attr]
    return {"charge": less, "identity": less.identity(dataset)}


def alter(store: ObjectStore, book: Ledger, number: int) -> None:
    replace(store, book.key(number), forged(book.entries()[number - 1], **cheaper(book.entries()[number - 1])))


def remove(store: ObjectStore, book: Ledger, number: int) -> None:
    store.delete(book.key(number))


def close_the_gap(store: ObjectStore, book: Ledger, number: int) -> None:
    """Take one out, and let the later ones move up."""
    entries = book.entries()
    for later in range(number, len(entries)):
        replace(store, book.key(later), forged(entries[later], number=later))
    store.delete(book.key(len(entries)))


def swap(store: ObjectStore, book: Ledger, number: int) -> None:
    first, second = store.get(book.key(number)), store.get(book.key(number + 1))
    replace(store, book.key(number), second)
    replace(store, book.key(number + 1), first)


def renumber(store: ObjectStore, book: Ledger, number: int) -> None:
    """As `swap`, with numbers that fit."""
    entries = book.entries()
    replace(store, book.key(number), forged(entries[number], number=number, previous=entries[number - 1].previous))
    replace(store, book.key(number + 1), forged(entries[number - 1], number=number + 1))


def cut_short(store: ObjectStore, book: Ledger, number: int) -> None:
    replace(store, book.key(number), store.get(book.key(number))[:-20])


def respell(store: ObjectStore, book: Ledger, number: int) -> None:
    replace(store, book.key(number), json.dumps(json.loads(store.get(book.key(number)))).encode())


def unsign(store: ObjectStore, book: Ledger, number: int) -> None:
    replace(store, book.key(number), forged(book.entries()[number - 1], signature=None))


def repeat(store: ObjectStore, book: Ledger, number: int) -> None:
    replace(store, book.key(number + 1), store.get(book.key(number)))


TAMPERINGS = [alter, remove, close_the_gap, swap, renumber, cut_short, respell, unsign, repeat]


@pytest.mark.parametrize("number", [1, 3, 4])
@pytest.mark.parametrize("tamper", TAMPERINGS)
def test_what_was_tampered_with_is_refused(folder: ObjectStore, tmp_path: Path, tamper: Callable[..., None], number: int) -> None:
    book = filled(folder, tmp_path)
    tamper(folder, book, number)
    with pytest.raises(RefusedError, match="ledger/notes/00000") as refused:
        ledgers.ledger(folder, tmp_path).entries()
    assert refused.value.reason == "ledger damaged"


@pytest.mark.parametrize("tamper", [alter, cut_short, unsign])
def test_the_last_entry_is_no_less_safe(folder: ObjectStore, tmp_path: Path, tamper: Callable[..., None]) -> None:
    tamper(folder, filled(folder, tmp_path), 5)
    with pytest.raises(RefusedError, match="000005"):
        ledgers.ledger(folder, tmp_path).entries()


def test_a_whole_chain_that_somebody_else_made_is_refused(folder: ObjectStore, tmp_path: Path) -> None:
    book = ledgers.ledger(folder, tmp_path, party="mallory")
    book.entries()
    book.append(ledgers.charge(), AT)
    with pytest.raises(RefusedError, match="signature of the silo's key"):
        ledgers.ledger(folder, tmp_path).entries()


def test_entries_of_another_data_set_are_refused(folder: ObjectStore, tmp_path: Path) -> None:
    filled(folder, tmp_path, 2, "images")
    for number in (1, 2):
        folder.create(f"ledger/notes/{number:06d}.json", folder.get(f"ledger/images/{number:06d}.json"))
    with pytest.raises(RefusedError, match="was not written here"):
        ledgers.ledger(folder, tmp_path).entries()


def test_entries_that_vanish_under_a_reader_are_missed(folder: ObjectStore, tmp_path: Path) -> None:
    book = filled(folder, tmp_path)
    folder.delete(book.key(5))
    with pytest.raises(RefusedError, match="is gone"):
        book.entries()


def test_other_files_beside_the_entries_are_nothing_to_it(folder: ObjectStore, tmp_path: Path) -> None:
    filled(folder, tmp_path, 2)
    folder.create("ledger/notes/README.txt", b"hands off")
    assert len(ledgers.ledger(folder, tmp_path).entries()) == 2


def test_a_rotated_key_vouches_for_what_the_old_one_signed(folder: ObjectStore, tmp_path: Path) -> None:
    filled(folder, tmp_path, 2)
    old = ledgers.key_of(tmp_path)
    keys.new(tmp_path / "keys", "north", replace=True)
    new = ledgers.key_of(tmp_path)
    with pytest.raises(RefusedError, match="former ones"):
        ledgers.ledger(folder, tmp_path, trusted=[new]).entries()
    book = ledgers.ledger(folder, tmp_path, trusted=[new, old])
    book.entries()
    assert book.append(ledgers.charge(3), AT + 9)
    assert len(ledgers.ledger(folder, tmp_path, trusted=[new]).entries()) == 3


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"agreement": "b" * 64, "delta": 1e-6}, True),  # the plan names the terms
        ({"plan": "p" * 64}, False),
        ({"silo": "south"}, False),
        ({"content": "d" * 64}, False),  # other noise, another update
        ({"noise": "another secret"}, False),
        ({"mechanism": None}, False),
    ],
)
def test_a_training_is_known_again_by_all_that_its_update_depends_on(change: dict[str, Any], same: bool) -> None:
    one, other = ledgers.charge(), ledgers.charge(**change)
    assert (one.identity("notes") == other.identity("notes")) is same
    assert one.identity("notes") != one.identity("images")


def test_a_round_that_the_federation_knows_of_must_stand_in_it(folder: ObjectStore, tmp_path: Path) -> None:
    book = filled(folder, tmp_path, 2)
    book.require_told(ledgers.charge(2).plan, "north")
    folder.delete(book.key(2))
    with pytest.raises(RefusedError, match="does not tell of a round"):
        ledgers.ledger(folder, tmp_path).require_told(ledgers.charge(2).plan, "north")
    ledgers.ledger(folder, tmp_path, "renamed").require_told(ledgers.charge(1).plan, "north")  # as it stands under the old name


def test_killed_at_any_moment_an_entry_is_there_whole_or_not_at_all(folder: ObjectStore, tmp_path: Path) -> None:
    filled(folder, tmp_path, 1)
    for kill_at in range(1, 200):

        def work(number: int = kill_at) -> None:
            book = ledgers.ledger(folder, tmp_path)
            book.entries()
            book.append(ledgers.charge(number), AT + number)

        before = len(ledgers.ledger(folder, tmp_path).entries())
        ended = ledgers.life(kill_at, work)
        after = ledgers.ledger(folder, tmp_path).entries()
        assert len(after) - before in (0, 1)
        if ended == 0:
            assert len(after) == before + 1
            assert kill_at > 6  # opened, filled, synced, linked, synced, cleared
            return
        assert ended == -9
    pytest.fail("no life was long enough to end by itself")


@pytest.mark.parametrize("signing", [True, False])
def test_of_a_federation_it_lies_in_the_silos_storage(make_federation: Any, signing: bool) -> None:
    federation = Federation.load(make_federation(security={"signing": signing}))
    keys.ensure(federation)
    book = Ledger.of(federation, "north", None)
    book.entries()
    entry = book.append(ledgers.charge(), AT)
    assert entry
    assert entry.signature
    path = Path(federation.silo("north").storage) / "ledger" / "north" / "000001.json"
    assert path.read_bytes() == entry.encode()
    assert canonical_json(json.loads(path.read_bytes())) == path.read_bytes()
    assert len(Ledger.of(federation, "north", None).entries()) == 1


def test_a_policy_says_its_name_and_place(make_federation: Any, tmp_path: Path) -> None:
    federation = Federation.load(make_federation())
    keys.ensure(federation)
    policy = Policy(dataset="discharge-letters", ledger={"at": str(tmp_path / "books")})
    book = Ledger.of(federation, "north", policy)
    book.entries()
    book.append(ledgers.charge(), AT)
    assert (tmp_path / "books" / "ledger" / "discharge-letters" / "000001.json").exists()


def test_without_a_key_there_is_no_ledger(make_federation: Any) -> None:
    federation = Federation.load(make_federation())
    with pytest.raises(FederationError, match="private key cannot be read"):
        Ledger.of(federation, "north", None)


def test_a_charge_holds_no_more_than_it_says() -> None:
    assert set(Charge.model_fields) == {
        "federation", "agreement", "plan", "round", "silo", "content", "mechanism", "unit", "delta", "noise",
    }  # fmt: skip


# Copies of ledgers that lie in a bucket


class Counting:
    """A store that counts what is fetched."""

    def __init__(self, store: Any) -> None:
        self.store, self.fetched = store, 0

    def get(self, key: str) -> bytes:
        self.fetched += 1
        return bytes(self.store.get(key))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def test_of_a_copy_only_new_entries_are_fetched(s3: ObjectStore, tmp_path: Path) -> None:
    filled(s3, tmp_path, 4)
    copies = tmp_path / "copies"
    for known, new in ((0, 4), (4, 0), (4, 1), (5, 0)):
        if known and new:
            book = ledgers.ledger(s3, tmp_path)  # on another machine
            book.entries()
            book.append(ledgers.charge(5), AT + 5)
        store = Counting(s3)
        found = ledgers.ledger(store, tmp_path, copies=copies).entries()  # type: ignore[arg-type]
        assert [e.charge.round for e in found] == list(range(1, known + new + 1))
        assert store.fetched == new + (1 if known else 0)  # and the last known one, to compare


def test_a_copy_that_is_not_whole_is_made_again(folder: ObjectStore, tmp_path: Path) -> None:
    filled(folder, tmp_path, 4)
    copies = tmp_path / "copies"
    before = ledgers.ledger(folder, tmp_path, copies=copies).entries()
    copy = copies / "notes.jsonl"
    whole = copy.read_bytes()
    for harmed in (whole[:-30], whole.replace(b'"round":2', b'"round":7'), b"", b"\xff\n", whole.split(b"\n", 1)[1]):
        copy.write_bytes(harmed)
        assert ledgers.ledger(folder, tmp_path, copies=copies).entries() == before
        assert copy.read_bytes() == whole


def test_a_store_that_contradicts_the_copy_has_a_second_history(folder: ObjectStore, tmp_path: Path) -> None:
    book = filled(folder, tmp_path, 3)
    copies = tmp_path / "copies"
    ledgers.ledger(folder, tmp_path, copies=copies).entries()
    folder.delete(book.key(3))
    with pytest.raises(RefusedError, match="was there before, and is gone"):
        ledgers.ledger(folder, tmp_path, copies=copies).entries()
    other = ledgers.ledger(folder, tmp_path)  # a machine without the copy takes what it finds, and goes on
    other.entries()
    other.append(ledgers.charge(9), AT + 9)
    with pytest.raises(RefusedError, match="is not what it was"):
        ledgers.ledger(folder, tmp_path, copies=copies).entries()


def test_a_bucket_that_the_policy_names_is_copied(make_federation: Any, s3: Any) -> None:
    federation = Federation.load(make_federation())
    keys.ensure(federation)
    policy = Policy(dataset="letters", ledger={"at": f"s3://silotune-tests/{s3._prefix.rstrip('/')}"})
    book = Ledger.of(federation, "north", policy)
    book.entries()
    book.append(ledgers.charge(), AT)
    assert len(Ledger.of(federation, "north", policy).entries()) == 1
    assert (Path(federation.silo("north").storage) / "ledger-copies" / "letters.jsonl").exists()


def test_a_folder_that_the_policy_names_is_copied_as_well_so_that_an_older_state_of_it_is_missed(
    make_federation: Any, tmp_path: Path
) -> None:
    federation = Federation.load(make_federation())
    keys.ensure(federation)
    policy = Policy(dataset="letters", ledger={"at": str(tmp_path / "books")})
    book = Ledger.of(federation, "north", policy)
    book.entries()
    book.append(ledgers.charge(1), AT)
    book.append(ledgers.charge(2), AT)
    (tmp_path / "books/ledger/letters/000002.json").unlink()  # as yesterday's backup has it
    with pytest.raises(RefusedError, match=r"000002\.json was there before, and is gone"):
        Ledger.of(federation, "north", policy).entries()


# Volumes


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """Entries in a volume."""
    monkeypatch.setattr(module, "VOLUME", 4)
    return 4


def test_of_a_long_ledger_volumes_are_read_and_what_is_behind_them(folder: ObjectStore, tmp_path: Path, small: int) -> None:
    filled(folder, tmp_path, 11)
    assert [k for k in folder.list("ledger/") if k.endswith("l")] == [
        "ledger/notes/000001-000004.jsonl",
        "ledger/notes/000005-000008.jsonl",
    ]
    store = Counting(folder)
    book = ledgers.ledger(store, tmp_path)  # type: ignore[arg-type]
    assert [e.charge.round for e in book.entries()] == list(range(1, 12))
    assert store.fetched == 2 + 3
    assert [e.charge.round for e in book.every_entry()] == list(range(1, 12))
    assert store.fetched == 2 + 3 + 1 + 11 + 2
    assert ledgers.ledger(folder, tmp_path).datasets() == ["notes"]


def test_the_same_in_s3(s3: ObjectStore, tmp_path: Path, small: int) -> None:
    filled(s3, tmp_path, 9)
    store = Counting(s3)
    assert len(ledgers.ledger(store, tmp_path).entries()) == 9  # type: ignore[arg-type]
    assert store.fetched == 3


def test_whoever_appends_puts_the_volumes_that_are_missing(folder: ObjectStore, tmp_path: Path, small: int) -> None:
    """Of a ledger of an older version, or whose writer was killed in between."""
    filled(folder, tmp_path, 9)
    volumes = {k: folder.get(k) for k in folder.list("ledger/") if k.endswith("l")}
    for key in volumes:
        folder.delete(key)
    book = ledgers.ledger(folder, tmp_path)
    assert len(book.entries()) == 9
    assert book.append(ledgers.charge(10), AT + 10)
    assert {k: folder.get(k) for k in folder.list("ledger/") if k.endswith("l")} == volumes


def lines_of(data: bytes) -> list[bytes]:
    return data.splitlines(keepends=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b'"round":2', b'"round":7'),
        lambda data: b"".join(lines_of(data)[:3]),
        lambda data: b"".join(lines_of(data)[i] for i in (0, 2, 1, 3)),
        lambda data: b"".join(lines_of(data)[i] for i in (0, 1, 2, 2)),
        lambda data: b"".join([*lines_of(data)[:3], lines_of(data)[3].replace(b'"round":4', b'"round":5')]),
    ],
    ids=["altered", "cut", "swapped", "repeated", "last altered"],
)
@pytest.mark.parametrize("behind", [0, 1])
def test_a_volume_that_was_tampered_with_is_refused(
    folder: ObjectStore, tmp_path: Path, small: int, change: Callable[[bytes], bytes], behind: int
) -> None:
    filled(folder, tmp_path, 4 + behind)
    replace(folder, "ledger/notes/000001-000004.jsonl", change(folder.get("ledger/notes/000001-000004.jsonl")))
    with pytest.raises(RefusedError) as refused:
        ledgers.ledger(folder, tmp_path).entries()
    assert refused.value.reason == "ledger damaged"


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("tamper", [alter, cut_short, respell, unsign])
def test_an_entry_that_nobody_needs_to_read_is_looked_at_all_the_same(
    folder: ObjectStore, tmp_path: Path, small: int, tamper: Callable[..., None], copied: bool
) -> None:
    book = filled(folder, tmp_path, 6)
    copies = tmp_path / "copies" if copied else None
    ledgers.ledger(folder, tmp_path, copies=copies).entries()
    tamper(folder, book, 2)
    other = ledgers.ledger(folder, tmp_path, copies=copies)
    assert [e.charge.round for e in other.entries()] == [1, 2, 3, 4, 5, 6]  # as they were written
    with pytest.raises(RefusedError, match=r"000002\.json was altered since it was written") as refused:
        other.every_entry()
    assert refused.value.reason == "ledger damaged"


def test_entries_that_a_volume_still_has_are_missed(folder: ObjectStore, tmp_path: Path, small: int) -> None:
    book = filled(folder, tmp_path, 5)
    folder.delete(book.key(5))
    folder.delete(book.key(4))
    other = ledgers.ledger(folder, tmp_path)
    assert [e.charge.round for e in other.entries()] == [1, 2, 3, 4]
    with pytest.raises(RefusedError, match=r"000004\.json was there before, and is gone"):
        other.every_entry()
    folder.delete("ledger/notes/000001-000004.jsonl")
    folder.create("ledger/notes/000005-000008.jsonl", b"later ones")
    with pytest.raises(RefusedError, match=r"000004\.json is missing, and a volume that holds it is there"):
        ledgers.ledger(folder, tmp_path).entries()


def test_a_volume_that_is_gone_is_no_loss(folder: ObjectStore, tmp_path: Path, small: int) -> None:
    filled(folder, tmp_path, 18)
    for gone in (1, 5, 9):
        folder.delete(f"ledger/notes/{gone:06d}-{gone + 3:06d}.jsonl")
        assert [e.charge.round for e in ledgers.ledger(folder, tmp_path).every_entry()] == list(range(1, 19))


def test_a_name_that_is_no_volumes_is_nothing_to_it(folder: ObjectStore, tmp_path: Path, small: int) -> None:
    filled(folder, tmp_path, 3)
    folder.create("ledger/notes/000002-000004.jsonl", b"nothing")
    folder.create("ledger/notes/000001-000003.jsonl", b"nothing")
    assert len(ledgers.ledger(folder, tmp_path).entries()) == 3
