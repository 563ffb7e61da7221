"""Keys of records: where everything of a federation lies in its object store. No server holds a federation; these keys do.

<federation>/agreements/<digest>.json                terms, by their digest
<federation>/objects/<sha256>                        globals and lists of tensors, by content
<federation>/contributions/<silo>/<sha256>           a silo's update files, by content: it can write nowhere else, nobody else can read there
<federation>/rounds/00003/plan.json                  who takes part, from which global, with which tensors
<federation>/rounds/00003/attempts/<k>.json          which silos were asked in the k-th try, and when
<federation>/rounds/00003/reports/<k>/<silo>.json    ok | failed | refused | late, with a reason and allowed scalars
<federation>/rounds/00003/updates/<silo>.json        manifest of an update file; stays valid while the round is open
<federation>/rounds/00003/refusals/<silo>.json       why the aggregator refused it; the silo's next one is updates/<silo>.2.json
<federation>/rounds/00003/partials/<k>/<group>.json  what the sum of a group of updates was made of, in the k-th try (see `aggregate.groups`)
<federation>/partials/<sha256>                       such sums, by content, until the round is committed; the coordinator's alone to read
<federation>/rounds/00003/commit.json                written last: the round happened if and only if it exists
<federation>/evaluations/<global>/<silo>/<split>-<digest>.json
<federation>/releases/00003.json                     what silo-level privacy has been spent on (see `aggregate.releases`)
<federation>/exports/<commit>.json                   what was exported from a commit
<federation>/audit/000007.json                       the audit log (see `audit`)
<federation>/tracking.json                           the MLflow run of the federation
"""

from __future__ import annotations

from collections.abc import Callable


def round_key(federation: str, number: int, *parts: str) -> str:
    """Of a record of a round."""
    return "/".join((federation, "rounds", f"{number:05d}", *parts))


def filed_under(key: str) -> tuple[str, str]:
    """The names in a key that can be the silo's: its folder's, or its own without number and suffix."""
    *_, folder, name = key.split("/")
    return folder, name.split(".", 1)[0]


def name_of(key: str) -> str:
    """The silo whose record lies under a key, by its own name in it."""
    return key.rsplit("/", 1)[1].split(".", 1)[0]


def slot_of(silo: str, refused: Callable[[str], bool]) -> str:
    """The first of a silo's slots whose manifest was not refused."""
    count = 1
    while refused(nth(silo, count)):
        count += 1
    return nth(silo, count)


def nth(silo: str, count: int) -> str:
    return silo if count == 1 else f"{silo}.{count}"


def highest(exists: Callable[[int], bool]) -> int:
    """The highest of the numbers 1, 2, … n that exist without a gap, in O(log n) look-ups; 0 if there is none."""
    known, probe = 0, 1
    while exists(probe):
        known, probe = probe, probe * 2
    while probe - known > 1:
        middle = (known + probe) // 2
        if exists(middle):
            known = middle
        else:
            probe = middle
    return known
