"""One Job, or TrainJob, at a Kubernetes API server that may be slow, away, or short with its answers.

`JobsApi` makes, finds, follows and deletes one Job by its name, and sees its pods where that is allowed. A TrainJob comes out in the shape of
a Job (`train_job.as_job`). Whatever is worth trying again is a
`TryAgain`, whatever is the silo's decision a RefusedError; when and how often to try is for the caller to say. Versions that the server has
forgotten, watches that break in the middle of a line and answers that are lost all come out as TryAgain: the cure is one, to look again.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from silotune.components.cluster import train_job
from silotune.components.cluster.job_manifest import Manifest
from silotune.components.errors import FederationError, RefusedError, SilotuneError, UnreachableError
from silotune.components.federation import Silo

KUBECONFIG_VARIABLE = "SILOTUNE_KUBECONFIG"  # file; set where `pipelines.placement` mounts the silo's kubeconfig
CONNECT, ANSWER = 10.0, 30.0  # seconds to reach the API server, and for it to answer
AWAY = "cluster unreachable"
NOT_AUTHENTICATED = "not authenticated"


class TryAgain(UnreachableError):
    """The API server is away, overloaded, or forbids for now."""


class Exists(Exception):
    """There is a Job of that name."""


class JobsApi:
    """The Job ``name`` in a namespace.

    Args:
        connect: makes a client; called again where the server no longer knows the one there is, since a token may have been renewed.
        of_trainer: it is a TrainJob.
    """

    def __init__(
        self, connect: Callable[[], Any], namespace: str, name: str, now: Callable[[], float] = time.monotonic, *, of_trainer: bool = False
    ) -> None:  # fmt: skip
        self.namespace, self.name, self.of_trainer = namespace, name, of_trainer
        self.heard = now()  # when the server last answered well
        self._connect, self._now = connect, now
        self._sees_pods = True
        self.reconnect()

    def reconnect(self) -> None:
        """Raises FederationError where there is nothing to connect with."""
        from kubernetes import client

        api = self._connect()
        self._pods, self._jobs, custom = client.CoreV1Api(api), client.BatchV1Api(api), client.CustomObjectsApi(api)
        self._create: Callable[..., Any] = self._jobs.create_namespaced_job  # (namespace, body)
        self._list: Callable[..., Any] = self._jobs.list_namespaced_job  # (namespace)
        self._delete: Callable[..., Any] = self._jobs.delete_namespaced_job  # (name, namespace)
        if self.of_trainer:
            group, version, plural = train_job.API
            self._create = lambda at, body, **more: custom.create_namespaced_custom_object(group, version, at, plural, body, **more)
            self._list = lambda at, **more: custom.list_namespaced_custom_object(group, version, at, plural, **more)
            self._delete = lambda name, at, **more: custom.delete_namespaced_custom_object(group, version, at, plural, name, **more)

    def create(self, manifest: Manifest) -> Manifest:
        """Raises Exists where the name is taken."""
        return self._seen(self._json(self._create, self.namespace, manifest)[0])

    def look(self) -> tuple[Manifest | None, float, str]:
        """The Job or None, its age in seconds by the server's own clock, and the version to watch from."""
        found, date = self._json(self._list, self.namespace, field_selector=f"metadata.name={self.name}")
        job = next(iter(found["items"]), None)
        return self._seen(job) if job else None, _age(job, date) if job else 0.0, found["metadata"]["resourceVersion"]

    def _seen(self, thing: Manifest) -> Manifest:
        return train_job.as_job(thing) if self.of_trainer else thing

    def cause(self) -> Manifest | None:
        """Of a TrainJob, which only says that it has failed: the condition that its own Job ended with; None where there is none to see."""
        try:
            name = f"metadata.name={train_job.child_name(self.name)}"
            jobs = self._json(self._jobs.list_namespaced_job, self.namespace, field_selector=name)[0]["items"]
        except SilotuneError:
            return None  # it would only say why
        return next(
            (c for j in jobs for c in (j.get("status") or {}).get("conditions") or [] if c["type"] == "Failed" and c["status"] == "True"),
            None,
        )

    def tidy(self, labels: Manifest) -> None:
        """Delete the finished TrainJobs with these labels: unlike a Job, one stands until somebody takes it away, and counts."""
        selector = ",".join(f"{name}={value}" for name, value in labels.items())
        try:
            found = self._json(self._list, self.namespace, label_selector=selector)[0]["items"]
            for one in found:
                if one["metadata"]["name"] != self.name and train_job.is_over(one):
                    body = {"propagationPolicy": "Background", "preconditions": {"uid": one["metadata"]["uid"]}}
                    self._json(self._delete, one["metadata"]["name"], self.namespace, body=body)
        except SilotuneError as error:
            print(f"finished TrainJobs could not be deleted: {error}", file=sys.stderr)

    def events(self, version: str, seconds: int) -> Iterator[tuple[str, Manifest]]:
        """Changes of the Job after a version, as (ADDED, MODIFIED or DELETED, Job), for some seconds."""
        from kubernetes.watch.watch import iter_resp_lines
        from urllib3.exceptions import HTTPError

        response = self._call(
            self._list, self.namespace, field_selector=f"metadata.name={self.name}", watch=True,
            allow_watch_bookmarks=True, resource_version=version, timeout_seconds=seconds, _request_timeout=(CONNECT, seconds + ANSWER),
        )  # fmt: skip
        try:
            for line in iter_resp_lines(response):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise TryAgain(f"the watch ended: {event['object'].get('reason')}", AWAY)
                if event["type"] != "BOOKMARK":
                    yield event["type"], self._seen(event["object"])
        except (HTTPError, OSError, ValueError) as error:
            raise TryAgain(f"the watch broke: {type(error).__name__}", AWAY) from None
        finally:
            response.close()

    def pods(self, uid: str) -> list[Manifest]:
        """The pods of the Job ``uid``, where they may be seen; a silo need not allow it."""
        if not self._sees_pods:
            return []
        try:
            selector = train_job.pods_of(self.name) if self.of_trainer else f"batch.kubernetes.io/controller-uid={uid}"
            return list(self._json(self._pods.list_namespaced_pod, self.namespace, label_selector=selector)[0]["items"])
        except RefusedError:
            self._sees_pods = False
        except SilotuneError:
            pass  # they would only say why
        return []

    def delete(self, uid: str) -> None:
        """Delete the Job ``uid`` and its pod; one that cannot be deleted ends at its own deadline."""
        body = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        try:
            self._json(self._delete, self.name, self.namespace, body=body)
        except SilotuneError as error:
            print(f"the Job {self.name} could not be deleted: {error}", file=sys.stderr)

    def _json(self, call: Callable[..., Any], *arguments: Any, **more: Any) -> tuple[Manifest, str | None]:
        """(answer, the server's time)"""
        from urllib3.exceptions import HTTPError

        response = self._call(call, *arguments, **more)
        try:
            answer = json.loads(response.data)
        except (HTTPError, OSError, ValueError) as error:
            raise TryAgain(f"the answer broke off: {type(error).__name__}", AWAY) from None
        self.heard = self._now()
        return answer, response.headers.get("Date")

    def _call(self, call: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        """The response, its body unread."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return call(*arguments, _preload_content=False, **({"_request_timeout": (CONNECT, ANSWER)} | more))
        except ApiException as error:
            raise _problem(error.status, error.body, self.of_trainer) from None
        except (HTTPError, OSError) as error:
            raise TryAgain(f"the silo's API server cannot be reached: {type(error).__name__}", AWAY) from None


def connect(silo: Silo, kubeconfig: Path | None = None) -> Any:
    """A client of the silo's cluster: by the file given, else by the one that SILOTUNE_KUBECONFIG names, else of the one this pod runs in.

    Raises:
        FederationError: the kubeconfig is missing or unusable, or this is no pod.
    """
    import yaml
    from kubernetes import client, config
    from kubernetes.config.config_exception import ConfigException

    named = os.environ.get(KUBECONFIG_VARIABLE)
    path = kubeconfig or (Path(named) if named else None)
    wanted = silo.placement.kubeconfig_secret
    if path is None and wanted:
        raise FederationError(
            f"silo {silo.id!r}: placement.kubeconfig_secret is {wanted!r}, and {KUBECONFIG_VARIABLE} names no file; mount the secret",
            "no kubeconfig",
        )
    settings = client.Configuration()
    settings.retries = False  # how to try again is for the launcher to say
    try:
        if path:
            _require_words_only(silo, path)
            config.load_kube_config(str(path), client_configuration=settings, persist_config=False)
        else:
            config.load_incluster_config(settings)
    except (ConfigException, yaml.YAMLError, OSError, ValueError, TypeError, KeyError) as error:
        what = f"{path}: is no usable kubeconfig" if path else "this is no pod with an account's token"
        raise FederationError(f"silo {silo.id!r}: {what}: {type(error).__name__}; correct it", "no kubeconfig") from None
    return client.ApiClient(settings)


PLAIN = {
    "clusters": ("cluster", {"server", "certificate-authority-data", "tls-server-name", "proxy-url", "disable-compression"}),
    "users": ("user", {"token", "client-certificate-data", "client-key-data"}),
}


def _require_words_only(silo: Silo, path: Path) -> None:
    """A kubeconfig is the silo's word, and is read where the coordinator's credentials are: a program that it names would run here, and a file
    that it names, such as this pod's own token, would be sent to the silo's server.

    Raises:
        FederationError: it names one, or lets the server go unchecked.
    """
    import yaml

    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    for kind, (section, known) in PLAIN.items():
        for entry in raw[kind]:
            if odd := sorted(set(entry[section]) - known):
                allowed = ", ".join(sorted(known))
                raise FederationError(
                    f"silo {silo.id!r}: {path}: a {section} must hold nothing but {allowed}, got {', '.join(odd)}; ask for a kubeconfig with a token "
                    "and the authority's certificate in it",
                    "no kubeconfig",
                )


def _problem(code: int, body: bytes | str | None, of_trainer: bool) -> Exception:
    """What an answer other than success means."""
    try:
        told = json.loads(body or b"{}")
    except ValueError:
        told = {}
    message, reason = str(told.get("message", "")), str(told.get("reason", ""))
    text = f"the silo's API server says {code} {reason}: {message}"
    if reason == "AlreadyExists":
        return Exists()
    if match := re.search(r"ValidatingAdmissionPolicy '[^']*'.* denied request: ([a-z-]{1,30}):", message):
        return RefusedError(text, f"admission policy: {match[1]}")
    if "denied request" in message or "denied the request" in message:
        return RefusedError(text, "admission policy")
    if code == 403 and "exceeded quota" in message:
        return TryAgain(text, "quota exceeded")  # finished Jobs count until they are erased
    if code == 401:
        return TryAgain(text, NOT_AUTHENTICATED)  # a token that is just being renewed
    if code == 403:
        return RefusedError(text, "forbidden")
    if code == 404 and of_trainer and 'namespaces "' not in message:
        return SilotuneError(text, "no Kubeflow Trainer")  # the path itself is unknown
    if code == 404:
        return SilotuneError(text, "no such namespace")
    if code in (400, 422):
        return SilotuneError(text, "Job not valid")
    return TryAgain(text, AWAY)


def _age(job: Manifest, date: str | None) -> float:
    """Seconds since a Job was created, both times by the server's clock."""
    created = job["metadata"].get("creationTimestamp")
    if not created or not date:
        return 0.0
    return max(0.0, (parsedate_to_datetime(date) - datetime.fromisoformat(created)).total_seconds())
