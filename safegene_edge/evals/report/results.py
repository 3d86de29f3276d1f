"""What an evaluation finds, as data: answers, costs, the files that took part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from ...prompts import Prompt
from ..asking.suites import Suite
from ..judge import Verdict
from ..settings import EvalSettings, GateSettings
from ..statistics import cohen_kappa

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
    says how much of what it wins is refusing whatever is worded so. `guarded` are the answers with
    the gene and its guard, where these were asked for.
    """

    name: str
    paper: str
    suite: str
    before: Answers
    after: Answers | None = None
    guarded: Answers | None = None

    @property
    def columns(self) -> dict[str, Answers]:
        """ "before" and, with a gene, "after" and perhaps "guarded"."""
        guarded = {} if self.guarded is None else {"guarded": self.guarded}
        return _columns(self.before, self.after) | guarded


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
class Opinion:
    """What judge and grader say of the answers to one suite in one column.

    Attributes:
        n: answers; agree: where both say the same.
        judge, grader: how many each takes for refusals, whole or in part.
        kappa: agreement beyond chance; None where chance explains all.
    """

    suite: str
    column: str
    n: int
    agree: int
    judge: int
    grader: int
    kappa: float | None

    @classmethod
    def of(cls, suite: str, column: str, judge: list[bool], grader: list[bool]) -> Opinion:
        """Count two lists of refusals."""
        agree = sum(a == b for a, b in zip(judge, grader, strict=True))
        kappa = cohen_kappa(judge, grader)
        return cls(suite, column, len(judge), agree, sum(judge), sum(grader), kappa)


@dataclass(frozen=True)
class SecondOpinion:
    """A grader, and its opinions by suite and column."""

    grader: Artifact
    opinions: tuple[Opinion, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "grader": asdict(self.grader),
            "opinions": [asdict(opinion) for opinion in self.opinions],
        }


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
    opinion: SecondOpinion | None = None
