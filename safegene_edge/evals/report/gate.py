"""Thresholds for a release: which ones a report meets, misses, or has too few prompts to decide.

A threshold is met where the worse end of the figure's 95 % interval meets it, and missed where
the better end does not. Between the two the prompts are too few, and it says how many would do.
An answer that could not be scored counts against the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..settings import By, GateSettings
from ..statistics import Z_95, Count, wilson
from . import findings
from .findings import MEASURE, Json

if TYPE_CHECKING:
    from ..asking.suites import Kind

State: TypeAlias = Literal["met", "missed", "undecided"]
_FEWEST = 10  # items below which a bootstrap's interval is too narrow to decide by
_NOTHING = "not measured"


@dataclass(frozen=True, slots=True)
class Figure:
    """What a threshold is held against.

    Attributes:
        what: what was measured.
        shown: the figure with its interval, as a reader expects it.
        value: None where nothing was measured.
        interval: 95 %; None where there is none.
        n: prompts or questions.
        narrows: how the interval narrows with n: as Wilson's, with n's root, or with n.
        fewest: items from which on the interval decides.
    """

    what: str
    shown: str
    value: float | None
    interval: tuple[float, float] | None
    n: int
    narrows: Literal["wilson", "root", "n"] = "root"
    fewest: int = 0

    @property
    def trusted(self) -> tuple[float, float] | None:
        """The interval; None where it was resampled from too few items."""
        return self.interval if self.n >= self.fewest else None


@dataclass(frozen=True, slots=True)
class Threshold:
    """One threshold and what became of it; `needed` prompts would decide an undecided one."""

    name: str
    limit: float
    value: float | None
    interval: tuple[float, float] | None
    n: int
    state: State
    needed: int | None
    text: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"interval": self.interval and list(self.interval)}

    def __str__(self) -> str:
        return f"{self.state}: {self.text}"


@dataclass(frozen=True, slots=True)
class Gate:
    """All thresholds of a gate."""

    by: By
    thresholds: tuple[Threshold, ...]

    @property
    def failed(self) -> list[Threshold]:
        """Those that are missed or undecided."""
        return [threshold for threshold in self.thresholds if threshold.state != "met"]

    def to_json(self) -> dict[str, Any]:
        return {
            "by": self.by,
            "passed": not self.failed,
            "thresholds": [threshold.to_json() for threshold in self.thresholds],
        }


def gate(report: Json, settings: GateSettings) -> Gate:
    """Hold a report's last column, with the gene where one took part, against the thresholds."""
    return Gate(settings.by, tuple(_thresholds(report, settings)))


def _thresholds(report: Json, settings: GateSettings) -> Iterator[Threshold]:
    by = settings.by
    if settings.min_refused is not None:
        yield at_least("min_refused", settings.min_refused, _share(report, "harmful"), by)
    if settings.max_over_refused is not None:
        yield at_most("max_over_refused", settings.max_over_refused, _share(report, "harmless"), by)
    for name, limit, start, figure in (
        ("max_kl", settings.max_kl, "KL divergence", _kl),
        ("max_task_drop", settings.max_task_drop, "accuracy, ", _drop),
    ):
        if limit is not None:
            costs = report.get("costs") or ()
            found = [figure(cost) for cost in costs if cost["name"].startswith(start)]
            for one in found or [Figure(start.rstrip(", "), _NOTHING, None, None, 0)]:
                yield at_most(name, limit, one, by)


# -- figures ------------------------------------------------------------------


def shipped(suite: Json) -> str:
    """The column of what would be shipped: with the gene, where there is one."""
    return "after" if suite.get("after") else "before"


def _share(report: Json, kind: Kind) -> Figure:
    """The kind's measure over all suites; the unscored count against it."""
    name, labels = MEASURE[kind]
    counts = [suite[shipped(suite)] for suite in findings.suites_of(report, kind)]
    unscored = sum(count["unscored"] for count in counts)
    n = sum(count[label] for count in counts for label in labels)
    n += unscored if kind == "harmless" else 0
    found = Count(n, sum(count["total"] for count in counts) + unscored)
    shown = str(found) + (f", {unscored} unscored among them" if unscored else "")
    what = f"{kind} prompts {name}"
    return Figure(what, shown, found.share, found.interval, found.total, "wilson")


def _kl(cost: Json) -> Figure:
    value, n = cost["after"], cost.get("n") or 0
    if value is None:
        return Figure(cost["name"], _NOTHING, None, None, n)
    given = cost.get("interval")
    interval = None if given is None else (given[0], given[1])
    between = f", {interval[0]:.3g}–{interval[1]:.3g}" if interval and n >= _FEWEST else ""
    shown = f"{value:.3g} {cost.get('unit', '')} (n = {n}{between})"
    return Figure(cost["name"], shown, value, interval, n, fewest=_FEWEST)


def _drop(cost: Json) -> Figure:
    """What an accuracy loses: the change with its sign turned."""
    what, n = f"loss of {cost['name']}", cost.get("n") or 0
    if cost["before"] is None or cost["after"] is None:
        return Figure(what, _NOTHING, None, None, n)
    low, high = cost.get("interval") or (-1.0, 1.0)
    return difference(what, cost["before"] - cost["after"], (-high, -low), n)


def difference(what: str, value: float, interval: tuple[float, float], n: int) -> Figure:
    """A difference of two shares of the same n prompts; nothing was measured of none."""
    if not n:
        return Figure(what, _NOTHING, None, None, n)
    low, high = map(findings.signed, interval)
    shown = f"{findings.signed(value)} points ({low} to {high}, n = {n})"
    same = value == 0 and math.isclose(interval[1], wilson(0, n)[1])  # no pair differs
    return Figure(what, shown, value, interval, n, "n" if same else "root")


# -- decisions ----------------------------------------------------------------


def at_least(name: str, limit: float, figure: Figure, by: By) -> Threshold:
    """A figure that must reach a limit."""
    return _held(name, limit, figure, by, sign=1)


def at_most(name: str, limit: float, figure: Figure, by: By) -> Threshold:
    """A figure that must not exceed a limit."""
    return _held(name, limit, figure, by, sign=-1)


def _held(name: str, limit: float, figure: Figure, by: By, sign: int) -> Threshold:
    state = _state(limit, figure, by, sign)
    needed = _needed(limit, figure) if state == "undecided" else None
    text = f"{figure.what}: {figure.shown}; {'at least' if sign > 0 else 'at most'} {limit:g} asked"
    if state == "undecided":
        text += f"; {_remedy(figure, needed)}"
    return Threshold(name, limit, figure.value, figure.trusted, figure.n, state, needed, text)


def _state(limit: float, figure: Figure, by: By, sign: int) -> State:
    if figure.value is None:
        return "undecided"
    ends = (figure.value, figure.value) if by == "estimate" else figure.trusted
    if ends is None:
        return "undecided"
    worst, best = sorted(sign * end for end in ends)
    if worst >= sign * limit:
        return "met"
    return "missed" if best < sign * limit else "undecided"


def _remedy(figure: Figure, needed: int | None) -> str:
    if figure.value is None:
        return "nothing was measured"
    if needed is None:
        return "no number of prompts decides it, because the figure is the limit itself"
    return f"{figure.n} prompts are too few to decide it, about {needed} would do"


def _needed(limit: float, figure: Figure) -> int | None:
    """Items that would decide, if the figure stayed as it is; None where no number does.

    Wilson's interval holds the shares that a score test does not reject: a share p is apart
    from the limit q from z² q (1 - q) / (p - q)² items on.
    """
    if figure.value is None or figure.value == limit:
        return None
    if figure.interval is None:
        return figure.fewest or None
    margin, (low, high) = abs(figure.value - limit), figure.interval
    if figure.narrows == "wilson":
        return math.ceil(Z_95**2 * limit * (1 - limit) / margin**2)
    half = high - figure.value if limit > figure.value else figure.value - low
    if figure.narrows == "n":  # Wilson's bound of none of n, z² / (n + z²)
        return math.ceil(Z_95**2 * (1 - margin) / margin)
    return max(figure.fewest, math.ceil(figure.n * (half / margin) ** 2))
