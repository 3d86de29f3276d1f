"""How strong each layer of a gene is in one fine-tuned model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import FileFormatError, SettingError
from .files import PathLike, parse_json, read_text, write_text

VERSION = 1
# What JSON that nests too deeply, counts too far or holds other things raises.
_NO_EXPRESSION = (
    ValueError, TypeError, KeyError, AttributeError, OverflowError
)  # fmt: skip


@dataclass(frozen=True)
class Expression:
    """One non-negative coefficient a layer, found for one target model.

    Attributes:
        coefficients: layer to coefficient; 0 switches the layer off.
        gene: the gene's own `sha256`; target: SHA-256 of the model file; either may be empty.
        guard_threshold: the margin (nats) from which on a guard ends an answer; None: not measured.
    """

    coefficients: Mapping[int, float]
    gene: str = ""
    target: str = ""
    guard_threshold: float | None = None

    def __post_init__(self) -> None:
        if self.guard_threshold is not None and not math.isfinite(self.guard_threshold):
            raise SettingError(f"the guard's threshold is {self.guard_threshold}", "Give a number")
        if wrong := wrong_coefficient(self.coefficients):
            raise SettingError(*wrong)

    def save(self, path: PathLike) -> None:
        """Write the expression as JSON."""
        facts = {
            "version": VERSION,
            "gene": self.gene,
            "target": self.target,
            "coefficients": {str(layer): value for layer, value in self.coefficients.items()},
        }
        if self.guard_threshold is not None:
            facts["guard_threshold"] = self.guard_threshold
        write_text(path, json.dumps(facts, indent=2) + "\n")

    @classmethod
    def load(cls, path: PathLike) -> Expression:
        """Read what `save` wrote; FileFormatError for anything else."""
        try:
            facts = parse_json(read_text(path))
            values = {int(layer): float(v) for layer, v in facts["coefficients"].items()}
            threshold = facts.get("guard_threshold")
            return cls(
                values,
                str(facts.get("gene", "")),
                str(facts.get("target", "")),
                None if threshold is None else float(threshold),
            )
        except SettingError as error:
            raise FileFormatError(f"{path}: {error.message}", error.remedy) from error
        except _NO_EXPRESSION as error:
            raise FileFormatError(f"{path}: not an expression ({error!r})") from error


def wrong_coefficient(coefficients: Mapping[int, float]) -> tuple[str, str] | None:
    """What is wrong with the first that cannot be, and why."""
    for layer, value in coefficients.items():
        if not math.isfinite(value) or value < 0:
            return (
                f"the coefficient of layer {layer} is {value}",
                "Coefficients are finite and not negative: a negative one lowers safety",
            )
    return None
