"""A round's page: what Kubeflow shows of a round, as numbers and one page of Markdown with a link to MLflow.

Derived from the commit and the scores in the store, so that a round that is committed already has the same page again. It holds what a commit
holds: sums over many records, digests, and reasons from a fixed vocabulary; nothing of a record.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from urllib.parse import quote, urlsplit

from silotune.components.errors import SilotuneError
from silotune.components.federation import Federation
from silotune.components.process.progress import tell
from silotune.components.protocol import Commit, Evaluation, Turn, pooled
from silotune.components.rounds import Rounds

WORDS = 200  # characters shown of a text that a silo has written


def write(federation_file: str, turn_text: str, page: str) -> dict[str, float]:
    """Write the page of the round that a turn was about, once it is committed; returns its numbers.

    Where they cannot be told, as where the store is away, the page says so: the round stands, and is worth more than its page.

    Args:
        turn_text: what the aggregate box was given.
        page: file to write.

    Raises:
        OSError: the page cannot be written.
    """
    try:
        text, numbers = _told(federation_file, Turn.parse(turn_text))
    except SilotuneError as error:
        tell("aggregate", "warned", detail=f"the round has no page: {error}")
        text, numbers = f"The round has no page: {_plain(error.reason)}\n", {}
    path = Path(page)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return numbers


def _told(federation_file: str, turn: Turn) -> tuple[str, dict[str, float]]:
    if turn.done:
        return f"Nothing to do: {_plain(turn.done)}\n", {}
    federation = Federation.load(federation_file)
    rounds = Rounds.of(federation)
    commit = rounds.commit(turn.round)
    scores = rounds.evaluations(commit.incoming, "valid") if commit.incoming else {}
    return text_of(federation, commit, scores, mlflow_link(federation, rounds)), numbers_of(commit, scores)


def numbers_of(commit: Commit, scores: dict[str, Evaluation]) -> dict[str, float]:
    """What Kubeflow lists and compares over runs. Finite ones only: its JSON knows no others.

    Args:
        scores: of the global that the round began from, on each silo's valid split. Those of the outgoing one come with the next round.
    """
    found = {"round": commit.round, "participants": len(commit.contributions), "missing": len(commit.missing),
             "bytes/up": commit.bytes_up, "bytes/down": commit.bytes_down, "seconds": commit.at - commit.started,
             **{f"incoming/{name}": value for name, value in pooled(scores).items()}}  # fmt: skip
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def text_of(federation: Federation, commit: Commit, scores: dict[str, Evaluation], link: str) -> str:
    """The page, as Markdown."""
    silos = sorted({*federation.silo_ids, *commit.contributions, *commit.missing})
    totals = pooled(scores)
    outcome = commit.outcome + (f" to round {commit.back_to}" if commit.back_to is not None else "")
    facts = [
        ("outcome", outcome + (", converged" if commit.converged else "")),
        ("took part", ", ".join(sorted(commit.contributions)) or "nobody"),
        ("missing", ", ".join(sorted(commit.missing)) or "nobody"),
        ("loss of the incoming global", f"{totals['loss']:.4f} nats per token, over {len(scores)} silos" if totals else "not scored"),
        ("perplexity of the incoming global", f"{totals['perplexity']:.2f}" if totals else "not scored"),
        ("bytes up, down", f"{commit.bytes_up:,}, {commit.bytes_down:,}"),
        ("seconds", f"{commit.at - commit.started:.1f}"),
        ("incoming global", f"`{commit.incoming}`"),
        ("outgoing global", f"`{commit.outgoing}`"),
        ("agreement", f"`{commit.agreement}`"),
        ("commit", f"`{commit.digest}`"),
    ]
    return "\n".join(
        [
            f"# {federation.name}, round {commit.round}",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in facts),
            "",
            "| silo | status | examples | tokens | update norm | loss of the incoming global |",
            "|---|---|--:|--:|--:|--:|",
            *(_row(commit, silo, scores.get(silo)) for silo in silos),
            "",
            *([link, ""] if link else []),
        ]
    )


def _row(commit: Commit, silo: str, score: Evaluation | None) -> str:
    loss = f"{score.loss:.4f}" if score else ""
    if c := commit.contributions.get(silo):
        norm = "not seen" if c.norm is None else f"{c.norm:.4g}"
        status = f"weight {c.weight:.3g}: {_plain(c.told)}" if c.told else "ok"
        return f"| {silo} | {status} | {c.examples:,} | {c.tokens:,} | {norm} | {loss} |"
    return f"| {silo} | {_plain(commit.missing.get(silo, 'not asked'))} | | | | {loss} |"


def mlflow_link(federation: Federation, rounds: Rounds) -> str:
    """A link to the federation's run in MLflow; "" where that is no server, or has no run yet."""
    parts = urlsplit(federation.tracking.uri)
    run = rounds.tracking_run() if parts.scheme in ("http", "https") else None
    if run is None:
        return ""
    host = quote(parts.netloc.rpartition("@")[2], safe=".-:[]")  # never a user and password, whatever the file says
    path = quote(parts.path.rstrip("/"), safe="/-._~%")
    return f"[MLflow run](<{parts.scheme}://{host}{path}/#/experiments/{quote(run.experiment, safe='')}/runs/{quote(run.run, safe='')}>)"


def _plain(text: str) -> str:
    """One line that Markdown and HTML read as the characters it is made of: it may come from a silo."""
    line = " ".join(text.split())[:WORDS]
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", line)
