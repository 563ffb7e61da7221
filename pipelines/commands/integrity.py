"""The commands about who may do what, and whether it was so: keys, policies, verify, gc."""

from __future__ import annotations

import getpass
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from silotune.components.errors import FederationError, RefusedError

if TYPE_CHECKING:
    from silotune.components.federation import Federation
    from silotune.components.protocol import Commit
    from silotune.components.provenance.chain import Chain
    from silotune.components.rounds import Rounds

File = Annotated[Path, typer.Argument(metavar="FILE", help="The federation file.")]

keys = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Make and show the keys that parties sign with.")


@keys.command("new")
def new_key(
    party: Annotated[str, typer.Argument(metavar="SILO|coordinator", help="Whose key it is.")],
    file: Annotated[Path | None, typer.Option("--file", help="Put it where this federation looks for it.")] = None,
    folder: Annotated[Path, typer.Option(help="Put it into this folder.")] = Path("keys"),
    replace: Annotated[bool, typer.Option("--replace", help="Rotate: put the present private key aside.")] = False,
) -> None:
    """Make a pair of keys on this machine. The private half stays here; the public half goes into the federation file."""
    from silotune.components import keys as pairs
    from silotune.components.federation import SILO_ID

    if not re.fullmatch(SILO_ID, party):
        raise FederationError(f"{party!r}: must be coordinator or a silo's id, lower-case letters, digits and inner dashes")
    place = _load(file).key_folder(party) if file else folder
    private = place / f"{party}.pem"
    before = pairs.text_of(pairs.private_key(private)) if replace and private.exists() else None
    public = pairs.new(place, party, replace=replace)
    typer.echo(f"private key: {private} (mode 600; whoever has it can sign as {party})", err=True)
    typer.echo(
        f"for the federation file, under security.keys:\n  {party}: {public}" if before is None else _rotation(party, before, public)
    )


def _rotation(party: str, before: str, public: str) -> str:
    return (
        f"for the federation file, with the rounds of each:\n  {party}:\n    - {{public: {before}, until: <last round>}}\n"
        f"    - {{public: {public}, since: <the round after>}}"
    )


@keys.command("show")
def show_keys(file: File) -> None:
    """Print the public keys of a federation, as its file would name them."""
    federation = _load(file)
    known = federation.public_keys
    if not known:
        raise FederationError(f"{file}: no party has a key yet; `silotune keys new` makes one, and `silotune run` makes all on one machine")
    typer.echo("security:\n  keys:")
    for party, its in known.items():
        if len(its) == 1 and its[0].since == 0 and its[0].until is None:
            typer.echo(f"    {party}: {its[0].public}")
        else:
            typer.echo(f"    {party}:")
            for key in its:
                rounds = {"since": key.since or None, "until": key.until}
                typer.echo(f"      - {{public: {key.public}{''.join(f', {k}: {v}' for k, v in rounds.items() if v is not None)}}}")


def policies(
    file: File,
    tls_only: Annotated[bool, typer.Option("--tls-only", help="Also refuse requests that are not encrypted.")] = False,
    kms_key: Annotated[str, typer.Option(help="ARN of the key that the bucket encrypts with, whose use is then granted.")] = "",
) -> None:
    """Print the IAM policies that let each party touch only what is its own in the bucket."""
    from silotune.pipelines.membership import bucket_policies as iam

    typer.echo(iam.render(_load(file), tls_only=tls_only, kms_key=kms_key))


def verify(
    file: File,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A global's digest, or an exported folder: also show its lineage.")
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Also digest every tensor file.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make lost or damaged globals again from their updates; implies --deep.")
    ] = False,
) -> None:
    """Walk from every global back to the base model, and fail on any break: signatures, digests, the audit log."""
    from silotune.components.provenance import chain as chains

    federation = _load(file)
    rounds = _rounds(federation)
    chain = chains.verify(rounds, deep=deep or repair)
    if not chain.commits and not chain.breaks:
        raise FederationError(f"federation {federation.name!r} has no round yet; run it first")
    if repair and chain.lost:
        for commit in chain.lost:
            _repair(federation, rounds, commit)
            typer.echo(f"round {commit.round}: its global was made again from its updates")
        chain = chains.verify(_rounds(federation), deep=True)
    for why, files in _grouped(chain.erased).items():
        typer.echo(f"{files} update file{'s' * (files > 1)} {why}")
    if chain.breaks:
        raise RefusedError("\n".join([f"the chain of {federation.name!r} is broken:", *(f"  {b}" for b in chain.breaks)]))
    typer.echo(
        f"{federation.name}: unbroken from round {chain.commits[-1].round} back to the base; {chain.records} records verified, "
        f"{chain.objects} tensor files {'digested' if deep or repair else 'there'}"
    )
    if federation.custody == "none":  # what the commits say of it is worth nothing, either
        typer.echo(CUSTODY["none"], err=True)
    elif marked := [c.round for c in chain.commits if c.custody == "local"]:
        where = "" if federation.custody == "local" else f"up to round {marked[-1]}: "
        typer.echo(where + CUSTODY["local"], err=True)
    if model:
        _tell_lineage(rounds, chain, model)


CUSTODY = {
    "local": "custody: local. All keys were made on this machine: the signatures show that nothing changed since, not who it was",
    "none": "signing: off. Nothing is signed: whoever could write to the store could have made all this",
}


def _grouped(erased: dict[str, str]) -> dict[str, int]:
    return {why: list(erased.values()).count(why) for why in dict.fromkeys(erased.values())}


def _repair(federation: Federation, rounds: Rounds, commit: Commit) -> None:
    import tempfile

    from silotune.components.aggregate.lost_global import fetch_global

    federation.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=federation.work) as folder:
        fetch_global(rounds, commit, Path(folder) / "global.safetensors", federation)


def _tell_lineage(rounds: Rounds, chain: Chain, model: str) -> None:
    from silotune.components.provenance.chain import exported_global

    outgoing = exported_global(rounds, Path(model)) if Path(model).is_dir() else model
    for commit in chain.lineage(outgoing):
        typer.echo(f"round {commit.round}: global {commit.outgoing[:12]}… commit {commit.digest[:12]}…")
        for silo, contribution in sorted(commit.contributions.items()):
            typer.echo(f"  {silo}: update {contribution.object[:12]}… weight {contribution.weight:.3f}, {contribution.examples} examples")


def gc(
    file: File,
    silo: Annotated[str | None, typer.Option(help="Erase all updates of a silo that has left.")] = None,
    reason: Annotated[str, typer.Option(help="Why, for the audit log.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be erased.")] = False,
) -> None:
    """Erase update files that storage.retention no longer keeps; the audit log says what, when and by whom."""
    from silotune.components.provenance import retention

    federation = _load(file)
    rounds = _rounds(federation)
    if silo is None and federation.storage.retention.updates is None:
        raise FederationError("storage.retention.updates: is not set, so that all is kept; set how many rounds to keep, or name a --silo")
    files = retention.departed(rounds, silo) if silo else retention.due(federation, rounds)
    count = sum(len(digests) for digests in files.values())
    if not dry_run and count:
        default = f"{silo} has left" if silo else f"storage.retention.updates is {federation.storage.retention.updates}"
        retention.erase(rounds, files, reason or default, _user())
    typer.echo(
        f"{count} update file{'s' * (count != 1)} {'would be ' if dry_run else ''}erased{''.join(f', {len(d)} of {s}' for s, d in sorted(files.items()))}"
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return f"user {os.getuid()}"


def _load(file: Path) -> Federation:
    from silotune.components.federation import Federation

    return Federation.load(file)


def _rounds(federation: Federation) -> Rounds:
    from silotune.components.rounds import Rounds

    return Rounds.of(federation)
