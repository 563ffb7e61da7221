"""Offboarding: how a silo leaves. Taking it out of the file is an amendment: from the next round that is opened it is not asked, and its key signs
nothing.

    without_silo(federation, silo)     the federation file's text without the silo, comments kept
    offboard_text(federation, silo)    what leaving means, from which round on, and what to delete where
"""

from __future__ import annotations

from typing import Any

import yaml

from silotune.components.errors import FederationError
from silotune.components.federation import Federation
from silotune.pipelines.membership.silo_readme import handout


def without_silo(federation: Federation, silo_id: str) -> str:
    """The federation file's text without one silo: its item in ``silos`` and its keys. Comments stay, but those right above its item.

    Raises:
        FederationError: no such silo; the rest is no federation, or cannot reach the quorum; the text is of a shape that cannot be cut.
    """
    federation.silo(silo_id)
    file, quorum = federation.file, federation.rounds.quorum
    left = len(federation.silos) - 1
    if not left:
        raise FederationError(f"{file.name}: {silo_id} is the only silo; a federation needs one, end it instead")
    if quorum and quorum.count > left:
        raise FederationError(
            f"{file.name}: rounds.quorum must be at most the number of silos, {left} without {silo_id}, got {quorum.count}; lower it first"
        )
    text = file.read_text(encoding="utf-8")
    before = yaml.safe_load(text)
    root = yaml.compose(text, yaml.SafeLoader)
    keys = (before.get("security") or {}).get("keys") or {}
    if silo_id in keys:  # first what stands behind, or before: each cut is made on a text of its own
        text = _cut(text, _at(root, "security", "keys"), list(keys).index(silo_id))
        root = yaml.compose(text, yaml.SafeLoader)
    text = _cut(text, _at(root, "silos"), [s["id"] for s in before["silos"]].index(silo_id))
    before["silos"] = [s for s in before["silos"] if s["id"] != silo_id]
    keys.pop(silo_id, None)
    try:
        cut = yaml.safe_load(text)
    except yaml.YAMLError:
        cut = None
    if cut != before:  # anchors, tags, braces over several lines
        raise FederationError(f"{file.name}: the lines of {silo_id} cannot be cut out safely; take its item and its key out by hand")
    return text


def _at(node: Any, *path: str) -> Any:
    for name in path:
        node = next(value for key, value in node.value if key.value == name)
    return node


def _cut(text: str, holder: Any, index: int) -> str:
    """The text without one item of a YAML list or mapping."""
    spans = [(n[0].start_mark, _last(n[1])) if isinstance(n, tuple) else (n.start_mark, _last(n)) for n in holder.value]
    start, end = spans[index]
    if holder.flow_style:  # up to the next item, or from the end of the one before
        if index + 1 < len(spans):
            return text[: start.index] + text[spans[index + 1][0].index :]
        return text[: spans[index - 1][1].index] + text[end.index :] if index else text[: start.index] + text[end.index :]
    lines = text.splitlines(keepends=True)
    first, last = start.line, end.line
    while first and index and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return "".join(lines[:first] + lines[last + 1 :])


def _last(node: Any) -> Any:
    """Where a node's text ends; a block's own mark stands behind the comments that follow it."""
    if isinstance(node, yaml.ScalarNode) or node.flow_style or not node.value:
        return node.end_mark
    final = node.value[-1]
    return _last(final[1] if isinstance(final, tuple) else final)


def offboard_text(federation: Federation, silo_id: str, next_round: int | None = None) -> str:
    """What a silo's leaving is, in plain words and commands.

    Args:
        next_round: the number of the next round to be opened, where it is known.

    Raises:
        FederationError: as `without_silo`.
    """
    without_silo(federation, silo_id)
    left = [s for s in federation.silo_ids if s != silo_id]
    quorum = federation.rounds.quorum.count if federation.rounds.quorum else len(left) // 2 + 1
    since = "the next round that is opened" if next_round is None else f"round {next_round}"
    colluding = ""
    if len(left) < 3:
        colluding = (
            "\nThree silos or more hide an update from the others; with fewer, each can compute what another one sent (docs/security.md).\n"
        )
    return handout("offboarding.md").format(
        silo=silo_id,
        federation=federation.name,
        namespace=f"silotune-{silo_id}",
        file=federation.file.name,
        left=", ".join(left),
        quorum=quorum,
        count=len(left),
        since=since,
        colluding=colluding,
        root=f"{federation.storage.root.rstrip('/')}/{federation.name}",
    )
