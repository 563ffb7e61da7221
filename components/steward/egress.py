"""Output control: what may leave a silo, looked at just before it does.

An update file must be what its coordinator would let in, by the very same rules (see `learning.update`): the tensors that the plan lists, by name,
shape and number format, each once and with the digest in the header; finite numbers, since one that is not has room for others; counts within
the terms; texts that are the plan's own. Nothing else can hide in it, as the file has one way to be written (see `learning.tensor_file`). And it is
no larger than the policy allows. A report holds numbers by known names, as far as the policy allows them, and a reason from a fixed vocabulary
(see `protocol.Report`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from silotune.components.errors import RefusedError
from silotune.components.learning.update import Expectation, UpdateRefused, open_update

if TYPE_CHECKING:
    from silotune.components.steward.policy import Policy

REASON = "output control"


def require_update(path: Path, expected: Expectation, policy: Policy | None) -> None:
    """Insist that an update file holds what the plan asks for, and no more. All of it is read.

    Raises:
        RefusedError: with the first rule that is broken.
    """
    size = path.stat().st_size
    if policy and policy.max_update_bytes is not None and size > policy.max_update_bytes:
        raise RefusedError(
            f"silo {expected.silo!r}: its update has {size} bytes, its policy lets {policy.max_update_bytes} out; train fewer or smaller tensors, "
            "or in bfloat16",
            "policy: update size",
        )
    try:
        open_update(path, expected).verify()
    except UpdateRefused as error:
        raise RefusedError(
            f"silo {expected.silo!r}: nothing was sent: of its update, {error.rule}; use one version of silotune in all of its steps",
            REASON,
        ) from None


def tells(policy: Policy | None, number: str) -> bool:
    """Whether the policy lets this number of a report out."""
    return policy is None or policy.report is None or number in policy.report


def told_numbers(numbers: Mapping[str, float], policy: Policy | None) -> dict[str, float]:
    """Those of a report's numbers that the policy lets out."""
    return {name: value for name, value in numbers.items() if tells(policy, name)}
