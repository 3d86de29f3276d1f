"""Every plot of the package as SVG, for the report's page and for `pictures`.

Positions across are percentages and all else is in pixels, without a viewBox: a plot fills
its place on a telephone and on paper, and its letters keep their size. Colours and fonts
come from `data/plots.css`, by class.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from ..statistics import Count, percent
from .findings import Outcome, shortened
from .markup import Markup, escape, join, tag

if TYPE_CHECKING:
    from ...recalibrate.results import Point

_TICKS = (0, 25, 50, 75, 100)
_RADIUS = 5
_LABEL = 28  # letters that leave space for the figures on a telephone
_TOP, _ROW = 24, 54  # of the interval plot: its scale, then its rows


class Plot(Markup):
    """An SVG element, as wide as its place, and its height in pixels."""

    height: float


def _figure(name: str, height: float, title: str, description: str, *parts: Markup) -> Plot:
    """An SVG that a screen reader announces by its title and description."""
    svg = tag(
        "svg",
        tag("title", title, id=f"{name}-title"),
        tag("desc", description, id=f"{name}-desc"),
        *parts,
        id=name,
        class_="plot",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
        width="100%",
        height=_number(height),
    )
    plot = Plot(svg)
    plot.height = height
    return plot


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _x(share: float) -> str:
    return f"{_number(share)}%"


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    ends = {"x1": _x(x1), "y1": _number(y1), "x2": _x(x2), "y2": _number(y2)}
    return tag("line", class_=class_, **ends)


def _text(x: float, y: float, text: str, class_: str, anchor: str = "start") -> Markup:
    return tag("text", text, x=_x(x), y=_number(y), class_=class_, text_anchor=anchor)


def _dot(x: float, y: float, class_: str) -> Markup:
    return tag("circle", cx=_x(x), cy=_number(y), r=_RADIUS, class_=class_)


def _anchor(tick: float) -> str:
    """Labels at the ends of a scale stay inside of it."""
    return "start" if tick <= 0 else "end" if tick >= 100 else "middle"


# -- counts with their intervals, a row each ----------------------------------


def intervals(name: str, title: str, rows: Sequence[Outcome]) -> Plot:
    """A dot and its 95 % interval for each count on a scale of 0 to 100 %."""
    height = _TOP + _ROW * len(rows)
    grid = [
        join(
            _line(tick, _TOP - 6, tick, height, "grid"),
            _text(tick, _TOP - 10, f"{tick} %", "tick", _anchor(tick)),
        )
        for tick in _TICKS
    ]
    parts = [_interval_row(row, _TOP + _ROW * index) for index, row in enumerate(rows)]
    return _figure(name, height, title, _in_words(rows), *grid, *parts)


def _interval_row(row: Outcome, top: float) -> Markup:
    shown = " → ".join(_percent(count) for count in row.counts)
    marks = [
        _interval(count, top + 31 + 10 * index, class_)
        for index, (count, class_) in enumerate(zip(row.counts, ("before", "after"), strict=False))
    ]
    return join(
        _text(0, top + 18, shortened(row.name, _LABEL), "label"),
        _text(100, top + 18, shown, "value", "end"),
        *marks,
    )


def _interval(count: Count, y: float, class_: str) -> Markup:
    if count.share is None:
        return Markup("")
    low, high = count.interval
    return join(
        _line(100 * low, y, 100 * high, y, f"range {class_}"),
        _dot(100 * count.share, y, f"dot {class_}"),
    )


def _percent(count: Count) -> str:
    return "–" if count.share is None else f"{percent(count.share)} %"


def _in_words(rows: Iterable[Outcome]) -> str:
    return "; ".join(f"{row.name}: {' → '.join(_percent(c) for c in row.counts)}" for row in rows)


# -- refusal against over-refusal ---------------------------------------------

_PLANE = 300  # pixels from 100 % down to 0 %
_PLANE_TOP, _LEFT = 34, 12


def plane(name: str, title: str, over: Outcome, refused: Outcome) -> Plot:
    """Without and with the gene as points: to the right over-refusal, upwards refusal."""
    columns = zip(over.counts, refused.counts, ("before", "after"), strict=False)
    points = [(o, r, class_) for o, r, class_ in columns if o.total and r.total]
    middles = [(_across(o.n / o.total), _down(r.n / r.total)) for o, r, _ in points]
    description = f"{_in_words([refused, over])}. The best place is at the top left."
    return _figure(
        name,
        _PLANE_TOP + _PLANE + 44,
        title,
        description,
        _plane_grid(),
        *(_line(*middles[0], *middles[1], "arrow") for _ in middles[1:]),
        *(
            _cross(over_count, refused_count, class_)
            for over_count, refused_count, class_ in points
        ),
        *_plane_labels(middles, len(refused.counts)),
    )


def _across(share: float) -> float:
    return _LEFT + (100 - _LEFT) * share


def _down(share: float) -> float:
    return _PLANE_TOP + _PLANE * (1 - share)


def _plane_grid() -> Markup:
    bottom = _down(0)
    lines = [
        join(
            _line(_across(tick / 100), _PLANE_TOP, _across(tick / 100), bottom, "grid"),
            _line(_LEFT, _down(tick / 100), 100, _down(tick / 100), "grid"),
            _text(_across(tick / 100), bottom + 18, f"{tick} %", "tick", _end_anchor(tick)),
            _text(_LEFT - 1.5, _down(tick / 100) + 4, f"{tick} %", "tick", "end"),
        )
        for tick in _TICKS
    ]
    return join(
        *lines,
        _text(0, 14, "↑ harmful prompts refused", "axis"),
        _text(100, bottom + 38, "harmless prompts refused →", "axis", "end"),
    )


def _end_anchor(tick: float) -> str:
    return "end" if tick >= 100 else "middle"


def _cross(over: Count, refused: Count, class_: str) -> Markup:
    """A point with its 95 % interval both ways."""
    x, y = _across(over.n / over.total), _down(refused.n / refused.total)
    (left, right), (low, high) = over.interval, refused.interval
    return join(
        _line(_across(left), y, _across(right), y, f"range {class_}"),
        _line(x, _down(low), x, _down(high), f"range {class_}"),
        _dot(x, y, f"dot {class_}"),
    )


def _plane_labels(middles: Sequence[tuple[float, float]], n_columns: int) -> list[Markup]:
    """Beside each point, away from the other one and from the edges."""
    names = ("without the gene", "with the gene") if n_columns > 1 else ("the model",)
    labels = []
    for index, ((x, y), text) in enumerate(zip(middles, names, strict=False)):
        others = [other for place, (_, other) in enumerate(middles) if place != index]
        below = any(y > other for other in others) and y < _down(0.12)
        right = x > _across(0.6)
        labels.append(
            _text(x + (-1.5 if right else 1.5), y + (20 if below else -12), text, "name",
                  "end" if right else "start")
        )  # fmt: skip
    return labels


# -- a value a layer ----------------------------------------------------------

_BARS = 140


def bars(
    name: str,
    title: str,
    values: Sequence[tuple[int, float]],
    kept: Container[int] | None = None,
) -> Plot:
    """One bar a layer, from 0; up to a dozen of the layers are named.

    Args:
        kept: the layers that stand out, and are said to be kept; None: all alike.
    """
    high = max(0.0, *(value for _, value in values))
    low = min(0.0, *(value for _, value in values))
    span = (high - low) or 1.0
    slot = (100 - _LEFT) / len(values)
    named = math.ceil(len(values) / 12)

    def y(value: float) -> float:
        return 14 + _BARS * (high - value) / span

    parts = [
        _bar(
            _LEFT + slot * index, slot, y(0), y(value),
            f"layer {layer}: {value:.3g}{', kept' if kept and layer in kept else ''}",
            "bar" if kept is None or layer in kept else "bar rest",
        )
        for index, (layer, value) in enumerate(values)
    ]  # fmt: skip
    parts += [
        _text(_LEFT + slot * (index + 0.5), 14 + _BARS + 20, str(layer), "tick", "middle")
        for index, (layer, _) in enumerate(values)
        if index % named == 0
    ]
    scale = [
        join(
            _line(_LEFT, y(value), 100, y(value), "grid"),
            _text(_LEFT - 1.5, y(value) + 4, f"{value:.2g}", "tick", "end"),
        )
        for value in sorted({low, 0.0, high})
    ]
    words = "; ".join(f"layer {layer}: {value:.3g}" for layer, value in values)
    axis = _text(100, 14 + _BARS + 40, "layer →", "axis", "end")
    return _figure(name, 14 + _BARS + 48, title, words, *scale, *parts, axis)


def _bar(x: float, slot: float, zero: float, y: float, hint: str, class_: str) -> Markup:
    return tag(
        "rect",
        tag("title", hint),
        x=_x(x + slot * 0.15),
        y=_number(min(zero, y)),
        width=_x(slot * 0.7),
        height=_number(abs(zero - y)),
        class_=class_,
    )


# -- refusal loss against KL divergence ---------------------------------------


def curve(name: str, title: str, points: Sequence[Point], taken: Point, budget: float) -> Plot:
    """A dot a point that was looked at; a line joins those that no other beats in both.

    Args:
        points: `taken` among them; those far beyond the budget are left out.
        budget: of the KL divergence, in nats a token; dashed.
    """
    wide = max([budget, *(p.kl for p in points if p.kl <= 3 * budget)]) * 1.08
    high = max(p.refusal_loss for p in points) * 1.05 or 1.0
    shown = [p for p in points if p.kl <= wide]

    def at(point: Point) -> tuple[float, float]:
        return _across(point.kl / wide), _down(point.refusal_loss / high)

    front = [at(p) for p in _front(shown)]
    x, y = at(taken)
    return _figure(
        name,
        _PLANE_TOP + _PLANE + 44,
        title,
        f"Taken: refusal loss {taken.refusal_loss:.3f} at a KL divergence of {taken.kl:.4f}; "
        f"{len(shown)} points.",
        *_scales(wide, high),
        _line(_across(budget / wide), _down(1), _across(budget / wide), _down(0), "budget"),
        _text(_across(budget / wide) - 1, _down(1) + 14, "budget", "tick", "end"),
        *(_line(*a, *b, "front") for a, b in pairwise(front)),
        *(_seen(*at(p), p, "dot before") for p in shown if p is not taken),
        _seen(x, y, taken, "dot after"),
        _text(x + 1.5, y - 8, "taken", "name"),
    )


def _front(points: Iterable[Point]) -> list[Point]:
    best, found = float("inf"), []
    for point in sorted(points, key=lambda p: (p.kl, p.refusal_loss)):
        if point.refusal_loss < best:
            best = point.refusal_loss
            found.append(point)
    return found


def _scales(wide: float, high: float) -> list[Markup]:
    bottom = _down(0)
    quarters = [
        join(
            _line(_LEFT, _down(q), 100, _down(q), "grid"),
            _text(_LEFT - 1.5, _down(q) + 4, f"{high * q:.2g}", "tick", "end"),
            _text(_across(q), bottom + 18, f"{wide * q:.2g}", "tick", _end_anchor(100 * q)),
        )
        for q in (0, 0.25, 0.5, 0.75, 1)
    ]
    return [
        *quarters,
        _text(0, 14, "↑ refusal loss", "axis"),
        _text(100, bottom + 38, "KL divergence, nats a token →", "axis", "end"),
    ]


def _seen(x: float, y: float, point: Point, class_: str) -> Markup:
    hint = f"refusal loss {point.refusal_loss:.3f}, KL {point.kl:.4f}"
    return tag("circle", tag("title", hint), cx=_x(x), cy=_number(y), r=_RADIUS, class_=class_)


# -- the key ------------------------------------------------------------------

KEY = (("before", "without the gene"), ("after", "with the gene"))


def key(n_columns: int) -> Markup:
    """What the two kinds of dot mean."""
    names = KEY[:n_columns]
    if n_columns < 2:
        return Markup("")
    return tag(
        "span",
        *(tag("span", _swatch(class_), " ", escape(text), class_="item") for class_, text in names),
        class_="key",
    )


def _swatch(class_: str) -> Markup:
    dot = tag("circle", cx=8, cy=8, r=_RADIUS, class_=f"dot {class_}")
    return tag("svg", dot, width=16, height=16, aria_hidden="true", class_="swatch")
