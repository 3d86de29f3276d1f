"""What may be set of a portfolio."""

from __future__ import annotations

from dataclasses import dataclass, field

from .evals.settings import DEFAULT_SUITES
from .recalibrate.settings import RecalibrationSettings


@dataclass(frozen=True)
class PortfolioSettings:
    """What is done with every model; must pickle, since it goes to other processes.

    Attributes:
        suites: what to ask: NAME is harmful, borderline, harmless or languages, FILE has prompts
            of your own; may be repeated.
        limit: prompts a suite at most.
        examples: prompts to recalibrate on, as for `recalibrate`; by default the shipped ones.
        recalibration: settings of each recalibration.
        adapters: a LoRA that every model is run with; may be repeated.
    """

    suites: tuple[str, ...] = DEFAULT_SUITES
    limit: int | None = 100
    examples: str | None = None
    recalibration: RecalibrationSettings = field(default_factory=RecalibrationSettings)
    adapters: tuple[str, ...] = ()
