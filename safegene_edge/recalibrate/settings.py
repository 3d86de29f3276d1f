"""What may be set of a recalibration."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from ..errors import SettingError


@dataclass(frozen=True)
class RecalibrationSettings:
    """Settings of a recalibration.

    Attributes:
        kl_budget: Nats a token that the gene may cost on harmless prompts; by default what the
            aligned model itself differs by, which genes carry, or 0.2.
        task_budget: Nats a token that it may cost on the task's prompts.
        over_refusal: Share of harmless prompts that may be refused beyond what the aligned model
            refuses: 0.03 is 3 of 100. Where no aligned model is known, 0.02 more and a quarter of
            the refusals gained, beyond what the model itself refuses.
        weight: How much a nat of KL counts against all refusals.
        tokens: Tokens of each harmless answer that the KL sees.
        passes: Strengths that all examples are read at, at most, besides 0.
        n_ctx: KV cells for all sequences together; by default 4,096, or as many as the longest
            example needs.
        anyway: Look for strengths even where nothing was lost.
    """

    kl_budget: float | None = None
    task_budget: float = 0.1
    over_refusal: float = 0.03
    weight: float = 0.05
    tokens: int = 8
    passes: int = 4
    n_ctx: int | None = None
    anyway: bool = False

    def __post_init__(self) -> None:
        for name in ("kl_budget", "task_budget"):
            budget = getattr(self, name)
            if budget is not None and not (budget > 0 and isfinite(budget)):
                raise SettingError(f"{name} is {budget}", "Give a positive number")
        if not 0 <= self.over_refusal <= 1:
            raise SettingError(f"over_refusal is {self.over_refusal}", "Give a share, 0 to 1")
        if not (self.weight >= 0 and isfinite(self.weight)) or self.tokens < 1:
            raise SettingError(f"the recalibration has senseless settings: {self}")
        if not 1 <= self.passes < 100:
            raise SettingError(f"passes is {self.passes}", "Give 1 to 99")
        if self.n_ctx is not None and self.n_ctx < 64:
            raise SettingError(f"n_ctx is {self.n_ctx}", "Give 64 or more")
