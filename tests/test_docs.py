"""The pages: generated ones are up to date, links lead somewhere, and commands exist."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
page = pytest.mark.parametrize("file", PAGES, ids=lambda f: f.name)


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code(file: Path) -> Iterator[str]:
    """What a page sets as code: fenced and indented blocks, and spans between backticks."""
    text = file.read_text(encoding="utf-8")
    fence = re.compile(r"^```.*?$(.*?)^```$", re.DOTALL | re.MULTILINE)
    yield from fence.findall(text)
    rest = fence.sub("", text)
    yield from re.findall(r"^ {4}(\S.*)$", rest, re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", rest)


def anchors(file: Path) -> set[str]:
    """Headings as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def told_in_the_tree() -> set[str]:
    """Paths that README's tree names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"## The tree\n\n```\n(.*?)```", text, re.DOTALL)
    assert tree
    told: set[str] = set()
    above: list[str] = []
    for line in tree[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.match(r"\s*((?:[\w.*-]+(?:/[\w.]*)?(?:  | |$))+?)(?: |$)", line)
        above = above[:depth]
        for name in (names[1] if names else "").split():
            told.add("/".join([*above, name.rstrip("/")]))
        if line.split()[0].endswith("/"):
            above.append(line.split()[0].rstrip("/"))
    return told


def test_the_tree_is_the_real_one() -> None:
    told = told_in_the_tree()
    boxes = {
        f"components/{box}" for box in ("preprocess", "initialize", "train", "share", "mask", "unmask", "muster", "combine", "aggregate")
    }
    assert boxes <= told
    gone = [path for path in told if "*" not in path and not (ROOT / path).exists()]
    assert not gone, "README tells of what is not there"
    whole = {path for path in told if (ROOT / path).is_dir() and not any(other.startswith(f"{path}/") for other in told)}
    real = [p.relative_to(ROOT) for top in ("components", "pipelines", "benchmarks", "examples", "docs") for p in (ROOT / top).rglob("*.*")]
    kept = [
        p for p in real if p.suffix in (".py", ".md", ".yaml") and p.name != "__init__.py" and not any(x.startswith(".") for x in p.parts)
    ]
    untold = [str(p) for p in kept if str(p) not in told and not any(str(q) in whole for q in p.parents)]
    assert not untold, "README does not tell of what is there"


def test_the_page_about_the_file_is_what_the_models_say(reference: ModuleType) -> None:
    assert (ROOT / "docs" / "federation.md").read_text(encoding="utf-8") == reference.text(), "run `make docs`"
    assert (ROOT / "docs" / "policy.md").read_text(encoding="utf-8") == reference.policy_text(), "run `make docs`"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("storage.root", "free"),
        ("silos.train", "free"),
        ("data.fields", "free"),
        ("rounds.quorum", "free"),
        ("rounds.quorum.weight", "free"),
        ("rounds.deadline", "free"),
        ("rounds.rollback.max_loss_increase", "free"),
        ("rounds.guards.norm_band", "free"),
        ("storage.retention.updates", "free"),
        ("security.keys", "amendment"),
        ("security.keys.public", "amendment"),
        ("security.keys.until", "amendment"),
        ("security.signing", "amendment"),
        ("training.steps", "amendment"),
        ("silos.id", "amendment"),
        ("silos.training.steps", "amendment"),
        ("aggregation.strategy", "amendment"),
        ("model.base", "new federation"),
        ("model.lora.r", "new federation"),
        ("name", "new federation"),
    ],
)
def test_the_kind_of_an_edit_follows_from_the_agreement(reference: ModuleType, path: str, kind: str) -> None:
    assert reference.edit(path) == kind


@pytest.mark.parametrize(
    "cells",
    [
        ["`rounds.quorum`", "integer ≥ 1 or [{count, weight}](#roundsquorum)", "unset", "free"],
        ["`rounds.deadline`", "time", "unset", "free"],
        ["`rounds.stall`", "time or `null`", "`15m`", "free"],
        ["`rounds.guards`", "[rounds.guards](#roundsguards)", "", ""],
        ["`rounds.guards.norm_band`", "number > 1 or `null`", "`10.0`", "free"],
        ["`rounds.rollback`", "[rounds.rollback](#roundsrollback)", "unset", ""],
        ["`silos[]`", "list of [silos[]](#silos)", "required", ""],
        ["`data.fields`", "texts by name", "unset", "free"],
        ["`security.signing`", "true or false", "`true`", "amendment"],
        ["`security.keys`", "by party: text or list of [{public, since, until}](#securitykeysparty)", "unset", "amendment"],
        ["`security.keys.PARTY[].until`", "integer ≥ 0", "unset", "amendment"],
    ],
    ids=lambda cells: cells[0].strip("`"),
)
def test_a_row_says_type_default_and_kind_of_edit(reference: ModuleType, cells: list[str]) -> None:
    """Of the key in a section, as a reader finds it: heading, then row."""
    section, _, key = cells[0].strip("`").replace("silos[]", "silos").rpartition(".")
    heading = f"\n## `{section}`\n" if section else "\n## The file\n"
    text = reference.text()
    assert heading in text
    rows = text.split(heading)[1].split("\n## ")[0].splitlines()
    row = next(r for r in rows if r.startswith(f"| `{key}` |"))
    found = re.split(r" \| ", row.strip("| "))
    _, kind, default, edit = cells
    assert (found[1], found[2], found[-1] if edit else "") == (kind, default, edit)


@page
def test_links_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        found = file.parent / name if name else file
        assert found.exists(), f"{file.name}: {target} leads nowhere"
        assert not anchor or anchor in anchors(found), f"{file.name}: {target} names no heading"


@page
def test_make_targets_exist(file: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {word for text in code(file) for word in re.findall(r"(?:^|[\s·])make ([a-z-]+)", text)}
    assert named <= targets


@page
def test_subcommands_exist(file: Path) -> None:
    from silotune.pipelines.cli import app

    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback} | {g.name for g in app.registered_groups}
    named = {word for text in code(file) for word in re.findall(r"^\s*(?:\S+=\S+ )*silotune ([a-z][a-z-]*)", text, re.MULTILINE)}
    assert named <= commands


def test_the_readme_shows_commands() -> None:
    """The two tests above must have something to look at."""
    shown = "\n".join(code(PAGES[0]))
    assert "make run" in shown
    assert "silotune run " in shown


def test_the_readme_shows_the_python_door_as_its_docstring_does() -> None:
    from silotune.pipelines import simulate

    example = re.search(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    assert example
    shown = [line for line in example[1].splitlines() if line]
    assert [line.strip() for line in shown] == [
        line.strip() for line in (simulate.__doc__ or "").splitlines() if line.startswith("    ") and line.strip()
    ]
