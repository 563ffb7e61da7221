"""policy, review, dry-run and privacy: what a steward is told is what the boxes would do, and telling it touches nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from silotune.components import keys
from silotune.components.federation import Federation
from silotune.components.learning import records
from silotune.components.steward.ledger import Ledger
from silotune.components.steward.policy import Policy
from silotune.pipelines.commands.steward import RULES
from silotune.pipelines.simulate import Simulation

Call = Callable[..., tuple[int, str, str]]
PRIVATE = {
    "privacy": {"epsilon": 8.0, "delta": 1e-3},
    "rounds": {"total": 4, "quorum": 2},
    "training": {"steps": 2, "batch_size": 2, "learning_rate": 0.01},
}


def written(folder: Path, **terms: Any) -> Path:
    file = folder / "policy.yaml"
    file.write_text(yaml.safe_dump({"dataset": "letters"} | terms))
    return file


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# policy new, review


def test_a_new_policy_lets_its_federation_through(make_federation: Any, tmp_path: Path, silotune: Call) -> None:
    file, policy = make_federation(aggregation={"strategy": "fedavg"}), tmp_path / "mine.yaml"
    code, out, _ = silotune("policy", "new", file, "--silo", "north", "-o", policy)
    assert (code, "mine.yaml written" in out) == (0, True)
    loaded = Policy.load(policy)
    assert (loaded.dataset, loaded.strategies, loaded.min_participants, len(loaded.bases or [])) == ("north", ["fedavg"], 2, 1)
    code, out, _ = silotune("review", file, "--policy", policy, "--silo", "north")
    assert code == 0
    assert "nothing in it is against the policy of data set north" in out
    assert silotune("policy", "new", file, "--silo", "north", "-o", policy)[0] == 2  # never over another one


def test_a_new_policy_limits_a_private_federation_to_what_it_asks(make_federation: Any, tmp_path: Path, silotune: Call) -> None:
    policy, privacy = tmp_path / "p.yaml", {"epsilon": 3.1234567891, "delta": 1e-5}
    silotune("policy", "new", make_federation(privacy=privacy), "--silo", "north", "-o", policy)
    found = Policy.load(policy).privacy
    assert (found.required, found.epsilon.run, found.epsilon.total, found.epsilon.month) == (True, 3.1234567891, 3.1234567891, None)
    assert silotune("review", make_federation(privacy=privacy), "--silo", "north", "--policy", policy)[0] == 0
    assert silotune("review", make_federation(privacy=privacy | {"epsilon": 3.13}), "--silo", "north", "--policy", policy)[0] == 4


def test_every_line_of_a_new_policy_is_valid_once_it_is_not_a_comment(make_federation: Any, tmp_path: Path, silotune: Call) -> None:
    silotune("policy", "new", make_federation(**PRIVATE), "--silo", "north", "-o", tmp_path / "p.yaml")
    text = (tmp_path / "p.yaml").read_text()
    opened = re.sub(r"^( *)# ([a-z_]+: *(?:[\[0-9a-z/#]|$).*|  [a-z]+: .*)$", r"\1\2", text, flags=re.MULTILINE)
    opened = opened.replace("[sha256:…: what the silo's work runs in]", "['sha256:" + "0" * 64 + "']")
    opened = opened.replace("[ed25519:…: the coordinator's public key]", "['ed25519:" + "A" * 43 + "=']")
    (tmp_path / "p.yaml").write_text(opened)
    found = Policy.load(tmp_path / "p.yaml")
    assert (found.privacy.epsilon.total, found.privacy.epsilon.run, found.privacy.epsilon.month, found.privacy.epsilon.delta) == (
        8.0,
        8.0,
        3.0,
        1e-3,
    )
    assert found.max_runs == 3
    assert found.ledger.at == "/srv/silotune/ledger"
    assert found.report == ["steps", "seconds", "epsilon", "delta"]


def test_a_review_tells_every_rule_in_plain_words(make_federation: Any, tmp_path: Path, silotune: Call) -> None:
    policy = written(
        tmp_path, strategies=["ffa"], codecs=["float32"], privacy={"required": True}, max_update_bytes=10**6, max_runs=1, min_participants=3
    )
    code, out, err = silotune("review", make_federation(), "--policy", policy, "--silo", "north")
    assert code == 4
    assert "asks silo north, with 2 others" in out
    assert "the coordinator sees each silo's update" in out
    assert "differential privacy: none for single records" in out
    rows = {words: line.split()[0] for line in out.splitlines() for words in RULES.values() if words in line}
    assert rows == {
        RULES["strategy"]: "NO", RULES["codec"]: "ok", RULES["privacy"]: "NO", RULES["participants"]: "ok", RULES["update size"]: "?",
        RULES["runs"]: "ok",
    }  # fmt: skip
    assert "its policy is against strategy, privacy" in err


def test_a_review_knows_a_federation_that_runs(make_federation: Any, tmp_path: Path, silotune: Call) -> None:
    file = make_federation(rounds={"total": 2, "quorum": 2})
    list(Simulation(file).run(rounds=1))
    code, out, _ = silotune("review", file, "--policy", written(tmp_path, max_update_bytes=100), "--silo", "north")
    assert code == 4
    assert re.search(r"NO +no more bytes leave than allowed +at most \d+ bytes", out)


def test_a_base_that_is_not_here_is_no_verdict(make_federation: Any, tmp_path: Path, silotune: Call) -> None:
    file = make_federation(base="some/model")
    code, out, _ = silotune("review", file, "--policy", written(tmp_path, bases=["0" * 64]), "--silo", "north")
    assert code == 0
    assert re.search(r"\? +a base model that may be trained +known once it is fetched", out)


def test_every_rule_has_its_words() -> None:
    import inspect

    from silotune.components.steward import admission

    assert set(re.findall(r'Verdict\(\s*"([a-z ]+)"', inspect.getsource(admission))) == set(RULES)


@pytest.mark.parametrize("command", ["review", "dry-run"])
def test_a_silo_must_be_named_and_known(make_federation: Any, silotune: Call, command: str) -> None:
    words = ["--mock"] if command == "dry-run" else []
    assert "name yours" in silotune(command, make_federation(), *words)[2]
    assert "is not in federation" in silotune(command, make_federation(), *words, "--silo", "west")[2]


def test_without_a_policy_there_is_nothing_to_review(make_federation: Any, silotune: Call) -> None:
    code, _, err = silotune("review", make_federation(), "--silo", "north")
    assert (code, "has no policy on this machine" in err) == (2, True)


# dry-run


CHAT = {"data": {"format": "chat", "template": "chat", "max_length": 64}}
TEXT = {"data": {"format": "text", "max_length": 64, "fields": {"text": "note"}}}


@pytest.mark.parametrize("sections", [{}, CHAT, TEXT], ids=["prompt-response", "chat", "text"])
def test_a_dry_run_prints_what_would_leave_and_touches_nothing(
    make_federation: Any, tiny_chat: Path, tmp_path: Path, silotune: Call, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any]
) -> None:
    file = make_federation(base=tiny_chat, **sections)
    real = [str(tmp_path / "data")]

    def only_mock(read: Any) -> Any:
        def reader(path: Path) -> Any:
            assert not str(path).startswith(tuple(real))
            return read(path)

        return reader

    for name, read in records.READERS.items():
        monkeypatch.setitem(records.READERS, name, only_mock(read))
    before = contents(tmp_path)
    code, out, err = silotune("dry-run", file, "--mock", "--silo", "north")
    assert code == 0, err
    assert contents(tmp_path) == before
    assert "status line: north ok" in out
    assert re.search(r"^tiny/contributions/north/[0-9a-f]{64} \(\d+ bytes\)$", out, re.MULTILINE)
    assert re.search(r"^  tensor .*lora_A.*: F32 \[2, 32\]$", out, re.MULTILINE)
    keys_told = re.findall(r"^(tiny/\S+) \(", out, re.MULTILINE)
    assert {re.sub(r"[0-9a-f]{16,}", "#", k) for k in keys_told} == {
        "tiny/contributions/north/#", "tiny/evaluations/#/north/valid-#.json", "tiny/evaluations/#/north/test-#.json",
        "tiny/rounds/00001/reports/1/north.json", "tiny/rounds/00001/updates/north.json",
    }  # fmt: skip
    assert f"and nothing else: {len(keys_told)} objects" in out
    assert "mock question" not in out


def test_a_dry_run_is_held_to_the_policy(make_federation: Any, tmp_path: Path, silotune: Call) -> None:
    file = make_federation()
    policy = written(
        tmp_path, report=["steps"], scores=False, coordinators=["ed25519:" + "A" * 43 + "="], ledger={"at": str(tmp_path / "books")}
    )
    code, out, _ = silotune("dry-run", file, "--mock", "--silo", "north", "--policy", policy)
    assert code == 0
    assert '  numbers: {"steps": 2.0}' in out
    assert "  loss: null" in out
    assert "evaluations/" not in out
    assert not (tmp_path / "books").exists()
    code, _, err = silotune("dry-run", file, "--mock", "--silo", "north", "--policy", written(tmp_path, max_update_bytes=100))
    assert (code, "its policy allows at most 100 bytes" in err) == (4, True)


@pytest.mark.parametrize(
    ("says", "rule"),
    [
        ({"privacy": {"required": True}}, "differential privacy only"),
        ({"expires": date(2020, 1, 1)}, "ended on"),
        ({"min_participants": 4}, "4 silos or more"),
    ],
)
def test_a_dry_run_refuses_what_a_box_would(make_federation: Any, tmp_path: Path, silotune: Call, says: dict[str, Any], rule: str) -> None:
    code, _, err = silotune("dry-run", make_federation(), "--mock", "--silo", "north", "--policy", written(tmp_path, **says))
    assert (code, rule in err) == (4, True)


def test_a_dry_run_uses_no_key_and_policy_of_this_machine(
    make_federation: Any, tmp_path: Path, silotune: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SILOTUNE_KEYS", str(tmp_path / "none"))
    file = make_federation(security={"keys": {p: keys.new(tmp_path / p, p) for p in ("coordinator", "east", "north", "south")}})
    assert silotune("dry-run", file, "--mock", "--silo", "north")[0] == 0
    assert __import__("os").environ["SILOTUNE_KEYS"] == str(tmp_path / "none")


def test_real_records_are_never_dry(make_federation: Any, silotune: Call) -> None:
    code, _, err = silotune("dry-run", make_federation(), "--silo", "north")
    assert (code, "say so with --mock" in err) == (2, True)


# privacy


@pytest.fixture
def spent(make_federation: Any) -> Path:
    """Three rounds of four, written into the ledger of north."""
    file = make_federation(**PRIVATE)
    federation = Federation.load(file)
    keys.ensure(federation)
    storage = Path(federation.silo("north").storage)
    written(storage, privacy={"epsilon": {"total": 8.0, "month": 7.0, "delta": 1e-3}})
    import ledgers

    from silotune.components.learning.privacy.accounting import round_mechanism

    mechanism = round_mechanism(federation.privacy_agreed, federation.training, 14)
    book = Ledger.of(federation, "north", Policy.of(federation, "north"))
    book.entries()
    for number in range(1, 4):
        book.append(ledgers.charge(number, "tiny", mechanism=mechanism, delta=1e-3), 1.8e9 + number)
    return file


def test_privacy_tells_spent_left_and_what_would_come(spent: Path, tmp_path: Path, silotune: Call) -> None:
    code, out, err = silotune("privacy", spent, "--silo", "north", "--rounds", "1", "--rounds", "2", "--plot", tmp_path / "p.svg")
    assert code == 0, err
    assert "north: data set 'letters', 3 trainings, epsilon about a record at delta 0.001" in out
    total = re.search(r"in total +(\S+) +8\.000 +(\S+)", out)
    assert total
    assert float(total[1]) + float(total[2]) == pytest.approx(8.0, abs=2e-3)
    assert 4 < float(total[1]) < 8
    ahead = [line.split() for line in out.splitlines() if re.match(r"[12] {2,}", line)]
    assert float(ahead[0][3]) <= 8.0 < float(ahead[1][3])
    assert [row[4:] for row in ahead] == [["month"], ["month,", "total,", "promise"]]
    kept = re.search(r"of its promise \(delta 0.001\) +(\S+) +8\.000 +(\S+)", out)  # of four rounds three are done: one is kept within it
    assert kept
    assert kept[1] == total[1]
    assert "│ limit in total, 8" in out
    assert out.count("█") > 20
    storage = Path(Federation.load(spent).silo("north").storage)
    assert f"ledger: {storage}/ledger/letters\n" in out
    assert f"policy: {storage}/policy.yaml\n" in out
    assert "the next month begins on 2027-02-01 (UTC)" in out
    assert "written down on 2027-01-15, which this machine's clock has not reached" in out
    drawing = ElementTree.parse(tmp_path / "p.svg").getroot()
    assert drawing.tag.endswith("svg")


def test_privacy_reads_every_entry_anew(spent: Path, silotune: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that a volume has, which a training does not read."""
    from silotune.components.steward import ledger as module

    monkeypatch.setattr(module, "VOLUME", 2)
    federation = Federation.load(spent)
    book = Ledger.of(federation, "north", Policy.of(federation, "north"))
    book.entries()
    assert book.append(book.entries()[-1].charge, 1.8e9 + 4)
    entry = Path(federation.silo("north").storage) / "ledger" / "letters" / "000001.json"
    entry.write_bytes(entry.read_bytes().replace(b'"round":1', b'"round":7'))
    assert len(Ledger.of(federation, "north", Policy.of(federation, "north")).entries()) == 4
    code, _, err = silotune("privacy", spent, "--silo", "north")
    assert (code, "000001.json was altered" in err) == (4, True)


def test_a_review_tells_what_is_spent_so_far(spent: Path, silotune: Call) -> None:
    code, out, err = silotune("review", spent, "--silo", "north")
    assert code == 0, err
    assert re.search(
        r"so far: 3 trainings on data set 'letters'; epsilon \d\.\d+ of 7 this month, epsilon \d\.\d+ of 8 in total \(ledger in \S+/ledger/letters\)",
        out,
    )


def test_a_review_tells_of_a_ledger_that_was_tampered_with(spent: Path, silotune: Call) -> None:
    (Path(Federation.load(spent).silo("north").storage) / "ledger" / "letters" / "000002.json").unlink()
    out = silotune("review", spent, "--silo", "north")[1]
    assert "000002.json is missing, and later ones are there; nothing is trained until" in out


def test_a_review_before_there_is_a_key(make_federation: Any, tmp_path: Path, silotune: Call) -> None:
    out = silotune("review", make_federation(), "--silo", "north", "--policy", written(tmp_path))[1]
    assert "so far: this machine has no key of the silo, and so no ledger" in out


def test_a_review_says_where_single_records_are_scored(make_federation: Any, tmp_path: Path, silotune: Call) -> None:
    file = make_federation(evaluation={"max_examples": 1})
    assert (
        "score each global on at most 1 of its valid records"
        in silotune("review", file, "--silo", "north", "--policy", written(tmp_path))[1]
    )


def test_privacy_of_a_silo_that_has_not_trained(make_federation: Any, silotune: Call) -> None:
    file = make_federation()
    keys.ensure(Federation.load(file))
    code, out, _ = silotune("privacy", file)
    assert code == 0
    assert out.count("0 trainings") == 3


def test_privacy_says_where_nothing_bounds(make_federation: Any, silotune: Call) -> None:
    file = make_federation(rounds={"total": 1, "quorum": 2})
    list(Simulation(file).run())
    code, out, _ = silotune("privacy", file, "--silo", "east")
    assert code == 0
    assert "1 of them without differential privacy about a record, so that no epsilon bounds the whole" in out
    assert re.search(r"in total +no bound +none", out)


def test_privacy_refuses_a_ledger_that_was_tampered_with(spent: Path, silotune: Call) -> None:
    entry = Path(Federation.load(spent).silo("north").storage) / "ledger" / "letters" / "000002.json"
    entry.unlink()
    code, _, err = silotune("privacy", spent, "--silo", "north")
    assert (code, "000002.json is missing" in err) == (4, True)


def test_privacy_is_looked_at_where_the_key_is(make_federation: Any, silotune: Call) -> None:
    code, _, err = silotune("privacy", make_federation())
    assert (code, "no silo has a key" in err) == (2, True)


def test_a_plot_is_of_one_silo_and_one_kind(make_federation: Any, tmp_path: Path, silotune: Call) -> None:
    file = make_federation()
    keys.ensure(Federation.load(file))
    assert "must end with .svg" in silotune("privacy", file, "--plot", tmp_path / "p.png")[2]
    assert "name one with --silo" in silotune("privacy", file, "--plot", tmp_path / "p.svg")[2]
    code, _, err = silotune("privacy", file, "--silo", "north", "--plot", tmp_path / "nowhere" / "p.svg")
    assert (code, "p.svg: cannot be written" in err) == (2, True)
