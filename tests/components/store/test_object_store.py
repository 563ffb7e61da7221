"""One behaviour suite for both kinds of store; S3 is a real server (moto; Ceph too, see conftest), or a scripted one that misbehaves."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from silotune.components.errors import FederationError, SilotuneError, UnreachableError
from silotune.components.store import s3_store
from silotune.components.store.directory_store import DirectoryStore
from silotune.components.store.object_store import ObjectMissing, ObjectStore, open_store
from silotune.components.store.s3_store import PART, S3Store

BUCKET = "silotune-tests"
SECRET = "wJalrXUtnFEMI-do-not-print"


# --- what both stores do ---


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 100], ids=["empty", "one", "many"])
def test_what_was_created_comes_back(store: ObjectStore, data: bytes) -> None:
    assert store.create("fed/rounds/00001/plan.json", data) is True
    assert store.get("fed/rounds/00001/plan.json") == data
    assert store.size("fed/rounds/00001/plan.json") == len(data)


def test_the_first_writer_wins(store: ObjectStore) -> None:
    assert store.create("commit.json", b"first")
    assert store.create("commit.json", b"second") is False
    assert store.create("commit.json", b"first") is False, "also with the same bytes: the caller compares"
    assert store.get("commit.json") == b"first"


def test_one_of_eight_racing_threads_wins(store: ObjectStore) -> None:
    for race in range(2):
        start = threading.Barrier(8)

        def write(name: int, key: str = f"race/{race}", start: threading.Barrier = start) -> bool:
            start.wait()
            return store.create(key, b"%d" % name * 1000)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(write, range(8)))
        assert won.count(True) == 1
        assert store.get(f"race/{race}") == b"%d" % won.index(True) * 1000


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, 2 * PART + 1234])
def test_files_travel_whole(store: ObjectStore, tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    (tmp_path / "source").write_bytes(data)
    key = f"objects/{hashlib.sha256(data).hexdigest()}"
    store.put_file(key, tmp_path / "source")
    store.fetch_file(key, tmp_path / "new" / "folder" / "copy")
    assert (tmp_path / "new" / "folder" / "copy").read_bytes() == data
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["copy"]
    assert store.size(key) == size
    assert list(store.list("")) == [key]


def test_a_stored_file_is_not_sent_again(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abcd")
    store.put_file("objects/1", tmp_path / "file")
    (tmp_path / "file").write_bytes(b"ABCD")  # cannot happen under a digest: shows that nothing is written
    store.put_file("objects/1", tmp_path / "file")
    assert store.get("objects/1") == b"abcd"
    (tmp_path / "file").write_bytes(b"longer")
    store.put_file("objects/1", tmp_path / "file")
    assert store.get("objects/1") == b"longer"


def test_fetch_replaces_the_local_file(store: ObjectStore, tmp_path: Path) -> None:
    store.create("a", b"new")
    (tmp_path / "local").write_bytes(b"old and longer")
    store.fetch_file("a", tmp_path / "local")
    assert (tmp_path / "local").read_bytes() == b"new"


@pytest.mark.parametrize("data", [b"", b"01234"], ids=["empty", "five"])
def test_a_range_is_a_slice(store: ObjectStore, data: bytes) -> None:
    store.create("object", data)
    for start in (0, 1, 4, 5, 6, 100):
        for length in (0, 1, 4, 5, 6, 10**12):
            assert store.get_range("object", start, length) == data[start : start + length], (start, length)


def test_negative_ranges_are_refused(store: ObjectStore) -> None:
    store.create("object", b"01234")
    for start, length in ((-1, 1), (0, -1)):
        with pytest.raises(ValueError, match="must not be negative"):
            store.get_range("object", start, length)


def test_missing_objects(store: ObjectStore, tmp_path: Path) -> None:
    store.create("there/file", b"")
    for key in ("missing", "there", "there/file/below", "there/fil"):
        assert store.size(key) is None
        for read in (
            lambda key=key: store.get(key),
            lambda key=key: store.get_range(key, 0, 1),
            lambda key=key: store.get_range(key, 0, 0),
            lambda key=key: store.fetch_file(key, tmp_path / "local"),
        ):
            with pytest.raises(ObjectMissing, match=f"'{key}'") as raised:
                read()
            assert raised.value.key == key
            assert not isinstance(raised.value, KeyError)
    assert not any(tmp_path.glob("*local*"))
    assert not any(tmp_path.glob(".*.part"))


def test_list_knows_prefixes_and_order(store: ObjectStore) -> None:
    keys = ["a", "a-b", "a.b", "ab/c", "b/1", "b/10", "b/2", "b/c/d", "b=+,_", ".hidden/x", "Z"]
    for key in random.Random(0).sample(keys, len(keys)):
        store.create(key, b"")
    assert list(store.list("")) == sorted(keys)
    assert list(store.list("b/1")) == ["b/1", "b/10"]
    assert list(store.list("b/")) == ["b/1", "b/10", "b/2", "b/c/d"]
    assert list(store.list("a")) == ["a", "a-b", "a.b", "ab/c"]
    assert list(store.list("b/c/d")) == ["b/c/d"]
    assert list(store.list("b/", "b/10")) == ["b/2", "b/c/d"]
    assert list(store.list("b/", "b/11")) == ["b/2", "b/c/d"]
    assert list(store.list("b/", "b/c/d")) == list(store.list("b/", "c")) == []
    assert list(store.list("b/c/d/")) == list(store.list("nothing/here/")) == []
    for prefix in ("/", "../", "a//", ".tmp/"):
        with pytest.raises(ValueError, match="key: must be"):
            store.list(prefix)


def test_list_goes_past_a_page(store: ObjectStore) -> None:
    keys = [f"many/{number:05d}" for number in range(105)]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda key: store.create(key, b""), keys))
    assert list(store.list("many/")) == keys


def test_delete(store: ObjectStore) -> None:
    store.create("a/b", b"1")
    store.delete("a/b")
    store.delete("a/b")
    store.delete("never/was")
    assert store.size("a/b") is None
    assert store.create("a/b", b"2"), "the key is free again"


def test_illegal_keys_are_refused_by_every_method(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    dots = ["..", "../a", "a/../b", "a/..", ".", "./a", "a/."]
    for key in ["", "/a", "a/", "a//b", *dots, "a b", "a\n", "ä", "a\\b", "a:b", ".tmp", ".tmp/a", "a" * 256, "a/" * 450 + "a"]:
        for use in (
            lambda key=key: store.get(key),
            lambda key=key: store.get_range(key, 0, 1),
            lambda key=key: store.size(key),
            lambda key=key: store.create(key, b""),
            lambda key=key: store.put_file(key, tmp_path / "file"),
            lambda key=key: store.fetch_file(key, tmp_path / "copy"),
            lambda key=key: store.delete(key),
            lambda key=key: store.url(key),
        ):
            with pytest.raises(ValueError, match=r"key: must be names of \[A-Za-z0-9._=\+,-\]"):
                use()
    assert list(store.list("")) == []


def test_legal_keys(store: ObjectStore) -> None:
    for key in ("a", "...", ".a/..b/c.", ".tmpx/a", "d/.tmp", "a=1,b+c_d-e.F"):
        assert store.create(key, key.encode())
        assert store.get(key) == key.encode()


@pytest.mark.parametrize("store", ["folder", "s3"], indirect=True)
def test_long_keys(store: ObjectStore) -> None:
    """Not on the Ceph of these tests: the daemon that keeps its objects in memory is set up for names of 256 characters."""
    for key in ("b" * 255, "c/" * 449 + "cc"):
        assert store.create(key, key.encode())
        assert store.get(key) == key.encode()


def test_check_passes_and_leaves_nothing(store: ObjectStore) -> None:
    store.check()
    store.check()
    assert list(store.list("")) == []


def test_a_source_that_cannot_be_read_is_not_the_stores_fault(store: ObjectStore, tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(SilotuneError, match="must be readable to be stored") as raised:
            store.put_file("a", path)
        assert raised.value.exit_code == 1


def test_urls(folder: DirectoryStore, tmp_path: Path) -> None:
    assert folder.url("a/b") == str(tmp_path / "store" / "a" / "b")
    assert S3Store("bucket", "team/run").url("a/b") == "s3://bucket/team/run/a/b"
    assert S3Store("bucket").url("a/b") == "s3://bucket/a/b"


def test_open_store(s3: S3Store, tmp_path: Path) -> None:
    s3.create("a", b"1")
    within = s3.url("a").removeprefix(f"s3://{BUCKET}/")
    assert open_store(s3.url("a").removesuffix("a")).get("a") == b"1"
    assert open_store(f"s3://{BUCKET}").get(within) == b"1"
    assert open_store(f"s3://{BUCKET}/team").url("x") == f"s3://{BUCKET}/team/x"
    assert open_store(str(tmp_path)).url("x") == str(tmp_path / "x")
    for location in ("relative/path", "", "s3://", "s3:///prefix", "s3://b//p", "s3://b/../p", "gs://bucket/p", f"s3://me:{SECRET}@host/p"):
        with pytest.raises(FederationError, match="absolute path or s3://bucket/prefix") as raised:
            open_store(location)
        assert SECRET not in str(raised.value)


# --- the folder ---

WRITER = """
import os, signal, sys, time
from pathlib import Path
from silotune.components.store.directory_store import DirectoryStore
store, how = DirectoryStore(Path(sys.argv[1])), sys.argv[2]
"""


def run_python(text: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", text, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_one_of_six_racing_processes_wins(tmp_path: Path) -> None:
    race = """
print(flush=True)
sys.stdin.readline()
print("".join(str(int(store.create(f"race/{number}", how.encode()))) for number in range(50)))
"""
    command = [sys.executable, "-c", WRITER + race, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*command, str(name)], **pipes) for name in range(6)]
    for writer in writers:
        writer.stdout.readline()
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    won = [writer.communicate(timeout=20)[0].strip() for writer in writers]
    store = DirectoryStore(tmp_path)
    for number in range(50):
        winners = [name for name in range(6) if won[name][number] == "1"]
        assert len(winners) == 1
        assert store.get(f"race/{number}") == str(winners[0]).encode()


@pytest.mark.parametrize("how", ["create", "put_file"])
def test_a_writer_killed_before_the_end_leaves_no_object(tmp_path: Path, how: str) -> None:
    killed = """
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
os.link = Path.replace = die
Path(sys.argv[3]).write_bytes(b"x" * 1000)
store.create("rounds/1/commit.json", b"x" * 1000) if how == "create" else store.put_file("rounds/1/commit.json", Path(sys.argv[3]))
"""
    writer = run_python(WRITER + killed, tmp_path / "store", how, tmp_path / "source")
    assert writer.wait(timeout=20) == -signal.SIGKILL, writer.stderr.read()
    only_a_temporary_file_is_left(DirectoryStore(tmp_path / "store"), tmp_path / "store", "rounds/1/commit.json")


def test_a_writer_killed_while_copying_leaves_no_object(tmp_path: Path) -> None:
    """The source is a pipe that never ends, so the kill comes for certain in the middle of the copy."""
    os.mkfifo(tmp_path / "pipe")
    writer = run_python(WRITER + "store.put_file('objects/1', Path(sys.argv[3]))", tmp_path / "store", "put_file", tmp_path / "pipe")
    with (tmp_path / "pipe").open("wb", buffering=0) as pipe:
        pipe.write(b"x" * 5 * 2**20)  # the pipe holds 64 KiB: when this returns, the writer has copied most of it
        writer.kill()
        assert writer.wait(timeout=20) == -signal.SIGKILL
    only_a_temporary_file_is_left(DirectoryStore(tmp_path / "store"), tmp_path / "store", "objects/1")


def only_a_temporary_file_is_left(store: DirectoryStore, root: Path, key: str) -> None:
    assert store.size(key) is None
    assert list(store.list("")) == []
    (left,) = (root / ".tmp").iterdir()
    store.check()
    assert left.exists(), "it may belong to a living writer"
    os.utime(left, (time.time() - 2 * 86400,) * 2)
    store.check()
    assert not left.exists()
    assert store.create(key, b"whole")


def test_nothing_of_a_write_remains_but_the_object(folder: DirectoryStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    folder.create("a", b"1")
    folder.create("a", b"2")
    folder.put_file("b", tmp_path / "file")
    assert list((tmp_path / "store" / ".tmp").iterdir()) == []
    assert os.stat(folder.url("a")).st_nlink == 1
    assert os.stat(folder.url("a")).st_mode == (tmp_path / "file").stat().st_mode, "other users read what the umask lets them"


def test_files_that_are_no_objects_are_not_listed(folder: DirectoryStore, tmp_path: Path) -> None:
    folder.create("a", b"")
    (tmp_path / "store" / "notes of mine.txt").write_text("")
    assert list(folder.list("")) == ["a"]


def test_a_link_whose_answer_was_lost_is_ours(folder: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def lossy(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(17, "File exists")

    monkeypatch.setattr(os, "link", lossy)
    assert folder.create("a", b"1") is True


def test_a_key_under_an_object_is_refused(folder: DirectoryStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    folder.create("a/b", b"1")
    for key in ("a", "a/b/c", "a/b/c/d"):
        for write in (lambda key=key: folder.create(key, b"2"), lambda key=key: folder.put_file(key, tmp_path / "file")):
            with pytest.raises(FederationError, match="cannot share a name"):
                write()
    (tmp_path / "plain").write_text("")
    with pytest.raises(FederationError, match="cannot share a name"):
        DirectoryStore(tmp_path / "plain").check()


@pytest.fixture
def full_disk() -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = Path(tempfile.mkdtemp())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True, text=True, check=False)
    if mounted.returncode:
        path.rmdir()
        pytest.skip(f"needs the right to mount: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", path], check=True)
    path.rmdir()


def test_a_full_disk(full_disk: Path, tmp_path: Path) -> None:
    store = DirectoryStore(full_disk / "store")
    store.create("a", b"1")
    (tmp_path / "big").write_bytes(bytes(2 * 2**20))
    for write in (lambda: store.create("b", bytes(2 * 2**20)), lambda: store.put_file("b", tmp_path / "big")):
        with pytest.raises(UnreachableError, match=r"store '.*' has no room left: No space left.*free space.*nothing committed is lost"):
            write()
    assert list(store.list("")) == ["a"]
    assert list((full_disk / "store" / ".tmp").iterdir()) == []
    assert store.create("b", b"fits"), "what failed has given its room back"
    wide = DirectoryStore(tmp_path / "wide")
    wide.put_file("big", tmp_path / "big")
    with pytest.raises(UnreachableError, match=f"folder '{full_disk}' has no room left"):
        wide.fetch_file("big", full_disk / "copy")
    assert [path.name for path in full_disk.iterdir()] == ["store"]


def test_a_full_disk_under_an_s3_fetch(s3: S3Store, full_disk: Path) -> None:
    s3.create("big", bytes(2 * 2**20))
    with pytest.raises(UnreachableError, match=f"folder '{full_disk}' has no room left"):
        s3.fetch_file("big", full_disk / "copy")
    assert list(full_disk.iterdir()) == []


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may do everything, so step down for a moment."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_folder_one_may_not_use() -> None:
    root = Path(tempfile.mkdtemp())
    try:
        store = DirectoryStore(root / "store")
        store.create("a/b", b"1")
        (root / "store").chmod(0o000)
        root.chmod(0o755)
        with as_nobody():
            for use in (
                store.check,
                lambda: store.create("c", b""),
                lambda: store.get("a/b"),
                lambda: store.size("a/b"),
                lambda: store.list(""),
                lambda: store.delete("a/b"),
            ):
                with pytest.raises(UnreachableError, match="must be able to read and write there, got: Permission denied") as raised:
                    use()
                assert str(root / "store") in str(raised.value)
                assert raised.value.exit_code == 5
    finally:
        (root / "store").chmod(0o700)
        shutil.rmtree(root)


def test_a_file_system_without_hard_links(folder: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(FederationError, match="must support hard links"):
        folder.check()


# --- S3 ---


def test_only_what_all_stores_support_is_sent(s3: S3Store, moto_client: Any, tmp_path: Path) -> None:
    sent: list[tuple[str, dict[str, str]]] = []
    events = s3._connected().meta.events
    events.register(
        "before-send.s3", lambda request, **_: sent.append((request.method, {k.lower(): v for k, v in request.headers.items()}))
    )
    (tmp_path / "small").write_bytes(b"small")
    (tmp_path / "big").write_bytes(bytes(2 * PART + 1))
    s3.create("a", b"data")
    s3.put_file("small", tmp_path / "small")
    s3.put_file("big", tmp_path / "big")
    s3.fetch_file("big", tmp_path / "copy")
    s3.get_range("a", 1, 2)
    s3.delete("a")
    names = {name for _, headers in sent for name in headers}
    assert not names & {"if-match", "x-amz-sdk-checksum-algorithm", "x-amz-checksum-mode", "x-amz-trailer"}
    assert not [name for name in names if name.startswith("x-amz-checksum")]
    assert sent[0][0] == "PUT"
    assert sent[0][1]["if-none-match"] in ("*", b"*")
    assert sum("content-md5" in headers for _, headers in sent) == 5, "of create, of the small file and of three parts"
    assert sum("if-none-match" in headers for _, headers in sent) == 3, "of create, of the small file and of the completion"
    assert sum(headers.get("range") is not None for _, headers in sent) == 4, "three parts and a range"
    assert "-3" in moto_client.head_object(Bucket=BUCKET, Key=s3.url("big").removeprefix(f"s3://{BUCKET}/"))["ETag"], "three parts went up"


@pytest.mark.parametrize("s3", ["s3", pytest.param("ceph", marks=pytest.mark.ceph)], indirect=True)
@pytest.mark.parametrize("moment", ["UploadPart", "CompleteMultipartUpload"])
def test_an_upload_killed_before_its_end_leaves_no_object(s3: S3Store, tmp_path: Path, moment: str) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from silotune.components.store.object_store import open_store
store = open_store(sys.argv[1])
store._connected().meta.events.register(f"before-send.s3.{sys.argv[3]}", lambda **_: os.kill(os.getpid(), signal.SIGKILL))
store.put_file("objects/1", Path(sys.argv[2]))
"""
    (tmp_path / "big").write_bytes(bytes(PART + 1))
    writer = run_python(script, s3.url("a")[:-2], tmp_path / "big", moment)
    assert writer.wait(timeout=30) == -signal.SIGKILL, writer.stderr.read()
    assert s3.size("objects/1") is None
    assert list(s3.list("")) == []
    s3.put_file("objects/1", tmp_path / "big")
    assert s3.size("objects/1") == PART + 1


def test_a_failed_upload_is_aborted(scripted: Callable[[Script], S3Store], tmp_path: Path) -> None:
    """Parts cost money until then."""
    asked: list[str] = []
    begun = b"<InitiateMultipartUploadResult><UploadId>7</UploadId></InitiateMultipartUploadResult>"
    said = {"HEAD": (404, b""), "POST": (200, begun), "PUT": (400, refusal("BadDigest")), "DELETE": (204, b"")}
    (tmp_path / "big").write_bytes(bytes(PART))
    with pytest.raises(UnreachableError, match="cannot serve just now"):
        scripted(lambda handler, *_: asked.append(f"{handler.command} {handler.path}") or said[handler.command]).put_file(
            "a", tmp_path / "big"
        )
    assert asked[-1] == "DELETE /bucket/p/a?uploadId=7"


def test_the_client_is_made_anew_after_a_fork(s3: S3Store) -> None:
    s3.create("a", b"1")
    script = """
import os, sys
from silotune.components.store.object_store import open_store
store = open_store(sys.argv[1])
store.get("a")
before = store._client[1]
child = os.fork()
if child == 0:
    os._exit(0 if store.get("a") == b"1" and store._client[1] is not before else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert store.get("a") == b"1" and store._client[1] is before
"""
    assert subprocess.run([sys.executable, "-c", script, s3.url("a")[:-2]], check=False, timeout=20).returncode == 0


def test_a_folder_costs_no_boto3() -> None:
    script = """
import sys
from silotune.components.store.object_store import open_store
open_store("/tmp").size("a")
assert not {"boto3", "botocore"} & set(sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=20).returncode == 0


def test_placeholders_of_web_consoles_are_not_listed(s3: S3Store, moto_client: Any) -> None:
    root = s3.url("a").removeprefix(f"s3://{BUCKET}/").removesuffix("/a")
    for key in ("/", "/folder/", "x/x", "/a"):
        moto_client.put_object(Bucket=BUCKET, Key=root + key, Body=b"")
    assert list(s3.list("")) == ["a"]


def test_a_missing_bucket(s3: S3Store, tmp_path: Path) -> None:
    store = S3Store("no-such-bucket", "p")
    for use in (store.check, lambda: store.get("a"), lambda: store.create("a", b""), lambda: store.list(""), lambda: store.delete("a")):
        with pytest.raises(UnreachableError, match=r"'s3://no-such-bucket/p' at http://127.*there is no such bucket; create it"):
            use()
    (tmp_path / "big").write_bytes(bytes(PART))
    with pytest.raises(UnreachableError, match="there is no such bucket"):
        store.put_file("a", tmp_path / "big")


def test_an_endpoint_nobody_listens_at(aws: Callable[[str], None]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    aws(f"http://user:{SECRET}@127.0.0.1:{port}")
    started = time.monotonic()
    with pytest.raises(UnreachableError, match=f"at http://127.0.0.1:{port}: cannot be reached; check AWS_ENDPOINT_URL") as raised:
        open_store("s3://bucket/p").check()
    assert time.monotonic() - started < 5
    assert SECRET not in str(raised.value)
    assert raised.value.exit_code == 5


def test_settings_boto3_cannot_use(aws: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    aws("no url at all")
    with pytest.raises(FederationError, match=r"AWS_ENDPOINT_URL: must be a URL such as https://.*got 'no url at all'"):
        S3Store("bucket").check()
    aws("http://127.0.0.1:1")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(FederationError, match=r"boto3 refuses its settings.*ProfileNotFound"):
        S3Store("bucket").check()
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UnreachableError, match="no credentials were found; set AWS_ACCESS_KEY_ID"):
        S3Store("bucket").check()


Script = Callable[[BaseHTTPRequestHandler, bytes, int], tuple[int, bytes] | None]


@pytest.fixture
def scripted(aws: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Script], S3Store]]:
    """A server that answers request n as the script says: (status, body), or None to hang up without an answer."""
    servers: list[ThreadingHTTPServer] = []

    def serve(script: Script) -> S3Store:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            count = -1

            def answer(self) -> None:
                Handler.count += 1
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                said = script(self, body, Handler.count)
                if said is None:
                    self.close_connection = True
                    return
                self.send_response(said[0])
                self.send_header("Content-Length", str(len(said[1])))
                self.send_header("ETag", '"of no meaning"')
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else said[1])

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        aws(f"http://127.0.0.1:{server.server_port}")
        return S3Store("bucket", "p")

    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    monkeypatch.setattr(s3_store.time, "sleep", lambda _: None)
    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def refusal(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>{SECRET}</Message></Error>".encode()


def test_a_store_that_ignores_if_none_match_is_found_out(scripted: Callable[[Script], S3Store]) -> None:
    store = scripted(lambda *_: (200, b""))
    with pytest.raises(FederationError, match=r"http://127.*answer 412 to a PUT with If-None-Match.*was accepted; use"):
        store.check()


def test_a_store_that_does_not_show_what_was_written_is_found_out(scripted: Callable[[Script], S3Store]) -> None:
    store = scripted(lambda handler, *_: (412, b"") if handler.command == "PUT" else (200, b""))
    with pytest.raises(FederationError, match="must return and list what was just written"):
        store.check()


def test_check_says_the_first_error_even_if_the_probe_cannot_be_deleted(scripted: Callable[[Script], S3Store]) -> None:
    store = scripted(lambda *_: (501, refusal("NotImplemented")))
    with pytest.raises(FederationError, match="must support PUT with If-None-Match"):
        store.check()


@pytest.mark.parametrize(
    ("status", "code", "error", "meaning"),
    [
        (403, "AccessDenied", UnreachableError, "refuses these credentials; check AWS_ACCESS_KEY_ID"),
        (403, "InvalidAccessKeyId", UnreachableError, "refuses these credentials"),
        (403, "SignatureDoesNotMatch", UnreachableError, "refuses these credentials"),
        (400, "ExpiredToken", UnreachableError, "refuses these credentials"),
        (403, "RequestTimeTooSkewed", UnreachableError, "clock"),
        (403, "QuotaExceeded", UnreachableError, "no room left; free space"),
        (507, "XMinioStorageFull", UnreachableError, "no room left; free space"),
        (400, "AuthorizationHeaderMalformed", UnreachableError, "another region; set AWS_DEFAULT_REGION"),
        (400, "BadDigest", UnreachableError, "cannot serve just now"),
        (503, "SlowDown", UnreachableError, "cannot serve just now"),
        (500, "InternalError", UnreachableError, "cannot serve just now"),
        (409, "ConditionalRequestConflict", UnreachableError, "cannot serve just now"),
        (400, "InvalidArgument", FederationError, "the request was refused"),
    ],
)
def test_refusals_name_the_cure_and_no_secret(
    scripted: Callable[[Script], S3Store], tmp_path: Path, status: int, code: str, error: type[SilotuneError], meaning: str
) -> None:
    store = scripted(lambda handler, *_: (404, b"") if handler.command == "HEAD" else (status, refusal(code)))
    (tmp_path / "small").write_bytes(b"1")
    for use in (
        lambda: store.create("a", b""),
        lambda: store.get("a"),
        lambda: store.list(""),
        lambda: store.delete("a"),
        lambda: store.put_file("a", tmp_path / "small"),
    ):
        with pytest.raises(error, match=f"store 's3://bucket/p' at http://127.*{meaning}.*{code}, HTTP {status}") as raised:
            use()
        assert SECRET not in str(raised.value)


@pytest.mark.parametrize("code", ["AccessDenied", "KMS.DisabledException", "KMS.NotFoundException"])
def test_a_key_of_kms_that_cannot_be_used_is_told_as_such(scripted: Callable[[Script], S3Store], code: str) -> None:
    said = f"<Error><Code>{code}</Code><Message>User x is not authorized to perform: kms:GenerateDataKey on {SECRET}</Message></Error>"
    store = scripted(lambda *_: (403 if code == "AccessDenied" else 400, said.encode()))
    with pytest.raises(
        UnreachableError, match=r"key of KMS cannot be used.*kms:GenerateDataKey and kms:Decrypt.*policies --kms-key"
    ) as raised:
        store.create("a", b"")
    assert SECRET not in str(raised.value)


def test_everything_that_is_written_is_encrypted_with_the_key_that_is_named(s3: S3Store, moto_client: Any, tmp_path: Path) -> None:
    store = S3Store(BUCKET, "with-key", kms_key="arn:key")
    (tmp_path / "small").write_bytes(b"1")
    (tmp_path / "big").write_bytes(bytes(PART + 1))
    store.create("record", b"1")
    for name in ("small", "big"):
        store.put_file(name, tmp_path / name)
    for key in ("record", "small", "big"):
        told = moto_client.head_object(Bucket=BUCKET, Key=f"with-key/{key}")
        assert (told["ServerSideEncryption"], told["SSEKMSKeyId"]) == ("aws:kms", "arn:key")
    assert store.encryption() == ("aws:kms", "arn:key")
    assert list(store.list("")) == ["big", "record", "small"]
    with pytest.raises(FederationError, match=r"storage\.kms_key: needs an s3:// store"):
        open_store(str(tmp_path), kms_key="arn:key")


def test_a_silos_own_buckets_have_an_account_and_a_server_of_their_own(
    scripted: Callable[[Script], S3Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signed by the silo's own key, and sent to its own server; the store's own requests are as before."""
    asked: list[str] = []

    def answer(handler: Any, *_: Any) -> tuple[int, bytes]:
        asked.append(re.search(r"Credential=(\w+)/\d+/([\w-]+)/", handler.headers["Authorization"]).expand(r"\1 \2"))  # type: ignore[union-attr]
        return 200, b"x"

    scripted(answer)
    ours = os.environ["AWS_ENDPOINT_URL"]
    open_store("s3://bucket", own=True).get("a")  # nothing said: as the store
    for name, value in (("ENDPOINT_URL", ours), ("ACCESS_KEY_ID", "NORTH"), ("SECRET_ACCESS_KEY", "s"), ("REGION", "eu-north-1")):
        monkeypatch.setenv(f"SILO_AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    open_store("s3://bucket", own=True).get("a")
    assert [a.partition(" ")[0] != "NORTH" for a in asked] == [True, False]
    assert asked[1] == "NORTH eu-north-1"
    monkeypatch.setenv("AWS_ENDPOINT_URL", ours)
    open_store("s3://bucket").get("a")
    assert asked[2].endswith("us-east-1")
    assert "NORTH" not in asked[2]


def test_a_refused_part_of_a_file_names_the_cure_too(scripted: Callable[[Script], S3Store], tmp_path: Path) -> None:
    begun = b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
    said = {"HEAD": (404, b""), "POST": (200, begun), "PUT": (403, refusal("QuotaExceeded")), "DELETE": (204, b"")}
    store = scripted(lambda handler, *_: said[handler.command])
    (tmp_path / "big").write_bytes(bytes(PART))
    with pytest.raises(UnreachableError, match=r"no room left; free space.*QuotaExceeded, HTTP 403"):
        store.put_file("a", tmp_path / "big")


def test_a_conflict_is_tried_again(scripted: Callable[[Script], S3Store]) -> None:
    conflict = (409, refusal("ConditionalRequestConflict"))
    assert scripted(lambda _handler, _body, count: conflict if count < 3 else (200, b"")).create("a", b"1") is True
    assert (
        scripted(lambda _handler, _body, count: conflict if count < 3 else (412, refusal("PreconditionFailed"))).create("a", b"1") is False
    )


def test_a_put_whose_answer_was_lost_meets_its_own_object(scripted: Callable[[Script], S3Store]) -> None:
    kept: list[bytes] = []

    def lossy(handler: BaseHTTPRequestHandler, body: bytes, count: int) -> tuple[int, bytes] | None:
        if handler.command == "GET":
            return 200, kept[0]
        kept.append(body)
        return None if count == 0 else (412, refusal("PreconditionFailed"))

    store = scripted(lossy)
    assert store.create("a", b"mine") is False
    assert store.get("a") == b"mine", "so the caller, comparing, finds that it has won"
    assert len(kept) == 2


def test_a_completion_whose_answer_was_lost_is_recognised(scripted: Callable[[Script], S3Store], tmp_path: Path) -> None:
    done: list[bool] = []

    def lossy(handler: BaseHTTPRequestHandler, _body: bytes, _count: int) -> tuple[int, bytes] | None:
        if handler.command == "HEAD":
            return (200, bytes(PART)) if done else (404, b"")
        if handler.command == "POST" and "uploads" in handler.path:
            return 200, b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
        if handler.command == "POST":
            done.append(True)
            return None if len(done) == 1 else (404, refusal("NoSuchUpload"))
        return 200, b""

    (tmp_path / "big").write_bytes(bytes(PART))
    scripted(lossy).put_file("a", tmp_path / "big")
    assert len(done) == 2


def test_a_body_cut_short_is_read_again(scripted: Callable[[Script], S3Store]) -> None:
    def short(handler: BaseHTTPRequestHandler, _body: bytes, count: int) -> tuple[int, bytes] | None:
        if count < 2:
            handler.send_response(200)
            handler.send_header("Content-Length", "10")
            handler.end_headers()
            handler.wfile.write(b"01234")
            return None
        return 200, b"0123456789"

    assert scripted(short).get("a") == b"0123456789"
    with pytest.raises(UnreachableError, match="cannot be reached"):
        scripted(lambda handler, body, _count: short(handler, body, 0)).get("a")


def test_a_connection_reset_in_the_middle_of_a_body_is_read_again(scripted: Callable[[Script], S3Store], tmp_path: Path) -> None:
    data = random.Random(1).randbytes(100_000)

    def reset(handler: BaseHTTPRequestHandler, _body: bytes, count: int) -> tuple[int, bytes] | None:
        if handler.command == "GET" and count < 3:
            handler.send_response(206)
            handler.send_header("Content-Length", str(len(data)))
            handler.send_header("Content-Range", f"bytes 0-{len(data) - 1}/{len(data)}")
            handler.end_headers()
            handler.wfile.write(data[:1000])
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing sends a reset
            handler.connection.close()
            raise ConnectionAbortedError
        return 200, data

    scripted(reset).fetch_file("a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data


def test_an_answer_that_ends_within_its_headers_is_not_an_empty_object(scripted: Callable[[Script], S3Store]) -> None:
    """http.client takes the end of the connection for the end of the headers."""

    def early(handler: BaseHTTPRequestHandler, _body: bytes, count: int) -> tuple[int, bytes] | None:
        if count % 3 < 2:
            handler.send_response(200)
            handler.flush_headers()
            return None
        return 200, listing("p/a") if "list-type" in handler.path else b"0123456789"

    store = scripted(early)
    assert store.get("a") == b"0123456789"
    assert store.size("a") == 10
    assert list(store.list("")) == ["a"]
    for use in (store.get, store.size, store.list):
        with pytest.raises(UnreachableError, match="cannot be reached"):
            use.__func__(scripted(lambda handler, body, _count: early(handler, body, 0)), "a")


def test_a_refusal_that_breaks_off_in_its_body_is_asked_for_again(scripted: Callable[[Script], S3Store]) -> None:
    """botocore reads the body of a refusal itself, and lets urllib3's own error out."""

    def broken(handler: BaseHTTPRequestHandler, _body: bytes, count: int) -> tuple[int, bytes] | None:
        if count < 2:
            handler.send_response(404)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b"<Error>")
            handler.wfile.flush()
            time.sleep(0.2)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing sends a reset
            handler.connection.close()
            raise ConnectionAbortedError
        return 200, b"0123456789"

    assert scripted(broken).get("a") == b"0123456789"
    with pytest.raises(UnreachableError):  # in the words of botocore, or in ours
        scripted(lambda handler, body, _count: broken(handler, body, 0)).delete("a")


def test_an_answer_that_ends_within_a_date_is_told_as_one(scripted: Callable[[Script], S3Store]) -> None:
    """botocore reads the date before it knows that the headers did not come whole."""

    def early(handler: BaseHTTPRequestHandler, _body: bytes, _count: int) -> None:
        handler.send_response_only(200)
        handler.send_header("Last-Modified", "")
        handler.flush_headers()

    store = scripted(early)
    for asked in (store.get, store.size):
        with pytest.raises(UnreachableError, match="an answer broke off before its end"):
            asked("a")


def test_an_answer_that_keeps_breaking_off_is_given_up_in_time(
    scripted: Callable[[Script], S3Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def short(handler: BaseHTTPRequestHandler, _body: bytes, count: int) -> None:
        asked.append(count)
        handler.send_response(200)
        handler.send_header("Content-Length", "10")
        handler.end_headers()
        handler.wfile.write(b"01234")

    monkeypatch.setattr(s3_store, "PATIENCE", 0.0)
    with pytest.raises(UnreachableError, match="cannot be reached"):
        scripted(short).get("a")
    assert asked == [0]


def test_a_part_that_ends_early_is_no_part_of_a_file(scripted: Callable[[Script], S3Store], tmp_path: Path) -> None:
    """The server says itself that there is no more: nothing broke, so no repeat would help."""
    store = scripted(lambda handler, *_: (200, bytes(100 if handler.command == "HEAD" else 60)))
    with pytest.raises(UnreachableError, match="object 'a' must have 100 bytes to its end, ended before"):
        store.fetch_file("a", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def listing(*keys: str) -> bytes:
    return b"<ListBucketResult>" + b"".join(f"<Contents><Key>{key}</Key></Contents>".encode() for key in keys) + b"</ListBucketResult>"


def forbidding(answer: tuple[int, bytes], asked: list[str] | None = None) -> Script:
    """A server that refuses every object, and answers a listing so."""

    def say(handler: BaseHTTPRequestHandler, _body: bytes, _count: int) -> tuple[int, bytes]:
        if asked is not None:
            asked.append(f"{handler.command} {handler.path}")
        return answer if "list-type=2" in handler.path else (403, refusal("AccessDenied"))

    return say


def readings(store: ObjectStore, folder: Path) -> list[Callable[[], object]]:
    return [lambda: store.get("a"), lambda: store.get_range("a", 0, 1), lambda: store.fetch_file("a", folder / "copy")]


@pytest.mark.parametrize("listed", [listing(), listing("p/ab")], ids=["nothing", "a longer key"])
def test_forbidden_and_not_listed_is_missing(scripted: Callable[[Script], S3Store], tmp_path: Path, listed: bytes) -> None:
    asked: list[str] = []
    store = scripted(forbidding((200, listed), asked))
    assert store.size("a") is None
    assert [line.split("?")[0] for line in asked] == ["HEAD /bucket/p/a", "GET /bucket"]
    assert {"prefix=p%2Fa", "max-keys=1"} <= set(asked[1].split("?")[1].split("&"))
    for read in readings(store, tmp_path):
        with pytest.raises(ObjectMissing):
            read()


@pytest.mark.parametrize("answer", [(200, listing("p/a")), (403, refusal("AccessDenied"))], ids=["is listed", "may not be listed"])
def test_forbidden_stays_forbidden_if_it(scripted: Callable[[Script], S3Store], tmp_path: Path, answer: tuple[int, bytes]) -> None:
    store = scripted(forbidding(answer))
    for read in (*readings(store, tmp_path), lambda: store.size("a")):
        with pytest.raises(UnreachableError, match=r"refuses these credentials; check AWS_ACCESS_KEY_ID.*HTTP 403"):
            read()


def test_what_is_missing_or_there_costs_no_request_more(scripted: Callable[[Script], S3Store], tmp_path: Path) -> None:
    asked: list[str] = []

    def note(status: int) -> Script:
        return lambda handler, *_: asked.append(handler.command) or (status, b"" if handler.command == "PUT" else b"1")

    (tmp_path / "file").write_bytes(b"1")
    missing = scripted(note(404))
    assert missing.size("a") is None
    for read in readings(missing, tmp_path):
        with pytest.raises(ObjectMissing):
            read()
    there = scripted(note(200))
    there.put_file("a", tmp_path / "file")
    there.get("a")
    there.create("a", b"1")
    assert asked == ["HEAD", "GET", "GET", "HEAD", "HEAD", "GET", "PUT"]


def test_a_store_that_ignores_ranges_costs_time_only(scripted: Callable[[Script], S3Store], tmp_path: Path) -> None:
    data = bytes(range(200))
    store = scripted(lambda *_: (200, data))
    assert store.get_range("a", 3, 4) == data[3:7]
    assert store.get_range("a", 300, 4) == b""
    store.fetch_file("a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data


def test_an_endpoint_of_its_own_is_spoken_to_by_path(scripted: Callable[[Script], S3Store], aws: Callable[[str], None]) -> None:
    """``bucket.host`` is a name that only AWS answers to."""
    seen: list[tuple[str, str]] = []
    store = scripted(lambda handler, *_: seen.append((handler.headers["Host"], handler.path)) or (200, b""))
    port = os.environ["AWS_ENDPOINT_URL"].rsplit(":", 1)[1]
    aws(f"http://localhost:{port}")  # an address in digits would be spoken to by path in any case
    store.create("a", b"")
    assert seen == [(f"localhost:{port}", "/bucket/p/a")]
