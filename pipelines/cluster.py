"""A federation on a Kubeflow cluster, by the Kubeflow Pipelines API (v2beta1): submit, schedule, watch and cancel its runs.

    cluster = connect()                       where and as whom: from the environment
    submit(cluster, federation, rounds)       upload the pipeline where it is new, and start a run
    schedule(cluster, federation, cron, rounds)    one recurring run per federation; changed, not doubled, when called again
    runs | logs | cancel | unschedule         by the federation, whose name is that of its experiment

The environment, since secrets are no command-line options:

    KFP_ENDPOINT          address of the API, such as https://kubeflow.example.org/pipeline; default in a pod: the cluster's own
    KFP_NAMESPACE         the profile's namespace, on a multi-user Kubeflow; default in a pod: its own
    KFP_TOKEN             bearer token, or KFP_TOKEN_FILE, a file with one that is read anew for every request
    KFP_COOKIE            session cookie, such as `oauth2_proxy_kubeflow=…`
    KFP_SERVICE_ACCOUNT   account that runs use; default: Kubeflow's
    KFP_TIMEZONE          the zone of its scheduler (CRON_SCHEDULE_TIMEZONE of ml-pipeline-scheduledworkflow); default: UTC
    SSL_CA_CERT           file of a private authority; else SSL_CERT_FILE. HTTPS_PROXY, HTTP_PROXY and NO_PROXY are heeded

A recurring run has no time zone of its own: the scheduler parses with robfig/cron v1, which knows no ``CRON_TZ=``, and reads all schedules
in one zone. That parser also takes five fields, and means *seconds* by the first one: a crontab line would run hourly instead of daily.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from silotune.components import federation_file, job_manifest
from silotune.components.errors import FederationError, RefusedError, SilotuneError, UnreachableError
from silotune.components.federation import Federation, canonical_json
from silotune.components.federation_file import PATH_FIELDS, is_remote
from silotune.components.rounds import Rounds

ENDPOINT, NAMESPACE, TOKEN, TOKEN_FILE, COOKIE = "KFP_ENDPOINT", "KFP_NAMESPACE", "KFP_TOKEN", "KFP_TOKEN_FILE", "KFP_COOKIE"
SIGN_IN = f"set {TOKEN}, {TOKEN_FILE} or {COOKIE} anew"
IN_POD = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
POD_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")  # what a projected volume with audience pipelines.kubeflow.org holds
FEDERATION_PATH = job_manifest.FEDERATION_FILE  # where every task finds its own copy
TIMEOUT = (10, 60)  # seconds to connect, and without a byte
PAGE = 100
GOING = ("RUNTIME_STATE_UNSPECIFIED", "PENDING", "RUNNING", "PAUSED", "CANCELING")
COORDINATOR_TASKS = ("initialize", "aggregate", "export")
PINNED = re.compile(r"@sha256:[0-9a-f]{64}$")
CRON = (
    ("the second", 0, 59, ""),
    ("the minute", 0, 59, ""),
    ("the hour", 0, 23, ""),
    ("the day of the month", 1, 31, ""),
    ("the month", 1, 12, "jan feb mar apr may jun jul aug sep oct nov dec"),
    ("the day of the week", 0, 6, "sun mon tue wed thu fri sat"),  # 7 for Sunday is refused
)
MOST_DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


COMPILING = threading.Lock()  # kfp keeps the pipeline that is being built in a global


@dataclass(frozen=True)
class Cluster:
    """A Kubeflow Pipelines API that has answered."""

    endpoint: str
    namespace: str | None
    multi_user: bool
    version: str
    client: Any = field(repr=False)

    def url(self, kind: Literal["runs", "recurringrun"], identity: str) -> str:
        """Where a person looks at it."""
        return f"{os.environ.get('KF_PIPELINES_UI_ENDPOINT') or self.endpoint}/#/{kind}/details/{identity}"


def connect(endpoint: str | None = None, namespace: str | None = None) -> Cluster:
    """Sign in and ask for the API's health.

    Args:
        endpoint: instead of KFP_ENDPOINT.
        namespace: instead of KFP_NAMESPACE.

    Raises:
        FederationError: no endpoint or, on a multi-user Kubeflow, no namespace is known.
        UnreachableError: no answer, or the sign-in is missing or has expired.
    """
    endpoint, settings = _settings(endpoint)
    namespace = namespace or os.environ.get(NAMESPACE) or None
    with speaking(endpoint):
        import kfp

        # With a namespace, the constructor asks nothing of the server; without, it tries five times and logs each failure at length.
        client = _patient(kfp.Client(host=endpoint, namespace=namespace or "unknown", **settings))
        multi_user = bool(client.healthzs.healthz_service_get_healthz().multi_user)
        if multi_user and namespace is None:
            with suppress(OSError):
                namespace = POD_NAMESPACE.read_text().strip()
        if multi_user and not namespace:
            raise FederationError(f"{NAMESPACE}: Kubeflow at {endpoint} has many users; set it to the namespace of your profile")
        client = _patient(kfp.Client(host=endpoint, namespace=namespace if multi_user and namespace else "kubeflow", **settings))
        return Cluster(endpoint, namespace if multi_user else None, multi_user, _version(client), client)


def _settings(endpoint: str | None) -> tuple[str, dict[str, Any]]:
    """The address, and what `kfp.Client` wants besides."""
    environ = os.environ
    in_pod = bool(environ.get("KUBERNETES_SERVICE_HOST"))
    endpoint = endpoint or environ.get(ENDPOINT) or environ.get("KF_PIPELINES_ENDPOINT") or (IN_POD if in_pod else "")
    if not endpoint:
        raise FederationError(
            f"{ENDPOINT}: is not set; give the address of Kubeflow Pipelines, such as https://kubeflow.example.org/pipeline"
        )
    parts = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise FederationError(f"{ENDPOINT}: must be http:// or https:// with a host, without a user or a query, got {shown!r}; {SIGN_IN}")
    token_file = Path(environ.get(TOKEN_FILE) or environ.get("KF_PIPELINES_SA_TOKEN_PATH") or POD_TOKEN)
    settings: dict[str, Any] = {"cookies": environ.get(COOKIE)}
    if token := environ.get(TOKEN):
        settings["existing_token"] = token
    elif token_file.exists():
        from kfp.client import ServiceAccountTokenVolumeCredentials

        settings["credentials"] = ServiceAccountTokenVolumeCredentials(str(token_file))
    elif environ.get(TOKEN_FILE):
        raise FederationError(f"{TOKEN_FILE}: no such file, got '{token_file}'; correct it, or set {TOKEN}")
    if authority := environ.get("SSL_CA_CERT") or environ.get("SSL_CERT_FILE"):
        if not Path(authority).is_file():
            raise FederationError(f"SSL_CA_CERT: no such file, got '{authority}'; name a PEM file with the certificate of the authority")
        settings["ssl_ca_cert"] = authority
    proxy = getproxies_environment().get(parts.scheme)
    if proxy and not proxy_bypass(parts.netloc):
        settings["proxy"] = proxy
    return parts.geturl().rstrip("/"), settings


def _patient(client: Any) -> Any:
    """Bound every request, and take a sign-in page for what it is: the SDK follows to it and reads it as an empty answer."""
    import urllib3
    from kfp_server_api.rest import RESTClientObject

    api = client.runs.api_client
    api.configuration.retries = urllib3.Retry(total=2, redirect=False, backoff_factor=0.3)
    api.rest_client = rest = RESTClientObject(api.configuration)
    plain = rest.request

    def request(method: str, url: str, **more: Any) -> Any:
        more["_request_timeout"] = more.get("_request_timeout") or TIMEOUT
        answer = plain(method, url, **more)
        if "html" in (answer.getheader("content-type") or ""):
            raise UnreachableError(
                f"{api.configuration.host}: answers with a web page, which is a sign-in or not the API; {SIGN_IN}, or correct {ENDPOINT}",
                "not signed in",
            )
        return answer

    rest.request = request
    return client


def _version(client: Any) -> str:
    """The release that the server says it is; "" where it does not say."""
    import kfp_server_api

    with suppress(kfp_server_api.ApiException, ValueError, AttributeError):
        answer = json.loads(_get(client, "/apis/v1beta1/healthz"))
        return str(answer.get("tag_name") or "")
    return ""


def _get(client: Any, path: str, **parts: str) -> str:
    """What has no method in the generated client."""
    api = client.runs.api_client
    answer = api.call_api(path, "GET", path_params=parts, auth_settings=["Bearer"], _return_http_data_only=True, _preload_content=False)
    return str(answer.data.decode("utf-8", "replace"))


@contextmanager
def speaking(endpoint: str) -> Iterator[None]:
    """The API's errors as ours; what the SDK prints and warns of is left out."""
    import urllib3.exceptions
    from kfp_server_api import ApiException

    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except ApiException as error:
        raise _told(endpoint, int(error.status or 0), _words(error.body or error.reason)) from None
    except (urllib3.exceptions.HTTPError, OSError) as error:
        why, cure = "no answer", f"check {ENDPOINT}, the network and HTTPS_PROXY"
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            why, cure = "its certificate is not trusted", "set SSL_CA_CERT to the file of its authority"
        raise UnreachableError(f"Kubeflow Pipelines at {endpoint}: {why} ({type(error).__name__}); {cure}", "cluster unreachable") from None


def _told(endpoint: str, status: int, words: str) -> SilotuneError:
    where = f"Kubeflow Pipelines at {endpoint}"
    if status == 401 or 300 <= status < 400:
        return UnreachableError(f"{where}: the sign-in is missing or has expired ({status}); {SIGN_IN}", "not signed in")
    if status == 403:
        return RefusedError(
            f"{where}: this account may not do that (403): {words}; have its rights extended, correct {NAMESPACE}, or {SIGN_IN}"
        )
    if 400 <= status < 500 and status != 429:
        return FederationError(f"{where}: refuses ({status}): {words}; correct the federation file, the command or {ENDPOINT}")
    return UnreachableError(f"{where}: cannot serve just now ({status}): {words}; wait and try again", "cluster unreachable")


def _words(body: Any) -> str:
    """A line of what the server says, without anything that signs one in."""
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else str(body or "")
    with suppress(ValueError, AttributeError):
        known = json.loads(text)
        text = str(known.get("error_message") or known.get("message") or known.get("error") or text)
    text = re.sub(r"(?i)bearer \S+|eyJ[\w-]+\.[\w.-]+", "…", text)
    for secret in filter(None, (os.environ.get(TOKEN), os.environ.get(COOKIE))):
        text = text.replace(secret, "…")
    return " ".join(text.split())[:300] or "no reason given"


# What can run on a cluster


def require_fit(federation: Federation, path: str = FEDERATION_PATH) -> None:
    """Raise with everything that stands between a federation and a cluster.

    Args:
        path: where a task finds the federation file, in its own pod.

    Raises:
        FederationError: with every problem, its place in the file, and the cure.
    """
    problems = list(_problems(federation))
    if not path.startswith("/"):
        problems.append(f"--path: must be absolute, in a task's own pod, got {path!r}; the default is {FEDERATION_PATH}")
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise FederationError("\n".join([f"{federation.file.name} cannot run on a cluster: {count}", *(f"  {p}" for p in problems)]))


def _problems(federation: Federation) -> Iterator[str]:
    raw = federation_file.parse(federation.file)  # relative paths are only told from absolute ones there
    if federation.custody == "none":
        yield "security.signing: must be on where parties share a store, got off; remove it, and add security.keys"
    elif federation.custody == "local":
        yield "security.keys: are required where parties share a store; each party makes its own with `silotune keys new`"
    if not is_remote(federation.storage.root):
        yield f"storage.root: must be s3://bucket/prefix, which all parties reach, got '{_as_written(raw, 'storage', 'root')}'"
    if federation.tracking.uri.startswith(("sqlite:", "/")):
        yield f"tracking.uri: must be a server's http:// or https://, or none, got '{_as_written(raw, 'tracking', 'uri')}'"
    if not PINNED.search(federation.coordinator_image or ""):
        got = repr(federation.coordinator_image) if federation.coordinator_image else "none"
        yield f"coordinator_image: must name an image by digest, registry/name@sha256:…, got {got}; a tag can change under a run"
    default = job_manifest.CLAIMS if federation.launcher == "job" else []
    mounts = [[c.mount for c in silo.placement.claims or default] for silo in federation.silos]
    base = federation.model.base
    if base.startswith("/"):
        everywhere = [m for m in mounts[0] if all(m in its for its in mounts)]
        yield from _misplaced("model.base", str(raw["model"]["base"]), base, everywhere, "placement.claims of every silo")
    for i, silo in enumerate(federation.silos):
        where, place, written = f"silos[{i}]", silo.placement, raw["silos"][i]
        for key in PATH_FIELDS:
            if value := getattr(silo, key):
                yield from _misplaced(f"{where}.{key}", str(written.get(key, "the default")), value, mounts[i], f"{where}.placement.claims")
        if is_remote(silo.storage):
            yield f"{where}.storage: must be a folder of a volume, got '{silo.storage}'; add a claim to {where}.placement.claims"
        if not PINNED.search(place.image or ""):
            got = repr(place.image) if place.image else "none"
            yield f"{where}.placement.image: must name an image by digest, registry/name@sha256:…, got {got}; a tag can change under a run"
        if federation.launcher == "job" and not place.namespace:
            yield f"{where}.placement.namespace: is required with launcher: job; name the silo's own namespace"
        yield from job_manifest.several_processes(silo)


def _as_written(raw: dict[str, Any], section: str, key: str) -> str:
    return str((raw.get(section) or {}).get(key, "the default, on this machine"))


def _misplaced(where: str, written: str, location: str, mounts: list[str], claims: str) -> Iterator[str]:
    if is_remote(location):
        return
    if not written.startswith(("/", "${")):
        yield f"{where}: must be s3:// or an absolute path in the silo's pods, got '{written}', which is on this machine"
    elif not any(within(location, mount) for mount in mounts):
        yield f"{where}: must lie under a mount of {claims}, got '{location}'; add its claim, or use s3://"


def within(location: str, folder: str) -> bool:
    """Whether a path or an s3:// prefix is another one, or below it."""
    return f"{location.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")


def versioned(federation: Federation, rounds: int, package: Path) -> tuple[str, tuple[str, ...]]:
    """Compile the pipeline to ``package``; returns the version's name, and what to tell about it.

    The name is ``<terms>-<tasks>``: digests of what the silos agree on (but for the base model's digest, which is taken where the pipeline
    runs) and of the compiled pipeline. Same terms and same tasks are the same version.
    """
    import yaml
    from kfp import compiler

    from silotune.pipelines.federated_finetuning import federated_finetuning

    with COMPILING:
        compiler.Compiler().compile(federated_finetuning(federation, rounds, placed=True), str(package))
    documents = list(yaml.safe_load_all(package.read_text()))
    executors = documents[0]["deploymentSpec"]["executors"].values()
    loose = sorted({e["container"]["image"] for e in executors if not PINNED.search(e["container"]["image"])})
    notes = tuple(f"image {image} is not named by digest; what runs can change under a run" for image in loose)
    tasks = hashlib.sha256(canonical_json(documents)).hexdigest()
    return f"{federation.name}-{federation.agreement('', '').digest[:12]}-{tasks[:12]}", notes


def six_fields(cron: str) -> str:
    """A cron expression as Kubeflow's scheduler reads it: second, minute, hour, day of month, month, day of week.

    Args:
        cron: these six, or the five of a crontab, which start at second 0.

    Raises:
        FederationError: it is neither, a field is out of range, it runs more than once a minute, or no day ever fits.
    """
    fields = cron.split()
    if len(fields) == 5:
        fields = ["0", *fields]
    if len(fields) != len(CRON):
        raise FederationError(
            f"cron: must have 6 fields (second minute hour day month weekday) or the 5 of a crontab, got {len(fields)} in {cron!r}; "
            "such as '0 0 3 * * 1-5' for 3 o'clock on working days"
        )
    values = [_values(text, *known) for text, known in zip(fields, CRON, strict=True)]
    if len(values[0]) > 1:
        raise FederationError(f"cron: the first of 6 fields is the second, and must be one number, got {fields[0]!r}; give 0")
    if fields[5] in ("*", "?") and min(values[3]) > max(MOST_DAYS[m - 1] for m in values[4]):
        raise FederationError(f"cron: no month of field 5 has a day of field 4, got {cron!r}; correct one of them")
    return " ".join(fields)


def _values(text: str, name: str, low: int, high: int, words: str) -> set[int]:
    """The numbers that one field stands for, as robfig/cron v1 takes it."""
    known = {word: low + i for i, word in enumerate(words.split())}
    found: set[int] = set()
    for part in text.lower().split(","):
        span, slash, step = part.partition("/")
        first, dash, last = span.partition("-")
        ends = [low, high] if first in ("*", "?") and not dash else [known.get(e, e) for e in ((first, last) if dash else (first, first))]
        numbers = [int(e) if re.fullmatch(r"[0-9]{1,4}", str(e)) else -1 for e in ends]
        if slash and not dash:
            numbers[1] = high  # 5/15 means 5-59/15
        every = int(step) if re.fullmatch(r"0*[1-9][0-9]{0,3}", step) else 0 if slash else 1
        if not (low <= numbers[0] <= numbers[1] <= high and every):
            allowed = f"{low} to {high}" + (f" or {words.split()[0]} to {words.split()[-1]}" if words else "")
            raise FederationError(f"cron: {name} must be {allowed}, or * , a-b , */n of these, got {text!r}; correct that field")
        found |= set(range(numbers[0], numbers[1] + 1, every))
    return found


# Submitting


@dataclass(frozen=True)
class Submission:
    """A run that was started."""

    run: str
    url: str
    pipeline: str
    version: str  # name of the pipeline version; the same for the same terms and tasks
    notes: tuple[str, ...] = ()


def submit(
    cluster: Cluster, federation: Federation, rounds: int, *, path: str = FEDERATION_PATH, service_account: str | None = None
) -> Submission:
    """Start a run of ``rounds`` rounds.

    Args:
        path: where a task finds the federation file, in its own pod.
        service_account: instead of KFP_SERVICE_ACCOUNT.

    Raises:
        FederationError: the federation cannot run on a cluster as it stands, with every reason.
        RefusedError: a run of it is going on; two would work on the same round.
        UnreachableError: Kubeflow Pipelines.
    """
    require_fit(federation, path)
    with speaking(cluster.endpoint):
        experiment = _make_experiment(cluster, federation)
        latest = cluster.client.list_runs(page_size=PAGE, experiment_id=experiment, sort_by="created_at desc").runs or []
        if going := next((r for r in latest if _going(r)), None):
            raise RefusedError(f"{federation.name}: run {going.run_id} is going on; wait for its end, or `silotune cancel` it")
        reference = _upload(cluster, federation, rounds)
        started = cluster.client.run_pipeline(
            experiment_id=experiment,
            job_name=f"{federation.name} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}",
            pipeline_id=reference.pipeline,
            version_id=reference.version,
            params={"federation": path},
            service_account=service_account or os.environ.get("KFP_SERVICE_ACCOUNT") or None,
        )
    return Submission(started.run_id, cluster.url("runs", started.run_id), reference.pipeline, reference.name, reference.notes)


@dataclass(frozen=True)
class _Reference:
    pipeline: str
    version: str
    name: str
    notes: tuple[str, ...]


def _upload(cluster: Cluster, federation: Federation, rounds: int) -> _Reference:
    """The pipeline and the version of exactly these tasks; both are made where they are missing."""
    import tempfile

    import kfp_server_api

    client, title = cluster.client, f"silotune-{federation.name}"
    found = _named(client.list_pipelines, "pipelines", title, namespace=cluster.namespace)
    if not found:  # without a version: the first one that `upload_pipeline` makes has the pipeline's name, not ours
        wanted = kfp_server_api.V2beta1Pipeline(display_name=title, name=title, namespace=cluster.namespace)
        with _taken():  # somebody else made it in between
            client.pipelines.pipeline_service_create_pipeline(pipeline=wanted)
        found = _named(client.list_pipelines, "pipelines", title, namespace=cluster.namespace)
    pipeline = found[0].pipeline_id
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / f"{title}.yaml"
        name, notes = versioned(federation, rounds, package)
        versions = _named(client.list_pipeline_versions, "pipeline_versions", name, pipeline_id=pipeline)
        if not versions:
            with _taken():
                client.upload_pipeline_version(str(package), name, pipeline_id=pipeline, description=f"{rounds} rounds per run")
            versions = _named(client.list_pipeline_versions, "pipeline_versions", name, pipeline_id=pipeline)
    return _Reference(pipeline, versions[0].pipeline_version_id, name, notes)


@contextmanager
def _taken() -> Iterator[None]:
    """Creating what exists is fine."""
    from kfp_server_api import ApiException

    try:
        yield
    except ApiException as error:
        if error.status != 409:
            raise


def _make_experiment(cluster: Cluster, federation: Federation) -> str:
    made = cluster.client.create_experiment(federation.name, f"silotune federation {federation.name}", cluster.namespace)
    return str(made.experiment_id)


def _experiment(cluster: Cluster, federation: Federation) -> str | None:
    found = _named(cluster.client.list_experiments, "experiments", federation.name, namespace=cluster.namespace)
    return found[0].experiment_id if found else None


def _named(listing: Callable[..., Any], what: str, name: str, **where: Any) -> list[Any]:
    predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    return list(_pages(listing, what, filter=json.dumps({"predicates": [predicate]}), **where))


def _pages(listing: Callable[..., Any], what: str, **where: Any) -> Iterator[Any]:
    token = ""
    while True:
        page = listing(page_token=token, page_size=PAGE, **where)
        yield from getattr(page, what) or []
        token = page.next_page_token or ""
        if not token:
            return


# Schedules


@dataclass(frozen=True)
class Schedule:
    """The recurring run of a federation."""

    identity: str
    url: str
    cron: str  # of six fields, in the scheduler's zone
    timezone: str
    change: Literal["created", "changed", "enabled", "unchanged"]
    notes: tuple[str, ...] = ()


def schedule(
    cluster: Cluster,
    federation: Federation,
    cron: str,
    rounds: int,
    *,
    timezone: str = "UTC",
    path: str = FEDERATION_PATH,
    service_account: str | None = None,
) -> Schedule:
    """Run a federation again and again, one run at a time, without making up for missed ones.

    Kubeflow cannot change a recurring run. So the old one is disabled, the new one made, then the old one deleted; where making fails, the
    old one is enabled again.

    Args:
        cron: six fields (second, minute, hour, day of month, month, day of week), or the five of a crontab.
        timezone: the zone that ``cron`` is meant in; must be the scheduler's (KFP_TIMEZONE).

    Raises:
        FederationError: cron, time zone, or the federation cannot run on a cluster as it stands.
        UnreachableError: Kubeflow Pipelines.
    """
    expression = six_fields(cron)
    zone = _require_zone(timezone)
    require_fit(federation, path)
    account = service_account or os.environ.get("KFP_SERVICE_ACCOUNT") or None
    client = cluster.client
    with speaking(cluster.endpoint):
        experiment = _make_experiment(cluster, federation)
        reference = _upload(cluster, federation, rounds)
        old = _recurring(cluster, federation, experiment)
        same = [r for r in old if _does(r, expression, reference, path, account)]
        if same:
            kept, change = same[0], "unchanged"
            for other in (r for r in old if r is not kept):
                client.delete_recurring_run(other.recurring_run_id)
            if kept.status != "ENABLED":
                client.enable_recurring_run(kept.recurring_run_id)
                change = "enabled"
        else:
            with _disabled(client, old):
                kept = client.create_recurring_run(
                    experiment_id=experiment,
                    job_name=_title(federation),
                    description=f"silotune federation {federation.name}",
                    cron_expression=expression,
                    max_concurrency=1,
                    no_catchup=True,
                    params={"federation": path},
                    pipeline_id=reference.pipeline,
                    version_id=reference.version,
                    service_account=account,
                )
            for other in old:
                client.delete_recurring_run(other.recurring_run_id)
            change = "changed" if old else "created"
    identity = str(kept.recurring_run_id)
    return Schedule(identity, cluster.url("recurringrun", identity), expression, zone, change, reference.notes)  # type: ignore[arg-type]


@contextmanager
def _disabled(client: Any, recurring: list[Any]) -> Iterator[None]:
    enabled = [r.recurring_run_id for r in recurring if r.status == "ENABLED"]
    for identity in enabled:
        client.disable_recurring_run(identity)
    try:
        yield
    except BaseException:
        for identity in enabled:
            client.enable_recurring_run(identity)
        raise


def _title(federation: Federation) -> str:
    return f"silotune-{federation.name}"


def _recurring(cluster: Cluster, federation: Federation, experiment: str) -> list[Any]:
    return _named(cluster.client.list_recurring_runs, "recurring_runs", _title(federation), experiment_id=experiment)


def _does(recurring: Any, cron: str, reference: _Reference, path: str, account: str | None) -> bool:
    trigger, pinned = recurring.trigger.cron_schedule, recurring.pipeline_version_reference
    return (
        trigger is not None
        and trigger.cron == cron
        and (trigger.start_time, trigger.end_time) == (None, None)
        and pinned is not None
        and pinned.pipeline_version_id == reference.version
        and recurring.runtime_config.parameters == {"federation": path}
        and str(recurring.max_concurrency) == "1"
        and bool(recurring.no_catchup)
        and (account is None or recurring.service_account == account)
    )


def _require_zone(timezone: str) -> str:
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    of_scheduler = os.environ.get("KFP_TIMEZONE") or "UTC"
    try:
        zones = [ZoneInfo(name) for name in (timezone, of_scheduler)]
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise FederationError(f"timezone: must be a name such as UTC or Europe/Zurich, got {timezone!r} and {of_scheduler!r}") from None
    if timezone != of_scheduler:
        now = datetime.now(UTC)
        hours = [(now.astimezone(zone).utcoffset() or now - now).total_seconds() / 3600 for zone in zones]
        raise FederationError(
            f"timezone: Kubeflow reads all schedules in one zone, its scheduler's, which is {of_scheduler!r}, got {timezone!r}; give the cron "
            f"in {of_scheduler} (now {hours[1] - hours[0]:+g} h from {timezone}; summer time changes that), or set CRON_SCHEDULE_TIMEZONE on "
            "ml-pipeline-scheduledworkflow and KFP_TIMEZONE here"
        )
    return timezone


def unschedule(cluster: Cluster, federation: Federation) -> int:
    """Delete the federation's recurring run; returns how many there were. A run that is going on goes on.

    Raises:
        UnreachableError: Kubeflow Pipelines.
    """
    with speaking(cluster.endpoint):
        experiment = _experiment(cluster, federation)
        found = _recurring(cluster, federation, experiment) if experiment else []
        for recurring in found:
            cluster.client.delete_recurring_run(recurring.recurring_run_id)
    return len(found)


def finished(federation: Federation, rounds: Rounds) -> bool:
    """Whether nothing is left to do: all rounds are committed, or the federation has converged."""
    commits = list(rounds.commits())
    converged = bool(commits and commits[-1].converged and federation.rounds.until)
    return converged or sum(c.counts for c in commits) >= federation.rounds.total


def disable_when_done(federation: Federation, rounds: Rounds, cluster: Cluster | None = None) -> bool:
    """From a run: disable the recurring run of a finished federation; returns whether one was disabled.

    Raises:
        FederationError: no cluster is given, and none is known from the environment.
        UnreachableError: the store or Kubeflow Pipelines.
    """
    if not finished(federation, rounds):
        return False
    cluster = cluster or connect()
    with speaking(cluster.endpoint):
        experiment = _experiment(cluster, federation)
        enabled = [r for r in (_recurring(cluster, federation, experiment) if experiment else []) if r.status == "ENABLED"]
        for recurring in enabled:
            cluster.client.disable_recurring_run(recurring.recurring_run_id)
    return bool(enabled)


# Runs


@dataclass(frozen=True)
class Task:
    """One box of a run. ``name`` is the box and its silo, as the pipeline shows them."""

    name: str
    state: str
    pods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """A run as Kubeflow tells it. What it has achieved is for the store to say: `silotune status`."""

    identity: str
    name: str
    state: str
    created: datetime | None
    finished: datetime | None
    scheduled: bool
    error: str
    url: str
    tasks: tuple[Task, ...]


def runs(cluster: Cluster, federation: Federation, *, limit: int = 5) -> list[Run]:
    """The latest runs of a federation, the latest first, with the states of their tasks.

    Raises:
        UnreachableError: Kubeflow Pipelines.
    """
    with speaking(cluster.endpoint):
        experiment = _experiment(cluster, federation)
        if not experiment:
            return []
        listed = cluster.client.list_runs(page_size=limit, sort_by="created_at desc", experiment_id=experiment).runs or []
        names: dict[str, dict[str, str]] = {}
        return [_run(cluster, cluster.client.get_run(r.run_id), names) for r in listed]


def _going(run: Any) -> bool:
    return (run.state or "PENDING") in GOING


def _run(cluster: Cluster, run: Any, names: dict[str, dict[str, str]]) -> Run:
    return Run(
        identity=run.run_id,
        name=run.display_name or "",
        state=run.state or "PENDING",
        created=run.created_at,
        finished=None if _going(run) else run.finished_at,
        scheduled=bool(run.recurring_run_id),
        error=_words(run.error.message) if run.error else "",
        url=cluster.url("runs", run.run_id),
        tasks=tuple(_tasks(run, _task_names(cluster, run, names))),
    )


def _task_names(cluster: Cluster, run: Any, known: dict[str, dict[str, str]]) -> dict[str, str]:
    """Key of a task in the pipeline (``train-2``) -> what it is called (``train south``)."""
    pinned = run.pipeline_version_reference
    key = pinned.pipeline_version_id if pinned else run.run_id
    if key not in known:
        spec = run.pipeline_spec
        if not spec and pinned:
            spec = cluster.client.get_pipeline_version(pinned.pipeline_id, pinned.pipeline_version_id).pipeline_spec
        spec = (spec or {}).get("pipeline_spec", spec or {})
        dags = [spec.get("root", {}), *spec.get("components", {}).values()]
        known[key] = {task: its["taskInfo"]["name"] for dag in dags for task, its in dag.get("dag", {}).get("tasks", {}).items()}
    return known[key]


def _tasks(run: Any, names: dict[str, str]) -> Iterator[Task]:
    """The boxes among the nodes of a workflow, which are also drivers, executors and the graph itself; in the order of their start."""
    details = (run.run_details.task_details if run.run_details else None) or []
    executors = {d.task_id: d.pod_name for d in details if d.display_name == "executor"}
    last = datetime.max.replace(tzinfo=UTC)
    for detail in sorted(details, key=lambda d: (d.start_time or d.create_time or last, d.display_name or "")):
        name = names.get(detail.display_name) or (detail.display_name if detail.display_name in names.values() else None)
        if name:
            pods = [detail.pod_name, *(child.pod_name or executors.get(child.task_id) for child in detail.child_tasks or [])]
            yield Task(name, detail.state or "PENDING", tuple(dict.fromkeys(p for p in pods if p and "-driver-" not in p)))


def cancel(cluster: Cluster, federation: Federation, run: str | None = None) -> list[str]:
    """Stop a run of a federation, or all that are going on; returns those that were. What is committed stays.

    Raises:
        FederationError: the run is not one of this federation.
        UnreachableError: Kubeflow Pipelines.
    """
    with speaking(cluster.endpoint):
        experiment = _experiment(cluster, federation)
        listed = list(_pages(cluster.client.list_runs, "runs", experiment_id=experiment)) if experiment else []
        if run is not None and run not in {r.run_id for r in listed}:
            raise FederationError(f"run {run!r} is none of federation {federation.name!r}; `silotune runs` lists them")
        going = [r.run_id for r in listed if _going(r) and r.state != "CANCELING" and run in (None, r.run_id)]
        for identity in going:
            cluster.client.terminate_run(identity)
    return going


@dataclass(frozen=True)
class TaskLog:
    """The log of one of the coordinator's tasks; ``problem`` says why there is none."""

    task: str
    state: str
    text: str
    problem: str = ""


def logs(cluster: Cluster, federation: Federation, run: str | None = None) -> list[TaskLog]:
    """What the coordinator's tasks of a run wrote; of the latest run by default. Silos' logs stay theirs: see `silo_logs`.

    Raises:
        FederationError: there is no such run of this federation.
        UnreachableError: Kubeflow Pipelines.
    """
    with speaking(cluster.endpoint):
        experiment = _experiment(cluster, federation)
        listed = _pages(cluster.client.list_runs, "runs", experiment_id=experiment, sort_by="created_at desc") if experiment else iter(())
        wanted = next((r.run_id for r in listed if run in (None, r.run_id)), None)
        if wanted is None:
            what = f"run {run!r} is none of federation {federation.name!r}" if run else f"federation {federation.name!r} has no run"
            raise FederationError(f"{what}; `silotune runs` lists them, `silotune submit` starts one")
        found = _run(cluster, cluster.client.get_run(wanted), {})
        return [_log(cluster, found, task) for task in found.tasks if task.name in COORDINATOR_TASKS]


def _log(cluster: Cluster, run: Run, task: Task) -> TaskLog:
    from kfp_server_api import ApiException

    texts, problem = [], "" if task.pods else "it has no pod yet"
    for pod in task.pods:
        try:
            texts.append(_get(cluster.client, "/apis/v1alpha1/runs/{run_id}/nodes/{node_id}/log", run_id=run.identity, node_id=pod))
        except ApiException as error:
            if error.status in (401, 403):
                raise
            problem = f"pod {pod}: Kubeflow has no log of it ({error.status}), as where the pod is gone and logs are not archived"
    return TaskLog(task.name, task.state, "".join(texts), problem)


def silo_logs(federation: Federation) -> list[str]:
    """A line per silo that says where its own people find its logs."""
    lines = []
    for silo in federation.silos:
        place = silo.placement
        where = f" (volume of namespace {place.namespace})" if place.namespace else ""
        lines.append(f"{silo.id}: {silo.storage}/{federation.name}/logs{where}; they never leave the silo")
    return lines
