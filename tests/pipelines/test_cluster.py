"""Running on Kubeflow: each command's effect on a strict API server over loopback, through the real `kfp.Client`."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import kfp_api
import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from silotune.components.errors import FederationError, RefusedError, SilotuneError, UnreachableError
from silotune.components.federation import Federation
from silotune.pipelines.kubeflow import cluster_fit, runs, schedules, submission
from silotune.pipelines.kubeflow.kfp_api import Cluster, connect, words_of

IMAGE = "registry.example/silotune-silo@sha256:" + "a" * 64
COORDINATOR_IMAGE = "registry.example/silotune-coordinator@sha256:" + "b" * 64
KEYS = {p: f"ed25519:{c * 43}=" for p, c in (("coordinator", "A"), ("north", "B"), ("south", "C"))}
SILO = """
  - id: {0}
    train: /silo/train.jsonl
    storage: /silo/storage-{0}
    placement: {{namespace: silotune-{0}, image: "{1}", claims: [{{claim: silotune-silo, mount: /silo}}]}}"""
FILE = f"""
name: ward
coordinator_image: "{COORDINATOR_IMAGE}"
model: {{base: s3://models/base}}
silos:{SILO.format("north", IMAGE)}{SILO.format("south", IMAGE)}
rounds: {{total: 4, per_run: 2}}
storage: {{root: s3://store/federations}}
tracking: {{uri: https://mlflow.example}}
security: {{keys: {json.dumps(KEYS)}}}
"""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ENDPOINT", "NAMESPACE", "TOKEN", "TOKEN_FILE", "COOKIE", "SERVICE_ACCOUNT", "TIMEZONE"):
        monkeypatch.delenv(f"KFP_{name}", raising=False)
    for name in ("KF_PIPELINES_ENDPOINT", "KF_PIPELINES_UI_ENDPOINT", "KUBERNETES_SERVICE_HOST", "SSL_CA_CERT", "SSL_CERT_FILE", "HTTP_PROXY", "http_proxy",
                 "HTTPS_PROXY", "https_proxy"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("kfp.Client._LOCAL_KFP_CONTEXT", str(tmp_path / "no-context.json"))


@pytest.fixture
def api() -> Iterator[Any]:
    with kfp_api.KfpApi() as server:
        yield server


@pytest.fixture
def ward(tmp_path: Path) -> Federation:
    return load(tmp_path)


@pytest.fixture
def here(api: Any) -> Cluster:
    return connect(api.url)


def load(folder: Path, change: Callable[[str], str] = str) -> Federation:
    file = folder / "ward.yaml"
    file.write_text(change(FILE))
    return Federation.load(file)


# Submitting


def test_a_submitted_run_has_its_pipeline_version_experiment_and_one_parameter(api: Any, here: Cluster, ward: Federation) -> None:
    submitted = submission.submit(here, ward, 2, service_account="runner")
    (pipeline,), (version,), (experiment,), (run,) = (list(x.values()) for x in (api.pipelines, api.versions, api.experiments, api.runs))
    assert (pipeline["name"], experiment["display_name"]) == ("silotune-ward", "ward")
    assert version["name"] == submitted.version
    assert run["experiment_id"] == experiment["experiment_id"]
    assert run["pipeline_version_reference"]["pipeline_version_id"] == version["pipeline_version_id"]
    assert run["runtime_config"]["parameters"] == {"federation": "/federation/federation.yaml"}
    assert run["service_account"] == "runner"
    assert (submitted.run, submitted.url) == (run["run_id"], f"{api.url}/#/runs/details/{run['run_id']}")


def test_the_same_federation_reuses_its_version_and_other_terms_or_tasks_make_one(
    api: Any, here: Cluster, ward: Federation, tmp_path: Path
) -> None:
    def submit(federation: Federation, rounds: int) -> str:
        submitted = submission.submit(here, federation, rounds)
        api.advance(submitted.run, "SUCCEEDED")
        return submitted.version

    first = submit(ward, 2)
    assert submit(ward, 2) == first
    assert (len(api.pipelines), len(api.versions), len(api.experiments), len(api.runs)) == (1, 1, 1, 2)
    more_slots = submit(ward, 3)
    other_terms = submit(load(tmp_path, lambda text: text + "training: {steps: 9}\n"), 2)
    assert len({first, more_slots, other_terms, *(v["name"] for v in api.versions.values())}) == 3
    assert first.rpartition("-")[0] == more_slots.rpartition("-")[0] != other_terms.rpartition("-")[0]


def test_a_version_is_found_again_behind_many_pages_and_other_pipelines(ward: Federation) -> None:
    with kfp_api.KfpApi(page=2) as api:
        here = connect(api.url)
        for _ in range(2):
            for rounds in (1, 2, 3):
                last = submission.submit(here, ward, rounds).run
                api.advance(last, "FAILED")
        assert (len(api.versions), len(api.runs)) == (3, 6)
        api.advance(last, "RUNNING")
        assert runs.cancel(here, ward) == [last]


def test_what_is_uploaded_is_a_kfp_proto_without_caching_secrets_or_paths_of_this_machine(
    api: Any, ward: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("KFP_COOKIE", "session=do-not-print")
    submission.submit(connect(api.url), ward, 2)
    (text,) = api.uploads.values()
    spec = json_format.ParseDict(next(yaml.safe_load_all(text)), pipeline_spec_pb2.PipelineSpec())
    assert spec.pipeline_info.name == "silotune-ward"
    tasks = [task for dag in (spec.root.dag, *(c.dag for c in spec.components.values())) for task in dag.tasks.values()]
    boxes = [task for task in tasks if spec.components[task.component_ref.name].executor_label]
    assert len(boxes) == 12
    assert not any(task.caching_options.enable_cache for task in boxes)
    everything = text + json.dumps(list(api.runs.values()), default=str)
    for word in ("wJalrXUtnFEMI", "do-not-print", str(tmp_path), str(Path.home()), str(Path(submission.__file__).parents[1])):
        assert word not in everything


def test_a_second_run_is_refused_while_one_is_going_on(api: Any, here: Cluster, ward: Federation) -> None:
    first = submission.submit(here, ward, 2).run
    with pytest.raises(RefusedError, match=first):
        submission.submit(here, ward, 2)
    assert len(api.runs) == 1


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("security: {keys:", "security: {signing: false, keys:", "security.signing: must be on"),
        ("security: {", "# {", "security.keys: are required"),
        ("storage: {root: s3://store/federations}", "storage: {root: ./store}", "storage.root: must be s3://bucket/prefix"),
        ("storage: {root: s3://store/federations}", "", "storage.root: must be s3://bucket/prefix"),
        ("https://mlflow.example", "sqlite:///./m.db", "tracking.uri: must be a server's"),
        ("s3://models/base", "./base", "model.base: must be s3:// or an absolute path in the silo's pods, got './base'"),
        ("s3://models/base", "org/model@main", "model.base: must be s3:// or a folder of a claim where silos' Jobs load it"),
        ("s3://models/base", "/models/base", "model.base: must lie under a mount of placement.claims of every silo"),
        ("/silo/storage-north", "./private", "silos[0].storage: must be s3:// or an absolute path in the silo's pods, got './private'"),
        ("storage: /silo/storage-south", "", "silos[1].storage: must be s3://"),
        ("train: /silo/train.jsonl", "train: /silos/train.jsonl", "silos[0].train: must lie under a mount of silos[0].placement.claims"),
        (IMAGE, "registry.example/silotune-silo:latest", "silos[0].placement.image: must name an image by digest"),
        ("namespace: silotune-south, ", "", "silos[1].placement.namespace: is required with launcher: job"),
    ],
)
def test_what_cannot_run_on_a_cluster_is_refused_before_anything_is_sent(
    api: Any, here: Cluster, tmp_path: Path, old: str, new: str, told: str
) -> None:
    api.requests.clear()
    federation = load(tmp_path, lambda text: text.replace(old, new, 1))
    for act in (lambda: submission.submit(here, federation, 2), lambda: schedules.schedule(here, federation, "0 3 * * *", 2)):
        with pytest.raises(FederationError) as refused:
            act()
        assert told in str(refused.value)
    assert api.requests == []


def test_a_base_on_a_volume_must_be_on_one_of_the_coordinators_as_well(tmp_path: Path) -> None:
    def on_a_volume(more: str) -> Federation:
        return load(tmp_path, lambda text: text.replace("s3://models/base", "/silo/base") + more)

    with pytest.raises(FederationError, match=r"model\.base: must lie under a mount of .* and of coordinator\.claims"):
        cluster_fit.require_fit(on_a_volume(""))
    cluster_fit.require_fit(on_a_volume("coordinator: {claims: [{claim: models, mount: /silo}]}"))


def test_all_reasons_are_told_at_once(tmp_path: Path) -> None:
    federation = load(tmp_path, lambda text: text.replace(IMAGE, "image:tag").replace("storage: /silo", "storage: ./silo"))
    with pytest.raises(FederationError, match="4 problems"):
        cluster_fit.require_fit(federation)


# Signing in


def test_a_token_from_a_file_a_token_and_a_cookie_each_open_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with kfp_api.KfpApi(token="t0ken-of-tests", cookie="authservice_session=abc") as api:
        monkeypatch.setenv("KFP_ENDPOINT", api.url)
        file = tmp_path / "token"
        for name, value in (("KFP_TOKEN", "t0ken-of-tests"), ("KFP_COOKIE", "authservice_session=abc"), ("KFP_TOKEN_FILE", str(file))):
            file.write_text("t0ken-of-tests")
            monkeypatch.setenv(name, value)
            assert connect().version == "2.17.0"
            monkeypatch.delenv(name)
        monkeypatch.setenv("KFP_TOKEN_FILE", str(file))
        here = connect()
        file.write_text("another")
        with pytest.raises(UnreachableError, match="expired"):
            schedules.unschedule(here, load(tmp_path))
        file.write_text("t0ken-of-tests")  # what the kubelet does: the same connection goes on with the new one
        assert schedules.unschedule(here, load(tmp_path)) == 0


@pytest.mark.parametrize("sign_in", ["401", "redirect", "page"])
@pytest.mark.parametrize("token", ["", "eyJhbGciOi.expired.token"])
def test_a_missing_or_expired_sign_in_is_told_in_a_moment_without_the_token(
    sign_in: str, token: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if token:
        monkeypatch.setenv("KFP_TOKEN", token)
    with kfp_api.KfpApi(token="good", sign_in=sign_in) as api:
        with pytest.raises(UnreachableError) as refused:
            connect(api.url)
        assert refused.value.exit_code == 5
        assert set(api.visited) == {"/apis/v2beta1/healthz"}  # nothing is sent on to where a redirect points
        assert "KFP_TOKEN" in str(refused.value)
        assert "expired.token" not in str(refused.value) + caplog.text


def test_a_sign_in_that_ends_in_the_middle_is_no_empty_answer(api: Any, here: Cluster, ward: Federation) -> None:
    submission.submit(here, ward, 2)
    api.token, api.sign_in = "now required", "redirect"
    with pytest.raises(UnreachableError, match="sign-in"):
        runs.runs(here, ward)


def test_the_servers_words_never_carry_what_signs_one_in(
    here: Cluster, api: Any, ward: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_TOKEN", "hush-hush")
    assert words_of(b'{"message": "token hush-hush and Bearer xyz.abc and eyJhbGciOi.JIUz.I1NiJ9"}') == "token … and … and …"


def test_a_server_that_is_away_busy_or_silent_is_worth_trying_again(ward: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(UnreachableError, match="no answer"):
            connect(url)
    monkeypatch.setattr("silotune.pipelines.kubeflow.kfp_api.TIMEOUT", (0.2, 0.2))
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        with pytest.raises(UnreachableError, match="no answer"):
            connect(f"http://127.0.0.1:{mute.getsockname()[1]}")
    with kfp_api.KfpApi() as api:
        here = connect(api.url)
        api.failing["GET", "/apis/v2beta1/experiments"] = 503
        with pytest.raises(UnreachableError, match="503"):
            submission.submit(here, ward, 2)
        assert api.runs == {}


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, "KFP_ENDPOINT: is not set"),
        ({"KFP_ENDPOINT": "ftp://kubeflow"}, "KFP_ENDPOINT: must be http"),
        ({"KFP_ENDPOINT": "https://someone:secret@kubeflow"}, "without a user"),
        ({"KFP_ENDPOINT": "https://kubeflow", "KFP_TOKEN_FILE": "/no/such"}, "KFP_TOKEN_FILE: no such file"),
        ({"KFP_ENDPOINT": "https://kubeflow", "SSL_CA_CERT": "/no/such"}, "SSL_CA_CERT: no such file"),
    ],
)
def test_wrong_settings_are_told_by_their_name(variables: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FederationError, match=told) as refused:
        connect()
    assert "secret" not in str(refused.value)


def test_a_proxy_is_used_unless_no_proxy_names_the_host(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org")
    with pytest.raises(UnreachableError, match="no answer"):
        connect(api.url)
    monkeypatch.setenv("no_proxy", "example.org,127.0.0.1")
    assert connect(api.url).version == "2.17.0"


def test_a_private_authority_is_trusted_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, both = self_signed(tmp_path)
    with kfp_api.KfpApi(certificate=str(both)) as api:
        with pytest.raises(UnreachableError, match="SSL_CA_CERT"):
            connect(api.url)
        monkeypatch.setenv("SSL_CA_CERT", str(authority))
        assert connect(api.url).version == "2.17.0"


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, and the same with its key."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key, name, now = ec.generate_private_key(ec.SECP256R1()), x509.Name([]), datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
    for extension in (x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), x509.BasicConstraints(True, None)):
        builder = builder.add_extension(extension, critical=True)
    certificate = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    (folder / "authority.pem").write_bytes(certificate)
    (folder / "both.pem").write_bytes(certificate + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return folder / "authority.pem", folder / "both.pem"


def test_a_multi_user_kubeflow_wants_a_namespace_and_keeps_to_it(ward: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    with kfp_api.KfpApi(namespaces=("team", "others")) as api:
        with pytest.raises(FederationError, match="KFP_NAMESPACE"):
            connect(api.url)
        with pytest.raises(RefusedError, match="403"):
            submission.submit(connect(api.url, "strangers"), ward, 2)
        monkeypatch.setenv("KFP_NAMESPACE", "team")
        here = connect(api.url)
        submission.submit(here, ward, 2)
        schedules.schedule(here, ward, "0 3 * * *", 2)
        assert {p["namespace"] for p in (*api.pipelines.values(), *api.experiments.values())} == {"team"}
        assert (len(runs.runs(here, ward)), runs.runs(connect(api.url, "others"), ward)) == (1, [])


# Schedules


def test_a_schedule_runs_one_at_a_time_without_catching_up(api: Any, here: Cluster, ward: Federation) -> None:
    made = schedules.schedule(here, ward, "30 3 * * mon-fri", 2)
    (recurring,) = api.recurring.values()
    assert made.change == "created"
    assert recurring["trigger"]["cron_schedule"]["cron"] == made.cron == "0 30 3 * * mon-fri"
    assert (recurring["max_concurrency"], recurring["no_catchup"], recurring["status"]) == ("1", True, "ENABLED")
    assert recurring["runtime_config"]["parameters"] == {"federation": "/federation/federation.yaml"}


def test_a_schedule_that_is_asked_for_again_is_left_changed_or_enabled_but_never_doubled(
    api: Any, here: Cluster, ward: Federation, tmp_path: Path
) -> None:
    first = schedules.schedule(here, ward, "0 3 * * *", 2)
    assert schedules.schedule(here, ward, "0 0 3 * * *", 2).identity == first.identity
    api.disable_recurring({}, first.identity)
    assert schedules.schedule(here, ward, "0 3 * * *", 2).change == "enabled"
    moved = schedules.schedule(here, ward, "0 4 * * *", 2)
    amended = schedules.schedule(here, load(tmp_path, lambda text: text + "training: {steps: 9}\n"), "0 4 * * *", 2)
    assert [moved.change, amended.change] == ["changed", "changed"]
    assert list(api.recurring) == [amended.identity]
    assert api.recurring[amended.identity]["status"] == "ENABLED"


def test_the_old_schedule_goes_on_where_the_new_one_cannot_be_made(api: Any, here: Cluster, ward: Federation) -> None:
    old = schedules.schedule(here, ward, "0 3 * * *", 2).identity
    api.failing["POST", "/apis/v2beta1/recurringruns"] = 500
    with pytest.raises(UnreachableError):
        schedules.schedule(here, ward, "0 4 * * *", 2)
    assert {k: r["status"] for k, r in api.recurring.items()} == {old: "ENABLED"}


def test_unscheduling_deletes_only_the_federations_own(api: Any, here: Cluster, ward: Federation, tmp_path: Path) -> None:
    other = load(tmp_path, lambda text: text.replace("name: ward", "name: clinic"))
    schedules.schedule(here, ward, "0 3 * * *", 2)
    kept = schedules.schedule(here, other, "0 3 * * *", 2).identity
    assert [schedules.unschedule(here, ward), schedules.unschedule(here, ward)] == [1, 0]
    assert list(api.recurring) == [kept]


def test_a_time_zone_other_than_the_schedulers_is_refused_with_the_cure(
    api: Any, here: Cluster, ward: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FederationError, match=r"CRON_SCHEDULE_TIMEZONE.*KFP_TIMEZONE"):
        schedules.schedule(here, ward, "0 3 * * *", 2, timezone="Europe/Zurich")
    with pytest.raises(FederationError, match="must be a name"):
        schedules.schedule(here, ward, "0 3 * * *", 2, timezone="Middle/Earth")
    assert api.recurring == {}
    monkeypatch.setenv("KFP_TIMEZONE", "Europe/Zurich")
    assert schedules.schedule(here, ward, "0 3 * * *", 2, timezone="Europe/Zurich").timezone == "Europe/Zurich"


# Runs


def nodes(prefix: str = "ward-x") -> list[dict[str, Any]]:
    """A workflow as the server lists it: boxes by their key in the pipeline, drivers, executors, and the graph."""
    boxes = [("preprocess", "SUCCEEDED"), ("preprocess-2", "SUCCEEDED"), ("initialize", "SUCCEEDED"), ("train", "SUCCEEDED"),
             ("train-2", "FAILED"), ("aggregate", "RUNNING")]  # fmt: skip
    found = [{"task_id": "0", "display_name": "root", "state": "RUNNING", "start_time": "2026-01-01T00:00:00Z"}]
    for i, (key, state) in enumerate(boxes):
        at = f"2026-01-01T00:00:{i + 1:02d}Z"
        found.append({"task_id": f"e{i}", "display_name": "executor", "state": state, "start_time": at, "pod_name": f"{prefix}-impl-{i}"})
        found.append(
            {"task_id": f"d{i}", "display_name": f"{key}-driver", "state": "SUCCEEDED", "pod_name": f"{prefix}-container-driver-{i}"}
        )
        found.append(
            {
                "task_id": f"t{i}",
                "display_name": key,
                "state": state,
                "start_time": at,
                "child_tasks": [{"pod_name": f"{prefix}-impl-{i}"}, {"pod_name": f"{prefix}-container-driver-{i}"}],
            }
        )
    return found[::-1]


def test_runs_are_told_latest_first_with_their_boxes_by_silo(api: Any, here: Cluster, ward: Federation) -> None:
    assert runs.runs(here, ward) == []
    first = submission.submit(here, ward, 1).run
    api.advance(first, "SUCCEEDED")
    recurring = schedules.schedule(here, ward, "0 3 * * *", 1).identity
    second = api.fire(recurring)
    api.advance(second, "RUNNING", nodes())
    latest, earlier = runs.runs(here, ward)
    assert (latest.identity, latest.state, latest.scheduled) == (second, "RUNNING", True)
    assert (earlier.identity, earlier.state, earlier.scheduled) == (first, "SUCCEEDED", False)
    assert [(t.name, t.state) for t in latest.tasks] == [
        ("preprocess north", "SUCCEEDED"), ("preprocess south", "SUCCEEDED"), ("initialize", "SUCCEEDED"), ("train north", "SUCCEEDED"),
        ("train south", "FAILED"), ("aggregate", "RUNNING"),
    ]  # fmt: skip
    assert len(runs.runs(here, ward, limit=1)) == 1


def test_logs_are_the_coordinators_only_and_a_lost_one_is_told(api: Any, here: Cluster, ward: Federation) -> None:
    run = submission.submit(here, ward, 1).run
    api.advance(run, "RUNNING", nodes())
    for i, text in ((2, "opened round 1\n"), (3, "a record of north")):
        api.logs[run, f"ward-x-impl-{i}"] = text
    initialize, aggregate = runs.logs(here, ward)
    assert (initialize.task, initialize.text, initialize.problem) == ("initialize", "opened round 1\n", "")
    assert (aggregate.task, aggregate.text) == ("aggregate", "")
    assert "ward-x-impl-5" in aggregate.problem
    asked = [path for _, path in api.requests if path.endswith("/log")]
    assert sorted(asked) == [f"/apis/v1alpha1/runs/{run}/nodes/ward-x-impl-{i}/log" for i in (2, 5)]
    north, south = runs.silo_logs(ward)
    assert north.startswith("north: /silo/storage-north/ward/logs")
    assert "silotune-south" in south
    with pytest.raises(FederationError, match="is none of federation 'ward'"):
        runs.logs(here, ward, "another")


def test_cancelling_stops_what_is_going_on_and_nothing_else(api: Any, here: Cluster, ward: Federation, tmp_path: Path) -> None:
    first = submission.submit(here, ward, 1).run
    api.advance(first, "SUCCEEDED")
    second = submission.submit(here, ward, 1).run
    stranger = submission.submit(here, load(tmp_path, lambda text: text.replace("name: ward", "name: clinic")), 1).run
    with pytest.raises(FederationError, match="is none of federation 'ward'"):
        runs.cancel(here, ward, stranger)
    assert [runs.cancel(here, ward, first), runs.cancel(here, ward), runs.cancel(here, ward)] == [[], [second], []]
    assert [api.runs[r]["state"] for r in (first, second, stranger)] == ["SUCCEEDED", "CANCELING", "PENDING"]


def test_two_submissions_at_once_make_one_pipeline_and_one_version(api: Any, ward: Federation) -> None:
    outcomes: list[Any] = []

    def submit() -> None:
        try:
            outcomes.append(submission.upload(connect(api.url), ward, 2).version)
        except SilotuneError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=submit) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [next(iter(api.versions))] * 3
    assert len(api.pipelines) == 1


# By command


def silotune(*words: str) -> Any:
    from typer.testing import CliRunner

    from silotune.pipelines.cli import app

    return CliRunner().invoke(app, list(words))


def test_the_commands_submit_schedule_show_and_cancel(api: Any, ward: Federation) -> None:
    file = str(ward.file)
    submitted = silotune("submit", file, "--endpoint", api.url)
    assert submitted.exit_code == 0, submitted.output
    (run,) = api.runs.values()
    assert run["run_id"] in submitted.output
    scheduled = silotune("schedule", file, "--cron", "0 3 * * *", "--endpoint", api.url)
    assert scheduled.exit_code == 0, scheduled.output
    assert "created: 0 0 3 * * * UTC" in scheduled.output
    assert run["run_id"] in silotune("runs", file, "--endpoint", api.url).output
    assert run["run_id"] in silotune("cancel", file, "--endpoint", api.url).output
    assert "1 recurring run removed" in silotune("unschedule", file, "--endpoint", api.url).output


def test_an_unfit_federation_is_refused_before_kubeflow_is_asked(tmp_path: Path) -> None:
    federation = load(tmp_path, lambda text: text.replace(COORDINATOR_IMAGE, "image:tag"))
    refused = silotune("submit", str(federation.file), "--endpoint", "http://127.0.0.1:9")
    assert isinstance(refused.exception, FederationError)
    assert "coordinator_image: must name an image by digest" in str(refused.exception)


@pytest.mark.parametrize(("cron", "zone", "told"), [("0 3 * *", "UTC", "got 4"), ("0 3 * * *", "Europe/Zurich", "timezone: ")])
def test_a_wrong_schedule_is_refused_before_kubeflow_is_asked(ward: Federation, cron: str, zone: str, told: str) -> None:
    refused = silotune("schedule", str(ward.file), "--cron", cron, "--timezone", zone, "--endpoint", "http://127.0.0.1:9")
    assert isinstance(refused.exception, FederationError)
    assert told in str(refused.exception)


def test_what_is_submitted_runs_the_named_images_only(ward: Federation, tmp_path: Path) -> None:
    submission.versioned(ward, 1, tmp_path / "package.yaml")
    spec = next(yaml.safe_load_all((tmp_path / "package.yaml").read_text()))
    images = {e["container"]["image"] for e in spec["deploymentSpec"]["executors"].values()}
    assert images == {COORDINATOR_IMAGE}, "with launcher: job no task of the pipeline sees a record"
