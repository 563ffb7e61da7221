"""Removes what no step needs: `python trim.py root` from a base image's file system, `python trim.py packages FOLDER` from installed packages.

What stays of a base: Python, the libraries it and the wheels link to, certificates, time zones, the list of installed Debian packages, which
scanners read, and of programs `sh` and `mktemp`: Kubeflow starts a task by them. Nothing is left that installs software or changes user.
"""

from __future__ import annotations

import shutil
import stat
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

PROGRAMS = {"sh", "dash", "mktemp"}
FOLDERS_OF_PROGRAMS = ("/usr/bin", "/usr/sbin", "/usr/local/sbin", "/usr/games", "/bin", "/sbin")
ROOT = (
    "/etc/apt", "/etc/pam.d", "/etc/shadow*", "/etc/gshadow*", "/etc/ssl/private", "/usr/include", "/usr/lib/apt", "/usr/lib/dpkg", "/usr/lib/init",
    "/usr/lib/ssl/misc", "/usr/lib/*-linux-gnu/perl*", "/usr/lib/*-linux-gnu/libapt-*", "/usr/lib/*-linux-gnu/libperl*", "/usr/lib/*-linux-gnu/security",
    "/usr/lib/*-linux-gnu/gconv", "/usr/lib/systemd", "/usr/libexec", "/usr/local/include", "/usr/local/share", "/usr/share/bash-completion",
    "/usr/share/debconf", "/usr/share/doc", "/usr/share/dpkg", "/usr/share/info", "/usr/share/keyrings", "/usr/share/man", "/usr/share/perl*",
    "/usr/share/pam*", "/usr/src", "/var/cache/*", "/var/lib/apt", "/var/lib/dpkg/info", "/var/lib/dpkg/triggers", "/var/log/*", "/root/.cache", "/tmp/*",  # noqa: S108
)  # fmt: skip
LIBRARY = (
    "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages/*", "test", "tkinter", "turtledemo", "venv", "config-3*", "*/test", "*/tests",
)  # fmt: skip
PACKAGES = (
    "**/tests", "**/*.a", "**/*.pyi", "botocore/cacert.pem", "numpy/_core/include", "pyarrow/include", "pyarrow/src", "pyarrow/*.pxd",
    "pyarrow/includes", "pyarrow/libarrow_flight*", "pyarrow/libarrow_python_flight*", "pyarrow/_flight*",
    "torch/bin/protoc*", "torch/bin/test_*", "torch/include", "torch/share", "torch/test", "nvidia/**/include",
)  # fmt: skip
COMMANDS = {"python", "python3", "torchrun"}  # of the packages' own; silotune's lies elsewhere
SERVICES = {"s3", "sso", "sso-oidc", "signin", "sts"}  # of Amazon's: the store, and the ways to sign in to it


def root() -> None:
    """Trim the file system this interpreter runs in."""
    for folder in FOLDERS_OF_PROGRAMS:
        if not Path(folder).is_symlink():  # /bin is a link to /usr/bin
            remove(p for p in Path(folder).glob("*") if p.name not in PROGRAMS)
    remove(found("/", (p.removeprefix("/") for p in ROOT)))
    remove(found(sysconfig.get_path("stdlib"), LIBRARY))
    remove(p for p in Path("/usr/local/bin").iterdir() if not p.name.startswith("python") or p.name.endswith("-config"))
    for path in Path("/").glob("*"):
        if path.name not in ("proc", "sys", "dev", "tmp"):
            for each in (path, *path.rglob("*")):
                protect(each)


def packages(folder: str) -> None:
    """Trim a virtual environment."""
    (Path(folder) / ".lock").unlink(missing_ok=True)  # the installer's, which anyone may write
    site = next(Path(folder).glob("lib/python3*/site-packages"))
    remove(found(site, PACKAGES))
    remove(p for p in (site / "botocore" / "data").iterdir() if p.is_dir() and p.name not in SERVICES)
    remove(p for p in (Path(folder) / "bin").iterdir() if p.name not in COMMANDS and not p.name.startswith("python3."))


def protect(path: Path) -> None:
    """Take from a file what lets others change it, or lets it run as another user."""
    if not path.is_symlink():
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o7002:
            path.chmod(mode & 0o775)


def found(folder: str | Path, patterns: Iterable[str]) -> Iterable[Path]:
    return [path for pattern in patterns for path in Path(folder).glob(pattern)]


def remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    {"root": root, "packages": packages}[sys.argv[1]](*sys.argv[2:])
