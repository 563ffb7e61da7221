"""Images in registries, against one on loopback that asks for a token as Docker Hub, Harbor and ghcr.io do."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from silotune.pipelines.diagnosis.image_registry import MANIFESTS, Image, look

DIGEST = "sha256:" + "a" * 64
BASIC = "Basic " + base64.b64encode(b"steward:password").decode()


class Registry:
    """One image, ``team/silo``; to be read by whom ``door`` lets in: open, token, account or basic."""

    def __init__(self) -> None:
        self.door = "open"
        self.realm = ""  # else its own
        self.elsewhere = ""  # where it redirects to
        self.seen: list[tuple[str, str, str | None]] = []  # method, path, Authorization
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                registry.seen.append(("HEAD", self.path, self.headers["Authorization"]))
                if registry.elsewhere:
                    self.tell(307, {"Location": registry.elsewhere})
                elif missing := registry.missing(self.headers["Authorization"]):
                    self.tell(401, {"WWW-Authenticate": missing})
                elif set(MANIFESTS) - set(self.headers["Accept"].split(", ")):
                    self.tell(406)
                else:
                    self.tell(200 if self.path == f"/v2/team/silo/manifests/{DIGEST}" else 404)

            def do_GET(self) -> None:
                registry.seen.append(("GET", self.path, self.headers["Authorization"]))
                asked = parse_qs(urlsplit(self.path).query)
                known = self.headers["Authorization"] == BASIC or registry.door == "token"
                right = urlsplit(self.path).path == "/token" and asked == {"service": ["ours"], "scope": ["repository:team/silo:pull"]}
                self.tell(200 if right and known else 401, body=json.dumps({"token": "a-token"}).encode())

            def tell(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.host = f"127.0.0.1:{self.server.server_address[1]}"

    def missing(self, shown: str | None) -> str:
        if self.door == "open" or shown == {"basic": BASIC}.get(self.door, "Bearer a-token"):
            return ""
        realm = self.realm or f"http://{self.host}/token"
        return 'Basic realm="ours"' if self.door == "basic" else f'Bearer realm="{realm}",service="ours",scope="repository:team/silo:pull"'


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    made = Registry()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def signed_in(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auths": {registry.host: {"auth": BASIC.removeprefix("Basic ")}}}))


@pytest.mark.parametrize(
    ("text", "host", "name"),
    [
        ("registry.example/team/silo@", "registry.example", "team/silo"),
        ("registry.example:5000/silo:1.2@", "registry.example:5000", "silo"),
        ("localhost/silo@", "localhost", "silo"),
        ("team/silo:tag@", "registry-1.docker.io", "team/silo"),
        ("python@", "registry-1.docker.io", "library/python"),
        ("docker.io/team/silo@", "registry-1.docker.io", "team/silo"),
    ],
)
def test_a_name_is_read_as_docker_reads_it(text: str, host: str, name: str) -> None:
    image = Image.parse(text + DIGEST)
    assert image == Image(host, name, DIGEST)
    assert image.url.startswith("http://localhost/" if host == "localhost" else f"https://{host}/")


@pytest.mark.parametrize("door", ["open", "token"])
def test_an_open_registry_says_whether_it_has_it(registry: Registry, door: str) -> None:
    registry.door = door
    assert look(f"{registry.host}/team/silo@{DIGEST}") == "there"
    assert look(f"{registry.host}/team/silo@sha256:{'b' * 64}") == "absent"


@pytest.mark.parametrize("door", ["account", "basic"])
def test_a_closed_one_opens_to_who_has_signed_in(registry: Registry, door: str, request: pytest.FixtureRequest) -> None:
    registry.door = door
    assert look(f"{registry.host}/team/silo@{DIGEST}") == "closed"
    request.getfixturevalue("signed_in")
    assert look(f"{registry.host}/team/silo@{DIGEST}") == "there"


@pytest.mark.usefixtures("signed_in")
@pytest.mark.parametrize("realm", ["http://tokens.example/token", "file://localhost/etc/passwd"])
def test_the_sign_in_goes_to_no_token_server_in_the_clear(registry: Registry, realm: str) -> None:
    registry.door, registry.realm = "account", realm
    with pytest.raises(OSError, match="without https"):
        look(f"{registry.host}/team/silo@{DIGEST}")
    assert [shown for _, _, shown in registry.seen] == [None]


def test_a_redirect_is_not_followed(registry: Registry) -> None:
    registry.elsewhere = f"http://{registry.host}/v2/team/silo/manifests/{DIGEST}"
    with pytest.raises(OSError, match="answers 307"):
        look(f"{registry.host}/team/silo@{DIGEST}")
    assert len(registry.seen) == 1


def test_a_registry_that_is_away_or_speaks_something_else_gives_no_answer(registry: Registry) -> None:
    with pytest.raises(OSError, match="refused"):
        look(f"127.0.0.1:9/team/silo@{DIGEST}")
