"""The object store a federation shares: a folder, or a bucket that speaks S3.

The round protocol stands on one promise, `create`: of all who write the same key, exactly one wins, and what it wrote is there whole and
for good or not at all. There is no overwriting write: records are created once, tensor files are stored under the digest of their bytes.

Only what every S3 store measured does alike is used (AWS, Ceph, moto): a single PUT with ``If-None-Match: *`` and ``Content-MD5``, ranged
GET, HEAD, LIST, DELETE, multipart upload. Never If-Match, ETags or checksum headers: readers check digests of their own. All that is new is
sent with ``If-None-Match: *``, files too, so that a policy may demand it (`pipelines.policies`); a multipart upload does not rest on it.
Credentials, region and endpoint come from where boto3 looks (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, a profile, an instance role).

Whatever goes wrong leaves as an error of `errors`, with store, rule, value and cure, and without what the server wrote.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from silotune.components.errors import FederationError, SilotuneError, UnreachableError

PART = 16 * 2**20  # bytes that travel in one request
PARTS = 10_000  # of one upload at most; of a larger file each part is larger
PATIENCE = 600.0  # seconds after which an answer that keeps breaking off is not asked for again
CHUNK = 2**20  # bytes copied at a time between files
STALE = 24 * 3600.0  # seconds after which a temporary file belongs to nobody any more
TEMPORARY = ".tmp"  # folder in a directory store's root; no key begins with it, so `list` never shows it
PROBE = ".silotune-probe"

# What a store of either kind can hold: S3 allows 1024 bytes with the prefix, file systems 255 in one name.
KEY = re.compile(r"(?=.{1,900}\Z)(?!\.tmp(/|\Z))(?!(.*/)?\.\.?(/|\Z))[A-Za-z0-9._=+,-]{1,255}(/[A-Za-z0-9._=+,-]{1,255})*\Z")

AGAIN = "run again; nothing committed is lost"
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
    ("ExpiredToken InvalidAccessKeyId InvalidToken 401 403", UnreachableError,
     f"the store refuses these credentials; check {CREDENTIALS}, and that they may get, put, list and delete objects there"),
    ("NotImplemented 501", FederationError, "the store must support PUT with If-None-Match: *, and does not; use one that does"),
    ("BadDigest IncompleteBody NoSuchUpload RequestTimeout SlowDown 409 429 500 502 503 504", UnreachableError,
     f"the store cannot serve just now; wait, then {AGAIN}"),
    ("ParamValidationError ProfileNotFound ConfigParseError InvalidConfigError", FederationError,
     "boto3 refuses its settings; correct `storage`, AWS_PROFILE or the AWS configuration file"),
    ("SSLError", UnreachableError, "its certificate is not trusted; set AWS_CA_BUNDLE to the file of its authority"),
]  # fmt: skip


class ObjectMissing(SilotuneError):
    """The store holds no object of this key."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the store holds no object '{key}'", "object missing")
        self.key = key


class ObjectStore(Protocol):
    """What a federation needs of its store.

    Keys are relative to the store's root: names of ``[A-Za-z0-9._=+,-]`` joined by ``/``, 900 characters at most; a name is neither ``.``
    nor ``..``, the first one not ``.tmp``. Every method raises ValueError for another key, UnreachableError when the store cannot be
    reached or has no room, and FederationError when trying again would change nothing.
    """

    def get(self, key: str) -> bytes:
        """The whole object. Raises ObjectMissing."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from byte `start` on, fewer at the end of the object, as a slice. Raises ObjectMissing; ValueError if negative."""

    def size(self, key: str) -> int | None:
        """Bytes in the object, None if there is none."""

    def create(self, key: str, data: bytes) -> bool:
        """Writes the object if the key is free: atomic, and durable once this returns.

        True: this call created it. False: it already existed, whoever wrote it. On S3 that may have been this very call: when the answer to
        a PUT is lost, the client repeats it and meets its own object. So False never means "somebody else's": compare the contents.
        """

    def put_file(self, key: str, path: Path) -> None:
        """Stores a file under a key that always stands for the same bytes (its digest): nothing to do if it is there with this size.

        Protocol records never come this way: it is no create-if-absent. Raises SilotuneError if the file cannot be read.
        """

    def fetch_file(self, key: str, path: Path) -> None:
        """Copies the object to a local file, which appears whole or not at all; memory stays bounded. Raises ObjectMissing.

        The copy is not forced to disk: whoever keeps it over a power failure checks its digest.
        """

    def list(self, prefix: str) -> Iterator[str]:
        """All keys that start with these characters (``a/b`` also finds ``a/bc``), sorted; without what is being written."""

    def delete(self, key: str) -> None:
        """Removes the object; a missing one is fine."""

    def url(self, key: str) -> str:
        """Where a person finds the object."""

    def check(self) -> None:
        """Tries with a probe object what the protocol needs: writing, create-if-absent, reading, listing."""


def open_store(location: str) -> ObjectStore:
    """The store at an absolute path or at ``s3://bucket/prefix``; nothing is touched yet (see `check`)."""
    scheme, _, rest = location.partition("://")
    bucket, _, prefix = rest.rstrip("/").partition("/")
    if scheme == "s3" and re.fullmatch(r"[A-Za-z0-9._-]{1,255}", bucket) and KEY.match(prefix or "x"):
        return S3Store(bucket, prefix)
    if os.path.isabs(location):
        return DirectoryStore(Path(location))
    raise FederationError(f"storage: must be an absolute path or s3://bucket/prefix, got '{_without_secrets(location)}'")


class DirectoryStore:
    """A folder, local or shared by mount. Keys are paths; hard links give create-if-absent, also over NFS."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __str__(self) -> str:
        return f"store '{self._root}'"

    def get(self, key: str) -> bytes:
        with self._reading(key) as file:
            return file.read()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        _check_range(start, length)
        with self._reading(key) as file:
            file.seek(start)
            return file.read(max(0, min(length, os.fstat(file.fileno()).st_size - start)))

    def size(self, key: str) -> int | None:
        with _file_errors(str(self)), suppress(FileNotFoundError, NotADirectoryError):
            found = self._path(key).stat()
            return found.st_size if stat.S_ISREG(found.st_mode) else None
        return None

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with _file_errors(str(self)), self._temporary(lambda file: file.write(data)) as temporary:
            _make_folder(path.parent)
            try:
                os.link(temporary, path)
                created = True
            except FileExistsError:
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path)) from None
                created = temporary.stat().st_nlink == 2  # over NFS the answer to a link that succeeded can be lost: open(2), O_EXCL
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                    raise
                raise FederationError(
                    f"{self}: its file system must support hard links (create-if-absent rests on them), "
                    f"got: {error.strerror}; use a local disk, NFS or S3"
                ) from error
            _sync_folder(path.parent)  # also for the loser: what it is about to read must not vanish with a power failure
            return created

    def put_file(self, key: str, path: Path) -> None:
        place, (size, source) = self._path(key), _open_source(path)
        with source, _file_errors(str(self)):
            if self.size(key) != size:
                with self._temporary(lambda file: shutil.copyfileobj(source, file, CHUNK)) as temporary:
                    _make_folder(place.parent)
                    temporary.replace(place)
            _sync_folder(place.parent)  # also if it was there: its writer may have been killed just before this

    def fetch_file(self, key: str, path: Path) -> None:
        with self._reading(key) as source, _beside(path) as temporary, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK)

    def list(self, prefix: str) -> Iterator[str]:
        _checked(prefix + "x")  # a prefix is the beginning of some key
        keys = []
        with _file_errors(str(self)):
            for folder, _, names in os.walk(self._root / prefix.rpartition("/")[0], onerror=_unless_missing):
                within = os.path.relpath(folder, self._root)
                keys += names if within == "." else [f"{within}/{name}" for name in names]
        return iter(sorted(key for key in keys if key.startswith(prefix) and KEY.match(key)))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _file_errors(str(self)), suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
            _sync_folder(path.parent)

    def url(self, key: str) -> str:
        return str(self._path(key))

    def check(self) -> None:
        """As in `ObjectStore`; makes the folder if there is none, and clears what killed writers left behind more than a day ago."""
        with _file_errors(str(self)):
            _make_folder(self._root / TEMPORARY)
            for left in (self._root / TEMPORARY).iterdir():
                with suppress(FileNotFoundError):
                    if left.stat().st_mtime < time.time() - STALE:
                        left.unlink()
        _probe(self)

    def _path(self, key: str) -> Path:
        return self._root / _checked(key)

    @contextmanager
    def _reading(self, key: str) -> Iterator[BinaryIO]:
        path = self._path(key)
        with _file_errors(str(self)):
            try:
                file = path.open("rb")
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                raise ObjectMissing(key) from None
            with file:
                yield file

    @contextmanager
    def _temporary(self, fill: Callable[[BinaryIO], object]) -> Iterator[Path]:
        """A file with its content on disk, in the store's own file system, to be linked or renamed; gone afterwards."""
        path = self._root / TEMPORARY / uuid.uuid4().hex
        _make_folder(path.parent)
        try:
            with path.open("xb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)


class S3Store:
    """A bucket, or the part of it under a prefix. A killed upload leaves parts behind: let a lifecycle rule of the bucket expire them."""

    def __init__(self, bucket: str, prefix: str = "", *, attempts: int = 5) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._attempts = attempts
        self._client: tuple[int, Any] = (0, None)  # process id, client

    def get(self, key: str) -> bytes:
        with self._speaking(reads=key) as client:
            return self._read(client, key)[1]

    def get_range(self, key: str, start: int, length: int) -> bytes:
        _check_range(start, length)
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
                    client.put_object(**names, Body=data, ContentMD5=_md5(data), IfNoneMatch="*")
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
        size, source = _open_source(path)
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
                    client.put_object(**self._names(key), Body=data, ContentMD5=_md5(data))

    def _put_parts(self, client: Any, key: str, source: BinaryIO, size: int, only_new: dict[str, str]) -> None:
        """A multipart upload. Nothing shows under the key before its completion, whenever the writer dies."""
        from botocore.exceptions import BotoCoreError, ClientError

        names = self._names(key)
        part = max(PART, -(-size // PARTS))
        upload = {**names, "UploadId": client.create_multipart_upload(**names)["UploadId"]}

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
        with _beside(path) as temporary, ThreadPoolExecutor(8) as pool:  # 8 parts in memory at most
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

    def list(self, prefix: str) -> Iterator[str]:
        _checked(prefix + "x")  # a prefix is the beginning of some key
        with self._speaking() as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix + prefix)
            keys = [found["Key"].removeprefix(self._prefix) for page in pages for found in page.get("Contents", ())]
        return iter(sorted(key for key in keys if KEY.match(key)))

    def delete(self, key: str) -> None:
        with self._speaking() as client:
            client.delete_object(**self._names(key))

    def url(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{_checked(key)}"

    def check(self) -> None:
        """As in `ObjectStore`, with fewer attempts: whoever waits for the answer is a person."""
        _probe(S3Store(self._bucket, self._prefix.rstrip("/"), attempts=2))

    def __str__(self) -> str:
        endpoint = self._client[1].meta.endpoint_url if self._client[1] else _endpoint() or "its endpoint"
        return f"store 's3://{self._bucket}/{self._prefix.rstrip('/')}' at {_without_secrets(endpoint)}"

    def _names(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + _checked(key)}

    def _read(self, client: Any, key: str, **extra: str) -> tuple[dict[str, Any], bytes]:
        from botocore.exceptions import BotoCoreError, ResponseStreamingError
        from urllib3.exceptions import HTTPError

        patience = time.monotonic() + PATIENCE
        for attempt in range(self._attempts):
            answer = client.get_object(**self._names(key), **extra)
            try:
                return answer, answer["Body"].read()
            except (BotoCoreError, HTTPError) as error:  # it broke within the body: botocore repeats only what breaks before it
                if attempt + 1 == self._attempts or time.monotonic() > patience:
                    raise error if isinstance(error, BotoCoreError) else ResponseStreamingError(error=type(error).__name__) from error
            time.sleep(0.1 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def _speaking(self, reads: str | None = None) -> Iterator[Any]:
        """This process's client. Errors leave translated; where an object is read, "not found" is ObjectMissing."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield self._connected()
        except (BotoCoreError, ClientError) as error:
            code, status = _answer(error)
            missing = (status == 404 and code != "NoSuchBucket") or (reads is not None and status == 403 and self._absent(reads, code))
            if reads is not None and missing:
                raise ObjectMissing(reads) from None
            raise self._explained(code, status, type(error).__name__) from error
        except OSError as error:
            raise SilotuneError(f"{self}: a local file cannot be read: {error}") from error

    def _absent(self, key: str, code: str) -> bool:
        """Whether an object that may not be read does not exist: who may not list the bucket gets a 403 for what is missing, too.

        One key may still be listed where the policy says so (`pipelines.policies`). False if that is forbidden as well.
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
            s3={"addressing_style": "path"} if _endpoint() else None,
        )
        try:
            client = boto3.session.Session().client("s3", config=config)
        except ValueError as error:
            endpoint = _without_secrets(_endpoint())
            raise FederationError(f"AWS_ENDPOINT_URL: must be a URL such as https://s3.example.org, got '{endpoint}'") from error
        client.meta.events.register("needs-retry.s3", self._unless_whole)
        self._client = (os.getpid(), client)
        return client

    def _unless_whole(self, response: tuple[Any, Any] | None, operation: Any, attempts: int, **_: object) -> float | None:
        """Seconds to the next attempt, where an answer broke off within its headers: http.client takes it for whole, and its body for empty."""
        answer = response[0] if response else None
        if answer is None or answer.status_code not in (200, 206) or operation.http["method"] not in ("GET", "HEAD"):
            return None
        if "content-length" in answer.headers or "transfer-encoding" in answer.headers:
            return None
        if attempts >= self._attempts:
            from botocore.exceptions import ConnectionClosedError

            raise ConnectionClosedError(endpoint_url=_without_secrets(_endpoint()))
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


def _checked(key: str) -> str:
    if not KEY.match(key):
        raise ValueError(f"key: must be names of [A-Za-z0-9._=+,-] joined by '/', none '.' or '..', the first not '.tmp', got {key!r}")
    return key


def _check_range(start: int, length: int) -> None:
    if start < 0 or length < 0:
        raise ValueError(f"range: start and length must not be negative, got start={start}, length={length}")


def _probe(store: ObjectStore) -> None:
    key = f"{PROBE}/{uuid.uuid4().hex}"
    try:
        store.create(key, b"first")
        if store.create(key, b"second"):
            raise FederationError(
                f"{store}: must honour create-if-absent (on S3: answer 412 to a PUT with If-None-Match: * when the object exists), but a "
                f"second write of '{key}' was accepted; use AWS S3, a recent Ceph or MinIO, or a folder"
            )
        if store.get(key) != b"first" or list(store.list(key)) != [key]:
            raise FederationError(f"{store}: must return and list what was just written, did not for '{key}'; use a consistent store")
    finally:
        with suppress(SilotuneError):  # the error above says more; and a store that forbids deletion is fine until `gc`
            store.delete(key)


def _open_source(path: Path) -> tuple[int, BinaryIO]:
    try:
        file = path.open("rb")
        return os.fstat(file.fileno()).st_size, file
    except OSError as error:
        raise SilotuneError(f"file '{path}': must be readable to be stored, got: {error.strerror}") from error


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary name in the folder of `path` (made if need be) that becomes `path` at the end, or goes."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    with _file_errors(f"folder '{path.parent}'"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """As ``mkdir -p``, with each new name on disk before anything is put below it."""
    if folder.is_dir():
        return
    try:
        folder.mkdir()
    except FileNotFoundError:
        _make_folder(folder.parent)
        _make_folder(folder)
    except FileExistsError:
        if not folder.is_dir():
            raise
    else:
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


@contextmanager
def _file_errors(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        said = (error.strerror or type(error).__name__) + (f" ('{error.filename}')" if error.filename else "")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UnreachableError(f"{where} has no room left: {said}; free space and {AGAIN}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UnreachableError(f"{where}: user {os.getuid()} must be able to read and write there, got: {said}; give access") from error
        if error.errno in (errno.EEXIST, errno.EISDIR, errno.ENOTDIR):
            raise FederationError(
                f"{where}: a file and a folder cannot share a name, got: {said}; move one, or change `storage`"
            ) from error
        raise UnreachableError(f"{where}: cannot be reached, got: {said}; check the disk or mount, then {AGAIN}") from error


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _answer(error: BaseException | None) -> tuple[str, int]:
    """Error code and HTTP status of an answer, ("", 0) if none came. Where it has no body (HEAD), the code is the status."""
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", "")), int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _without_secrets(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url).partition("?")[0]
