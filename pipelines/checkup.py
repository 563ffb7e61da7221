"""What `silotune check` tells of a federation file: its terms in a table, what an edit would mean, whether its records can be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.components import base_model
from silotune.components.errors import FederationError
from silotune.components.federation import Agreement, Federation, Silo
from silotune.components.federation_file import is_remote
from silotune.components.learning.records import PERSON
from silotune.components.protocol import Commit
from silotune.components.rounds import Rounds
from silotune.components.terms.privacy import SiloPrivacy, most_in_league, sums_securely, threshold_of
from silotune.components.terms.strategies import RULES, STRATEGIES
from silotune.components.terms.training import Training

if TYPE_CHECKING:
    from rich.console import RenderableType


def local_base(federation: Federation) -> base_model.Base | None:
    """The base model with its digests where it is a folder on this machine, else None: nothing is fetched for a check.

    Raises:
        FederationError: it is no model folder, or has no tokenizer.
    """
    location = federation.model.base
    return base_model.resolve(location, federation.work / "base") if location.startswith("/") else None


CUSTODY = {
    "parties": "signed; each party holds its own key",
    "local": "signed; custody: local, all keys are made and held on this machine",
    "none": "UNSIGNED: whoever can write to the store can forge plans, updates and models",
}


def _quorum(federation: Federation) -> str:
    quorum = federation.quorum
    weight = f" and {quorum.weight:.0%} of the examples" if quorum.weight else ""
    return f"{quorum.count} of {len(federation.silos)}{weight}"


def terms_table(federation: Federation, base: base_model.Base | None) -> RenderableType:
    """Who, on what, under which terms."""
    from rich.table import Table
    from rich.text import Text

    f, t = federation, federation.training
    lora = f.model.lora
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    shape = f"lora, r {lora.r}, alpha {lora.alpha:g}, on {targets}" if f.model.method == "lora" else "full: every weight"
    until = f"; until {f.rounds.until.metric} is stale for {f.rounds.until.patience}" if f.rounds.until else ""
    rows = {
        "model": f"{f.model.base}\n{shape}",
        "base": f"sha256 {base.digest[:12]}, tokenizer {base.tokenizer[:12]}" if base else "digests are taken when it is fetched",
        "silos": "\n".join(_silo(silo) for silo in f.silos),
        "data": f"{f.data.format}, at most {f.data.max_length} tokens",
        "rounds": f"{f.rounds.total}, {f.rounds.per_run or 'all'} per run, quorum {_quorum(f)}{until}",
        "training": f"{t.steps} steps of {t.batch_size} examples per round, rate {t.learning_rate:g}, {_course(t)}, seed {t.seed}",
        "aggregation": _aggregation(f),
        "privacy": _privacy(f),
        "export": f"{f.export.select} round, {'merged model' if f.export.merge and f.model.method == 'lora' else 'as trained'}",
        "security": CUSTODY[f.custody],
        "store": f.storage.root,
        "tracking": f.tracking.uri,
        "agreement covers": "base, model, silos, data, training, aggregation, evaluation, communication, privacy, keys",
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _privacy(federation: Federation) -> str:
    """What is promised about records, silos and single updates, and what the promises leave out."""
    terms, silos = federation.privacy_agreed, len(federation.silos)
    lines = ["none for single records; privacy.epsilon asks for it"]
    if terms.of_records:
        whose = "all records of a person" if terms.unit == "person" else "a record"
        lines = [
            f"epsilon {terms.epsilon:g} at delta {terms.delta:g} for {whose}, over {terms.rounds} rounds of each silo; noise follows from each "
            "silo's number of them",
            "not covered: scores on valid and test records, which are sent as they are (a silo's policy can keep them), and time",
        ]
    if terms.silo:
        lines.append(
            f"epsilon {terms.silo.epsilon:g} at delta {terms.silo.delta:g} for a silo's part, over {terms.rounds} rounds, by {terms.silo.mechanism} noise"
        )
        lines += _noisy_quantile(federation, terms.silo)
    if terms.secure_aggregation:
        need, league = threshold_of(terms.secure_aggregation, silos), most_in_league(terms.secure_aggregation, silos)
        lines.append(
            f"single updates are seen by nobody, unless more than {league} silos are in league with the coordinator; {need} of {silos} open their sum"
        )
    else:
        lines.append("single updates are seen by the coordinator; privacy.secure_aggregation hides them")
    return "\n".join(lines)


def _noisy_quantile(federation: Federation, terms: SiloPrivacy) -> list[str]:
    """Whether so few silos' norms can be followed under such noise."""
    clip, silos = federation.aggregation.clip, len(federation.silos)
    if clip is None or clip.quantile is None:
        return []
    from silotune.components.learning.privacy.gaussian import mu_of
    from silotune.components.learning.privacy.silo_noise import WORTH, count_tells

    tells = count_tells(silos, mu_of(terms.epsilon, terms.delta))
    if tells >= WORTH:
        return []
    return [
        f"warning: aggregation.clip.quantile follows norms by a noisy count, which with {silos} silos and this epsilon tells up from down by {tells:.2g} "
        f"standard deviations over all rounds, {WORTH:g} are needed; set aggregation.clip.norm, which costs nothing of it"
    ]


def _course(terms: Training) -> str:
    """How the rate goes, within a round and over all."""
    within = f"{terms.schedule} in a round" if terms.schedule != "constant" else ""
    over = f"{terms.round_schedule} over the rounds" if terms.round_schedule != "constant" else ""
    return ", ".join(filter(None, (within, over))) or "constant"


def _aggregation(federation: Federation) -> str:
    terms = federation.aggregation
    rule = f", {terms.robust.rule} against {terms.robust.hostile} hostile" if terms.robust else ""
    clip = f", norms of at most {terms.clip.norm:g}" if terms.clip and terms.clip.norm else ""
    return f"{terms.strategy} by {terms.weights}{rule}{clip}, updates in {federation.communication.codec}"


def composition_tables() -> tuple[RenderableType, RenderableType, RenderableType]:
    """What can be chosen in ``aggregation``, and what holds together: what strategies hold with, what they are, and robust rules."""
    from rich.table import Table

    def table(*columns: str) -> Table:
        made = Table(box=None, pad_edge=False)
        for i, name in enumerate(columns):
            least = len("arXiv:0000.00000") if name == "source" else None
            made.add_column(name, no_wrap=i == 0, overflow="fold", min_width=least, style="bold" if i == 0 else "")
        return made

    def yes(holds: bool) -> str:
        return "yes" if holds else "-"

    holds = table(
        "strategy", "LoRA product exact", "unequal ranks", "full", "robust rules", "one sum: tree", "secure sum", "silo DP", "record DP"
    )
    ways = table("strategy", "what", "source")
    for name, s in STRATEGIES.items():
        exact = s.exact if s.lora_only else "no"
        told = (s.unequal_ranks, not s.lora_only, s.takes_rules, s.linear, sums_securely(s), sums_securely(s), s.record_privacy)
        holds.add_row(name, exact, *map(yes, told))
        ways.add_row(name, s.what, s.paper)
    rules = table("rule", "silos needed", "by", "what", "source")
    for name, r in RULES.items():
        few, each = r.least["silos"], r.least["hostile"]
        rules.add_row(name, f"{each if each > 1 else ''}f + {few}", r.kind, r.what, r.paper)
    return holds, ways, rules


def _silo(silo: Silo) -> str:
    own = ", ".join(f"{key} {value}" for key, value in silo.training.model_dump(exclude_none=True).items())
    own = ", ".join(filter(None, [own, f"rank {silo.lora.r}" if silo.lora.r else ""]))
    splits = ", ".join(key for key in ("train", "valid", "test") if getattr(silo, key))
    return f"{silo.id}: {splits}" + (f"; own {own}" if own else "")


def edit_lines(federation: Federation, rounds: Rounds, base: base_model.Base | None) -> list[str]:
    """What the file, as it stands, changes for a federation that has commits; no lines for one that has none.

    Raises:
        FederationError: it would be another federation.
        UnreachableError: the store.
    """
    latest = rounds.latest()
    if latest is None:
        return ["the store has no round of it yet; `silotune run` begins"]
    old = rounds.agreement(latest.agreement)
    new = federation.agreement(base.digest if base else old.base, base.tokenizer if base else old.tokenizer)
    if odd := old.forbids(new):
        changed = "\n".join(f"  {line}" for line in _told(old, new, odd))
        raise FederationError(
            f"federation {federation.name!r} stands at round {latest.round} on other terms, and these make a new one:\n{changed}\n"
            "undo the change, or give a new name or storage.root"
        )
    lines = [f"the store has it at round {latest.round}"]
    changes = old.changes(new)
    if not changes:
        return [*lines, "the terms are those agreed on; paths, storage, tracking and round counts may change at any time"]
    return [*lines, _from_when(rounds, latest, new), *(f"  {line}" for line in _told(old, new, changes))]


def _from_when(rounds: Rounds, latest: Commit, new: Agreement) -> str:
    plan = rounds.plan(latest.round + 1)
    if plan is None or plan.agreement == new.digest:
        return f"an amendment, which holds from round {latest.round + 1} on:"
    lost = sorted(rounds.updates(plan.round)[0])
    what = f", and drops the updates of {', '.join(lost)}" if lost else ""
    return f"an amendment, which closes open round {plan.round} without a result{what}, and holds from round {plan.round + 1} on:"


def _told(old: Agreement, new: Agreement, paths: list[str]) -> Iterator[str]:
    before, after = old.model_dump(), new.model_dump()
    for path in paths:
        got = [_at(before, path), _at(after, path)]
        if path.startswith("silos.") and path.count(".") == 1:
            yield f"{path}: {'joins' if got[0] is None else 'leaves'}"
        else:
            a, b = (str(x)[:12] if path in ("base", "tokenizer") else "unset" if x is None else str(x) for x in got)
            yield f"{path}: {a} → {b}"


def _at(value: Any, path: str) -> Any:
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


@dataclass(frozen=True)
class Reading:
    """How reading one split of one silo went."""

    silo: str
    split: str
    told: str
    problem: str = ""


def readings(federation: Federation, base: base_model.Base | None) -> Iterator[Reading]:
    """Read every record on this machine, with the reader that preprocess uses; a file's first problem is told.

    With a base its tokenizer says, too, what would be cut or left out.
    """
    for silo in federation.silos:
        for split in ("train", "valid", "test"):
            source = getattr(silo, split)
            if not source:
                continue
            if is_remote(source):
                yield Reading(silo.id, split, "not read: it is in S3")
                continue
            try:
                yield Reading(silo.id, split, _reading(federation, silo, Path(source), base, alone=split == "train" and not silo.valid))
            except FederationError as error:
                yield Reading(silo.id, split, "", str(error))


def _reading(federation: Federation, silo: Silo, source: Path, base: base_model.Base | None, *, alone: bool) -> str:
    """What is in one split; ``alone`` where valid is set aside from it.

    Raises:
        FederationError: what preprocess would say.
    """
    from silotune.components.learning.records import read_records

    data, person = federation.data, federation.privacy.person_field
    first: set[str] = set()  # of what is set aside or not at least two must be there

    def records() -> Iterator[tuple[str, dict[str, Any]]]:
        for place, record in read_records(source, data.format, federation.fields_of(silo), person):
            if len(first) < 2:
                first.add(str(record.get(PERSON) or record))
            yield place, record

    if base is None:
        count = sum(1 for _ in records())
        if not count:
            raise FederationError(f"{source.name}: holds no record; give a file with at least one")
        told = f"{count} records"
    else:
        from silotune.components.learning.model import load_tokenizer
        from silotune.components.learning.tokens import Tokeniser, count_examples

        tokeniser = Tokeniser(load_tokenizer(base.folder), data.template, data.max_length, data.long_examples)
        try:
            told = count_examples(records(), tokeniser).told(data.max_length)
        except FederationError as error:
            raise FederationError(str(error) if str(error).startswith(source.name) else f"{source.name}: {error}") from None
    if alone and len(first) < 2:
        raise FederationError(f"{source.name}: holds one record or person only, of which nothing can be set aside; name a valid file")
    return told
