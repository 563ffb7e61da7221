"""The demonstration behind `make run`: three synthetic hospitals, offline, from nothing to a comparison.

    python examples/hospitals/run.py

Makes the hospitals' notes and a small base model (both kept for the next time), runs the federation through its pipeline, lets every hospital
train alone for comparison, and prints who does how well on the cases of all. Stop it at any time and run it again: it goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FILE = HERE / "federation.yaml"


def main() -> int:
    for command in (["notes.py", HERE / "data"], ["base.py", HERE / "data" / "public.txt", HERE / "base"]):
        made = subprocess.run([sys.executable, HERE / command[0], *command[1:]], check=False)
        if made.returncode:
            return made.returncode
    shown = FILE.relative_to(Path.cwd()) if FILE.is_relative_to(Path.cwd()) else FILE
    ran = subprocess.run([sys.executable, "-m", "silotune.pipelines.cli", "run", str(shown)], check=False)
    if ran.returncode:
        return ran.returncode
    show(comparison())
    print(f"\nRounds, losses and the exported model, in MLflow:  .venv/bin/silotune ui {shown}")
    return 0


def comparison() -> dict[str, dict[str, float]]:
    """Test loss by model and hospital; kept beside the commit it belongs to, since training alone takes as long as together."""
    from rich.console import Console

    from silotune.pipelines.simulate import Simulation

    simulation = Simulation(FILE)
    latest = simulation.rounds.latest()
    assert latest
    kept = simulation.federation.work / "comparison.json"
    if kept.exists() and (found := json.loads(kept.read_text())).get("commit") == latest.digest:
        return dict(found["losses"])
    with Console(stderr=True).status("each hospital trains alone, for comparison") as status:
        losses = {"base": scored(simulation.scores(round_number=0))}
        for silo in simulation.federation.silo_ids:
            status.update(f"{silo} trains alone, for comparison")
            alone = simulation.alone(silo)
            for _ in alone.run():
                pass
            losses[f"{silo} alone"] = scored(simulation.scores(of=alone))
        losses["federated"] = scored(simulation.scores())
    kept.write_text(json.dumps({"commit": latest.digest, "losses": losses}))
    return losses


def scored(scores: dict[str, Any]) -> dict[str, float]:
    everyone = sum(s.loss_sum for s in scores.values()) / sum(s.tokens for s in scores.values())
    return {silo: s.loss for silo, s in scores.items()} | {"all": everyone}


def show(losses: dict[str, dict[str, float]]) -> None:
    from math import exp

    from rich.console import Console
    from rich.table import Table

    silos = [s for s in losses["base"] if s != "all"]
    table = Table(title="Perplexity on the test cases of …  (lower is better)")
    for column in ("", *silos, "all"):
        table.add_column(column, justify="left" if not column else "right")
    best = {c: min(row[c] for row in losses.values()) for c in (*silos, "all")}
    for name, row in losses.items():
        cells = [f"[bold]{exp(row[c]):.2f}[/]" if row[c] == best[c] else f"{exp(row[c]):.2f}" for c in (*silos, "all")]
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
