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
        layers: First and last layer; by default all but the last one and the lowest ones.
        lowest: Share of the layers that are the lowest ones, where no layers are named; by
            default 3/8, or half where a model teaches itself.
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
        prompts: Harmful prompts that the teacher is asked, and as many harmless ones. Memory and
            time go with it.
        tokens: Tokens of each answer that are learnt from.
        budget: Parameters at most, or 1 % of the model's if that is less, where no rank is given;
            rank 1 is the least.
        threads: Contexts that run side by side; by default the machine's physical cores.
    """

    rank: int | None = None
    layers: tuple[int, int] | None = None
    lowest: float | None = None
    ridge: float = 0.3
    borderline: float | None = None
    harmless_weight: float | None = None
    text_weight: float = 1.0
    overshoot: float = 2.0
    contrast: float | None = None
    prompts: int = 128
    tokens: int = 8
    budget: int = 600_000
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("ridge", "harmless_weight", "text_weight", "overshoot"):
            value = getattr(self, name)
            if value is None and name == "harmless_weight":
                continue
            if value is None or not (value > 0 and isfinite(value)):
                raise SettingError(f"{name} is {value}", "Give a positive number")
        for name in ("borderline", "lowest"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise SettingError(f"{name} is {value}", "Give a share, 0 to 1")
        if self.contrast is not None and not (self.contrast >= 0 and isfinite(self.contrast)):
            raise SettingError(f"contrast is {self.contrast}", "Give 0 or more")
        for name in ("rank", "prompts", "tokens", "budget", "threads"):
            value = getattr(self, name)
            if value is None and name in ("rank", "threads"):
                continue
            if value is None or value < 1:
                raise SettingError(f"{name} is {value}", "Give 1 or more")

    def for_teacher(self, *, itself: bool) -> LearnSettings:
        """With the defaults that depend on who teaches; see design/learning.md."""
        known = {
            "lowest": (3 / 8, 1 / 2), "borderline": (0.2, 2 / 3), "harmless_weight": (1.5, 2.0),
            "contrast": (0.0, 1.0),
        }  # fmt: skip
        missing = {
            name: both[itself] for name, both in known.items() if getattr(self, name) is None
        }
        return replace(self, **missing)  # type: ignore[arg-type]
