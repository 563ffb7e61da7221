"""Output control: what may leave a silo, looked at just before it does.

An update file holds the tensors that the plan lists, by name, shape and number format, each once, and a header whose texts are the plan's own;
nothing else can hide in it, since the file has one way to be written (see `learning.tensor_file`). It is no larger than the policy allows.
A report holds numbers by known names, as far as the policy allows them, and a reason from a fixed vocabulary (see `protocol.Report`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from silotune.components.errors import RefusedError
from silotune.components.learning.tensor_file import MalformedFile, open_tensor_file
from silotune.components.learning.update import DTYPE, KEY, read_header
from silotune.components.protocol import Plan

if TYPE_CHECKING:
    from silotune.components.steward.policy import Policy

REASON = "output control"


def require_update(
    path: Path, plan: Plan, federation: str, silo: str, schema: Mapping[str, Sequence[int]], codec: str, policy: Policy | None
) -> None:
    """Insist that an update file holds what the plan asks for, and no more.

    Args:
        schema: tensor name -> shape, as the plan lists them for this silo.

    Raises:
        RefusedError: with the first rule that is broken.
    """
    size = path.stat().st_size
    if policy and policy.max_update_bytes is not None and size > policy.max_update_bytes:
        raise RefusedError(
            f"silo {silo!r}: its update has {size} bytes, its policy lets {policy.max_update_bytes} out; train fewer or smaller tensors, or in "
            "bfloat16",
            "policy: update size",
        )
    try:
        file, header = open_tensor_file(path), read_header(path)
    except MalformedFile as error:
        raise _refused(silo, f"is no update file: {error}") from None
    if set(file.metadata) != {KEY}:
        raise _refused(silo, "has metadata beside its header")
    if odd := sorted(set(file.entries) ^ set(schema)):
        raise _refused(silo, f"must hold the {len(schema)} tensors of the plan, and differs in {odd[0]!r}")
    for name, entry in file.entries.items():
        if list(entry.shape) != list(schema[name]) or entry.dtype != DTYPE[codec]:
            wanted = f"{DTYPE[codec]} of {list(schema[name])}"
            raise _refused(silo, f"must hold {name!r} as {wanted}, has {entry.dtype} of {list(entry.shape)}")
    told = {
        "federation": federation,
        "agreement": plan.agreement,
        "plan": plan.digest,
        "base": plan.base,
        "incoming": plan.incoming,
        "silo": silo,
    }
    if odd := sorted(field for field, text in told.items() if getattr(header, field) != text):
        raise _refused(silo, f"says another {odd[0]} than the plan")
    if set(header.tensors) != set(schema):
        raise _refused(silo, "has digests of other tensors than it holds")


def told_numbers(numbers: Mapping[str, float], policy: Policy | None) -> dict[str, float]:
    """Those of a report's numbers that the policy lets out."""
    allowed = policy.report if policy else None
    return {name: value for name, value in numbers.items() if allowed is None or name in allowed}


def _refused(silo: str, rule: str) -> RefusedError:
    return RefusedError(f"silo {silo!r}: nothing was sent: its update {rule}; use one version of silotune in all of its steps", REASON)
