"""train: in a silo, the incoming global is evaluated on the silo's valid split, trained on its records, and the difference is sent.

python -m silotune.components.train.step FEDERATION SILO "round:1 attempt:1"
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from silotune.components import base_model, silo_job
from silotune.components.errors import FederationError, RefusedError
from silotune.components.federation import Agreement, Federation
from silotune.components.progress import Pulse
from silotune.components.rounds import Evaluation, Plan, Report, Rounds, Split, Turn, UpdateManifest
from silotune.components.silo_job import silo_home, status_text

if TYPE_CHECKING:
    from silotune.components.learning.tokens import Shard


def run(federation: str, silo: str, turn: str) -> str:
    """As a pipeline task: supervised, and nothing at all where no round is open or the silo has delivered."""
    parsed = Turn.parse(turn)
    if parsed.done:
        return status_text(silo, "ok", "nothing to do")
    return silo_job.supervise("train", federation, silo, turn, turn=parsed)


def work(federation_file: str, silo_id: str, turn_text: str) -> str:
    """One round of local training; returns the status."""
    began = time.monotonic()
    federation = Federation.load(federation_file)
    rounds = Rounds.of(federation)
    turn = Turn.parse(turn_text)
    if turn.done:
        return status_text(silo_id, "ok", "nothing to do")
    home = silo_home(federation, federation.silo(silo_id))
    plan = rounds.plan(turn.round)
    if plan is None or silo_id not in plan.participants:
        raise RefusedError(f"silo {silo_id!r}: round {turn.round} does not ask it; wait for a plan that does", "not a participant")
    for attempt in rounds.attempts(turn.round):
        if attempt.attempt == turn.attempt and silo_id in attempt.missing:
            raise RefusedError(f"silo {silo_id!r}: was not ready when this attempt began; run again once it is", attempt.missing[silo_id])
    if rounds.update(turn.round, silo_id) is None:
        agreement = rounds.agreement(plan.agreement)
        manifest = _train(federation, rounds, plan, agreement, silo_id, home)
        rounds.write_report(_report(turn, rounds.write_update(manifest), time.monotonic() - began, rounds.object_size(plan.incoming)))
    return status_text(silo_id, "ok")


def _train(federation: Federation, rounds: Rounds, plan: Plan, agreement: Agreement, silo_id: str, home: Path) -> UpdateManifest:
    import torch

    from silotune.components.learning import model as models
    from silotune.components.learning import training
    from silotune.components.learning.batches import seed_of
    from silotune.components.learning.tensor_file import open_tensor_file
    from silotune.components.learning.update import Codec, Header, write_update

    base = base_model.resolve(federation.model.base, home / "base")
    check_terms(federation, agreement, base, silo_id)
    terms = agreement.training_of(silo_id)
    max_length = agreement.data["max_length"]
    tokenizer = models.load_tokenizer(base.folder)
    pad = models.pad_id(tokenizer)
    before = open_tensor_file(rounds.fetch_object(plan.incoming, home / "incoming.safetensors")).read_all()
    model = models.load_with_state(base.folder, agreement.model, before)

    evaluate_split(rounds, agreement, model, plan.incoming, open_split(home, "valid"), silo_id, "valid", pad)
    shard = open_split(home, "train")
    stretch = training.Stretch((agreement.federation, terms.seed, silo_id), plan.participants[silo_id].cursor)
    torch.manual_seed(seed_of(plan.agreement, plan.round, silo_id, "dropout"))
    pulse = Pulse(home, "train", plan.round)
    trained = training.train(model, shard, stretch, terms, plan.learning_rate, max_length, pad, pulse)
    delta = training.update_of(before, models.trainable_state(model))

    header = Header(
        federation=federation.name, agreement=plan.agreement, round=plan.round, silo=silo_id, plan=plan.digest, base=plan.base,
        incoming=plan.incoming, examples=trained.examples, tokens=trained.tokens, steps=trained.steps, cursor=trained.cursor,
        loss=trained.loss, norm=0.0, codec=Codec(name=agreement.communication.codec), tensors={},
    )  # fmt: skip
    path = home / "update.safetensors"
    header = write_update(path, header, delta)
    return UpdateManifest(
        round=plan.round, silo=silo_id, agreement=plan.agreement, plan=plan.digest, incoming=plan.incoming,
        object=rounds.put_object(path), bytes=path.stat().st_size, examples=header.examples, tokens=header.tokens, steps=header.steps,
        cursor=header.cursor, codec=header.codec.name, norm=header.norm, loss=header.loss,
    )  # fmt: skip


def check_terms(federation: Federation, agreement: Agreement, base: base_model.Base, silo_id: str) -> None:
    """A silo works only on the base and the terms that its own copy of the federation file names.

    Raises:
        RefusedError: they differ.
    """
    mine = federation.agreement(base.digest, base.tokenizer)
    if odd := agreement.changes(mine):
        raise RefusedError(
            f"silo {silo_id!r}: the plan's terms differ from this silo's federation file in {', '.join(odd)}; bring the two together",
            "base model differs" if set(odd) & {"base", "tokenizer"} else "terms differ",
        )


def open_split(home: Path, split: str) -> Shard:
    """The shard that preprocess made. Raises FederationError where it has not."""
    import json

    from silotune.components.learning.tokens import open_shard

    try:
        return open_shard(home / json.loads((home / "data.json").read_text())[split])
    except (FileNotFoundError, KeyError):
        raise FederationError(f"{home}: holds no {split} split; run preprocess first", "not preprocessed") from None


def evaluate_split(
    rounds: Rounds, agreement: Agreement, model: object, outgoing: str, shard: Shard, silo_id: str, split: Split, pad: int
) -> Evaluation:
    """Score a global model on one split, unless the store has that score."""
    from silotune.components.learning.evaluation import chosen, evaluate

    if known := rounds.evaluation(outgoing, silo_id, split, shard.digest):
        return known
    terms = agreement.evaluation
    most = terms.max_examples if split == "valid" else None
    indices = chosen(shard, most, agreement.federation, agreement.training.seed, silo_id, split)
    score = evaluate(model, shard, indices, terms.batch_size, agreement.data["max_length"], pad)
    return rounds.write_evaluation(
        Evaluation(
            outgoing=outgoing,
            silo=silo_id,
            split=split,
            split_digest=shard.digest,
            examples=score.examples,
            tokens=score.tokens,
            loss_sum=score.loss_sum,
            correct=score.correct,
            at=time.time(),
        )
    )


def _report(turn: Turn, manifest: UpdateManifest, seconds: float, bytes_down: int) -> Report:
    numbers = {
        "steps": manifest.steps, "examples": manifest.examples, "tokens": manifest.tokens, "loss": manifest.loss, "seconds": seconds,
        "bytes_up": manifest.bytes, "bytes_down": bytes_down,
    }  # fmt: skip
    return Report(round=turn.round, attempt=turn.attempt, silo=manifest.silo, status="ok", numbers=numbers)


if __name__ == "__main__":
    print(work(*sys.argv[1:]))
