"""A silo's part of a federation, run once on made-up records in a folder of its own, to see what would leave.

Nothing that is real is touched: no record, no key, no store, no ledger, no tracking server; only the base model is read. The steps are the very ones
that a pipeline's boxes call, output control and the policy's rules on it included. Keys, store and the other silos are made up; a round has two steps.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from silotune.components import federation_file
from silotune.components.errors import FederationError
from silotune.components.evaluate import step as evaluate
from silotune.components.federation import WORK_VARIABLE, Federation
from silotune.components.initialize import step as initialize
from silotune.components.keys import FOLDER_VARIABLE
from silotune.components.learning.tensor_file import MalformedFile, open_tensor_file
from silotune.components.learning.update import KEY
from silotune.components.preprocess import step as preprocess
from silotune.components.protocol import Turn
from silotune.components.rounds import Rounds
from silotune.components.silo_job import status_text
from silotune.components.steward.policy import NAME, VARIABLE, Policy
from silotune.components.store.object_store import ObjectStore
from silotune.components.train import step as train

STEPS = 2
# Rules that a dry run can hold to: whose keys, images and ledger are real, it does not know.
OURS = (
    "bases", "strategies", "codecs", "privacy", "secure_aggregation", "min_participants", "report", "scores", "min_scored", "max_update_bytes",
    "max_runs", "expires",
)  # fmt: skip


@dataclass(frozen=True)
class Leaving:
    """One object that the silo put into the store."""

    key: str
    size: int  # bytes
    record: dict[str, Any] | None  # what a small record says
    tensors: dict[str, tuple[str, list[int]]]  # of a tensor file: name -> (number format, shape)


@dataclass(frozen=True)
class DryRun:
    """What a silo's boxes said, and what they sent."""

    statuses: list[str]
    leaving: list[Leaving]


def run(federation: Federation, silo_id: str, policy: Policy | None = None) -> DryRun:
    """Preprocess, one short training and evaluation of one silo on mock records.

    Raises:
        SilotuneError: the silo's part would fail or be refused.
    """
    federation.silo(silo_id)
    with tempfile.TemporaryDirectory(prefix="silotune-dry-run-") as name, _nothing_real():
        folder = Path(name)
        file = _file(federation, silo_id, folder)
        storage = Path(Federation.load(file).silo(silo_id).storage)
        storage.mkdir(parents=True, mode=0o700)
        if policy:
            kept = policy.model_dump(include={"dataset", *OURS}, exclude_none=True)
            (storage / NAME).write_text(yaml.safe_dump(kept), encoding="utf-8")
        statuses = [preprocess.work(str(file), silo_id)]
        others = [status_text(s, "failed", "not asked in a dry run") for s in federation.silo_ids if s != silo_id]
        turn = initialize.work(str(file), *statuses, *others)
        store = Rounds.of(Federation.load(file)).store
        before = set(store.list(f"{federation.name}/"))
        if not Turn.parse(turn).done:
            statuses.append(train.work(str(file), silo_id, turn))
        statuses.append(evaluate.work(str(file), silo_id, ""))
        return DryRun(statuses, [_leaving(store, key, folder) for key in store.list(f"{federation.name}/") if key not in before])


@contextmanager
def _nothing_real() -> Iterator[None]:
    """Without the variables that name what is this machine's own."""
    kept = {name: os.environ.pop(name) for name in (VARIABLE, FOLDER_VARIABLE, WORK_VARIABLE) if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _file(federation: Federation, silo_id: str, folder: Path) -> Path:
    """The federation's terms, with everything else in ``folder``."""
    raw = federation_file.parse(federation.file)
    problems: list[str] = []
    federation_file.resolve(raw, federation.file.parent, problems)
    if problems:
        raise FederationError("\n".join(problems))
    records = _mock_records(federation, silo_id)
    files = {}
    for split, part in (("train", records), ("valid", records[: len(records) // 2]), ("test", records[: len(records) // 2])):
        files[split] = str(folder / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(r) + "\n" for r in part), encoding="utf-8")
    for silo in raw["silos"]:
        silo |= {split: files[split] for split in ("train", "valid", "test") if split in silo or split == "train"}
        silo["storage"] = str(folder / "private" / silo["id"])
        silo.get("training", {}).pop("steps", None)
        silo.pop("placement", None)
    raw["rounds"] = {"total": 1, "quorum": 1}
    raw["training"] = (raw.get("training") or {}) | {"steps": min(STEPS, federation.training.steps)}
    raw["storage"], raw["tracking"] = {"root": str(folder / "store")}, {"uri": "none"}
    if planned := federation.privacy_agreed.rounds:
        raw["privacy"]["rounds"] = planned  # or its noise would be that of a single round
    (raw.get("security") or {}).pop("keys", None)
    (folder / "federation.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return folder / "federation.yaml"


def _mock_records(federation: Federation, silo_id: str) -> list[dict[str, Any]]:
    """Made-up records of the format, with the columns that the file names; enough for a batch to be a part of them."""
    silo = federation.silo(silo_id)
    names, person = federation.fields_of(silo), federation.privacy.person_field if federation.privacy.unit == "person" else None
    count = max(16, 4 * (silo.training.batch_size or federation.training.batch_size))
    made: list[dict[str, Any]] = []
    for number in range(count):
        question, answer = f"mock question {number}?", f"mock answer {number}, made up."
        of_format: dict[str, dict[str, Any]] = {
            "prompt-response": {"prompt": question, "response": answer},
            "chat": {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]},
            "text": {"text": f"{question} {answer}"},
        }
        record = {names.get(field, field): value for field, value in of_format[federation.data.format].items()}
        made.append(record | ({person: f"mock person {number}"} if person else {}))
    return made


def _leaving(store: ObjectStore, key: str, folder: Path) -> Leaving:
    data = store.get(key)
    if key.endswith(".json"):
        return Leaving(key, len(data), json.loads(data), {})
    path = folder / "object"
    path.write_bytes(data)
    try:
        file = open_tensor_file(path)
    except MalformedFile:
        return Leaving(key, len(data), None, {})
    header = json.loads(file.metadata.get(KEY, "null"))
    return Leaving(key, len(data), header, {name: (entry.dtype, list(entry.shape)) for name, entry in file.entries.items()})
