"""Updates are read from the store in ranges: what is found where, who is told, and that nothing is copied as long as all is well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from silotune.components.aggregate import lost_global
from silotune.components.aggregate import step as aggregate
from silotune.components.errors import QuorumError, RefusedError
from silotune.components.federation import Federation
from silotune.components.initialize import step as initialize
from silotune.components.preprocess import step as preprocess
from silotune.components.protocol import UpdateManifest
from silotune.components.rounds import Rounds
from silotune.components.store.directory_store import DirectoryStore
from silotune.components.store.object_store import ObjectMissing
from silotune.components.train import step as train

SILOS = ("east", "north", "south")
Read = Callable[[DirectoryStore, str, int, int], bytes]


class Delivered:
    """A round whose silos have all delivered, and which is still to be aggregated."""

    def __init__(self, make_federation: Any, **rounds: Any) -> None:
        self.file: Path = make_federation(rounds={"total": 1, "quorum": 3} | rounds)
        self.turn = initialize.work(str(self.file), *(preprocess.work(str(self.file), s) for s in SILOS))
        self.statuses = [train.work(str(self.file), s, self.turn) for s in SILOS]
        self.rounds = Rounds.of(Federation.load(self.file))
        self.manifests = self.rounds.updates(1)[0]

    def key(self, silo: str) -> str:
        return self.rounds.object_key(self.manifests[silo].object, silo)

    def path(self, silo: str) -> Path:
        return Path(self.rounds.store.url(self.key(silo)))

    def aggregate(self) -> Any:
        aggregate.work(str(self.file), self.turn, *self.statuses)
        return self.rounds.commit(1)


class Watched:
    """Every store's ranged reads, gone through by a function; copies are counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, read: Read | None = None) -> None:
        self.copied: list[str] = []
        self.ranges: list[tuple[str, int, int]] = []
        get_range, fetch_file = DirectoryStore.get_range, DirectoryStore.fetch_file

        def ranged(store: DirectoryStore, key: str, start: int, length: int) -> bytes:
            self.ranges.append((key, start, length))
            return read(store, key, start, length) if read else get_range(store, key, start, length)

        def copied(store: DirectoryStore, key: str, path: Path) -> None:
            self.copied.append(key)
            fetch_file(store, key, path)

        monkeypatch.setattr(DirectoryStore, "get_range", ranged)
        monkeypatch.setattr(DirectoryStore, "fetch_file", copied)


def test_no_update_is_copied(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    round_ = Delivered(make_federation)
    watched = Watched(monkeypatch)
    commit = round_.aggregate()
    assert sorted(commit.contributions) == list(SILOS)
    assert not [key for key in watched.copied if "/contributions/" in key]
    assert {key for key, _, _ in watched.ranges} == {round_.key(s) for s in SILOS}
    for silo in SILOS:
        asked = sum(length for key, _, length in watched.ranges if key == round_.key(silo))
        assert asked <= round_.manifests[silo].bytes + (1 << 16), "each byte once, and of the first read what is no header"
    assert sum(c.weight for c in commit.contributions.values()) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("where", ["header", "tensors"])
@pytest.mark.parametrize("kind", ["flip", "truncate"])
def test_damage_on_the_way_costs_a_copy_and_nothing_else(
    make_federation: Any, monkeypatch: pytest.MonkeyPatch, where: str, kind: str
) -> None:
    round_ = Delivered(make_federation)
    get_range = DirectoryStore.get_range

    def read(store: DirectoryStore, key: str, start: int, length: int) -> bytes:
        data = get_range(store, key, start, length)
        if key != round_.key("north") or (start < 200) != (where == "header"):
            return data
        return data[:40] if kind == "truncate" else data[:40] + bytes([data[40] ^ 4]) + data[41:]

    watched = Watched(monkeypatch, read)
    commit = round_.aggregate()
    assert sorted(commit.contributions) == list(SILOS)
    assert commit.missing == {}
    assert [key for key in watched.copied if "/contributions/" in key] == [round_.key("north")]


def damaged(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0, 300, -1])
def test_damage_in_the_store_is_deleted_and_sent_again(make_federation: Any, place: int) -> None:
    round_ = Delivered(make_federation)
    damaged(round_.path("north"), place)
    with pytest.raises(QuorumError, match=r"north +refused: object corrupt"):
        round_.aggregate()
    assert not round_.path("north").exists()
    refusal = round_.rounds.refusal(1, "north")
    assert refusal is not None
    assert refusal.resend
    assert train.work(str(round_.file), "north", round_.turn).startswith("north ok")
    assert round_.aggregate().contributions["north"].object == round_.manifests["north"].object


def test_an_update_that_goes_while_it_is_read_is_missing(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    round_ = Delivered(make_federation, quorum=2)
    get_range = DirectoryStore.get_range

    def read(store: DirectoryStore, key: str, start: int, length: int) -> bytes:
        if key == round_.key("north") and start > 0:
            round_.path("north").unlink(missing_ok=True)
        return get_range(store, key, start, length)

    Watched(monkeypatch, read)
    commit = round_.aggregate()
    assert sorted(commit.contributions) == ["east", "south"]
    assert commit.missing == {"north": "refused: object missing"}
    refusal = round_.rounds.refusal(1, "north")
    assert refusal is not None
    assert refusal.resend


def test_something_else_that_is_missing_is_no_silos_fault(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    round_ = Delivered(make_federation)
    get_range = DirectoryStore.get_range

    def read(store: DirectoryStore, key: str, start: int, length: int) -> bytes:
        if start > 0:
            raise ObjectMissing("elsewhere")
        return get_range(store, key, start, length)

    Watched(monkeypatch, read)
    with pytest.raises(ObjectMissing, match="elsewhere"):
        round_.aggregate()
    assert all(round_.rounds.refusal(1, s) is None for s in SILOS)


def test_a_manifest_that_names_another_header_is_the_silos_fault(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_update = Rounds.write_update

    def forged(rounds: Rounds, manifest: UpdateManifest) -> UpdateManifest:
        return write_update(rounds, manifest.model_copy(update={"header": "0" * 64} if manifest.silo == "north" else {}))

    monkeypatch.setattr(Rounds, "write_update", forged)
    round_ = Delivered(make_federation, quorum=2)
    commit = round_.aggregate()
    assert commit.missing == {"north": "refused: its header is not the one that its manifest names"}
    refusal = round_.rounds.refusal(1, "north")
    assert refusal is not None
    assert not refusal.resend


def test_a_lost_global_is_made_again_from_ranges(make_federation: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    round_ = Delivered(make_federation)
    commit = round_.aggregate()
    path = Path(round_.rounds.store.url(round_.rounds.object_key(commit.outgoing)))
    sound = path.read_bytes()
    path.unlink()
    (tmp_path / "work").mkdir()
    get_range, once = DirectoryStore.get_range, []

    def read(store: DirectoryStore, key: str, start: int, length: int) -> bytes:
        data = get_range(store, key, start, length)
        if key == round_.key("south") and start > 0 and not once:
            once.append(key)
            return data[:-1] + bytes([data[-1] ^ 1])
        return data

    watched = Watched(monkeypatch, read)
    lost_global.rebuild(round_.rounds, commit, tmp_path / "work" / "global")
    assert path.read_bytes() == sound == (tmp_path / "work" / "global").read_bytes()
    assert [key for key in watched.copied if "/contributions/" in key] == [round_.key("south")]
    path.unlink()
    damaged(round_.path("south"), -1)
    with pytest.raises(RefusedError, match=r"and so is the update of south: .*damaged in the store"):
        lost_global.rebuild(round_.rounds, commit, tmp_path / "work" / "global")
