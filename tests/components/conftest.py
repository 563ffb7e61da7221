"""Stores to test with: a folder, and S3 as two real servers: moto in a process of its own, and Ceph's gateway (marker `ceph`)."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.loaders import JSONFileLoader

from silotune.components.store.directory_store import DirectoryStore
from silotune.components.store.object_store import ObjectStore
from silotune.components.store.s3_store import S3Store

BUCKET = "silotune-tests"
SECRET = "wJalrXUtnFEMI-do-not-print"


SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("%s:%s" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def moto_client() -> Iterator[Any]:
    """A client of a real server with the bucket BUCKET, to look at it past our own code.

    The server is a process of its own (it would share this one's interpreter lock), and gives 20 keys a page instead of 1000.
    """
    settings = os.environ | {"MOTO_S3_DEFAULT_MAX_KEYS": "20"}
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=settings)
    endpoint = f"http://{server.stdout.readline().strip()}"
    keys = {"aws_access_key_id": "AKIDEXAMPLE", "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    client = boto3.session.Session(**keys).client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket=BUCKET)
    yield client
    server.stdin.close()  # the server ends with its input, also if this process is killed
    server.wait(timeout=20)


CEPH = Path(__file__).resolve().parents[3] / "shared" / "tools" / "ceph-s3.sh"
CEPH_PORT = 17580  # not the tool's own one, where a person may have started it


@dataclass(frozen=True)
class Gateway:
    """A running Ceph gateway with the bucket BUCKET, and its administrator's credentials."""

    folder: Path
    endpoint: str
    access_key: str = "test"
    secret_key: str = "testsecret"

    def client(self, service: str = "s3") -> Any:
        session = boto3.session.Session(self.access_key, self.secret_key, region_name="us-east-1")
        return session.client(service, endpoint_url=self.endpoint)

    def admin(self, *words: str) -> None:
        """Runs radosgw-admin."""
        command = ["radosgw-admin", "-c", self.folder / "ceph.conf", *words]
        subprocess.run(command, check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="session")
def gateway() -> Iterator[Gateway]:
    """Ceph's S3 gateway, started if it does not run. All test processes of this machine share one; the last to leave stops it."""
    if not CEPH.is_file():
        pytest.skip(f"no tool at {CEPH} that starts Ceph")
    folder = Path(tempfile.gettempdir()) / f"silotune-ceph-{os.getuid()}"
    found = Gateway(folder, f"http://127.0.0.1:{CEPH_PORT}")
    with Path(f"{folder}.users").open("w") as users:
        with alone(folder):
            if not listening(CEPH_PORT):
                if not any(start(folder) for _ in range(3)):
                    pytest.skip("Ceph does not start here; run shared/tools/ceph-s3.sh by hand to see why")
                found.client().create_bucket(Bucket=BUCKET)
                found.admin("caps", "add", "--uid=test", "--caps=user-policy=*")
            fcntl.flock(users, fcntl.LOCK_SH)
        yield found
        with alone(folder):
            try:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # others still use it
            subprocess.run([CEPH, "stop", folder], check=False, timeout=60)


def start(folder: Path) -> bool:
    """Starts Ceph, and installs it if need be. A start takes 15 s, or hangs now and then: then it is stopped, and the next one succeeds."""
    limit = 45 if shutil.which("radosgw") else 400
    command = [CEPH, "start", folder, str(CEPH_PORT)]
    starting = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    with suppress(subprocess.TimeoutExpired):
        if starting.wait(limit) == 0:
            return True
    with suppress(ProcessLookupError):
        os.killpg(starting.pid, signal.SIGKILL)
    starting.wait()
    subprocess.run([CEPH, "stop", folder], check=False, timeout=60)
    return False


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process of this machine at a time."""
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


load_once = functools.cache(JSONFileLoader().load_file)


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Points boto3 at an endpoint, with nothing of this machine's own configuration."""

    def point(endpoint: str) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)

    # Else each client reads a megabyte of API again.
    monkeypatch.setattr("botocore.loaders.JSONFileLoader.load_file", lambda _, path: load_once(path))
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return point


@pytest.fixture
def s3(request: pytest.FixtureRequest, aws: Callable[[str], None]) -> S3Store:
    """In moto; in Ceph where a test is parametrized so."""
    if getattr(request, "param", "s3") == "ceph":
        return request.getfixturevalue("ceph")
    aws(request.getfixturevalue("moto_client").meta.endpoint_url)
    return S3Store(BUCKET, f"team/{uuid.uuid4().hex[:12]}")


@pytest.fixture
def folder(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


@pytest.fixture
def ceph(aws: Callable[[str], None], gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    aws(gateway.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", gateway.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", gateway.secret_key)
    return S3Store(BUCKET, f"team/{uuid.uuid4().hex[:12]}")


@pytest.fixture(params=["folder", "s3", pytest.param("ceph", marks=pytest.mark.ceph)])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    return request.getfixturevalue(request.param)
