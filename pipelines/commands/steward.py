"""The commands for a silo's steward: policy, review, dry-run, privacy."""

from __future__ import annotations

import contextlib
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from silotune.components.errors import FederationError, RefusedError, SilotuneError
from silotune.pipelines.commands.integrity import File

if TYPE_CHECKING:
    from rich.console import Console

    from silotune.components.federation import Federation
    from silotune.components.steward.admission import Asked, Verdict
    from silotune.components.steward.policy import Policy
    from silotune.pipelines.steward.dry_run import Leaving

Silo = Annotated[str | None, typer.Option("--silo", metavar="SILO", help="Whose it is.")]
PolicyFile = Annotated[Path | None, typer.Option("--policy", help="The policy; default: the one that holds for the silo on this machine.")]
RULES = {
    "expired": "the policy is still valid",
    "coordinator key": "a coordinator that is known asks",
    "base model": "a base model that may be trained",
    "image": "the silo's work runs in an image that is known",
    "strategy": "a way of aggregation that is allowed",
    "codec": "a number format of updates that is allowed",
    "privacy": "training is differentially private",
    "unit": "it protects whom it must",
    "epsilon": "epsilon of all rounds is low enough",
    "delta": "delta is low enough",
    "secure aggregation": "nobody sees the silo's single update",
    "participants": "enough silos take part",
    "update size": "no more bytes leave than allowed",
    "runs": "not too many federations use the data",
}

policy = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Start a policy, by which a silo's steward says what is allowed.")


@policy.command("new")
def new_policy(
    file: File,
    silo: Silo = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write it.")] = Path("policy.yaml"),
) -> None:
    """Write a commented policy that lets this federation through, to tighten."""
    from silotune.pipelines.checkup import local_base
    from silotune.pipelines.steward import policy_starter

    federation = _load(file)
    base, silo_id = local_base(federation), _silo(federation, silo)
    image = federation.silo(silo_id).placement.image
    policy_starter.write(output, federation, silo_id, base.digest if base else None, [image] if image and "@" in image else [])
    place = Path(federation.silo(silo_id).storage) / "policy.yaml"
    typer.echo(f"{output} written; once it says what you want, it belongs into the silo's storage, as {place}")


def review(file: File, policy: PolicyFile = None, silo: Silo = None) -> None:
    """Show what a federation asks for against a silo's policy, before anything is accepted."""
    from silotune.components.steward.admission import review as judge

    federation = _load(file)
    silo_id = _silo(federation, silo)
    rules = _policy(federation, silo_id, policy)
    if rules is None:
        raise FederationError(f"silo {silo_id!r}: has no policy on this machine; name one with --policy, or start one: silotune policy new")
    asked, based = _asked(federation, silo_id, rules)
    verdicts = judge(rules, asked)
    console = _console()
    for line in [*_asks(federation, silo_id), _so_far(federation, silo_id, rules)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print()
    unknown = set() if based else {"base model"}
    console.print(_verdict_table(verdicts, unknown))
    if failed := [v.rule for v in verdicts if v.passed is False and v.rule not in unknown]:
        raise RefusedError(
            f"silo {silo_id!r} would refuse this federation: its policy is against {', '.join(failed)}", f"policy: {failed[0]}"
        )
    console.print(f"\nnothing in it is against the policy of data set {rules.dataset}", highlight=False)


def _asks(federation: Federation, silo_id: str) -> list[str]:
    """In plain words."""
    f, privacy = federation, federation.privacy_agreed
    terms = f.silo(silo_id).training
    steps, batch = terms.steps or f.training.steps, terms.batch_size or f.training.batch_size
    protects = (
        f"epsilon {privacy.epsilon:g}, delta {privacy.delta:g} about each {privacy.unit}"
        if privacy.of_records
        else "none for single records"
    )
    most = f.evaluation.max_examples
    scored = "its valid records" if most is None else f"at most {most} of its valid records"
    sees = "only the sum of all updates" if privacy.secure_aggregation else "each silo's update"
    return [
        f"federation {f.name} asks silo {silo_id}, with {len(f.silos) - 1} others:",
        f"  to train {f.model.base} ({f.model.method}) on its records, {f.rounds.total} rounds of {steps} steps of {batch} examples",
        f"  to send what that changed, in {f.communication.codec}; the coordinator sees {sees}",
        f"  to score each global on {scored}{' and, at the end, test records' if f.silo(silo_id).test else ''}, and send the sums",
        f"  differential privacy: {protects}",
    ]


def _so_far(federation: Federation, silo_id: str, rules: Policy) -> str:
    """What the data set's ledger says, where it can be read from here."""
    from silotune.pipelines.steward import privacy_view

    try:
        found = privacy_view.account(federation, silo_id, [], time.time(), rules, every=False)
    except SilotuneError as error:
        return f"so far: {'this machine has no key of the silo, and so no ledger' if error.reason == 'no signing key' else error}"
    return f"so far: {privacy_view.told(found)} (ledger in {found.place})"


def _asked(federation: Federation, silo_id: str, rules: Policy) -> tuple[Asked, bool]:
    """What the file asks for, as far as it is known here; and whether the base model's digest is."""
    from silotune.components.rounds import Rounds
    from silotune.components.steward.admission import Asked
    from silotune.components.steward.ledger import Ledger
    from silotune.components.train.permission import update_bytes
    from silotune.pipelines.checkup import local_base

    base = local_base(federation)
    digests = (base.digest, base.tokenizer) if base else None
    facts: dict[str, Any] = {"image": federation.silo(silo_id).placement.image}
    with contextlib.suppress(SilotuneError):  # a store, or a ledger, that this machine does not reach
        rounds = Rounds.of(federation)
        if latest := rounds.latest():
            old = rounds.agreement(latest.agreement)
            digests = digests or (old.base, old.tokenizer)
            plan = rounds.plan(latest.round + 1)
            if plan and silo_id in plan.participants:
                facts["update_bytes"] = update_bytes(rounds, plan, rounds.agreement(plan.agreement), silo_id)
    with contextlib.suppress(SilotuneError):
        facts["runs"] = frozenset(e.charge.federation for e in Ledger.of(federation, silo_id, rules).entries())
    return Asked(silo_id, federation.agreement(*(digests or ("", ""))), **facts), digests is not None


def _verdict_table(verdicts: list[Verdict], unknown: set[str]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("", "rule", "asked for", "allowed"):
        table.add_column(name, no_wrap=name in ("", "rule"), overflow="fold")
    for verdict in verdicts:
        passed = None if verdict.rule in unknown else verdict.passed
        mark = {True: ("ok", "green"), False: ("NO", "red"), None: ("?", "yellow")}[passed]
        asked = "known once it is fetched" if verdict.rule in unknown else verdict.asked
        table.add_row(Text(*mark), Text(RULES[verdict.rule]), Text(_shortened(asked)), Text(_shortened(verdict.allowed)))
    return table


def _shortened(text: str) -> str:
    """With the beginnings of digests: they have been compared whole."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", text)


def dry_run(
    file: File,
    mock: Annotated[bool, typer.Option("--mock", help="On made-up records, the only ones that a dry run takes.")] = False,
    silo: Silo = None,
    policy: PolicyFile = None,
) -> None:
    """Run a silo's part once on made-up records, and print exactly what would leave. Nothing real is touched."""
    if not mock:
        raise FederationError("dry-run: works on made-up records only; say so with --mock")
    from silotune.pipelines.steward import dry_run as trial

    federation = _load(file)
    silo_id = _silo(federation, silo)
    found = trial.run(federation, silo_id, _policy(federation, silo_id, policy))
    console = _console()

    def say(text: str = "") -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"what silo {silo_id} would send in one round, on made-up records and with made-up keys:")
    for status in found.statuses:
        say(f"\nstatus line: {status}")
    for leaving in found.leaving:
        for line in _told(leaving):
            say(line)
    say(f"\nand nothing else: {len(found.leaving)} objects, {sum(x.size for x in found.leaving)} bytes")
    if federation.privacy.secure_aggregation is not None:
        say("but for what needs other silos: shares of secrets, sealed to each of them, and the update as whole numbers under masks")


def _told(leaving: Leaving) -> list[str]:
    lines = [f"\n{leaving.key} ({leaving.size} bytes)"]
    if leaving.record is not None:
        lines += [f"  {name}: {_short(value) if name == 'tensors' else _whole(value)}" for name, value in leaving.record.items()]
    lines += [f"  tensor {name}: {dtype} {shape}" for name, (dtype, shape) in leaving.tensors.items()]
    return lines


def _whole(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(value: Any) -> str:
    text = _whole(value)
    return text if len(text) <= 100 else f"{text[:80]}… ({len(text)} characters)"


def privacy(
    file: File,
    silo: Silo = None,
    rounds: Annotated[
        list[int] | None, typer.Option("--rounds", min=1, help="Forecast so many further rounds; may be given again.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw it; ends with .svg.")] = None,
) -> None:
    """Show what a silo's ledger says: epsilon spent and left, over all federations, and what further rounds would cost."""
    from silotune.pipelines.steward import privacy_plot, privacy_view

    if plot and plot.suffix != ".svg":
        raise FederationError(f"--plot: must end with .svg, got {plot}; it is the one kind that is drawn")
    federation = _load(file)
    chosen = [federation.silo(silo).id] if silo else _here(federation)
    if plot and len(chosen) > 1:
        raise FederationError(f"--plot: draws one silo, and {', '.join(chosen)} have ledgers here; name one with --silo")
    console = _console()
    for silo_id in chosen:
        found = privacy_view.account(federation, silo_id, rounds or [1, 5, 10], time.time())
        for line in privacy_view.lines(found):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        for table in privacy_view.tables(found):
            console.print()
            console.print(table)
        console.print()
        if plot:
            _write(plot, privacy_plot.svg(found))
            console.print(f"drawn to {plot}", markup=False, highlight=False, soft_wrap=True)


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FederationError(f"{file}: cannot be written: {error.strerror}; give a place you may write to") from None


def _here(federation: Federation) -> list[str]:
    """Silos whose keys are on this machine, and so their ledgers."""
    from silotune.components import keys

    found = []
    for silo_id in federation.silo_ids:
        with contextlib.suppress(SilotuneError):
            keys.own(federation, silo_id)
            found.append(silo_id)
    if not found:
        raise FederationError(f"{federation.file}: no silo has a key, and so a ledger, on this machine; run this on the silo's own")
    return found


def _silo(federation: Federation, asked: str | None) -> str:
    if asked is not None:
        return federation.silo(asked).id
    if len(federation.silos) == 1:
        return federation.silo_ids[0]
    raise FederationError(f"--silo: is needed, since the federation has {', '.join(federation.silo_ids)}; name yours")


def _policy(federation: Federation, silo_id: str, file: Path | None) -> Policy | None:
    from silotune.components.steward.policy import Policy

    return Policy.load(file) if file else Policy.of(federation, silo_id)


def _load(file: Path) -> Federation:
    from silotune.components.federation import Federation

    return Federation.load(file)


def _console() -> Console:
    from rich.console import Console

    return Console()
