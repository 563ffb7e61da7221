"""A store that is a folder, local or shared by mount."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from silotune.components.errors import FederationError
from silotune.components.store.local_files import beside, file_errors, make_folder, open_source, sync_folder
from silotune.components.store.object_store import KEY, ObjectMissing, check_range, checked, probe

CHUNK = 2**20  # bytes copied at a time between files
STALE = 24 * 3600.0  # seconds after which a temporary file belongs to nobody any more
TEMPORARY = ".tmp"  # folder in the store's root; no key begins with it, so `list` never shows it


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
        check_range(start, length)
        with self._reading(key) as file:
            file.seek(start)
            return file.read(max(0, min(length, os.fstat(file.fileno()).st_size - start)))

    def size(self, key: str) -> int | None:
        with file_errors(str(self)), suppress(FileNotFoundError, NotADirectoryError):
            found = self._path(key).stat()
            return found.st_size if stat.S_ISREG(found.st_mode) else None
        return None

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with file_errors(str(self)), self._temporary(lambda file: file.write(data)) as temporary:
            make_folder(path.parent)
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
            sync_folder(path.parent)  # also for the loser: what it is about to read must not vanish with a power failure
            return created

    def put_file(self, key: str, path: Path) -> None:
        place, (size, source) = self._path(key), open_source(path)
        with source, file_errors(str(self)):
            if self.size(key) != size:
                with self._temporary(lambda file: shutil.copyfileobj(source, file, CHUNK)) as temporary:
                    make_folder(place.parent)
                    temporary.replace(place)
            sync_folder(place.parent)  # also if it was there: its writer may have been killed just before this

    def fetch_file(self, key: str, path: Path) -> None:
        with self._reading(key) as source, beside(path) as temporary, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK)

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        checked(prefix + "x")  # a prefix is the beginning of some key
        keys = []
        with file_errors(str(self)):
            for folder, _, names in os.walk(self._root / prefix.rpartition("/")[0], onerror=_unless_missing):
                within = os.path.relpath(folder, self._root)
                keys += names if within == "." else [f"{within}/{name}" for name in names]
        return iter(sorted(key for key in keys if key.startswith(prefix) and KEY.match(key) and key > after))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with file_errors(str(self)), suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
            sync_folder(path.parent)

    def url(self, key: str) -> str:
        return str(self._path(key))

    def check(self) -> None:
        """As in `ObjectStore`; makes the folder if there is none, and clears what killed writers left behind more than a day ago."""
        with file_errors(str(self)):
            make_folder(self._root / TEMPORARY)
            for left in (self._root / TEMPORARY).iterdir():
                with suppress(FileNotFoundError):
                    if left.stat().st_mtime < time.time() - STALE:
                        left.unlink()
        probe(self)

    def _path(self, key: str) -> Path:
        return self._root / checked(key)

    @contextmanager
    def _reading(self, key: str) -> Iterator[BinaryIO]:
        path = self._path(key)
        with file_errors(str(self)):
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
        make_folder(path.parent)
        try:
            with path.open("xb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
