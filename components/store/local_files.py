"""Local files that come and go whole: what stores and transfers need of a file system, and its errors in words."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from silotune.components.errors import FederationError, SilotuneError, UnreachableError

AGAIN = "run again; nothing committed is lost"


def open_source(path: Path) -> tuple[int, BinaryIO]:
    try:
        file = path.open("rb")
        return os.fstat(file.fileno()).st_size, file
    except OSError as error:
        raise SilotuneError(f"file '{path}': must be readable to be stored, got: {error.strerror}") from error


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary name in the folder of `path` (made if need be) that becomes `path` at the end, or goes."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    with file_errors(f"folder '{path.parent}'"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """As ``mkdir -p``, with each new name on disk before anything is put below it."""
    if folder.is_dir():
        return
    try:
        folder.mkdir()
    except FileNotFoundError:
        make_folder(folder.parent)
        make_folder(folder)
    except FileExistsError:
        if not folder.is_dir():
            raise
    else:
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def file_errors(where: str) -> Iterator[None]:
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
