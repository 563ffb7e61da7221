"""What only a real S3 server can get wrong: Ceph's gateway, started by the tool that lies beside the checkout. The behaviour suite of
`test_object_store` runs against it too, as the third of its stores."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from silotune.components.errors import UnreachableError
from silotune.components.store import s3_store
from silotune.components.store.object_store import open_store
from silotune.components.store.s3_store import PART, S3Store

pytestmark = pytest.mark.ceph


def test_it_is_fit_for_a_federation(ceph: S3Store) -> None:
    ceph.check()
    assert list(ceph.list("")) == []


def test_a_wrong_secret_is_refused(ceph: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ceph.create("a", b"1")
    location = ceph.url("a")[:-2]
    (tmp_path / "file").write_bytes(b"1")
    for name, wrong in (("AWS_SECRET_ACCESS_KEY", "another"), ("AWS_ACCESS_KEY_ID", "nobody")):
        with monkeypatch.context() as changed:
            changed.setenv(name, wrong)
            store = open_store(location)
            for use in (
                lambda store=store: store.get("a"),
                lambda store=store: store.size("a"),
                lambda store=store: store.size("missing"),
                lambda store=store: store.create("b", b""),
                lambda store=store: store.put_file("b", tmp_path / "file"),
                lambda store=store: store.list(""),
                lambda store=store: store.delete("a"),
            ):
                with pytest.raises(UnreachableError, match="refuses these credentials"):
                    use()
    assert list(ceph.list("")) == ["a"]


@pytest.mark.parametrize("size", [1000, PART + 1])
def test_bytes_that_are_not_those_of_their_md5_are_not_stored(
    ceph: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """As if they had been damaged on their way."""
    (tmp_path / "file").write_bytes(bytes(size))
    md5 = s3_store._md5
    monkeypatch.setattr(s3_store, "_md5", lambda data: md5(data[1:]))
    with pytest.raises(UnreachableError, match=r"cannot serve just now.*BadDigest, HTTP 400"):
        ceph.put_file("objects/1", tmp_path / "file")
    assert list(ceph.list("")) == []


def test_one_of_eight_racing_threads_wins_every_race(ceph: S3Store) -> None:
    start = threading.Barrier(8)

    def write(name: int) -> list[bool]:
        won = []
        for race in range(6):
            start.wait()
            won.append(ceph.create(f"race/{race}", b"%d" % name * 1000))
        return won

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    for race in range(6):
        winners = [name for name in range(8) if won[name][race]]
        assert len(winners) == 1
        assert ceph.get(f"race/{race}") == b"%d" % winners[0] * 1000


def test_one_of_four_racing_processes_wins_every_race(ceph: S3Store) -> None:
    racer = """
import sys
from silotune.components.store.object_store import open_store
store, name = open_store(sys.argv[1]), sys.argv[2]
store.size("warm")
print(flush=True)
sys.stdin.readline()
print("".join(str(int(store.create(f"race/{race}", name.encode()))) for race in range(10)))
"""
    command = [sys.executable, "-c", racer, ceph.url("a")[:-2]]
    racers = [subprocess.Popen([*command, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for n in range(4)]
    for one in racers:
        one.stdout.readline()
    for one in racers:
        one.stdin.write("\n")
        one.stdin.flush()
    won = [one.communicate(timeout=60)[0].strip() for one in racers]
    for race in range(10):
        winners = [name for name in range(4) if won[name][race] == "1"]
        assert len(winners) == 1
        assert ceph.get(f"race/{race}") == str(winners[0]).encode()


def test_forty_megabytes_in_parts_and_ranges(ceph: S3Store, tmp_path: Path) -> None:
    data = random.Random(40).randbytes(40 * 2**20 + 7)
    (tmp_path / "file").write_bytes(data)
    key = f"contributions/north/{hashlib.sha256(data).hexdigest()}"
    ceph.put_file(key, tmp_path / "file")
    assert ceph.size(key) == len(data)
    for start, length in ((0, 8), (PART - 3, 6), (2 * PART - 1, PART), (len(data) - 5, 100), (len(data), 1)):
        assert ceph.get_range(key, start, length) == data[start : start + length]
    ceph.fetch_file(key, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
