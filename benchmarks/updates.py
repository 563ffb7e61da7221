"""Updates to aggregate: signed files of random numbers, in twenty tensors each, and the global that they move."""

from __future__ import annotations

import base64
from pathlib import Path


def shapes_of(numbers: int) -> dict[str, tuple[int, ...]]:
    """Twenty tensors."""
    return {f"layers.{n:02d}.weight": (numbers // 20,) for n in range(20)}


def make_updates(folder: Path, count: int, numbers: int) -> None:
    import numpy as np
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from silotune.components.learning.tensor_file import to_bytes, write_tensor_file
    from silotune.components.learning.update import Codec, Header, write_update

    key, shapes = Ed25519PrivateKey.generate(), shapes_of(numbers)
    for k in range(count):
        header = Header(
            federation="f", agreement="a", round=1, silo=f"{k:04d}", plan="p", base="b", incoming="i", examples=100 + k, tokens=1, steps=1,
            cursor=1, loss=1.0, norm=0.0, codec=Codec(name="float32"), tensors={},
        )  # fmt: skip
        rng = np.random.default_rng(k)
        tensors = {n: 1e-3 * rng.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}
        write_update(folder / f"{k:04d}", header, tensors, lambda message: base64.b64encode(key.sign(message)).decode())
    zeros = ((n, to_bytes(np.ones(s, np.float32), "F32")) for n, s in sorted(shapes.items()))
    write_tensor_file(folder / "incoming", shapes, "F32", zeros, {"format": "pt"})
    (folder / "key").write_bytes(key.public_key().public_bytes_raw())
