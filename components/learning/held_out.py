"""Held out: which of a silo's records steer the run instead of training, where it names no file for that.

Each record, or person, is drawn by itself, by its own content and a seed. So a silo may add records, take some away or put them in another
order, and what was trained on in an earlier round is never judged by in a later one; copies of a record are on one side together.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Iterable
from typing import Any

from silotune.components.learning.records import PERSON


def held_out(records: Iterable[dict[str, Any]], fraction: float, *seed: str | int) -> list[bool] | None:
    """For each record whether it is set aside: a share of about ``fraction``, at least one record or person, and not all.

    None where all records are of one person, or copies of one record, which cannot be split.
    """
    places = array("d", (_place(record, *seed) for record in records))
    if len(set(places)) < 2:
        return [] if not places else None
    cut = min(max(fraction, math.nextafter(min(places), 1.0)), max(places))
    return [place < cut for place in places]


def _place(record: dict[str, Any], *seed: str | int) -> float:
    """In [0, 1), evenly: what whose record it is, or the record itself, says under ``seed``."""
    owner = record.get(PERSON) or json.dumps(record, sort_keys=True)
    digest = hashlib.sha256(json.dumps([*seed, owner]).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48
