"""Two pictures, as SVG files that stand alone: a gene's scores, a recalibration's trade-off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from .errors import SettingError

if TYPE_CHECKING:
    from .recalibrate.fit import Point

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 720, 380, 64, 40, 24, 52
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #333 } .title { font-weight: 600; font-size: 15px }
.paper { fill: #fff } .grid { stroke: #ddd } .rest { fill: #b8c4ce } .kept, .best { fill: #0b7a75 }
.seen { fill: #8796a5 } .budget { stroke: #c2410c; stroke-dasharray: 5 4 } .front { stroke: #0b7a75;
fill: none; stroke-width: 1.5 } @media (prefers-color-scheme: dark) { text { fill: #ddd }
.paper { fill: #16191d } .grid { stroke: #333a42 } .rest { fill: #4b5763 }
.kept, .best { fill: #3fbfb5 } .front { stroke: #3fbfb5 } .seen { fill: #77838f } }
""".replace("\n", " ")


def scores_chart(scores: Mapping[int, float], kept: Iterable[int]) -> str:
    """A bar a layer, as high as its selection score; the layers that the gene kept stand out.

    Raises:
        SettingError: there are no scores.
    """
    if not scores:
        raise SettingError("the gene carries no selection scores", "Extract it with --select")
    chosen, high = set(kept), max(scores.values()) or 1.0
    slot = (_WIDTH - _LEFT - _RIGHT) / len(scores)
    parts = [_scale_y(high, "score")]
    for place, (layer, score) in enumerate(sorted(scores.items())):
        x, top = _LEFT + slot * place, _y(score / high)
        kind, said = ("kept", ", kept") if layer in chosen else ("rest", "")
        parts.append(
            f'<rect x="{x + slot * 0.15:.1f}" y="{top:.1f}" width="{slot * 0.7:.1f}" '
            f'height="{_y(0) - top:.1f}" class="{kind}"><title>layer {layer}: {score:.3g}{said}'
            "</title></rect>"
        )
        if place % -(-len(scores) // 15) == 0:
            parts.append(_text(x + slot / 2, _y(0) + 18, str(layer), "middle"))
    parts.append(_text(_WIDTH - _RIGHT, _HEIGHT - 12, "layer", "end"))
    title = f"Selection scores: {len(chosen & set(scores))} of {len(scores)} layers kept"
    return _chart(title, parts)


def curve_chart(points: Sequence[Point], taken: Point, budget: float) -> str:
    """Refusal loss against the KL divergence that the budget bounds, a dot a point looked at.

    The line joins the points that no other beats in both; the budget is dashed.
    """
    wide = max([budget, *(p.kl for p in points if p.kl <= 3 * budget)]) * 1.08
    high = max(p.refusal_loss for p in points) * 1.05 or 1.0
    shown = [p for p in points if p.kl <= wide]

    def at(point: Point) -> tuple[float, float]:
        return _x(point.kl / wide), _y(point.refusal_loss / high)

    parts = [_scale_y(high, "refusal loss"), _scale_x(wide, "KL divergence, nats a token")]
    parts.append(
        f'<line x1="{_x(budget / wide):.1f}" x2="{_x(budget / wide):.1f}" y1="{_TOP}" '
        f'y2="{_y(0):.1f}" class="budget"><title>budget: {budget:g}</title></line>'
    )
    front = " ".join("{:.1f},{:.1f}".format(*at(p)) for p in _front(shown))
    parts.append(f'<polyline points="{front}" class="front"/>')
    for point in [*(p for p in shown if p is not taken), taken]:
        x, y = at(point)
        kind, radius = ("best", 7) if point is taken else ("seen", 4)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{kind}"><title>refusal loss '
            f"{point.refusal_loss:.3f}, KL {point.kl:.4f}</title></circle>"
        )
    x, y = at(taken)
    parts.append(_text(x + 11, y - 8, "taken"))
    return _chart("What refusals cost: every point that was looked at", parts)


def _front(points: Iterable[Point]) -> list[Point]:
    best, found = float("inf"), []
    for point in sorted(points, key=lambda p: (p.kl, p.refusal_loss)):
        if point.refusal_loss < best:
            best = point.refusal_loss
            found.append(point)
    return found


def _x(share: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * share


def _y(share: float) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _scale_y(high: float, name: str) -> str:
    lines = [_text(_LEFT - 52, _TOP - 12, name)]
    for quarter in range(5):
        y = _y(quarter / 4)
        lines.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
        )
        lines.append(_text(_LEFT - 8, y + 4, f"{high * quarter / 4:.2g}", "end"))
    return "".join(lines)


def _scale_x(wide: float, name: str) -> str:
    ticks = [_text(_x(q / 4), _y(0) + 18, f"{wide * q / 4:.2g}", "middle") for q in range(5)]
    return "".join([*ticks, _text(_WIDTH - _RIGHT, _HEIGHT - 12, name, "end")])


def _chart(title: str, parts: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}"><style>{_STYLE}</style>'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" class="paper"/>'
        f'<text x="{_WIDTH / 2}" y="20" text-anchor="middle" class="title">{escape(title)}</text>'
        f"{''.join(parts)}</svg>\n"
    )
