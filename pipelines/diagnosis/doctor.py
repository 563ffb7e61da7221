"""The doctor: does everything stand that a federation needs on a cluster? Asked before anything is submitted; nothing is changed.

    examine(federation)       findings, one or more per check
    render(findings)          a table; `exit_code(findings)` is that of the worst one

Only names and states are read, never a Secret's data. What this account may not look at is a warning that names the right it lacks: where
silos keep to themselves, most of a silo's namespace is such, and its own people run the same command there.
"""

from __future__ import annotations

import base64
import json
import os
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from silotune.components import keys
from silotune.components.errors import FederationError, SilotuneError, UnreachableError
from silotune.components.federation import Federation
from silotune.components.federation_file import COORDINATOR, is_remote
from silotune.pipelines.diagnosis import federation_store, image_registry
from silotune.pipelines.diagnosis.findings import Finding, fail, ok, warn
from silotune.pipelines.diagnosis.kubernetes_view import TIMEOUT
from silotune.pipelines.diagnosis.silo_namespace import silos
from silotune.pipelines.diagnosis.tasks_namespace import tasks
from silotune.pipelines.kubeflow import cluster_fit, kfp_api
from silotune.pipelines.membership import access_map

if TYPE_CHECKING:
    from rich.console import RenderableType

BUNDLES = ("SSL_CA_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE")


def examine(federation: Federation, *, endpoint: str | None = None, namespace: str | None = None, kubernetes: Any = None) -> list[Finding]:
    """Every check, whatever the others find.

    Args:
        endpoint, namespace: of Kubeflow Pipelines, as in `kfp_api.connect`.
        kubernetes: an `ApiClient`; default: that of this pod, or of the kubeconfig.
    """
    findings: list[Finding] = []
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("federation", lambda: fit(federation)),
        ("affinity map", lambda: access_map.affinity(federation, namespace)),
        ("images", lambda: images(federation)),
        ("keys", lambda: registered_keys(federation)),
        ("environment", lambda: environment(federation)),
        ("store", lambda: federation_store.store(federation)),
        ("clock", lambda: federation_store.clock(federation)),
        ("encryption", lambda: federation_store.encryption(federation)),
        ("base model", lambda: base_model(federation)),
        ("mlflow", lambda: tracking(federation)),
        ("kubeflow", lambda: kubeflow(endpoint, namespace)),
        ("kubernetes", lambda: silos(federation, kubernetes, namespace)),
        ("coordinator", lambda: tasks(federation, kubernetes, namespace)),
    ]
    for name, check in checks:
        try:
            findings += check()
        except SilotuneError as error:
            what, _, cure = str(error).rpartition("; ")
            findings.append(Finding(name, "fail", what or str(error), cure if what else "", error.exit_code))
    return findings


def exit_code(findings: list[Finding]) -> int:
    """0 where nothing fails; else 2 where something is wrong, and only then what is worth trying again."""
    codes = {f.code for f in findings if f.level == "fail"}
    return min(codes, default=0)


def render(findings: list[Finding]) -> RenderableType:
    """The findings in their order, with what would cure them."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("check", "", "found"):
        table.add_column(heading, no_wrap=heading != "found", overflow="fold")
    colour = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for f in findings:
        told = Text(f.what)
        if f.cure:
            told.append(f"\n→ {f.cure}", style="dim")
        table.add_row(Text(f.name), Text(f.level, style=colour[f.level]), told)
    return table


# The file


def fit(federation: Federation) -> Iterator[Finding]:
    try:
        cluster_fit.require_fit(federation)
        yield ok("federation", f"{federation.file.name} can run on a cluster, launcher: {federation.launcher}; images by digest")
    except FederationError as error:
        for line in str(error).splitlines()[1:]:
            what, _, cure = line.strip().rpartition("; ")
            yield fail("federation", what or cure, cure if what else "")
    if federation.launcher == "pod":
        yield warn("federation", "launcher: pod runs all silos in one namespace, and isolates nothing", "use launcher: job for real silos")


def registered_keys(federation: Federation) -> Iterator[Finding]:
    public = federation.public_keys
    if federation.custody != "parties":
        yield fail("keys", f"custody: {federation.custody}; the parties hold no keys of their own", "see `silotune keys`")
        return
    folder = Path(os.environ.get(keys.FOLDER_VARIABLE) or federation.key_folder(COORDINATOR))
    file = folder / f"{COORDINATOR}.pem"
    if not file.exists():
        yield warn(
            "keys", f"no private key of the coordinator in {folder}", f"right where only its pods hold it; else set {keys.FOLDER_VARIABLE}"
        )
    elif keys.text_of(keys.private_key(file)) in [k.public for k in public[COORDINATOR]]:
        yield ok("keys", f"the coordinator's private key in {folder} is registered")
    else:
        yield fail(
            "keys",
            f"the coordinator's private key in {folder} is not in security.keys.{COORDINATOR}",
            "register it, or put the right one there",
        )
    if file.exists() and file.stat().st_mode & 0o077:
        yield warn("keys", f"{file} can be read by others on this machine", f"chmod 600 {file}")
    ended = [p for p, its in public.items() if all(k.until is not None for k in its)]
    if ended:
        yield warn("keys", f"every key of {', '.join(ended)} ends at some round", "register the next one before that")
    yield ok("keys", f"{len(public) - 1} silos have registered keys; their private halves are theirs")


def images(federation: Federation) -> Iterator[Finding]:
    """Whether every image lies in its registry, as far as it answers this machine; the nodes pull with accounts of their own."""
    named = {federation.coordinator_image: COORDINATOR, federation.model_image: COORDINATOR}
    named |= {silo.placement.image: silo.id for silo in federation.silos}
    for image in (i for i in named if i and cluster_fit.PINNED.search(i)):
        host = image_registry.Image.parse(image).host
        try:
            found = image_registry.look(image)
        except (OSError, ValueError) as error:
            yield warn("images", f"{image}: {host} cannot be asked from here ({type(error).__name__})", "see that the nodes reach it")
            continue
        if found == "there":
            yield ok("images", f"{image} is in its registry")
        elif found == "absent":
            yield fail("images", f"{image}: {host} has no such image", f"push it, or correct the name and digest of {named[image]}'s image")
        else:
            cure = "`docker login` here, or see that the nodes' pull secret opens it"
            yield warn("images", f"{image}: {host} does not show it to this account", cure)


# This machine


def environment(federation: Federation) -> Iterator[Finding]:
    """Proxies and private authorities, which each library takes from another variable."""
    proxies = getproxies_environment()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    hosts = {urlsplit(url).hostname or "" for url in (endpoint, federation.tracking.uri, os.environ.get(kfp_api.ENDPOINT) or "")}
    inside = sorted(h for h in hosts if h.endswith((".svc", ".cluster.local", ".local", "localhost")) or h.startswith(("10.", "127.")))
    inside += ["kubernetes.default.svc"] if os.environ.get("KUBERNETES_SERVICE_HOST") else []
    through = [h for h in inside if ("http" in proxies or "https" in proxies) and not proxy_bypass(h)]
    if through:
        yield warn(
            "proxy", f"requests to {', '.join(through)} would go through the proxy", "name them, or .svc,.cluster.local, in NO_PROXY"
        )
    elif proxies.keys() & {"http", "https"}:
        yield ok("proxy", f"{', '.join(sorted(proxies.keys() & {'http', 'https'}))} through a proxy; inner hosts are excepted")
    named = {name: Path(os.environ[name]) for name in BUNDLES if os.environ.get(name)}
    for name, file in named.items():
        try:
            ssl.create_default_context(cafile=str(file))
        except (OSError, ssl.SSLError) as error:
            yield fail("authority", f"{name}={file}: is no file of PEM certificates: {error}", "correct the path")
    if endpoint.startswith("https") and named and "AWS_CA_BUNDLE" not in named:
        yield warn(
            "authority", f"{', '.join(named)} set, AWS_CA_BUNDLE not: boto3 reads only that one", "set it, too, if the store's is private"
        )
    if named and "AWS_CA_BUNDLE" in named and len(named) == 1:
        yield warn(
            "authority",
            "AWS_CA_BUNDLE serves the store only",
            "set SSL_CERT_FILE and REQUESTS_CA_BUNDLE for Kubeflow and MLflow, if theirs is private",
        )
    kfp = urlsplit(os.environ.get(kfp_api.ENDPOINT) or "")
    if kfp.scheme == "http" and (os.environ.get(kfp_api.TOKEN) or os.environ.get(kfp_api.COOKIE)) and (kfp.hostname or "") not in inside:
        yield warn("kubeflow", f"the sign-in would travel to {kfp.hostname} in the clear", f"use https:// in {kfp_api.ENDPOINT}")
    if not proxies and not named:
        yield ok("environment", "no proxy and no private authority is set")


def base_model(federation: Federation) -> Iterator[Finding]:
    """Whether the base is where the file says; nothing of it is fetched."""
    location = federation.model.base
    if is_remote(location):
        from silotune.components.store.object_store import open_store

        found = set(open_store(location).list(""))
        tensors = [k for k in found if k.endswith(".safetensors")]
        if "config.json" in found and tensors:
            yield ok("base model", f"{location} holds config.json and {len(tensors)} safetensors files")
        else:
            yield fail("base model", f"{location} lacks config.json or .safetensors files", "upload a folder that save_pretrained wrote")
    elif location.startswith("/"):
        yield warn(
            "base model", f"{location} is a path in the pods, which cannot be seen from here", "see that every silo's volume holds it"
        )
    elif os.environ.get("HF_HUB_OFFLINE") == "1":
        yield warn("base model", f"{location} on the Hugging Face hub was not looked for: HF_HUB_OFFLINE=1")
    else:
        yield from _on_hub(*location.partition("@")[::2])


def _on_hub(name: str, revision: str) -> Iterator[Finding]:
    import urllib.error

    from huggingface_hub import get_token

    hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    token = get_token()
    try:
        info = _fetch(f"{hub}/api/models/{name}/revision/{revision or 'main'}", None, {"Authorization": f"Bearer {token}"} if token else {})
        digest = str(info.get("sha") or "")
        yield ok(
            "base model", f"{name} is on the Hugging Face hub" + ("" if revision == digest else f"; pinned it would be {name}@{digest}")
        )
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):
            yield fail(
                "base model",
                f"the Hugging Face hub gives this account no {name}@{revision or 'main'}",
                "correct model.base, or set HF_TOKEN",
            )
        else:
            yield warn("base model", f"the Hugging Face hub cannot be asked ({error.code})", "ask again later")
    except (OSError, ValueError) as error:
        yield warn(
            "base model", f"the Hugging Face hub cannot be asked ({type(error).__name__})", "silos without a way there need an s3:// base"
        )


def _fetch(url: str, data: bytes | None, headers: dict[str, str]) -> dict[str, Any]:
    """A JSON answer over http or https; OSError (urllib's, with the status) or ValueError where there is none."""
    import urllib.request

    bundle = os.environ.get("REQUESTS_CA_BUNDLE")
    context = ssl.create_default_context(cafile=bundle) if bundle else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})  # noqa: S310
    with urllib.request.urlopen(request, timeout=TIMEOUT[1], context=context) as answer:  # noqa: S310
        found = json.loads(answer.read() or b"{}")
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found


def tracking(federation: Federation) -> Iterator[Finding]:
    """Whether MLflow answers a question that needs the rights of a reader."""
    import urllib.error

    uri = federation.tracking.uri
    if uri == "none":
        yield ok("mlflow", "tracking is off")
        return
    if not uri.startswith(("http://", "https://")):
        yield fail("mlflow", f"tracking.uri {uri} is on this machine", "name a tracking server")
        return
    try:
        _fetch(f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search", b'{"max_results": 1}', _mlflow_sign_in())
        yield ok("mlflow", f"{uri} answers")
    except urllib.error.HTTPError as error:
        sign_in = "set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        cure = sign_in if error.code in (401, 403) else "see its log"
        yield fail("mlflow", f"{uri} refuses ({error.code})", cure, UnreachableError.exit_code)
    except (OSError, ValueError) as error:
        what = f"{uri} gives no answer of MLflow's ({type(error).__name__})"
        yield fail("mlflow", what, "start it, or correct tracking.uri", UnreachableError.exit_code)


def _mlflow_sign_in() -> dict[str, str]:
    environ = os.environ
    if token := environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    if user := environ.get("MLFLOW_TRACKING_USERNAME"):
        both = f"{user}:{environ.get('MLFLOW_TRACKING_PASSWORD', '')}"
        return {"Authorization": f"Basic {base64.b64encode(both.encode()).decode()}"}
    return {}


def kubeflow(endpoint: str | None, namespace: str | None) -> Iterator[Finding]:
    found = kfp_api.connect(endpoint, namespace)
    whose = f"namespace {found.namespace}" if found.multi_user else "single-user"
    yield ok("kubeflow", f"{found.endpoint} answers, {whose}, version {found.version or 'not told'}")
    major, _, rest = found.version.lstrip("v").partition(".")
    if major.isdigit() and (int(major), int(rest.partition(".")[0] or 0)) < (2, 14):
        yield warn("kubeflow", f"version {found.version} is older than what silotune was tried with (2.17)", "upgrade Kubeflow Pipelines")
