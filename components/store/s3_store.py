"""A store that is a bucket, or a part of one, of any server that speaks S3.

Only what every S3 store measured does alike is used (AWS, Ceph, moto): a single PUT with ``If-None-Match: *`` and ``Content-MD5``, ranged
GET, HEAD, LIST, DELETE, multipart upload. Never If-Match, ETags or checksum headers: readers check digests of their own. All that is new is
sent with ``If-None-Match: *``, files too, so that a policy may demand it (`bucket_policies`); a multipart upload does not rest on it.
Credentials, region and endpoint come from where boto3 looks (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, a profile, an instance role). Those of
a silo's own buckets stand under the same names after ``SILO_``; of these, what is not set is as for the store.
"""

from __future__ import annotations

import base64
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from silotune.components.errors import FederationError, SilotuneError, UnreachableError
from silotune.components.store.local_files import AGAIN, beside, open_source
from silotune.components.store.object_store import KEY, PROBE, ObjectMissing, check_range, checked, probe, without_secrets

PART = 16 * 2**20  # bytes that travel in one request
PARTS = 10_000  # of one upload at most; of a larger file each part is larger
PATIENCE = 600.0  # seconds after which an answer that keeps breaking off is not asked for again

CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
# What an S3 error code, an HTTP status or a botocore exception means to the person who reads it; the first row that knows it speaks.
MEANING: list[tuple[str, type[SilotuneError], str]] = [
    ("NoSuchBucket", UnreachableError, "there is no such bucket; create it, or correct `storage`"),
    ("InsufficientStorage QuotaExceeded XMinioStorageFull 507", UnreachableError, f"the store has no room left; free space and {AGAIN}"),
    ("RequestTimeTooSkewed", UnreachableError, "this machine's clock is too far from the store's; set it right"),
    ("AuthorizationHeaderMalformed IllegalLocationConstraintException PermanentRedirect 301", UnreachableError,
     "the bucket lies in another region; set AWS_DEFAULT_REGION to it"),
    ("NoCredentialsError PartialCredentialsError CredentialRetrievalError TokenRetrievalError SSOTokenLoadError UnauthorizedSSOTokenError",
     UnreachableError, f"no credentials were found; set {CREDENTIALS}"),
    ("KMS.AccessDenied KMS.DisabledException KMS.NotFoundException KMS.InvalidStateException KMS.KMSInvalidStateException KMS.KeyUnavailableException",
     UnreachableError, "the key of KMS cannot be used; it must be enabled, and this account have kms:GenerateDataKey and kms:Decrypt on it "
     "(`silotune policies --kms-key`)"),
    ("ExpiredToken InvalidAccessKeyId InvalidToken 401 403", UnreachableError,
     f"the store refuses these credentials; check {CREDENTIALS}, and that they may get, put, list and delete objects there"),
    ("NotImplemented 501", FederationError, "the store must support PUT with If-None-Match: *, and does not; use one that does"),
    ("BadDigest IncompleteBody NoSuchUpload RequestTimeout SlowDown 409 429 500 502 503 504", UnreachableError,
     f"the store cannot serve just now; wait, then {AGAIN}"),
    ("ParamValidationError ProfileNotFound ConfigParseError InvalidConfigError", FederationError,
     "boto3 refuses its settings; correct `storage`, AWS_PROFILE or the AWS configuration file"),
    ("SSLError", UnreachableError, "its certificate is not trusted; set AWS_CA_BUNDLE to the file of its authority"),
]  # fmt: skip


class S3Store:
    """A bucket, or the part of it under a prefix. A killed upload leaves parts behind: let a lifecycle rule of the bucket expire them."""

    def __init__(self, bucket: str, prefix: str = "", *, attempts: int = 5, names: str = "", kms_key: str | None = None) -> None:
        """
        Args:
            names: stands before the names of environment variables, where they are set.
            kms_key: that objects are encrypted with on the server (SSE-KMS).
        """
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._variables = names
        self._encrypted = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key} if kms_key else {}
        self._attempts = attempts
        self._client: tuple[int, Any] = (0, None)  # process id, client

    def get(self, key: str) -> bytes:
        with self._speaking(reads=key) as client:
            return self._read(client, key)[1]

    def get_range(self, key: str, start: int, length: int) -> bytes:
        check_range(start, length)
        with self._speaking(reads=key) as client:
            try:
                answer, data = self._read(client, key, Range=f"bytes={start}-{start + max(length, 1) - 1}")
            except client.exceptions.ClientError as error:
                if _answer(error)[1] == 416:  # the object ends before `start`
                    return b""
                raise
            return data[:length] if "ContentRange" in answer else data[start : start + length]  # a store may ignore Range

    def size(self, key: str) -> int | None:
        try:
            with self._speaking(reads=key) as client:
                return int(client.head_object(**self._names(key))["ContentLength"])
        except ObjectMissing:
            return None

    def create(self, key: str, data: bytes) -> bool:
        names = self._names(key)
        with self._speaking() as client:
            for attempt in range(self._attempts):
                try:
                    client.put_object(**names, **self._encrypted, Body=data, ContentMD5=_md5(data), IfNoneMatch="*")
                    return True
                except client.exceptions.ClientError as error:
                    if _answer(error)[1] == 412:
                        return False
                    # 409 ConditionalRequestConflict: others are writing or deleting this key just now, and nothing is decided
                    if _answer(error)[1] != 409 or attempt + 1 == self._attempts:
                        raise
                time.sleep(0.1 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def put_file(self, key: str, path: Path) -> None:
        size, source = open_source(path)
        with source:
            found = self.size(key)
            if found == size:
                return
            only_new = {"IfNoneMatch": "*"} if found is None else {}  # what is there with another size is damaged, and replaced
            with self._speaking() as client:
                if size >= PART:
                    self._put_parts(client, key, source, size, only_new)
                elif only_new:
                    self.create(key, source.read())  # False: another writer of the same bytes was faster
                else:
                    data = source.read()
                    client.put_object(**self._names(key), **self._encrypted, Body=data, ContentMD5=_md5(data))

    def _put_parts(self, client: Any, key: str, source: BinaryIO, size: int, only_new: dict[str, str]) -> None:
        """A multipart upload. Nothing shows under the key before its completion, whenever the writer dies."""
        from botocore.exceptions import BotoCoreError, ClientError

        names = self._names(key)
        part = max(PART, -(-size // PARTS))
        upload = {**names, "UploadId": client.create_multipart_upload(**names, **self._encrypted)["UploadId"]}

        def send(number: int) -> dict[str, Any]:
            data = os.pread(source.fileno(), part, (number - 1) * part)
            answer = client.upload_part(**upload, PartNumber=number, Body=data, ContentMD5=_md5(data))
            return {"PartNumber": number, "ETag": answer["ETag"]}

        try:
            with ThreadPoolExecutor(8) as pool:  # 8 parts in memory at most
                parts = list(pool.map(send, range(1, -(-size // part) + 1)))
            client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}, **only_new)
        except BaseException as error:
            with suppress(BotoCoreError, ClientError):  # the error at hand says more
                client.abort_multipart_upload(**upload)
            # 404, 412: it is the repeat of a completion whose answer was lost, or another writer of the same bytes was faster
            if _answer(error)[1] not in (404, 409, 412) or self.size(key) != size:
                raise

    def fetch_file(self, key: str, path: Path) -> None:
        # Ranged reads of our own: boto3's download_file sends If-Match with every part after the first.
        size = self.size(key)
        if size is None:
            raise ObjectMissing(key)
        with beside(path) as temporary, ThreadPoolExecutor(8) as pool:  # 8 parts in memory at most
            temporary.touch()

            def copy(start: int) -> None:
                data = self.get_range(key, start, PART)
                if len(data) != min(PART, size - start):
                    raise UnreachableError(f"{self}: object '{key}' must have {size} bytes to its end, ended before; {AGAIN}")
                with temporary.open("r+b") as file:
                    file.seek(start)
                    file.write(data)

            for _ in pool.map(copy, range(0, size, PART)):
                pass

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        checked(prefix + "x")  # a prefix is the beginning of some key
        start = {"StartAfter": self._prefix + checked(after)} if after else {}
        with self._speaking() as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix + prefix, **start)
            keys = [found["Key"].removeprefix(self._prefix) for page in pages for found in page.get("Contents", ())]
        return iter(sorted(key for key in keys if KEY.match(key) and key > after))

    def delete(self, key: str) -> None:
        with self._speaking() as client:
            client.delete_object(**self._names(key))

    def url(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{checked(key)}"

    def check(self) -> None:
        """As in `ObjectStore`, with fewer attempts: whoever waits for the answer is a person."""
        probe(self._hasty())

    def encryption(self) -> tuple[str, str]:
        """(algorithm, key) that the server says it has encrypted a probe object with, which is written, read again and deleted; "" for none."""
        store, key = self._hasty(), f"{PROBE}/{uuid.uuid4().hex}"
        try:
            store.create(key, b"encrypted?")
            if store.get(key) != b"encrypted?":
                raise FederationError(f"{self}: must return what was just written, did not for '{key}'; use a consistent store")
            with store._speaking(reads=key) as client:
                told = client.head_object(**store._names(key))
            return str(told.get("ServerSideEncryption") or ""), str(told.get("SSEKMSKeyId") or "")
        finally:
            with suppress(SilotuneError):  # as in `probe`
                store.delete(key)

    def _hasty(self) -> S3Store:
        """The same, with fewer attempts."""
        store = S3Store(self._bucket, self._prefix.rstrip("/"), attempts=2, names=self._variables)
        store._encrypted = self._encrypted
        return store

    def __str__(self) -> str:
        endpoint = self._client[1].meta.endpoint_url if self._client[1] else self._endpoint or "its endpoint"
        return f"store 's3://{self._bucket}/{self._prefix.rstrip('/')}' at {without_secrets(endpoint)}"

    def _names(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + checked(key)}

    def _read(self, client: Any, key: str, **extra: str) -> tuple[dict[str, Any], bytes]:
        from botocore.exceptions import BotoCoreError, ResponseStreamingError
        from urllib3.exceptions import HTTPError

        patience = time.monotonic() + PATIENCE
        for attempt in range(self._attempts):
            answer = None
            try:
                answer = client.get_object(**self._names(key), **extra)
                return answer, answer["Body"].read()
            except (BotoCoreError, HTTPError) as error:  # it broke within the body: botocore repeats only what breaks before it
                repeated = answer is None and isinstance(error, BotoCoreError)  # by botocore, as often as it may be
                if repeated or attempt + 1 == self._attempts or time.monotonic() > patience:
                    raise error if isinstance(error, BotoCoreError) else ResponseStreamingError(error=type(error).__name__) from error
            time.sleep(0.1 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def _speaking(self, reads: str | None = None) -> Iterator[Any]:
        """This process's client. Errors leave translated; where an object is read, "not found" is ObjectMissing."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        try:
            yield self._connected()
        except (BotoCoreError, ClientError) as error:
            code, status = _answer(error)
            missing = (status == 404 and code != "NoSuchBucket") or (reads is not None and status == 403 and self._absent(reads, code))
            if reads is not None and missing:
                raise ObjectMissing(reads) from None
            raise self._explained(code, status, type(error).__name__) from error
        except (ResponseParserError, ValueError) as error:  # botocore reads dates before it knows whether the head came whole
            if isinstance(error, ValueError) and "timestamp" not in str(error):
                raise
            raise UnreachableError(f"{self}: an answer broke off before its end; {AGAIN}") from error
        except HTTPError as error:  # botocore does not translate what breaks within the body of a refusal
            raise UnreachableError(f"{self}: an answer broke off before its end ({type(error).__name__}); {AGAIN}") from error
        except OSError as error:
            raise SilotuneError(f"{self}: a local file cannot be read: {error}") from error

    def _absent(self, key: str, code: str) -> bool:
        """Whether an object that may not be read does not exist: who may not list the bucket gets a 403 for what is missing, too.

        One key may still be listed where the policy says so (`bucket_policies`). False if that is forbidden as well.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        if code not in ("AccessDenied", "403"):  # 403 is all that a HEAD says; other codes tell of the credentials
            return False
        name = self._names(key)["Key"]
        try:
            found = self._connected().list_objects_v2(Bucket=self._bucket, Prefix=name, MaxKeys=1).get("Contents", ())
        except (BotoCoreError, ClientError):
            return False
        return all(one["Key"] != name for one in found)

    def _connected(self) -> Any:
        """Sockets must not cross a fork, so a child makes a client of its own. Two threads may make one each; the later one stays."""
        process, client = self._client
        if process == os.getpid():
            return client
        import boto3
        from botocore.config import Config

        config = Config(
            retries={"mode": "standard", "max_attempts": self._attempts},
            connect_timeout=5,
            read_timeout=60,
            max_pool_connections=16,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path"} if self._endpoint else None,
        )
        try:
            # AWS's own name for the region in containers, which boto3 does not read.
            region = next(filter(None, map(os.environ.get, self._named("AWS_DEFAULT_REGION", "AWS_REGION"))), None)
            client = boto3.session.Session(region_name=region, **self._credentials()).client(
                "s3", config=config, endpoint_url=self._endpoint or None
            )
        except ValueError as error:
            endpoint = without_secrets(self._endpoint)
            raise FederationError(
                f"{self._variables}AWS_ENDPOINT_URL: must be a URL such as https://s3.example.org, got '{endpoint}'"
            ) from error
        client.meta.events.register("needs-retry.s3", self._unless_whole)
        self._client = (os.getpid(), client)
        return client

    @property
    def _endpoint(self) -> str:
        return next(filter(None, map(os.environ.get, self._named("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))), "")

    def _named(self, *names: str) -> tuple[str, ...]:
        """Variables in the order in which they count: first those of this store alone."""
        return (*(self._variables + name for name in names), *names)

    def _credentials(self) -> dict[str, str]:
        """Those of this store alone; none where boto3 is to look for them itself."""
        if not self._variables or not os.environ.get(f"{self._variables}AWS_ACCESS_KEY_ID"):
            return {}
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
        return {name.lower(): word for name in names if (word := os.environ.get(self._variables + name))}

    def _unless_whole(self, response: tuple[Any, Any] | None, operation: Any, attempts: int, **_: object) -> float | None:
        """Seconds to the next attempt, where an answer broke off within its headers: http.client takes it for whole, and its body for empty."""
        answer = response[0] if response else None
        if answer is None or answer.status_code not in (200, 206) or operation.http["method"] not in ("GET", "HEAD"):
            return None
        if "content-length" in answer.headers or "transfer-encoding" in answer.headers:
            return None
        if attempts >= self._attempts:
            from botocore.exceptions import ConnectionClosedError

            raise ConnectionClosedError(endpoint_url=without_secrets(self._endpoint))
        return 0.1

    def _explained(self, code: str, status: int, exception: str) -> SilotuneError:
        """The error in words of ours: codes only, since what the server or botocore wrote may hold anything."""
        said = f"{code}, HTTP {status}" if status else exception
        for names, kind, meaning in MEANING:
            if not {code, str(status), exception}.isdisjoint(names.split()):
                return kind(f"{self}: {meaning} ({said})")
        if status:
            return FederationError(f"{self}: the request was refused; check `storage` and that the endpoint speaks S3 ({said})")
        return UnreachableError(f"{self}: cannot be reached; check AWS_ENDPOINT_URL and the network, then {AGAIN} ({said})")


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _answer(error: BaseException | None) -> tuple[str, int]:
    """Error code and HTTP status of an answer, ("", 0) if none came. Where it has no body (HEAD), the code is the status."""
    response = getattr(error, "response", None) or {}
    told = response.get("Error", {})
    denied = told.get("Code") == "AccessDenied" and "kms:" in str(told.get("Message"))  # of S3's AccessDenied only the text says by whom
    return "KMS.AccessDenied" if denied else str(told.get("Code", "")), int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
