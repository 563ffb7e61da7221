"""The federation file of a scenario: the example of examples/hospitals, its paths and images those of the trial."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trial.place import Place

EXAMPLE = Path(__file__).parents[3] / "examples" / "hospitals" / "federation.yaml"
BUCKET, BASE = "silotune", "base"
RECORDS = "/silo/records"
FILE = "federation.yaml"


def text(
    place: Place,
    name: str,
    keys: Mapping[str, str],
    *,
    rounds: Mapping[str, Any] | None = None,
    steps: int = 6,
    broken: tuple[str, ...] = (),
    memory: Mapping[str, str] | None = None,
) -> str:
    """A federation file.

    Args:
        name: of the scenario; the federation bears the trial's identity as well, and has a prefix of its own in the store.
        keys: party -> public key.
        rounds: over the section of two rounds with a quorum of two.
        broken: silos whose records cannot be read. Paths are no part of the terms, so that this may change between two runs.
        memory: silo -> limit of its Jobs, instead of 2Gi.
    """
    terms = yaml.safe_load(EXAMPLE.read_text())
    silos = []
    for silo in place.silos:
        train = "broken" if silo in broken else "train"
        silos.append({
            "id": silo,
            "train": f"{RECORDS}/{train}.jsonl", "valid": f"{RECORDS}/valid.jsonl", "test": f"{RECORDS}/test.jsonl",
            "storage": f"/silo/{silo}",
            "placement": {
                "namespace": place.namespace(silo), "image": place.silo_image, "cpu": "250m", "memory": (memory or {}).get(silo, "2Gi"),
            },
        })  # fmt: skip
    ours = place.ours
    terms |= {
        "name": f"{place.identity}-{name}",
        "model": terms["model"] | {"base": f"s3://{BUCKET}/{BASE}"},
        "coordinator_image": place.coordinator_image,
        "model_image": place.silo_image,
        "coordinator": {
            "config_map": ours, "keys_secret": f"{ours}-keys", "s3_secret": f"{ours}-s3", "mlflow_secret": f"{ours}-mlflow",
            "cpu": "250m", "memory": "2Gi",
        },
        "silos": silos,
        "rounds": {"total": 2, "quorum": 2, "deadline": "10m"} | dict(rounds or {}),
        "training": terms["training"] | {"steps": steps, "batch_size": 4},
        "storage": {"root": f"s3://{BUCKET}/federations"},
        "tracking": {"uri": place.mlflow or "none"},
        "security": {"keys": dict(keys)},
    }  # fmt: skip
    return yaml.safe_dump(terms, sort_keys=False)
