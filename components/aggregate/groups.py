"""Groups of a round's updates whose sums are made ahead of the mean, each by a combine box, and how aggregate comes by them.

A stored sum is used where its record, signed by the coordinator, says that it is of exactly the manifests that stand now, each with the weight that
it has now. Whether its bytes are those that were stored is found while they are read. Any other group is summed from its updates: what stored
sums there are decides how long aggregation takes, and nothing about its result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from silotune.components.aggregate.intake import Intake
from silotune.components.errors import RefusedError, SilotuneError
from silotune.components.learning.aggregation.summation import SumDamaged
from silotune.components.learning.aggregation.tree import Partial, Stored
from silotune.components.learning.tensor_file import MalformedFile, open_tensor_file
from silotune.components.process.progress import tell
from silotune.components.protocol import Turn
from silotune.components.rounds import Rounds
from silotune.components.store.object_store import ObjectMissing
from silotune.components.store.store_blob import StoreBlob


def stored_sums(
    rounds: Rounds, turn: Turn, groups: Sequence[Sequence[str]], weights: Mapping[str, float], intake: Intake
) -> list[Stored]:  # fmt: skip
    """Of all groups that have one."""
    found = []
    for number, group in enumerate(groups, 1):
        members = {silo: weights[silo] for silo in group if silo in weights}
        if members and (one := stored_sum(rounds, turn, number, members, intake)):
            found.append(one)
    return found


def stored_sum(rounds: Rounds, turn: Turn, number: int, weights: Mapping[str, float], intake: Intake) -> Stored | None:
    """The sum of a group's accepted updates, of this attempt or an earlier one; None where there is none that can be used.

    Args:
        weights: of the group's accepted updates.
    """
    wanted = {silo: (intake.manifests[silo].digest, weight) for silo, weight in weights.items()}
    shapes = intake.expected[min(weights)].schema
    for attempt in range(turn.attempt, 0, -1):
        try:
            record = rounds.partial(turn.round, attempt, number)
            if record is None or {silo: (s.manifest, s.weight) for silo, s in record.silos.items()} != wanted:
                continue
            file = open_tensor_file(rounds.partial_blob(record.object))
        except (RefusedError, ObjectMissing, MalformedFile) as error:
            tell(intake.box, "warned", detail=f"group {number}: its stored sum of attempt {attempt} is passed over: {error}")
            continue
        if {name: ("F32", shape) for name, shape in shapes.items()} == {n: (e.dtype, list(e.shape)) for n, e in file.entries.items()}:
            norms = {silo: s.norm for silo, s in record.silos.items()}
            return Stored(Partial(dict(weights), norms), file, record.object)
    return None


def without(rounds: Rounds, stored: Sequence[Stored], error: SilotuneError) -> list[Stored]:
    """The stored sums that an error is not about, which came while all were read; a damaged one is deleted, so that it can be stored again."""
    if isinstance(error, SumDamaged):
        rounds.store.delete(rounds.partial_key(error.digest))
        return [s for s in stored if s.digest != error.digest]
    if isinstance(error, ObjectMissing):
        return [s for s in stored if not (isinstance(s.file.blob, StoreBlob) and s.file.blob.key == error.key)]
    return list(stored)
