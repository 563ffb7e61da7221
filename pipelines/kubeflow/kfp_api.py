"""The Kubeflow Pipelines API (v2beta1): where it is, as whom one speaks to it, and what its errors mean.

    cluster = connect()                       where and as whom: from the environment
    with speaking(cluster.endpoint): …        requests whose errors are ours

The environment, since secrets are no command-line options:

    KFP_ENDPOINT          address of the API, such as https://kubeflow.example.org/pipeline; default in a pod: the cluster's own
    KFP_NAMESPACE         the profile's namespace, on a multi-user Kubeflow; default in a pod: its own
    KFP_TOKEN             bearer token, or KFP_TOKEN_FILE, a file with one that is read anew for every request
    KFP_COOKIE            session cookie, such as `oauth2_proxy_kubeflow=…`
    KFP_SERVICE_ACCOUNT   account that runs use; default: Kubeflow's
    KFP_TIMEZONE          the zone of its scheduler (CRON_SCHEDULE_TIMEZONE of ml-pipeline-scheduledworkflow); default: UTC
    SSL_CA_CERT           file of a private authority; else SSL_CERT_FILE. HTTPS_PROXY, HTTP_PROXY and NO_PROXY are heeded
"""

from __future__ import annotations

import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from silotune.components.errors import FederationError, RefusedError, SilotuneError, UnreachableError
from silotune.components.federation import Federation

ENDPOINT, NAMESPACE, TOKEN, TOKEN_FILE, COOKIE = "KFP_ENDPOINT", "KFP_NAMESPACE", "KFP_TOKEN", "KFP_TOKEN_FILE", "KFP_COOKIE"
SIGN_IN = f"set {TOKEN}, {TOKEN_FILE} or {COOKIE} anew"
IN_POD = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
POD_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")  # what a projected volume with audience pipelines.kubeflow.org holds
TIMEOUT = (10, 60)  # seconds to connect, and without a byte
PAGE = 100


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
        cure = (
            SIGN_IN
            if "@" in parts.netloc or parts.query
            else "give the address that a browser shows, such as https://kubeflow.example.org/pipeline"
        )
        raise FederationError(f"{ENDPOINT}: must be http:// or https:// with a host, without a user or a query, got {shown!r}; {cure}")
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
        answer = json.loads(get_text(client, "/apis/v1beta1/healthz"))
        return str(answer.get("tag_name") or "")
    return ""


def get_text(client: Any, path: str, **parts: str) -> str:
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
        raise _told(endpoint, int(error.status or 0), words_of(error.body or error.reason)) from None
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


def words_of(body: Any) -> str:
    """A line of what the server says, without anything that signs one in."""
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else str(body or "")
    with suppress(ValueError, AttributeError):
        known = json.loads(text)
        text = str(known.get("error_message") or known.get("message") or known.get("error") or text)
    text = re.sub(r"(?i)bearer \S+|eyJ[\w-]+\.[\w.-]+", "…", text)
    for secret in filter(None, (os.environ.get(TOKEN), os.environ.get(COOKIE))):
        text = text.replace(secret, "…")
    return " ".join(text.split())[:300] or "no reason given"


def make_experiment(cluster: Cluster, federation: Federation) -> str:
    """The id of the federation's experiment; made if absent."""
    made = cluster.client.create_experiment(federation.name, f"silotune federation {federation.name}", cluster.namespace)
    return str(made.experiment_id)


def experiment_of(cluster: Cluster, federation: Federation) -> str | None:
    """The id of the federation's experiment, if there is one."""
    found = named(cluster.client.list_experiments, "experiments", federation.name, namespace=cluster.namespace)
    return found[0].experiment_id if found else None


def named(listing: Callable[..., Any], what: str, name: str, **where: Any) -> list[Any]:
    """All that a listing has of a name."""
    predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    return list(pages(listing, what, filter=json.dumps({"predicates": [predicate]}), **where))


def pages(listing: Callable[..., Any], what: str, **where: Any) -> Iterator[Any]:
    """All that a listing has, page after page; ``what`` is the field of its answers that holds them."""
    token = ""
    while True:
        page = listing(page_token=token, page_size=PAGE, **where)
        yield from getattr(page, what) or []
        token = page.next_page_token or ""
        if not token:
            return
