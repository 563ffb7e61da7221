"""The last run of a schedule disables it: against a strict API server over loopback, and without KFP's client."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kfp_api
import pytest
import yaml

from silotune.components import recurrence
from silotune.components.errors import RefusedError, UnreachableError

CONVERGED, OPEN = "done:converged at round 3", "round:2 attempt:1"
PIPELINE = Path(__file__).parents[1] / "golden" / "three_silos_two_rounds.yaml"


@pytest.fixture
def file(tmp_path: Path) -> str:
    terms = {"name": "ward", "model": {"base": "./base"}, "silos": [{"id": "north", "train": "./n.jsonl"}]}
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(terms))
    return str(tmp_path / "f.yaml")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with kfp_api.KfpApi() as server:
        monkeypatch.setenv(recurrence.API_VARIABLE, server.url)
        yield server


def schedule(api: Any, federation: str, namespace: str = "", token: str = "") -> str:
    """A recurring run of a federation, made as a person would make it."""
    from kfp import Client

    client = Client(host=api.url, namespace=namespace or "kubeflow", existing_token=token or None)
    pipeline = client.upload_pipeline(str(PIPELINE), f"silotune-{federation}-{len(api.pipelines)}", namespace=namespace or None)
    experiment = client.create_experiment(federation, namespace=namespace or None).experiment_id
    version = next(v for v in api.versions.values() if v["pipeline_id"] == pipeline.pipeline_id)["pipeline_version_id"]
    made = client.create_recurring_run(
        experiment, f"silotune-{federation}", cron_expression="0 0 3 * * *", pipeline_id=pipeline.pipeline_id, version_id=version,
        params={"federation": "/f.yaml"},
    )  # fmt: skip
    return str(made.recurring_run_id)


def status(api: Any, recurring: str) -> str:
    return str(api.recurring[recurring]["status"])


def test_a_finished_federation_disables_its_own_recurring_run_and_says_so(api: Any, file: str, capfd: pytest.CaptureFixture[str]) -> None:
    mine, other = schedule(api, "ward"), schedule(api, "clinic")
    assert recurrence.end_when_done(file, OPEN) == 0
    assert status(api, mine) == "ENABLED"
    capfd.readouterr()
    assert [recurrence.end_when_done(file, CONVERGED) for _ in range(2)] == [1, 0]
    assert (status(api, mine), status(api, other)) == ("DISABLED", "ENABLED")
    assert capfd.readouterr().out.splitlines() == ["export: converged at round 3; its schedule is disabled"]


def test_a_run_that_was_submitted_by_hand_has_no_schedule_to_end(api: Any, file: str) -> None:
    assert recurrence.end_when_done(file, CONVERGED) == 0
    assert all(method == "GET" for method, _ in api.requests)


def test_on_one_machine_and_while_rounds_are_left_nobody_is_asked(
    api: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert recurrence.end_when_done("/no/such/file", OPEN) == 0
    monkeypatch.delenv(recurrence.API_VARIABLE)
    assert recurrence.end_when_done("/no/such/file", CONVERGED) == 0
    assert (api.visited, capfd.readouterr().out) == ([], "")


def test_many_users_a_token_and_the_namespace_of_this_pod(tmp_path: Path) -> None:
    token, namespace = tmp_path / "token", tmp_path / "namespace"
    token.write_text("t0ken\n")
    namespace.write_text("team")
    with kfp_api.KfpApi(namespaces=("team", "others"), token="t0ken") as api:
        mine, theirs = (schedule(api, "ward", namespace=n, token="t0ken") for n in ("team", "others"))
        with pytest.raises(RefusedError, match="401"):
            recurrence.disable(api.url, "ward", namespace=namespace)
        assert recurrence.disable(api.url, "ward", token=token, namespace=namespace) == 1
        assert (status(api, mine), status(api, theirs)) == ("DISABLED", "ENABLED")


@pytest.mark.parametrize("sign_in", ["401", "redirect", "page"])
def test_where_it_may_not_it_says_so_in_one_line_and_the_run_ends_well(
    sign_in: str, file: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with kfp_api.KfpApi(token="another", sign_in=sign_in) as api:
        monkeypatch.setenv(recurrence.API_VARIABLE, api.url)
        assert recurrence.end_when_done(file, CONVERGED) == 0
        assert set(api.visited) == {"/apis/v2beta1/healthz"}  # a redirect is not followed, and nothing tells it the token
    (line,) = capfd.readouterr().out.splitlines()
    assert "its schedule goes on" in line
    assert "`silotune unschedule` ends it" in line


def test_a_right_that_is_missing_is_named(api: Any) -> None:
    recurring = schedule(api, "ward")
    api.failing["POST", f"/apis/v2beta1/recurringruns/{recurring}:disable"] = 403
    with pytest.raises(RefusedError, match=r"may not disable its recurring run \(403\)"):
        recurrence.disable(api.url, "ward")
    assert status(api, recurring) == "ENABLED"


def test_a_kubeflow_that_is_away_or_ill_is_told_in_a_moment(api: Any) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(UnreachableError, match="no answer"):
            recurrence.disable(f"http://127.0.0.1:{closed.getsockname()[1]}", "ward")
    api.failing["GET", "/apis/v2beta1/experiments"] = 500
    with pytest.raises(UnreachableError, match="500"):
        recurrence.disable(api.url, "ward")


def test_it_needs_no_kfp(api: Any, file: str) -> None:
    recurring = schedule(api, "ward")
    code = f"import sys\nsys.modules['kfp'] = sys.modules['kfp_server_api'] = None\nfrom silotune.components.recurrence import end_when_done\nend_when_done({file!r}, {CONVERGED!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert status(api, recurring) == "DISABLED"
