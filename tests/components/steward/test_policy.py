"""The policy: each rule by itself, every error at once, and every silo's box insists on it before it reads a record."""

from __future__ import annotations

import math
from datetime import date
from pathlib import Path
from typing import Any

import courses
import pytest
import yaml

from silotune.components import base_model, keys
from silotune.components.errors import FederationError, RefusedError
from silotune.components.evaluate import step as evaluate
from silotune.components.federation import Federation
from silotune.components.initialize import step as initialize
from silotune.components.learning import records
from silotune.components.learning.update import read_header
from silotune.components.preprocess import step as preprocess
from silotune.components.rounds import Rounds
from silotune.components.silo_job import supervise
from silotune.components.steward.admission import Asked, require, review
from silotune.components.steward.policy import Policy, counted_by
from silotune.components.terms.privacy import Privacy
from silotune.components.train import step as train
from silotune.pipelines.simulate import Simulation

TODAY = date(2027, 3, 1)
KEY = "ed25519:" + "A" * 43 + "="
IMAGE = "registry.example/silotune-silo@sha256:" + "1" * 64


def asked(tmp_path: Path, **sections: Any) -> Asked:
    federation = courses.load(tmp_path, **sections)
    keys.ensure(federation)
    return Asked("north", federation.agreement("b" * 64, "t" * 64), image=IMAGE, update_bytes=4096)


def coordinator(a: Asked) -> str:
    return a.agreement.keys["coordinator"][0].public


DP = {"privacy": {"epsilon": 3.0, "delta": 1e-6}}
SECURE = {"privacy": {"secure_aggregation": {}}, "aggregation": {"clip": {"norm": 1.0}}}

# (rule, what the policy says, what the federation asks for that passes, and that does not); "own": filled in from what is asked
RULES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("base model", {"bases": ["b" * 64]}, {}, {"base": "c" * 64}),
    ("image", {"images": ["sha256:" + "1" * 64]}, {}, {"image": IMAGE[:-1] + "2"}),
    ("image", {"images": ["sha256:" + "1" * 64]}, {}, {"image": None}),
    ("strategy", {"strategies": ["fedavg", "ffa"]}, {"aggregation": {"strategy": "fedavg"}}, {"aggregation": {"strategy": "rolora"}}),
    ("codec", {"codecs": ["float32"]}, {}, {"communication": {"codec": "bfloat16"}}),
    ("privacy", {"privacy": {"required": True}}, DP, {}),
    ("privacy", {"privacy": {"epsilon": {"month": 5.0}}}, DP, {}),
    ("unit", {"privacy": {"required": True, "unit": "person"}}, {"privacy": {"epsilon": 3.0, "unit": "person", "person_field": "patient"}}, DP),
    ("epsilon", {"privacy": {"epsilon": {"run": 3.0}}}, DP, {"privacy": {"epsilon": 3.1, "delta": 1e-6}}),
    ("epsilon", {"privacy": {"epsilon": {"run": 9.0, "total": 3.0}}}, DP, {"privacy": {"epsilon": 3.1, "delta": 1e-6}}),
    ("delta", {"privacy": {"epsilon": {"run": 3.0, "delta": 1e-6}}}, DP, {"privacy": {"epsilon": 3.0, "delta": 2e-6}}),
    ("secure aggregation", {"secure_aggregation": True}, SECURE, {}),
    ("participants", {"min_participants": 3}, {}, {"silos": ("north", "south")}),
    ("participants", {"min_participants": 3}, {}, {"participants": 2}),
    ("update size", {"max_update_bytes": 4096}, {}, {"update_bytes": 4097}),
    ("runs", {"max_runs": 2}, {"runs": frozenset({"fed", "old"})}, {"runs": frozenset({"old", "older"})}),
    ("expired", {"expires": date(2027, 3, 2)}, {}, {"today": date(2027, 3, 2)}),
]  # fmt: skip


def made(tmp_path: Path, changes: dict[str, Any]) -> tuple[Asked, date]:
    facts = {k: changes[k] for k in ("image", "participants", "update_bytes", "runs") if k in changes}
    sections = {k: v for k, v in changes.items() if k not in (*facts, "base", "today")}
    found = asked(tmp_path, **sections)
    agreement = found.agreement.model_copy(update={"base": changes.get("base", found.agreement.base)})
    return Asked(**(vars(found) | facts | {"agreement": agreement})), changes.get("today", TODAY)


@pytest.mark.parametrize(("rule", "says", "good", "bad"), RULES)
def test_each_rule(tmp_path: Path, rule: str, says: dict[str, Any], good: dict[str, Any], bad: dict[str, Any]) -> None:
    policy = Policy(dataset="notes", **says)
    for changes, passed in ((good, True), (bad, False)):
        verdicts = {v.rule: v for v in review(policy, *made(tmp_path, changes))}
        assert verdicts[rule].passed is passed
        assert all(v.passed for name, v in verdicts.items() if name != rule)
    what, today = made(tmp_path, bad)
    if today == TODAY:
        with pytest.raises(RefusedError, match="its policy allows") as refused:
            require(policy, what)
        assert refused.value.reason == f"policy: {rule}"
        assert refused.value.exit_code == 4
        require(policy, made(tmp_path, good)[0])


def test_the_coordinators_keys_must_all_be_known(tmp_path: Path) -> None:
    what = asked(tmp_path)
    require(Policy(dataset="notes", coordinators=[coordinator(what), KEY]), what)
    for odd in (what, asked(tmp_path, security={"signing": False})):
        with pytest.raises(RefusedError) as refused:
            require(Policy(dataset="notes", coordinators=[KEY]), odd)
        assert refused.value.reason == "policy: coordinator key"


def test_without_a_policy_or_rules_all_is_allowed(tmp_path: Path) -> None:
    require(None, asked(tmp_path))
    assert review(Policy(dataset="notes"), asked(tmp_path)) == []


def test_what_cannot_be_known_yet_is_neither_passed_nor_refused(tmp_path: Path) -> None:
    what = Asked("north", asked(tmp_path).agreement)
    assert [v.passed for v in review(Policy(dataset="notes", max_update_bytes=5), what)] == [None]
    require(Policy(dataset="notes", max_update_bytes=5), what)


def test_privacy_is_required_where_it_is_limited_unless_the_steward_says_otherwise() -> None:
    assert not Policy(dataset="d").private
    assert Policy(dataset="d", privacy={"epsilon": {"total": 8.0}}).private
    assert not Policy(dataset="d", privacy={"required": False, "epsilon": {"total": 8.0}}).private


# The file


def written(folder: Path, text: str) -> Path:
    (folder / "policy.yaml").write_text(text)
    return folder / "policy.yaml"


def test_every_error_is_told_at_once(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        """
        dataset: Discharge Letters
        bases: [abc]
        images: [registry/silo:latest]
        strategies: [fedavg, best]
        codec: [float32]
        privacy: {epsilon: {total: -1}}
        report: [steps, diagnoses]
        expires: soon
        ledger: {at: ./books}
        """,
    )
    with pytest.raises(FederationError) as refused:
        Policy.load(file)
    lines = str(refused.value).splitlines()
    assert lines[0] == "policy.yaml: 9 problems"
    told = "\n".join(lines)
    for words in (
        "dataset: must be lower-case letters, digits and inner dashes, 64 at most, got 'Discharge Letters'",
        "bases[0]: must be a SHA-256 digest",
        "images[0]: must be sha256: and 64 hexadecimal digits",
        "strategies: must be of fedavg,",
        "not best",
        "codec: unknown key; did you mean 'codecs'?",
        "privacy.epsilon.total: must be greater than 0, got -1",
        "report: must be of",
        "not diagnoses",
        "expires: ",
        "ledger.at: must be an absolute path or s3://bucket/prefix",
    ):
        assert words in told
    assert refused.value.reason == "policy is wrong"


def test_a_date_is_written_as_yaml_has_it(tmp_path: Path) -> None:
    policy = Policy.load(written(tmp_path, "dataset: notes\nexpires: 2027-12-31\nledger: {since: 2026-01-01}\n"))
    assert policy.expires == date(2027, 12, 31)
    assert policy.ledger.since == date(2026, 1, 1)


@pytest.mark.parametrize(
    ("text", "words"), [(None, "no such policy file"), ("- a\n", "must hold keys such as dataset"), ("a: [", "not valid YAML")]
)
def test_a_file_that_is_no_policy(tmp_path: Path, text: str | None, words: str) -> None:
    file = written(tmp_path, text) if text else tmp_path / "policy.yaml"
    with pytest.raises(FederationError, match=words):
        Policy.load(file)


def test_where_it_lies(make_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.load(make_federation())
    assert Policy.of(federation, "north") is None
    storage = Path(federation.silo("north").storage)
    storage.mkdir(parents=True)
    written(storage, "dataset: in-storage\n")
    assert Policy.of(federation, "north").dataset == "in-storage"  # type: ignore[union-attr]
    assert Policy.of(federation, "south") is None
    with monkeypatch.context() as job:
        job.setattr("silotune.components.steward.policy.MOUNT", federation.file.parent)
        assert Policy.of(federation, "north").dataset == "in-storage"  # type: ignore[union-attr]
        written(federation.file.parent, "dataset: in-config-map\n")
        assert Policy.of(federation, "north").dataset == "in-config-map"  # type: ignore[union-attr]
    assert Policy.of(federation, "south") is None  # beside the file it counts in a Job only
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    monkeypatch.setenv("SILOTUNE_POLICY", str(mounted))
    with pytest.raises(FederationError, match="no such policy file"):  # one that was to be there, and is not, is no leave
        Policy.of(federation, "north")
    written(mounted, "dataset: in-folder\n")
    assert Policy.of(federation, "north").dataset == "in-folder"  # type: ignore[union-attr]
    monkeypatch.setenv("SILOTUNE_POLICY", str(mounted / "policy.yaml"))
    assert Policy.of(federation, "north").dataset == "in-folder"  # type: ignore[union-attr]


def test_a_link_to_nothing_is_no_leave(make_federation: Any) -> None:
    federation = Federation.load(make_federation())
    storage = Path(federation.silo("north").storage)
    storage.mkdir(parents=True)
    (storage / "policy.yaml").symlink_to(storage / "..data" / "policy.yaml")  # a volume that is not filled
    with pytest.raises(FederationError, match="no such policy file") as wrong:
        Policy.of(federation, "north")
    assert wrong.value.reason == "policy is wrong"


def test_a_policy_that_anybody_may_write_is_nobodys_word(make_federation: Any) -> None:
    federation = Federation.load(make_federation())
    put(federation.file, "north")
    file = Path(federation.silo("north").storage) / "policy.yaml"
    file.chmod(0o666)
    with pytest.raises(FederationError, match="chmod o-w") as wrong:
        Policy.of(federation, "north")
    assert wrong.value.reason == "policy is wrong"
    file.chmod(0o664)
    assert Policy.of(federation, "north")


def test_what_no_accountant_can_tell_is_no_limit(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match=r"privacy.epsilon.delta: must be greater than or equal to"):
        Policy.load(written(tmp_path, "dataset: notes\nprivacy: {epsilon: {total: 3.0, delta: 1e-20}}\n"))


@pytest.mark.parametrize(
    ("says", "counted"),
    [
        (None, (1e-3, "person")),
        ({"privacy": {"required": True}}, (1e-3, "person")),  # the policy limits nothing: as the federation promises
        ({"privacy": {"unit": "record", "epsilon": {"delta": 1e-4}}}, (1e-4, "record")),
        ({"privacy": {"epsilon": {"total": 3.0}}}, (1e-5, "record")),
    ],
)
def test_budgets_are_counted_as_the_policy_says_or_the_federation_promises(says: Any, counted: tuple[float, str]) -> None:
    policy = None if says is None else Policy(dataset="d", **says)
    limits, unit = counted_by(policy, Privacy(epsilon=3.0, delta=1e-3, unit="person", person_field="p"))
    assert (limits.delta, unit) == counted


# The boxes


def put(file: Path, silo: str, **terms: Any) -> None:
    storage = Path(Federation.load(file).silo(silo).storage)
    storage.mkdir(parents=True, exist_ok=True)
    (storage / "policy.yaml").write_text(yaml.safe_dump({"dataset": f"{silo}-notes"} | terms))


def read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in records.READERS:
        monkeypatch.setitem(records.READERS, name, lambda file: pytest.fail(f"{file} was read"))


def test_preprocess_refuses_before_it_reads_a_record(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_federation(aggregation={"strategy": "fedavg"})
    put(file, "north", strategies=["ffa"])
    read_nothing(monkeypatch)
    with pytest.raises(RefusedError, match="its policy allows ffa as strategy, the federation asks for fedavg") as refused:
        preprocess.work(str(file), "north")
    assert refused.value.reason == "policy: strategy"
    assert not list(Path(Federation.load(file).silo("north").storage).glob("tiny/shards"))


def test_a_supervised_box_says_the_rule_and_no_more(make_federation: Any) -> None:
    file = make_federation()
    put(file, "north", codecs=["bfloat16"])
    assert supervise("preprocess", str(file), "north") == "north refused: policy: codec"


def test_train_and_evaluate_refuse_as_well_and_the_others_go_on(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_federation(rounds={"total": 3, "quorum": 2})
    simulation = Simulation(file)
    (first,) = simulation.run(rounds=1)
    assert sorted(first.silos) == ["east", "north", "south"]
    put(file, "north", bases=["0" * 64])  # the steward has changed their mind
    turn = "round:2 attempt:1"
    for work in (lambda: train.work(str(file), "north", turn), lambda: evaluate.work(str(file), "north", "")):
        with monkeypatch.context() as patched:
            patched.setattr(train, "learn", lambda *_: pytest.fail("was trained"))
            with pytest.raises(RefusedError) as refused:
                work()
            assert refused.value.reason == "policy: base model"
    (second,) = Simulation(file).run(rounds=1)
    assert sorted(second.silos) == ["east", "south"]
    assert second.missing == {"north": "refused: policy: base model"}


@pytest.mark.parametrize(
    ("says", "rule"), [({"max_update_bytes": 1000}, "update size"), ({"min_participants": 4}, "participants"), ({"max_runs": 1}, "runs")]
)
def test_what_only_a_plan_or_the_ledger_shows_is_refused_by_train(make_federation: Any, says: dict[str, Any], rule: str) -> None:
    file = make_federation()
    if rule == "runs":
        put(file, "east", **says)
        list(Simulation(file).run(rounds=1))  # the one run that is allowed
        file.write_text(file.read_text().replace("name: tiny", "name: tiny-again"))
    put(file, "east", **says)
    (result,) = Simulation(file).run(rounds=1)
    assert result.missing == {"east": f"refused: policy: {rule}"}


def test_reports_and_scores_hold_what_the_policy_lets_out(make_federation: Any) -> None:
    file = make_federation(rounds={"total": 1, "quorum": 2})
    put(file, "north", report=["steps", "seconds"], scores=False)
    simulation = Simulation(file)
    list(simulation.run())
    simulation.test()
    rounds: Rounds = simulation.rounds
    reports = rounds.reports(1, 1)
    assert set(reports["north"].numbers) == {"steps", "seconds"}
    assert {"loss", "examples"} < set(reports["south"].numbers)
    scored = {k.split("/")[3] for k in rounds.store.list("tiny/evaluations/")}
    assert scored == {"east", "south"}


def test_a_score_over_fewer_records_than_the_policy_wants_is_not_made(make_federation: Any) -> None:
    """Of all valid and test records, and of those alone that the terms choose: one, in the extreme."""
    file = make_federation(rounds={"total": 1, "quorum": 2}, evaluation={"max_examples": 2})
    put(file, "north", min_scored=3)
    put(file, "south", min_scored=2)
    simulation = Simulation(file)
    (result,) = simulation.run()
    simulation.test()
    scored = {(k.split("/")[3], k.split("/")[4].split("-")[0]) for k in simulation.rounds.store.list("tiny/evaluations/")}
    assert scored == {("east", "valid"), ("east", "test"), ("south", "valid"), ("south", "test"), ("north", "test")}
    assert set(result.silos) == {"east", "south"}


def test_a_federation_in_which_nobody_tells_a_score_goes_on(make_federation: Any) -> None:
    file = make_federation(rounds={"total": 2, "quorum": 2})
    for silo in ("east", "north", "south"):
        put(file, silo, scores=False)
    results = list(Simulation(file).run())
    assert [math.isnan(r.loss) for r in results] == [True, True]
    assert not results[1].missing


def test_a_training_loss_that_the_policy_keeps_stands_nowhere(make_federation: Any, tmp_path: Path) -> None:
    file = make_federation(rounds={"total": 1, "quorum": 2})
    put(file, "north", report=["steps"])
    simulation = Simulation(file)
    list(simulation.run())
    rounds, told = simulation.rounds, {}
    for silo in ("north", "south"):
        manifest = rounds.update(1, silo)
        assert manifest
        told[silo] = manifest.loss, read_header(rounds.fetch_object(manifest.object, tmp_path / "update", silo)).loss
    assert told["north"] == (None, None)
    assert None not in told["south"]


def test_a_policy_that_changed_while_a_round_was_trained_holds_before_anything_leaves(
    make_federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_federation(rounds={"total": 1, "quorum": 2})
    put(file, "north")
    learn = train.learn

    def and_then(order: Any, *rest: Any) -> Any:
        if order.silo == "north":
            put(file, "north", expires=date(2020, 1, 1))
        return learn(order, *rest)

    monkeypatch.setattr(train, "learn", and_then)
    simulation = Simulation(file)
    (result,) = simulation.run()
    assert result.missing == {"north": "refused: policy: expired"}
    assert list(simulation.rounds.store.list("tiny/contributions/north/")) == []


def test_an_update_that_is_asked_for_once_more_asks_the_policy_once_more(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_federation(rounds={"total": 1, "quorum": 2})
    put(file, "north")
    simulation = Simulation(file)
    turn = simulation._begin().text
    assert train.work(str(file), "north", turn) == "north ok"
    manifest = simulation.rounds.update(1, "north")
    assert manifest
    simulation.rounds.store.delete(simulation.rounds.object_key(manifest.object, "north"))
    simulation.rounds.refuse_update(1, "north", "object corrupt", resend=True, manifest=manifest.digest)
    again = Simulation(file)._begin().text
    put(file, "north", expires=date(2020, 1, 1))
    monkeypatch.setattr(train, "learn", lambda *_: pytest.fail("was trained"))
    with pytest.raises(RefusedError, match="its policy ended on 2020-01-01") as refused:
        train.work(str(file), "north", again)
    assert refused.value.reason == "policy: expired"
    assert list(simulation.rounds.store.list("tiny/contributions/north/")) == []


def test_where_a_policy_has_held_its_absence_allows_nothing(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_federation()
    put(file, "north")
    assert preprocess.work(str(file), "north").startswith("north ok")
    storage = Path(Federation.load(file).silo("north").storage)
    (storage / "policy.yaml").unlink()
    read_nothing(monkeypatch)
    with pytest.raises(RefusedError, match="its policy, of data set 'north-notes', is gone") as refused:
        preprocess.work(str(file), "north")
    assert refused.value.reason == "policy: gone"
    assert supervise("preprocess", str(file), "north") == "north refused: policy: gone"
    monkeypatch.undo()
    (storage / "policy.held").unlink()  # the steward's own word
    assert preprocess.work(str(file), "north").startswith("north ok")


def test_a_baseline_without_privacy_is_refused_where_a_policy_wants_it(make_federation: Any) -> None:
    file = make_federation(privacy={"epsilon": 8.0, "delta": 1e-3}, training={"steps": 1, "batch_size": 2})
    put(file, "south", privacy={"epsilon": {"total": 8.0, "delta": 1e-3}})
    simulation = Simulation(file)
    with pytest.raises(
        RefusedError, match="silo 'south': its policy lets its records be trained on with differential privacy only"
    ) as refused:
        simulation.unprotected()
    assert refused.value.reason == "policy: privacy"
    put(file, "south", privacy={"required": False, "epsilon": {"total": 8.0, "delta": 1e-3}})
    assert not simulation.unprotected().federation.privacy.of_records


def test_a_base_is_named_by_the_digest_that_check_prints(make_federation: Any, tmp_path: Path) -> None:
    file = make_federation()
    base = base_model.resolve(Federation.load(file).model.base, tmp_path / "cache")
    put(file, "north", bases=[base.digest])
    assert preprocess.work(str(file), "north").startswith("north ok")


def test_a_policy_that_is_wrong_stops_its_silo_only(make_federation: Any) -> None:
    file = make_federation()
    put(file, "north", dataset="No Name")
    with pytest.raises(FederationError, match=r"policy.yaml: 1 problem") as wrong:
        preprocess.work(str(file), "north")
    statuses = [preprocess.work(str(file), s) for s in ("east", "south")] + [f"north failed: {wrong.value.reason}"]
    assert initialize.work(str(file), *statuses) == "round:1 attempt:1"
