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
    assert federation.quorum == 1
    assert federation.storage.root == f"{tmp_path}/.silotune/store"
    assert federation.tracking.uri == f"sqlite:///{tmp_path}/.silotune/mlflow.db"


def test_a_base_that_is_a_folder_beside_the_file_is_that_folder(load: Load, tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert load(MINIMAL).model.base == f"{tmp_path}/org/name"


@pytest.mark.parametrize(("silos", "quorum"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)])
def test_quorum_is_more_than_half_by_default(load: Load, silos: int, quorum: int) -> None:
    assert load(changed("silos", [{"id": f"s{i}", "train": "x"} for i in range(silos)], MINIMAL)).quorum == quorum


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
        ("silos.1.train", 7, "silos[1].train: must be a valid string, got 7"),
        ("silos.1.storage", ["x"], "silos[1].storage: must be a valid string, got ['x']"),
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
        ("rounds.quorum", 0, "rounds.quorum: must be greater than or equal to 1, got 0"),
        ("data.template", "{response}", "data: template must hold {prompt} once and end with {response}, or be 'chat'"),
        ("data.template", "{prompt}{response}.", "data: template must hold"),
        ("data.fields", {"text": "x"}, "data: fields may rename prompt, response for format 'prompt-response', not text"),
        ("data.valid_fraction", 1.0, "data.valid_fraction: must be less than 1, got 1.0"),
        ("model.lora.target_modules", "q_proj", "model.lora.target_modules: must be 'all-linear', got 'q_proj'"),
        ("model.lora.target_modules", [1], "model.lora.target_modules[0]: must be a valid string, got 1"),
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
        ("name: !!python/object/apply:os.getcwd []\n", "federation.yaml:1:7: not valid YAML"),
        ("", "federation.yaml: must hold keys such as name, model and silos, got NoneType"),
        ("- a\n", "federation.yaml: must hold keys such as name, model and silos, got list"),
    ],
)
def test_yaml_errors_name_the_line(refused: Callable[..., list[str]], text: str, where: str) -> None:
    assert refused(text)[0].startswith(where)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(FederationError, match=r"f\.yaml: not UTF-8 text \(byte 6\)"):
        Federation.load(tmp_path / "f.yaml")


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
    for path, value in (("trainig", {}), ("training.steps", "x"), ("silos.0.id", "Big"), ("silos", [])):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(changed(path, value), schema)


def test_schema_describes_every_setting() -> None:
    schema = json_schema()
    settings = [(f"{section}.{key}", value) for section, about in schema["$defs"].items() for key, value in about["properties"].items()]
    assert len(settings) > 40
    assert [name for name, value in settings if not value.get("description")] == []
    assert all(about.get("description") for about in schema["$defs"].values())
