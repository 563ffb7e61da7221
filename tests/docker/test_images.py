"""What is in the images and what is not, and that what they hold can be used by any user."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.images

LOOK = """
import json, os, stat
found = {"programs": [], "raised": [], "open": [], "private": [], "folders": []}
for folder in os.environ["PATH"].split(":"):
    if os.path.isdir(folder) and not os.path.islink(folder):
        found["programs"] += os.listdir(folder)
for folder, folders, files in os.walk("/"):
    if folder == "/":
        folders[:] = [f for f in folders if f not in ("proc", "sys", "dev", "tmp")]
    found["folders"] += [os.path.join(folder, f) for f in folders if f in ("pip", "setuptools", "ensurepip", "uv", "torch", "triton", ".git", "tests")]
    for name in (*folders, *files):
        path = os.path.join(folder, name)
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            continue
        if mode & 0o6000:
            found["raised"].append(path)
        if mode & 0o002:
            found["open"].append(path)
        if name.endswith((".pem", ".key", ".crt")) and b"PRIVATE KEY-" in open(path, "rb").read():
            found["private"].append(path)
print(json.dumps(found))
"""
STEPS = "silotune.components.{box}.step"
BOXES = {
    "silo_image": ("preprocess", "initialize", "train", "evaluate", "export"),
    "coordinator_image": ("preprocess", "train", "aggregate", "evaluate"),  # all but the second only launch
}
HEAVY = {
    "silo_image": (
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "pyarrow.parquet",
        "safetensors.torch",
        "mlflow.tracking",
        "boto3",
        "dp_accounting.pld.privacy_loss_distribution",
        "dp_accounting.rdp",
    ),
    "coordinator_image": (
        "kubernetes.client",
        "kubernetes.config",
        "kubernetes.watch",
        "mlflow.tracking",
        "boto3",
        "cryptography",
        "numpy",
    ),
}


@pytest.fixture(params=["silo_image", "coordinator_image"])
def named_image(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param, request.getfixturevalue(request.param)


@pytest.fixture
def found(named_image: tuple[str, str], contained: Callable[..., Any]) -> dict[str, list[str]]:
    """What one look over the whole file system finds; as root, who may look everywhere."""
    done = contained(named_image[1], "python3", "-c", LOOK, user="0:0")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_an_image_says_what_it_is_and_runs_as_nobody(engine: str, named_image: tuple[str, str]) -> None:
    shown = json.loads(subprocess.run([engine, "image", "inspect", named_image[1]], capture_output=True, check=True).stdout)[0]["Config"]
    assert shown["User"] == "1000:1000"
    assert not shown.get("Entrypoint")
    assert shown.get("Healthcheck", {}).get("Test") in (None, ["NONE"])
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in shown["Labels"].items()}
    assert labels["title"] == named_image[1].partition(":")[0]
    assert labels["version"] == named_image[1].partition(":")[2]
    assert labels["licenses"] == "Apache-2.0"
    assert len(labels["revision"].removesuffix("-dirty")) == 40 or labels["revision"] == "unknown"
    assert labels["description"]
    variables = dict(v.split("=", 1) for v in shown["Env"])
    assert variables["HOME"] == "/tmp/home"
    assert variables["PYTHONDONTWRITEBYTECODE"] == variables["PYTHONUNBUFFERED"] == "1"
    assert not [name for name in variables if any(word in name for word in ("SECRET", "_TOKEN", "PASSWORD", "AWS_"))]


def test_it_holds_no_tool_beyond_need(named_image: tuple[str, str], found: dict[str, list[str]]) -> None:
    programs = {name for name in found["programs"] if not name.startswith("python")}
    assert programs - {"torchrun"} == {"sh", "dash", "mktemp", "silotune"}  # Kubeflow starts a task by sh and mktemp
    assert found["raised"] == []
    assert found["open"] == []
    assert found["private"] == []
    folders = {folder.rpartition("/")[2] for folder in found["folders"]}
    assert not folders & {"pip", "setuptools", "ensurepip", "uv", "triton", ".git", "tests"}, found["folders"]
    torch = any(folder.endswith("/site-packages/torch") for folder in found["folders"])  # SciPy has a folder of that name
    assert torch == (named_image[0] == "silo_image")


@pytest.mark.parametrize("user", ["1000:1000", "12345:0", "65534:65534"])
def test_any_user_can_import_all_that_its_boxes_need(named_image: tuple[str, str], contained: Callable[..., Any], user: str) -> None:
    name, image = named_image
    modules = [*HEAVY[name], *(STEPS.format(box=box) for box in BOXES[name]), "silotune.components.launcher", "silotune.pipelines.cli"]
    code = f"import importlib, os; [importlib.import_module(m) for m in {modules!r}]; print(sorted(os.listdir('/tmp')))"
    done = contained(image, "python3", "-c", code, user=user)
    assert done.returncode == 0, done.stderr


def test_the_coordinators_image_holds_no_learning(coordinator_image: str, contained: Callable[..., Any]) -> None:
    absent = ("torch", "transformers", "peft", "accelerate", "pyarrow", "scipy", "dp_accounting")
    code = f"import importlib.util as u; print([m for m in {(*absent, 'mlflow')!r} if u.find_spec(m)])"
    assert contained(coordinator_image, "python3", "-c", code).stdout.strip() == "['mlflow']"


def test_what_a_home_is_needed_for_works_where_there_is_none(silo_image: str, contained: Callable[..., Any]) -> None:
    code = (
        "import os, getpass, torch; from huggingface_hub import constants; from pathlib import Path;"
        "assert not os.path.exists(os.environ['HOME']); Path(constants.HF_HUB_CACHE).mkdir(parents=True); print(getpass.getuser());"
        "from torch._inductor.runtime.cache_dir_utils import cache_dir; print(cache_dir())"
    )
    done = contained(silo_image, "python3", "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["silotune", "/tmp/torchinductor_silotune"]


def test_the_command_works_in_both(named_image: tuple[str, str], contained: Callable[..., Any]) -> None:
    done = contained(named_image[1])
    assert done.returncode == 0, done.stderr
    assert "verify" in done.stdout
