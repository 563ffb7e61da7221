"""The affinity map: which party's pods may read and write what, and where two reach what only one of them should.

access(federation)      every access, a line each
affinity(federation)    findings: each violation, else that there is none
render(federation)      the map as a table
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from silotune.components.federation import Federation
from silotune.components.federation_file import COORDINATOR, is_remote
from silotune.pipelines.diagnosis.findings import Finding, fail, ok
from silotune.pipelines.diagnosis.silo_namespace import claims_of, runs_namespace, secrets_of, spot
from silotune.pipelines.kubeflow import cluster_fit

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Access:
    """A line of the affinity map."""

    party: str
    place: str  # a prefix of a bucket, or a volume or Secret of a namespace
    rights: str


def access(federation: Federation) -> list[Access]:
    """Which party's pods may touch what. Buckets' own policies come from `silotune policies`."""
    ours = f"{federation.storage.root}/{federation.name}"
    base = [federation.model.base] if is_remote(federation.model.base) else []
    lines = [Access(COORDINATOR, f"{ours}/", "read, create; erase update files")]
    lines += [Access(COORDINATOR, place, "read") for place in base]
    for silo in federation.silos:
        lines += [
            *(Access(silo.id, place, "read") for place in base),
            Access(silo.id, f"{ours}/", "read agreements, plans, globals, commits; create its own manifests, reports, scores"),
            Access(silo.id, f"{ours}/contributions/{silo.id}/", "read, create"),
        ]
        for key in ("train", "valid", "test"):
            if (place := getattr(silo, key)) and is_remote(place):
                lines.append(Access(silo.id, place, "read"))
        if is_remote(silo.storage):
            lines.append(Access(silo.id, silo.storage, "read, write"))
        for c in claims_of(federation, silo):
            lines.append(Access(silo.id, f"volume {spot(silo, c.claim)} at {c.mount}", "read" if c.read_only else "read, write"))
        lines += [Access(silo.id, f"secret {spot(silo, s.name)}", "use") for s in secrets_of(federation, silo)]
    return lines


def render(federation: Federation) -> RenderableType:
    """The map as a table, a party after the other."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("pods of", "reach", "and may"):
        table.add_column(heading, no_wrap=heading == "pods of", overflow="fold")
    before = ""
    for line in access(federation):
        table.add_row(Text(line.party if line.party != before else ""), Text(line.place), Text(line.rights))
        before = line.party
    return table


def affinity(federation: Federation, namespace: str | None = None) -> Iterator[Finding]:
    """What two parties may reach that only one of them should.

    Args:
        namespace: of Kubeflow Pipelines, as in `kfp_api.connect`.
    """
    broken = 0
    of_runs = runs_namespace(namespace)
    placed = [s for s in federation.silos if s.placement.namespace or federation.launcher == "pod"]  # a missing one is told by `doctor.fit`
    for silo in placed:
        if federation.launcher == "job" and spot(silo, "") == of_runs:
            broken += 1
            why = f"namespace {of_runs} of silo {silo.id} is the one where the coordinator's tasks run, with its secrets"
            yield fail("affinity map", why, "give the silo a namespace of its own")
    for one, other in combinations(placed, 2):
        shared: dict[str, set[str]] = {
            "namespace": {spot(s, "") for s in (one,) if federation.launcher == "job"} & {spot(other, "")},
            "volume": {spot(one, c.claim) for c in claims_of(federation, one)}
            & {spot(other, c.claim) for c in claims_of(federation, other)},
            "secret": {spot(one, s.name) for s in secrets_of(federation, one)}
            & {spot(other, s.name) for s in secrets_of(federation, other)},
        }
        for kind, places in shared.items():
            for place in sorted(places):
                broken += 1
                yield fail(
                    "affinity map", f"{kind} {place.rstrip('/')} is shared by silos {one.id} and {other.id}", f"give each its own {kind}"
                )
    root = federation.storage.root
    remote = {f"{s.id}'s {key}": getattr(s, key) for s in federation.silos for key in ("storage", "train", "valid", "test")}
    remote = {what: place for what, place in remote.items() if place and is_remote(place)}
    for what, place in remote.items():
        if cluster_fit.within(place, root) or (what.endswith("storage") and cluster_fit.within(root, place)):
            broken += 1
            yield fail(
                "affinity map", f"{what}, {place}, and the store that all share, {root}, overlap", "use a bucket or prefix of its own"
            )
    for (one_what, a), (other_what, b) in combinations(remote.items(), 2):
        owners = {w.partition("'")[0] for w in (one_what, other_what)}
        if len(owners) == 2 and (cluster_fit.within(a, b) or cluster_fit.within(b, a)):
            broken += 1
            yield fail("affinity map", f"{one_what}, {a}, and {other_what}, {b}, overlap", "give each silo a bucket or prefix of its own")
    if not broken:
        yield ok("affinity map", f"{len(access(federation))} accesses; no two silos share a namespace, volume, secret or prefix")
