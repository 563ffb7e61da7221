"""What each party may do in a federation's bucket, as AWS IAM policies to paste.

A silo reads what the coordinator gives out, and creates its own updates, reports, scores and update files. It cannot see, alter or list
what belongs to others, delete anything, or overwrite even its own. The coordinator creates the course, reads all, and erases update files.

Records are created once: ``If-None-Match: *`` is demanded of every write, by a Deny that other policies of the user cannot lift. Its form is
AWS's own ("Enforce conditional writes on Amazon S3 buckets"): the second condition exempts the opening and the parts of a multipart upload,
which cannot carry the header, and leaves its completion, which can. A store that knows neither key (Ceph 16, moto) does not enforce this rule:
there the digests and signatures in the records find out what was overwritten.

A base model in a bucket can be read by all parties. What else a silo keeps in buckets, records above all, is granted by the silo itself.

Without `s3:ListBucket` a store answers 403 for a key that is missing, so each party may list exactly what it may read: `S3Store` asks so.
"""

from __future__ import annotations

import json
import re
from typing import Any

from silotune.components.errors import FederationError
from silotune.components.federation import Federation
from silotune.components.store.object_store import PROBE

Policy = dict[str, Any]

# `?` stands for one character, so that these fit a round and a digest only: with `*`, a silo of the name `plan` would be read by all.
ROUND = "rounds/?????"
DIGEST = "?" * 64


def silo_policy(federation: Federation, silo_id: str, *, tls_only: bool = False, kms_key: str = "") -> Policy:
    """The IAM policy of one silo's user or role: the store, and where the base model lies in a bucket, to read that.

    Args:
        tls_only: also refuse requests that are not encrypted; wrong for an endpoint of plain ``http``.
        kms_key: ARN of the key that the store's bucket encrypts with (SSE-KMS), whose use is then granted, too; default: storage.kms_key.

    Raises:
        FederationError: no such silo; the store is no bucket; the base model lies in it; the key is no ARN of one.
    """
    silo = federation.silo(silo_id).id
    files = [f"contributions/{silo}/*"]
    secure = federation.privacy.secure_aggregation is not None
    sums, told = f"{ROUND}/secagg", ("keys", "shares", "masked", "confirmations")  # to all; openings to the coordinator
    own = [
        f"{ROUND}/updates/{silo}.json",
        f"{ROUND}/updates/{silo}.*.json",
        f"{ROUND}/reports/*/{silo}.json",
        f"evaluations/{DIGEST}/{silo}/*",
        *([f"{sums}/*/{folder}/{silo}.json" for folder in (*told, "openings")] if secure else []),
        *files,
    ]
    given = [
        "agreements/*",
        "objects/*",
        f"{ROUND}/plan.json",
        f"{ROUND}/commit.json",
        f"{ROUND}/attempts/*",
        f"{ROUND}/refusals/{silo}.json",
        f"{ROUND}/refusals/{silo}.*.json",
        *([f"{sums}/survivors.json", *(f"{sums}/*/{folder}/*" for folder in ("rosters", *told))] if secure else []),
    ]
    place = _Place(federation)
    return _policy(
        place.statement("ReadPlansAndOwn", "s3:GetObject", given + own),
        place.statement("CreateOwn", "s3:PutObject", own),
        place.statement("AbortOwnUploads", "s3:AbortMultipartUpload", files),
        place.listing(given + own),
        *_base(federation),
        *_key(federation, kms_key),
        *place.denials(tls_only),
    )


def coordinator_policy(federation: Federation, *, tls_only: bool = False, kms_key: str = "") -> Policy:
    """The IAM policy of the coordinator's user or role: this federation, and the probe objects of the store's self-check.

    Records can be erased by nobody. Globals can, because one that is damaged in the store is deleted before it is made again.

    Args:
        tls_only, kms_key: as in `silo_policy`.

    Raises:
        FederationError: as there.
    """
    place = _Place(federation)
    files = ["objects/*", "partials/*", "exports/*"]
    records = [
        "agreements/*",
        f"{ROUND}/plan.json",
        f"{ROUND}/commit.json",
        f"{ROUND}/attempts/*",
        f"{ROUND}/refusals/*",
        f"{ROUND}/partials/*",
        *([f"{ROUND}/secagg/survivors.json", f"{ROUND}/secagg/*/rosters/*"] if federation.privacy.secure_aggregation else []),
        "releases/*",
        "audit/*",
        "tracking.json",
    ]
    return _policy(
        place.statement("ReadAll", "s3:GetObject", ["*"], probe=True),
        place.statement("CreateCourse", "s3:PutObject", records + files, probe=True),
        place.statement("AbortUploads", "s3:AbortMultipartUpload", files),
        place.statement("EraseTensorFiles", "s3:DeleteObject", ["contributions/*", "objects/*", "partials/*"], probe=True),
        place.listing(["*"], probe=True),
        *_base(federation),
        *_key(federation, kms_key),
        *place.denials(tls_only),
    )


def render(federation: Federation, *, tls_only: bool = False, kms_key: str = "") -> str:
    """All policies one after the other, each under a line that says whose it is; what follows such a line is JSON.

    Raises:
        FederationError: as in `silo_policy`.
    """
    parts = [("the coordinator", coordinator_policy(federation, tls_only=tls_only, kms_key=kms_key))]
    parts += [(f"silo {silo}", silo_policy(federation, silo, tls_only=tls_only, kms_key=kms_key)) for silo in federation.silo_ids]
    return "\n".join(f"# {party} of federation {federation.name}\n{json.dumps(policy, indent=2)}\n" for party, policy in parts)


def _base(federation: Federation) -> list[Policy]:
    """To read the base model, where it is a folder of a bucket: that one, and nothing beside it.

    Raises:
        FederationError: what all may read would be, or hold, what they may not.
    """
    scheme, _, rest = federation.model.base.partition("://")
    if scheme != "s3":
        return []
    base, root = (f"{place.rstrip('/')}/" for place in (federation.model.base, f"{federation.storage.root.rstrip('/')}/{federation.name}"))
    if base.startswith(root) or root.startswith(base):
        raise FederationError(
            f"model.base: must lie apart from the store, {root.rstrip('/')}, since every party may read all of it, got '{federation.model.base}'; "
            "give it a prefix of its own"
        )
    bucket, _, prefix = rest.strip("/").partition("/")
    inside = f"{prefix}/*" if prefix else "*"
    arn = f"arn:aws:s3:::{bucket}"
    listing: Policy = {"Sid": "ListBaseModel", "Effect": "Allow", "Action": "s3:ListBucket", "Resource": arn}
    listing["Condition"] = {"StringLike": {"s3:prefix": [inside]}}
    return [{"Sid": "ReadBaseModel", "Effect": "Allow", "Action": "s3:GetObject", "Resource": [f"{arn}/{inside}"]}, listing]


def _key(federation: Federation, arn: str) -> list[Policy]:
    """To have the store encrypt and decrypt with a key of KMS; parts of a multipart upload are read again, so that writing needs both."""
    arn = arn or federation.storage.kms_key or ""
    if not arn:
        return []
    if not re.fullmatch(r"arn:aws[a-z-]*:kms:[a-z0-9-]+:\d{12}:key/[A-Za-z0-9-]+", arn):
        raise FederationError(
            f"--kms-key: must be a key's own arn:aws:kms:<region>:<account>:key/<id>, got {arn!r}; a policy knows no alias"
        )
    return [{"Sid": "UseKey", "Effect": "Allow", "Action": ["kms:Decrypt", "kms:GenerateDataKey"], "Resource": arn}]


class _Place:
    """A federation's part of its bucket, in ARNs and key patterns."""

    def __init__(self, federation: Federation) -> None:
        scheme, _, rest = federation.storage.root.partition("://")
        if scheme != "s3":
            raise FederationError(
                f"storage.root: must be s3://bucket/prefix for access policies, got '{federation.storage.root}'; "
                "a folder is guarded by the permissions of its file system"
            )
        bucket, _, prefix = rest.rstrip("/").partition("/")
        self._bucket = f"arn:aws:s3:::{bucket}"
        self._root = f"{prefix}/" if prefix else ""
        self._federation = federation.name

    def statement(self, sid: str, action: str, keys: list[str], *, effect: str = "Allow", probe: bool = False) -> Policy:
        resources = [f"{self._bucket}/{pattern}" for pattern in self._patterns(keys, probe)]
        return {"Sid": sid, "Effect": effect, "Action": action, "Resource": resources}

    def listing(self, keys: list[str], *, probe: bool = False) -> Policy:
        """Permits to list what begins with one of these; a request without a prefix fits none of them."""
        condition = {"StringLike": {"s3:prefix": self._patterns(keys, probe)}}
        return {
            "Sid": "TellMissingFromForbidden",
            "Effect": "Allow",
            "Action": "s3:ListBucket",
            "Resource": self._bucket,
            "Condition": condition,
        }

    def denials(self, tls_only: bool) -> list[Policy]:
        overwriting = self.statement("NeverOverwrite", "s3:PutObject", ["*"], effect="Deny", probe=True)
        overwriting["Condition"] = {"Null": {"s3:if-none-match": "true"}, "Bool": {"s3:ObjectCreationOperation": "true"}}
        if not tls_only:
            return [overwriting]
        plain = self.statement("NeverUnencrypted", "s3:*", ["*"], effect="Deny", probe=True)
        plain["Resource"].append(self._bucket)
        plain["Condition"] = {"Bool": {"aws:SecureTransport": "false"}}
        return [overwriting, plain]

    def _patterns(self, keys: list[str], probe: bool) -> list[str]:
        return [f"{self._root}{self._federation}/{key}" for key in keys] + ([f"{self._root}{PROBE}/*"] if probe else [])


def _policy(*statements: Policy) -> Policy:
    return {"Version": "2012-10-17", "Statement": list(statements)}
