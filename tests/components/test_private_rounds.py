"""Federations whose silos train privately: what they commit, what they tell, and what nobody can reckon from what is public."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from silotune.components.aggregate import step as aggregate
from silotune.components.errors import FederationError, RefusedError
from silotune.components.federation import Federation, canonical_json
from silotune.components.initialize import step as initialize
from silotune.components.learning.batches import seed_of
from silotune.components.learning.privacy.accounting import epsilon, round_mechanism
from silotune.components.learning.privacy.noise import Noise
from silotune.components.learning.privacy.own_secret import FILE, derive, own_secret
from silotune.components.learning.privacy.sampling import sample
from silotune.components.learning.tensor_file import open_tensor_file
from silotune.components.preprocess import step as preprocess
from silotune.components.rounds import Rounds
from silotune.components.silo_job import silo_home
from silotune.components.tracking import metrics
from silotune.components.train import step as train
from silotune.pipelines.simulate import Simulation

SILOS = ("east", "north", "south")
UNITS = {"east": 11, "north": 14, "south": 17}
PRIVATE = {"epsilon": 8.0, "delta": 1e-3}


def begin(file: Path) -> str:
    return initialize.work(str(file), *(preprocess.work(str(file), s) for s in SILOS))


def edit(file: Path, **sections: Any) -> None:
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | sections))


@pytest.mark.parametrize(
    ("strategy", "clipping"),
    [("fedavg", "flat"), ("product", "per-layer"), ("ffa", "adaptive"), ("rolora", "flat"), ("fed-sb", "automatic"), ("fedprox", "flat")],
)
def test_a_private_federation(make_federation: Any, strategy: str, clipping: str) -> None:
    simulation = Simulation(make_federation(privacy=PRIVATE | {"clipping": clipping}, aggregation={"strategy": strategy}))
    results = list(simulation.run())
    assert [r.round for r in results] == [1, 2]
    assert all(set(r.silos) == set(SILOS) and np.isfinite(r.loss) for r in results)
    rounds, federation = simulation.rounds, simulation.federation
    found = {name: value for (name, step), (value, _) in metrics(rounds, complete=True) if step == 2}
    for silo in SILOS:
        second = rounds.commit(2).contributions[silo]
        first, last = (rounds.reports(n, rounds.commit(n).attempt)[silo].numbers for n in (1, 2))
        mechanism = round_mechanism(federation.privacy_agreed, federation.training, UNITS[silo])
        assert first["epsilon"] == pytest.approx(epsilon([mechanism], 1e-3), abs=1e-6)
        assert first["epsilon"] < last["epsilon"] <= 8.0
        assert last["epsilon"] > 7.5
        assert (second.examples, second.tokens, second.steps, second.cursor) == (6, 6, 2, 12)
        assert rounds.update(2, silo).loss is None
        assert last["epsilon"] == found[f"silo/{silo}/epsilon"]
        assert last["delta"] == 1e-3
        assert "loss" not in last
        assert f"silo/{silo}/tokens" not in found
        beat = json.loads((silo_home(federation, federation.silo(silo)) / "heartbeat.json").read_text())
        assert beat["loss"] is None


def test_privately_and_summed_securely(make_federation: Any) -> None:
    """Nobody sees an update, and what each silo has spent is told all the same."""
    simulation = Simulation(
        make_federation(privacy=PRIVATE | {"secure_aggregation": {}}, aggregation={"strategy": "ffa", "clip": {"norm": 1.0}})
    )
    assert [r.round for r in simulation.run()] == [1, 2]
    found = {(name, step): value for (name, step), (value, _) in metrics(simulation.rounds, complete=True)}
    for silo in SILOS:
        assert 0 < found[f"silo/{silo}/epsilon", 1] < found[f"silo/{silo}/epsilon", 2] <= 8.0
        assert (f"silo/{silo}/tokens", 2) not in found


def test_all_weights_trained_privately(make_federation: Any) -> None:
    base = yaml.safe_load(make_federation().read_text())["model"]["base"]
    simulation = Simulation(make_federation(model={"base": base, "method": "full"}, privacy=PRIVATE, rounds={"total": 1, "quorum": 2}))
    (result,) = simulation.run()
    assert np.isfinite(result.loss)


@pytest.mark.parametrize(
    ("privacy", "training", "why", "cure"),
    [
        (PRIVATE, {"batch_size": 12}, "batch larger than the data", "at most the 11 records"),
        (PRIVATE | {"delta": 0.095}, {"batch_size": 3}, "delta too large", "below 1/11, since the silo has 11 records"),
    ],
)
def test_a_silo_with_too_few_records_refuses(make_federation: Any, privacy: Any, training: Any, why: str, cure: str) -> None:
    file = make_federation(privacy=privacy, training=training | {"steps": 2})
    turn = begin(file)
    with pytest.raises(RefusedError, match=cure) as raised:
        train.work(str(file), "east", turn)
    assert raised.value.reason == why
    if why.startswith("batch"):
        assert train.work(str(file), "south", turn) == "south ok"


def test_no_more_rounds_than_planned(make_federation: Any) -> None:
    """One round planned, two asked for: the first is all there is."""
    file = make_federation(privacy=PRIVATE | {"rounds": 1})
    turn = begin(file)
    for silo in SILOS:
        train.work(str(file), silo, turn)
    turn = aggregate.work(str(file), turn, *(f"{s} ok" for s in SILOS))
    with pytest.raises(
        RefusedError, match=r"must not pass 8, which is planned for 1 rounds.*raise privacy.rounds and epsilon together"
    ) as raised:
        train.work(str(file), "east", turn)
    assert raised.value.reason == "budget"


def test_what_a_refused_update_has_cost_is_told(make_federation: Any) -> None:
    """The coordinator has seen it, whether it is in the global or not."""
    file = make_federation(privacy=PRIVATE)
    turn = begin(file)
    for silo in SILOS:
        train.work(str(file), silo, turn)
    rounds = Rounds.of(Federation.load(file))
    rounds.refuse_update(1, "east", "its norm is out of the band", resend=False, manifest=rounds.update(1, "east").digest)
    aggregate.work(str(file), turn, *(f"{s} ok" for s in SILOS))
    assert set(rounds.commit(1).contributions) == {"north", "south"}
    found = {name for (name, step), _ in metrics(rounds, complete=True) if step == 1}
    assert {f"silo/{silo}/epsilon" for silo in SILOS} <= found


def test_a_round_trained_twice_sends_the_same_bytes(make_federation: Any) -> None:
    file = make_federation(privacy=PRIVATE)
    turn = begin(file)
    rounds, sent = Rounds.of(Federation.load(file)), []
    for _ in range(2):
        train.work(str(file), "east", turn)
        sent.append(rounds.update(1, "east").object)
        key = rounds.key("rounds", "00001", "updates", "east.json")
        rounds.store.delete(key)
    assert sent[0] == sent[1]
    home = silo_home(Federation.load(file), Federation.load(file).silo("east"))
    (home / FILE).unlink()
    train.work(str(file), "east", turn)
    assert rounds.update(1, "east").object != sent[0]


def test_a_refused_update_is_sent_again_and_not_made_again(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere its sums might be rounded otherwise, under the same noise. Where the records have changed, the noise has, too."""
    file = make_federation(privacy=PRIVATE)
    turn = begin(file)
    rounds, federation = Rounds.of(Federation.load(file)), Federation.load(file)
    calls, learn = [], train.learn
    monkeypatch.setattr(train, "learn", lambda *a: (calls.append(1), learn(*a))[1])
    sent = []
    for number in (1, 2, 3):
        if number == 3:
            path = Path(federation.silo("east").train)
            path.write_text(path.read_text() + json.dumps({"prompt": "one more", "response": "record"}) + "\n")
            preprocess.work(str(file), "east")
        train.work(str(file), "east", turn)
        sent.append(rounds.update(1, "east").object)
        assert len(calls) == (1, 1, 2)[number - 1]
        rounds.refuse_update(1, "east", "its norm is out of the band", resend=False, manifest=rounds.update(1, "east").digest)
        assert rounds.update(1, "east") is None
    assert sent[0] == sent[1] != sent[2]


# What is public


def public_keys(rounds: Rounds, root: Path, federation: Federation, silo: str) -> dict[str, bytes]:
    """All 32-byte keys that somebody could think of who has the whole store and the federation file, but not the silo's secret."""
    plan, commit = rounds.plan(1), rounds.commit(0)
    texts = [b"", bytes(32), federation.name.encode(), silo.encode(), plan.digest.encode(), plan.agreement.encode(), commit.digest.encode()]
    texts += [p.read_bytes() for p in root.rglob("*") if p.is_file()]  # every object, record and signature
    texts += [text for p in root.rglob("*.json") for text in strings(json.loads(p.read_bytes()))]
    seeds = [federation.training.seed, *range(20)]
    texts += [
        seed_of(*parts).to_bytes(8, "big")
        for s in seeds
        for parts in ((s,), (federation.name, s, silo), (federation.name, s, 1, silo, "dropout"))
    ]
    texts += [str(s).encode() for s in seeds]
    whole = (
        {hashlib.sha256(t).digest() for t in texts}
        | {t for t in texts if len(t) == 32}
        | {bytes.fromhex(t.decode()) for t in texts if is_hex(t)}
    )
    dataset = next(iter(e.split_digest for e in rounds.evaluations(plan.incoming, "valid").values() if e.silo == silo))
    names = {"agreement": plan.agreement, "plan": plan.digest, "incoming": plan.incoming, "purpose": "training"}
    found = {f"key {i}": secret for i, secret in enumerate(sorted(whole))}
    found |= {f"derived {i}": derive(secret, dataset=dataset, **names) for i, secret in enumerate(sorted(whole))}
    return found | {"hash of names": hashlib.sha256(canonical_json(names | {"dataset": dataset})).digest()}


def strings(value: Any) -> list[bytes]:
    if isinstance(value, dict):
        return [s for pair in value.items() for v in pair for s in strings(v)]
    if isinstance(value, list):
        return [s for v in value for s in strings(v)]
    return [value.encode()] if isinstance(value, str) else []


def is_hex(text: bytes) -> bool:
    return len(text) == 64 and all(c in b"0123456789abcdef" for c in text)


def likeness(update: dict[str, np.ndarray], key: bytes) -> float:
    """Correlation of an update after one step of AdamW, which moves every weight against the sign of its gradient, with a key's noise."""
    noise = Noise(key)
    moved = np.concatenate([np.sign(a).ravel() for _, a in sorted(update.items())])
    made = np.concatenate([noise.normals(a.size, "gradient", 0, n) for n, a in sorted(update.items())])
    return float(np.corrcoef(moved, -made)[0, 1])


def test_whoever_knows_all_that_is_public_finds_neither_noise_nor_sample(make_federation: Any) -> None:
    file = make_federation(privacy=PRIVATE | {"epsilon": 1.0}, training={"steps": 1, "batch_size": 3, "learning_rate": 0.01})
    turn = begin(file)
    for silo in SILOS:
        train.work(str(file), silo, turn)
    federation = Federation.load(file)
    rounds = Rounds.of(federation)
    root = federation.work / "store"
    assert root.is_dir()
    plan = rounds.plan(1)
    for silo in SILOS:
        home = silo_home(federation, federation.silo(silo))
        update = open_tensor_file(rounds.fetch_object(rounds.update(1, silo).object, home / "look", silo)).read_all()
        update = {n: a for n, a in update.items() if np.abs(a).max() > 0}
        dataset = json.loads((home / json.loads((home / "data.json").read_text())["train"] / "shard.json").read_text())["digest"]
        names = {"agreement": plan.agreement, "plan": plan.digest, "incoming": plan.incoming, "dataset": dataset, "purpose": "training"}
        true = derive(own_secret(home), **names)
        assert likeness(update, true) > 0.6  # who has the secret does find it, so that the search is no blind one
        size = sum(a.size for a in update.values())
        public = public_keys(rounds, root, federation, silo)
        assert len(public) > 300
        drawn = [sample(true, step, 10_000, 0.5) for step in range(2)]
        for name, key in public.items():
            assert key != true
            assert abs(likeness(update, key)) < 6 / np.sqrt(size), name
            assert abs(len(np.intersect1d(sample(key, 0, 10_000, 0.5), drawn[0])) - 2500) < 350, name
        secret = own_secret(home)
        for path in root.rglob("*"):  # nor does the secret itself, or a key of it, lie there
            if path.is_file():
                data = path.read_bytes()
                assert not any(x in data for x in (secret, true, secret.hex().encode(), true.hex().encode()))


# Persons


def with_persons(file: Path, whose: Any) -> None:
    for silo in yaml.safe_load(file.read_text())["silos"]:
        for split in ("train", "valid", "test"):
            path = Path(silo[split])
            records = [json.loads(line) for line in path.read_text().splitlines()]
            path.write_text(
                "".join(json.dumps(r | ({"patient": w} if (w := whose(i)) is not None else {})) + "\n" for i, r in enumerate(records))
            )


PERSONS = PRIVATE | {"unit": "person", "person_field": "patient"}


def test_persons_are_counted_and_never_named(make_federation: Any) -> None:
    file = make_federation(privacy=PERSONS, rounds={"total": 1, "quorum": 2})
    with_persons(file, lambda i: f"Zaphod-{i // 2}" if i % 2 else 7_000_000 + i // 4)
    simulation = Simulation(file)
    (result,) = simulation.run()
    assert set(result.silos) == set(SILOS)
    federation = simulation.federation
    shards = {s: train.open_split(silo_home(federation, federation.silo(s)), "train") for s in SILOS}
    assert shards["east"].units.tolist() == [0, 1, 0, 2, 3, 4, 3, 5, 6, 7, 6]
    mechanism = round_mechanism(federation.privacy_agreed, federation.training, shards["east"].unit_count)
    assert mechanism.sampling_probability == 3 / 8
    numbers = simulation.rounds.reports(1, simulation.rounds.commit(1).attempt)["east"].numbers
    assert numbers["epsilon"] == pytest.approx(epsilon([mechanism], 1e-3), abs=1e-6)
    written = [p for root in (federation.work, *(Path(s.storage) for s in federation.silos)) for p in root.rglob("*") if p.is_file()]
    assert len(written) > 30
    assert not any(b"Zaphod" in p.read_bytes() or b"700000" in p.read_bytes() for p in written)


def test_a_name_written_in_two_ways_is_one_person(make_federation: Any) -> None:
    """Two exports of one register may write é as one character, or as two; spaces and the type of a number tell nobody apart either."""
    file = make_federation(privacy=PERSONS)
    with_persons(file, lambda i: ("Jos\u00e9", "Jose\u0301", " Jos\u00e9", 7, "7", "Jose")[i % 6])
    preprocess.work(str(file), "east")
    shard = train.open_split(silo_home(Federation.load(file), Federation.load(file).silo("east")), "train")
    assert shard.units[:6].tolist() == [0, 0, 0, 1, 1, 2]
    assert shard.unit_count == 3


@pytest.mark.parametrize("value", [None, "", "  ", 3.5, True])
def test_a_record_of_nobody_is_refused_without_telling_of_it(make_federation: Any, value: Any) -> None:
    file = make_federation(privacy=PERSONS)
    with_persons(file, lambda i: value if i == 4 else f"Zaphod-{i}")
    with pytest.raises(FederationError, match=r"train.jsonl, line 5: field 'patient' must say whose record it is") as raised:
        preprocess.work(str(file), "east")
    assert "Zaphod" not in str(raised.value)


def test_one_persons_records_are_not_torn_apart(make_federation: Any) -> None:
    file = make_federation(privacy=PERSONS, data={"max_length": 64, "valid_fraction": 0.3})
    with_persons(file, lambda i: f"p{i % 4}")
    terms = yaml.safe_load(file.read_text())
    for silo in terms["silos"]:
        del silo["valid"]
    file.write_text(yaml.safe_dump(terms))
    for silo, records in UNITS.items():
        preprocess.work(str(file), silo)
        home = silo_home(Federation.load(file), Federation.load(file).silo(silo))
        rest, aside = train.open_split(home, "train"), train.open_split(home, "valid")
        assert (rest.unit_count, aside.unit_count) == (3, 1)
        assert len(rest) + len(aside) == records
        assert len(aside) >= records // 4


def test_pieces_of_a_long_text_are_one_record(make_federation: Any) -> None:
    file = make_federation(privacy=PRIVATE, data={"format": "text", "max_length": 32})
    for silo in yaml.safe_load(file.read_text())["silos"]:
        for split in ("train", "valid", "test"):
            Path(silo[split]).write_text("".join(json.dumps({"text": "heart and blood " * n}) + "\n" for n in (1, 30, 2, 12)))
    preprocess.work(str(file), "east")
    shard = train.open_split(silo_home(Federation.load(file), Federation.load(file).silo("east")), "train")
    assert shard.unit_count == 4
    assert len(shard) > 8
    assert (np.diff(shard.units) >= 0).all()
