"""The doctor: does everything stand that a federation needs on a cluster? Asked before anything is submitted; nothing is changed.

    examine(federation)       findings, one or more per check
    access(federation)        the affinity map: which pod may read and write what
    render(findings)          a table; `exit_code(findings)` is that of the worst one

Only names and states are read, never a Secret's data. What this account may not look at is a warning that names the right it lacks: where
silos keep to themselves, most of a silo's namespace is such, and its own people run the same command there.
"""

from __future__ import annotations

import base64
import json
import os
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from silotune.components import job_manifest, keys
from silotune.components.errors import FederationError, SilotuneError, UnreachableError
from silotune.components.federation import Federation, Silo, Toleration
from silotune.components.federation_file import COORDINATOR, is_remote
from silotune.pipelines import cluster_fit, kfp_api

if TYPE_CHECKING:
    from rich.console import RenderableType

Level = Literal["ok", "warn", "fail"]
SKEW = (30.0, 300.0)  # seconds between two clocks that are odd, and that are wrong; S3 refuses 900
BUNDLES = ("SSL_CA_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE")
METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"  # of a Secret, all but its data
TIMEOUT = (5, 20)  # seconds to connect, and for an answer


@dataclass(frozen=True)
class Finding:
    """What one check saw."""

    name: str
    level: Level
    what: str
    cure: str = ""
    code: int = 0  # exit code, where it fails


def ok(name: str, what: str) -> Finding:
    return Finding(name, "ok", what)


def warn(name: str, what: str, cure: str = "") -> Finding:
    return Finding(name, "warn", what, cure)


def fail(name: str, what: str, cure: str, code: int = FederationError.exit_code) -> Finding:
    return Finding(name, "fail", what, cure, code)


def examine(federation: Federation, *, endpoint: str | None = None, namespace: str | None = None, kubernetes: Any = None) -> list[Finding]:
    """Every check, whatever the others find.

    Args:
        endpoint, namespace: of Kubeflow Pipelines, as in `kfp_api.connect`.
        kubernetes: an `ApiClient`; default: that of this pod, or of the kubeconfig.
    """
    findings: list[Finding] = []
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("federation", lambda: fit(federation)),
        ("affinity map", lambda: affinity(federation)),
        ("keys", lambda: registered_keys(federation)),
        ("environment", lambda: environment(federation)),
        ("store", lambda: store(federation)),
        ("clock", lambda: clock(federation)),
        ("encryption", lambda: encryption(federation)),
        ("base model", lambda: base_model(federation)),
        ("mlflow", lambda: tracking(federation)),
        ("kubeflow", lambda: kubeflow(endpoint, namespace)),
        ("kubernetes", lambda: silos(federation, kubernetes, namespace)),
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
            yield fail("federation", what, cure)
    if federation.launcher == "pod":
        yield warn("federation", "launcher: pod runs all silos in one namespace, and isolates nothing", "use launcher: job for real silos")


@dataclass(frozen=True)
class Access:
    """A line of the affinity map."""

    party: str
    place: str  # a prefix of a bucket, or a volume or Secret of a namespace
    rights: str


def access(federation: Federation) -> list[Access]:
    """Which party's pods may touch what. Buckets' own policies come from `silotune policies`."""
    ours = f"{federation.storage.root}/{federation.name}"
    lines = [Access(COORDINATOR, f"{ours}/", "read; create plans, commits, globals, exports; erase update files")]
    for silo in federation.silos:
        lines += [
            Access(silo.id, f"{ours}/ (plans, commits, globals, agreements)", "read"),
            Access(silo.id, f"{ours}/contributions/{silo.id}/, own manifests, reports and scores", "read, create"),
        ]
        for key in ("train", "valid", "test"):
            if (place := getattr(silo, key)) and is_remote(place):
                lines.append(Access(silo.id, place, "read"))
        if is_remote(silo.storage):
            lines.append(Access(silo.id, silo.storage, "read, write"))
        for c in _claims(federation, silo):
            lines.append(Access(silo.id, f"volume {_spot(silo, c.claim)} at {c.mount}", "read" if c.read_only else "read, write"))
        lines += [Access(silo.id, f"secret {_spot(silo, s.name)}", "use") for s in _secrets(federation, silo)]
    return lines


def _claims(federation: Federation, silo: Silo) -> list[Any]:
    return list(silo.placement.claims or (job_manifest.CLAIMS if federation.launcher == "job" else []))


def _secrets(federation: Federation, silo: Silo) -> list[Any]:
    return list(silo.placement.secrets or (job_manifest.SECRETS if federation.launcher == "job" else []))


def _spot(silo: Silo, name: str) -> str:
    """A name in its namespace, and in its cluster where that is another one."""
    place = silo.placement
    return "/".join(filter(None, (place.kubeconfig_secret, place.namespace or "the pipeline's", name)))


def affinity(federation: Federation) -> Iterator[Finding]:
    """What two parties may reach that only one of them should."""
    broken = 0
    for one, other in combinations(federation.silos, 2):
        shared: dict[str, set[str]] = {
            "namespace": {_spot(s, "") for s in (one,) if federation.launcher == "job"} & {_spot(other, "")},
            "volume": {_spot(one, c.claim) for c in _claims(federation, one)} & {_spot(other, c.claim) for c in _claims(federation, other)},
            "secret": {_spot(one, s.name) for s in _secrets(federation, one)} & {_spot(other, s.name) for s in _secrets(federation, other)},
        }
        for kind, places in shared.items():
            for place in sorted(places):
                broken += 1
                yield fail(
                    "affinity map", f"{kind} {place.rstrip('/')} is shared by silos {one.id} and {other.id}", f"give each its own {kind}"
                )
    root = federation.storage.root
    remote = {f"{s.id}'s {key}": getattr(s, key) for s in federation.silos for key in ("storage", "train", "valid", "test")}
    remote = {what: place for what, place in remote.items() if place and is_remote(place)}
    for what, place in remote.items():
        if cluster_fit.within(place, root) or (what.endswith("storage") and cluster_fit.within(root, place)):
            broken += 1
            yield fail(
                "affinity map", f"{what}, {place}, and the store that all share, {root}, overlap", "use a bucket or prefix of its own"
            )
    for (one_what, a), (other_what, b) in combinations(remote.items(), 2):
        owners = {w.partition("'")[0] for w in (one_what, other_what)}
        if len(owners) == 2 and (cluster_fit.within(a, b) or cluster_fit.within(b, a)):
            broken += 1
            yield fail("affinity map", f"{one_what}, {a}, and {other_what}, {b}, overlap", "give each silo a bucket or prefix of its own")
    if not broken:
        yield ok("affinity map", f"{len(access(federation))} accesses; no two silos share a namespace, volume, secret or prefix")


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


# The store


def store(federation: Federation) -> Iterator[Finding]:
    from silotune.components.rounds import Rounds

    rounds = Rounds.of(federation)
    rounds.store.check()
    yield ok("store", f"{federation.storage.root} can be written, read and listed, and honours create-if-absent")
    latest = rounds.latest()
    yield ok("store", f"stands at round {latest.round}" if latest else "has no round of this federation yet")


def _bucket(federation: Federation) -> str:
    return federation.storage.root.removeprefix("s3://").partition("/")[0] if is_remote(federation.storage.root) else ""


def _ask_s3(method: str, **words: str) -> dict[str, Any]:
    """An answer of the store, also one that refuses: {"headers", "code", "body"}."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client = boto3.client("s3", config=Config(retries={"total_max_attempts": 2}, connect_timeout=TIMEOUT[0], read_timeout=TIMEOUT[1]))
        body = getattr(client, method)(**words)
        return {"headers": body["ResponseMetadata"]["HTTPHeaders"], "code": "", "body": body}
    except ClientError as error:
        told = error.response
        return {
            "headers": told.get("ResponseMetadata", {}).get("HTTPHeaders", {}),
            "code": told.get("Error", {}).get("Code", ""),
            "body": {},
        }
    except BotoCoreError as error:
        raise UnreachableError(
            f"the store gives no answer ({type(error).__name__}); check AWS_ENDPOINT_URL, credentials and proxies"
        ) from None


def clock(federation: Federation) -> Iterator[Finding]:
    """This machine's clock against the store's, which S3 signatures and Job deadlines rest on."""
    if not (bucket := _bucket(federation)):
        return
    before = time.time()
    date = _ask_s3("head_bucket", Bucket=bucket)["headers"].get("date", "")
    if not date:
        yield warn("clock", "the store's answers bear no date")
        return
    skew = parsedate_to_datetime(date).timestamp() + 0.5 - (before + time.time()) / 2  # a date is cut to whole seconds
    what = f"{abs(skew):.0f} s {'ahead of' if skew < 0 else 'behind'} the store's clock"
    if abs(skew) < SKEW[0]:
        yield ok("clock", f"within {max(2, round(abs(skew)) + 1)} s of the store's")
    elif abs(skew) < SKEW[1]:
        yield warn("clock", what, "let NTP set the clock")
    else:
        yield fail("clock", what, "let NTP set the clock; S3 refuses requests that are 15 minutes off")


def encryption(federation: Federation) -> Iterator[Finding]:
    if not (bucket := _bucket(federation)):
        return
    answer = _ask_s3("get_bucket_encryption", Bucket=bucket)
    if answer["code"] in ("AccessDenied", "403"):
        yield warn("encryption", f"of bucket {bucket} cannot be seen", "grant s3:GetEncryptionConfiguration")
        return
    rules = answer["body"].get("ServerSideEncryptionConfiguration", {}).get("Rules", [])
    default: dict[str, str] = next(
        (r["ApplyServerSideEncryptionByDefault"] for r in rules if "ApplyServerSideEncryptionByDefault" in r), {}
    )
    if default.get("SSEAlgorithm", "").startswith("aws:kms"):
        key = default.get("KMSMasterKeyID", "the account's default key")
        rights = "kms:GenerateDataKey and kms:Decrypt"
        yield warn(
            "encryption", f"bucket {bucket} uses SSE-KMS with {key}", f"every party's role needs {rights} on it, beside `silotune policies`"
        )
    elif default:
        yield ok("encryption", f"bucket {bucket} is encrypted by the store ({default['SSEAlgorithm']})")
    else:
        yield warn("encryption", f"bucket {bucket} names no encryption at rest", "turn it on, unless the store encrypts by other means")


def base_model(federation: Federation) -> Iterator[Finding]:
    """Whether the base is where the file says; nothing of it is fetched."""
    location = federation.model.base
    if is_remote(location):
        from silotune.components.object_store import open_store

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


# Kubernetes


class _NoRight(Exception):
    """This account may not look."""


@dataclass(frozen=True)
class Kubernetes:
    """A Kubernetes API, to be looked at only."""

    client: Any

    def get(self, path: str, *, accept: str = "application/json") -> dict[str, Any] | None:
        """The object; None if there is none.

        Raises:
            _NoRight: not for this account.
            UnreachableError: no answer.
        """
        import urllib3.exceptions
        from kubernetes.client import ApiException

        try:
            answer = self.client.call_api(path, "GET", header_params={"Accept": accept}, auth_settings=["BearerToken"], response_type="object",
                                          _return_http_data_only=True, _request_timeout=TIMEOUT)  # fmt: skip
            return dict(answer)
        except ApiException as error:
            if error.status == 404:
                return None
            if error.status in (401, 403):
                raise _NoRight from None
            raise UnreachableError(f"the Kubernetes API cannot serve ({error.status}); wait and try again", "cluster unreachable") from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise UnreachableError(f"the Kubernetes API gives no answer ({type(error).__name__}); check the kubeconfig") from None


def _kubernetes() -> Kubernetes:
    from kubernetes import client, config
    from kubernetes.config import ConfigException

    settings = client.Configuration()
    try:
        if os.environ.get("KUBERNETES_SERVICE_HOST"):
            config.load_incluster_config(settings)
        else:
            config.load_kube_config(client_configuration=settings, persist_config=False)
    except ConfigException as error:
        raise UnreachableError(f"no Kubernetes API is known ({error}); set KUBECONFIG, or run this in a pod") from None
    settings.retries = 1
    return Kubernetes(client.ApiClient(settings))


def silos(federation: Federation, given: Any, namespace: str | None) -> Iterator[Finding]:
    """Each silo's namespace, as far as this account may see it."""
    near = [s for s in federation.silos if not s.placement.kubeconfig_secret]
    for silo in (s for s in federation.silos if s not in near):
        yield warn(silo.id, "has a cluster of its own, which is not looked at from here", "its people run `silotune doctor` there")
    if not near:
        return
    api = Kubernetes(given) if given is not None else _kubernetes()
    pipeline = namespace or os.environ.get(kfp_api.NAMESPACE) or "kubeflow"
    for silo in near:
        within = (silo.placement.namespace or "") if federation.launcher == "job" else pipeline
        if not within:
            continue  # told by `fit`
        at = _At(api, federation, silo, within)
        checks = (exists, account, secrets, claims, terms, nodes, quota)
        for check in checks:
            try:
                yield from check(at)
            except _NoRight:
                right, scope = RIGHTS[check.__name__], "" if check is nodes else f" in namespace {within}"
                yield warn(
                    silo.id,
                    f"{check.__name__}: not seen, for lack of the right to {right}{scope}",
                    "grant it, or have the silo look itself",
                )


RIGHTS = {
    "exists": "get namespaces",
    "account": "get serviceaccounts",
    "secrets": "get secrets",
    "claims": "get persistentvolumeclaims",
    "terms": "get configmaps",
    "nodes": "list nodes",
    "quota": "list resourcequotas",
}


@dataclass(frozen=True)
class _At:
    """A silo in its namespace."""

    api: Kubernetes
    federation: Federation
    silo: Silo
    namespace: str

    def get(self, kind: str, name: str = "", *, accept: str = "application/json") -> dict[str, Any] | None:
        return self.api.get("/".join(filter(None, (f"/api/v1/namespaces/{self.namespace}", kind, name))), accept=accept)

    def missing(self, what: str) -> Finding:
        cure = f"`silotune onboard {self.federation.file.name} {self.silo.id}` says how to make it"
        return fail(self.silo.id, f"{what} does not exist in namespace {self.namespace}", cure)


def exists(at: _At) -> Iterator[Finding]:
    found = at.get("")
    if found is None:
        yield fail(
            at.silo.id,
            f"namespace {at.namespace} does not exist",
            "have the silo's administrator create it, or correct placement.namespace",
        )
    elif (phase := (found.get("status") or {}).get("phase")) == "Terminating":
        yield fail(at.silo.id, f"namespace {at.namespace} is being deleted", "have it created anew")
    else:
        yield ok(at.silo.id, f"namespace {at.namespace} is {str(phase or 'there').lower()}")


def account(at: _At) -> Iterator[Finding]:
    name = at.silo.placement.service_account or (job_manifest.ACCOUNT if at.federation.launcher == "job" else "")
    if not name:
        return
    found = at.get("serviceaccounts", name)
    if found is None:
        yield at.missing(f"service account {name}")
        return
    yield ok(at.silo.id, f"service account {name}")
    for pull in found.get("imagePullSecrets") or []:
        if at.get("secrets", pull["name"], accept=METADATA) is None:
            yield at.missing(f"image pull secret {pull['name']} of service account {name}")
        else:
            yield ok(at.silo.id, f"images are pulled with secret {pull['name']}")


def secrets(at: _At) -> Iterator[Finding]:
    for use in _secrets(at.federation, at.silo):
        found = at.get("secrets", use.name, accept=METADATA)
        yield at.missing(f"secret {use.name}") if found is None else ok(at.silo.id, f"secret {use.name}")


def claims(at: _At) -> Iterator[Finding]:
    for claim in _claims(at.federation, at.silo):
        found = at.get("persistentvolumeclaims", claim.claim)
        phase = ((found or {}).get("status") or {}).get("phase", "Pending")
        if found is None:
            yield at.missing(f"volume claim {claim.claim}")
        elif phase == "Lost":
            yield fail(at.silo.id, f"volume claim {claim.claim} has lost its volume", "restore the volume, or make a new claim")
        elif phase == "Bound":
            yield ok(at.silo.id, f"volume claim {claim.claim} is bound")
        else:
            yield warn(at.silo.id, f"volume claim {claim.claim} is {phase.lower()}", "right where its class waits for the first pod")


def terms(at: _At) -> Iterator[Finding]:
    """The silo's own copy of the file must agree with ours, or its updates are refused."""
    name = at.silo.placement.config_map or (job_manifest.CONFIG_MAP if at.federation.launcher == "job" else "")
    if not name:
        return
    found = at.get("configmaps", name)
    text = ((found or {}).get("data") or {}).get("federation.yaml")
    if found is None:
        yield at.missing(f"config map {name}")
    elif text is None:
        yield fail(at.silo.id, f"config map {name} has no key federation.yaml", "put the silo's copy of the file there")
    else:
        yield _same_terms(at, name, text)


def _same_terms(at: _At, name: str, text: str) -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "federation.yaml"
        file.write_text(text)
        try:
            theirs = Federation.load(file)
        except FederationError as error:
            lines = str(error).splitlines()
            return fail(
                at.silo.id,
                f"config map {name}: its federation.yaml is wrong: {lines[min(1, len(lines) - 1)].strip()}",
                "correct the silo's copy",
            )
    changes = at.federation.agreement("", "").changes(theirs.agreement("", ""))
    if changes:
        return fail(
            at.silo.id, f"config map {name} has other terms: {', '.join(changes[:5])}", "bring the silo's copy and this file together"
        )
    return ok(at.silo.id, f"config map {name} has the same terms as {at.federation.file.name}")


def nodes(at: _At) -> Iterator[Finding]:
    place = at.silo.placement
    listed = (at.api.get("/api/v1/nodes") or {}).get("items") or []
    fitting = [n for n in listed if _takes(n, place.node_selector, place.tolerations)]
    able = [n for n in fitting if int((n["status"].get("allocatable") or {}).get(place.gpu_type, 0)) >= place.gpus]
    wanted = f"{place.gpus} × {place.gpu_type}" if place.gpus else "its selector and tolerations"
    if able:
        yield ok(at.silo.id, f"{len(able)} of {len(listed)} nodes have {wanted}" + ("" if place.gpus else " fit"))
    else:
        why = (
            f"{len(fitting)} of {len(listed)} nodes fit its selector and tolerations, none has {wanted}"
            if place.gpus
            else f"no node fits {wanted}"
        )
        yield fail(at.silo.id, why, "add nodes, or correct placement; right only where a pool grows from zero")


def _takes(node: dict[str, Any], selector: dict[str, str], tolerations: list[Toleration]) -> bool:
    labels = node["metadata"].get("labels") or {}
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"].get("conditions") or [])
    taints = [t for t in (node.get("spec") or {}).get("taints") or [] if t["effect"] != "PreferNoSchedule"]
    return ready and selector.items() <= labels.items() and all(any(_tolerates(t, taint) for t in tolerations) for taint in taints)


def _tolerates(toleration: Toleration, taint: dict[str, str]) -> bool:
    key = toleration.key is None or toleration.key == taint["key"]
    value = toleration.operator == "Exists" or toleration.value == taint.get("value")
    return key and value and toleration.effect in (None, taint["effect"])


def quota(at: _At) -> Iterator[Finding]:
    """Whether one more pod of the silo's fits into what its namespace may use."""
    from kubernetes.utils.quantity import parse_quantity

    place = at.silo.placement
    memory = place.memory or job_manifest.MEMORY
    needs = {"pods": "1", "count/jobs.batch": "1", "requests.memory": memory, "limits.memory": memory, "requests.cpu": place.cpu or "0"}
    needs |= {f"requests.{place.gpu_type}": str(place.gpus)}
    short = []
    listed = (at.get("resourcequotas") or {}).get("items") or []
    for item in listed:
        hard = (item.get("status") or {}).get("hard") or (item.get("spec") or {}).get("hard") or {}
        used = (item.get("status") or {}).get("used") or {}
        for what, need in needs.items():
            if what in hard and parse_quantity(hard[what]) - parse_quantity(used.get(what, "0")) < parse_quantity(need):
                short.append(f"{what}: {need} needed, {used.get(what, '0')} of {hard[what]} used")
    if short:
        yield fail(
            at.silo.id, f"quota of namespace {at.namespace} has no room: {'; '.join(short)}", "have it raised, or finished Jobs deleted"
        )
    else:
        yield ok(at.silo.id, "quota has room" if listed else f"namespace {at.namespace} has no quota")
