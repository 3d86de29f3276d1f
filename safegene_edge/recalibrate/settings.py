"""What may be set of a recalibration."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from ..errors import SettingError


@dataclass(frozen=True)
class RecalibrationSettings:
    """Settings of a recalibration.

    Attributes:
        kl_budget: Nats a token that the gene may cost on harmless prompts, and on the task's.
        weight: How much a nat of KL counts against all refusals; chosen on SmolLM2's fine-tunes.
        tokens: Tokens of each harmless answer that the KL sees.
        upper: The largest coefficient that is looked at.
        passes: Points looked at, at most; each is one pass over the examples.
        groups: Coefficients that are searched for; neighbouring layers share one, since a search
            needs a few passes for each.
        n_ctx: KV cells for all sequences together; by default 4,096, or as many as the longest
            example needs.
    """

    kl_budget: float = 0.1
    weight: float = 1.5
    tokens: int = 8
    upper: float = 2.0
    passes: int = 24
    groups: int = 6
    n_ctx: int | None = None

    def __post_init__(self) -> None:
        if not (self.kl_budget > 0 and isfinite(self.kl_budget)):
            raise SettingError(f"the KL budget is {self.kl_budget}", "Give a positive number")
        finite = self.weight >= 0 and self.upper > 0 and isfinite(self.weight + self.upper)
        if not finite or min(self.tokens, self.groups) < 1 or not 6 <= self.passes < 100:
            raise SettingError(f"the recalibration has senseless settings: {self}")
        if self.n_ctx is not None and self.n_ctx < 64:
            raise SettingError(f"n_ctx is {self.n_ctx}", "Give 64 or more")
