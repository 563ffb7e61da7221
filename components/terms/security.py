"""Security, as terms: who signs, with which keys, in which rounds. Public halves only; secrets never stand in the file."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from silotune.components.federation_file import PUBLIC_KEY
from silotune.components.terms.section import Section


def _listed(value: Any) -> Any:
    """``north: ed25519:…`` for ``north: [{public: ed25519:…}]``."""
    if isinstance(value, str):
        return [{"public": value}]
    if not isinstance(value, list):
        raise ValueError("must be a key as `silotune keys new` prints it, or a list of {public, since, until}")
    return value


class PublicKey(Section):
    """One Ed25519 key of a party, and the rounds it is good for."""

    public: str = Field(pattern=PUBLIC_KEY, description="As `silotune keys new` prints it.")
    since: Annotated[int, Field(ge=0)] = Field(0, description="First round it may sign.")
    until: Annotated[int, Field(ge=0)] | None = Field(None, description="Last round it may sign; default: no end.")

    @model_validator(mode="after")
    def _has_a_round(self) -> PublicKey:
        if self.until is not None and self.until < self.since:
            raise ValueError(f"until must be at least since, {self.since}, got {self.until}; a key that is good for no round signs nothing")
        return self

    def good_for(self, round_number: int) -> bool:
        return self.since <= round_number and (self.until is None or round_number <= self.until)


Keys = Annotated[
    list[PublicKey],
    BeforeValidator(_listed, json_schema_input_type=Annotated[str, Field(pattern=PUBLIC_KEY)] | list[PublicKey]),
    Field(min_length=1),
]


class Security(Section):
    """Who signs, and with which keys."""

    signing: bool = Field(
        True,
        description="Plans and commits are signed by the coordinator, updates, reports and scores by the silos; nothing unsigned counts.",
    )
    keys: dict[str, Keys] = Field(
        default_factory=dict,
        description="Public keys of `coordinator` and of every silo: a text, or a list of `{public, since, until}` to rotate them. "
        "Without: keys are made on this machine, and commits are marked `custody: local`.",
    )
