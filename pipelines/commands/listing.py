"""The list of commands that `silotune --help` shows: by what they are for, each with its whole first sentence."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

SECTIONS = {
    "Run a federation": ("new", "check", "run", "status", "ui", "sync", "strategies", "schema"),
    "Trust": ("keys", "verify", "gc", "policies"),
    "A silo's steward": ("policy", "review", "dry-run", "privacy", "audit-privacy"),
    "Kubeflow": ("onboard", "offboard", "doctor", "compile", "submit", "schedule", "runs", "logs", "cancel", "unschedule"),
}


class Listing(TyperGroup):
    """Commands in sections. Typer has a click of its own, whose types are not to be named."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        told = {name for names in SECTIONS.values() for name in names}
        rest = tuple(name for name in self.list_commands(ctx) if name not in told)
        width = max(map(len, self.commands))
        for title, names in (SECTIONS | {"Others": rest}).items():
            found = [(name, command) for name in names if (command := self.get_command(ctx, name)) and not command.hidden]
            if found:
                with formatter.section(title):
                    formatter.write_dl([(name.ljust(width), _first(command)) for name, command in found])


def _first(command: Any) -> str:
    """The first sentence of a command's help, whole: click would cut it at the width of a line."""
    return " ".join((command.help or "").split("\n\n")[0].split()).rstrip(".")
