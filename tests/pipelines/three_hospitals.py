"""A federation file of three hospitals with comments and keys, as tests of joining and leaving change it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from silotune.components.federation import Federation

KEYS = {party: f"ed25519:{'A' * 42}{letter}=" for party, letter in (("coordinator", "A"), ("north", "E"), ("south", "I"), ("west", "M"))}
FILE = f"""\
# The terms of three hospitals.
name: trial
model: {{base: /silo/base}}
silos:   # in the order of their joining
  # the one in the north
  - id: north
    train: /silo/north/train.jsonl   # since May
    storage: /silo/north
  # the one in the south
  - id: south
    train: /silo/south/train.jsonl
    storage: /silo/south

  # the one in the west
  - {{id: west, train: /silo/west/train.jsonl, storage: /silo/west}}
# how it goes on
rounds: {{total: 3, quorum: 2, deadline: 30m}}
storage: {{root: "s3://bucket/team"}}
security:
  keys:
    coordinator: {KEYS["coordinator"]}
    north: {KEYS["north"]}   # by telephone
    south:
      - {{public: "{KEYS["south"]}", since: 2}}
    west: {KEYS["west"]}
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Federation]:
    def write(old: str = "", new: str = "", text: str = FILE) -> Federation:
        assert old in text
        (tmp_path / "f.yaml").write_text(text.replace(old, new))
        return Federation.load(tmp_path / "f.yaml")

    return write
