"""The base model: where it comes from, and the digests that make sure every silo starts from the same one.

A base is a local folder, ``s3://bucket/prefix``, or a Hugging Face id; the latter two are copied once into a cache folder. Two SHA-256
digests name it: over its configuration and weights, and over its tokenizer. They cover file names and contents, nothing else.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from silotune.components.errors import FederationError, UnreachableError
from silotune.components.federation import canonical_json
from silotune.components.federation_file import is_remote
from silotune.components.store.content import file_digest
from silotune.components.store.object_store import open_store

WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*")


@dataclass(frozen=True)
class Base:
    """A base model on this machine."""

    folder: Path
    digest: str
    tokenizer: str


def resolve(location: str, cache: Path) -> Base:
    """Bring a base to this machine, where it is not yet, and digest it.

    Args:
        location: as in ``model.base``.
        cache: folder for copies, and for digests of files whose size and time have not changed.

    Raises:
        FederationError: it is no model folder, or has no tokenizer.
        UnreachableError: it cannot be fetched.
    """
    cache.mkdir(parents=True, exist_ok=True)
    if is_remote(location):
        folder = _from_store(location, cache)
    elif location.startswith("/"):
        folder = Path(location)
    else:
        folder = _from_hub(location)
    if not (folder / "config.json").is_file():
        raise FederationError(f"model.base {location!r}: has no config.json; give a folder saved by save_pretrained")
    weights = _files(folder, WEIGHTS)
    if not any(f.suffix == ".safetensors" for f in weights):
        raise FederationError(f"model.base {location!r}: has no .safetensors file; convert its weights to safetensors")
    tokenizer = _files(folder, TOKENIZER)
    if not tokenizer:
        raise FederationError(f"model.base {location!r}: holds no tokenizer; save the base's tokenizer into the folder")
    known = _Known(cache / "digests.json")
    base = Base(folder, known.digest(weights), known.digest(tokenizer))
    known.save()
    return base


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({p for pattern in patterns for p in folder.glob(pattern) if p.is_file()})


class _Known:
    """Digests of files by path, size and modification time: hashing gigabytes once is enough."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self.digests: dict[str, str] = json.loads(file.read_text())
        except (OSError, ValueError):
            self.digests = {}
        self.before = dict(self.digests)

    def digest(self, files: list[Path]) -> str:
        named = {}
        for file in files:
            about = file.stat()
            key = f"{file.resolve()}|{about.st_size}|{about.st_mtime_ns}"
            if key not in self.digests:
                self.digests[key] = file_digest(file)
            named[file.name] = self.digests[key]
        return hashlib.sha256(canonical_json(named)).hexdigest()

    def save(self) -> None:
        if self.digests != self.before:
            scratch = self.file.with_suffix(".part")
            scratch.write_text(json.dumps(self.digests))
            scratch.replace(self.file)


def _from_store(location: str, cache: Path) -> Path:
    bucket, _, prefix = location.removeprefix("s3://").partition("/")
    store = open_store(f"s3://{bucket}")
    folder = cache / hashlib.sha256(location.encode()).hexdigest()[:16]
    keys = [k for k in store.list(f"{prefix.rstrip('/')}/" if prefix else "") if "/" not in k.removeprefix(f"{prefix}/")]
    if not keys:
        raise FederationError(f"model.base {location!r}: holds no object; correct the location")
    folder.mkdir(parents=True, exist_ok=True)
    for key in keys:
        target = folder / key.rsplit("/", 1)[-1]
        if not target.exists() or target.stat().st_size != store.size(key):
            store.fetch_file(key, target)
    return folder


def _from_hub(location: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    name, _, revision = location.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=[*WEIGHTS, *TOKENIZER, "generation_config.json"]))
    except (RepositoryNotFoundError, HFValidationError):
        raise FederationError(
            f"model.base {location!r}: no such folder beside the federation file, and no such Hugging Face model"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UnreachableError(
            f"model.base {location!r}: cannot be fetched from the Hugging Face hub ({type(error).__name__}); "
            "check the network and HF_TOKEN, or give a local folder"
        ) from None
