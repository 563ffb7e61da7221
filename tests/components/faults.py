"""Faults: a store, and a way to a store, that go wrong as real ones do, by a seed.

`FaultyStore` wraps any store and breaks calls to it. `FaultyProxy` stands before an S3 endpoint and breaks connections, so that the client's own
repeats are tried too. Both count what they did by kind in ``injected``, so that a test can demand that something happened at all.
"""

from __future__ import annotations

import collections
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from silotune.components.errors import UnreachableError
from silotune.components.store.object_store import ObjectStore

STORE_KINDS = ("drop-before", "drop-after", "delay", "duplicate", "truncate", "flip")
PROXY_KINDS = ("reset", "stall", "truncate", "delay")
T = TypeVar("T")


def _chosen(rng: random.Random, rates: Mapping[str, float], kinds: tuple[str, ...]) -> str:
    """One kind at most by its rate (between 0 and 1, 1 in sum at most); empty: nothing goes wrong."""
    at = rng.random()
    for kind in kinds:
        at -= rates.get(kind, 0.0)
        if at < 0:
            return kind
    return ""


def _checked(rates: Mapping[str, float], kinds: tuple[str, ...]) -> dict[str, float]:
    if unknown := sorted(set(rates) - set(kinds)):
        raise ValueError(f"rates: must be of {', '.join(kinds)}, got {', '.join(unknown)}")
    if any(rate < 0 for rate in rates.values()) or sum(rates.values()) > 1 + 1e-9:
        raise ValueError(f"rates: must be 0 or more and 1 in sum at most, got {dict(rates)}")
    return dict(rates)


class FaultyStore:
    """An `ObjectStore` whose calls go wrong at random, each in one way at most.

    drop-before: UnreachableError, nothing was done. drop-after: it was done, then UnreachableError: the answer was lost. delay: some
    milliseconds. duplicate: done twice, the second answer counts (a repeat after a lost answer). truncate: what was read ends early. flip: one
    bit of what was read is another. The last two happen to data read (`get`, `get_range`, `fetch_file`); other calls pass unharmed.
    `check` and `url` never go wrong.

    Threads may share it. The faults are then the same in number and kind, not in place: each call draws as it comes.
    """

    def __init__(self, store: ObjectStore, rng: random.Random, rates: Mapping[str, float]) -> None:
        self._store = store
        self._rng = rng
        self._rates = _checked(rates, STORE_KINDS)
        self._lock = threading.Lock()
        self.injected: collections.Counter[str] = collections.Counter()

    def __str__(self) -> str:
        return f"faulty {self._store}"

    def get(self, key: str) -> bytes:
        return self._reading(lambda: self._store.get(key))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self._reading(lambda: self._store.get_range(key, start, length))

    def size(self, key: str) -> int | None:
        return self._call(lambda: self._store.size(key))[0]

    def create(self, key: str, data: bytes) -> bool:
        return self._call(lambda: self._store.create(key, data))[0]

    def put_file(self, key: str, path: Path) -> None:
        self._call(lambda: self._store.put_file(key, path))

    def fetch_file(self, key: str, path: Path) -> None:
        kind = self._call(lambda: self._store.fetch_file(key, path))[1]
        if kind in ("truncate", "flip"):
            path.write_bytes(self._harmed(kind, path.read_bytes()))

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        return self._call(lambda: self._store.list(prefix, after))[0]

    def delete(self, key: str) -> None:
        self._call(lambda: self._store.delete(key))

    def url(self, key: str) -> str:
        return self._store.url(key)

    def check(self) -> None:
        self._store.check()

    def _reading(self, read: Callable[[], bytes]) -> bytes:
        data, kind = self._call(read)
        return self._harmed(kind, data) if kind in ("truncate", "flip") else data

    def _call(self, do: Callable[[], T]) -> tuple[T, str]:
        """The call with the fault drawn for it; harm to data is left to the caller, and counted where it is done."""
        with self._lock:
            kind = _chosen(self._rng, self._rates, STORE_KINDS)
            pause = self._rng.uniform(0.001, 0.005)
            if kind and kind not in ("truncate", "flip"):
                self.injected[kind] += 1
        if kind == "drop-before":
            raise UnreachableError(f"{self}: dropped before it was done")
        if kind == "delay":
            time.sleep(pause)
        if kind == "duplicate":
            do()
        result = do()
        if kind == "drop-after":
            raise UnreachableError(f"{self}: done, and its answer lost")
        return result, kind

    def _harmed(self, kind: str, data: bytes) -> bytes:
        if not data:
            return data
        with self._lock:
            self.injected[kind] += 1
            if kind == "truncate":
                return data[: self._rng.randrange(len(data))]
            place = self._rng.randrange(len(data) * 8)
        harmed = bytearray(data)
        harmed[place // 8] ^= 1 << place % 8
        return bytes(harmed)


def _connected(host: str, port: int) -> socket.socket:
    """Without a look at the resolver, whose lock a fork would inherit from this thread."""
    server = socket.socket()
    server.settimeout(10)
    server.connect((host, port))
    return server


class FaultyProxy:
    """A TCP proxy on 127.0.0.1 before an endpoint, whose connections go wrong at random, each in one way at most.

    reset: torn down with a RST after some bytes of the answers. truncate: closed in order, after some bytes. stall: silent for `stall` seconds
    at some byte, then goes on. delay: each piece comes some milliseconds late. A context manager; `endpoint` is its URL.

    Args:
        target: the endpoint, such as ``http://127.0.0.1:5000``; no TLS.
        rates: by kind, for a connection. A client that keeps connections draws seldom: many requests go over one.
        within: bytes of the answers within which a connection goes wrong.
        stall: seconds.
    """

    def __init__(self, target: str, seed: int, rates: Mapping[str, float], *, within: int = 20_000, stall: float = 0.2) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname or "", parts.port or 80)
        self._rng = random.Random(seed)
        self._rates = _checked(rates, PROXY_KINDS)
        self._within, self._stall = within, stall
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.injected: collections.Counter[str] = collections.Counter()
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        with self._lock:
            left = list(self._open)
        for one in left:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # wakes the threads that copy; they close

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            with self._lock:
                kind = _chosen(self._rng, self._rates, PROXY_KINDS)
                place = self._rng.randrange(self._within)
            threading.Thread(target=self._serve, args=(client, kind, place), daemon=True).start()

    def _serve(self, client: socket.socket, kind: str, place: int) -> None:
        with client:
            try:
                server = _connected(*self._target)
            except OSError:
                return
            server.settimeout(None)
            with server:
                with self._lock:
                    self._open |= {client, server}
                upward = threading.Thread(target=self._pass_on, args=(client, server), daemon=True)
                upward.start()
                with suppress(OSError):
                    self._answer(server, client, kind, place)
                for one, how in (
                    (client, socket.SHUT_RD),
                    (server, socket.SHUT_RDWR),
                ):  # wakes the other thread, and tells the client nothing
                    with suppress(OSError):
                        one.shutdown(how)
                upward.join()
                with self._lock:
                    self._open -= {client, server}
            if kind == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing sends a RST

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def _answer(self, server: socket.socket, client: socket.socket, kind: str, place: int) -> None:
        """Copies answers until the server ends, or a fault that ends the connection has its place."""
        seen = 0
        while data := server.recv(65536):
            if kind == "delay":
                self._count(kind, seen == 0)
                time.sleep(0.003)
            elif kind and seen <= place < seen + len(data):
                self._count(kind)
                client.sendall(data[: place - seen])
                if kind != "stall":
                    return
                time.sleep(self._stall)
                data, seen = data[place - seen :], place
                place = -1
            client.sendall(data)
            seen += len(data)

    def _count(self, kind: str, first: bool = True) -> None:
        with self._lock:
            self.injected[kind] += first
