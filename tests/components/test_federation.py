"""The agreement: every error at once, with path, rule, value and cure; digests that change exactly when the terms do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from silotune.components.errors import FederationError
from silotune.components.federation import Agreement, Federation, canonical_json, json_schema
from silotune.components.terms.rounds import Quorum, seconds
from silotune.components.terms.security import PublicKey

GOOD = """
name: medquad
model:
  base: ./models/base
  method: lora
  lora: {r: 4, alpha: 16, target_modules: [q_proj, v_proj]}
data: {format: prompt-response, max_length: 128, fields: {prompt: question}}
silos:
  - {id: niddk, train: ./data/niddk.jsonl, valid: data/niddk-valid.csv, storage: ./private/niddk}
  - {id: nci, train: "s3://nci/train.parquet", training: {batch_size: 2}}
  - {id: nhlbi, train: ~/nhlbi.jsonl}
rounds: {total: 6, per_run: 3, quorum: 2, until: {metric: loss, patience: 2}}
training: {steps: 5, learning_rate: 1e-3, seed: 17}
evaluation: {max_examples: 100}
storage: {root: ./store}
tracking: {uri: "sqlite:///./track.db"}
"""

MINIMAL = """
name: small
model: {base: org/name}
silos: [{id: a, train: a.jsonl}]
"""

KEY, OTHER_KEY = (f"ed25519:{letter * 43}=" for letter in "Ab")
KEYS = {party: f"ed25519:{letter * 43}=" for party, letter in zip(("coordinator", "niddk", "nci", "nhlbi"), "CDEF", strict=True)}

Load = Callable[..., Federation]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a federation from text or from a plain object."""

    def load(content: str | dict[str, Any], **kwargs: Any) -> Federation:
        file = tmp_path / "federation.yaml"
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return Federation.load(file, **kwargs)

    return load


@pytest.fixture
def refused(load: Load) -> Callable[..., list[str]]:
    """The lines of the error that such a file gives."""

    def refused(content: str | dict[str, Any], **kwargs: Any) -> list[str]:
        with pytest.raises(FederationError) as caught:
            load(content, **kwargs)
        assert caught.value.exit_code == 2
        return str(caught.value).splitlines()

    return refused


def changed(path: str, value: Any, base: str = GOOD) -> dict[str, Any]:
    """The good file with one value replaced; ``path`` as in ``silos.1.train``."""
    raw = yaml.safe_load(base)
    raw["training"] = {**raw.get("training", {}), "learning_rate": 1e-3}  # plain YAML 1.1 reads 1e-3 as text
    *parents, last = path.split(".")
    at: Any = raw
    for key in parents:
        at = at[int(key)] if isinstance(at, list) else at.setdefault(key, {})
    at[int(last) if isinstance(at, list) else last] = value
    return raw


# Reading


def test_good_file_is_read_and_resolved_from_its_folder(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/steward")
    monkeypatch.chdir("/")
    federation = load(GOOD)
    niddk, nci, nhlbi = federation.silos
    assert federation.model.base == f"{tmp_path}/models/base"
    assert niddk.train == f"{tmp_path}/data/niddk.jsonl"
    assert niddk.valid == f"{tmp_path}/data/niddk-valid.csv"
    assert niddk.storage == f"{tmp_path}/private/niddk"
    assert nci.train == "s3://nci/train.parquet"
    assert nci.storage == f"{tmp_path}/.silotune-private/nci"
    assert nhlbi.train == "/home/steward/nhlbi.jsonl"
    assert federation.storage.root == f"{tmp_path}/store"
    assert federation.tracking.uri == f"sqlite:///{tmp_path}/track.db"
    assert (federation.training.steps, federation.training.learning_rate, federation.rounds.total) == (5, 0.001, 6)
    assert federation.silo_ids == ["nci", "nhlbi", "niddk"]
    assert federation.silo("nci") is nci
    assert federation.file == tmp_path / "federation.yaml"
    assert federation.work == tmp_path / ".silotune"


def test_defaults(load: Load, tmp_path: Path) -> None:
    federation = load(MINIMAL)
    assert federation.model.base == "org/name"  # no such folder: a Hugging Face id
    assert federation.model.lora.target_modules == "all-linear"
    assert federation.training.learning_rate == 1e-3
    assert federation.quorum == Quorum(count=1, weight=None)
    assert federation.rounds.on_missing_quorum == "fail"
    assert (federation.deadline_seconds, federation.stall_seconds) == (None, 900.0)
    assert (federation.rounds.min_fraction, federation.rounds.checkpoint_every) == (0.5, 25)
    assert (federation.rounds.rollback, federation.rounds.guards.norm_band) == (None, 10.0)
    assert federation.storage.retention.updates is None
    assert (federation.security.signing, federation.custody) == (True, "local")
    assert federation.storage.root == f"{tmp_path}/.silotune/store"
    assert federation.tracking.uri == f"sqlite:///{tmp_path}/.silotune/mlflow.db"


def test_a_base_that_is_a_folder_beside_the_file_is_that_folder(load: Load, tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert load(MINIMAL).model.base == f"{tmp_path}/org/name"


@pytest.mark.parametrize(("silos", "quorum"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)])
def test_quorum_is_more_than_half_by_default(load: Load, silos: int, quorum: int) -> None:
    federation = load(changed("silos", [{"id": f"s{i}", "train": "x"} for i in range(silos)], MINIMAL))
    assert federation.quorum == Quorum(count=quorum)
    assert federation.quorum.weight is None


@pytest.mark.parametrize(
    ("written", "count", "weight"),
    [(3, 3, None), ({"count": 3}, 3, None), ({"weight": 0.7}, 1, 0.7), ({"count": 2, "weight": 1}, 2, 1.0)],
)
def test_quorum_is_a_number_or_says_more(load: Load, written: Any, count: int, weight: float | None) -> None:
    assert load(changed("rounds.quorum", written)).quorum == Quorum(count=count, weight=weight)


@pytest.mark.parametrize(
    ("text", "wanted"), [("90s", 90.0), ("30m", 1800.0), ("2h", 7200.0), ("1.5h", 5400.0), ("0.5s", 0.5), ("010s", 10.0), (None, None)]
)
def test_durations(load: Load, text: str | None, wanted: float | None) -> None:
    assert seconds(text) == wanted
    assert load(changed("rounds.deadline", text)).deadline_seconds == wanted
    assert load(changed("rounds.stall", text)).stall_seconds == wanted


def test_unknown_silo_is_named_with_those_that_exist(load: Load) -> None:
    with pytest.raises(FederationError, match=r"'nope' is not in federation 'medquad'; it has nci, nhlbi, niddk"):
        load(GOOD).silo("nope")


@pytest.mark.parametrize("text", ["1e-3", "1.e-3", "0.001", "1E-3", "+1e-3", ".1e-2", "10e-4"])
def test_numbers_with_exponents_are_numbers(load: Load, text: str) -> None:
    assert load(MINIMAL + f"training: {{learning_rate: {text}}}").training.learning_rate == pytest.approx(0.001, rel=1e-12)


def test_words_that_look_a_little_like_numbers_stay_words(load: Load) -> None:
    assert load(MINIMAL.replace("id: a", "id: e5").replace("a.jsonl", "1e3x")).silo("e5").train.endswith("/1e3x")


def test_merge_keys_of_yaml_work(load: Load) -> None:
    text = MINIMAL.replace("[{id: a, train: a.jsonl}]", "[&a {id: a, train: a.jsonl}, {<<: *a, id: b}]")
    assert load(text).silo("b").train == load(text).silo("a").train


# Refusing


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("trainig", {}, "trainig: unknown key; did you mean 'training'?"),
        ("training.lerning_rate", 1.0, "training.lerning_rate: unknown key; did you mean 'learning_rate'?"),
        ("model.lora.rank_of_it", 4, "model.lora.rank_of_it: unknown key; known here: r, alpha, dropout, target_modules"),
        ("silos.1.trian", "x", "silos[1].trian: unknown key; did you mean 'train'?"),
        ("silos.1.training.stpes", 3, "silos[1].training.stpes: unknown key; did you mean 'steps'?"),
        ("rounds.until.pateince", 2, "rounds.until.pateince: unknown key; did you mean 'patience'?"),
        ("training.steps", "50", "training.steps: must be a valid integer, got '50'"),
        ("training.steps", 2.5, "training.steps: must be a valid integer, got 2.5"),
        ("training.steps", True, "training.steps: must be a valid integer, got True"),
        ("training.steps", 0, "training.steps: must be greater than or equal to 1, got 0"),
        ("training.learning_rate", -1.0, "training.learning_rate: must be greater than 0, got -1.0"),
        ("training.learning_rate", float("inf"), "training.learning_rate: must be a finite number, got inf"),
        ("training.max_grad_norm", float("nan"), "training.max_grad_norm: must be "),
        ("training.schedule", "exp", "training.schedule: must be 'constant', 'linear' or 'cosine', got 'exp'"),
        ("training", 3, "training: must hold keys and values, got 3"),
        ("silos", [], "silos: "),
        ("silos", {"id": "a"}, "silos: must be a valid list"),
        ("silos.0", "niddk", "silos[0]: must hold keys and values, got 'niddk'"),
        ("silos.1.train", 7, "silos[1].train: must be text, got 7; put it in quotes"),
        ("silos.1.storage", ["x"], "silos[1].storage: must be text, got ['x']"),
        ("silos.1.train", "", "silos[1].train: must not be empty"),
        ("silos.2.id", "NCI", "silos[2].id: must be lower-case letters, digits and inner dashes, at most 40, got 'NCI'"),
        ("silos.2.id", "-nci", "silos[2].id: must be lower-case"),
        ("silos.2.id", "a/../b", "silos[2].id: must be lower-case"),
        ("silos.2.id", "a\n", "silos[2].id: must be lower-case"),
        ("silos.2.id", "a" * 41, "silos[2].id: must be lower-case"),
        ("silos.2.id", "nci", "silos[2].id: must be unique, got 'nci' as in silos[1]; rename one"),
        ("silos.2.storage", "./private/niddk", "silos[2].storage: must be the silo's own"),
        ("name", "Med Quad", "name: must be lower-case"),
        ("rounds.quorum", 4, "rounds.quorum: must be at most the number of silos, 3, got 4; lower it or add silos"),
        ("rounds.quorum", {"count": 4}, "rounds.quorum.count: must be at most the number of silos, 3, got 4; lower it or add silos"),
        ("rounds.quorum", 0, "rounds.quorum.count: must be greater than or equal to 1, got 0"),
        ("rounds.quorum", {"count": "2"}, "rounds.quorum.count: must be a valid integer, got '2'"),
        ("rounds.quorum", {"cuont": 2}, "rounds.quorum.cuont: unknown key; did you mean 'count'?"),
        ("rounds.quorum", {"weight": 0.0}, "rounds.quorum.weight: must be greater than 0, got 0.0"),
        ("rounds.quorum", {"weight": 1.5}, "rounds.quorum.weight: must be less than or equal to 1, got 1.5"),
        ("rounds.quorum", "2", "rounds.quorum: must be a whole number, or hold count and weight, got '2'"),
        ("rounds.quorum", 2.5, "rounds.quorum: must be a whole number, or hold count and weight, got 2.5"),
        ("rounds.quorum", True, "rounds.quorum: must be a whole number, or hold count and weight, got True"),
        ("rounds.quorum", [2], "rounds.quorum: must be a whole number, or hold count and weight, got [2]"),
        ("rounds.on_missing_quorum", "wait", "rounds.on_missing_quorum: must be 'fail' or 'skip', got 'wait'"),
        ("rounds.deadline", "30", "rounds.deadline: must be a number above 0 and s, m or h, such as 30m, got '30'"),
        ("rounds.deadline", "0s", "rounds.deadline: must be a number above 0 and s, m or h"),
        ("rounds.deadline", "0.0h", "rounds.deadline: must be a number above 0 and s, m or h"),
        ("rounds.deadline", "-1s", "rounds.deadline: must be a number above 0 and s, m or h"),
        ("rounds.deadline", "1h30m", "rounds.deadline: must be a number above 0 and s, m or h"),
        ("rounds.deadline", "30m\n", "rounds.deadline: must be a number above 0 and s, m or h"),
        ("rounds.deadline", "٣m", "rounds.deadline: must be a number above 0 and s, m or h"),
        ("rounds.deadline", 30, "rounds.deadline: must be text, got 30; put it in quotes"),
        ("rounds.stall", "soon", "rounds.stall: must be a number above 0 and s, m or h, such as 30m, got 'soon'"),
        ("rounds.min_fraction", 0, "rounds.min_fraction: must be greater than 0, got 0"),
        ("rounds.min_fraction", 1.1, "rounds.min_fraction: must be less than or equal to 1, got 1.1"),
        ("rounds.checkpoint_every", -1, "rounds.checkpoint_every: must be greater than or equal to 0, got -1"),
        ("rounds.rollback", {}, "rounds.rollback.max_loss_increase: is required; add it"),
        ("rounds.rollback", {"max_loss": 1.0}, "rounds.rollback.max_loss: unknown key; did you mean 'max_loss_increase'?"),
        ("rounds.rollback.max_loss_increase", 0.0, "rounds.rollback.max_loss_increase: must be greater than 0, got 0.0"),
        ("rounds.rollback", 0.1, "rounds.rollback: must hold keys and values, got 0.1"),
        ("rounds.guards.norm_bnad", 3.0, "rounds.guards.norm_bnad: unknown key; did you mean 'norm_band'?"),
        ("rounds.guards.norm_band", 1.0, "rounds.guards.norm_band: must be greater than 1, got 1.0"),
        ("storage.retention.updates", 0, "storage.retention.updates: must be greater than or equal to 1, got 0"),
        ("storage.retention.update", 3, "storage.retention.update: unknown key; did you mean 'updates'?"),
        ("security.signing", "no", "security.signing: must be a valid boolean, got 'no'"),
        ("security.kyes", {}, "security.kyes: unknown key; did you mean 'keys'?"),
        ("security.keys", [KEY], f"security.keys: must be a valid dictionary, got ['{KEY}']"),
        ("security.keys", KEYS | {3: KEY}, "security.keys[3]: must be text, got 3; put it in quotes"),
        ("data.template", "{response}", "data: template must hold {prompt} once and end with {response}, or be 'chat'"),
        ("data.template", "{prompt}{response}.", "data: template must hold"),
        ("data.fields", {"text": "x"}, "data: fields may rename prompt, response for format 'prompt-response', not text"),
        ("silos.1.fields", {"text": "x"}, "silos[1]: fields may rename prompt, response for format 'prompt-response', not text"),
        ("data.valid_fraction", 1.0, "data.valid_fraction: must be less than 1, got 1.0"),
        ("model.lora.target_modules", "q_proj", "model.lora.target_modules: must be 'all-linear', got 'q_proj'"),
        ("model.lora.target_modules", [1], "model.lora.target_modules[0]: must be text, got 1; put it in quotes"),
    ],
)
def test_refused_with_path_rule_and_value(refused: Callable[..., list[str]], path: str, value: Any, said: str) -> None:
    lines = refused(changed(path, value))
    assert any(line.strip().startswith(said) for line in lines), lines


def test_missing_keys(refused: Callable[..., list[str]]) -> None:
    lines = refused("name: a\nsilos: [{id: a}]")
    assert lines == ["federation.yaml: 2 problems", "  model: is required; add it", "  silos[0].train: is required; add it"]


def test_all_problems_are_told_together(refused: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SILOTUNE_TEST_UNSET", raising=False)
    raw = changed("training.steps", "many")
    raw["silos"][1]["train"] = "${SILOTUNE_TEST_UNSET}/x.jsonl"
    raw["silos"][2]["id"] = "niddk"
    raw["rounds"]["quorum"] = 9
    raw["tracking"]["uri"] = "https://user:secret@tracking.example"
    raw["modle"] = raw.pop("model")
    raw["silos"][0]["valid"] = "nowhere.jsonl"
    lines = refused(raw, check_files=True)
    told = {line.split(":")[0].strip() for line in lines[1:]}
    assert told >= {
        "training.steps", "silos[1].train", "silos[2].id", "rounds.quorum", "tracking.uri", "modle", "model", "silos[0].valid",
    }  # fmt: skip
    assert lines[0] == f"federation.yaml: {len(lines) - 1} problems"


def test_files_are_asked_for_only_where_they_can_be_seen(load: Load, refused: Callable[..., list[str]], tmp_path: Path) -> None:
    load(GOOD)  # none of its files is there
    lines = refused(GOOD, check_files=True)
    assert {line.split(":")[0].strip() for line in lines[1:]} == {"model.base", "silos[0].train", "silos[0].valid", "silos[2].train"}
    (tmp_path / "models/base").mkdir(parents=True)
    assert any("model.base: has no config.json" in line for line in refused(GOOD, check_files=True))


def test_no_such_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match=r"nope\.yaml: no such federation file"):
        Federation.load(tmp_path / "nope.yaml")
    with pytest.raises(FederationError, match="is a folder"):
        Federation.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("name: a\nmodel: [\n", "federation.yaml:3:1: not valid YAML"),
        ("name: a\nmodel: {base: x}\nname: b\n", "federation.yaml:3:1: not valid YAML: key 'name' stands twice"),
        ("name: a\nmodel:\n  base: x\n  base: y\n", "federation.yaml:4:3: not valid YAML: key 'base' stands twice"),
        ("name: a\n[1, 2]: x\n", "federation.yaml:2:"),
        ("name: a\n? [1, 2]\n: x\n", "federation.yaml:2:3: not valid YAML: a key must be a word"),
        (
            "name: " + 100_000 * "[",
            "federation.yaml:1:38: not valid YAML: lists and mappings must not lie in one another more than 32 deep",
        ),
        ("name: !!python/object/apply:os.getcwd []\n", "federation.yaml:1:7: not valid YAML"),
        ("", "federation.yaml: must hold keys such as name, model and silos, got nothing"),
        ("- a\n", "federation.yaml: must hold keys such as name, model and silos, got a list"),
    ],
)
def test_yaml_errors_name_the_line(refused: Callable[..., list[str]], text: str, where: str) -> None:
    assert refused(text)[0].startswith(where)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(FederationError, match=r"f\.yaml: not UTF-8 text \(byte 6\)"):
        Federation.load(tmp_path / "f.yaml")


# Keys and custody


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "security.keys.nci: must be a key as `silotune keys new` prints it, or a list of {public, since, until}, got 3"),
        (None, "security.keys.nci: must be a key as `silotune keys new` prints it, or a list of {public, since, until}, got None"),
        ({"public": KEY}, "security.keys.nci: must be a key as `silotune keys new` prints it, or a list of {public, since, until}"),
        ([], "security.keys.nci: must not be empty, got []"),
        (
            "ed25519:short",
            "security.keys.nci[0].public: must be ed25519: and 44 characters, as `silotune keys new` prints them, got 'ed25519:short'",
        ),
        ([{"public": KEY[:-1]}], "security.keys.nci[0].public: must be ed25519: and 44 characters"),
        ([{"public": KEY + "\n"}], "security.keys.nci[0].public: must be ed25519: and 44 characters"),
        ([{"public": KEY}, {"pulbic": KEY}], "security.keys.nci[1].pulbic: unknown key; did you mean 'public'?"),
        ([{"public": KEY}, {"pulbic": KEY}], "security.keys.nci[1].public: is required; add it"),
        ([{"public": KEY, "unitl": 3}], "security.keys.nci[0].unitl: unknown key; did you mean 'until'?"),
        ([{"public": KEY, "from_round": 3}], "security.keys.nci[0].from_round: unknown key; known here: public, since, until"),
        ([KEY], f"security.keys.nci[0]: must hold keys and values, got '{KEY}'"),
        ([{"public": KEY, "since": -1}], "security.keys.nci[0].since: must be greater than or equal to 0, got -1"),
        ([{"public": KEY, "since": 5, "until": 4}], "security.keys.nci[0]: until must be at least since, 5, got 4; "),
    ],
)
def test_a_bad_key_is_refused_with_its_place(refused: Callable[..., list[str]], value: Any, said: str) -> None:
    lines = refused(changed("security.keys", KEYS | {"nci": value}))
    assert any(line.strip().startswith(said) for line in lines), lines


def test_two_parties_cannot_share_a_key(refused: Callable[..., list[str]]) -> None:
    lines = refused(changed("security.keys", KEYS | {"nci": [{"public": KEY, "until": 3}, {"public": KEYS["nhlbi"], "since": 4}]}))
    assert lines[1:] == ["  security.keys.nhlbi: must be the party's own, is also nci's; make a new one"]


def test_all_parties_have_keys_or_none(refused: Callable[..., list[str]]) -> None:
    others = {party: key for party, key in KEYS.items() if party not in ("coordinator", "nci")}
    lines = refused(changed("security.keys", others | {"nic": KEY}))
    assert lines[1:] == [
        "  security.keys.coordinator: is required where others have keys; add what `silotune keys new coordinator` prints",
        "  security.keys.nci: is required where others have keys; add what `silotune keys new nci` prints",
        "  security.keys.nic: is neither coordinator nor a silo's id; correct or remove it",
    ]


@pytest.mark.parametrize("keys", [{}, KEYS])
def test_no_silo_may_be_called_coordinator(refused: Callable[..., list[str]], keys: dict[str, str]) -> None:
    raw = changed("silos.1.id", "coordinator")
    raw["security"] = {"keys": {k: v for k, v in keys.items() if k != "nci"}}
    assert refused(raw)[1:] == ["  silos[1].id: 'coordinator' is the name of the other party; give the silo another"]


def test_a_key_is_a_text_or_a_list_with_rounds(load: Load) -> None:
    rotated = [{"public": KEY, "until": 6}, {"public": OTHER_KEY, "since": 7}]
    keys = load(changed("security.keys", KEYS | {"nci": rotated})).public_keys
    assert keys["nhlbi"] == [PublicKey(public=KEYS["nhlbi"])]
    assert keys["nci"] == [PublicKey(public=KEY, until=6), PublicKey(public=OTHER_KEY, since=7)]
    assert [[k.good_for(n) for k in keys["nci"]] for n in (0, 6, 7, 99)] == [[True, False], [True, False], [False, True], [False, True]]
    assert all(keys["nhlbi"][0].good_for(n) for n in (0, 6, 7, 99))


def test_who_holds_the_private_keys(load: Load, tmp_path: Path) -> None:
    assert load(GOOD).custody == "local"
    assert load(GOOD).key_folder("coordinator") == tmp_path / ".silotune/keys"
    assert load(GOOD).key_folder("niddk") == tmp_path / "private/niddk/keys"
    assert load(changed("security.keys", KEYS)).custody == "parties"
    off = changed("security.keys", KEYS)
    off["security"]["signing"] = False
    assert (load(off).custody, load(off).public_keys) == ("none", {})


def test_keys_made_on_this_machine_are_part_of_the_terms(load: Load) -> None:
    from silotune.components import keys

    federation = load(GOOD)
    assert federation.public_keys == {}
    keys.ensure(federation)
    agreement = agreement_of(federation)
    assert sorted(agreement.keys) == ["coordinator", "nci", "nhlbi", "niddk"]
    assert len({its[0].public for its in agreement.keys.values()}) == 4
    keys.ensure(federation)
    assert agreement_of(federation) == agreement


# Environment and credentials


def test_environment_is_substituted_in_paths_only(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ST_DATA", "/mnt/data")
    monkeypatch.setenv("ST_EMPTY", "")
    monkeypatch.delenv("ST_UNSET", raising=False)
    raw = changed("silos.0.train", "${ST_DATA}/a.jsonl")
    raw["silos"][1]["train"] = "s3://${ST_UNSET:-bucket}/x"
    raw["silos"][2]["train"] = "${ST_EMPTY:-fallback}/x"
    raw["storage"]["root"] = "${ST_UNSET:-./elsewhere}"
    raw["data"]["template"] = "${ST_DATA} {prompt} {response}"
    federation = load(raw)
    assert [s.train for s in federation.silos] == ["/mnt/data/a.jsonl", "s3://bucket/x", f"{tmp_path}/fallback/x"]
    assert federation.storage.root == f"{tmp_path}/elsewhere"
    assert federation.data.template == "${ST_DATA} {prompt} {response}"


def test_unset_variable_is_named(refused: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ST_UNSET", raising=False)
    lines = refused(changed("silos.1.train", "${ST_UNSET}/x"))
    assert lines[1].startswith("  silos[1].train: the environment variable ST_UNSET is not set")
    raw = changed("silos.1.train", "${ST_UNSET}/x")
    raw["silos"][0]["train"] = raw["silos"][0]["valid"] = "${ST_UNSET}/y"
    assert refused(raw)[1:] == ["  silos[0].train and 2 more: the environment variable ST_UNSET is not set; export ST_UNSET=…"]


@pytest.mark.parametrize("path", ["tracking.uri", "storage.root", "model.base", "silos.0.train"])
@pytest.mark.parametrize("by", ["text", "environment"])
def test_credentials_are_refused_and_not_repeated(
    refused: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, path: str, by: str
) -> None:
    monkeypatch.setenv("ST_SECRET", "https://me:hunter2@host/x")
    text = "\n".join(refused(changed(path, "https://me:hunter2@host/x" if by == "text" else "${ST_SECRET}"), check_files=True))
    assert "must not hold a user and password" in text
    assert "hunter2" not in text


# The agreement


def agreement_of(federation: Federation) -> Agreement:
    return federation.agreement("b" * 64, "t" * 64)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("silos.0.train", "elsewhere.jsonl"),
        ("silos.0.storage", "elsewhere"),
        ("silos.0.test", "test.jsonl"),
        ("storage.root", "s3://bucket/x"),
        ("tracking.uri", "http://tracking"),
        ("rounds.total", 100),
        ("rounds.quorum", 3),
        ("rounds.quorum", {"weight": 0.7}),
        ("rounds.on_missing_quorum", "skip"),
        ("rounds.deadline", "30m"),
        ("rounds.min_fraction", 1.0),
        ("rounds.stall", None),
        ("rounds.checkpoint_every", 0),
        ("rounds.rollback", {"max_loss_increase": 0.5}),
        ("rounds.guards.norm_band", None),
        ("storage.retention.updates", 3),
        ("model.base", "./moved/base"),
        ("data.fields", {"prompt": "q", "response": "r"}),
        ("export.merge", True),
    ],
)
def test_free_edits_leave_the_agreement_as_it_is(load: Load, path: str, value: Any) -> None:
    before, after = agreement_of(load(GOOD)), agreement_of(load(changed(path, value)))
    assert before.changes(after) == []
    assert before.digest == after.digest


@pytest.mark.parametrize(
    ("path", "value", "change"),
    [
        ("training.steps", 6, "training.steps"),
        ("training.learning_rate", 2e-3, "training.learning_rate"),
        ("data.max_length", 64, "data.max_length"),
        ("aggregation.weights", "tokens", "aggregation.weights"),
        ("communication.codec", "bfloat16", "communication.codec"),
        ("evaluation.max_examples", 7, "evaluation.max_examples"),
        ("silos.1.training.batch_size", 3, "silos.nci.training.batch_size"),
        ("silos.1.id", "other", "silos.nci"),
        ("security.keys", KEYS, "custody"),
        ("security.keys", KEYS, "keys"),
        ("security.signing", False, "custody"),
    ],
)
def test_amendments_change_the_digest_and_are_allowed(load: Load, path: str, value: Any, change: str) -> None:
    before, after = agreement_of(load(GOOD)), agreement_of(load(changed(path, value)))
    assert any(c.startswith(change) for c in before.changes(after))
    assert before.digest != after.digest
    assert before.forbids(after) == []


@pytest.mark.parametrize(
    ("path", "value", "change"),
    [
        ("name", "other", "federation"),
        ("model.method", "full", "model.method"),
        ("model.lora.r", 5, "model.lora.r"),
        ("model.lora.target_modules", ["q_proj"], "model.lora.target_modules"),
        ("model.dtype", "bfloat16", "model.dtype"),
    ],
)
def test_other_models_make_another_federation(load: Load, path: str, value: Any, change: str) -> None:
    before, after = agreement_of(load(GOOD)), agreement_of(load(changed(path, value)))
    assert change in before.forbids(after)


def test_other_base_or_tokenizer_makes_another_federation(load: Load) -> None:
    federation = load(GOOD)
    before = federation.agreement("b", "t")
    assert before.forbids(federation.agreement("B", "t")) == ["base"]
    assert before.forbids(federation.agreement("b", "T")) == ["tokenizer"]


def test_order_of_silos_and_lora_of_a_full_method_do_not_matter(load: Load) -> None:
    raw = changed("name", "medquad")
    assert agreement_of(load({**raw, "silos": raw["silos"][::-1]})).digest == agreement_of(load(raw)).digest
    full = changed("model.method", "full")
    other = changed("model.method", "full")
    other["model"]["lora"]["r"] = 32
    assert agreement_of(load(full)).digest == agreement_of(load(other)).digest


def test_agreement_round_trip(load: Load) -> None:
    agreement = agreement_of(load(GOOD))
    again = Agreement.decode(agreement.encode())
    assert again == agreement
    assert again.digest == agreement.digest
    assert again.training_of("nci").batch_size == 2
    assert again.training_of("nci").steps == again.training_of("niddk").steps == 5
    assert again.training_of("niddk").batch_size == 8


def test_a_rotated_key_is_an_amendment_that_names_its_party(load: Load) -> None:
    before = agreement_of(load(changed("security.keys", KEYS)))
    after = agreement_of(load(changed("security.keys", KEYS | {"nci": [{"public": KEY, "until": 3}, {"public": OTHER_KEY, "since": 4}]})))
    assert before.changes(after) == ["keys.nci"]
    assert before.forbids(after) == []
    assert Agreement.decode(after.encode()) == after


def test_both_ways_to_write_a_key_are_the_same_terms(load: Load) -> None:
    short, long = (load(changed("security.keys", KEYS | {"nci": nci})) for nci in (KEY, [{"public": KEY}]))
    assert agreement_of(short).digest == agreement_of(long).digest


def test_agreement_names_no_path_of_a_silo(load: Load, tmp_path: Path) -> None:
    text = agreement_of(load(GOOD)).encode().decode()
    assert str(tmp_path) not in text
    assert "s3://" not in text


def test_canonical_json_has_one_byte_string_per_value() -> None:
    assert canonical_json({"b": [1, 2.5, None, True], "a": {"ü": "é"}}) == '{"a":{"ü":"é"},"b":[1,2.5,null,true]}'.encode()
    assert canonical_json({"x": 1, "y": 2}) == canonical_json({"y": 2, "x": 1})
    assert canonical_json([1e-3, 16.0, 1e22]) == b"[0.001,16.0,1e+22]"
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


# The schema for editors


def test_schema_accepts_the_good_file_and_refuses_typos() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(json.dumps(json_schema()))
    jsonschema.validators.validator_for(schema).check_schema(schema)
    jsonschema.validate(changed("name", "medquad"), schema)
    for path, value in (
        ("rounds.quorum", 2),
        ("rounds.quorum", {"weight": 0.7}),
        ("rounds.quorum", {"count": 2, "weight": 1}),
        ("rounds.quorum", None),
        ("rounds.deadline", "1.5h"),
        ("rounds.stall", None),
        ("rounds.rollback", {"max_loss_increase": 0.5}),
        ("security.keys", KEYS),
        ("security.keys", KEYS | {"nci": [{"public": KEY, "until": 6}, {"public": OTHER_KEY, "since": 7}]}),
    ):
        Federation.model_validate(changed(path, value))  # the schema and we agree
        jsonschema.validate(changed(path, value), schema)
    for path, value in (
        ("trainig", {}),
        ("training.steps", "x"),
        ("silos.0.id", "Big"),
        ("silos", []),
        ("rounds.quorum", 0),
        ("rounds.quorum", "2"),
        ("rounds.quorum", True),
        ("rounds.quorum", {"cuont": 2}),
        ("rounds.quorum", {"weight": 1.5}),
        ("rounds.deadline", "0s"),
        ("rounds.deadline", "soon"),
        ("rounds.guards.norm_bnad", 3),
        ("security.keys", KEYS | {"nci": []}),
        ("security.keys", KEYS | {"nci": 3}),
        ("security.keys", KEYS | {"nci": "ed25519:short"}),
        ("security.keys", KEYS | {"nci": [{"pulbic": KEY}]}),
        ("security.keys", KEYS | {"nci": [{"public": "x"}]}),
    ):
        with pytest.raises(ValueError, match="validation error"):
            Federation.model_validate(changed(path, value))
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(changed(path, value), schema)


def test_schema_describes_every_setting() -> None:
    schema = json_schema()
    settings = [(f"{section}.{key}", value) for section, about in schema["$defs"].items() for key, value in about["properties"].items()]
    assert len(settings) > 40
    assert [name for name, value in settings if not value.get("description")] == []
    assert all(about.get("description") for about in schema["$defs"].values())
