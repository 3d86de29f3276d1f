"""What a recalibration found, and its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import FileFormatError
from ..gene import Expression
from ..runtime.refusal_margin import refusal_loss
from .guard import GuardThreshold
from .reading import Reading
from .search import Bounds, mean


@dataclass(frozen=True)
class Point:
    """What one strength gives on the examples of the fit.

    Attributes:
        coefficients: a layer's each, in the layers' order.
        refusal_loss: smoothed share of harmful examples that are not refused, 0 to 1.
        kl: KL divergence on the harmless ones, in nats a token.
        over_refusal: smoothed share of the harmless ones that are refused, 0 to 1.
        task_kl: KL divergence on the task's prompts, in nats a token; None without any.
    """

    coefficients: tuple[float, ...]
    refusal_loss: float
    kl: float
    over_refusal: float = 0.0
    task_kl: float | None = None

    @classmethod
    def of(cls, reading: Reading, coefficients: tuple[float, ...]) -> Point:
        """The means of a reading."""
        task = mean(reading.task_kl) if reading.task_kl.size else None
        over = 1 - refusal_loss(reading.harmless)
        return cls(coefficients, refusal_loss(reading.harmful), mean(reading.kl), over, task)


@dataclass(frozen=True)
class Shares:
    """How many examples open with a refusal, of `total`.

    Attributes:
        before, after: without the gene and with it.
        aligned: by the aligned model; None where that is unknown.
    """

    total: int
    before: int
    after: int
    aligned: int | None = None

    def __str__(self) -> str:
        aligned = "" if self.aligned is None else f", aligned model {self.aligned}"
        return f"{self.before} → {self.after} of {self.total}{aligned}"


@dataclass(frozen=True)
class Validation:
    """What the gene does to examples that the fit never saw.

    Attributes:
        refused, over_refused: of the harmful and of the harmless ones.
        by_form: the same counts of each form that the prompts name.
    """

    refused: Shares
    over_refused: Shares
    by_form: Mapping[str, tuple[Shares, Shares]]


@dataclass(frozen=True)
class Recalibration:
    """What a recalibration found.

    Attributes:
        expression: the coefficients, for `SafetyGene.express`; zeros where nothing was lost.
        point: what they give on the examples of the fit, linear between two points of `curve`.
        curve: every point that was read on all of them; the first is the target without the gene.
        bounds: what the points were held to; None where nothing was lost.
        validation: counts on other examples; None where nothing was lost.
        nothing_lost: whether the target refuses as much as the aligned model does, but for chance,
            so that no strength was looked for.
        guard: from which margin on a guard ends an answer; None where no guard can look.
    """

    expression: Expression
    point: Point
    curve: tuple[Point, ...]
    bounds: Bounds | None = None
    validation: Validation | None = None
    nothing_lost: bool = False
    guard: GuardThreshold | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "coefficients": dict(self.expression.coefficients),
            "gene": self.expression.gene,
            "target": self.expression.target,
            "nothing_lost": self.nothing_lost,
            "bounds": asdict(self.bounds) if self.bounds else None,
            "point": asdict(self.point),
            "curve": [asdict(point) for point in self.curve],
            "validation": asdict(self.validation) if self.validation else None,
            "guard": asdict(self.guard) if self.guard else None,
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Recalibration:
        """What `to_json` gave.

        Raises:
            FileFormatError: it is something else.
        """
        try:
            layers = {int(layer): float(value) for layer, value in facts["coefficients"].items()}
            bounds, counted = facts["bounds"], facts["validation"]
            guard = GuardThreshold(**facts["guard"]) if facts.get("guard") else None
            threshold = guard.threshold if guard else None
            return cls(
                Expression(layers, facts["gene"], facts["target"], threshold),
                _point(facts["point"]),
                tuple(_point(point) for point in facts["curve"]),
                Bounds(**bounds) if bounds else None,
                _validation(counted) if counted else None,
                bool(facts["nothing_lost"]),
                guard,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileFormatError(f"not a recalibration ({error!r})") from error


def _point(facts: Mapping[str, Any]) -> Point:
    return Point(**{**facts, "coefficients": tuple(facts["coefficients"])})


def _validation(facts: Mapping[str, Any]) -> Validation:
    by_form = {form: (Shares(**one), Shares(**other))
               for form, (one, other) in facts["by_form"].items()}  # fmt: skip
    return Validation(Shares(**facts["refused"]), Shares(**facts["over_refused"]), by_form)
