"""The federation file that `silotune new` writes: valid as it stands, every choice that a beginner meets explained."""

from __future__ import annotations

import json
import re
from pathlib import Path

from silotune.components.errors import FederationError
from silotune.components.federation import json_schema

FILE = "federation.yaml"
SCHEMA = "federation.schema.json"

TEXT = """\
# A silotune federation: who takes part, on what model, under which terms.
#   silotune check federation.yaml --data     is it right, and can the records be read?
#   silotune run federation.yaml              on this machine
#   silotune schema > federation.schema.json  every key there is, for your editor: again after an update of silotune
# Relative paths count from this file's folder. ${NAME} and ${NAME:-default} come from the environment. No secrets in here.
# yaml-language-server: $schema=federation.schema.json

name: NAME                      # of the federation, in the store and in MLflow

model:
  base: Qwen/Qwen2.5-0.5B       # a Hugging Face id, a local folder such as ./models/base, or s3://bucket/prefix
  method: lora                  # lora: train small adapters; full: train every weight
  lora:
    r: 8                        # rank: more learns more and sends more
    alpha: 16
    target_modules: [q_proj, v_proj]      # or all-linear

data:
  format: prompt-response       # one {"prompt": …, "response": …} a line; or chat ({"messages": […]}), or text
  max_length: 512               # tokens per example at most
  # fields: {prompt: question, response: answer}     # where the files' columns are named otherwise; a silo may have its own, too

silos:                          # each keeps its records; only updates and losses leave it
  - id: north
    train: ./data/north/train.jsonl       # jsonl, csv, parquet, txt, a folder of these, or s3://
    valid: ./data/north/valid.jsonl       # steers the run; left out: a part of train is set aside
    test: ./data/north/test.jsonl         # optional; scored at the end only
    # storage: /srv/silotune/north        # the silo's own folder: tokens, logs
  - id: south
    train: ./data/south/train.jsonl

rounds:
  total: 6                      # of the whole federation, over all runs
  quorum: 2                     # silos that must deliver for a round to count
  # on_missing_quorum: skip     # with fewer, go on with the previous global; left out: stop, and wait for the missing ones
  # deadline: 2h                # time a silo has for its part of a round; left out: as long as it takes
  # min_fraction: 0.5           # a silo that has done this share of its steps by then counts with what it has, else it is late
  # rollback: {max_loss_increase: 0.2}    # leave a global behind whose loss is that much above the best one's
  # per_run: 3                  # rounds one run works on; left out: all that are left
  # until: {metric: loss, patience: 3}    # stop early once the pooled validation loss has stopped falling

training:                       # in every silo, in every round
  steps: 50
  batch_size: 8
  learning_rate: 1e-3
  # accumulation: 4             # split a step to save memory
  seed: 17

communication:
  codec: float32                # bfloat16 halves what travels

export:
  select: best                  # the round with the best validation loss, or last
  # merge: true                 # a full model instead of adapters

storage:
  root: ./.silotune/store       # what all parties can reach: a folder, or s3://bucket/prefix (endpoint: AWS_ENDPOINT_URL)
  # retention: {updates: 5}     # rounds whose update files `silotune gc` keeps; left out: all

# security:                     # left out: `silotune run` makes all keys on this machine, fine for trying things out
#   keys:                       # between organisations each party makes its own: silotune keys new north
#     coordinator: ed25519:…
#     north: ed25519:…
#     south: ed25519:…

tracking:
  uri: sqlite:///./.silotune/mlflow.db    # or http://your-mlflow:5000
"""


def write(folder: Path) -> Path:
    """Write the file into ``folder``, named after it, with the JSON Schema that editors find by it, and return its path.

    Raises:
        FederationError: there is one already, or the folder cannot be written.
    """
    file = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as out:
            out.write(TEXT.replace("NAME ", f"{_name(folder)} ", 1))
        (folder / SCHEMA).write_text(json.dumps(json_schema(), indent=2), encoding="utf-8")
    except FileExistsError:
        raise FederationError(f"{file if file.exists() else folder}: exists already; give another folder, or move it away") from None
    except OSError as error:
        raise FederationError(f"{file}: cannot be written: {error.strerror}; give a folder you may write to") from None
    return file


def _name(folder: Path) -> str:
    """A federation's name from a folder's."""
    words = re.sub(r"[^a-z0-9]+", "-", folder.absolute().name.lower()).strip("-")
    return words[:40].strip("-") or "federation"
