"""What can run on a cluster: everything in a federation file that stands in the way, told at once and before anything is sent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from silotune.components import federation_file
from silotune.components.cluster import job_manifest
from silotune.components.errors import FederationError
from silotune.components.federation import Federation
from silotune.components.federation_file import PATH_FIELDS, is_remote

FEDERATION_PATH = job_manifest.FEDERATION_FILE  # where every task finds its own copy
PINNED = re.compile(r"@sha256:[0-9a-f]{64}$")


def require_fit(federation: Federation, path: str = FEDERATION_PATH) -> None:
    """Raise with everything that stands between a federation and a cluster.

    Args:
        path: where a task finds the federation file, in its own pod.

    Raises:
        FederationError: with every problem, its place in the file, and the cure.
    """
    problems = list(_problems(federation))
    if not path.startswith("/"):
        problems.append(f"--path: must be absolute, in a task's own pod, got {path!r}; the default is {FEDERATION_PATH}")
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise FederationError("\n".join([f"{federation.file.name} cannot run on a cluster: {count}", *(f"  {p}" for p in problems)]))


def _problems(federation: Federation) -> Iterator[str]:
    raw = federation_file.parse(federation.file)  # relative paths are only told from absolute ones there
    if federation.custody == "none":
        yield "security.signing: must be on where parties share a store, got off; remove it, and add security.keys"
    elif federation.custody == "local":
        yield "security.keys: are required where parties share a store; each party makes its own with `silotune keys new`"
    if not is_remote(federation.storage.root):
        yield f"storage.root: must be s3://bucket/prefix, which all parties reach, got '{_as_written(raw, 'storage', 'root')}'"
    if federation.tracking.uri.startswith(("sqlite:", "/")):
        yield f"tracking.uri: must be a server's http:// or https://, or none, got '{_as_written(raw, 'tracking', 'uri')}'"
    if not PINNED.search(federation.coordinator_image or ""):
        got = repr(federation.coordinator_image) if federation.coordinator_image else "none"
        yield f"coordinator_image: must name an image by digest, registry/name@sha256:…, got {got}; a tag can change under a run"
    if federation.model_image is not None and not PINNED.search(federation.model_image):
        got = repr(federation.model_image)
        yield f"model_image: must name an image by digest, registry/name@sha256:…, got {got}; a tag can change under a run"
    default = job_manifest.CLAIMS if federation.launcher == "job" else []
    mounts = [[c.mount for c in silo.placement.claims or default] for silo in federation.silos]
    base = federation.model.base
    if base.startswith("/"):
        readers = [*mounts, [c.mount for c in federation.coordinator.claims]]
        everywhere = [m for m in mounts[0] if all(m in its for its in readers)]
        where = "placement.claims of every silo and of coordinator.claims"
        yield from _misplaced("model.base", str(raw["model"]["base"]), base, everywhere, where)
    elif not is_remote(base) and federation.launcher == "job":
        yield (
            f"model.base: must be s3:// or a folder of a claim where silos' Jobs load it, which have no way to the Hugging Face hub, got {base!r}; "
            "put a copy that save_pretrained wrote into the store"
        )
    for i, silo in enumerate(federation.silos):
        where, place, written = f"silos[{i}]", silo.placement, raw["silos"][i]
        for key in PATH_FIELDS:
            if value := getattr(silo, key):
                yield from _misplaced(f"{where}.{key}", str(written.get(key, "the default")), value, mounts[i], f"{where}.placement.claims")
        if is_remote(silo.storage):
            yield f"{where}.storage: must be a folder of a volume, got '{silo.storage}'; add a claim to {where}.placement.claims"
        if not PINNED.search(place.image or ""):
            got = repr(place.image) if place.image else "none"
            yield f"{where}.placement.image: must name an image by digest, registry/name@sha256:…, got {got}; a tag can change under a run"
        if federation.launcher == "job" and not place.namespace:
            yield f"{where}.placement.namespace: is required with launcher: job; name the silo's own namespace"
        if federation.launcher == "pod":
            yield from job_manifest.one_pod(silo)


def _as_written(raw: dict[str, Any], section: str, key: str) -> str:
    return str((raw.get(section) or {}).get(key, "the default, on this machine"))


def _misplaced(where: str, written: str, location: str, mounts: list[str], claims: str) -> Iterator[str]:
    if is_remote(location):
        return
    if not written.startswith(("/", "${")):
        yield f"{where}: must be s3:// or an absolute path in the silo's pods, got '{written}', which is on this machine"
    elif not any(within(location, mount) for mount in mounts):
        yield f"{where}: must lie under a mount of {claims}, got '{location}'; add its claim, or use s3://"


def within(location: str, folder: str) -> bool:
    """Whether a path or an s3:// prefix is another one, or below it."""
    return f"{location.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")
