"""The faults themselves: each kind does what its name says, is counted, and comes again from the same seed."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import faults
import pytest

from silotune.components.errors import UnreachableError
from silotune.components.store.directory_store import DirectoryStore
from silotune.components.store.s3_store import S3Store


def always(store: DirectoryStore, kind: str) -> Any:
    return faults.FaultyStore(store, random.Random(1), {kind: 1.0})


def test_without_rates_it_is_the_store_itself(folder: DirectoryStore, tmp_path: Path) -> None:
    store = faults.FaultyStore(folder, random.Random(1), {})
    (tmp_path / "file").write_bytes(b"2")
    store.check()
    assert store.create("a", b"1") is True
    assert store.create("a", b"1") is False
    store.put_file("b", tmp_path / "file")
    store.fetch_file("b", tmp_path / "copy")
    assert (store.get("a"), store.get_range("a", 0, 1), store.size("b"), list(store.list(""))) == (b"1", b"1", 1, ["a", "b"])
    assert (tmp_path / "copy").read_bytes() == b"2"
    store.delete("a")
    assert store.size("a") is None
    assert store.url("a") == folder.url("a")
    assert not store.injected


def test_drop_before_does_nothing(folder: DirectoryStore) -> None:
    store = always(folder, "drop-before")
    with pytest.raises(UnreachableError, match="dropped before"):
        store.create("a", b"1")
    assert folder.size("a") is None
    assert store.injected == {"drop-before": 1}


def test_drop_after_loses_the_answer_only(folder: DirectoryStore, tmp_path: Path) -> None:
    store = always(folder, "drop-after")
    with pytest.raises(UnreachableError, match="its answer lost"):
        store.create("a", b"1")
    with pytest.raises(UnreachableError, match="its answer lost"):
        store.fetch_file("a", tmp_path / "copy")
    assert folder.get("a") == b"1"
    assert (tmp_path / "copy").exists()
    assert store.injected == {"drop-after": 2}


def test_a_duplicate_create_meets_its_own_object(folder: DirectoryStore) -> None:
    store = always(folder, "duplicate")
    assert store.create("a", b"1") is False
    assert store.get("a") == b"1"
    assert store.injected == {"duplicate": 2}


def test_a_delay_changes_nothing_else(folder: DirectoryStore) -> None:
    store = always(folder, "delay")
    began = time.monotonic()
    assert store.create("a", b"1") is True
    assert time.monotonic() - began >= 0.001
    assert store.injected == {"delay": 1}


@pytest.mark.parametrize("kind", ["truncate", "flip"])
def test_what_is_read_comes_harmed_and_what_is_stored_is_not(folder: DirectoryStore, tmp_path: Path, kind: str) -> None:
    data = bytes(range(100))
    store = always(folder, kind)
    assert store.create("a", data) is True
    store.fetch_file("a", tmp_path / "copy")
    for got in (store.get("a"), store.get_range("a", 0, 100), (tmp_path / "copy").read_bytes()):
        if kind == "truncate":
            assert len(got) < 100
            assert got == data[: len(got)]
        else:
            assert sum((one ^ other).bit_count() for one, other in zip(got, data, strict=True)) == 1
    assert folder.get("a") == data
    assert store.injected == {kind: 3}, "a write is not harmed, and not counted"


def test_a_seed_gives_the_same_faults_again(folder: DirectoryStore) -> None:
    folder.create("a", bytes(100))

    def course(seed: int) -> tuple[list[object], dict[str, int]]:
        store = faults.FaultyStore(folder, random.Random(seed), dict.fromkeys(faults.STORE_KINDS, 0.15))
        seen: list[object] = []
        for _ in range(60):
            try:
                seen.append(store.get("a"))
            except UnreachableError as error:
                seen.append(str(error))
        return seen, store.injected

    assert course(1) == course(1) != course(2)
    assert set(course(1)[1]) == set(faults.STORE_KINDS)


@pytest.mark.parametrize("rates", [{"drop": 0.1}, {"delay": -0.1}, {"delay": 0.7, "flip": 0.7}])
def test_rates_that_make_no_sense_are_refused(folder: DirectoryStore, rates: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="rates: must be"):
        faults.FaultyStore(folder, random.Random(1), rates)


# --- the proxy ---

BODY = bytes(range(256)) * 40


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY)

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def asked_plainly(endpoint: str) -> bytes:
    """All bytes that come until the connection ends."""
    with socket.create_connection(("127.0.0.1", int(endpoint.rsplit(":", 1)[1])), timeout=5) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        came = b""
        while data := connection.recv(65536):
            came += data
        return came


def test_a_proxy_without_rates_passes_all(server: str) -> None:
    with faults.FaultyProxy(server, 1, {}) as proxy:
        assert asked_plainly(proxy.endpoint).endswith(BODY)
    assert not proxy.injected


def test_a_truncated_connection_ends_early_and_in_order(server: str) -> None:
    with faults.FaultyProxy(server, 1, {"truncate": 1}, within=5000) as proxy:
        assert len(asked_plainly(proxy.endpoint)) < 5000
    assert proxy.injected == {"truncate": 1}


def test_a_reset_connection_ends_with_an_error(server: str) -> None:
    with faults.FaultyProxy(server, 1, {"reset": 1}, within=5000) as proxy, pytest.raises(ConnectionResetError):
        asked_plainly(proxy.endpoint)
    assert proxy.injected == {"reset": 1}


@pytest.mark.parametrize(("kind", "least"), [("stall", 0.2), ("delay", 0.003)])
def test_a_slow_connection_brings_all(server: str, kind: str, least: float) -> None:
    with faults.FaultyProxy(server, 1, {kind: 1}, within=5000) as proxy:
        began = time.monotonic()
        assert asked_plainly(proxy.endpoint).endswith(BODY)
        assert time.monotonic() - began >= least
    assert proxy.injected == {kind: 1}


def test_nobody_answers_once_the_proxy_is_left(server: str) -> None:
    with faults.FaultyProxy(server, 1, {}) as proxy:
        pass
    with pytest.raises(ConnectionRefusedError):
        asked_plainly(proxy.endpoint)


def test_a_store_behind_broken_connections_keeps_its_promises(
    s3: S3Store, aws: Callable[[str], None], moto_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """moto closes no connection of its own accord; what breaks is the proxy's work, and the client's repeats hide it."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    data = random.Random(3).randbytes(300_000)
    (tmp_path / "file").write_bytes(data)
    rates = {"reset": 0.15, "truncate": 0.15, "stall": 0.1, "delay": 0.1}
    with faults.FaultyProxy(moto_client.meta.endpoint_url, 5, rates, within=3000, stall=0.02) as proxy:
        aws(proxy.endpoint)
        for number in range(60):
            s3.create(f"records/{number}", b"%d" % number)
            assert s3.get(f"records/{number}") == b"%d" % number
        s3.put_file("objects/1", tmp_path / "file")
        s3.fetch_file("objects/1", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    assert {"reset", "truncate"} <= set(proxy.injected)
