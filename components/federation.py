"""The agreement: one YAML file that says who takes part, on what model, under which terms.

`Federation.load` turns the file into frozen, validated objects, or raises one `FederationError` that lists *every* problem with its path
in the file (``silos[1].train``), the value got and the cure. Paths become absolute, relative ones from the file's folder; ``${NAME}`` and
``${NAME:-default}`` are taken from the environment in paths and endpoints only. Secrets never stand in the file.

The `Agreement` is the part of it that silos consent to; its SHA-256 names it everywhere. Three kinds of edit follow from it:

    free            paths, storage, tracking, round counts: at any time
    an amendment    silos, training, data terms, aggregation, codec: from the next open round on
    a new federation: base model, method, adapter shape: needs another name or another storage root

This module imports nothing heavy: `silotune check` and every pipeline task start with it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from silotune.components.errors import FederationError

SILO_ID = r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$"
PATH_FIELDS = ("train", "valid", "test", "storage")

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """One part of the file: frozen, strictly typed, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Lora(Section):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): the update of a weight is (alpha / r) · B·A."""

    r: Positive = Field(8, description="Rank of the adapters.")
    alpha: float = Field(16.0, gt=0, allow_inf_nan=False, description="Scaling: an adapter counts alpha / r times.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter, in training only.")
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="Names of the layers that get adapters, or `all-linear` for every linear layer but the output."
    )


class Model(Section):
    """What is fine-tuned."""

    base: str = Field(description="A local folder, `s3://bucket/prefix`, or a Hugging Face id (`org/name`, `org/name@revision`).")
    method: Literal["lora", "full"] = Field("lora", description="Train adapters, or every weight.")
    lora: Lora = Field(default_factory=Lora, description="Shape of the adapters; unused with `method: full`.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type the frozen base weights are held in (trained weights: float32)."
    )


class Data(Section):
    """How records become examples; the same in every silo."""

    format: Literal["prompt-response", "chat", "text"] = Field(
        "prompt-response", description="`prompt-response` and `chat` learn from responses only, `text` from every token."
    )
    template: str = Field(
        "Question: {prompt}\nAnswer: {response}",
        description="Layout of a prompt-response example; ends with `{response}`. `chat` uses the tokenizer's chat template instead.",
    )
    fields: dict[str, str] = Field(
        default_factory=dict, description="Columns that are named otherwise in the files: `{prompt: question, response: answer}`."
    )
    max_length: Annotated[int, Field(ge=8)] = Field(512, description="Tokens per example at most.")
    long_examples: Literal["truncate", "drop"] = Field(
        "truncate", description="What happens to a longer example; `text` is cut into several examples instead of being truncated."
    )
    valid_fraction: Fraction = Field(0.05, description="Share of train set aside, by seed, where a silo names no `valid`.")

    @model_validator(mode="after")
    def _template_has_places(self) -> Data:
        if self.template != "chat" and (self.template.count("{prompt}") != 1 or not self.template.endswith("{response}")):
            raise ValueError("template must hold {prompt} once and end with {response}, or be 'chat'")
        known = {"prompt-response": {"prompt", "response"}, "chat": {"messages"}, "text": {"text"}}[self.format]
        if unknown := sorted(set(self.fields) - known):
            raise ValueError(f"fields may rename {', '.join(sorted(known))} for format {self.format!r}, not {', '.join(unknown)}")
        return self


class Training(Section):
    """Local training, the same in every silo unless a silo overrides it."""

    steps: Positive = Field(50, description="Optimiser steps per silo and round.")
    batch_size: Positive = Field(8, description="Examples per optimiser step.")
    accumulation: Positive = Field(1, description="Parts a step is split into to save memory; the gradient is the same.")
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False, description="Peak rate of AdamW.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Course of the rate within a round, after warm-up.")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="Steps at the start of every round in which the rate climbs.")
    round_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Course of the peak rate over `rounds.total` rounds; the plan of a round records its rate."
    )
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="Decoupled weight decay of AdamW.")
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False, description="L2 norm that a step's gradient is clipped to.")
    packing: bool = Field(
        True, description="Lay short examples of a batch side by side in one row, unable to see each other; saves padding."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations instead of keeping them.")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="`auto`: bfloat16 where a GPU has it, else float32.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(17, description="Seeds data order and initialisation; never noise or masks.")


class SiloTraining(Section):
    """What one silo may train differently from the others."""

    steps: Positive | None = Field(None, description="Instead of `training.steps`.")
    batch_size: Positive | None = Field(None, description="Instead of `training.batch_size`.")
    accumulation: Positive | None = Field(None, description="Instead of `training.accumulation`.")
    gradient_checkpointing: bool | None = Field(None, description="Instead of `training.gradient_checkpointing`.")


class Silo(Section):
    """One organisation, and where *it* keeps its records. Its paths are read on its side only."""

    id: str = Field(pattern=SILO_ID, description="Lower-case letters, digits and inner dashes, 40 at most.")
    train: str = Field(description="jsonl, csv, parquet, a folder of .txt files, or `s3://` with one of these.")
    valid: str | None = Field(None, description="Steers the run (convergence, best round). Default: a seeded part of train.")
    test: str | None = Field(None, description="Read by the evaluate box only.")
    storage: str = Field("", description="The silo's own folder: token shards, logs. Default `.silotune-private/<id>`.")
    training: SiloTraining = Field(default_factory=SiloTraining, description="Overrides for this silo.")


class Until(Section):
    """Convergence: stop when the pooled validation metric has not improved for a while."""

    metric: Literal["loss", "perplexity", "token_accuracy"] = Field("loss", description="Pooled over silos, by tokens.")
    patience: Positive = Field(3, description="Rounds without improvement before stopping.")
    min_delta: float = Field(0.0, ge=0, allow_inf_nan=False, description="Change that counts as improvement.")


class Rounds(Section):
    """How long a federation goes on and how many silos make a round."""

    total: Positive = Field(10, description="Rounds of the whole federation, over all runs.")
    per_run: Positive | None = Field(None, description="Rounds one pipeline run works on; default: all that are left.")
    quorum: Positive | None = Field(None, description="Silos that must deliver for a round to be committed; default: more than half.")
    until: Until | None = Field(None, description="Stop early when converged.")


class Aggregation(Section):
    """How updates become the next global model."""

    strategy: Literal["fedavg"] = Field("fedavg", description="FedAvg (McMahan et al. 2017, arXiv:1602.05629).")
    weights: Literal["examples", "tokens"] = Field(
        "examples", description="An update counts by the examples, or response tokens, it has seen."
    )


class Evaluation(Section):
    """How the global model is judged in each silo."""

    max_examples: Positive | None = Field(
        None, description="At most so many valid examples per silo, chosen by seed; default: all. Test is always scored whole."
    )
    batch_size: Positive = Field(16, description="Examples per forward pass.")


class Export(Section):
    """What comes out."""

    select: Literal["best", "last"] = Field("best", description="The round with the best pooled validation loss, or the last one.")
    merge: bool = Field(False, description="Merge LoRA adapters into the base and export a full model.")


class Communication(Section):
    """What updates look like on the wire."""

    codec: Literal["float32", "bfloat16"] = Field("float32", description="Number format of update tensors; bfloat16 halves the bytes.")


class Storage(Section):
    """Where rounds, updates and globals live: what all parties can reach."""

    root: str = Field("./.silotune/store", description="A folder, or `s3://bucket/prefix` (endpoint: AWS_ENDPOINT_URL).")


class Tracking(Section):
    """MLflow."""

    uri: str = Field("sqlite:///./.silotune/mlflow.db", description="Tracking server, SQLite file, or `none`.")
    experiment: str | None = Field(None, description="Experiment name; default: the federation's name.")


class Federation(Section):
    """A whole federation file. `Federation.load` reads one."""

    name: str = Field(pattern=SILO_ID, description="Names the federation in the store and in MLflow.")
    model: Model
    data: Data = Field(default_factory=Data)
    silos: list[Silo] = Field(min_length=1, description="The organisations that take part.")
    rounds: Rounds = Field(default_factory=Rounds)
    training: Training = Field(default_factory=Training)
    aggregation: Aggregation = Field(default_factory=Aggregation)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    export: Export = Field(default_factory=Export)
    communication: Communication = Field(default_factory=Communication)
    storage: Storage = Field(default_factory=Storage)
    tracking: Tracking = Field(default_factory=Tracking)
    _file: Path = PrivateAttr(default=Path("federation.yaml"))

    @classmethod
    def load(cls, file: str | Path, *, check_files: bool = False) -> Federation:
        """Read, resolve and validate a federation file.

        Args:
            file: the YAML file.
            check_files: also require that every local file and folder it names exists (the coordinator of a
                cluster cannot see the silos' files, so only commands on one machine ask for it).

        Raises:
            FederationError: with every problem found.
        """
        path = Path(file).absolute()
        raw = _parse(path)
        problems: list[str] = []
        _resolve(raw, path.parent, problems)
        federation = None
        try:
            federation = cls.model_validate(raw)
        except ValidationError as error:
            problems += [_explain(e) for e in error.errors(include_url=False)]
        problems += _contradictions(raw)
        if check_files:
            problems += _missing_files(raw)
        if problems or federation is None:
            count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            raise FederationError("\n".join([f"{path.name}: {count}", *(f"  {p}" for p in problems)]))
        federation._file = path
        return federation

    @property
    def file(self) -> Path:
        return self._file

    @property
    def work(self) -> Path:
        """The coordinator's own folder on this machine: run logs, caches, by default also store and tracking."""
        return self._file.parent / ".silotune"

    @property
    def silo_ids(self) -> list[str]:
        return sorted(s.id for s in self.silos)

    @property
    def quorum(self) -> int:
        """Silos that must deliver; by default more than half of them."""
        return self.rounds.quorum or len(self.silos) // 2 + 1

    def silo(self, silo_id: str) -> Silo:
        for silo in self.silos:
            if silo.id == silo_id:
                return silo
        raise FederationError(f"silo {silo_id!r} is not in federation {self.name!r}; it has {', '.join(self.silo_ids)}")

    def agreement(self, base: str, tokenizer: str) -> Agreement:
        """The terms of this file for a base model of content digest ``base`` and tokenizer digest ``tokenizer``."""
        model = self.model.model_dump(exclude={"base"})
        if self.model.method == "full":
            model.pop("lora")
        return Agreement(
            federation=self.name,
            base=base,
            tokenizer=tokenizer,
            model=model,
            data=self.data.model_dump(exclude={"fields"}),
            silos={s.id: {"training": s.training.model_dump(exclude_none=True)} for s in sorted(self.silos, key=lambda s: s.id)},
            training=self.training,
            aggregation=self.aggregation,
            evaluation=self.evaluation,
            communication=self.communication,
        )


class Agreement(Section):
    """What the silos agree on; the digest of its canonical JSON names it in plans, updates and commits."""

    format: Literal[1] = 1
    federation: str
    base: str = Field(description="SHA-256 over the base model's files.")
    tokenizer: str = Field(description="SHA-256 over the tokenizer's files.")
    model: dict[str, Any]
    data: dict[str, Any]
    silos: dict[str, dict[str, Any]]
    training: Training
    aggregation: Aggregation
    evaluation: Evaluation
    communication: Communication

    def encode(self) -> bytes:
        return canonical_json(self.model_dump())

    @classmethod
    def decode(cls, data: bytes) -> Agreement:
        return cls.model_validate_json(data)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.encode()).hexdigest()

    def training_of(self, silo_id: str) -> Training:
        """Training terms of one silo: the federation's with the silo's own overrides."""
        return self.training.model_copy(update=self.silos[silo_id]["training"])

    def changes(self, new: Agreement) -> list[str]:
        """Paths of all terms in which ``new`` differs, such as ``training.learning_rate``."""
        return list(_differences(self.model_dump(), new.model_dump(), ""))

    def forbids(self, new: Agreement) -> list[str]:
        """The changes among these that make a new federation rather than an amendment: base, tokenizer and model shape."""
        return [c for c in self.changes(new) if c.split(".")[0] in ("federation", "base", "tokenizer", "model", "format")]


def canonical_json(value: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces, UTF-8, no NaN (ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def json_schema() -> dict[str, Any]:
    """JSON Schema of the federation file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Federation.model_json_schema()}


def is_remote(location: str) -> bool:
    return location.startswith("s3://")


class _Yaml(yaml.SafeLoader):
    """YAML with 1e-3 as a number (YAML 1.2) and repeated keys refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # <<: *anchor; what it brings may be repeated, that is its purpose
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word, not a list or mapping", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice; keep one", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


def _parse(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Yaml)  # noqa: S506 (_Yaml is a SafeLoader)
    except FileNotFoundError:
        raise FederationError(f"{path}: no such federation file; `silotune new DIR` writes one to start from") from None
    except IsADirectoryError:
        raise FederationError(f"{path}: is a folder; name the federation file in it") from None
    except UnicodeDecodeError as error:
        raise FederationError(f"{path.name}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise FederationError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise FederationError(f"{path.name}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(raw, dict):
        raise FederationError(f"{path.name}: must hold keys such as name, model and silos, got {type(raw).__name__}")
    return raw


def _resolve(raw: dict[str, Any], folder: Path, problems: list[str]) -> None:
    """Substitute environment variables and make paths absolute, in place, wherever the value has the shape expected."""

    def at(holder: Any, key: str, where: str, kind: str) -> None:
        value = holder.get(key) if isinstance(holder, dict) else None
        if not isinstance(value, str):
            return
        value = _substitute(value, where, problems)
        if not value.strip():
            problems.append(f"{where}: must not be empty, got {holder[key]!r}; give a path, or leave the key out")
            return
        if re.search(r"://[^/@\s]+:[^/@\s]+@", value):
            problems.append(f"{where}: must not hold a user and password; give them in the environment and remove them here")
            value = re.sub(r"://[^/@\s]+@", "://", value)
        holder[key] = _locate(value, folder, kind)

    model, storage, tracking = (raw.get(k) for k in ("model", "storage", "tracking"))
    at(model, "base", "model.base", "base")
    if storage is None:
        storage = raw["storage"] = {}
    if tracking is None:
        tracking = raw["tracking"] = {}
    if isinstance(storage, dict):
        storage.setdefault("root", Storage.model_fields["root"].default)
        at(storage, "root", "storage.root", "path")
    if isinstance(tracking, dict):
        tracking.setdefault("uri", Tracking.model_fields["uri"].default)
        at(tracking, "uri", "tracking.uri", "uri")
    for i, silo in _silos(raw):
        silo.setdefault("storage", f"./.silotune-private/{silo.get('id', i)}")
        for key in PATH_FIELDS:
            at(silo, key, f"silos[{i}].{key}", "path")


def _silos(raw: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    silos = raw.get("silos")
    yield from ((i, s) for i, s in enumerate(silos if isinstance(silos, list) else []) if isinstance(s, dict))


def _substitute(value: str, where: str, problems: list[str]) -> str:
    def variable(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        got = os.environ.get(name) or default if default is not None else os.environ.get(name)  # as in a shell: empty counts as unset
        if got is None:
            problems.append(f"{where}: the environment variable {name} is not set, got {value!r}; export {name}=…")
            return match[0]
        return got

    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", variable, value)


def _locate(value: str, folder: Path, kind: str) -> str:
    if is_remote(value):
        return value.rstrip("/")
    if kind == "uri":
        if value.startswith("sqlite:///"):
            return f"sqlite:///{_absolute(value.removeprefix('sqlite:///'), folder)}"
        return value if "://" in value or value == "none" else _absolute(value, folder)
    if kind == "base" and not value.startswith((".", "/", "~")) and not (folder / value).exists():
        return value  # a Hugging Face id
    return _absolute(value, folder)


def _absolute(value: str, folder: Path) -> str:
    return os.path.normpath(folder / Path(value).expanduser())


def _explain(error: Any) -> str:
    """One pydantic error as: path, rule, value got, cure."""
    where = _where(error["loc"])
    kind, got = error["type"], error.get("input")
    if kind == "missing":
        return f"{where}: is required; add it"
    if kind == "extra_forbidden":
        known = _known_keys(error["loc"][:-1])
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        return f"{where}: unknown key; " + (f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}")
    rule = {"model_type": "must hold keys and values", "model_attributes_type": "must hold keys and values"}.get(kind)
    rule = rule or error["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if kind == "string_pattern_mismatch":
        rule = "must be lower-case letters, digits and inner dashes, at most 40"
    shown = "" if isinstance(got, dict) else f", got {got!r}"
    return f"{where}: {rule}{shown}"


def _where(loc: tuple[int | str, ...]) -> str:
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not part.startswith(("list[", "literal[", "function-")):
            text += f".{part}" if text else part
    return text or "the file"


def _known_keys(loc: tuple[int | str, ...]) -> list[str]:
    section: Any = Federation
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, Section))
    return list(section.model_fields)


def _contradictions(raw: dict[str, Any]) -> list[str]:
    """Rules that hold between parts, checked on raw values so that they are told together with all others."""
    problems = []
    first: dict[Any, int] = {}
    homes: dict[str, int] = {}
    for i, silo in _silos(raw):
        if (name := silo.get("id")) is not None and isinstance(name, str):
            if name in first:
                problems.append(f"silos[{i}].id: must be unique, got {name!r} as in silos[{first[name]}]; rename one")
            elif isinstance(home := silo.get("storage"), str) and home in homes:
                problems.append(
                    f"silos[{i}].storage: must be the silo's own, got {home!r} as in silos[{homes[home]}]; give each silo its own"
                )
            first.setdefault(name, i)
        homes.setdefault(str(silo.get("storage")), i)
    rounds = raw.get("rounds")
    quorum = rounds.get("quorum") if isinstance(rounds, dict) else None
    silos = raw.get("silos")
    if isinstance(quorum, int) and isinstance(silos, list) and quorum > len(silos):
        problems.append(f"rounds.quorum: must be at most the number of silos, {len(silos)}, got {quorum}; lower it or add silos")
    return problems


def _missing_files(raw: dict[str, Any]) -> list[str]:
    problems = []
    model = raw.get("model")
    base = model.get("base") if isinstance(model, dict) else None
    if isinstance(base, str) and base.startswith("/"):
        if not Path(base).is_dir():
            problems.append(f"model.base: no such folder, got {base!r}; give a model folder or a Hugging Face id")
        elif not (Path(base) / "config.json").is_file():
            problems.append(f"model.base: has no config.json, got {base!r}; give a folder saved by save_pretrained")
    for i, silo in _silos(raw):
        for key in ("train", "valid", "test"):
            value = silo.get(key)
            if isinstance(value, str) and "${" not in value and not is_remote(value) and not Path(value).exists():
                problems.append(f"silos[{i}].{key}: no such file, got {value!r}; correct the path")
    return problems


def _differences(old: Any, new: Any, where: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        yield where
