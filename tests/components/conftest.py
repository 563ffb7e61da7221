"""Stores to test with: a folder, and S3 as a real server (moto) in a process of its own."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.loaders import JSONFileLoader

from silotune.components.object_store import DirectoryStore, ObjectStore, S3Store

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
def s3(aws: Callable[[str], None], moto_client: Any) -> S3Store:
    aws(moto_client.meta.endpoint_url)
    return S3Store(BUCKET, f"team/{uuid.uuid4().hex[:12]}")


@pytest.fixture
def folder(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    return request.getfixturevalue(request.param)
