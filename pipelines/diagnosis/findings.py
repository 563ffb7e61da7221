"""Findings: what a check of the doctor's saw, and how bad it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from silotune.components.errors import FederationError

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What one check saw."""

    name: str
    level: Level
    what: str
    cure: str = ""
    code: int = 0  # exit code, where it fails


def ok(name: str, what: str) -> Finding:
    return Finding(name, "ok", what)


def warn(name: str, what: str, cure: str = "") -> Finding:
    return Finding(name, "warn", what, cure)


def fail(name: str, what: str, cure: str, code: int = FederationError.exit_code) -> Finding:
    return Finding(name, "fail", what, cure, code)
