"""silotune audit-privacy: what the model tells about records.

silotune audit-privacy FILE                  every silo whose shards are on this machine
silotune audit-privacy FILE --silo north     one of them
silotune audit-privacy FILE --without        the same federation without its privacy beside it, trained anew
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from silotune.components.errors import FederationError, RefusedError


def audit_privacy(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The federation file.")],
    silo: Annotated[str | None, typer.Option(help="Only this silo; default: all whose shards are on this machine.")] = None,
    without: Annotated[
        bool, typer.Option("--without", help="Also train the same federation without its privacy, on this machine, and set it beside.")
    ] = False,
    examples: Annotated[int, typer.Option(min=8, help="Examples of each kind that losses are taken of.")] = 500,
    canaries: Annotated[int, typer.Option(min=0, help="Gradients that private training is audited by; 0: not at all.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Measure what the model tells about records; exit code 4 where it shows more than was promised."""
    from silotune.components.federation import Federation
    from silotune.components.silo_job import silo_home
    from silotune.pipelines.steward import leakage_view
    from silotune.pipelines.steward.leakage import measure

    federation = Federation.load(file)
    silos = [silo] if silo else [s for s in federation.silo_ids if (silo_home(federation, federation.silo(s)) / "data.json").exists()]
    if not silos:
        raise FederationError(f"{file}: no silo's shards are on this machine; run it here, or in the silo that has them")
    found = {"as it is": measure(federation, silos, most=examples, canaries=canaries)}
    if without:
        from silotune.pipelines.simulate import Simulation

        bare = Simulation(file).unprotected()
        with contextlib.redirect_stdout(sys.stderr):  # what its steps tell is no result
            for _ in bare.run():
                pass
        found["without privacy"] = measure(bare.federation, silos, most=examples, canaries=0)
    if as_json:
        typer.echo(json.dumps({name: one.model_dump() for name, one in found.items()}, indent=2, allow_nan=False))
    else:
        leakage_view.show(found)
    if broken := found["as it is"].broken:
        raise RefusedError(
            "\n  ".join(["a promise of privacy does not hold:", *broken, "do not use the model, and report this"]), "privacy broken"
        )
