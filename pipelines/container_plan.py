"""What a party's containers get of this machine: folders, variables and network, each party its own.

    plan(federation, COORDINATOR, run_folder)    the boxes initialize, combine, aggregate and export
    plan(federation, "north", run_folder)        the boxes of one silo: its own records and storage, nobody else's

Everything appears in a container at the path it has here, so that the federation file means the same on both sides. What does not exist is
left out: the box that needs it says so itself, and only its silo misses the round.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from silotune.components import base_model, keys
from silotune.components.errors import FederationError
from silotune.components.federation import Federation
from silotune.components.federation_file import COORDINATOR, is_remote
from silotune.components.process.progress import RUN_VARIABLE
from silotune.components.steward.policy import VARIABLE as POLICY_VARIABLE
from silotune.components.steward.policy import Policy
from silotune.components.store.object_store import OWN

PARTY_VARIABLE = "SILOTUNE_PARTY"  # in a container: the silo's id, or coordinator
HOME = "/tmp"  # noqa: S108 (in the container: memory, gone with it)
# Read by boto3 from files that may lie in the caller's home.
AWS_FILES = {
    "AWS_CONFIG_FILE": "~/.aws/config",
    "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials",
    "AWS_CA_BUNDLE": "",
    "AWS_WEB_IDENTITY_TOKEN_FILE": "",
}
NUMERICS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM")  # the same threads give the same bytes
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")


@dataclass(frozen=True)
class Images:
    """Of this machine's engine, by tag."""

    silo: str  # with PyTorch: the silos' boxes, initialize and export
    coordinator: str  # without: combine and aggregate


@dataclass(frozen=True)
class ContainerPlan:
    """Of one party."""

    read: tuple[Path, ...]  # files and folders
    write: tuple[Path, ...]  # folders
    environment: dict[str, str]
    network: Literal["none", "host"]


def make_folders(federation: Federation) -> None:
    """What the boxes would make themselves, made before it is mounted: keys in local custody, and the folders that are written.

    Raises:
        OSError: one of the coordinator's cannot be made.
    """
    keys.ensure(federation)
    for folder in (federation.work, _local(federation.storage.root), _tracking(federation)):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    for silo in federation.silos:
        place = _ledger(federation, silo.id)
        try:
            Path(silo.storage).mkdir(parents=True, exist_ok=True, mode=0o700)
            if place and not is_remote(place):
                Path(place).mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:  # the silo's own trouble; its boxes tell of it
            continue


def plan(federation: Federation, party: str, run_folder: Path) -> ContainerPlan:
    """What the containers of one party get.

    Args:
        party: ``coordinator``, or a silo's id.
        run_folder: where the boxes tell of their course, and KFP puts their outputs.

    Raises:
        FederationError, UnreachableError: a base model of the Hugging Face hub cannot be had. It is fetched here, once.
    """
    environment = {"HOME": HOME, "USER": party, RUN_VARIABLE: str(run_folder), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    read, write = [federation.file], [run_folder]
    remote = [federation.storage.root, federation.model.base]
    if party == COORDINATOR:
        write += [federation.work, *filter(None, [_tracking(federation)])]
    else:
        silo = federation.silo(party)
        records = [place for place in (silo.train, silo.valid, silo.test) if place]
        remote += records
        for place in records:
            read += [] if is_remote(place) else _with_links(Path(place))
        write.append(Path(silo.storage))
        if ledger := _ledger(federation, party):
            remote.append(ledger)
            write += [] if is_remote(ledger) else [Path(ledger)]
        if named := os.environ.get(POLICY_VARIABLE):
            environment[POLICY_VARIABLE] = os.path.abspath(named)
            read.append(Path(environment[POLICY_VARIABLE]))
    if store := _local(federation.storage.root):
        write.append(store)
    base, known = _base(federation)
    read += base + list(_key_files(federation, party))
    environment |= known | _named(federation) | _set(NUMERICS)
    if folder := os.environ.get(keys.FOLDER_VARIABLE):
        environment[keys.FOLDER_VARIABLE] = os.path.abspath(folder)
    s3 = any(is_remote(place) for place in remote)
    if s3:
        environment |= _set(name for name in os.environ if name.startswith(("AWS_",) if party == COORDINATOR else ("AWS_", f"{OWN}AWS_")))
        files = {name: Path(os.environ.get(name) or default).expanduser().absolute() for name, default in AWS_FILES.items()}
        found = {name: file for name, file in files.items() if file.is_file()}
        environment |= {name: str(file) for name, file in found.items()}
        read += found.values()
    tracked = party == COORDINATOR and federation.tracking.uri != "none" and _tracking(federation) is None
    if tracked:
        environment |= _set(name for name in os.environ if name.startswith("MLFLOW_TRACKING_"))
    if s3 or tracked:
        environment |= _set(PROXIES)
    return ContainerPlan(_outermost(read), _outermost(write), environment, "host" if s3 or tracked else "none")


def _ledger(federation: Federation, silo_id: str) -> str | None:
    """Where the silo's policy puts its ledger: in a container, what is written to any other folder is gone with it."""
    try:
        policy = Policy.of(federation, silo_id)
    except FederationError:  # its boxes tell of it
        return None
    return policy.ledger.at if policy else None


def _local(location: str) -> Path | None:
    return None if is_remote(location) else Path(location)


def _tracking(federation: Federation) -> Path | None:
    """The folder that MLflow writes on this machine: the database's own, since SQLite and the artefacts need room beside it."""
    uri = federation.tracking.uri
    if uri.startswith("sqlite:///"):
        return Path(uri.removeprefix("sqlite:///")).parent
    path = uri.removeprefix("file://")
    return Path(path) if path.startswith("/") else None


def _base(federation: Federation) -> tuple[list[Path], dict[str, str]]:
    """(what to mount of the base model, the variables by which it is found there)."""
    location = federation.model.base
    if is_remote(location):
        return [], {}
    if location.startswith("/"):
        return _with_links(Path(location)), {}
    snapshot = base_model.resolve(location, federation.work / "base").folder  # <cache>/models--org--name/snapshots/<revision>
    return [snapshot.parents[1]], {"HF_HUB_CACHE": str(snapshot.parents[2])}


def _with_links(path: Path) -> list[Path]:
    """A file or folder, and what the links in the folder lead to: a link out of what is mounted would lead nowhere."""
    return [path, *(file.resolve() for file in (path.iterdir() if path.is_dir() else ()) if file.is_symlink())]


def _key_files(federation: Federation, party: str) -> Iterator[Path]:
    """A party's private keys where they lie in a folder with others', and in local custody the public ones of the others."""
    if folder := os.environ.get(keys.FOLDER_VARIABLE):
        place = Path(folder).absolute()
        yield from (file for pattern in (f"{party}.pem", f"{party}.*.pem", f"{party}.noise") for file in sorted(place.glob(pattern)))
    if federation.custody == "local":
        yield from (federation.key_folder(other) / f"{other}.pub" for other in (COORDINATOR, *federation.silo_ids) if other != party)


def _named(federation: Federation) -> dict[str, str]:
    """The variables that the federation file takes paths from."""
    return _set(re.findall(r"\$\{(\w+)", federation.file.read_text(encoding="utf-8")))


def _set(names: Iterator[str] | tuple[str, ...] | list[str]) -> dict[str, str]:
    return {name: os.environ[name] for name in names if name in os.environ}


def _outermost(paths: list[Path]) -> tuple[Path, ...]:
    """Those that exist, without those that lie in another one."""
    there = sorted({path for path in paths if os.path.exists(path)})
    return tuple(path for path in there if not any(other in path.parents for other in there))
