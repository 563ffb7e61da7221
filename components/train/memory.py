"""What a silo's own rounds have added up to, for strategies whose local term needs it: its dual (feddyn), its control variate (scaffold).

Only what was committed counts, and only what the global at hand was made through: an update that came too late, or that a rollback has left
behind, never happened. Under other terms of aggregation the sum begins anew, as the server's state does. So it follows from the store alone.
A copy in the silo's folder saves adding all of it again each round.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import numpy as np

from silotune.components import opening
from silotune.components.errors import RefusedError
from silotune.components.federation import Agreement, canonical_json
from silotune.components.learning.aggregation.summation import MEMORY
from silotune.components.learning.tensor_file import MalformedFile, open_tensor_file, to_bytes, write_tensor_file
from silotune.components.protocol import Commit
from silotune.components.rounds import Rounds
from silotune.components.store.content import CorruptObject
from silotune.components.store.object_store import ObjectMissing

FILE = "memory.safetensors"  # in the silo's folder
THROUGH = "through"  # in its metadata: digest of the last commit that it holds
TERMS = "terms"  # in its metadata: digest of the terms that it was added up under


def own_sum(rounds: Rounds, latest: Commit, agreement: Agreement, silo: str, home: Path) -> dict[str, np.ndarray]:
    """Σ over the silo's committed rounds under the terms at hand, by tensor name, float32; empty where there are none.

    Args:
        latest: the commit that made the incoming global.
        agreement: of the open round. With scaffold the ``memory.…`` tensors of updates are added up, else the differences themselves.

    Raises:
        RefusedError: an update that belongs to it is gone or damaged, and the silo's folder holds no copy.
    """
    terms = agreement.aggregation
    memory, digest = terms.traits.local == "control", hashlib.sha256(canonical_json([terms.model_dump(), agreement.parts])).hexdigest()
    kept, through = _kept(home, digest)
    total: dict[str, np.ndarray] = {}
    missed: list[Commit] = []
    for commit in opening.under(rounds, latest, agreement):
        if commit.digest == through:
            total = kept
            break
        if silo in commit.contributions:
            missed.append(commit)
    for commit in reversed(missed):
        for name, array in _update(rounds, commit, silo, home, memory).items():
            total[name] = total[name] + array if name in total else array
    encoded = ((name, to_bytes(array, "F32")) for name, array in sorted(total.items()))
    write_tensor_file(home / FILE, {n: a.shape for n, a in total.items()}, "F32", encoded, {THROUGH: latest.digest, TERMS: digest})
    return total


def _kept(home: Path, terms: str) -> tuple[dict[str, np.ndarray], str]:
    with suppress(OSError, MalformedFile):
        file = open_tensor_file(home / FILE)
        if file.metadata.get(TERMS) == terms:
            return file.read_all(), file.metadata.get(THROUGH, "")
    return {}, ""


def _update(rounds: Rounds, commit: Commit, silo: str, home: Path, memory: bool) -> dict[str, np.ndarray]:
    scratch = home / ".own-update.safetensors"
    try:
        file = open_tensor_file(rounds.fetch_object(commit.contributions[silo].object, scratch, silo))
        return {n.removeprefix(MEMORY): file.read(n) for n in file.entries if n.startswith(MEMORY) == memory}
    except (ObjectMissing, CorruptObject) as error:
        raise RefusedError(
            f"silo {silo!r}: its update of round {commit.round} is needed to know what its own rounds add up to, and cannot be had: {error}; "
            "restore it from a backup, or choose a strategy without memory",
            "own rounds lost",
        ) from None
    finally:
        scratch.unlink(missing_ok=True)
