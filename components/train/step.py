"""train: in a silo, the incoming global is evaluated on the silo's valid split, trained on its records, and the difference is sent.

python -m silotune.components.train.step FEDERATION SILO "round:1 attempt:1"
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.components import base_model, launcher, opening
from silotune.components.aggregate.delivery import expectation
from silotune.components.errors import RefusedError
from silotune.components.federation import Agreement, Federation, canonical_json
from silotune.components.learning.aggregation.combination import OPTIMIZER
from silotune.components.learning.aggregation.server_optimizer import CONTROL as CONTROL_VARIATE
from silotune.components.learning.ranks import backend
from silotune.components.learning.tensor_file import MalformedFile, open_tensor_file, to_bytes, write_tensor_file
from silotune.components.learning.update import Codec, Header, read_header, write_update
from silotune.components.process.ending import told
from silotune.components.process.nodes import LOOK, Layout, NodeLost, Table, raised
from silotune.components.process.progress import Pulse, beat, beating
from silotune.components.protocol import Evaluation, Plan, Report, Split, Turn, UpdateManifest
from silotune.components.rounds import Rounds
from silotune.components.secure_sum.records import has_trained
from silotune.components.secure_sum.silo import UPDATE, SiloPart
from silotune.components.silo_job import one_at_a_time, silo_home, status_text
from silotune.components.steward.egress import require_update, tells, told_numbers
from silotune.components.steward.policy import Policy
from silotune.components.train import permission, workers
from silotune.components.train.memory import own_sum
from silotune.components.train.order import CHECKPOINT, COMMON, CONTROL, INCOMING, OWN, Order, learn, open_split
from silotune.components.train.private import private_terms

if TYPE_CHECKING:
    from silotune.components.learning.evaluation import Score
    from silotune.components.learning.tokens import Shard

MADE = "update.of"  # in the silo's folder: which training has made its update
RESERVE = 0.1  # of the deadline, kept for sending
OLD = 10.0  # seconds after which a report of this attempt is taken for its end on a machine that has found none to join


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
    layout = Layout.of()
    layout = layout if layout.size == 1 else layout.settled()
    if layout.node:
        return _join(federation, rounds, layout, turn, silo_id, home)
    pulse = Pulse(home, "train", turn.round)
    with _table(layout, federation, silo_id, turn) as table, one_at_a_time(home, pulse):
        plan = rounds.plan(turn.round)
        if plan is None or silo_id not in plan.participants:
            raise RefusedError(f"silo {silo_id!r}: round {turn.round} does not ask it; wait for a plan that does", "not a participant")
        if why := rounds.attempt(turn.round, turn.attempt).missing.get(silo_id):
            raise RefusedError(f"silo {silo_id!r}: was not ready when this attempt began; run again once it is", why)
        if has_trained(rounds, turn, silo_id):  # by an earlier attempt or another run
            return status_text(silo_id, "ok")
        agreement = rounds.agreement(plan.agreement)
        part = SiloPart.of(federation, rounds, plan, turn, silo_id, home) if agreement.privacy.secure_aggregation is not None else None
        kept = part.kept() if part else _to_send_again(rounds, plan, silo_id, home, Policy.of(federation, silo_id))
        header = kept or _train(federation, rounds, plan, silo_id, home, pulse, layout, table)
        if isinstance(header, str):
            rounds.write_report(Report(round=turn.round, attempt=turn.attempt, silo=silo_id, status="late", reason=header))
            return status_text(silo_id, "late", header)
        policy = permission.allowed(federation, rounds, plan, agreement, silo_id)  # it may have changed since the training began
        require_update(home / UPDATE, expectation(rounds, plan, agreement, silo_id), policy)
        took, down = time.monotonic() - began, rounds.object_size(plan.incoming)
        if part:  # the update stays here, for the mask box
            part.advertise()
            numbers = {"seconds": took, "bytes_down": float(down)}
        else:
            manifest = rounds.write_update(_manifest(rounds, plan, header, home / UPDATE))
            numbers = _numbers(manifest, took, down)
        numbers = told_numbers(numbers | permission.bound(federation, agreement, silo_id, policy), policy)
        rounds.write_report(Report(round=turn.round, attempt=turn.attempt, silo=silo_id, status="ok", numbers=numbers))
        (home / CHECKPOINT).unlink(missing_ok=True)
    return status_text(silo_id, "ok")


@contextmanager
def _table(layout: Layout, federation: Federation, silo_id: str, turn: Turn) -> Iterator[Table | None]:
    """On the first machine: what its processes and the other machines find each other by, where there are any; at the end they hear of it."""
    if layout.size == 1:
        yield None
        return
    table = Table.kept(layout, _topic(layout, federation, silo_id, turn))
    try:
        yield table
    finally:
        error = sys.exception()
        table.close(
            told(error) if isinstance(error, Exception) else {"exit_code": 0 if error is None else 1, "message": "", "reason": "ended"}
        )


def _topic(layout: Layout, federation: Federation, silo_id: str, turn: Turn) -> dict[str, Any]:
    return {
        "federation": federation.name, "silo": silo_id, "turn": turn.text, "nodes": layout.nodes, "processes per node": layout.per_node,
        "backend": backend(),
    }  # fmt: skip


def _join(federation: Federation, rounds: Rounds, layout: Layout, turn: Turn, silo_id: str, home: Path) -> str:
    """On another machine than the first: take part in the training, if there is one, and write nothing; returns the status."""
    Pulse(None, "train", turn.round)
    began = time.monotonic()

    def ended() -> str:
        """The status where the first machine has ended already, as the store tells; what is left of an earlier try is no word of this one's."""
        if has_trained(rounds, turn, silo_id):
            return status_text(silo_id, "ok")
        report = rounds.reports(turn.round, turn.attempt).get(silo_id) if time.monotonic() - began > OLD else None
        return status_text(silo_id, report.status, report.reason) if report else ""

    if status := ended():
        return status
    table = Table.reached(layout, _topic(layout, federation, silo_id, turn), lambda: bool(ended()))
    if table is None:
        return ended()
    try:
        while (found := table.said("order")) is None:
            beat("waiting", holder=False)
            if over := table.look():
                if over["exit_code"]:
                    raise raised(over)
                return status_text(silo_id, "ok")
            time.sleep(LOOK)
        with beating("loading"):
            base = base_model.resolve(federation.model.base, home / "base")
        order = Order.model_validate(found).model_copy(update={"home": home, "base": base.folder})
        if base.digest != order.base_digest:
            raise RefusedError(f"node {layout.node}: its base model is not that of node 0; give both the same", "base model differs")
        workers.together(order, layout, table, lambda score: None)
    finally:
        error = sys.exception()
        with suppress(NodeLost):
            if isinstance(error, Exception):
                table.say(f"ended/{layout.node}", told(error))
            table.say(f"left/{layout.node}", {})
    return status_text(silo_id, "ok")


def _to_send_again(rounds: Rounds, plan: Plan, silo_id: str, home: Path, policy: Policy | None) -> Header | None:
    """Of the update that was made for this plan and is to be sent once more, where the aggregator found its bytes damaged; else None."""
    refusal = rounds.refusal(plan.round, silo_id)
    path = home / UPDATE
    if refusal is None or not refusal.resend or not path.exists():
        return None
    with suppress(MalformedFile):
        header = read_header(path)
        if header.plan == plan.digest and (header.loss is None or tells(policy, "loss")):
            return header
    return None


def _made_before(plan: Plan, home: Path, identity: str) -> Header | None:
    """Of the update that this very training has made, which was sent and refused: a private one is sent again, and not made again.

    On another kind of processor, or more of them, its sums would differ by rounding and its noise would not: the difference of the two would be
    bare of noise.
    """
    with suppress(MalformedFile, FileNotFoundError):
        header = read_header(home / UPDATE)
        if header.plan == plan.digest and (home / MADE).read_text() == identity:
            return header
    return None


def _train(
    federation: Federation, rounds: Rounds, plan: Plan, silo_id: str, home: Path, pulse: Pulse, layout: Layout, table: Table | None
) -> Header | str:
    """The header of a new update in the silo's folder, or how far the silo came where it is late."""
    from silotune.components.learning import model as models
    from silotune.components.learning.batches import seed_of
    from silotune.components.learning.training import NonFiniteLoss

    agreement = rounds.agreement(plan.agreement)
    with beating("loading"):
        base = base_model.resolve(federation.model.base, home / "base")
        check_terms(federation, agreement, base, silo_id)
        shard = open_split(home, "train")
        private = private_terms(plan, agreement, silo_id, shard)
        policy = permission.permit(
            federation,
            rounds,
            plan,
            agreement,
            silo_id,
            shard.digest,
            *((private.mechanism, private.noise(home)) if private else (None, "")),
        )
        identity = hashlib.sha256(canonical_json([plan.digest, silo_id, shard.digest])).hexdigest()
        if private and rounds.refusal(plan.round, silo_id) and (header := _made_before(plan, home, identity)):
            return header
        pad = models.pad_id(models.load_tokenizer(base.folder))
        rounds.fetch_object(plan.incoming, home / INCOMING)
    terms = agreement.training_of(silo_id)
    if not 0 < plan.learning_rate <= terms.learning_rate:
        rule = f"must be above 0 and at most the terms' {terms.learning_rate:g}, is {plan.learning_rate:g}"
        raise RefusedError(f"silo {silo_id!r}: the plan's learning rate {rule}; ask the coordinator", "terms differ")
    _write_control(rounds, plan, agreement, silo_id, home)
    valid = open_split(home, "valid")
    splits = {"train": shard.digest, "valid": valid.digest}
    scored = rounds.evaluation(plan.incoming, silo_id, "valid", splits["valid"])
    silent = policy is not None and not policy.scored(min(len(valid), agreement.evaluation.max_examples or len(valid)))

    def on_score(score: Score) -> None:
        if _write_score(rounds, score, plan.incoming, silo_id, "valid", splits["valid"], plan.round).loss_sum is None:
            raise NonFiniteLoss("of the incoming global")

    if scored and scored.loss_sum is None:
        raise NonFiniteLoss("of the incoming global")
    evaluation, seed = agreement.evaluation, agreement.training.seed
    order = Order(
        home=home, base=base.folder, base_digest=base.digest, silo=silo_id, round=plan.round, federation=agreement.federation,
        turn=opening.turn_of(rounds, rounds.commit(plan.round - 1), agreement.aggregation.traits),
        model=agreement.model, strategy=agreement.aggregation.strategy, rank=agreement.rank_of(silo_id), mu=agreement.aggregation.mu, terms=terms, learning_rate=plan.learning_rate, max_length=agreement.data["max_length"], pad=pad,
        cursor=plan.participants[silo_id].cursor, split_digests=splits, every=federation.rounds.checkpoint_every,
        dropout_seed=seed_of(agreement.federation, terms.seed, plan.round, silo_id, "dropout"),
        score=None if scored or silent else (evaluation.max_examples, evaluation.batch_size, seed),
        # What a killed training resumes from holds only where nothing has changed that it depends on.
        identity=identity,
        reserve=RESERVE * (federation.deadline_seconds or 0.0), private=private,
    )  # fmt: skip
    if table is None:
        trained, delta = learn(order, pulse, on_score)
    else:
        table.gather()
        table.say("order", order.model_dump(mode="json"))
        trained, delta = workers.together(order, layout, table, on_score)
        pulse(trained.steps, terms.steps, trained.loss)
    if trained.steps < federation.rounds.min_fraction * terms.steps:
        return f"{trained.steps} of {terms.steps} steps"
    header = Header(
        federation=federation.name, agreement=plan.agreement, round=plan.round, silo=silo_id, plan=plan.digest, base=plan.base,
        incoming=plan.incoming, examples=trained.examples, tokens=trained.tokens, steps=trained.steps, cursor=trained.cursor,
        loss=trained.loss if tells(policy, "loss") else None, norm=0.0, codec=Codec(name=agreement.communication.codec), tensors={},
    )  # fmt: skip
    sign = (lambda message: rounds.sign(silo_id, plan.round, message)) if agreement.custody != "none" else None
    written = write_update(home / UPDATE, header, delta, sign)
    if not written.norm:
        rule = "training changed nothing"
        raise RefusedError(f"silo {silo_id!r}: {rule}: its update has norm 0; raise training.learning_rate, or check the records", rule)
    (home / MADE).write_text(identity)
    return written


def _write_control(rounds: Rounds, plan: Plan, agreement: Agreement, silo_id: str, home: Path) -> None:
    """What the strategy's local term is made of, as a file beside the incoming global; none where it needs nothing."""
    (home / CONTROL).unlink(missing_ok=True)
    strategy = agreement.aggregation.traits
    if not strategy.memory:
        return
    latest = rounds.commit(plan.round - 1)
    own = own_sum(rounds, latest, agreement, silo_id, home)
    tensors = {OWN + name: array for name, array in own.items()}
    if strategy.local == "control" and (digest := plan.server_state.get(OPTIMIZER)):
        state = open_tensor_file(rounds.fetch_object(digest, home / ".state.safetensors"))
        prefix = f"{CONTROL_VARIATE}."
        tensors |= {COMMON + name.removeprefix(prefix): state.read(name) for name in state.entries if name.startswith(prefix)}
        (home / ".state.safetensors").unlink()
    encoded = ((name, to_bytes(array, "F32")) for name, array in sorted(tensors.items()))
    write_tensor_file(home / CONTROL, {n: a.shape for n, a in tensors.items()}, "F32", encoded, {})


def _manifest(rounds: Rounds, plan: Plan, header: Header, path: Path) -> UpdateManifest:
    """Put an update file into the store, and say what it is."""
    with beating("sending"):
        digest = rounds.put_object(path, header.silo)
    head = open_tensor_file(path).header_digest
    return UpdateManifest(
        round=plan.round, silo=header.silo, agreement=plan.agreement, plan=plan.digest, incoming=plan.incoming,
        object=digest, header=head, bytes=path.stat().st_size, examples=header.examples, tokens=header.tokens,
        steps=header.steps, cursor=header.cursor, codec=header.codec.name, norm=header.norm, loss=header.loss,
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
    on_batch = (lambda: pulse.beat("evaluating")) if pulse else None
    score = evaluate(model, shard, indices, terms.batch_size, agreement.data["max_length"], pad, on_batch)
    return _write_score(rounds, score, outgoing, silo_id, split, shard.digest, turn)


def _write_score(rounds: Rounds, score: Score, outgoing: str, silo_id: str, split: Split, digest: str, turn: int) -> Evaluation:
    return rounds.write_evaluation(
        Evaluation(
            round=turn,
            outgoing=outgoing,
            silo=silo_id,
            split=split,
            split_digest=digest,
            examples=score.examples,
            tokens=score.tokens,
            loss_sum=score.loss_sum if math.isfinite(score.loss_sum) else None,
            correct=score.correct,
            at=time.time(),
        )
    )


def _numbers(manifest: UpdateManifest, seconds: float, bytes_down: int) -> dict[str, float]:
    numbers: dict[str, float] = {
        "steps": manifest.steps, "examples": manifest.examples, "tokens": manifest.tokens, "seconds": seconds,
        "bytes_up": manifest.bytes, "bytes_down": bytes_down,
    }  # fmt: skip
    return numbers if manifest.loss is None else numbers | {"loss": manifest.loss}


if __name__ == "__main__":
    print(work(*sys.argv[1:]))
