"""initialize: compare what the silos start from, make the initial global if there is none, and open the next round.

python -m silotune.components.initialize.step FEDERATION "north ok: base:… tokenizer:…" "south ok: …"
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from silotune.components import base_model, keys, opening, tracking
from silotune.components.errors import FederationError
from silotune.components.federation import Agreement, Federation
from silotune.components.process import child
from silotune.components.protocol import Commit
from silotune.components.provenance import audit
from silotune.components.rounds import Rounds
from silotune.components.silo_job import parse_status


def run(federation: str, statuses: list[str]) -> str:
    """As a pipeline task."""
    return child.coordinate("initialize", federation, *statuses)


def work(federation_file: str, *statuses: str) -> str:
    """Returns the turn: which round is open, or why none is.

    Raises:
        FederationError: the file asks for what an existing federation cannot become, or too few silos' data are in order.
        QuorumError: too few silos are ready.
        UnreachableError: the store or the tracking server.
    """
    federation = Federation.load(federation_file)
    keys.ensure(federation)
    rounds = Rounds.of(federation)
    rounds.store.check()
    base = base_model.resolve(federation.model.base, federation.work / "base")
    missing = _unready(federation, base, statuses)
    ready = [s for s in federation.silo_ids if s not in missing]
    if federation.rounds.on_missing_quorum == "fail":
        opening.require_quorum(federation, "to begin", ready, missing)
    agreement = federation.agreement(base.digest, base.tokenizer)
    rounds.put_agreement(agreement)
    latest = rounds.latest()
    if latest is None:
        latest = rounds.write_commit(_initial(rounds, base, agreement, federation))
    _require_same_federation(federation, rounds, latest, agreement)
    audit.sync(rounds)
    tracking.sync(federation, rounds)
    return opening.open_next(federation, rounds, latest, agreement, missing).text


def _unready(federation: Federation, base: base_model.Base, statuses: tuple[str, ...]) -> dict[str, str]:
    """Silos that cannot take part in this run, and why."""
    missing = {}
    if federation.security.signing:
        missing = {silo: "refused: no signing key" for silo in federation.silo_ids if not federation.public_keys_of(silo)}
    for text in statuses:
        silo, status, said = parse_status(text)
        if status != "ok":
            missing[silo] = f"{status}: {said}" if said else status
            continue
        if not said:  # a Job tells no more than its end; train and evaluate compare the digests themselves, before they act
            continue
        got = dict(word.split(":", 1) for word in said.split())
        if got != {"base": base.digest, "tokenizer": base.tokenizer}:
            missing[silo] = "refused: base model differs"
    return missing


def _initial(rounds: Rounds, base: base_model.Base, agreement: Agreement, federation: Federation) -> Commit:
    """Round 0: the trainable state that every silo starts from, by seed."""
    from silotune.components.learning import model as models
    from silotune.components.learning.batches import seed_of
    from silotune.components.learning.tensor_file import to_bytes, write_tensor_file

    began = time.time()
    models.load_tokenizer(base.folder)
    seed = seed_of(agreement.federation, agreement.training.seed, "initial")
    state = models.initial_state(base.folder, agreement.model, seed, cores=agreement.aggregation.traits.sends == "core")
    with tempfile.TemporaryDirectory(dir=_made(federation.work)) as folder:
        path = Path(folder) / "initial.safetensors"
        encoded = ((name, to_bytes(array, "F32")) for name, array in state.items())
        write_tensor_file(path, {n: a.shape for n, a in state.items()}, "F32", encoded, {"format": "pt"})
        outgoing = rounds.put_object(path)
    return Commit(
        round=0, outcome="initialized", custody=federation.custody, best=0, agreement=agreement.digest, plan=None, attempt=0, contributions={}, missing={}, previous=None,
        incoming=None, outgoing=outgoing, started=began, at=time.time(),
    )  # fmt: skip


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _require_same_federation(federation: Federation, rounds: Rounds, latest: Commit, agreement: Agreement) -> None:
    if odd := rounds.agreement(latest.agreement).forbids(agreement):
        raise FederationError(
            f"federation {federation.name!r} stands at round {latest.round} on other terms: {', '.join(odd)} changed, which makes a new federation; "
            f"undo the change, or give a new name or storage.root"
        )


if __name__ == "__main__":
    print(work(*sys.argv[1:]))
