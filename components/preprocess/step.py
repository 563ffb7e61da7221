"""preprocess: in a silo, records become token shards in the silo's own storage. Nothing leaves but ok and the base model's digests.

python -m silotune.components.preprocess.step FEDERATION SILO
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.components import base_model, launcher, silo_job
from silotune.components.errors import FederationError
from silotune.components.federation import Federation, Silo, canonical_json
from silotune.components.federation_file import is_remote
from silotune.components.learning.held_out import held_out
from silotune.components.learning.records import data_files, read_records
from silotune.components.process.progress import Pulse, beating, tell
from silotune.components.silo_job import one_at_a_time, silo_home
from silotune.components.steward.admission import admit
from silotune.components.store.content import file_digest
from silotune.components.store.object_store import open_store

if TYPE_CHECKING:
    from silotune.components.learning.leakage.canaries import Planted
    from silotune.components.learning.tokens import Counts

CANARIES = "canaries"  # the split


def run(federation: str, silo: str) -> str:
    """As a pipeline task: launched."""
    return launcher.launch("preprocess", federation, silo)


def work(federation_file: str, silo_id: str) -> str:
    """Make the shards that are not there yet; returns the status with the digests of base and tokenizer."""
    federation = Federation.load(federation_file)
    silo = federation.silo(silo_id)
    home = silo_home(federation, silo)
    pulse = Pulse(home, "preprocess", 0)
    with one_at_a_time(home, pulse):
        return _make_shards(federation, silo, home, pulse)


def _make_shards(federation: Federation, silo: Silo, home: Path, pulse: Pulse) -> str:
    silo_id = silo.id
    (home / silo_job.UNREADY).unlink(missing_ok=True)
    (home / "data.json").unlink(missing_ok=True)  # if this fails, no later box may work on what was there before
    with beating("fetching"):
        base = base_model.resolve(federation.model.base, home / "base")
    admit(federation, federation.agreement(base.digest, base.tokenizer), silo_id)
    index = {}
    for split, source, part in _sources(silo):
        try:
            with beating("fetching"):
                path = _local(source, home / "incoming")
            planted = _canaries(silo, home) if split == "train" else None
            key = _key(federation, silo, base.tokenizer, path, part, planted)
            folder = home / "shards" / split / key[:32]
            if not (folder / "shard.json").exists():
                _tell(federation, silo, split, _make(federation, silo, base.folder, path, part, split, folder, pulse, planted))
        except FederationError as error:
            raise FederationError(f"silo {silo_id!r}: {split}: {error}") from None
        index[split] = _kept(folder, home)
        if planted:
            index[CANARIES] = _kept(_plant(federation, base.folder, planted, home / "shards" / CANARIES / key[:32]), home)
    scratch = home / ".data.json"
    scratch.write_text(json.dumps(index))
    scratch.replace(home / "data.json")
    return silo_job.status_text(silo_id, "ok", f"base:{base.digest} tokenizer:{base.tokenizer}")


def _kept(folder: Path, home: Path) -> str:
    """Where a split is, after the others of its kind are gone."""
    for old in folder.parent.iterdir():
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
    return str(folder.relative_to(home))


def _canaries(silo: Silo, home: Path) -> Planted | None:
    from silotune.components.learning.leakage.canaries import planted

    return planted(home, silo.canaries) if silo.canaries else None


def _plant(federation: Federation, base: Path, planted: Planted, folder: Path) -> Path:
    """All canaries and references as a split of their own, whose losses are measured.

    Raises:
        FederationError: they do not fit.
    """
    from silotune.components.learning.model import load_tokenizer
    from silotune.components.learning.tokens import Tokeniser, write_shard

    if not (folder / "shard.json").exists():
        data = federation.data
        tokeniser = Tokeniser(load_tokenizer(base), data.template, data.max_length, "drop")
        records = ((f"canary {i}", canary.record(data.format)) for i, canary in enumerate(planted.canaries))
        try:
            dropped = write_shard(folder, records, tokeniser, CANARIES).counts.dropped
        except FederationError:
            dropped = len(planted.canaries)
        if dropped:
            shutil.rmtree(folder, ignore_errors=True)
            raise FederationError(f"data.max_length: must hold a canary, got {data.max_length}; raise it, or remove the silo's canaries")
    return folder


def _sources(silo: Silo) -> list[tuple[str, str, str]]:
    """(split, location, part of it): a silo without a valid file sets a part of train aside."""
    if silo.valid:
        sources = [("train", silo.train, "all"), ("valid", silo.valid, "all")]
    else:
        sources = [("train", silo.train, "rest"), ("valid", silo.train, "aside")]
    return [*sources, ("test", silo.test, "all")] if silo.test else sources


def _local(location: str, folder: Path) -> Path:
    """A file or folder on this machine; what lies in S3 is copied into the silo's own storage."""
    if not is_remote(location):
        return Path(location)
    bucket, _, key = location.removeprefix("s3://").partition("/")
    store = open_store(f"s3://{bucket}", own=True)
    target = folder / hashlib.sha256(location.encode()).hexdigest()[:16] / key.rsplit("/", 1)[-1]
    if store.size(key) is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        store.fetch_file(key, target)
        return target
    keys = list(store.list(f"{key}/"))
    if not keys:
        raise FederationError(f"{location}: no such object; correct the location")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for found in keys:
        store.fetch_file(found, target / found.removeprefix(f"{key}/").replace("/", "_"))
    return target


def _key(federation: Federation, silo: Silo, tokenizer: str, path: Path, part: str, planted: Planted | None) -> str:
    """Names a shard by all that it depends on."""
    try:
        contents = {str(f.relative_to(path)) if f != path else f.name: file_digest(f) for f in data_files(path)}
    except FileNotFoundError:
        raise FederationError(f"{path}: no such file; correct the path in the federation file") from None
    except OSError as error:
        raise FederationError(f"{path}: cannot be read: {error.strerror}") from None
    terms = [
        federation.data.model_dump() | {"fields": federation.fields_of(silo)},
        federation.name,
        federation.training.seed,
        part,
        tokenizer,
        "units, aside by content",
        federation.privacy.person_field,
        *([planted.digest] if planted else []),
    ]
    return hashlib.sha256(canonical_json([terms, contents])).hexdigest()


def _make(
    federation: Federation, silo: Silo, base: Path, path: Path, part: str, split: str, folder: Path, pulse: Pulse, planted: Planted | None
) -> Counts:  # fmt: skip
    from silotune.components.learning.model import load_tokenizer
    from silotune.components.learning.tokens import Tokeniser, write_shard

    data, fields = federation.data, federation.fields_of(silo)
    person = federation.privacy.person_field
    records: Any = read_records(path, data.format, fields, person)
    if part != "all":
        read = (record for _, record in read_records(path, data.format, fields, person))
        aside = held_out(read, data.valid_fraction, federation.name, federation.training.seed, silo.id, "aside")
        if aside is None:
            whose = "one record, or copies of one, which" if person is None else "one person's records, which"
            raise FederationError(f"{path.name}: holds {whose} cannot be split; give the silo a valid file or more records")
        records = (r for r, held in zip(records, aside, strict=False) if held == (part == "aside"))
    if planted:
        records = chain(records, (("canary", canary.record(data.format)) for canary in planted.included))
    tokeniser = Tokeniser(load_tokenizer(base), data.template, data.max_length, data.long_examples)
    return write_shard(folder, _beating(records, pulse, split), tokeniser, path.name).counts


def _tell(federation: Federation, silo: Silo, split: str, counts: Counts) -> None:
    """What became of a split's records, in the silo's log; where much of them is not learned from, to whoever watches this machine."""
    told = f"{split}: {counts.told(federation.data.max_length)}; {counts.targets} of {counts.tokens} tokens to learn"
    print(told, flush=True)
    if counts.lossy and split == "train":
        tell("preprocess", "warned", silo.id, detail=f"{told}; data.max_length may be raised")


def _beating(records: Iterable[Any], pulse: Pulse, split: str) -> Iterator[Any]:
    """The records, with a sign of life as they pass."""
    for record in records:
        pulse.beat(split)
        yield record


if __name__ == "__main__":
    print(work(*sys.argv[1:]))
