"""A cron expression means on Kubeflow what whoever wrote it meant, or it is refused."""

from __future__ import annotations

import kfp_api
import pytest

from silotune.components.errors import FederationError
from silotune.pipelines.kubeflow.cron import CRON, numbers_of, six_fields


@pytest.mark.parametrize(
    ("cron", "six"),
    [
        ("0 3 * * *", "0 0 3 * * *"),
        ("15 0 3 1,15 jan-jun ?", "15 0 3 1,15 jan-jun ?"),
        ("*/20 8-18/2 * * 1-5", "0 */20 8-18/2 * * 1-5"),
        ("5/15 * * * SUN", "0 5/15 * * * SUN"),
        ("0 0 29 2 *", "0 0 0 29 2 *"),
    ],
)
def test_a_cron_of_five_or_six_fields_means_what_the_scheduler_reads(cron: str, six: str) -> None:
    assert six_fields(cron) == six
    ours = [numbers_of(text, *known) for text, known in zip(six.split(), CRON, strict=True)]
    assert ours == kfp_api.parse_cron(six)


@pytest.mark.parametrize(
    ("cron", "told"),
    [
        ("", "must have 6 fields"),
        ("0 3 * *", "must have 6 fields"),
        ("CRON_TZ=Europe/Zurich 0 0 3 * * *", "must have 6 fields"),
        ("@daily", "must have 6 fields"),
        ("60 3 * * *", "the minute must be 0 to 59"),
        ("0 24 * * *", "the hour must be 0 to 23"),
        ("0 3 0 * *", "the day of the month must be 1 to 31"),
        ("0 3 * 13 *", "the month must be 1 to 12 or jan to dec"),
        ("0 3 * * 7", "the day of the week must be 0 to 6"),
        ("0 5-3 * * *", "the hour"),
        ("*/0 3 * * *", "the minute"),
        ("0 3 * * mon-", "the day of the week"),
        ("0 3,,4 * * *", "the hour"),
        ("* 0 3 * * *", "must be one number"),
        ("0 3 31 2,4 *", "no month of field 5 has a day"),
    ],
)
def test_a_cron_that_would_not_run_as_meant_is_refused_with_the_field(cron: str, told: str) -> None:
    with pytest.raises(FederationError, match=told):
        six_fields(cron)


def test_a_crontab_line_handed_to_the_scheduler_as_it_is_would_run_hourly() -> None:
    seconds, minutes, hours, *_ = kfp_api.parse_cron("0 3 * * *")
    assert (seconds, minutes, len(hours)) == ({0}, {3}, 24)
