"""train: in a silo, the incoming global is evaluated on the silo's valid split, trained on its records, and the difference is sent.

python -m silotune.components.train.step FEDERATION SILO "round:1 attempt:1"
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from silotune.components import base_model, launcher
from silotune.components.errors import FederationError, RefusedError
from silotune.components.federation import Agreement, Federation, canonical_json
from silotune.components.learning.tensor_file import MalformedFile
from silotune.components.learning.update import Codec, Header, read_header, write_update
from silotune.components.progress import Pulse, beating
from silotune.components.protocol import Evaluation, Plan, Report, Split, Turn, UpdateManifest
from silotune.components.rounds import Rounds
from silotune.components.silo_job import one_at_a_time, silo_home, status_text, time_left

if TYPE_CHECKING:
    from silotune.components.learning.tokens import Shard

CHECKPOINT = "checkpoint.safetensors"
RESERVE = 0.1  # of the deadline, kept for sending


def run(federation: str, silo: str, turn: str) -> str:
    """As a pipeline task: launched, and nothing at all where no round is open or the silo has delivered."""
    parsed = Turn.parse(turn)
    if parsed.done:
        return status_text(silo, "ok", "nothing to do")
    return launcher.launch("train", federation, silo, turn, turn=parsed)


def work(federation_file: str, silo_id: str, turn_text: str) -> str:
    """One round of local training; returns the status."""
    began = time.monotonic()
    federation = Federation.load(federation_file)
    rounds = Rounds.of(federation)
    turn = Turn.parse(turn_text)
    if turn.done:
        return status_text(silo_id, "ok", "nothing to do")
    home = silo_home(federation, federation.silo(silo_id))
    pulse = Pulse(home, "train", turn.round)
    with one_at_a_time(home, pulse):
        plan = rounds.plan(turn.round)
        if plan is None or silo_id not in plan.participants:
            raise RefusedError(f"silo {silo_id!r}: round {turn.round} does not ask it; wait for a plan that does", "not a participant")
        if why := rounds.attempt(turn.round, turn.attempt).missing.get(silo_id):
            raise RefusedError(f"silo {silo_id!r}: was not ready when this attempt began; run again once it is", why)
        if rounds.update(turn.round, silo_id) is not None:  # delivered already, by an earlier attempt or another run
            return status_text(silo_id, "ok")
        manifest = _send_again(rounds, plan, silo_id, home) or _train(federation, rounds, plan, silo_id, home, pulse)
        if isinstance(manifest, str):
            rounds.write_report(Report(round=turn.round, attempt=turn.attempt, silo=silo_id, status="late", reason=manifest))
            return status_text(silo_id, "late", manifest)
        rounds.write_report(_report(turn, rounds.write_update(manifest), time.monotonic() - began, rounds.object_size(plan.incoming)))
        (home / CHECKPOINT).unlink(missing_ok=True)
    return status_text(silo_id, "ok")


def _send_again(rounds: Rounds, plan: Plan, silo_id: str, home: Path) -> UpdateManifest | None:
    """The update that was made for this plan, sent once more, where the aggregator found its bytes damaged; else None."""
    refusal = rounds.refusal(plan.round, silo_id)
    path = home / "update.safetensors"
    if refusal is None or not refusal.resend or not path.exists():
        return None
    with suppress(MalformedFile):
        header = read_header(path)
        if header.plan == plan.digest:
            return _manifest(rounds, plan, header, path)
    return None


def _train(federation: Federation, rounds: Rounds, plan: Plan, silo_id: str, home: Path, pulse: Pulse) -> UpdateManifest | str:
    """The manifest of a new update, or how far the silo came where it is late."""
    import torch

    from silotune.components.learning import model as models
    from silotune.components.learning import training
    from silotune.components.learning.batches import seed_of
    from silotune.components.learning.checkpoint import Checkpoint
    from silotune.components.learning.tensor_file import open_tensor_file

    agreement = rounds.agreement(plan.agreement)
    with beating("loading"):
        base = base_model.resolve(federation.model.base, home / "base")
        check_terms(federation, agreement, base, silo_id)
        pad = models.pad_id(models.load_tokenizer(base.folder))
        before = open_tensor_file(rounds.fetch_object(plan.incoming, home / "incoming.safetensors")).read_all()
        model = models.load_with_state(base.folder, agreement.model, before)
    terms = agreement.training_of(silo_id)
    if not 0 < plan.learning_rate <= terms.learning_rate:
        rule = f"must be above 0 and at most the terms' {terms.learning_rate:g}, is {plan.learning_rate:g}"
        raise RefusedError(f"silo {silo_id!r}: the plan's learning rate {rule}; ask the coordinator", "terms differ")
    score = evaluate_split(rounds, agreement, model, plan.incoming, open_split(home, "valid"), silo_id, "valid", pad, plan.round, pulse)
    if score.loss_sum is None:
        raise training.NonFiniteLoss("of the incoming global")
    shard = open_split(home, "train")
    stretch = training.Stretch((agreement.federation, terms.seed, silo_id), plan.participants[silo_id].cursor)
    torch.manual_seed(seed_of(agreement.federation, terms.seed, plan.round, silo_id, "dropout"))
    # What a killed training resumes from holds only where nothing has changed that it depends on.
    identity = hashlib.sha256(canonical_json([plan.digest, silo_id, shard.digest])).hexdigest()
    checkpoint = Checkpoint(home / CHECKPOINT, identity, federation.rounds.checkpoint_every)
    max_length = agreement.data["max_length"]
    trained = training.train(
        model, shard, stretch, terms, plan.learning_rate, max_length, pad, pulse, checkpoint=checkpoint, stop=_deadline(federation)
    )
    if trained.steps < federation.rounds.min_fraction * terms.steps:
        return f"{trained.steps} of {terms.steps} steps"
    delta = training.update_of(before, models.trainable_state(model))
    header = Header(
        federation=federation.name, agreement=plan.agreement, round=plan.round, silo=silo_id, plan=plan.digest, base=plan.base,
        incoming=plan.incoming, examples=trained.examples, tokens=trained.tokens, steps=trained.steps, cursor=trained.cursor,
        loss=trained.loss, norm=0.0, codec=Codec(name=agreement.communication.codec), tensors={},
    )  # fmt: skip
    path = home / "update.safetensors"
    sign = (lambda message: rounds.sign(silo_id, plan.round, message)) if agreement.custody != "none" else None
    return _manifest(rounds, plan, write_update(path, header, delta, sign), path)


def _manifest(rounds: Rounds, plan: Plan, header: Header, path: Path) -> UpdateManifest:
    """Put an update file into the store, and say what it is."""
    with beating("sending"):
        digest = rounds.put_object(path, header.silo)
    return UpdateManifest(
        round=plan.round, silo=header.silo, agreement=plan.agreement, plan=plan.digest, incoming=plan.incoming,
        object=digest, bytes=path.stat().st_size, examples=header.examples, tokens=header.tokens,
        steps=header.steps, cursor=header.cursor, codec=header.codec.name, norm=header.norm, loss=header.loss,
    )  # fmt: skip


def _deadline(federation: Federation) -> Callable[[int, float], bool]:
    """Stops a training while there is time left to send what it has: a tenth of the deadline, and one step more."""
    reserve = RESERVE * (federation.deadline_seconds or 0.0)

    def stop(steps: int, slowest: float) -> bool:
        left = time_left()
        return left is not None and left < reserve + slowest

    return stop


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
    rounds: Rounds, agreement: Agreement, model: object, outgoing: str, shard: Shard, silo_id: str, split: Split, pad: int, turn: int,
    pulse: Pulse | None = None,
) -> Evaluation:  # fmt: skip
    """Score a global model on one split, in round ``turn``, unless the store has that score."""
    from silotune.components.learning.evaluation import chosen, evaluate

    if known := rounds.evaluation(outgoing, silo_id, split, shard.digest):
        return known
    terms = agreement.evaluation
    most = terms.max_examples if split == "valid" else None
    indices = chosen(shard, most, agreement.federation, agreement.training.seed, silo_id, split)
    beat = (lambda: pulse.beat("evaluating")) if pulse else None
    score = evaluate(model, shard, indices, terms.batch_size, agreement.data["max_length"], pad, beat)
    return rounds.write_evaluation(
        Evaluation(
            round=turn,
            outgoing=outgoing,
            silo=silo_id,
            split=split,
            split_digest=shard.digest,
            examples=score.examples,
            tokens=score.tokens,
            loss_sum=score.loss_sum if math.isfinite(score.loss_sum) else None,
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
