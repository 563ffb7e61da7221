"""export: the chosen global becomes a folder that transformers or peft load, with tokenizer and a card of where it comes from.

python -m silotune.components.export.step FEDERATION TURN
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from silotune.components import base_model, best_global, tracking
from silotune.components.aggregate.lost_global import fetch_global
from silotune.components.errors import FederationError, RefusedError
from silotune.components.export import model_card
from silotune.components.federation import Agreement, Federation, canonical_json
from silotune.components.learning.aggregation.factors import DELTA
from silotune.components.learning.tensor_file import open_tensor_file
from silotune.components.process import child
from silotune.components.process.progress import tell
from silotune.components.protocol import Commit, Exported, Turn
from silotune.components.provenance import audit
from silotune.components.rounds import Rounds
from silotune.components.silo_job import parse_status
from silotune.components.store.content import file_digest


def run(federation: str, turn: str, statuses: list[str]) -> str:
    """As a pipeline task."""
    return child.coordinate("export", federation, turn, *statuses)


def work(federation_file: str, turn_text: str, *statuses: str) -> str:
    """Returns where the model was put.

    Raises:
        RefusedError: nothing has been committed yet.
        UnreachableError: the store, or the tracking server after the export was written.
    """
    federation = Federation.load(federation_file)
    rounds = Rounds.of(federation)
    latest = rounds.latest()
    if latest is None:
        raise RefusedError("nothing to export: no round is committed; run the federation first")
    for silo, status, reason in map(parse_status, statuses):
        if status != "ok":
            tell("evaluate", "warned", silo, detail=f"has not been evaluated: {status}: {reason}")
    number = best_global.best_round(rounds) if federation.export.select == "best" else latest.round
    commit = rounds.commit(number)
    require_unexposed(federation, rounds, commit)
    exported = rounds.export(_export_id(commit, federation)) or _export(federation, rounds, commit)
    audit.record_export(rounds, exported, commit.at)
    exported = rounds.write_export(exported)  # after its entry in the log: once this stands, nobody comes back here
    tracking.record_export(federation, rounds, exported, finished=bool(Turn.parse(turn_text).done))
    return exported.location


def require_unexposed(federation: Federation, rounds: Rounds, commit: Commit) -> None:
    """Raises RefusedError where `export.max_exposure` is exceeded in a silo, or a silo with canaries has not measured it."""
    most = federation.export.max_exposure
    if most is None:
        return
    found = rounds.exposed(commit.outgoing)
    where = f"the model of round {commit.round} is not exported: export.max_exposure is {most:g} bits"
    if unmeasured := sorted({s.id for s in federation.silos if s.canaries} - found.keys()):
        raise RefusedError(
            f"{where}, and {', '.join(unmeasured)} has not measured it; run again once its evaluate box works, or remove its canaries",
            "exposure unmeasured",
        )
    if over := {silo: e.exposure for silo, e in sorted(found.items()) if e.exposure > most}:
        told = ", ".join(f"{silo} {bits:.2f}" for silo, bits in over.items())
        raise RefusedError(
            f"{where}, measured are {told} (chance gives 1.44); train fewer steps or with privacy.epsilon, or export an earlier round",
            "exposure too high",
        )


def _export_id(commit: Commit, federation: Federation) -> str:
    return f"{commit.digest}{'-merged' if federation.export.merge else ''}"


def _export(federation: Federation, rounds: Rounds, commit: Commit) -> Exported:
    agreement = rounds.agreement(commit.agreement)
    base = base_model.resolve(federation.model.base, federation.work / "base")
    with tempfile.TemporaryDirectory(dir=federation.work) as name:
        folder = Path(name)
        incoming = fetch_global(rounds, commit, folder / ".global.safetensors", federation)
        out = folder / "model"
        out.mkdir()
        save_model(federation, agreement, base, incoming, out)
        (out / "README.md").write_text(model_card.write(federation, rounds, commit, base), encoding="utf-8")
        files = {str(p.relative_to(out)): p for p in sorted(out.rglob("*")) if p.is_file()}
        digests = {relative: file_digest(path) for relative, path in files.items()}
        # Named by its content, as all that is stored: an export that was cut short and then came out otherwise never mixes with this one.
        prefix = rounds.key("exports", f"{commit.digest[:16]}-{hashlib.sha256(canonical_json(digests)).hexdigest()[:16]}")
        for relative, path in files.items():
            rounds.store.put_file(f"{prefix}/{relative}", path)
    return Exported(
        commit=_export_id(commit, federation),
        round=commit.round,
        outgoing=commit.outgoing,
        location=rounds.store.url(prefix),
        files=digests,
    )


def save_model(federation: Federation, agreement: Agreement, base: base_model.Base, state_file: Path, out: Path) -> None:
    """Write a PEFT folder, or a full model, with its tokenizer."""
    from silotune.components.learning import model as models

    if not federation.export.merge and any(name.endswith(DELTA) for name in open_tensor_file(state_file).entries):
        raise FederationError(
            "export.merge: must be true, since the global changes the base's own weights (fedex and flora do), and an adapter cannot; set it"
        )
    model = trained_model(agreement, base, state_file)
    models.load_tokenizer(base.folder).save_pretrained(out)
    if agreement.model["method"] == "lora":
        if federation.export.merge:
            model = model.merge_and_unload()
        else:
            location = federation.model.base
            model.peft_config["default"].base_model_name_or_path = location.partition("@")[0]
    model.save_pretrained(out, safe_serialization=True)


def trained_model(agreement: Agreement, base: base_model.Base, state_file: Path) -> Any:
    """The base with a global's trainable state in it."""
    from silotune.components.learning import model as models

    return models.load_with_state(base.folder, agreement.model, open_tensor_file(state_file).read_all()).eval()


if __name__ == "__main__":
    print(work(*sys.argv[1:]))
