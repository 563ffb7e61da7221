"""The plot: what it shows is what the account says, in any course of things, and a reader who does not see it is told the same."""

from __future__ import annotations

import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from silotune.components.steward.budget import Limits, Spent
from silotune.pipelines.steward.privacy_plot import HEIGHT, WIDTH, svg
from silotune.pipelines.steward.privacy_view import Account, Point

AT = 1.78e9


def spent(total: float) -> Spent:
    return Spent(run=total, month=total, total=total, delta=1e-5, unit="record", trainings=0, unprotected=0)


def account(course: list[float], ahead: dict[int, float] | None = None, names: list[str] | None = None, **limits: Any) -> Account:
    names = names or ["clinics"] * len(course)
    trained = [(name, AT + 86_400.0 * i) for i, name in enumerate(names)]
    points = [Point(i, trained[i - 1][1], e) for i, e in enumerate(course, 1)]
    now = spent(course[-1] if course else 0.0).model_copy(update={"trainings": len(course)})
    return Account(
        silo="north", federation="clinics", dataset="letters", place="/ledger", policy=None, now=AT, limits=Limits(**limits), spent=now, promise=None,
        trained=trained, course=points, next={k: spent(e) for k, e in (ahead or {}).items()}, bounded=True,
    )  # fmt: skip


def drawn(found: Account) -> ElementTree.Element:
    return ElementTree.fromstring(svg(found))


def shapes(root: ElementTree.Element, tag: str, kind: str = "") -> list[ElementTree.Element]:
    return [e for e in root.findall(f".//{{*}}{tag}") if not kind or e.get("class") == kind]


def words(root: ElementTree.Element) -> list[str]:
    return ["".join(e.itertext()) for e in root.findall(".//{*}text")]


def test_points_stand_where_their_numbers_are() -> None:
    root = drawn(account([2.0, 3.0, 4.0], total=8.0))
    heights = [float(c.get("cy", 0)) for c in shapes(root, "circle", "dot")]
    (limit,) = shapes(root, "path", "limit")
    at_limit = float(re.findall(r"M\d+,([\d.]+)", limit.get("d", ""))[0])
    zero = float(re.findall(r"M\d+,([\d.]+)", shapes(root, "path", "axis")[0].get("d", ""))[0])
    assert [(zero - h) / (zero - at_limit) for h in heights] == pytest.approx([2 / 8, 3 / 8, 4 / 8], abs=2e-3)
    assert "limit in total: 8" in words(root)
    assert "epsilon" in words(root)


def test_further_rounds_are_dashed_and_those_that_are_refused_are_marked() -> None:
    root = drawn(account([2.0, 3.0], {1: 3.5, 5: 4.5, 10: 6.0}, total=5.0))
    assert len(shapes(root, "circle", "open")) == 2
    assert [c.find("{*}title").text for c in shapes(root, "circle", "refused") if c.find("{*}title") is not None] == [
        "10 further rounds: 6.000, refused"
    ]  # type: ignore[union-attr]
    assert {"clinics", "further rounds", "refused"} <= set(words(root))
    said = root.find("{*}desc")
    assert said is not None
    assert "1 more: 3.500, 5 more: 4.500, 10 more: 6.000 (refused)" in (said.text or "")


def test_where_nothing_bounds_no_line_is_drawn() -> None:
    root = drawn(account([1.0, 2.0, math.inf, math.inf], {1: math.inf}))
    (area,) = shapes(root, "rect", "nothing")
    assert float(area.get("x", 0)) == float(shapes(root, "circle", "dot")[-1].get("cx", 0))
    assert "no bound" in words(root)
    assert not shapes(root, "polyline", "ahead")
    assert "further rounds" not in words(root)


def test_a_ledger_without_trainings_says_so() -> None:
    root = drawn(account([]))
    assert "no training yet" in words(root)
    assert not shapes(root, "circle")


def test_federations_have_colours_and_names_of_their_own() -> None:
    names = ["a"] * 3 + ["b"] * 2 + ["a"] + [f"f{i}" for i in range(6)]
    root = drawn(account([float(i) for i in range(1, 13)], names=names))
    strips = [(r.get("fill"), r.find("{*}title").text) for r in shapes(root, "rect") if r.find("{*}title") is not None]  # type: ignore[union-attr]
    assert strips[:3] == [("var(--f0)", "a: 3"), ("var(--f1)", "b: 2"), ("var(--f0)", "a: 1")]
    assert "4 others" in words(root)


@pytest.mark.parametrize("count", [1, 2, 7, 40, 999])
@pytest.mark.parametrize("epsilon", [1e-4, 0.3, 8.0, 12_345.0])
def test_everything_stands_within_the_picture(count: int, epsilon: float) -> None:
    course = [epsilon * (i + 1) / count for i in range(count)]
    root = drawn(account(course, {1: epsilon * 1.2}, total=epsilon * 1.1))
    for circle in shapes(root, "circle", "dot"):
        assert 0 < float(circle.get("cx", 0)) < WIDTH
        assert 0 < float(circle.get("cy", 0)) < HEIGHT
    ticks = [float(t.text or "nan") for t in root.findall(".//{*}text") if t.get("text-anchor") == "end"]
    assert 3 <= len(ticks) <= 9
    assert ticks[0] == 0
    assert ticks[-1] >= epsilon * 1.2
    assert all(float(t.get("x", 0)) + 40 < WIDTH for t in root.findall(".//{*}text") if t.get("font-size") == "11")


def test_it_is_told_to_who_does_not_see_it_and_shown_in_the_dark() -> None:
    root = drawn(account([2.0], total=8.0))
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == "title desc"
    title = root.find("{*}title")
    assert title is not None
    assert title.text == "Privacy spent on data set letters, silo north"
    assert "prefers-color-scheme:dark" in svg(account([2.0]))
    assert "http" not in svg(account([2.0])).replace("http://www.w3.org/2000/svg", "")  # no font, script or picture from elsewhere
