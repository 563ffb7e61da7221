"""Cron expressions, as Kubeflow's scheduler reads them.

It parses with robfig/cron v1, which knows no ``CRON_TZ=``, and reads all schedules in one time zone. That parser also takes five fields, and
means *seconds* by the first one: a crontab line would run hourly instead of daily.
"""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime

from silotune.components.errors import FederationError

CRON = (
    ("the second", 0, 59, ""),
    ("the minute", 0, 59, ""),
    ("the hour", 0, 23, ""),
    ("the day of the month", 1, 31, ""),
    ("the month", 1, 12, "jan feb mar apr may jun jul aug sep oct nov dec"),
    ("the day of the week", 0, 6, "sun mon tue wed thu fri sat"),  # 7 for Sunday is refused
)
MOST_DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def six_fields(cron: str) -> str:
    """A cron expression as Kubeflow's scheduler reads it: second, minute, hour, day of month, month, day of week.

    Args:
        cron: these six, or the five of a crontab, which start at second 0.

    Raises:
        FederationError: it is neither, a field is out of range, it runs more than once a minute, or no day ever fits.
    """
    fields = cron.split()
    if len(fields) == 5:
        fields = ["0", *fields]
    if len(fields) != len(CRON):
        raise FederationError(
            f"cron: must have 6 fields (second minute hour day month weekday) or the 5 of a crontab, got {len(fields)} in {cron!r}; "
            "such as '0 0 3 * * 1-5' for 3 o'clock on working days"
        )
    values = [numbers_of(text, *known) for text, known in zip(fields, CRON, strict=True)]
    if len(values[0]) > 1:
        raise FederationError(f"cron: the first of 6 fields is the second, and must be one number, got {fields[0]!r}; give 0")
    if fields[5] in ("*", "?") and min(values[3]) > max(MOST_DAYS[m - 1] for m in values[4]):
        raise FederationError(f"cron: no month of field 5 has a day of field 4, got {cron!r}; correct one of them")
    return " ".join(fields)


def numbers_of(text: str, name: str, low: int, high: int, words: str) -> set[int]:
    """The numbers that one field stands for, as robfig/cron v1 takes it."""
    known = {word: low + i for i, word in enumerate(words.split())}
    found: set[int] = set()
    for part in text.lower().split(","):
        span, slash, step = part.partition("/")
        first, dash, last = span.partition("-")
        ends = [low, high] if first in ("*", "?") and not dash else [known.get(e, e) for e in ((first, last) if dash else (first, first))]
        numbers = [int(e) if re.fullmatch(r"[0-9]{1,4}", str(e)) else -1 for e in ends]
        if slash and not dash:
            numbers[1] = high  # 5/15 means 5-59/15
        every = int(step) if re.fullmatch(r"0*[1-9][0-9]{0,3}", step) else 0 if slash else 1
        if not (low <= numbers[0] <= numbers[1] <= high and every):
            allowed = f"{low} to {high}" + (f" or {words.split()[0]} to {words.split()[-1]}" if words else "")
            raise FederationError(f"cron: {name} must be {allowed}, or * , a-b , */n of these, got {text!r}; correct that field")
        found |= set(range(numbers[0], numbers[1] + 1, every))
    return found


def require_zone(timezone: str) -> str:
    """The zone, if it is the scheduler's (KFP_TIMEZONE).

    Raises:
        FederationError: it is another one, or none at all.
    """
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    of_scheduler = os.environ.get("KFP_TIMEZONE") or "UTC"
    try:
        zones = [ZoneInfo(name) for name in (timezone, of_scheduler)]
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise FederationError(f"timezone: must be a name such as UTC or Europe/Zurich, got {timezone!r} and {of_scheduler!r}") from None
    if timezone != of_scheduler:
        now = datetime.now(UTC)
        hours = [(now.astimezone(zone).utcoffset() or now - now).total_seconds() / 3600 for zone in zones]
        raise FederationError(
            f"timezone: Kubeflow reads all schedules in one zone, its scheduler's, which is {of_scheduler!r}, got {timezone!r}; give the cron "
            f"in {of_scheduler} (now {hours[1] - hours[0]:+g} h from {timezone}; summer time changes that), or set CRON_SCHEDULE_TIMEZONE on "
            "ml-pipeline-scheduledworkflow and KFP_TIMEZONE here"
        )
    return timezone
