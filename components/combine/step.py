"""combine: sum the updates of one group of silos ahead of aggregate, which then reads one file for the whole group.

Where silos are more than ``aggregation.fan_in`` and the terms allow it, their updates are summed in groups (`Aggregation.groups`), whoever does
it. This box does it for one group, at the same time as others do for theirs: it checks each update as aggregate would, refuses what must be
refused, stores the sum and a signed record of what it is made of. Nothing depends on it: a group without a sum, or with one that is not of the
updates that stand now, is summed by aggregate itself, to the same bytes.

    python -m silotune.components.combine.step FEDERATION "round:1 attempt:1" 2
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from silotune.components.aggregate import groups
from silotune.components.aggregate.intake import Intake
from silotune.components.errors import RefusedError
from silotune.components.federation import Federation
from silotune.components.learning.aggregation.combination import memory_weights, summands
from silotune.components.learning.aggregation.tree import partial_sum
from silotune.components.learning.update import UpdateRefused
from silotune.components.process import child
from silotune.components.process.progress import tell
from silotune.components.protocol import Partial, Summand, Turn, UpdateManifest
from silotune.components.rounds import Rounds
from silotune.components.store.object_store import ObjectMissing

SUM = "sum.safetensors"


def run(federation: str, turn: str, group: str, statuses: list[str]) -> str:
    """As a pipeline task; nothing at all where no round is open.

    Args:
        group: its number among those of the plan, from 1.
        statuses: of the group's silos; they are waited for, and the store says what they have delivered.
    """
    if Turn.parse(turn).done:
        return turn
    return child.coordinate("combine", federation, turn, group, failed=f"group {group} failed")


def work(federation_file: str, turn_text: str, group: str) -> str:
    """Returns how it went, in a few words.

    Raises:
        RefusedError: the round was never opened, or another record stands in the place of this group's.
    """
    turn, number = Turn.parse(turn_text), int(group)
    federation = Federation.load(federation_file)
    rounds = Rounds.of(federation)
    plan = rounds.plan(turn.round)
    if plan is None:
        raise RefusedError(f"round {turn.round} was never opened; run again")
    latest = rounds.latest()
    if latest is not None and latest.round >= turn.round:
        return f"group {number} ok: the round is committed"
    agreement = rounds.agreement(plan.agreement)
    terms = agreement.aggregation
    cut = terms.groups(plan.participants)
    if not 1 <= number <= len(cut):  # the federation has other silos, or other terms, than when the pipeline was compiled
        return f"group {number} ok: the plan has {len(cut)} groups"
    federation.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=federation.work) as name:
        folder = Path(name)
        intake = Intake.of("combine", rounds, plan, agreement, _delivered(rounds, turn.round, cut[number - 1]), folder)
        while intake.accepted:
            weights, _ = summands(terms, intake.accepted, agreement.training_of)
            if groups.stored_sum(rounds, turn, number, weights, intake):
                return f"group {number} ok: it is summed already"
            try:
                made = partial_sum(
                    intake.accepted, weights, folder / SUM, fan_in=terms.fan_in, memory=memory_weights(terms, agreement.parts)
                )
                break
            except (UpdateRefused, ObjectMissing) as error:
                intake.mend(error)
        else:
            return f"group {number} ok: no update to sum"
        digest = rounds.put_partial(folder / SUM)
    silos = {s: Summand(manifest=intake.manifests[s].digest, weight=made.weights[s], norm=made.norms[s]) for s in made.weights}
    record = Partial(
        round=turn.round, attempt=turn.attempt, group=number, object=digest, silos=silos, refused=intake.refused, at=time.time()
    )  # fmt: skip
    standing = rounds.write_partial(record)
    if (standing.object, standing.silos) != (digest, silos):
        raise RefusedError(f"group {number}: another sum was stored in this attempt; aggregate makes its own")
    return f"group {number} ok: {len(silos)} of {len(cut[number - 1])} updates"


def _delivered(rounds: Rounds, number: int, silos: tuple[str, ...]) -> dict[str, UpdateManifest]:
    """The manifests that stand, by silo. Those that cannot be believed are aggregate's to refuse."""
    found = {}
    for silo in silos:
        try:
            if manifest := rounds.update(number, silo):
                found[silo] = manifest
        except RefusedError as error:
            tell("combine", "warned", silo, detail=str(error))
    return found


if __name__ == "__main__":
    print(work(*sys.argv[1:]))
