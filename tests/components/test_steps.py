"""The six steps together, in one process: what a federation does when all goes well, and when it does not."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from silotune.components import best_global, keys
from silotune.components.aggregate import step as aggregate
from silotune.components.errors import FederationError, QuorumError, RefusedError, UnreachableError
from silotune.components.evaluate import step as evaluate
from silotune.components.federation import Federation
from silotune.components.initialize import step as initialize
from silotune.components.learning.tensor_file import open_tensor_file
from silotune.components.preprocess import step as preprocess
from silotune.components.protocol import Turn
from silotune.components.rounds import Rounds
from silotune.components.silo_job import silo_home, supervise
from silotune.components.steward.ledger import Ledger
from silotune.components.steward.policy import Policy
from silotune.components.train import step as train
from silotune.pipelines.simulate import Simulation

SILOS = ("east", "north", "south")


def begin(file: Path) -> str:
    return initialize.work(str(file), *(preprocess.work(str(file), s) for s in SILOS))


def edit(file: Path, **sections: Any) -> None:
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | sections))


def rounds_of(file: Path) -> Rounds:
    return Rounds.of(Federation.load(file))


def test_a_whole_federation(make_federation: Any) -> None:
    simulation = Simulation(make_federation())
    results = list(simulation.run())
    assert [r.round for r in results] == [1, 2]
    initial, first, second = simulation.results()
    assert second.loss < first.loss < initial.loss
    assert all(set(r.silos) == set(SILOS) and not r.missing for r in results)
    commits = list(simulation.rounds.commits())
    assert [c.previous for c in commits[1:]] == [c.digest for c in commits[:-1]]
    assert sum(c.weight for c in commits[1].contributions.values()) == pytest.approx(1)
    assert commits[1].contributions["east"].examples == 6


def test_a_round_is_the_weighted_mean_of_what_the_silos_sent(make_federation: Any, tmp_path: Path) -> None:
    simulation = Simulation(make_federation(rounds={"total": 1}, aggregation={"strategy": "fedavg", "weights": "tokens"}))
    list(simulation.run())
    rounds, commit = simulation.rounds, simulation.rounds.commit(1)
    fetched = {d: open_tensor_file(rounds.fetch_object(d, tmp_path / d)).read_all() for d in (commit.incoming or "", commit.outgoing)}
    deltas = {s: open_tensor_file(rounds.fetch_object(c.object, tmp_path / s, s)).read_all() for s, c in commit.contributions.items()}
    tokens = {s: c.tokens for s, c in commit.contributions.items()}
    assert len(set(tokens.values())) > 1
    for name, before in fetched[commit.incoming or ""].items():
        mean = np.average([deltas[s][name] for s in SILOS], axis=0, weights=[tokens[s] for s in SILOS])
        np.testing.assert_allclose(fetched[commit.outgoing][name], before + mean, rtol=1e-5, atol=1e-8)


def test_running_again_does_no_work_twice(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_federation()
    list(Simulation(file).run(rounds=1))
    turn = begin(file)
    assert turn == "round:2 attempt:2"  # round 2 was opened by the commit of round 1
    train.work(str(file), "east", turn)
    monkeypatch.setattr(train, "_train", lambda *_: pytest.fail("a silo that has delivered must not train again"))
    assert train.work(str(file), "east", turn) == "east ok"


def test_a_silo_whose_data_are_wrong_is_left_out_and_named(make_federation: Any) -> None:
    file = make_federation()
    (file.parent / "data" / "north" / "train.jsonl").write_text('{"prompt": "x"}\n')
    simulation = Simulation(file)
    results = list(simulation.run())
    assert [sorted(r.silos) for r in results] == [["east", "south"]] * 2
    assert results[0].missing == {"north": "failed: data or settings are wrong"}
    assert "line 1" in simulation.details["north"]
    assert "response" in simulation.details["north"]


def test_a_silo_whose_data_went_wrong_does_not_train_on_what_it_had(make_federation: Any) -> None:
    file = make_federation()
    list(Simulation(file).run(rounds=1))
    (file.parent / "data" / "north" / "train.jsonl").write_text("[]\n")
    (result,) = Simulation(file).run()
    assert sorted(result.silos) == ["east", "south"]
    assert result.missing["north"].startswith("failed: data or settings are wrong")


def test_later_boxes_tell_why_a_silos_records_are_not_ready(make_federation: Any) -> None:
    file = make_federation()
    records = file.parent / "data" / "south" / "train.jsonl"
    kept = records.read_text()
    records.unlink()
    assert supervise("preprocess", str(file), "south") == "south failed: data or settings are wrong"
    home = silo_home(Federation.load(file), Federation.load(file).silo("south"))
    with pytest.raises(FederationError, match="were not made ready at the start of this run") as caught:
        train.open_split(home, "train")
    assert caught.value.reason == "data or settings are wrong"
    records.write_text(kept)
    preprocess.work(str(file), "south")
    assert len(train.open_split(home, "train")) == 17
    (home / "data.json").unlink()
    with pytest.raises(FederationError) as caught:
        train.open_split(home, "train")
    assert caught.value.reason == "not preprocessed", "of an earlier run's trouble nothing is left"


def test_too_few_silos_with_data_is_an_error_of_the_federation(make_federation: Any) -> None:
    file = make_federation()
    for silo in ("north", "south"):
        (file.parent / "data" / silo / "train.jsonl").write_text("")
    with pytest.raises(FederationError, match=r"2 of 3 silos must deliver, 1 did:\n  north .*\n  south"):
        list(Simulation(file).run())


def test_below_quorum_the_round_stays_open_and_only_the_missing_are_asked(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_federation(rounds={"total": 1, "quorum": 3})
    turn = begin(file)
    statuses = [train.work(str(file), s, turn) for s in ("east", "north")]
    with pytest.raises(QuorumError, match=r"3 of 3 silos must deliver, 2 did:\n  south +failed: killed by signal 9\n"):
        aggregate.work(str(file), turn, *statuses, "south failed: killed by signal 9")
    latest = rounds_of(file).latest()
    assert latest is not None
    assert latest.round == 0
    again = begin(file)
    assert rounds_of(file).attempts(1)[-1].asked == ["south"]
    train.work(str(file), "south", again)
    assert aggregate.work(str(file), again, "east ok", "north ok", "south ok").startswith("done:")
    assert sorted(rounds_of(file).commit(1).contributions) == list(SILOS)


def test_a_late_joiner_finds_the_round_committed_and_goes_on(make_federation: Any) -> None:
    file = make_federation()
    turn = begin(file)
    statuses = [train.work(str(file), s, turn) for s in SILOS]
    first = aggregate.work(str(file), turn, *statuses)
    before = rounds_of(file).commit(1)
    again = aggregate.work(str(file), turn, *statuses)
    assert Turn.parse(first).round == Turn.parse(again).round == 2
    assert rounds_of(file).commit(1) == before


def test_nan_loss_is_reported_and_not_sent(make_federation: Any) -> None:
    file = make_federation(training={"steps": 40, "batch_size": 3, "learning_rate": 1e30}, rounds={"total": 1, "quorum": 3})
    turn = begin(file)
    with pytest.raises(Exception, match="non-finite loss at step") as caught:
        train.work(str(file), "east", turn)
    assert getattr(caught.value, "reason", "").startswith("non-finite loss at step")
    assert rounds_of(file).updates(1) == ({}, {})


def test_terms_amended_before_a_commit_close_the_open_round(make_federation: Any) -> None:
    file = make_federation()
    begin(file)
    edit(file, training={"steps": 1, "batch_size": 2, "learning_rate": 0.002})
    results = list(Simulation(file).run())
    commits = list(rounds_of(file).commits())
    assert [c.outcome for c in commits] == ["initialized", "amended", "aggregated", "aggregated"]
    assert commits[1].outgoing == commits[0].outgoing
    assert [r.round for r in results] == [2, 3]
    assert commits[2].contributions["east"].examples == 2


def test_a_round_trained_on_other_terms_is_refused_by_the_silo(make_federation: Any) -> None:
    file = make_federation()
    turn = begin(file)
    edit(file, training={"steps": 1, "batch_size": 2, "learning_rate": 0.002})
    with pytest.raises(RefusedError, match=r"terms differ .* training\.batch_size, training\.learning_rate, training\.steps"):
        train.work(str(file), "east", turn)


def test_another_base_needs_another_federation(make_federation: Any, tiny_gpt2: Path) -> None:
    file = make_federation()
    list(Simulation(file).run(rounds=1))
    edit(file, model={"base": str(tiny_gpt2), "lora": {"r": 2, "alpha": 4}})
    with pytest.raises(FederationError, match="at round 1 on other terms: base changed, which makes a new federation"):
        begin(file)


def test_free_edits_change_nothing(make_federation: Any) -> None:
    file = make_federation()
    list(Simulation(file).run(rounds=1))
    edit(file, rounds={"total": 3, "quorum": 1})
    assert begin(file) == "round:2 attempt:2"


def test_a_silo_with_another_base_is_refused(make_federation: Any) -> None:
    file = make_federation()
    statuses = [preprocess.work(str(file), s) for s in SILOS]
    statuses[1] = statuses[1].replace("base:", "base:0")
    initialize.work(str(file), *statuses)
    assert rounds_of(file).attempts(1)[0].missing == {"north": "refused: base model differs"}


def test_a_silo_whose_job_can_tell_no_digests_is_not_refused_for_that(make_federation: Any) -> None:
    file = make_federation()
    for silo in SILOS:
        preprocess.work(str(file), silo)
    turn = initialize.work(str(file), *(f"{silo} ok" for silo in SILOS))
    assert rounds_of(file).attempts(1)[0].missing == {}
    assert train.work(str(file), "east", turn) == "east ok"


def corrupt_update(file: Path, silo: str) -> None:
    rounds = rounds_of(file)
    manifest = rounds.update(1, silo)
    assert manifest is not None
    path = Path(rounds.store.url(rounds.object_key(manifest.object, silo)))
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.chmod(0o600)
    path.write_bytes(bytes(data))


def test_an_update_altered_in_the_store_is_refused_and_the_round_goes_on(make_federation: Any) -> None:
    file = make_federation(rounds={"total": 1, "quorum": 2})
    turn = begin(file)
    statuses = [train.work(str(file), s, turn) for s in SILOS]
    corrupt_update(file, "south")
    aggregate.work(str(file), turn, *statuses)
    commit = rounds_of(file).commit(1)
    assert sorted(commit.contributions) == ["east", "north"]
    assert commit.missing["south"].startswith("refused")


def test_rounds_move_through_the_data(make_federation: Any) -> None:
    simulation = Simulation(make_federation(rounds={"total": 3}))
    list(simulation.run())
    assert [simulation.rounds.commit(r).contributions["east"].cursor for r in (1, 2, 3)] == [6, 12, 18]
    plans = [simulation.rounds.plan(r) for r in (1, 2, 3)]
    assert [p.participants["east"].cursor for p in plans if p] == [0, 6, 12]


def test_it_stops_when_it_has_converged(make_federation: Any) -> None:
    until = {"metric": "loss", "patience": 2, "min_delta": 100.0}  # no round improves by that much
    file = make_federation(rounds={"total": 9, "until": until})
    simulation = Simulation(file)
    # round 0 is the best; 1 and 2 are no better; that is known once round 3 has evaluated 2
    assert [r.round for r in simulation.run()] == [1, 2, 3]
    assert begin(file) == "done:converged at round 3"
    assert train.run(str(file), "east", "done:converged at round 3") == "east ok: nothing to do"
    assert aggregate.run(str(file), "done:converged at round 3", []) == "done:converged at round 3"


def test_the_rate_falls_over_rounds_and_the_plan_says_so(make_federation: Any) -> None:
    training = {"steps": 1, "batch_size": 2, "learning_rate": 0.01, "round_schedule": "linear"}
    simulation = Simulation(make_federation(rounds={"total": 4}, training=training))
    list(simulation.run())
    plans = [simulation.rounds.plan(r) for r in (1, 2, 3, 4)]
    assert [p.learning_rate for p in plans if p] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_without_a_valid_file_a_part_of_train_is_set_aside(make_federation: Any) -> None:
    file = make_federation()
    terms = yaml.safe_load(file.read_text())
    for silo in terms["silos"]:
        del silo["valid"]
    edit(file, silos=terms["silos"], data={"max_length": 64, "valid_fraction": 0.2})
    preprocess.work(str(file), "south")
    federation = Federation.load(file)
    home = silo_home(federation, federation.silo("south"))
    splits = {s: train.open_split(home, s) for s in ("train", "valid")}
    texts = {s: {shard.example(i)[0].tobytes() for i in range(len(shard))} for s, shard in splits.items()}
    assert {s: len(t) for s, t in texts.items()} == {"train": 14, "valid": 3}
    assert not texts["train"] & texts["valid"]


def test_a_silo_names_its_columns_its_own_way(make_federation: Any) -> None:
    file = make_federation(rounds={"total": 1}, data={"max_length": 64, "fields": {"prompt": "frage"}})
    plain = make_federation(file.parent / "plain", rounds={"total": 1})
    for path in file.parent.glob("data/*/*.jsonl"):
        named = "question" if path.parent.name == "south" else "frage"
        path.write_text(
            path.read_text().replace('"prompt"', f'"{named}"').replace('"response"', '"answer"' if named == "question" else '"response"')
        )
    silos = yaml.safe_load(file.read_text())["silos"]
    edit(file, silos=[s | ({"fields": {"prompt": "question", "response": "answer"}} if s["id"] == "south" else {}) for s in silos])
    for where in (file, plain):
        list(Simulation(where).run())
    ours, theirs = (rounds_of(where).commit(1) for where in (file, plain))
    assert ours.outgoing == theirs.outgoing
    pooled = Simulation(file).centralised(rounds=1, steps=1)
    list(pooled.run())
    assert pooled.rounds.commit(1).outcome == "aggregated"


def test_records_that_change_between_runs_leave_the_best_round_to_be_found(make_federation: Any) -> None:
    """All valid and test records become others after round 2, of which training scores no global before it on the new ones."""
    file = make_federation()
    simulation = Simulation(file)
    list(simulation.run())
    simulation.test()
    assert best_global.best_round(simulation.rounds) == 2
    for path in (*file.parent.glob("data/*/valid.jsonl"), *file.parent.glob("data/*/test.jsonl")):
        path.write_text(path.read_text().replace("what is", "who had"))
    edit(file, rounds={"total": 4, "quorum": 2})
    list(simulation.run())
    assert [n for n, _ in best_global.judged(simulation.rounds)] == [0, 1, 2, 2, 3, 4], "round 2 joins old and new"
    assert best_global.best_round(simulation.rounds) == 4
    simulation.test()
    commits = list(simulation.rounds.commits())
    for split in ("valid", "test"):
        base, best = (simulation.rounds.evaluations(commits[n].outgoing, split) for n in (0, 4))
        assert sorted(best_global.same_records(base, best)) == list(SILOS), "else base and best could not be compared"


def test_test_is_read_by_evaluate_only_and_once(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_federation(rounds={"total": 1})
    simulation = Simulation(file)
    list(simulation.run())
    commits = list(simulation.rounds.commits())
    assert all(not simulation.rounds.evaluations(c.outgoing, "test") for c in commits)
    table = simulation.test()
    assert table["last"]["all"] < table["base"]["all"]
    monkeypatch.setattr(evaluate, "evaluate_split", lambda *_: pytest.fail("scored twice"))
    assert simulation.test() == table


def test_the_export_loads_as_a_peft_folder_and_is_the_global(make_federation: Any, tmp_path: Path) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    file = make_federation()
    simulation = Simulation(file)
    list(simulation.run())
    simulation.test()
    where = simulation.export()
    model = AutoPeftModelForCausalLM.from_pretrained(where)
    tokenizer = AutoTokenizer.from_pretrained(where)
    ids = torch.tensor([tokenizer("what is case 3?")["input_ids"]])
    ours, _ = simulation.model()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, ours(ids).logits)
        assert not torch.allclose(model(ids).logits, simulation.model(0)[0](ids).logits)
    card = (Path(where) / "README.md").read_text()
    best = simulation.rounds.commit(best_global.best_round(simulation.rounds))
    assert best.digest in card
    assert best.outgoing in card
    assert "east, north, south" in card
    assert "| privacy | none for single records, updates seen by the coordinator |" in card
    asked = card.split("```python\n")[1].split("```")[0].replace('"."', repr(str(where)))
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        exec(asked, {})  # what a card says must work as it stands there
    assert "Question: ..." in told.getvalue()


@pytest.mark.parametrize("changes", [{"model": {"method": "full"}}, {"export": {"merge": True}}], ids=["full", "merged"])
def test_the_export_loads_as_a_full_model(make_federation: Any, tiny_gpt2: Path, changes: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = {"base": str(tiny_gpt2)} | changes.pop("model", {"lora": {"r": 2, "alpha": 4}})
    training = {"steps": 2, "batch_size": 3, "learning_rate": 0.001}
    simulation = Simulation(make_federation(model=model, training=training, rounds={"total": 1}, **changes))
    list(simulation.run())
    loaded = AutoModelForCausalLM.from_pretrained(simulation.export())
    ids = torch.arange(10).reshape(1, 10)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, simulation.model()[0].eval()(ids).logits, atol=2e-5, rtol=1e-4)


def test_a_silo_trains_on_its_own_terms(make_federation: Any) -> None:
    file = make_federation()
    terms = yaml.safe_load(file.read_text())
    terms["silos"][0]["training"] = {"steps": 5, "batch_size": 1}
    edit(file, silos=terms["silos"])
    simulation = Simulation(file)
    list(simulation.run(rounds=1))
    parts = simulation.rounds.commit(1).contributions
    assert (parts["east"].steps, parts["east"].examples) == (5, 5)
    assert (parts["north"].steps, parts["north"].examples) == (2, 6)


def test_alone_and_centralised_are_federations_of_one(make_federation: Any) -> None:
    simulation = Simulation(make_federation(rounds={"total": 1}))
    list(simulation.run())
    alone = simulation.alone("north")
    list(alone.run())
    assert alone.rounds.commit(1).contributions.keys() == {"north"}
    central = simulation.centralised(batch_size=2)
    list(central.run())
    assert central.rounds.commit(1).contributions["pooled"].steps == 6
    assert central.rounds.commit(1).contributions["pooled"].examples == 12
    scores = simulation.scores(of=alone)
    assert set(scores) == set(SILOS)
    assert scores["south"].loss != pytest.approx(simulation.scores()["south"].loss, abs=1e-9)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_told_as_such(make_federation: Any, tmp_path: Path) -> None:
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        file = make_federation(storage={"root": str(small / "store")}, rounds={"total": 2})
        with pytest.raises(UnreachableError, match="no room"):
            list(Simulation(file).run())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_an_unreachable_store_is_worth_retrying(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    file = make_federation(storage={"root": "s3://bucket/prefix"})
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:1"):
        begin(file)


def test_one_federation_over_s3(make_federation: Any, s3: Any) -> None:
    file = make_federation(storage={"root": f"s3://{s3._bucket}/{s3._prefix}"}, rounds={"total": 1})
    on_disk = make_federation(file.parent / "disk", rounds={"total": 1})
    remote, local = Simulation(file), Simulation(on_disk)
    assert [r.global_digest for r in remote.run()] == [r.global_digest for r in local.run()]
    assert str(remote.export()).startswith("s3://")
    assert json.loads(s3.get("tiny/rounds/00001/commit.json"))["outcome"] == "aggregated"


def test_a_silos_records_and_ledger_lie_in_an_s3_of_its_own(make_federation: Any, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is elsewhere, and what it is reached with would not open the silo's bucket."""
    file = make_federation()
    raw, own = yaml.safe_load(file.read_text()), f"s3://{s3._bucket}/{s3._prefix.rstrip('/')}"
    for split in ("train", "valid", "test"):
        s3.put_file(f"{split}.jsonl", Path(raw["silos"][1][split]))
        raw["silos"][1][split] = f"{own}/{split}.jsonl"
    file.write_text(yaml.safe_dump(raw))
    for name in ("ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"SILO_AWS_{name}", os.environ[f"AWS_{name}"])
        monkeypatch.setenv(f"AWS_{name}", "http://127.0.0.1:9" if name == "ENDPOINT_URL" else "of-the-store")
    federation = Federation.load(file)
    keys.ensure(federation)
    assert preprocess.work(str(file), "north").startswith("north ok: base:")
    policy = Policy.model_validate({"dataset": "north", "ledger": {"at": own}})
    assert Ledger.of(federation, "north", policy).entries() == []
    monkeypatch.delenv("SILO_AWS_ENDPOINT_URL")
    with pytest.raises(UnreachableError):
        Ledger.of(federation, "north", policy).entries()
