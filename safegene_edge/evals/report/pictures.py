"""Plots as SVG files that stand alone, in the report's style: for `--plot`.

Viewers of SVG know less CSS than browsers do. So the style sheet's variables are written out, once
in the light colours and once, behind a media query, in the dark ones.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from ...errors import SettingError
from . import findings, plots
from .findings import MEASURE, Json, Outcome
from .markup import Markup, join, tag

if TYPE_CHECKING:
    from ...recalibrate.results import Point

_WIDTH, _EDGE, _TITLE, _HEADING = 720, 24, 48, 34  # pixels
_COLOUR = re.compile(r"--([\w-]+): light-dark\((#\w+), (#\w+)\)")
_BASE = """
svg { font: 14px system-ui, sans-serif } .paper { fill: var(--page) } text { fill: var(--ink) }
.title { font-size: 17px; font-weight: 600 } .heading { font-weight: 600 }
"""


def of_report(report: Json) -> str:
    """Refusal against over-refusal, where both kinds were asked, and each suite's measure.

    Args:
        report: in the schema's shape.
    """
    refused, over = findings.refusals(report), findings.over_refusals(report)
    found = []
    if refused is not None and over is not None and refused.before.total and over.before.total:
        title = "Refusal against over-refusal"
        found.append((title, plots.plane("trade", title, over, refused)))
    rows = []
    for suite in report["suites"]:
        what, labels = MEASURE[suite["kind"]]
        rows.append(findings.row(f"{suite['name']}, {what}", suite, labels))
    found.append(("By suite", plots.intervals("suites", "By suite", rows)))
    columns = 1 if report.get("gene") is None else 2
    return _alone(str(report["model"]["name"]), found, columns)


def of_models(title: str, rows: Sequence[Outcome]) -> str:
    """A row a model, or several, each without and with the gene."""
    return _alone(title, [("", plots.intervals("models", title, rows))], 2)


def of_scores(scores: Mapping[int, float], kept: Collection[int]) -> str:
    """A bar a layer, as high as its selection score; the layers that the gene kept stand out.

    Raises:
        SettingError: there are no scores.
    """
    if not scores:
        raise SettingError("the gene carries no selection scores", "Extract it with --select")
    chosen = set(kept)
    title = f"Selection scores: {len(chosen & set(scores))} of {len(scores)} layers kept"
    return _alone(title, [("", plots.bars("scores", title, sorted(scores.items()), chosen))])


def of_curve(points: Sequence[Point], taken: Point, budget: float) -> str:
    """Refusal loss against the KL divergence that the budget bounds; see `plots.curve`."""
    title = "What refusals cost: every point that was looked at"
    return _alone(title, [("", plots.curve("curve", title, points, taken, budget))])


def _alone(title: str, parts: Sequence[tuple[str, plots.Plot]], n_columns: int = 1) -> str:
    """Plots below each other, each with its heading if it has one."""
    found: list[Markup] = []
    y = float(_TITLE)
    if n_columns > 1:
        found.append(_key(y))
        y += _HEADING
    for heading, plot in parts:
        if heading:
            found.append(tag("text", heading, x=_EDGE, y=y + 20, class_="heading"))
            y += _HEADING
        found.append(tag("svg", plot, x=_EDGE, y=y, width=_WIDTH, height=plot.height))
        y += plot.height + _EDGE
    width = _WIDTH + 2 * _EDGE
    svg = tag(
        "svg",
        tag("style", _style()),
        tag("rect", width=width, height=y, class_="paper"),
        tag("text", title, x=_EDGE, y=30, class_="title"),
        *found,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {y:g}",
        width=width,
        height=y,
        role="img",
        aria_label=title,
    )
    return f"{svg}\n"


def _key(y: float) -> Markup:
    """What the two kinds of dot mean."""
    return join(
        *(
            join(
                tag("circle", cx=x + 6, cy=y + 10, r=5, class_=f"dot {class_}"),
                tag("text", name, x=x + 18, y=y + 15),
            )
            for x, (class_, name) in zip((_EDGE, _EDGE + 160), plots.KEY, strict=True)
        )
    )


@cache
def _style() -> Markup:
    folder = resources.files(__package__) / "data"
    page, rules = ((folder / name).read_text(encoding="utf-8") for name in _SHEETS)
    colours = {name: pair for name, *pair in _COLOUR.findall(page)}

    def written(which: int) -> str:
        return re.sub(r"var\(--([\w-]+)\)", lambda found: colours[found[1]][which], _BASE + rules)

    return Markup(f"{written(0)}@media (prefers-color-scheme: dark) {{{written(1)}}}")


_SHEETS = ("report.css", "plots.css")
