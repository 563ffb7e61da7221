"""A step that stands beside the real ones for one test, in this process and in those it starts: silotune.components.probe.step."""

from __future__ import annotations

from pathlib import Path

import pytest


def stand_in(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the step's module and have every interpreter that is started from now on find it."""
    package, site = folder / "parts" / "probe", folder / "site"
    for made in (package, site):
        made.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "step.py").write_text(source)
    (site / "sitecustomize.py").write_text(
        f"import silotune.components\nsilotune.components.__path__ = [*silotune.components.__path__, {str(package.parent)!r}]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(site))
