"""The image files as texts: no engine and no network is needed to see whether they agree with the package and with each other."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

HERE = Path(__file__).resolve().parents[2]
DOCKER = HERE / "docker"
PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text())
LOCKS = ("build.lock", "coordinator.lock", "silo.lock", "torch-cuda.lock")
# Of what is locked, what pyproject names by another name, or leaves to another package.
MLFLOWS = {"mlflow-skinny", "sqlalchemy", "alembic"}
TORCHS = {"jinja2", "networkx", "sympy"}
LEARNING = {"torch", "transformers", "peft", "accelerate", "pyarrow", "tokenizers", "safetensors"}


def names(file: str) -> set[str]:
    """Of the requirements in a file, without their comments."""
    lines = (line.partition("#")[0].strip() for line in (DOCKER / file).read_text().splitlines())
    return {canonicalize_name(Requirement(line).name) for line in lines if line}


def locked(file: Path) -> dict[str, Version]:
    return {canonicalize_name(name): Version(version) for name, version in re.findall(r"^([\w.-]+)==([^\s\\]+)", file.read_text(), re.M)}


def asked() -> dict[str, Requirement]:
    return {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["project"]["dependencies"])}


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_its_digests(lock: str) -> None:
    blocks = re.split(r"^(?=[\w.-]+==)", (DOCKER / lock).read_text(), flags=re.M)[1:]
    assert blocks
    assert [block.split("==")[0] for block in blocks if not re.search(r"--hash=sha256:[0-9a-f]{64}", block)] == []


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_the_versions_that_are_tested(lock: str) -> None:
    tested = locked(HERE / "constraints.txt")
    found = locked(DOCKER / lock)
    # Only CUDA's own libraries and the installer are not in the environment that the tests run in.
    assert {n for n in found if n not in tested and not n.startswith(("nvidia-", "cuda-"))} <= {"uv"}
    assert {n: (v, tested[n]) for n, v in found.items() if n in tested and v != tested[n]} == {}


@pytest.mark.parametrize("image", ["coordinator", "silo"])
def test_an_image_asks_for_what_the_package_asks_for(image: str) -> None:
    wanted, found = names(f"{image}.in"), locked(DOCKER / f"{image}.lock")
    assert wanted <= set(found)
    assert wanted - set(asked()) <= MLFLOWS | TORCHS
    assert [name for name in wanted & set(asked()) if found[name] not in asked()[name].specifier] == []
    assert found["mlflow-skinny"] in asked()["mlflow"].specifier
    left_out = names("without.txt") | (names("silo-without.txt") if image == "silo" else set())
    assert left_out & set(found) == set()


def test_the_two_images_together_have_all_that_the_package_asks_for() -> None:
    both = {*locked(DOCKER / "coordinator.lock"), *locked(DOCKER / "silo.lock"), *names("torch-cpu.txt")}
    # submit and schedule are commands of a person's machine; mlflow-skinny is the part of mlflow that speaks to a server or a file
    assert set(asked()) - both == {"kfp-kubernetes", "mlflow"}


def test_the_coordinator_asks_for_no_learning() -> None:
    assert LEARNING & set(locked(DOCKER / "coordinator.lock")) == set()


def test_torch_is_one_version_everywhere() -> None:
    tested = locked(HERE / "constraints.txt")["torch"]
    assert locked(DOCKER / "torch-cpu.txt")["torch"] == locked(DOCKER / "torch-cuda.lock")["torch"] == tested
    assert "torch" not in locked(DOCKER / "silo.lock")


def instructions() -> list[tuple[str, str]]:
    """(word, rest) of each instruction of the Dockerfile."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.M))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())]


def test_the_dockerfile_fetches_nothing_unpinned() -> None:
    found = instructions()
    assert [rest for word, rest in found if word == "ADD"] == []
    runs = [rest for word, rest in found if word == "RUN"]
    assert [r for r in runs if re.search(r"\b(apt|apt-get|curl|wget|git)\b|<<", r)] == []
    for run in runs:
        for install in re.findall(r"(?:pip install|\$install)[^&;]*", run):
            assert "--require-hashes" in install or "--no-index" in install or '"$@"' in install, install
            assert "--no-deps" in install or "--require-hashes" in install, install
    assert not (DOCKER / "Dockerfile").read_text().startswith("# syntax=")


def test_the_dockerfile_names_its_base_once_and_never_the_latest() -> None:
    found = instructions()
    stages = {rest.partition(" AS ")[2] for word, rest in found if word == "FROM"}
    bases = {rest.partition(" AS ")[0] for word, rest in found if word == "FROM"} - stages
    assert bases == {"${WHEELS_IMAGE}", "${BASE_IMAGE}", "scratch"}
    assert ("ARG", "BASE_IMAGE=python:3.11-slim") in found
    assert ":latest" not in (DOCKER / "Dockerfile").read_text()
    assert {"silo", "coordinator"} <= stages


def test_the_dockerfile_ends_as_a_batch_image() -> None:
    found = instructions()
    users = [rest for word, rest in found if word == "USER"]
    assert users
    assert all(re.fullmatch(r"\d+:\d+", user) for user in users)
    assert not [rest for word, rest in found if word in ("ENTRYPOINT", "EXPOSE", "VOLUME")]
    assert [rest for word, rest in found if word == "HEALTHCHECK"] == ["NONE"]


def test_a_build_sees_the_package_only() -> None:
    lines = [line for line in (HERE / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert {line for line in lines if line.startswith("!")} == {
        "!pyproject.toml", "!README.md", "!LICENSE", "!components", "!pipelines", "!k8s", "!docker",
    }  # fmt: skip


def test_every_folder_with_code_is_packaged() -> None:
    named = set(PROJECT["tool"]["setuptools"]["packages"])
    for top in ("components", "pipelines"):
        folders = {file.parent.relative_to(HERE) for file in (HERE / top).rglob("*.py")}
        assert {f"silotune.{'.'.join(folder.parts)}" for folder in folders} <= named


def test_what_is_trimmed_is_named_without_leaving_the_folder() -> None:
    module = ast.parse((DOCKER / "trim.py").read_text())
    lists = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Tuple)
    }
    assert all(place.startswith("/") for place in lists["ROOT"])
    assert not [p for p in (*lists["LIBRARY"], *lists["PACKAGES"]) if p.startswith("/") or ".." in p]
