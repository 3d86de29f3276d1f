"""What may be set of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import SettingError
from ..files import PathLike


@dataclass(frozen=True)
class EvalSettings:
    """How to evaluate; the API and the command line share these.

    Attributes:
        max_tokens: new tokens an answer; more show more of what an answer does.
        limit: prompts a suite at most, spread evenly over it; None takes all.
        attack_limit: the same for each attack.
        n_parallel: answers generated together.
        n_ctx: KV cells for all of them together.
        gene_scale: the gene's scale in the "after" column.
        include_completions: put the answers into the JSON. They may be harmful.
    """

    max_tokens: int = 48
    limit: int | None = None
    attack_limit: int | None = 60
    n_parallel: int = 16
    n_ctx: int = 4096
    gene_scale: float = 1.0
    include_completions: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "limit", "attack_limit", "n_parallel", "n_ctx"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} is {value}", "Give 1 or more")


@dataclass(frozen=True)
class CostSettings:
    """Which costs to measure, beside over-refusal, which the suites give.

    Attributes:
        kl_prompts: harmless prompts for the KL divergence; 0 leaves it out.
        kl_tokens: opening tokens of each answer that it is taken over.
        perplexity: a text file.
        perplexity_tokens: how much of it to read at most.
        tasks: JSONL files; see `load_task`.
        speed: time single answers, without and with the gene.
    """

    kl_prompts: int = 0
    kl_tokens: int = 16
    perplexity: PathLike | None = None
    perplexity_tokens: int = 8192
    tasks: tuple[PathLike, ...] = ()
    speed: bool = False

    def __post_init__(self) -> None:
        for name, least in (("kl_prompts", 0), ("kl_tokens", 1), ("perplexity_tokens", 2)):
            if getattr(self, name) < least:
                raise SettingError(f"{name} is {getattr(self, name)}", f"Give {least} or more")
