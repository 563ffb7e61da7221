"""Masked vectors add up to exactly what the plain ones add up to, at every number of silos and for every pattern of dropouts."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.components.learning.blob import FileBlob
from silotune.components.learning.privacy import masked_vector, masking
from silotune.components.learning.privacy.agreed_keys import public_key
from silotune.components.learning.privacy.fixed_point import FixedPoint, clipping_factor
from silotune.components.learning.privacy.masked_vector import Vector, VectorDamaged, numbers, write_sum, write_vector
from silotune.components.learning.privacy.masking import Mask, masked, pair_mask, sign_of
from silotune.components.learning.tensor_file import open_tensor_file, to_bytes, write_tensor_file

SHAPES = {"a": (3, 5), "b": (0, 2), "c": (7,)}


class Party:
    """A silo's masks, from keys that are made up here."""

    def __init__(self, name: str, seeds: dict[str, bytes], pairs: dict[frozenset[str], bytes]) -> None:
        self.name, self._seeds, self._pairs = name, seeds, pairs

    def masks(self, roster: tuple[str, ...]) -> list[Mask]:
        shared = [Mask(self._pairs[frozenset((self.name, other))], sign_of(self.name, other)) for other in roster if other != self.name]
        return [Mask(self._seeds[self.name], 1), *shared]


def parties(names: tuple[str, ...], rng: np.random.Generator) -> tuple[dict[str, Party], dict[str, bytes], dict[frozenset[str], bytes]]:
    seeds = {n: rng.bytes(32) for n in names}
    pairs = {frozenset(p): rng.bytes(32) for p in itertools.combinations(names, 2)}
    return {n: Party(n, seeds, pairs) for n in names}, seeds, pairs


def unmasking(survivors: set[str], dropped: set[str], seeds: dict[str, bytes], pairs: dict[frozenset[str], bytes]) -> list[Mask]:
    left = [Mask(seeds[s], -1) for s in survivors]
    return left + [Mask(pairs[frozenset((s, d))], -sign_of(s, d)) for s in survivors for d in dropped]


def apply(vector: np.ndarray, masks: list[Mask]) -> np.ndarray:
    return next(iter(masked([vector.copy()], masks)))


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
@pytest.mark.parametrize("count", range(3, 11))
def test_the_sum_is_exact_for_every_pattern_of_dropouts(count: int, dtype: str) -> None:
    names = tuple(f"s{n:02d}" for n in range(count))
    rng = np.random.default_rng(count)
    everyone, seeds, pairs = parties(names, rng)
    plain = {n: rng.integers(0, 2 ** (8 * np.dtype(dtype).itemsize), 11, dtype=dtype) for n in names}
    sent = {n: apply(plain[n], everyone[n].masks(names)) for n in names}
    for size in range(1, count + 1):
        for survivors in itertools.combinations(names, size):
            total = np.zeros(11, dtype)
            for n in survivors:
                total += sent[n]
            dropped = set(names) - set(survivors)
            found = apply(total, unmasking(set(survivors), dropped, seeds, pairs))
            expected = np.zeros(11, dtype)
            for n in survivors:
                expected += plain[n]
            assert (found == expected).all()


def test_a_vector_that_comes_late_stays_covered() -> None:
    """Its pairs' keys are known, since it was taken for dropped; its own seed is not, and every byte of it is as likely as any other."""
    names = ("a", "b", "c", "d")
    rng = np.random.default_rng(3)
    everyone, seeds, pairs = parties(names, rng)
    late = apply(np.zeros(1 << 16, "<u4"), everyone["d"].masks(names))
    stripped = apply(late, [Mask(pairs[frozenset(("d", o))], -sign_of("d", o)) for o in "abc"])
    assert (stripped == apply(np.zeros(1 << 16, "<u4"), [Mask(seeds["d"], 1)])).all()
    counts = Counter(stripped.tobytes())
    expected = 4 * (1 << 16) / 256
    assert sum((counts[b] - expected) ** 2 / expected for b in range(256)) < 350, "chi-square with 255 degrees; 350 has p < 1e-4"


def test_masks_are_a_stream_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    key, vector = rng.bytes(32), rng.integers(0, 2**32, 1000, dtype="<u4")
    whole = apply(vector, [Mask(key, 1)])
    pieces = list(masked([part.copy() for part in np.split(vector, [1, 3, 500, 777])], [Mask(key, 1)]))
    assert (np.concatenate(pieces) == whole).all()
    monkeypatch.setattr(masking, "BLOCK", 7)
    assert (apply(vector, [Mask(key, 1)]) == whole).all()
    assert (apply(whole, [Mask(key, -1)]) == vector).all()


def tensor_file(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    encoded = ((name, to_bytes(array, "F32")) for name, array in sorted(tensors.items()))
    write_tensor_file(path, {n: a.shape for n, a in tensors.items()}, "F32", encoded, {})
    return path


@pytest.mark.parametrize(("bits", "width"), [(24, 32), (29, 64), (40, 64)])
def test_files_add_up_to_the_quantised_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, width: int) -> None:
    for module in (masking, masked_vector):
        monkeypatch.setattr(module, "BLOCK", 4)  # so that blocks run across tensors
    names, rng = ("a", "b", "c", "d"), np.random.default_rng(bits)
    everyone, seeds, pairs = parties(names, rng)
    point = FixedPoint(clip=2.0, bits=bits, silos=4)
    assert point.width == width
    vectors, plain = [], []
    for n in names:
        tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
        norm = float(np.sqrt(sum((t.astype(np.float64) ** 2).sum() for t in tensors.values())))
        factor = clipping_factor(norm, 2.0)
        flat = np.concatenate([tensors[name].reshape(-1) for name in sorted(SHAPES)]).astype(np.float64)
        plain.append(np.rint(flat * factor / 2.0 * 2**bits).astype(np.int64))
        file = open_tensor_file(tensor_file(tmp_path / f"{n}.update", tensors))
        digest = write_vector(tmp_path / n, numbers(file, point, factor), everyone[n].masks(names))
        vectors.append(Vector(n, FileBlob(tmp_path / n), digest))
    survivors = vectors[:3]
    norm = write_sum(tmp_path / "sum", survivors, unmasking({"a", "b", "c"}, {"d"}, seeds, pairs), point, SHAPES)
    found = open_tensor_file(tmp_path / "sum").read_all()
    expected = sum(plain[:3]) * (2.0 / 2**bits)
    assert (np.concatenate([found[name].reshape(-1) for name in sorted(SHAPES)]) == expected.astype(np.float32)).all()
    assert norm == pytest.approx(float(np.linalg.norm(expected)))
    assert {n: t.shape for n, t in found.items()} == SHAPES


def test_a_vector_that_is_not_what_was_signed_is_told_by_silo(tmp_path: Path) -> None:
    point, vectors = FixedPoint(1.0, 24, 3), []
    for n in ("a", "b"):
        file = open_tensor_file(tensor_file(tmp_path / f"{n}.update", {"w": np.ones(9, np.float32) / 9}))
        digest = write_vector(tmp_path / n, numbers(file, point, 1.0), [])
        vectors.append(Vector(n, FileBlob(tmp_path / n), digest))
    data = bytearray((tmp_path / "b").read_bytes())
    data[5] ^= 1
    (tmp_path / "b").write_bytes(data)
    with pytest.raises(VectorDamaged, match="'b'"):
        write_sum(tmp_path / "sum", vectors, [], point, {"w": (9,)})
    (tmp_path / "b").write_bytes(data[:-1])
    with pytest.raises(VectorDamaged, match="'b'"):
        write_sum(tmp_path / "sum", [Vector("b", FileBlob(tmp_path / "b"), vectors[1].digest)], [], point, {"w": (9,)})
    assert not (tmp_path / "sum").exists()


@settings(max_examples=60, deadline=None)
@given(silos=st.integers(1, 1 << 20), bits=st.integers(8, 40))
def test_the_ring_holds_the_worst_sum(silos: int, bits: int) -> None:
    point = FixedPoint(1.0, bits, silos)
    worst = silos * (1 << bits)
    assert worst < 1 << (point.width - 1)
    assert point.width == 32 or worst >= 1 << 31, "no wider than it must be"
    one = point.encode(np.array([-1.0, 1.0], np.float32), 1.0)
    total = (one.astype(object) * silos % (1 << point.width)).astype(point.dtype)
    assert point.decode(total).tolist() == [-float(silos), float(silos)]


def test_numbers_are_rounded_to_half_a_quantum_and_held_within_the_clip() -> None:
    rng = np.random.default_rng(0)
    point = FixedPoint(3.0, 10, 4)
    x = rng.uniform(-3, 3, 5000).astype(np.float32)
    assert np.abs(point.decode(point.encode(x, 1.0)) - x).max() <= point.quantum / 2
    assert np.abs(point.decode(point.encode(x, 0.25)) - 0.25 * x.astype(np.float64)).max() <= point.quantum / 2
    assert point.decode(point.encode(np.array([7.0, -7.0], np.float32), 1.0)).tolist() == [3.0, -3.0]
    with pytest.raises(ValueError, match="factor"):
        point.encode(x, 1.5)
    with pytest.raises(ValueError, match="does not fit into 64 bits"):
        FixedPoint(1.0, 40, 1 << 23)


@pytest.mark.parametrize(("norm", "expected"), [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (4.0, 0.5)])
def test_an_update_is_scaled_down_to_the_clip_and_never_up(norm: float, expected: float) -> None:
    assert clipping_factor(norm, 2.0) == expected


def test_keys_of_another_length_are_no_masks() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Mask(b"short", 1)
    with pytest.raises(ValueError, match="shares no mask with itself"):
        sign_of("a", "a")


def test_a_silo_that_shows_anothers_key_in_another_spelling_cancels_no_mask() -> None:
    """X25519 ignores a key's highest bit (RFC 7748, section 5). Without the names in them, both masks would be the same numbers with opposite signs."""
    bo, ada = os.urandom(32), bytearray(public_key(os.urandom(32)))
    copied = bytes([*ada[:31], ada[31] ^ 0x80])
    both = [pair_mask("bo", "ada", bo, bytes(ada), b"here"), pair_mask("bo", "di", bo, copied, b"here")]
    assert apply(np.zeros(11, "<u4"), both).any()
