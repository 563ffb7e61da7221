"""docs/federation.md and docs/policy.md from the models of components/federation.py and policy.py, so that they cannot say anything else than they do.

python docs/reference.py

What kind of edit a key is, is tried out and not written down: a small federation is changed in that key alone, and the two agreements are
compared as `silotune check` compares them.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from silotune.components.federation import Federation, json_schema
from silotune.components.federation_file import DURATION
from silotune.components.steward import admission, policy

FILE = Path(__file__).with_name("federation.md")
POLICY_FILE = Path(__file__).with_name("policy.md")

HEAD = """\
<!-- Written by `make docs` from components/federation.py; edits here are lost. -->

# The federation file

One YAML file says who takes part, on what model, under which terms. `silotune new DIR` writes one to start from,
`silotune check FILE` tells everything that is wrong with one, and `silotune schema` prints its JSON Schema for your editor.

```yaml
name: clinics
model:
  base: ./models/base
  lora: {r: 8, target_modules: [q_proj, v_proj]}
silos:
  - id: north
    train: ./data/north/train.jsonl
  - id: south
    train: ./data/south/train.jsonl
```

That is a whole file: everything else has a default.

- Unknown keys are errors. All errors are told together, each with its place in the file.
- Relative paths count from the file's folder. They are those of the machine that uses them: a silo's paths are read in the silo.
- `${NAME}` and `${NAME:-default}` are taken from the environment, in `model.base`, `storage.root`, `tracking.uri` and a silo's paths.
- Secrets do not stand in the file. Credentials come from the environment; a user and password in an address are refused.
- Silo ids are unique and none is `coordinator`, every silo has a `storage` of its own, and `rounds.quorum` asks for no more silos than there are.
- Times are a number above 0 and `s`, `m` or `h`: `90s`, `30m`, `1.5h`.
- `security.keys` names the coordinator and every silo, or nobody.

## Three kinds of edit

The silos agree on a part of the file. Its digest, together with the contents of the base model and of its tokenizer, names the
agreement in every round. What an edit means follows from it, and `silotune check FILE` says it for your file:

| kind | what happens |
|---|---|
| free | Holds at once. Make it between runs: a run that is going may take it up midway. |
| amendment | Holds from the next round on. A round that is open under the old terms is closed without a result, and its updates are dropped. |
| new federation | Refused for a federation that has rounds. Give it another `name` or another `storage.root`. |

A silo trains only on the terms of its own copy of the file. After an amendment all copies must say the same, or the silo's status is
`refused: terms differ`. Do not amend while a run is going.
"""

POLICY_HEAD = """\
<!-- Written by `make docs` from components/steward/policy.py; edits here are lost. -->

# A silo's policy

`policy.yaml` says what a silo's steward allows to be done with its records, whatever a coordinator asks. It is the silo's own: a
coordinator may draft it, and neither sets nor sees it. `silotune policy new FILE --silo SILO` writes one to start from.

```yaml
dataset: discharge-letters
strategies: [fedavg, ffa]
privacy:
  unit: person
  epsilon: {run: 3.0, total: 10.0, delta: 1e-6}
min_participants: 3
expires: 2027-12-31
```

It lies in the silo's `storage`; in a Job, beside `federation.yaml` in the silo's ConfigMap `silotune-federation`; or where SILOTUNE_POLICY names a
file, or a folder that holds `policy.yaml`. All boxes of the silo read it anew each time. They insist on it before a record is read, and before an
update leaves: a stricter policy holds at once, also for a round that is being trained. A rule that is left out restricts nothing. Unknown keys are
errors, and all errors are told together. What cannot be read, or what everybody on the machine may write, allows nothing (`policy is wrong`).

What is against it is `refused`, exit code 4, and the round goes on without the silo. The others learn the rule and nothing else:

`RULES`

| refused because of | means |
|---|---|
| `policy: gone` | a policy has held here and is missing; put it back, or remove `policy.held` in the silo's `storage` as well |
| `budget` | the ledger has no room for this training |
| `ledger damaged` | an entry was altered or is gone; see [operations.md](operations.md#for-a-silos-steward) |
| `output control` | the update held something that the plan does not ask for, or that its coordinator would refuse; nothing was sent |
"""

NOTES = {
    "name": "Another name is another federation, which begins anew.",
    "model.base": "The path is free, its contents are not: other weights or another tokenizer make a new federation.",
    "silos.id": "A silo joins or leaves.",
    "aggregation.strategy": "To or from `fed-sb`: a new federation.",
    "rounds.total": "An amendment where privacy is promised and `privacy.rounds` is not given.",
    "storage.root": "Copy what is there along; an empty store is a federation that begins anew.",
    "export.merge": "No effect with `method: full`.",
    "security.keys": "Rotating a key, too, is an amendment.",
}
DEFAULTS = {"silos.storage": "`.silotune-private/<id>`", "security.keys": "unset", "aggregation.strategy": "`product` or `fedavg`"}
ENTRIES = {"silos": "silos[]", "security.keys": "security.keys.PARTY[]"}  # lists and mappings of sections, and what an entry is called


def text() -> str:
    """The whole page about the federation file."""
    return _page(HEAD, json_schema(), ["key", "type", "default", "meaning", "edit"])


def policy_text() -> str:
    """The whole page about the policy."""
    reasons = dict.fromkeys(re.findall(r'Verdict\(\s*"([a-z ]+)"', inspect.getsource(admission)))
    said = ", ".join(f"`policy: {reason}`" for reason in reasons)
    return _page(POLICY_HEAD.replace("`RULES`", said), policy.Policy.model_json_schema(), ["key", "type", "default", "meaning"])


def _page(head: str, schema: dict[str, Any], columns: list[str]) -> str:
    page = [head]
    for where, model in _sections(schema, "", schema):
        page += [f"## {_title(where)}\n", *_intro(model), f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for key, about in model["properties"].items():
            path = f"{where}.{key}" if where else key
            page.append("| " + " | ".join(_row(schema, model, path, key, about, edits="edit" in columns)) + " |")
        page.append("")
    return "\n".join(page).rstrip() + "\n"


def _sections(schema: dict[str, Any], where: str, model: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield where, model
    for key, about in model["properties"].items():
        if found := _section(schema, about):
            yield from _sections(schema, f"{where}.{key}" if where else key, found)


def _section(schema: dict[str, Any], about: dict[str, Any]) -> dict[str, Any] | None:
    """The model that a key holds, alone, in a list or mapping, or beside null or something simpler."""
    if "$ref" in about:
        return dict(schema["$defs"][about["$ref"].rsplit("/", 1)[1]])
    entries = about.get("additionalProperties")
    parts = (about.get("items", {}), *about.get("anyOf", ()), *([entries] if isinstance(entries, dict) else ()))
    return next((found for part in parts if part and (found := _section(schema, part))), None)


def _title(where: str) -> str:
    return f"`{_plain(where)}`" if where else "The file"


def _intro(model: dict[str, Any]) -> list[str]:
    if model["title"] in ("Federation", "Policy"):
        return []
    said = " ".join(model.get("description", "").split())
    return [f"{said}\n"] if said else []


def _row(schema: dict[str, Any], model: dict[str, Any], path: str, key: str, about: dict[str, Any], *, edits: bool = True) -> list[str]:
    section = _section(schema, about)
    meaning = _escaped(about.get("description", ""))
    if section:
        meaning = meaning or _escaped(section.get("description", "").split("\n")[0])
    plain = _has_plain_form(about)
    shape = f"{{{', '.join(section['properties'])}}}" if section and plain else _plain(path)
    kind = _type(about, f"[{shape}](#{_anchor(path)})")
    if note := NOTES.get(path):
        meaning = f"{meaning} {note}".strip()
    default = "required" if key in model.get("required", ()) else DEFAULTS.get(path) or _default(about, section)
    row = [f"`{key}`", kind, default, meaning]
    return [*row, "" if section and not plain else edit(path)] if edits else row  # else the keys of the section say it


def _plain(path: str) -> str:
    """A path with its lists and mappings as a reader writes them."""
    for section, entry in ENTRIES.items():
        if path == section or path.startswith(f"{section}."):
            return entry + path.removeprefix(section)
    return path


def _anchor(path: str) -> str:
    """GitHub names a heading by its letters."""
    return re.sub(r"[^a-z_-]", "", _plain(path).lower())


def _has_plain_form(about: dict[str, Any]) -> bool:
    """Whether a key that holds a section may also be a number or a text."""
    entries = about.get("additionalProperties")
    parts = [*about.get("anyOf", ()), *([entries] if isinstance(entries, dict) else ())]
    return any(part.get("type") in ("integer", "number", "string") or _has_plain_form(part) for part in parts)


def _type(about: dict[str, Any], section: str) -> str:
    """In words; ``section`` is a link to the section that the key holds."""
    if "$ref" in about:
        return section
    if "anyOf" in about:
        kinds = [_type(part, section) for part in about["anyOf"] if part.get("type") != "null"]
        off = about.get("default") is not None and {"type": "null"} in about["anyOf"]  # null is something else than leaving it out
        return " or ".join([*kinds, *(["`null`"] if off else [])])
    if "enum" in about:
        return " or ".join(f"`{value}`" for value in about["enum"])
    if "const" in about:
        return f"`{about['const']}`"
    if about["type"] == "array":
        return f"list of {section}" if "$ref" in about["items"] else "list of texts"
    if about["type"] == "object":
        entries = about["additionalProperties"]
        if entries is True:
            return "mapping"
        return "texts by name" if entries == {"type": "string"} else f"by party: {_type(entries, section)}"
    if about.get("pattern") == DURATION:
        return "time"
    if about.get("format") == "date":
        return "day, as `2027-12-31`"
    kind = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false"}[about["type"]]
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return kind + "".join(f"{',' if i else ''} {sign} {about[word]}" for i, (word, sign) in enumerate(
        (word, sign) for word, sign in signs.items() if word in about))  # fmt: skip


def _default(about: dict[str, Any], section: dict[str, Any] | None) -> str:
    value = about.get("default")
    if value is None:
        return "unset" if not section or "anyOf" in about else ""
    if value == {}:
        return "none"
    return f"`{_escaped(value if isinstance(value, str) and chr(10) not in value else json.dumps(value))}`"


def _escaped(said: str) -> str:
    return " ".join(said.split()).replace("|", "\\|")


# What kind of edit a key is

KEY = f"ed25519:{'A' * 43}="


def edit(path: str) -> str:
    """``free``, ``amendment`` or ``new federation``: what changing this key alone means."""
    placement = {"tolerations": [{}], "claims": [{"claim": "c", "mount": "/c"}], "secrets": [{"name": "s"}]}
    before = Federation.model_validate(
        {
            "name": "sample",
            "model": {"base": "org/base"},
            "silos": [{"id": "north", "train": "/north", "placement": placement}],
            "aggregation": {"clip": {}, "robust": {"rule": "median"}},
            "coordinator": {key: placement[key] for key in ("tolerations", "claims")},
            "privacy": {"rounds": 9, "silo": {"epsilon": 1.0}, "secure_aggregation": {}},
            "rounds": {"until": {}, "quorum": 1, "rollback": {"max_loss_increase": 1.0}},
            "security": {"keys": {"coordinator": KEY, "north": [{"public": KEY, "until": 9}]}},
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the other value is of no type that pydantic would serialise there
        old, new = _agreement(before), _agreement(_changed(before, path.split(".")))
        return "new federation" if old.forbids(new) else "amendment" if old.changes(new) else "free"


def _changed(section: Any, path: list[str]) -> Any:
    """A copy with another value at ``path``; lists and mappings are followed into one entry. Validation is not asked."""
    key, *rest = path
    value = getattr(section, key)
    if not rest:
        value = _another(value)
    elif isinstance(value, dict):
        name, entries = list(value.items())[-1]
        value = value | {name: [_changed(entries[0], rest), *entries[1:]]}
    elif isinstance(value, list):
        value = [_changed(value[0], rest), *value[1:]]
    else:
        value = _changed(value, rest)
    return section.model_copy(update={key: value})


def _another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, dict) and value:
        return dict(list(value.items())[1:])
    return "another"


def _agreement(federation: Federation) -> Any:
    digest = hashlib.sha256(federation.model.base.encode()).hexdigest()  # another base has other contents
    return federation.agreement(digest, digest)


if __name__ == "__main__":
    for file, content in ((FILE, text()), (POLICY_FILE, policy_text())):
        file.write_text(content, encoding="utf-8")
        print(f"{file} written")
