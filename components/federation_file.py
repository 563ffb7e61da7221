"""The federation file as it stands on disk: YAML in, one mapping out, and every problem in words.

Here is what needs no model of the file: strict YAML, ``${NAME}`` from the environment, paths made absolute, rules between parts, and a
pydantic error told as path, rule, value got and cure. What the file may say is in `federation`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel

from silotune.components.errors import FederationError
from silotune.components.terms import privacy as privacy_terms
from silotune.components.terms import strategies
from silotune.components.terms.training import FIELDS, renames

try:  # libyaml's, ten times as fast: a file with a thousand silos is read by each of a round's boxes
    from yaml import CSafeLoader as SafeLoader
except ImportError:
    from yaml import SafeLoader  # type: ignore[assignment]

PATH_FIELDS = ("train", "valid", "test", "storage")
STORE_ROOT = "./.silotune/store"
TRACKING_URI = "sqlite:///./.silotune/mlflow.db"
DURATION = r"^([0-9]*[1-9][0-9]*(\.[0-9]+)?|0+\.[0-9]*[1-9][0-9]*)(s|m|h)$"
PUBLIC_KEY = r"^ed25519:[A-Za-z0-9+/]{43}=$"
KUBERNETES_NAME = r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"
QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"
HTTP_URL = r"^https?://[^\s/@?#]+(/[^\s@?#]*)?$"
PATTERNS = {
    KUBERNETES_NAME: "a Kubernetes name: lower-case letters, digits, inner dashes and dots",
    QUANTITY: "a Kubernetes quantity, such as 500m, 4 or 16Gi",
    r"^/": "an absolute path",
    HTTP_URL: "an address of http:// or https://, without a user or a query",
    DURATION: "a number above 0 and s, m or h, such as 30m",
    PUBLIC_KEY: "ed25519: and 44 characters, as `silotune keys new` prints them",
}
DEEPEST = 32  # levels of YAML; a file has six
COORDINATOR = "coordinator"  # the party that is no silo


def is_remote(location: str) -> bool:
    return location.startswith("s3://")


class _Yaml(SafeLoader):
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


NEW = "`silotune new DIR` writes one to start from"


def parse(path: Path, kind: str = "federation", keys: str = "name, model and silos", cure: str = NEW) -> dict[str, Any]:
    """The mapping in a YAML file. Raises FederationError where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
        _require_shallow(text)
        raw = yaml.load(text, _Yaml)  # noqa: S506 (_Yaml is a SafeLoader)
    except FileNotFoundError:
        raise FederationError(f"{path}: no such {kind} file; {cure}") from None
    except IsADirectoryError:
        inside = path / f"{kind}.yaml"
        raise FederationError(f"{path}: is a folder; name the {kind} file in it" + (f", {inside}" if inside.is_file() else "")) from None
    except UnicodeDecodeError as error:
        raise FederationError(f"{path.name}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise FederationError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise FederationError(f"{path.name}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(raw, dict):
        raise FederationError(f"{path.name}: must hold keys such as {keys}, got {'nothing' if raw is None else f'a {type(raw).__name__}'}")
    return raw


def _require_shallow(text: str) -> None:
    """Raises YAMLError where collections lie in one another without end: their loader goes down into each, and would run out of stack."""
    depth = 0
    for event in yaml.parse(text, SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            rule = f"lists and mappings must not lie in one another more than {DEEPEST} deep"
            raise yaml.constructor.ConstructorError(None, None, rule, event.start_mark)  # type: ignore[arg-type]  # libyaml marks places, too


def resolve(raw: dict[str, Any], folder: Path, problems: list[str]) -> None:
    """Substitute environment variables and make paths absolute, in place, wherever the value has the shape expected."""

    def at(holder: Any, key: str, where: str, kind: str) -> None:
        value = holder.get(key) if isinstance(holder, dict) else None
        if not isinstance(value, str):
            return
        value = _substitute(value, where, unset)
        if not value.strip():
            problems.append(f"{where}: must not be empty, got {holder[key]!r}; give a path, or leave the key out")
            return
        if re.search(r"://[^/@\s]+:[^/@\s]+@", value):
            problems.append(f"{where}: must not hold a user and password; give them in the environment and remove them here")
            value = re.sub(r"://[^/@\s]+@", "://", value)
        holder[key] = _locate(value, folder, kind)

    unset: dict[str, list[str]] = {}  # variable -> where it is asked for
    model, storage, tracking = (raw.get(k) for k in ("model", "storage", "tracking"))
    at(model, "base", "model.base", "base")
    if storage is None:
        storage = raw["storage"] = {}
    if tracking is None:
        tracking = raw["tracking"] = {}
    if isinstance(storage, dict):
        storage.setdefault("root", STORE_ROOT)
        at(storage, "root", "storage.root", "path")
    if isinstance(tracking, dict):
        tracking.setdefault("uri", TRACKING_URI)
        at(tracking, "uri", "tracking.uri", "uri")
    for i, silo in _silos(raw):
        silo.setdefault("storage", f"./.silotune-private/{silo.get('id', i)}")
        for key in PATH_FIELDS:
            at(silo, key, f"silos[{i}].{key}", "path")
    for name, places in unset.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        problems.append(f"{places[0]}{more}: the environment variable {name} is not set; export {name}=…")


def _silos(raw: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    silos = raw.get("silos")
    yield from ((i, s) for i, s in enumerate(silos if isinstance(silos, list) else []) if isinstance(s, dict))


def _substitute(value: str, where: str, unset: dict[str, list[str]]) -> str:
    def variable(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        got = os.environ.get(name) or default if default is not None else os.environ.get(name)  # as in a shell: empty counts as unset
        if got is None:
            unset.setdefault(name, []).append(where)
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


def explain(error: Any, model: type[BaseModel], patterns: Mapping[str, str] = PATTERNS) -> str:
    """One pydantic error of ``model`` as: path, rule, value got, cure.

    Args:
        patterns: what a text must look like, in words.
    """
    where = _where(error["loc"])
    kind, got = error["type"], error.get("input")
    if kind == "missing":
        return f"{where}: is required; add it"
    if kind == "extra_forbidden":
        known = _known_keys(error["loc"][:-1], model)
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        return f"{where}: unknown key; " + (f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}")
    rule = {"model_type": "must hold keys and values", "model_attributes_type": "must hold keys and values"}.get(kind)
    rule = rule or error["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if kind == "string_type":
        cure = "; put it in quotes" if isinstance(got, bool | int | float) else ""
        return f"{where}: must be text, got {'nothing' if got is None else repr(got)}{cure}"
    if kind == "too_short":
        rule = "must not be empty"
    if kind == "string_pattern_mismatch":
        rule = f"must be {patterns.get(error['ctx']['pattern'], 'lower-case letters, digits and inner dashes, at most 40')}"
    shown = "" if isinstance(got, dict) else f", got {got!r}"
    return f"{where}: {rule}{shown}"


def _where(loc: tuple[int | str, ...]) -> str:
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not part.startswith(("list[", "literal[", "function-", "[key]")):
            text += f".{part}" if text else part
    return text or "the file"


def _known_keys(loc: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    section: Any = model
    for part in loc:
        if get_origin(section) is dict:  # its keys are the file's own; what they hold is the section
            section = _section(get_args(section)[1])
        elif not isinstance(part, int):
            section = _section(section.model_fields[part].annotation)
    return list(section.model_fields)


def _section(annotation: Any) -> Any:
    """The model, or the mapping, that an annotation such as ``list[Silo]`` or ``Quorum | None`` holds."""
    if get_origin(annotation) is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return annotation
    return next((found for a in get_args(annotation) if (found := _section(a)) is not None), None)


def contradictions(raw: dict[str, Any]) -> list[str]:
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
    problems += _field_contradictions(raw)
    problems += _key_contradictions(raw)
    problems += strategies.conflicts(raw)
    problems += privacy_terms.conflicts(raw)
    export = raw.get("export")
    if isinstance(export, dict) and export.get("max_exposure") is not None and not any(silo.get("canaries") for _, silo in _silos(raw)):
        problems.append(
            "export.max_exposure: needs silos with canaries, by which it is measured, got none; set silos[…].canaries, or remove it"
        )
    rounds = raw.get("rounds")
    quorum, where = rounds.get("quorum") if isinstance(rounds, dict) else None, "rounds.quorum"
    if isinstance(quorum, dict):
        quorum, where = quorum.get("count"), "rounds.quorum.count"
    silos = raw.get("silos")
    if isinstance(quorum, int) and isinstance(silos, list) and quorum > len(silos):
        problems.append(f"{where}: must be at most the number of silos, {len(silos)}, got {quorum}; lower it or add silos")
    return problems


def _field_contradictions(raw: dict[str, Any]) -> list[str]:
    data = raw.get("data")
    kind = data.get("format", "prompt-response") if isinstance(data, dict) else "prompt-response"
    if kind not in FIELDS:
        return []
    own = ((i, silo["fields"]) for i, silo in _silos(raw) if isinstance(silo.get("fields"), dict))
    return [f"silos[{i}]: {problem}" for i, fields in own if (problem := renames(map(str, fields), kind))]


def _key_contradictions(raw: dict[str, Any]) -> list[str]:
    ids = [silo.get("id") for _, silo in _silos(raw)]
    problems = []
    if COORDINATOR in ids:
        problems.append(f"silos[{ids.index(COORDINATOR)}].id: {COORDINATOR!r} is the name of the other party; give the silo another")
    security = raw.get("security")
    keys = security.get("keys") if isinstance(security, dict) else None
    if not isinstance(keys, dict) or not keys:
        return problems
    parties = [COORDINATOR, *(i for i in ids if isinstance(i, str))]
    missing = [p for p in parties if p not in keys]
    problems += [f"security.keys.{p}: is required where others have keys; add what `silotune keys new {p}` prints" for p in missing]
    unknown = [k for k in keys if k not in parties]
    problems += [f"security.keys.{k}: is neither {COORDINATOR} nor a silo's id; correct or remove it" for k in unknown]
    owner: dict[str, str] = {}
    for party, its in keys.items():
        entries = its if isinstance(its, list) else [its]
        for public in {e.get("public") if isinstance(e, dict) else e for e in entries} - {None}:
            if isinstance(public, str) and owner.setdefault(public, party) != party:
                problems.append(f"security.keys.{party}: must be the party's own, is also {owner[public]}'s; make a new one")
    return problems


def missing_files(raw: dict[str, Any]) -> list[str]:
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
