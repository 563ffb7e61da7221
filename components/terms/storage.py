"""Storage, as terms: where a federation's records lie, how long its update files are kept, and where MLflow is. Free to change at any time."""

from __future__ import annotations

from pydantic import Field

from silotune.components.federation_file import STORE_ROOT, TRACKING_URI
from silotune.components.terms.section import Positive, Section


class Retention(Section):
    """What `silotune gc` may erase."""

    updates: Positive | None = Field(None, description="Update files of so many of the latest rounds are kept; default: all.")


class Storage(Section):
    """Where rounds, updates and globals live: what all parties can reach."""

    retention: Retention = Field(default_factory=Retention, description="How long update files are kept.")
    root: str = Field(STORE_ROOT, description="A folder, or `s3://bucket/prefix` (endpoint: AWS_ENDPOINT_URL).")
    kms_key: str | None = Field(
        None,
        min_length=1,
        description="Key of KMS that the bucket is told to encrypt every object with (SSE-KMS); default: as it is set up.",
    )


class Tracking(Section):
    """MLflow."""

    uri: str = Field(TRACKING_URI, description="Tracking server, SQLite file, or `none`.")
    experiment: str | None = Field(None, description="Experiment name; default: the federation's name.")
