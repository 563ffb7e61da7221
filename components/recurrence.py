"""The end of a schedule: the run that finds nothing left to do disables the recurring run that started it.

Only the export box of a placed pipeline comes here: it finds the address of Kubeflow's API in SILOTUNE_KFP_API. What an export on one machine
does is no matter of any cluster. The API is spoken to directly, since an image has KFP's executor, but not all that its client needs.

On a single-user Kubeflow every pod may do this. On one with many users the run's account needs a token for the API, and the right to list
experiments and to list and disable jobs (``k8s/base/coordinator/accounts.yaml``). Where it has not, the runs go on and do nothing, quickly.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from silotune.components.errors import RefusedError, SilotuneError, UnreachableError
from silotune.components.federation import Federation
from silotune.components.process.progress import tell
from silotune.components.protocol import Turn

API_VARIABLE = "SILOTUNE_KFP_API"
TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")  # where Kubeflow's PodDefault puts one with the API's audience
NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
TIMEOUT = 10.0  # seconds to connect, and for an answer


def title(federation: str) -> str:
    """What a federation's recurring run is called."""
    return f"silotune-{federation}"


def end_when_done(federation_file: str, turn_text: str) -> int:
    """Disable the federation's recurring runs where the turn says that all is done; returns how many were. One line says what became of it.

    Args:
        turn_text: what the export box was given.
    """
    api = os.environ.get(API_VARIABLE)
    turn = Turn.parse(turn_text)
    if not api or not turn.done:
        return 0
    name = Federation.load(federation_file).name
    try:
        count = disable(api, name)
    except SilotuneError as error:
        tell("export", "warned", detail=f"{turn.done}, but its schedule goes on: {error}; `silotune unschedule` ends it")
        return 0
    if count:
        print(f"export: {turn.done}; its schedule is disabled", flush=True)
    return count


def disable(api: str, federation: str, *, token: Path | None = None, namespace: Path | None = None) -> int:
    """Disable what recurring runs of a federation are enabled; returns how many.

    Args:
        api: address of Kubeflow Pipelines, such as http://ml-pipeline.kubeflow.svc.cluster.local:8888.
        token, namespace: files that hold this pod's; default: where a cluster puts them.

    Raises:
        RefusedError: this account may not do that.
        UnreachableError: Kubeflow does not answer, or not with what was asked for.
    """
    ask = _Api(api.rstrip("/"), _word(token or TOKEN))
    place = {"namespace": _word(namespace or NAMESPACE)} if ask("GET", "healthz").get("multi_user") else {}
    experiments = ask("GET", "experiments", filter=_named(federation), **place).get("experiments") or []
    count = 0
    for experiment in experiments:
        found = ask("GET", "recurringruns", filter=_named(title(federation)), experiment_id=experiment["experiment_id"])
        for recurring in found.get("recurringRuns") or []:
            if recurring.get("status") == "ENABLED":
                ask("POST", f"recurringruns/{recurring['recurring_run_id']}:disable")
                count += 1
    return count


class _Api:
    """Kubeflow's API as one account."""

    def __init__(self, address: str, token: str) -> None:
        import urllib3

        self.address = address
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.pool = urllib3.PoolManager(timeout=TIMEOUT, retries=urllib3.Retry(total=2, redirect=False, backoff_factor=0.3))

    def __call__(self, method: str, path: str, **query: str) -> dict[str, Any]:
        from urllib3.exceptions import HTTPError

        where = f"Kubeflow Pipelines at {self.address}"
        try:
            answer = self.pool.request(
                method, f"{self.address}/apis/v2beta1/{path}", fields=query or None, headers=self.headers, redirect=False
            )
        except HTTPError as error:
            raise UnreachableError(f"{where}: no answer ({type(error).__name__})", "cluster unreachable") from None
        if answer.status in (401, 403) or 300 <= answer.status < 400:
            raise RefusedError(f"{where}: this run's account may not {_what(method, path)} ({answer.status})", "not authorised")
        try:
            if answer.status != 200:
                raise ValueError
            return dict(json.loads(answer.data))
        except ValueError:
            raise UnreachableError(f"{where}: answers {answer.status}, and not as its API does", "cluster unreachable") from None


def _what(method: str, path: str) -> str:
    return "disable its recurring run" if method == "POST" else f"read {path}"


def _named(name: str) -> str:
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def _word(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
