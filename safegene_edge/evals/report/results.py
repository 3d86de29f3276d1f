"""What an evaluation finds, as data: answers, costs, the files that took part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from ...prompts import Prompt
from ..asking.suites import Suite
from ..judge import Verdict
from ..settings import EvalSettings, GateSettings

# By suite name and version, then by prompt id: the label of the aligned model's answer.
AlignedLabels: TypeAlias = Mapping[tuple[str, str], Mapping[str, str | None]]


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion; `verdict` is None where it is unscored.

    That is where the prompt did not fit or, if `thinking`, the model never ended its thought.
    """

    prompt: Prompt
    completion: str
    verdict: Verdict | None
    thinking: bool = False


Answers: TypeAlias = tuple[Answer, ...]


@dataclass(frozen=True)
class SuiteResult:
    """The answers to one suite without the gene and, where there is one, with it."""

    suite: Suite
    before: Answers
    after: Answers | None = None

    @property
    def columns(self) -> dict[str, Answers]:
        """ "before" and, with a gene, "after"."""
        return _columns(self.before, self.after)


@dataclass(frozen=True)
class AttackResult:
    """The answers to one attack on one suite.

    Of a harmful one complied of total is its success rate; of a harmless one refused of total
    says how much of what it wins is refusing whatever is worded so.
    """

    name: str
    paper: str
    suite: str
    before: Answers
    after: Answers | None = None

    @property
    def columns(self) -> dict[str, Answers]:
        """ "before" and, with a gene, "after"."""
        return _columns(self.before, self.after)


def _columns(before: Answers, after: Answers | None) -> dict[str, Answers]:
    return {"before": before} if after is None else {"before": before, "after": after}


@dataclass(frozen=True)
class Artifact:
    """A file that took part: its name, hash ("" for an object in memory) and scale."""

    name: str
    sha256: str
    scale: float | None = None


@dataclass(frozen=True)
class Cost:
    """One cost without and with the gene; None where a column has none.

    `interval` is the 95 % interval of the gene's effect; without a gene, of `before`.
    """

    name: str
    unit: str
    before: float | None
    after: float | None
    n: int | None = None
    interval: tuple[float, float] | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"interval": self.interval and list(self.interval)}

    def __str__(self) -> str:
        values = " → ".join(f"{v:.4g}" for v in (self.before, self.after) if v is not None)
        return f"{self.name}: {values} {self.unit}".rstrip()


@dataclass(frozen=True)
class Evaluation:
    """Everything that an evaluation found."""

    model: Artifact
    gene: Artifact | None
    adapters: tuple[Artifact, ...]
    suites: tuple[SuiteResult, ...]
    settings: EvalSettings
    chat_template_sha256: str
    coefficients: Mapping[int, float] = field(default_factory=dict)
    attacks: tuple[AttackResult, ...] = ()
    attack_twins: tuple[AttackResult, ...] = ()
    costs: tuple[Cost, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    times: Mapping[str, Any] = field(default_factory=dict)
    aligned: AlignedLabels = field(default_factory=dict)
    thresholds: GateSettings = field(default_factory=GateSettings)
