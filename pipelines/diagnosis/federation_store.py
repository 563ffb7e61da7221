"""The federation's store, asked from here: can it be written and read, does its clock agree, how does it encrypt?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any

from silotune.components.errors import UnreachableError
from silotune.components.federation import Federation
from silotune.components.federation_file import is_remote
from silotune.pipelines.diagnosis.findings import Finding, fail, ok, warn
from silotune.pipelines.diagnosis.kubernetes_view import TIMEOUT

SKEW = (30.0, 300.0)  # seconds between two clocks that are odd, and that are wrong; S3 refuses 900


def store(federation: Federation) -> Iterator[Finding]:
    from silotune.components.rounds import Rounds

    rounds = Rounds.of(federation)
    rounds.store.check()
    yield ok("store", f"{federation.storage.root} can be written, read and listed, and honours create-if-absent")
    latest = rounds.latest()
    yield ok("store", f"stands at round {latest.round}" if latest else "has no round of this federation yet")


def _bucket(federation: Federation) -> str:
    return federation.storage.root.removeprefix("s3://").partition("/")[0] if is_remote(federation.storage.root) else ""


def _ask_s3(method: str, **words: str) -> dict[str, Any]:
    """An answer of the store, also one that refuses: {"headers", "code", "body"}."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client = boto3.client("s3", config=Config(retries={"total_max_attempts": 2}, connect_timeout=TIMEOUT[0], read_timeout=TIMEOUT[1]))
        body = getattr(client, method)(**words)
        return {"headers": body["ResponseMetadata"]["HTTPHeaders"], "code": "", "body": body}
    except ClientError as error:
        told = error.response
        return {
            "headers": told.get("ResponseMetadata", {}).get("HTTPHeaders", {}),
            "code": told.get("Error", {}).get("Code", ""),
            "body": {},
        }
    except BotoCoreError as error:
        raise UnreachableError(
            f"the store gives no answer ({type(error).__name__}); check AWS_ENDPOINT_URL, credentials and proxies"
        ) from None


def clock(federation: Federation) -> Iterator[Finding]:
    """This machine's clock against the store's, which S3 signatures and Job deadlines rest on."""
    if not (bucket := _bucket(federation)):
        return
    before = time.time()
    date = _ask_s3("head_bucket", Bucket=bucket)["headers"].get("date", "")
    if not date:
        yield warn("clock", "the store's answers bear no date")
        return
    skew = parsedate_to_datetime(date).timestamp() + 0.5 - (before + time.time()) / 2  # a date is cut to whole seconds
    what = f"{abs(skew):.0f} s {'ahead of' if skew < 0 else 'behind'} the store's clock"
    if abs(skew) < SKEW[0]:
        yield ok("clock", f"within {max(2, round(abs(skew)) + 1)} s of the store's")
    elif abs(skew) < SKEW[1]:
        yield warn("clock", what, "let NTP set the clock")
    else:
        yield fail("clock", what, "let NTP set the clock; S3 refuses requests that are 15 minutes off")


def encryption(federation: Federation) -> Iterator[Finding]:
    """What a probe object is encrypted with, which is written as everything is, read again and deleted; with a key of KMS that tries the key."""
    from silotune.components.rounds import Rounds
    from silotune.components.store.s3_store import S3Store

    if not (bucket := _bucket(federation)):
        return
    store, wanted = Rounds.of(federation).store, federation.storage.kms_key
    assert isinstance(store, S3Store)
    algorithm, key = store.encryption()
    if wanted and not algorithm.startswith("aws:kms"):
        what = f"storage.kms_key is {wanted}, and the store has encrypted a probe object with {algorithm or 'nothing that it tells of'}"
        yield fail("encryption", what, "use a store with SSE-KMS, or remove storage.kms_key")
    elif wanted and "alias/" not in wanted and key.rpartition("/")[2] != wanted.rpartition("/")[2]:
        what = f"storage.kms_key is {wanted}, and the store has encrypted a probe object with {key}"
        yield fail("encryption", what, "bring the two together")
    elif algorithm.startswith("aws:kms"):
        rights = "every party's role needs kms:GenerateDataKey and kms:Decrypt on it (`silotune policies --kms-key`)"
        with_key = key or "the account's default key"
        yield ok("encryption", f"a probe object in bucket {bucket} was encrypted by {with_key} ({algorithm}), and read again; {rights}")
    elif algorithm:
        yield ok("encryption", f"a probe object in bucket {bucket} was encrypted by the store ({algorithm})")
    else:
        yield from _bucket_encryption(bucket)


def _bucket_encryption(bucket: str) -> Iterator[Finding]:
    """What the bucket itself says, where the store does not tell how an object is encrypted."""
    answer = _ask_s3("get_bucket_encryption", Bucket=bucket)
    if answer["code"] in ("AccessDenied", "403"):
        yield warn("encryption", f"of bucket {bucket} cannot be seen", "grant s3:GetEncryptionConfiguration")
        return
    rules = answer["body"].get("ServerSideEncryptionConfiguration", {}).get("Rules", [])
    default: dict[str, str] = next(
        (r["ApplyServerSideEncryptionByDefault"] for r in rules if "ApplyServerSideEncryptionByDefault" in r), {}
    )
    if default:
        yield ok("encryption", f"bucket {bucket} is encrypted by the store ({default['SSEAlgorithm']})")
    else:
        yield warn("encryption", f"bucket {bucket} names no encryption at rest", "turn it on, unless the store encrypts by other means")
