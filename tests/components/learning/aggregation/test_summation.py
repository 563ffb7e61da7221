"""Sums in one order: flat or by a tree, by mapped files or by ranges from a store, in windows of any size, in bounded memory."""

from __future__ import annotations

import hashlib
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from silotune.components.learning.aggregation import summation
from silotune.components.learning.aggregation.mean import weigh, weighted_mean
from silotune.components.learning.aggregation.summation import Term, squares, sums
from silotune.components.learning.aggregation.tree import Partial, combine_partials, mean_of_partials, partial_sum
from silotune.components.learning.blob import FileBlob
from silotune.components.learning.tensor_file import TensorFile, open_tensor_file, to_bytes, write_tensor_file
from silotune.components.learning.update import Codec, Header, Update, UpdateRefused, write_update

SHAPES = {"a.lora_A": (4, 6), "b": (5,), "c.none": (0, 3), "d.lora_B": (6, 4), "e": ()}
Arrays = dict[str, np.ndarray]


def arrays(seed: int, shapes: dict[str, tuple[int, ...]] | None = None, scale: float = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {n: np.asarray(scale * rng.standard_normal(s), np.float32) for n, s in (shapes or SHAPES).items()}


def update(folder: Path, silo: str, tensors: Arrays, examples: int = 1, codec: str = "float32") -> Update:
    header = Header(
        federation="f", agreement="a", round=1, silo=silo, plan="p", base="b", incoming="i", examples=examples, tokens=1, steps=1, cursor=1,
        loss=1.0, norm=0.0, codec=Codec.model_validate({"name": codec}), tensors={},
    )  # fmt: skip
    path = folder / f"{silo}.update"
    return Update(write_update(path, header, tensors), open_tensor_file(path))


def many(folder: Path, count: int, codec: str = "float32") -> dict[str, Update]:
    """Of sizes so unlike that a sum in another order comes out otherwise."""
    return {(s := f"{k:04d}"): update(folder, s, arrays(k, scale=10.0 ** (k % 7 - 3)), 1 + k * 37 % 101, codec) for k in range(count)}


@pytest.fixture
def incoming(tmp_path: Path) -> TensorFile:
    path = tmp_path / "incoming"
    write_tensor_file(path, SHAPES, "F32", ((n, to_bytes(a, "F32")) for n, a in sorted(arrays(10**6).items())), {})
    return open_tensor_file(path)


def by_tree(incoming: TensorFile, updates: dict[str, Update], out: Path, fan_in: int) -> None:
    """Each group by a process of its own, as it were: from files only; groups come in any order."""
    weights, silos, level = weigh(updates, "examples"), sorted(updates), 0
    partials: list[tuple[Partial, TensorFile]] = []
    for at in range(0, len(silos), fan_in):
        path = out.with_name(f"{out.name}.0.{at}")
        group = {s: updates[s] for s in reversed(silos[at : at + fan_in])}
        partials.append((partial_sum(group, weights, path, fan_in=fan_in), open_tensor_file(path)))
    while len(partials) > fan_in:
        level += 1
        above = []
        for at in range(0, len(partials), fan_in):
            path = out.with_name(f"{out.name}.{level}.{at}")
            above.append((combine_partials(partials[at : at + fan_in][::-1], path, fan_in=fan_in), open_tensor_file(path)))
        partials = above
    mean = mean_of_partials(incoming, partials[::-1], out, fan_in=fan_in)
    assert mean.norms.keys() == updates.keys()


@pytest.mark.parametrize(
    ("count", "fan_in"), [(1, 16), (5, 16), (16, 16), (17, 16), (40, 16), (300, 16), (9, 2), (27, 3), (28, 3), (31, 3)]
)
def test_a_tree_gives_the_same_bytes(incoming: TensorFile, tmp_path: Path, count: int, fan_in: int) -> None:
    updates = many(tmp_path, count)
    flat = weighted_mean(incoming, updates, weigh(updates, "examples"), tmp_path / "flat", fan_in=fan_in)
    by_tree(incoming, updates, tmp_path / "tree", fan_in)
    assert (tmp_path / "flat").read_bytes() == (tmp_path / "tree").read_bytes()
    assert flat.change > 0


def naive(terms: list[np.ndarray], fan_in: int) -> np.ndarray:
    """The stated order, written as a recursion over lists."""
    if len(terms) == 1:
        return terms[0]
    groups = []
    for at in range(0, len(terms), fan_in):
        total = terms[at]
        for term in terms[at + 1 : at + fan_in]:
            total = (total + term).astype(np.float32)
        groups.append(total)
    return naive(groups, fan_in)


@pytest.mark.parametrize(("count", "fan_in"), [(3, 16), (16, 16), (40, 16), (33, 2), (82, 3)])
@pytest.mark.parametrize("codec", ["float32", "bfloat16"])
def test_the_order_is_the_one_that_is_stated(tmp_path: Path, count: int, fan_in: int, codec: str) -> None:
    updates = many(tmp_path, count, codec)
    terms = [Term(u.file, float(u.header.examples)) for u in updates.values()]
    got = {n: [np.empty(0, np.float32)] for n in SHAPES}
    for piece, block in sums(terms, fan_in):
        got[piece.name].append(block.copy())
    for name in SHAPES:
        products = [(np.float32(u.header.examples) * u.file.read(name)).astype(np.float32).reshape(-1) for u in updates.values()]
        assert np.concatenate(got[name]).tobytes() == naive(products, fan_in).tobytes(), name
        exact = sum(np.float64(u.header.examples) * u.file.read(name).reshape(-1) for u in updates.values())
        levels = int(np.ceil(np.log(count) / np.log(fan_in)))
        size = sum(u.header.examples * np.abs(u.file.read(name).reshape(-1).astype(np.float64)) for u in updates.values())
        assert (np.abs(np.concatenate(got[name]) - exact) <= (2 + (fan_in - 1) * levels) * 2.0**-24 * size).all()


@pytest.mark.parametrize(("window", "block"), [(7, 3), (8, 8), (24, 5), (1000, 1)])
def test_windows_and_blocks_change_no_byte(
    incoming: TensorFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, block: int
) -> None:
    updates = many(tmp_path, 20)
    whole = weighted_mean(incoming, updates, weigh(updates, "examples"), tmp_path / "whole")
    monkeypatch.setattr(summation, "WINDOW", window)
    monkeypatch.setattr(summation, "BLOCK", block)
    parts = weighted_mean(incoming, updates, weigh(updates, "examples"), tmp_path / "parts")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    assert parts.norms == pytest.approx(whole.norms, rel=1e-6)


class Slow:
    """A blob whose reads are counted while they last, and come back in any order."""

    ahead = 4

    def __init__(self, path: Path, lock: threading.Lock, underway: list[int]) -> None:
        self._file = FileBlob(path)
        self.size = self._file.size
        self._lock, self._underway = lock, underway

    def read(self, start: int, end: int) -> bytes | memoryview:
        with self._lock:
            self._underway[0] += 1
            self._underway[1] = max(self._underway[:2])
            self._underway[2] += 1
        threading.Event().wait(0.002 * (start % 3))
        with self._lock:
            self._underway[0] -= 1
        return self._file.read(start, end)


def test_reads_ahead_are_bounded_and_change_no_byte(incoming: TensorFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = many(tmp_path, 20)
    weights = weigh(updates, "examples")
    weighted_mean(incoming, updates, weights, tmp_path / "mapped")
    monkeypatch.setattr(summation, "WINDOW", 20)
    underway, lock = [0, 0, 0], threading.Lock()
    remote = {s: Update(u.header, open_tensor_file(Slow(tmp_path / f"{s}.update", lock, underway))) for s, u in updates.items()}
    headers = underway[2]
    weighted_mean(incoming, remote, weights, tmp_path / "remote")
    assert (tmp_path / "mapped").read_bytes() == (tmp_path / "remote").read_bytes()
    assert 1 < underway[1] <= Slow.ahead
    assert underway[2] - headers == 20 * 3, "each byte of each file is asked for once, in as many windows as it has"


@pytest.mark.parametrize("place", [0, 3, 4, -1])
def test_a_flipped_bit_is_found_wherever_it_is(incoming: TensorFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    monkeypatch.setattr(summation, "WINDOW", 10)  # tensors run over the borders of windows, and windows over those of tensors
    updates = many(tmp_path, 3)
    entries = list(updates["0001"].file.entries.values())
    at = entries[place].start if place >= 0 else entries[0].end - 1
    data = bytearray((tmp_path / "0001.update").read_bytes())
    data[at] ^= 1
    (tmp_path / "0001.update").write_bytes(data)
    with pytest.raises(UpdateRefused, match="does not have the digest") as caught:
        weighted_mean(incoming, updates, weigh(updates, "examples"), tmp_path / "out")
    assert caught.value.silo == "0001"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_by_tensor(incoming: TensorFile, tmp_path: Path, bad: float) -> None:
    updates = many(tmp_path, 3)
    tensors = arrays(1)
    tensors["b"][3] = bad
    path = tmp_path / "0001.update"
    header = updates["0001"].header.model_copy(
        update={"tensors": {n: hashlib.sha256(to_bytes(a, "F32")).hexdigest() for n, a in tensors.items()}}
    )
    write_tensor_file(path, SHAPES, "F32", ((n, to_bytes(a, "F32")) for n, a in sorted(tensors.items())), {})
    updates["0001"] = Update(header, open_tensor_file(path))
    with pytest.raises(UpdateRefused, match=r"silo '0001': .*tensor 'b' is not finite"):
        weighted_mean(incoming, updates, weigh(updates, "examples"), tmp_path / "out")


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("size", [1, 100, 8192, 30000, 1 << 17])
def test_squares_are_right_whatever_their_size(scale: float, size: int) -> None:
    x = (scale * np.random.default_rng(size).standard_normal(size)).astype(np.float32)
    assert squares(x) == pytest.approx(float(np.sum(np.square(x, dtype=np.float64))), rel=4e-7)
    x[:] = scale / 3  # rounding errors that all go one way
    assert squares(x) == pytest.approx(size * float(x[0]) ** 2, rel=4e-6)
    for bad in (np.nan, np.inf, -np.inf):
        x[size // 2] = bad
        assert not np.isfinite(squares(x))
    assert squares(np.zeros(size, np.float32)) == 0.0


def test_an_honest_norm_is_never_doubted_for_how_it_was_added_up(
    incoming: TensorFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the quick sum does not confirm the header, the slow one decides."""
    updates = many(tmp_path, 3)
    monkeypatch.setattr(summation, "squares", lambda x: 1.01 * squares(x))
    found = weighted_mean(incoming, updates, weigh(updates, "examples"), tmp_path / "out")
    assert found.norms == {s: pytest.approx(u.header.norm, rel=1e-12) for s, u in updates.items()}


def peak(work: Callable[[], object]) -> int:
    work()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_grows_neither_with_silos_nor_with_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    window = 1 << 20  # bytes
    monkeypatch.setattr(summation, "WINDOW", window // 4)
    monkeypatch.setattr(summation, "BLOCK", window // 16)
    big = {"w": (1200, 1000)}  # 4.8 MB, five windows
    for k in range(3):
        update(tmp_path, f"{k:02d}", arrays(k, big))
    write_tensor_file(tmp_path / "in", big, "F32", ((n, to_bytes(a, "F32")) for n, a in arrays(9, big).items()), {})
    file = open_tensor_file(tmp_path / "in")

    def work(count: int) -> None:
        updates = {}
        for k in range(count):
            found = open_tensor_file(tmp_path / f"{k % 3:02d}.update")
            header = Header.model_validate_json(found.metadata["silotune"])
            updates[f"{k:02d}"] = Update(header.model_copy(update={"silo": f"{k:02d}"}), found)
        weighted_mean(file, updates, weigh(updates, "examples"), tmp_path / "out")

    few, more = peak(lambda: work(3)), peak(lambda: work(48))
    assert more - few < 1.5 * window, "one accumulator more, for the second level"
    assert more < 6 * window


def test_a_small_file_takes_little_memory(tmp_path: Path, incoming: TensorFile) -> None:
    updates = many(tmp_path, 40)
    assert peak(lambda: weighted_mean(incoming, updates, weigh(updates, "examples"), tmp_path / "out")) < 1 << 20


@pytest.mark.parametrize(
    ("groups", "rule"),
    [
        ([["a", "c"], ["b", "d"]], "consecutive groups of silos, 'b' comes before 'c'"),
        ([["a"], ["a", "b"]], "consecutive groups"),
        ([], "one or more"),
        ([[]], "one or more"),
    ],
)
def test_partial_sums_must_fit_together(incoming: TensorFile, tmp_path: Path, groups: list[list[str]], rule: str) -> None:
    partials = [(Partial(dict.fromkeys(g, 1.0), dict.fromkeys(g, 1.0)), incoming) for g in groups]
    for combine in (lambda: combine_partials(partials, tmp_path / "out"), lambda: mean_of_partials(incoming, partials, tmp_path / "out")):
        with pytest.raises(ValueError, match=rule):
            combine()


def test_a_group_has_its_size(tmp_path: Path) -> None:
    updates = many(tmp_path, 3)
    for group in ({}, updates):
        with pytest.raises(ValueError, match=f"from 1 to 2 members, has {len(group)}"):
            partial_sum(group, weigh(updates, "uniform"), tmp_path / "out", fan_in=2)
    with pytest.raises(ValueError, match="fan_in: must be 2 or more"):
        next(sums([Term(updates["0000"].file, 1.0)], 1))
