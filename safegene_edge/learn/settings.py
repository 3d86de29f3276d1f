"""What may be set of learning by forward passes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite

from ..errors import SettingError


@dataclass(frozen=True)
class LearnSettings:
    """Settings of a gene that is learnt by forward passes.

    Attributes:
        rank: Rank of each layer's update; by default 8, or what the budget allows.
        layers: First and last layer; by default all but the lowest sixth and the last.
        ridge: Ridge of the regression, against the features' own size.
        borderline: Share of the harmless prompts that are borderline, most of them twins of harmful
            ones; by default a fifth, or two thirds where a model teaches itself.
        harmless_weight: What a decision row of a harmless prompt counts; of a harmful one, 1. By
            default 1.5, or 2 where a model teaches itself.
        text_weight: What a token of the prompts' own text counts.
        overshoot: How far the header's states of harmful prompts shall go from the target's to
            the teacher's: 1 is there, 2 as far again beyond. Refusals begin there; on prompts
            unlike those that were learnt from a gene reaches only part of the way.
        contrast: How far those of harmless prompts shall go the other way, away from the teacher's;
            0 keeps them. By default 0, or 1 where a model teaches itself: under a safety system
            prompt it refuses much that is harmless.
        prompts: Harmful prompts that the teacher is asked, and as many harmless ones; by default
            64, or 128 where a model teaches itself.
        tokens: Tokens of each answer that are learnt from.
        budget: Parameters at most, or 1 % of the model's if that is less, where no rank is given;
            rank 1 is the least.
        threads: Contexts that run side by side; by default the machine's physical cores.
    """

    rank: int | None = None
    layers: tuple[int, int] | None = None
    ridge: float = 0.1
    borderline: float | None = None
    harmless_weight: float | None = None
    text_weight: float = 1.0
    overshoot: float = 2.0
    contrast: float | None = None
    prompts: int | None = None
    tokens: int = 8
    budget: int = 600_000
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("ridge", "harmless_weight", "text_weight", "overshoot"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and isfinite(value)):
                raise SettingError(f"{name} is {value}", "Give a positive number")
        if self.borderline is not None and not 0 <= self.borderline <= 1:
            raise SettingError(f"borderline is {self.borderline}", "Give a share, 0 to 1")
        if self.contrast is not None and not (self.contrast >= 0 and isfinite(self.contrast)):
            raise SettingError(f"contrast is {self.contrast}", "Give 0 or more")
        for name in ("rank", "prompts", "tokens", "budget", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} is {value}", "Give 1 or more")

    def for_teacher(self, *, itself: bool) -> LearnSettings:
        """With the defaults that depend on who teaches; see design/learning.md."""
        share, weight, contrast, count = (2 / 3, 2.0, 1.0, 128) if itself else (0.2, 1.5, 0.0, 64)
        return replace(
            self,
            borderline=share if self.borderline is None else self.borderline,
            harmless_weight=weight if self.harmless_weight is None else self.harmless_weight,
            contrast=contrast if self.contrast is None else self.contrast,
            prompts=count if self.prompts is None else self.prompts,
        )
