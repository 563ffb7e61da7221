"""Both images, built for real by `make images`, and containers of theirs that may do no more than a cluster lets them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[2]
VERSION = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["version"]
BASE_IMAGE = "python:3.11-slim"
ARBITRARY = "12345:0" if os.getuid() == 0 else f"{os.getuid()}:{os.getgid()}"  # else what it writes could not be removed
AS_THEY_ARE = "SILOTUNE_IMAGES_AS_THEY_ARE"  # set, it saves the build while one works on the tests alone
WHEELS_IMAGE = "wheels:local"  # what base-image.sh makes of the folder that PIP_FIND_LINKS names


@pytest.fixture(scope="session")
def engine() -> str:
    """The path of a docker client that reaches an engine and builds with BuildKit."""
    found = [p for p in dict.fromkeys((shutil.which("docker"), "/usr/bin/docker")) if p and Path(p).exists()]
    for client in found:
        asked = subprocess.run([client, "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True, check=False)
        if asked.returncode == 0 and _has_buildkit(client):
            return client
    pytest.skip(f"no docker client with BuildKit and a running engine; tried {', '.join(found) or 'docker'}")


def _has_buildkit(client: str) -> bool:
    told = subprocess.run([client, "buildx", "version"], capture_output=True, check=False).returncode == 0
    return told or Path(client).resolve() == Path("/usr/bin/docker")


@pytest.fixture(scope="session")
def base_image(engine: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base: what is there, else what can be pulled, else what base-image.sh makes of this machine."""
    if _exists(engine, BASE_IMAGE) or subprocess.run([engine, "pull", "-q", BASE_IMAGE], capture_output=True, check=False).returncode == 0:
        return BASE_IMAGE
    script = HERE.parent / "shared" / "tools" / "base-image.sh"
    if not script.exists():
        pytest.skip(f"{BASE_IMAGE} is not here and cannot be pulled, and there is no {script} to make it")
    alone = tmp_path_factory.mktemp("client")  # the folder it lies in may hold another Python, too, which would go into the base
    (alone / "docker").symlink_to(engine)
    subprocess.run(["bash", str(script), BASE_IMAGE], check=True, env={**os.environ, "PATH": f"{alone}:{os.environ['PATH']}"})
    return BASE_IMAGE


@pytest.fixture(scope="session")
def silo_image(engine: str, base_image: str) -> str:
    return _built(engine, "silo")


@pytest.fixture(scope="session")
def coordinator_image(engine: str, base_image: str) -> str:
    return _built(engine, "coordinator")


def _exists(engine: str, image: str) -> bool:
    return subprocess.run([engine, "image", "inspect", image], capture_output=True, check=False).returncode == 0


def _built(engine: str, target: str) -> str:
    name = f"silotune-{target}:{VERSION}"
    if os.environ.get(AS_THEY_ARE) and _exists(engine, name):
        return name
    variables = [f"DOCKER={engine}", f"BASE_IMAGE={BASE_IMAGE}"]
    if _exists(engine, WHEELS_IMAGE):
        variables.append(f"WHEELS_IMAGE={WHEELS_IMAGE}")
    made = subprocess.run(
        ["make", "--no-print-directory", f"image-{target}", *variables], cwd=HERE, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-4000:]
    return name


@pytest.fixture
def contained(engine: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command in a container with a read-only root, a scratch /tmp, no capability, no network and no user of its own."""

    def run(
        image: str,
        *command: str,
        user: str = ARBITRARY,
        network: str = "none",
        write: Mapping[Path, str] | None = None,
        read: Mapping[Path, str] | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        words = ["run", "--rm", "--user", user, "--network", network, "--read-only", "--tmpfs", "/tmp"]
        words += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
        for mounts, mode in ((write or {}, "rw"), (read or {}, "ro")):
            words += [word for here, there in mounts.items() for word in ("--volume", f"{here}:{there}:{mode}")]
        words += [word for name, value in (variables or {}).items() for word in ("--env", f"{name}={value}")]
        return subprocess.run([engine, *words, image, *command], capture_output=True, text=True, check=False, timeout=600)

    return run
