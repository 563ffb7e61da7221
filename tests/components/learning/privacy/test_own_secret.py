"""The secret of a party: made once, for its owner only, and different keys for different uses."""

from __future__ import annotations

import hashlib
import hmac
import threading
from pathlib import Path

import pytest

from silotune.components.errors import SilotuneError
from silotune.components.learning.privacy.own_secret import FILE, derive, own_secret, subkey

NAMES = {"agreement": "a" * 64, "plan": "b" * 64, "incoming": "c" * 64, "dataset": "d" * 64, "purpose": "training"}


def test_it_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    secret = own_secret(tmp_path)
    assert len(secret) == 32
    assert own_secret(tmp_path) == secret
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / FILE).parent.stat().st_mode & 0o777 == 0o700
    assert [p.name for p in (tmp_path / FILE).parent.iterdir()] == ["noise.key"]
    assert own_secret(tmp_path / "other") != secret


def test_of_many_at_once_all_get_the_same(tmp_path: Path) -> None:
    found: list[bytes] = []
    barrier = threading.Barrier(8)

    def get() -> None:
        barrier.wait()
        found.append(own_secret(tmp_path))

    threads = [threading.Thread(target=get) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_what_is_no_secret_is_refused(tmp_path: Path) -> None:
    own_secret(tmp_path)
    (tmp_path / FILE).chmod(0o644)
    with pytest.raises(SilotuneError, match="readable by its owner only, got mode 044"):
        own_secret(tmp_path)
    (tmp_path / FILE).chmod(0o600)
    (tmp_path / FILE).write_bytes(b"short")
    with pytest.raises(SilotuneError, match="must be of 32 bytes, got 5; delete it"):
        own_secret(tmp_path)


def test_any_other_input_gives_another_key() -> None:
    key = derive(b"s" * 32, **NAMES)
    text = '{"agreement":"%s","dataset":"%s","incoming":"%s","plan":"%s","purpose":"training"}' % (  # noqa: UP031 - braces
        "a" * 64, "d" * 64, "c" * 64, "b" * 64,
    )  # fmt: skip
    assert key == hmac.new(b"s" * 32, b"silotune key 1\n" + text.encode(), hashlib.sha256).digest()
    others = {derive(b"s" * 32, **(NAMES | {name: "e" * 64})) for name in NAMES} | {derive(b"t" * 32, **NAMES)}
    assert len(others | {key}) == 7
    assert len({subkey(key, 1, "a"), subkey(key, "1", "a"), subkey(key, 1, "b"), subkey(key, "1a")}) == 4
