"""What may be set of a training and of an extraction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from ..errors import SettingError

Log: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """Settings of the training; each is a flag of the command.

    Attributes:
        rank: rank of every LoRA pair.
        alpha: a pair's scale is alpha / rank.
        targets: linear layers that get a pair, in every block.
        epochs: passes over the prompts.
        learning_rate: the rate at its peak; warmed up, then lowered along a cosine.
        batch: prompts a step, harmful and harmless mixed.
        refusal_tokens: tokens of a refusal that are learnt.
        kept_tokens: tokens of the model's own answer that are held.
        first_tokens: tokens of a refusal that decide.
        first_weight: weight of each of these.
        rest_weight: weight of each other one.
        keep: weight of the KL term against the refusal term.
        borderline: weight of a borderline prompt against a plain one.
        held_out: prompts of each kind kept back to watch the training.
        seed: seed of the order, of A's start and of the refusals' wording.
    """

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("q_proj", "v_proj", "o_proj", "down_proj")
    epochs: int = 3
    learning_rate: float = 6e-4
    batch: int = 16
    refusal_tokens: int = 40
    kept_tokens: int = 16
    first_tokens: int = 4
    first_weight: float = 4.0
    rest_weight: float = 0.5
    keep: float = 2.5
    borderline: float = 2.0
    held_out: int = 24
    seed: int = 7

    def __post_init__(self) -> None:
        for name in (
            "rank",
            "alpha",
            "epochs",
            "batch",
            "refusal_tokens",
            "kept_tokens",
            "learning_rate",
        ):
            if getattr(self, name) <= 0:
                raise SettingError(f"{name} is {getattr(self, name)}", "Give more than 0")
        if not self.targets:
            raise SettingError("there is no target layer", "Name one, such as q_proj")


@dataclass(frozen=True)
class ExtractSettings(Recipe):
    """Settings of an extraction: the recipe's, and its own.

    Attributes:
        top_k: tokens of a teacher's distribution that are stored; the others share a bin.
        select: keep only the layers that matter.
        budget: parameters that the gene may have; by default 600,000 or 1 % of the model,
            whichever is less.
        contrast: prompts of each kind that the layers are scored with.
        checkpoint: steps from one checkpoint to the next.
        dtype: type of the base weights while learning, see `learning_dtype`.
        gene_dtype: type of the gene.
    """

    rank: int = 4
    alpha: int = 8
    epochs: int = 2
    learning_rate: float = 1.5e-3
    refusal_tokens: int = 24
    top_k: int = 64
    select: bool = True
    budget: int | None = None
    contrast: int = 96
    checkpoint: int = 20
    dtype: str = "auto"
    gene_dtype: str = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("top_k", "contrast", "checkpoint"):
            if getattr(self, name) <= 0:
                raise SettingError(f"{name} is {getattr(self, name)}", "Give more than 0")
        for name, known in (
            ("dtype", ("auto", "bfloat16", "float16", "float32")),
            ("gene_dtype", ("float16", "float32")),
        ):
            if getattr(self, name) not in known:
                raise SettingError(f"{name} is '{getattr(self, name)}'", f"One of {known}")
