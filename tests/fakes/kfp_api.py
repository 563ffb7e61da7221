"""A strict Kubeflow Pipelines API server (v2beta1), over real HTTP on loopback, for the real `kfp.Client`.

    with KfpApi(token="…") as api:      api.url, and its state: api.pipelines, versions, experiments, runs, recurring, requests

Strict: an unknown path, query parameter, JSON field, filter key, sort key or operation is refused with 400, as is a pipeline that is no
KFP proto; the statuses, the error body, the page tokens, unique names (409) and the cron grammar (robfig/cron v1) are the server's own.
It runs nothing: a test sets a run's state and its tasks with `advance`.
"""

from __future__ import annotations

import base64
import email.parser
import email.policy
import json
import re
import ssl
import threading
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import kfp_server_api.models as models
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

Resource = dict[str, Any]
OPERATIONS = ["OPERATION_UNSPECIFIED", "EQUALS", "NOT_EQUALS", "GREATER_THAN", "_", "GREATER_THAN_EQUALS", "LESS_THAN", "LESS_THAN_EQUALS", "IN",
              "IS_SUBSTRING"]  # fmt: skip
SORTABLE = {"", "id", "name", "display_name", "created_at"}
LISTED = {"page_token", "page_size", "sort_by", "filter"}
MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
DAYS = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]
NONE: list[str] = []
CRON_FIELDS = ((0, 59, NONE), (0, 59, NONE), (0, 23, NONE), (1, 31, NONE), (1, 12, MONTHS), (0, 6, DAYS))


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class KfpApi:
    """One server with its state; give ``token`` or ``cookie`` to demand it, ``namespaces`` for a multi-user Kubeflow."""

    def __init__(
        self,
        *,
        token: str = "",
        cookie: str = "",
        sign_in: str = "401",
        namespaces: tuple[str, ...] = (),
        version: str = "2.17.0",
        page: int = 20,
        certificate: str = "",
    ) -> None:
        self.certificate = certificate  # PEM file with its key, too: https instead of http
        self.token, self.cookie, self.sign_in = token, cookie, sign_in
        self.namespaces, self.version, self.page = namespaces, version, page
        self.pipelines: dict[str, Resource] = {}
        self.versions: dict[str, Resource] = {}
        self.uploads: dict[str, str] = {}  # version id -> the text that was uploaded
        self.experiments: dict[str, Resource] = {}
        self.runs: dict[str, Resource] = {}
        self.recurring: dict[str, Resource] = {}
        self.logs: dict[tuple[str, str], str] = {}  # (run, pod) -> text
        self.requests: list[tuple[str, str]] = []  # of who was signed in
        self.visited: list[str] = []  # paths, by anyone
        self.failing: dict[tuple[str, str], int] = {}  # (method, path) -> status to answer with
        self.clock = datetime(2026, 1, 1, tzinfo=UTC)

    def __enter__(self) -> KfpApi:
        handler = type("Handler", (_Handler,), {"api": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        if self.certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"{'https' if self.certificate else 'http'}://127.0.0.1:{self.server.server_address[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def advance(self, run: str, state: str, tasks: list[Resource] | None = None) -> None:
        """Give a run a state and, as the server lists them, the nodes of its workflow."""
        self.runs[run]["state"] = state
        if tasks is not None:
            self.runs[run]["run_details"] = {"task_details": [model("V2beta1PipelineTaskDetail", t) for t in tasks]}

    def now(self) -> str:
        self.clock += timedelta(seconds=1)
        return self.clock.isoformat().replace("+00:00", "Z")

    # Pipelines

    def create_pipeline(self, query: Resource, body: Any) -> Resource:
        wanted = model("V2beta1Pipeline", body)
        if {"pipeline_id", "created_at"} & wanted.keys():
            raise Refused(400, "pipeline_id and created_at are the server's to set")
        name = wanted.get("name") or wanted.get("display_name")
        if not name:
            raise Refused(400, "Pipeline's name cannot be empty")
        wanted["namespace"] = self.namespace(wanted.get("namespace", ""), required=False)
        if any((p["name"], p["namespace"]) == (name, wanted["namespace"]) for p in self.pipelines.values()):
            raise Refused(409, f"Failed to create a new pipeline. The name {name} already exists. Please specify a new name")
        return self.keep(self.pipelines, "pipeline_id", wanted | {"name": name, "display_name": wanted.get("display_name") or name})

    def list_pipelines(self, query: Resource) -> Resource:
        namespace = self.namespace(query.pop("namespace", ""), required=False)
        return self.listed(query, "pipelines", [p for p in self.pipelines.values() if p["namespace"] == namespace])

    def get_pipeline(self, query: Resource, pipeline: str) -> Resource:
        return found(self.pipelines, pipeline, "Pipeline")

    def delete_pipeline(self, query: Resource, pipeline: str) -> Resource:
        found(self.pipelines, pipeline, "Pipeline")
        if any(v["pipeline_id"] == pipeline for v in self.versions.values()):
            raise Refused(400, "the pipeline has versions; delete them first")
        del self.pipelines[pipeline]
        return {}

    def upload_pipeline(self, query: Resource, upload: tuple[str, bytes]) -> Resource:
        parts = {k: query.get(k) for k in ("name", "display_name", "description", "namespace") if query.get(k)}
        parse_package(*upload)
        pipeline = self.create_pipeline({}, {"name": parts.get("name") or upload[0], **parts})
        self.upload_version({"pipelineid": pipeline["pipeline_id"], "name": pipeline["name"]}, upload)
        return pipeline

    def upload_version(self, query: Resource, upload: tuple[str, bytes]) -> Resource:
        pipeline = query.get("pipelineid") or ""
        if not pipeline or pipeline not in self.pipelines:
            raise Refused(400, "Failed to create a pipeline version")
        spec = parse_package(*upload)
        name = query.get("name") or query.get("display_name") or upload[0]
        if len(name) > 127:
            raise Refused(400, "PipelineVersion.Name length cannot exceed 127")
        if any((v["name"], v["pipeline_id"]) == (name, pipeline) for v in self.versions.values()):
            raise Refused(409, "Failed to create a pipeline version")
        version = {"pipeline_id": pipeline, "name": name, "display_name": query.get("display_name") or name, "pipeline_spec": spec}
        kept = self.keep(self.versions, "pipeline_version_id", version | {"description": query.get("description", "")})
        self.uploads[kept["pipeline_version_id"]] = upload[1].decode()
        return kept

    def list_versions(self, query: Resource, pipeline: str) -> Resource:
        found(self.pipelines, pipeline, "Pipeline")
        return self.listed(query, "pipeline_versions", [v for v in self.versions.values() if v["pipeline_id"] == pipeline])

    def get_version(self, query: Resource, pipeline: str, version: str) -> Resource:
        return found(self.versions, version, "PipelineVersion")

    # Experiments

    def create_experiment(self, query: Resource, body: Any) -> Resource:
        wanted = model("V2beta1Experiment", body)
        if not wanted.get("display_name"):
            raise Refused(400, "Experiment has an empty name")
        wanted["namespace"] = self.namespace(wanted.get("namespace", ""))
        if any((e["display_name"], e["namespace"]) == (wanted["display_name"], wanted["namespace"]) for e in self.experiments.values()):
            raise Refused(409, f"An experiment with name {wanted['display_name']} already exists")
        return self.keep(self.experiments, "experiment_id", wanted | {"storage_state": "AVAILABLE"})

    def list_experiments(self, query: Resource) -> Resource:
        namespace = self.namespace(query.pop("namespace", ""))
        return self.listed(query, "experiments", [e for e in self.experiments.values() if e["namespace"] == namespace])

    def get_experiment(self, query: Resource, experiment: str) -> Resource:
        return found(self.experiments, experiment, "Experiment")

    # Runs

    def create_run(self, query: Resource, body: Any) -> Resource:
        run = self.pinned(model("V2beta1Run", body))
        return self.keep(self.runs, "run_id", run | {"state": "PENDING", "storage_state": "AVAILABLE"})

    def list_runs(self, query: Resource) -> Resource:
        return self.listed(query, "runs", self.scoped(query, self.runs))

    def get_run(self, query: Resource, run: str) -> Resource:
        return found(self.runs, run, "Run")

    def terminate_run(self, query: Resource, run: str) -> Resource:
        if found(self.runs, run, "Run")["state"] not in ("PENDING", "RUNNING", "PAUSED"):
            raise Refused(400, f"Failed to terminate run {run}: it is not going on")
        self.runs[run]["state"] = "CANCELING"
        return {}

    def read_log(self, query: Resource, run: str, pod: str) -> str:
        found(self.runs, run, "Run")
        if (run, pod) not in self.logs:
            raise Refused(500, f'Failed to read logs for run {run}: pods "{pod}" not found')
        return self.logs[run, pod]

    # Recurring runs

    def create_recurring(self, query: Resource, body: Any) -> Resource:
        wanted = self.pinned(model("V2beta1RecurringRun", body))
        if not 1 <= int(wanted.get("max_concurrency", 0)) <= 10:
            raise Refused(
                400, f"The max concurrency of the recurring run is out of range. Support 1-10. Received {wanted.get('max_concurrency')}"
            )
        trigger = wanted.get("trigger") or {}
        if "cron_schedule" in trigger:
            parse_cron(trigger["cron_schedule"].get("cron", ""))
        elif int((trigger.get("periodic_schedule") or {}).get("interval_second", 0)) < 1:
            raise Refused(400, "Found invalid period schedule interval")
        if wanted.get("mode") not in ("ENABLE", "DISABLE"):
            raise Refused(400, "mode must be ENABLE or DISABLE")
        wanted |= {"max_concurrency": str(wanted["max_concurrency"]), "status": f"{wanted['mode']}D"}
        return self.keep(self.recurring, "recurring_run_id", wanted)

    def list_recurring(self, query: Resource) -> Resource:
        return self.listed(query, "recurringRuns", self.scoped(query, self.recurring))

    def get_recurring(self, query: Resource, recurring: str) -> Resource:
        return found(self.recurring, recurring, "Recurring run")

    def delete_recurring(self, query: Resource, recurring: str) -> Resource:
        found(self.recurring, recurring, "Recurring run")
        del self.recurring[recurring]
        return {}

    def enable_recurring(self, query: Resource, recurring: str) -> Resource:
        found(self.recurring, recurring, "Recurring run").update(mode="ENABLE", status="ENABLED")
        return {}

    def disable_recurring(self, query: Resource, recurring: str) -> Resource:
        found(self.recurring, recurring, "Recurring run").update(mode="DISABLE", status="DISABLED")
        return {}

    def fire(self, recurring: str) -> str:
        """What the scheduler does at its time; returns the new run."""
        its = self.recurring[recurring]
        assert its["status"] == "ENABLED"
        wanted = {k: its[k] for k in ("display_name", "experiment_id", "pipeline_version_reference", "runtime_config") if k in its}
        return str(self.keep(self.runs, "run_id", wanted | {"state": "PENDING", "recurring_run_id": recurring})["run_id"])

    # Shared rules

    def healthz(self, query: Resource) -> Resource:
        return {"multi_user": bool(self.namespaces), "pipeline_store": "database"}

    def old_healthz(self, query: Resource) -> Resource:
        if not self.version:
            raise Refused(404, "Not Found")
        return {"commit_sha": "0" * 40, "tag_name": self.version, "multi_user": bool(self.namespaces)}

    def keep(self, place: dict[str, Resource], key: str, resource: Resource) -> Resource:
        identity = str(uuid.uuid4())
        place[identity] = {**resource, key: identity, "created_at": self.now()}
        return place[identity]

    def namespace(self, asked: str, required: bool = True) -> str:
        if not self.namespaces:
            return ""  # single-user Kubeflow takes any, and forgets it
        if not asked and required:
            raise Refused(400, "An experiment cannot have an empty namespace in multi-user mode")
        if asked and asked not in self.namespaces:
            raise Refused(403, f"User 'someone' is not authorized with reason: not in namespace {asked}")
        return asked

    def pinned(self, wanted: Resource) -> Resource:
        """The rules that runs and recurring runs share."""
        if wanted.get("experiment_id") not in self.experiments:
            raise Refused(404 if wanted.get("experiment_id") else 400, f"Experiment {wanted.get('experiment_id')} not found")
        reference = wanted.get("pipeline_version_reference")
        if (reference is None) == (wanted.get("pipeline_spec") is None):
            raise Refused(400, "Please specify a valid pipeline source, either a version or a spec")
        if reference is not None:
            version = found(self.versions, reference.get("pipeline_version_id", ""), "PipelineVersion")
            spec = version["pipeline_spec"].get("pipeline_spec", version["pipeline_spec"])
            known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
            given = (wanted.get("runtime_config") or {}).get("parameters") or {}
            if extra := given.keys() - known.keys():
                raise Refused(400, f"parameter {sorted(extra)} is not one of the pipeline's")
            if missing := {k for k, v in known.items() if not v.get("isOptional")} - given.keys():
                raise Refused(400, f"parameter {sorted(missing)} is not optional and has no value")
        return wanted

    def scoped(self, query: Resource, place: dict[str, Resource]) -> list[Resource]:
        experiment, namespace = query.pop("experiment_id", ""), query.pop("namespace", "")
        if experiment:
            found(self.experiments, experiment, "Experiment")
            return [r for r in place.values() if r["experiment_id"] == experiment]
        wanted = self.namespace(namespace)
        return [r for r in place.values() if self.experiments[r["experiment_id"]]["namespace"] == wanted]

    def listed(self, query: Resource, what: str, resources: list[Resource]) -> Resource:
        size = int(query.get("page_size") or self.page)
        if size < 0:
            raise Refused(400, "The page size should be greater than 0")
        key, _, order = (query.get("sort_by") or "").partition(" ")
        if key not in SORTABLE or order not in ("", "asc", "desc"):
            raise Refused(400, f"Invalid sorting field: {query['sort_by']!r}")
        kept = sorted(
            (r for r in resources if matches(r, query.get("filter") or "")), key=lambda r: r["created_at"], reverse=order == "desc"
        )
        criteria = [query.get("sort_by") or "", query.get("filter") or ""]
        start = 0
        if query.get("page_token"):
            try:
                start, said = json.loads(base64.b64decode(query["page_token"], validate=True))
            except ValueError:
                raise Refused(400, "Invalid package token.") from None
            if said != criteria:
                raise Refused(400, "page token does not match the supplied sort by and/or filtering criteria")
        end = start + min(size, self.page, 200)  # the server's own bound is 200; a test may set a smaller one
        answer: Resource = {what: kept[start:end], "total_size": len(kept)}
        if end < len(kept):
            answer["next_page_token"] = base64.b64encode(json.dumps([end, criteria]).encode()).decode()
        return answer


def found(place: dict[str, Resource], identity: str, kind: str) -> Resource:
    if identity not in place:
        raise Refused(404, f"{kind} {identity} not found.")
    return place[identity]


def model(name: str, value: Any) -> Any:
    """The value, if it is what the server's proto takes: known fields, of their types; as protojson, which refuses unknown ones."""
    if not isinstance(value, dict):
        raise Refused(400, f"proto: ({name}) expected an object, got {value!r}")
    kind = getattr(models, name)
    fields = {json_name: (kind.openapi_types[attribute]) for attribute, json_name in kind.attribute_map.items()}
    if unknown := sorted(value.keys() - fields.keys()):
        raise Refused(400, f'proto: unknown field "{unknown[0]}" in {name}')
    return {key: typed(fields[key], f"{name}.{key}", its) for key, its in value.items() if its is not None}


def typed(kind: str, where: str, value: Any) -> Any:
    if match := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(value, list):
            raise Refused(400, f"proto: {where} expected an array, got {value!r}")
        return [typed(match[1], where, v) for v in value]
    if match := re.fullmatch(r"dict\(str, (.*)\)", kind):
        if not isinstance(value, dict):
            raise Refused(400, f"proto: {where} expected an object, got {value!r}")
        return {k: typed(match[1], where, v) for k, v in value.items()}
    plain = {"str": (str, int), "int": (int,), "bool": (bool,), "object": (object,), "datetime": (str,)}
    if kind in plain:
        if not isinstance(value, plain[kind]) or (kind == "str" and isinstance(value, bool)):
            raise Refused(400, f"proto: {where} expected {kind}, got {value!r}")
        return value
    allowed = getattr(getattr(models, kind), "allowable_values", None)
    if allowed is not None:
        if value not in allowed:
            raise Refused(400, f"proto: {where} expected one of {allowed}, got {value!r}")
        return value
    return model(kind, value)


def matches(resource: Resource, text: str) -> bool:
    if not text:
        return True
    try:
        wanted = json.loads(unquote(text))
    except ValueError:
        raise Refused(400, f"failed to parse valid filter from {text!r}") from None
    if wanted.keys() - {"predicates"}:
        raise Refused(400, f"unknown field in filter {text!r}")
    return all(_holds(resource, predicate) for predicate in wanted.get("predicates", []))


def _holds(resource: Resource, predicate: Resource) -> bool:
    operation = predicate.get("operation", 0)
    operation = OPERATIONS[operation] if isinstance(operation, int) else operation
    value = predicate.get("stringValue", predicate.get("string_value"))
    if unknown := predicate.keys() - {"operation", "key", "stringValue", "string_value"}:
        raise Refused(400, f"the fake takes no {unknown} in a predicate")
    if predicate.get("key") not in ("display_name", "name", "id", "state", "status"):
        raise Refused(400, f'no support for filtering on unrecognized field "{predicate.get("key")}"')
    if operation not in ("EQUALS", "NOT_EQUALS", "IS_SUBSTRING") or not isinstance(value, str):
        raise Refused(400, f"invalid predicate operation: {operation}")
    got = str(resource.get(predicate["key"], "")).lower()
    return {"EQUALS": got == value.lower(), "NOT_EQUALS": got != value.lower(), "IS_SUBSTRING": value.lower() in got}[operation]


def parse_package(filename: str, data: bytes) -> Resource:
    """The uploaded documents; refused unless each is the KFP proto that it should be."""
    if not filename.endswith((".yaml", ".yml")):
        raise Refused(400, f"Failed to read a pipeline spec file: unexpected file format {filename!r}")
    try:
        documents = list(yaml.safe_load_all(data))
        json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
        for document in documents[1:]:
            json_format.ParseDict(document, pipeline_spec_pb2.PlatformSpec())
    except (yaml.YAMLError, json_format.ParseError, IndexError, AttributeError, TypeError) as error:
        raise Refused(400, f"invalid pipeline spec: {error}") from None
    return documents[0] if len(documents) == 1 else {"pipeline_spec": documents[0], "platform_spec": documents[1]}


def parse_cron(text: str) -> list[set[int]]:
    """As `cron.Parse` of github.com/robfig/cron v1.2.0: 5 or 6 fields, the first one seconds, no time zone."""
    fields = text.split()
    if len(fields) not in (5, 6):
        raise Refused(400, f"Schedule cron is not a supported format. Error: Expected 5 to 6 fields, found {len(fields)}: {text}")
    return [_bits(field, *bounds) for field, bounds in zip(fields + ["*"] * (6 - len(fields)), CRON_FIELDS, strict=True)]


def _bits(field: str, low: int, high: int, names: list[str]) -> set[int]:
    def number(word: str) -> int:
        if word.lower() in names:
            return low + names.index(word.lower())
        if not re.fullmatch(r"\d+", word):
            raise Refused(400, f"Schedule cron is not a supported format. Error: Failed to parse int from {word}")
        return int(word)

    bits: set[int] = set()
    for expression in field.split(","):
        span, *step = expression.split("/")
        ends = span.split("-")
        if len(step) > 1 or len(ends) > 2:
            raise Refused(400, f"Schedule cron is not a supported format. Error: Too many hyphens or slashes: {expression}")
        if ends[0] in ("*", "?"):
            start, end = low, high
        else:
            start = number(ends[0])
            end = number(ends[1]) if len(ends) == 2 else high if step else start
        every = number(step[0]) if step else 1
        if start < low or end > high or start > end or every == 0:
            raise Refused(400, f"Schedule cron is not a supported format. Error: out of range: {expression}")
        bits |= set(range(start, end + 1, every))
    return bits


# method, path, query parameters besides, what answers
ROUTES: list[tuple[str, str, set[str], Callable[..., Any]]] = [
    ("GET", "/apis/v2beta1/healthz", set(), KfpApi.healthz),
    ("GET", "/apis/v1beta1/healthz", set(), KfpApi.old_healthz),
    ("POST", "/apis/v2beta1/pipelines/upload", {"name", "display_name", "description", "namespace", "tags"}, KfpApi.upload_pipeline),
    (
        "POST",
        "/apis/v2beta1/pipelines/upload_version",
        {"name", "display_name", "pipelineid", "description", "tags"},
        KfpApi.upload_version,
    ),
    ("POST", "/apis/v2beta1/pipelines", set(), KfpApi.create_pipeline),
    ("GET", "/apis/v2beta1/pipelines", LISTED | {"namespace"}, KfpApi.list_pipelines),
    ("GET", "/apis/v2beta1/pipelines/([^/:]+)", set(), KfpApi.get_pipeline),
    ("DELETE", "/apis/v2beta1/pipelines/([^/:]+)", set(), KfpApi.delete_pipeline),
    ("GET", "/apis/v2beta1/pipelines/([^/:]+)/versions", LISTED, KfpApi.list_versions),
    ("GET", "/apis/v2beta1/pipelines/([^/:]+)/versions/([^/:]+)", set(), KfpApi.get_version),
    ("POST", "/apis/v2beta1/experiments", set(), KfpApi.create_experiment),
    ("GET", "/apis/v2beta1/experiments", LISTED | {"namespace"}, KfpApi.list_experiments),
    ("GET", "/apis/v2beta1/experiments/([^/:]+)", set(), KfpApi.get_experiment),
    ("POST", "/apis/v2beta1/runs", {"experiment_id"}, KfpApi.create_run),
    ("GET", "/apis/v2beta1/runs", LISTED | {"namespace", "experiment_id"}, KfpApi.list_runs),
    ("GET", "/apis/v2beta1/runs/([^/:]+)", {"experiment_id"}, KfpApi.get_run),
    ("POST", "/apis/v2beta1/runs/([^/:]+):terminate", {"experiment_id"}, KfpApi.terminate_run),
    ("GET", "/apis/v1alpha1/runs/([^/:]+)/nodes/([^/:]+)/log", set(), KfpApi.read_log),
    ("POST", "/apis/v2beta1/recurringruns", set(), KfpApi.create_recurring),
    ("GET", "/apis/v2beta1/recurringruns", LISTED | {"namespace", "experiment_id"}, KfpApi.list_recurring),
    ("GET", "/apis/v2beta1/recurringruns/([^/:]+)", set(), KfpApi.get_recurring),
    ("DELETE", "/apis/v2beta1/recurringruns/([^/:]+)", set(), KfpApi.delete_recurring),
    ("POST", "/apis/v2beta1/recurringruns/([^/:]+):enable", set(), KfpApi.enable_recurring),
    ("POST", "/apis/v2beta1/recurringruns/([^/:]+):disable", set(), KfpApi.disable_recurring),
]


class _Handler(BaseHTTPRequestHandler):
    api: KfpApi
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.api.visited.append(parts.path)
        try:
            if not self._signed_in(parts.path):
                return
            self.api.requests.append((self.command, parts.path))
            answer = self._route(parts.path, parts.query, body)
            text = isinstance(answer, str)
            self._send(200, "text/plain" if text else "application/json", answer if text else json.dumps(answer))
        except Refused as refused:
            status = {400: 3, 401: 16, 403: 7, 404: 5, 409: 6}.get(refused.status, 13)
            self._send(
                refused.status,
                "application/json",
                json.dumps({"error": str(refused), "code": status, "message": str(refused), "details": []}),
            )

    def _signed_in(self, path: str) -> bool:
        api = self.api
        known = (not api.token and not api.cookie) or bool(api.token and self.headers.get("Authorization") == f"Bearer {api.token}")
        if known or (api.cookie and api.cookie in (self.headers.get("Cookie") or "")):
            return True
        if api.sign_in == "401":
            raise Refused(401, f"Failed to authenticate: token {self.headers.get('Authorization')} is not valid")
        if path != "/dex/auth" and api.sign_in == "redirect":
            self.send_response(302)
            self.send_header("Location", "/dex/auth?client_id=kubeflow")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send(200, "text/html; charset=utf-8", "<html><body>Log in to your account</body></html>")
        return False

    def _route(self, path: str, query: str, body: bytes) -> Any:
        for method, pattern, parameters, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if not match or method != self.command:
                continue
            given = {key: values[-1] for key, values in parse_qs(query, keep_blank_values=True).items()}
            if unknown := given.keys() - parameters:
                raise Refused(400, f"query parameter {sorted(unknown)} is not known at {path}")
            if (method, path) in self.api.failing:
                raise Refused(self.api.failing[method, path], "told to fail")
            arguments: list[Any] = [unquote(group) for group in match.groups()]
            if "/upload" in path:
                arguments.append(self._upload(body))
            elif method == "POST" and not arguments:
                arguments.append(self._json(body))
            elif body and json.loads(body) not in ({}, None):
                raise Refused(400, f"{method} {path} takes no body")
            return answer(self.api, given, *arguments)
        raise Refused(404, f"Not Found: {self.command} {path}")

    def _json(self, body: bytes) -> Any:
        if not (self.headers.get("Content-Type") or "").startswith("application/json"):
            raise Refused(415, "Content-Type must be application/json")
        try:
            return json.loads(body)
        except ValueError:
            raise Refused(400, "the body is no JSON") from None

    def _upload(self, body: bytes) -> tuple[str, bytes]:
        kind = self.headers.get("Content-Type") or ""
        message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + body)
        for part in message.iter_parts() if kind.startswith("multipart/form-data") else ():
            if part.get_param("name", header="content-disposition") == "uploadfile" and part.get_filename():
                return str(part.get_filename()), part.get_payload(decode=True)
        raise Refused(400, "Failed to read pipeline from file")

    def _send(self, status: int, kind: str, text: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
