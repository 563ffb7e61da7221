"""The trial without a cluster: what it would apply is valid, and its scenarios hold on the fakes, with the silos' real work behind them."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from trial import kube, manifests, place, rehearsal, terms, waiting
from trial.place import LABEL, Place
from trial.trial import Trial

from silotune.components import keys
from silotune.components.federation import Federation
from silotune.pipelines.kubeflow.cluster_fit import require_fit

HERE = Path(__file__).parent
VERSIONS = ("1.30", "1.34")  # as in tests/k8s
Object = dict[str, Any]


def _load(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"rehearsed_{file.stem}", file)
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rules, admission, shared = (_load(HERE.parent / "k8s" / f"{name}.py") for name in ("rules", "admission", "conftest"))
scenarios, disruption, recurring, rights = (_load(HERE / f"test_{name}.py") for name in ("federation", "disruption", "schedule", "rights"))
here = Place("localhost:5001/silotune-silo@sha256:" + "a" * 64, "localhost:5001/silotune-coordinator@sha256:" + "b" * 64, identity="t0001")


# What is applied


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("keys")
    return {party: keys.new(folder, party) for party in ("coordinator", *here.silos)}


@pytest.fixture
def federation(public: dict[str, str], tmp_path: Path) -> Federation:
    file = tmp_path / "federation.yaml"
    file.write_text(terms.text(here, "example", public))
    return Federation.load(file)


build = shared.build  # the fixture of tests/k8s


@pytest.fixture
def objects(build: Any, federation: Federation, tmp_path: Path) -> list[Object]:
    return list(build(manifests.write(here, federation, tmp_path / "trial")))


def by_hand(federation: Federation) -> list[Object]:
    """What is made through the API."""
    parties = ("coordinator", *here.silos)
    private = dict.fromkeys(parties, b"a private key")
    credentials = {party: ("access", f"secret of {party}") for party in (*parties, "admin")}
    made = manifests.secrets_of(here, private, credentials, ("user", "password"))
    return [*made, *(o for pair in manifests.seeds(here, federation) for o in pair)]


def test_the_federation_of_every_scenario_can_run_on_a_cluster(public: dict[str, str], tmp_path: Path) -> None:
    north = here.silos[0]
    for changes in ({}, {"rounds": {"total": 1, "quorum": 3}, "steps": 300}, {"broken": (north,)}, {"memory": {north: "96Mi"}}):
        (tmp_path / "f.yaml").write_text(terms.text(here, "example", public, **changes))
        require_fit(Federation.load(tmp_path / "f.yaml"))


def test_everything_that_a_trial_applies_is_valid_and_keeps_to_the_rules(objects: list[Object], monkeypatch: pytest.MonkeyPatch) -> None:
    for version in VERSIONS:
        for o in objects:
            kubernetes_validate.validate(o, version, strict=True)
    monkeypatch.setattr(rules, "NEEDS_TOKEN", {here.ours})  # the launchers' account, under the trial's name
    assert rules.broken(objects) == []


def test_what_is_made_by_hand_is_valid_and_its_pods_are_confined(federation: Federation, objects: list[Object]) -> None:
    made = by_hand(federation)
    for version in VERSIONS:
        for o in made:
            kubernetes_validate.validate(o, version, strict=True)
    pods = [o for o in made if o["kind"] == "Pod"]
    assert len(pods) == 4
    assert [b for b in rules.broken([*pods, *objects]) if "/silotune-t0001-seed" in b] == []


def test_everything_bears_the_trials_label_and_lies_where_the_trial_may(federation: Federation, objects: list[Object]) -> None:
    for o in [*objects, *by_hand(federation)]:
        meta = o["metadata"]
        assert meta["labels"][LABEL] == here.identity, meta["name"]
        assert meta.get("namespace", here.store) in (*here.namespaces, here.tasks), meta
        unnamed = meta.get("namespace") == here.tasks and here.identity not in meta["name"]
        assert not unnamed or meta["name"] == manifests.STORE_SETTINGS, f"{meta['name']} may be somebody else's"
        if "namespace" not in meta:
            assert here.identity in meta["name"]


def test_a_namespace_is_made_before_what_lies_in_it(objects: list[Object]) -> None:
    """kubectl applies in this order."""
    made = [here.tasks]
    for o in objects:
        if o["kind"] == "Namespace":
            made.append(o["metadata"]["name"])
        assert o["metadata"].get("namespace", here.tasks) in made, o["metadata"]
    assert sorted(made) == sorted([here.tasks, *here.namespaces])


def test_the_store_is_reached_by_the_parties_of_this_trial_only(objects: list[Object]) -> None:
    (way_in,) = (o for o in objects if o["metadata"]["name"] == "store-from-parties")
    peers = way_in["spec"]["ingress"][0]["from"]
    assert [p["namespaceSelector"]["matchLabels"].get(LABEL) or p["podSelector"] for p in peers] == [
        here.identity, {"matchLabels": {"pipelines.kubeflow.org/v2_component": "true"}}, {"matchLabels": here.labels},
    ]  # fmt: skip
    for o in objects:
        if o["kind"] == "NetworkPolicy" and o["metadata"]["labels"].get("silotune.dev/flow") == "store":
            (rule,) = o["spec"]["egress"]
            assert rule["to"][0]["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": here.store}}
            assert rule["ports"] == [{"protocol": "TCP", "port": 8333}]
        if o["kind"] == "ConfigMap" and o["metadata"]["name"] == manifests.STORE_SETTINGS:
            assert o["data"]["AWS_ENDPOINT_URL"] == here.endpoint


def test_nothing_of_the_stand_ins_is_left(objects: list[Object]) -> None:
    text = yaml.safe_dump_all(objects)
    for word in ("store.example", "192.0.2.", "namespace: silotune-store\n", "silotune-silo\n  namespace: silotune-silo\n"):
        assert word not in text


def test_each_party_has_its_own_credentials_and_only_the_seed_may_make_the_bucket(federation: Federation) -> None:
    import base64
    import json

    found = {(o["metadata"]["namespace"], o["metadata"]["name"]): o["data"] for o in by_hand(federation) if o["kind"] == "Secret"}
    identities = json.loads(base64.b64decode(found[here.store, "seaweedfs-s3"]["s3.json"]))["identities"]
    assert {i["name"] for i in identities if i["actions"] == ["Admin"]} == {"admin"}
    used = [data["AWS_SECRET_ACCESS_KEY"] for data in found.values() if "AWS_SECRET_ACCESS_KEY" in data]
    assert len(set(used)) == len(used) == 5
    assert [list(found[here.namespace(s), "silotune-keys"]) for s in here.silos] == [[f"{s}.pem"] for s in here.silos]


# Where it goes


GIVEN = {"KUBECONFIG": "k", "KFP_ENDPOINT": "http://localhost:8888", "SILOTUNE_SILO_IMAGE": here.silo_image,
         "SILOTUNE_COORDINATOR_IMAGE": here.coordinator_image}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_not_set_is_a_reason_to_skip_with_what_to_do(name: str) -> None:
    assert place.missing(GIVEN) == ""
    why = place.missing({k: v for k, v in GIVEN.items() if k != name})
    assert why.startswith(f"{name}")
    assert ("A trial on kind" in why) or ("make images" in why and "docker inspect" in why)


def test_an_image_by_tag_is_none() -> None:
    assert "by digest" in place.missing(GIVEN | {"SILOTUNE_SILO_IMAGE": "localhost:5001/silotune-silo:0.1.0"})


def test_two_trials_share_no_name() -> None:
    one, other = (place.of(GIVEN) for _ in range(2))
    assert not {one.ours, one.launcher, *one.namespaces, *one.silos} & {other.ours, other.launcher, *other.namespaces, *other.silos}


# Taking away


KUBECONFIG = """
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "http://127.0.0.1:9"}}]
users: [{name: u, user: {token: t}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
current-context: c
"""


def test_only_what_bears_the_trials_label_is_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_text(KUBECONFIG)
    stand_in = tmp_path / "bin" / "kubectl"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/said\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    kube.Kube(here, tmp_path / "config").clean_up()
    said = [line.split() for line in (tmp_path / "said").read_text().splitlines()]
    assert len(said) == 2
    for words in said:
        assert words[words.index("--selector") + 1] == "silotune.dev/trial=t0001"
        assert "delete" in words
        assert "--all" not in words
        assert ("--namespace" in words) == ("namespaces" not in " ".join(words)), "what lies in Kubeflow's namespace is deleted there only"


def test_a_pod_of_somebody_else_is_not_evicted(tmp_path: Path) -> None:
    from types import SimpleNamespace

    (tmp_path / "config").write_text(KUBECONFIG)
    with pytest.raises(AssertionError, match="none of this trial's namespaces"):
        kube.Kube(here, tmp_path / "config").evict(SimpleNamespace(metadata=SimpleNamespace(name="p", namespace="production")))


# Waiting


def test_a_wait_ends_with_what_was_waited_for_and_how_it_stood() -> None:
    with pytest.raises(
        waiting.NotSeen, match=r"waited 0 s for the moon, in vain; the last look failed: OSError: clouds; how it stands: dark"
    ):
        waiting.wait_for("the moon", lambda: (_ for _ in ()).throw(OSError("clouds")), 0.05, seen=lambda: "dark", every=0.01)

    def gone() -> None:
        raise waiting.Hopeless("it has set")

    with pytest.raises(waiting.NotSeen, match="it will not come: it has set"):
        waiting.wait_for("the moon", gone, 60)


def test_an_api_that_refuses_is_not_asked_again() -> None:
    from kubernetes.client import ApiException

    asked = []

    def look() -> None:
        asked.append(1)
        raise ApiException(403, "Forbidden")

    with pytest.raises(ApiException):
        waiting.wait_for("a right", look, 60)
    assert len(asked) == 1


# The scenarios


def denials(job: Object, policy: Object, terms: Object) -> list[str]:
    return list(admission.refusals(policy, terms, job, user=here.launcher))


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    """On fakes; the base model is hardly warmed up."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    before = dict(manifests.SIZES)
    manifests.SIZES |= {"steps": 1, "passages": 100, "records": 8}
    try:
        with rehearsal.rehearsal(
            here, tmp_path_factory.mktemp("rehearsal"), "http://{}:{}".format(*server.get_host_and_port()), denials
        ) as (made, _):
            yield made
    finally:
        manifests.SIZES |= before
        server.stop()


def test_the_example_runs_to_its_end_on_the_fakes(trial: Trial) -> None:
    assert os.environ["AWS_ACCESS_KEY_ID"] == trial.credentials["coordinator"][0]
    scenarios.test_the_example_federation_runs_to_its_end(trial)


def test_what_a_launcher_cannot_have_admitted_is_denied_on_the_fakes(trial: Trial) -> None:
    federation = trial.begin("rights")
    rights.test_the_job_that_a_launcher_makes_is_admitted(trial, federation)
    (mark,) = (m for m in rights.test_the_launcher_cannot_have_another_job_admitted.pytestmark if m.name == "parametrize")
    for word, change in mark.args[1]:
        rights.test_the_launcher_cannot_have_another_job_admitted(trial, federation, word, change)
    rights.test_a_silo_cannot_be_given_anothers_work(trial, federation)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scenario",
    [
        scenarios.test_a_silo_that_exits_badly_is_missing_with_its_reason_and_the_round_goes_on,
        scenarios.test_a_silo_out_of_memory_is_told_as_that,
        scenarios.test_a_round_below_quorum_stays_open_and_is_completed_later_without_training_anew,
        disruption.test_a_training_on_a_drained_node_is_told_as_evicted_and_the_next_round_has_the_silo_again,
        recurring.test_a_recurring_run_goes_on_from_the_last_commit_and_ends_itself,
    ],
    ids=lambda s: s.__name__.removeprefix("test_"),
)
def test_a_scenario_holds_on_the_fakes(trial: Trial, scenario: Any) -> None:
    scenario(trial)
