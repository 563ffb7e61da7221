"""What a terminal shows of an audit of privacy: figures, and what they mean in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from silotune.components.learning.leakage.exposure import Exposure
    from silotune.components.learning.leakage.membership import Membership
    from silotune.pipelines.steward.leakage import Leakage, OfSilo


def show(found: dict[str, Leakage]) -> None:
    """A table of all that was measured, one column for each model, and a few sentences."""
    from rich.console import Console
    from rich.table import Table

    console, first = Console(), next(iter(found.values()))
    table = Table(title=f"{first.federation}: what the model of round {first.round} tells about records")
    for name in ("silo", "measured", "by chance", *found):
        table.add_column(name, justify="left" if name in ("silo", "measured") else "right")
    columns = [{(silo, what): (chance, value) for silo, what, chance, value in rows(one)} for one in found.values()]
    for key in dict.fromkeys(k for column in columns for k in column):
        chance = next(column[key][0] for column in columns if key in column)
        table.add_row(*key, chance, *(column.get(key, ("", ""))[1] for column in columns))
    console.print(table)
    for line in words(first):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def rows(found: Leakage) -> Iterator[tuple[str, str, str, str]]:
    """(silo, what, what chance gives, what was found)."""
    for silo, one in found.silos.items():
        yield from ((silo, *row) for row in _membership("membership", one.membership))
        yield silo, "extraction: verbatim, members", f"{one.extraction.others:.1%} of others", f"{one.extraction.members:.1%}"
        if one.exposure:
            yield silo, *_exposure("canaries: exposure, bits", one.exposure)
        if one.shown:
            yield silo, "canaries: epsilon is at least", "0", f"{one.shown.epsilon:.3f}"
        if one.update:
            yield from ((silo, *row) for row in _membership(f"update of round {one.update.round}: membership", one.update.membership))
            yield from ((silo, *row) for row in _membership(f"update of round {one.update.round}: alignment", one.update.alignment))
            if one.update.exposure:
                yield silo, *_exposure(f"update of round {one.update.round}: exposure, bits", one.update.exposure)
    if found.training:
        yield "", "private training: epsilon is at least", "0", f"{found.training.epsilon:.3f}"
    if found.claimed is not None:
        yield "", "epsilon that is claimed", "", f"{found.claimed:g}"


def _membership(what: str, found: Membership) -> Iterator[tuple[str, str, str]]:
    yield f"{what}, area", f"0.500 ± {found.error:.3f}", f"{found.auc:.3f}"
    for rate, share in found.found.items():
        yield f"{what}, found at {float(rate):.1%} false", f"{float(rate):.1%}", f"{share:.1%}"


def _exposure(what: str, found: Exposure) -> tuple[str, str, str]:
    return what, f"{found.by_chance:.2f} ± {found.error:.2f}", f"{found.mean:.2f} of {found.most:.1f}"


def words(found: Leakage) -> Iterator[str]:
    """What is to be concluded, and what is not."""
    for silo, one in found.silos.items():
        leaks = list(_leaks(one))
        yield f"{silo}: {'; '.join(leaks) if leaks else 'none of these attacks does better than chance'}."
        if one.no_update:
            yield f"{silo}: no single update was looked at: {one.no_update}."
    if found.claimed is None:
        yield "Nothing is claimed: privacy.epsilon is not set, so that nothing but these attacks bounds what others may find."
    elif not found.broken:
        yield f"Nothing measured contradicts epsilon {found.claimed:g} at delta {found.delta:g}. Attacks bound epsilon from below only: the promise rests on its proof."


def _leaks(one: OfSilo) -> Iterator[str]:
    if one.membership.surprising:
        yield f"training records can be told from others better than by chance (area {one.membership.auc:.2f})"
    if one.extraction.surprising:
        yield f"the model completes {one.extraction.members:.0%} of the training records asked for, and {one.extraction.others:.0%} of others"
    if one.exposure and one.exposure.surprising:
        yield f"it gives away {one.exposure.mean:.1f} bits of a canary's secret where chance gives {one.exposure.by_chance:.1f}"
    if one.update and (one.update.membership.surprising or one.update.alignment.surprising):
        yield "who sees its update alone can tell its records"
