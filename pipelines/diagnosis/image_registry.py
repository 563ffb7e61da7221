"""Whether a container image lies in its registry, asked as the OCI Distribution Specification has it; nothing is pulled.

    look("registry.example/silotune-silo@sha256:…")     there | absent | closed

Sign-in is what `docker login` keeps in ``config.json``, where it keeps it there in the clear (``auths``); a helper's is not asked for. It goes to
the registry, or to the token server that the registry names, and over https only.
"""

from __future__ import annotations

import json
import os
import re
import ssl
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.parse import urlencode, urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener

Answer = Literal["there", "absent", "closed"]
TIMEOUT = 20.0  # seconds for an answer
HUB = "registry-1.docker.io"
MANIFESTS = (
    "application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json", "application/vnd.docker.distribution.manifest.v2+json",
)  # fmt: skip


@dataclass(frozen=True)
class Image:
    """An image by digest, and where it lies."""

    host: str  # with its port
    name: str
    digest: str

    @classmethod
    def parse(cls, text: str) -> Image:
        """``[registry/]name[:tag]@digest``; without a registry it is Docker Hub's, as everywhere."""
        place, _, digest = text.partition("@")
        host, _, name = place.partition("/")
        if not name or not ("." in host or ":" in host or host == "localhost"):
            host, name = HUB, place if name else f"library/{place}"
        return cls(HUB if host == "docker.io" else host, re.sub(r":[^/]*$", "", name), digest)

    @property
    def url(self) -> str:
        return f"{'http' if is_local(self.host) else 'https'}://{self.host}/v2/{self.name}/manifests/{self.digest}"


def is_local(host: str) -> bool:
    """Whether a registry is this machine's, which is spoken to without encryption, as Docker does."""
    name = host.rpartition(":")[0] or host
    return name in ("localhost", "[::1]") or name.startswith("127.")


def look(text: str) -> Answer:
    """Whether an image is in its registry.

    Raises:
        OSError: the registry, or the token server that it names, gives no answer, or one that says neither.
        ValueError: the token server's answer is none.
    """
    image = Image.parse(text)
    sign_in = _sign_in(image.host)
    status, told = _ask("HEAD", image.url, {"Accept": ", ".join(MANIFESTS)})
    if status == 401:
        scheme, _, words = (told.get("WWW-Authenticate") or "").partition(" ")
        asked = dict(re.findall(r'(\w+)="([^"]*)"', words))
        if scheme.lower() == "bearer" and asked.get("realm"):
            sign_in = _token(asked, sign_in)
        status, _ = _ask("HEAD", image.url, {"Accept": ", ".join(MANIFESTS), **sign_in}) if sign_in else (status, told)
    if status == 200:
        return "there"
    if status == 404:
        return "absent"
    if status in (401, 403):
        return "closed"
    raise OSError(f"the registry answers {status}")


def _token(asked: dict[str, str], sign_in: dict[str, str]) -> dict[str, str]:
    """The header that a token server's answer makes; none where it refuses."""
    realm = urlsplit(asked["realm"])
    if realm.scheme != "https" and not (realm.scheme == "http" and is_local(realm.netloc)):
        raise OSError("the registry names a token server without https")
    query = urlencode([(name, asked[name]) for name in ("service", "scope") if name in asked])
    status, _, body = _read("GET", f"{asked['realm']}{'&' if realm.query else '?'}{query}", sign_in)
    if status != 200:
        return {}
    found: Any = json.loads(body)
    token = (found.get("token") or found.get("access_token")) if isinstance(found, dict) else None
    if not isinstance(token, str):
        raise ValueError("the token server gives no token")
    return {"Authorization": f"Bearer {token}"}


def _sign_in(host: str) -> dict[str, str]:
    """What `docker login` keeps for a registry."""
    folder = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
    try:
        known: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auths"]
        kept = known.get("https://index.docker.io/v1/" if host == HUB else host) or known.get(f"https://{host}") or {}
        return {"Authorization": f"Basic {kept['auth']}"} if kept.get("auth") else {}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError):
        return {}  # no such file, or none of Docker's: nobody has signed in


class _Stay(HTTPRedirectHandler):
    """Redirects are not followed: they would carry the sign-in along."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _ask(method: str, url: str, headers: dict[str, str]) -> tuple[int, Message]:
    status, told, _ = _read(method, url, headers)
    return status, told


def _read(method: str, url: str, headers: dict[str, str]) -> tuple[int, Message, bytes]:
    """(status, headers, body) of any answer."""
    context = ssl.create_default_context(cafile=os.environ.get("REQUESTS_CA_BUNDLE") or None)
    opener = build_opener(_Stay, HTTPSHandler(context=context))
    try:
        with opener.open(Request(url, headers=headers, method=method), timeout=TIMEOUT) as answer:  # noqa: S310 (http and https only)
            return answer.status, answer.headers, answer.read(1 << 20)
    except HTTPError as error:
        return error.code, error.headers, b""
    except HTTPException as error:
        raise OSError(f"no answer of HTTP: {type(error).__name__}") from None
