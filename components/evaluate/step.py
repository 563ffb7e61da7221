"""evaluate: in a silo, complete the last round's validation metrics, and read the test split, which no other box does.

Scored are the initial global, the best one so far by pooled validation loss, and the last one. What has a score is not scored again: on valid
the first two have theirs from training, unless the silo's records have changed since.

    python -m silotune.components.evaluate.step FEDERATION SILO TURN
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from silotune.components import base_model, launcher
from silotune.components.federation import Federation, Silo
from silotune.components.preprocess.step import CANARIES
from silotune.components.process.progress import Pulse, beating
from silotune.components.protocol import Commit, Exposed, Split
from silotune.components.rounds import Rounds
from silotune.components.secure_sum import mask_secrets
from silotune.components.silo_job import one_at_a_time, silo_home, status_text
from silotune.components.steward.admission import admit
from silotune.components.train.step import check_terms, evaluate_split, open_split


def run(federation: str, silo: str, turn: str) -> str:
    """As a pipeline task: launched. ``turn`` only orders it behind the last round."""
    return launcher.launch("evaluate", federation, silo, turn)


def work(federation_file: str, silo_id: str, turn: str) -> str:
    """Returns the status."""
    federation = Federation.load(federation_file)
    silo = federation.silo(silo_id)
    rounds = Rounds.of(federation)
    home = silo_home(federation, silo)
    latest = rounds.latest()
    if latest is None or silo_id not in rounds.agreement(latest.agreement).silos:
        return status_text(silo_id, "ok", "nothing to do")
    pulse = Pulse(home, "evaluate", latest.round)
    with one_at_a_time(home, pulse):
        if (home / mask_secrets.FOLDER).exists():  # no next round will do it
            mask_secrets.MaskSecrets(home).forget(latest.round + 1)
        return _score(federation, rounds, latest, silo, home, pulse)


def _score(federation: Federation, rounds: Rounds, latest: Commit, silo: Silo, home: Path, pulse: Pulse) -> str:
    silo_id, agreement = silo.id, rounds.agreement(latest.agreement)
    policy = admit(federation, agreement, silo_id)
    if policy and not policy.scores:
        return status_text(silo_id, "ok", "its policy keeps its scores")
    # The commit names the best by what was known then; the last one is the only other that the last scores can make the best.
    globals_ = sorted({rounds.commit(0).outgoing, rounds.commit(latest.best).outgoing, latest.outgoing})
    present: tuple[Split, ...] = ("valid", "test") if silo.test else ("valid",)
    shards = {split: open_split(home, split) for split in present}
    sizes = {split: len(shard) for split, shard in shards.items()}
    sizes["valid"] = min(sizes["valid"], agreement.evaluation.max_examples or sizes["valid"])
    splits = [split for split, size in sizes.items() if policy is None or policy.scored(size)]
    wanted = [(split, g) for split in splits for g in globals_ if rounds.evaluation(g, silo_id, split, shards[split].digest) is None]
    watched = _unmeasured(rounds, latest, silo, home)
    if not wanted and not watched:
        return status_text(silo_id, "ok")

    from silotune.components.learning import model as models
    from silotune.components.learning.tensor_file import open_tensor_file

    with beating("loading"):
        base = base_model.resolve(federation.model.base, home / "base")
    check_terms(federation, agreement, base, silo_id)
    pad = models.pad_id(models.load_tokenizer(base.folder))
    with models.kept():
        for outgoing in dict.fromkeys([*(g for _, g in wanted), *watched]):
            with beating("fetching"):
                state = open_tensor_file(rounds.fetch_object(outgoing, home / "incoming.safetensors")).read_all()
            model = models.load_with_state(base.folder, agreement.model, state)
            for split in (s for s, g in wanted if g == outgoing):
                evaluate_split(rounds, agreement, model, outgoing, shards[split], silo_id, split, pad, latest.round, pulse)
            if outgoing in watched:
                with beating("evaluating"):
                    _measure(rounds, model, outgoing, silo, home, pad, latest.round)
    return status_text(silo_id, "ok")


def _unmeasured(rounds: Rounds, latest: Commit, silo: Silo, home: Path) -> list[str]:
    """The globals that may be exported, and whose exposure of what the silo has planted is not measured yet."""
    if not silo.canaries:
        return []
    planted = open_split(home, CANARIES).digest
    found = {rounds.commit(latest.best).outgoing, latest.outgoing}
    return sorted(g for g in found if (e := rounds.exposed(g).get(silo.id)) is None or e.planted != planted)


def _measure(rounds: Rounds, model: object, outgoing: str, silo: Silo, home: Path, pad: int, turn: int) -> None:
    """Tell how well a global knows the silo's canaries. It is one number about made-up records."""
    import numpy as np

    from silotune.components.learning.leakage.canaries import planted
    from silotune.components.learning.leakage.exposure import exposure
    from silotune.components.learning.leakage.losses import example_losses

    shard, made = open_split(home, CANARIES), planted(home, silo.canaries)
    if not made.coins.any():
        return
    losses = np.nan_to_num(example_losses(model, shard, np.arange(len(shard)), pad), nan=np.inf)
    found = exposure(losses[made.into], losses[made.out])
    rounds.write_exposed(
        Exposed(
            round=turn, silo=silo.id, outgoing=outgoing, planted=shard.digest, canaries=found.canaries, references=found.references,
            exposure=found.mean, at=time.time(),
        )
    )  # fmt: skip


if __name__ == "__main__":
    print(work(*sys.argv[1:]))
