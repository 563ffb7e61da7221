"""Tensors of all silos at once: verified, in order, with the next ones on their way."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from combining import written

from silotune.components.learning.aggregation.side_by_side import SideBySide
from silotune.components.learning.blob import FileBlob
from silotune.components.learning.tensor_file import open_tensor_file
from silotune.components.learning.update import Update, UpdateRefused

NAMES = ("a", "b", "c")


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((3, 5)).astype(np.float32) for name in NAMES}


@pytest.fixture
def updates(tmp_path: Path) -> dict[str, Update]:
    return {silo: written(tmp_path / silo, silo, arrays(i), 1, 1) for i, silo in enumerate(("west", "east", "north"))}


class Slow(FileBlob):
    """Answers as late as a store far away."""

    ahead = 8

    def __init__(self, path: Path, underway: list[int], lock: threading.Lock) -> None:
        super().__init__(path)
        self._underway, self._lock = underway, lock

    def read(self, start: int, end: int) -> bytes | memoryview:
        with self._lock:
            self._underway[0] += 1
            self._underway[1] = max(self._underway)
        time.sleep(0.002)
        with self._lock:
            self._underway[0] -= 1
        return super().read(start, end)


def test_all_silos_of_one_tensor_after_the_other(updates: dict[str, Update]) -> None:
    reader = SideBySide(updates)
    order = ("c", "a", "b")
    for name, found in zip(order, reader.tensors(order), strict=True):
        assert list(found) == ["east", "north", "west"]
        for i, silo in enumerate(("west", "east", "north")):
            np.testing.assert_array_equal(found[silo], arrays(i)[name])
    assert reader.norms() == pytest.approx({silo: update.header.norm for silo, update in updates.items()}, rel=1e-6)


def test_a_stores_latency_is_hidden_by_reads_ahead_of_no_more_than_one_tensor_of_each(updates: dict[str, Update], tmp_path: Path) -> None:
    underway, lock = [0, 0], threading.Lock()
    far = {s: Update(u.header, open_tensor_file(Slow(tmp_path / s, underway, lock))) for s, u in updates.items()}
    underway[1] = 0
    for name, found in zip(NAMES, SideBySide(far).tensors(NAMES), strict=True):
        np.testing.assert_array_equal(found["west"], arrays(0)[name])
    assert 1 < underway[1] <= len(updates)


@pytest.mark.parametrize("ahead", [False, True])
def test_damage_is_found_in_the_tensor_it_is_in(updates: dict[str, Update], tmp_path: Path, ahead: bool) -> None:
    data = bytearray((tmp_path / "north").read_bytes())
    data[-1] ^= 1  # of c
    (tmp_path / "north").write_bytes(data)
    if ahead:
        slow = Slow(tmp_path / "north", [0, 0], threading.Lock())
        updates["north"] = Update(updates["north"].header, open_tensor_file(slow))
    reading = SideBySide(updates).tensors(NAMES)
    assert next(reading).keys() == next(reading).keys() == updates.keys()
    with pytest.raises(UpdateRefused, match="tensor 'c' does not have the digest") as caught:
        next(reading)
    assert caught.value.silo == "north"


def test_a_file_that_ends_too_soon(updates: dict[str, Update], tmp_path: Path) -> None:
    (tmp_path / "east").write_bytes((tmp_path / "east").read_bytes()[:-4])
    with pytest.raises(UpdateRefused, match="tensor 'c': the file ends inside it") as caught:
        list(SideBySide(updates).tensors(NAMES))
    assert caught.value.silo == "east"


def test_a_lie_about_the_norm_is_found_when_all_has_been_read(updates: dict[str, Update]) -> None:
    west = updates["west"]
    updates["west"] = Update(west.header.model_copy(update={"norm": 2 * west.header.norm}), west.file)
    reader = SideBySide(updates)
    list(reader.tensors(NAMES))
    with pytest.raises(UpdateRefused, match="its header says") as caught:
        reader.norms()
    assert caught.value.silo == "west"


def test_there_must_be_an_update() -> None:
    with pytest.raises(ValueError, match="no update"):
        SideBySide({})
