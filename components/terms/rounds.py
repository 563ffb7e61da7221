"""Rounds, as terms: how long a federation goes on, how many silos make a round, and what happens to late, missing and bad ones."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from silotune.components.federation_file import DURATION
from silotune.components.terms.section import Positive, Section, Share

Duration = Annotated[str, Field(pattern=DURATION)]
SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def _counted(value: Any) -> Any:
    """``quorum: 2`` for ``quorum: {count: 2}``."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {"count": value}
    if value is not None and not isinstance(value, dict | BaseModel):
        raise ValueError("must be a whole number, or hold count and weight")
    return value


class Until(Section):
    """Convergence: stop when the pooled validation metric has not improved for a while."""

    metric: Literal["loss", "perplexity", "token_accuracy"] = Field("loss", description="Pooled over silos, by tokens.")
    patience: Positive = Field(3, description="Rounds without improvement before stopping.")
    min_delta: float = Field(0.0, ge=0, allow_inf_nan=False, description="Change that counts as improvement.")


class Quorum(Section):
    """How much of a federation makes a round; all that is given must hold."""

    count: Positive = Field(1, description="Silos that must deliver.")
    weight: Share | None = Field(
        None, description="Share of the examples asked of all silos together (steps × batch size) that must have been trained on."
    )


class Rollback(Section):
    """When a global model is left behind. It shows one round later, when the silos have scored it."""

    max_loss_increase: float = Field(
        gt=0,
        allow_inf_nan=False,
        description="Pooled validation loss above the best one so far, in nats per token, that is still accepted.",
    )


class Guards(Section):
    """Checks on every commit against rounds that are silently wrong."""

    norm_band: float | None = Field(
        10.0,
        gt=1,
        description="An update is refused if its norm, for its learning rate, is so many times above or below the recent median; "
        "`null`: no check. Never done with `privacy.silo`.",
    )


class Rounds(Section):
    """How long a federation goes on, how many silos make a round, and what happens to late, missing and bad ones."""

    total: Positive = Field(10, description="Rounds of the whole federation, over all runs.")
    per_run: Positive | None = Field(None, description="Rounds one pipeline run works on; default: all that are left.")
    quorum: Annotated[Quorum | None, BeforeValidator(_counted, json_schema_input_type=Positive | Quorum | None)] = Field(
        None,
        description="Silos that must deliver for a round to be committed, as a number or as `{count, weight}`; default: more than half.",
    )
    on_missing_quorum: Literal["fail", "skip"] = Field(
        "fail", description="Below quorum: stop and leave the round open (exit code 3), or commit it as skipped with the previous global."
    )
    deadline: Duration | None = Field(
        None, description="Time one silo has for its part of a round (`90s`, `30m`, `2h`), counted from the start of its task."
    )
    min_fraction: Share = Field(
        0.5, description="Share of its steps that a silo must have done at the deadline for its update to count; else it is late."
    )
    stall: Duration | None = Field(
        "15m", description="A silo's work that shows no sign of life for so long is stopped as hung; `null`: never."
    )
    checkpoint_every: Annotated[int, Field(ge=0)] = Field(
        25, description="Steps between checkpoints of a local training in the silo's own storage; 0: none."
    )
    rollback: Rollback | None = Field(None, description="Leave a global behind that proves worse.")
    guards: Guards = Field(default_factory=Guards, description="Checks on every commit.")
    until: Until | None = Field(None, description="Stop early when converged.")


def seconds(duration: str | None) -> float | None:
    """``90s``, ``30m``, ``2h`` in seconds."""
    return None if duration is None else float(duration[:-1]) * SECONDS[duration[-1]]
