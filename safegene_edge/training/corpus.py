"""The project's own training prompts and the refusals to learn (no torch needed)."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

CATEGORIES = (
    "violent_crimes",
    "non_violent_crimes",
    "sex_related_crimes",
    "child_sexual_exploitation",
    "indiscriminate_weapons",
    "suicide_self_harm",
    "hate",
    "defamation",
    "privacy",
    "intellectual_property",
    "specialized_advice",
    "sexual_content",
)


@dataclass(frozen=True, slots=True)
class HarmfulPrompt:
    """A request to be refused, with its MLCommons hazard category."""

    text: str
    category: str


@dataclass(frozen=True, slots=True)
class HarmlessPrompt:
    """A request to be answered; `borderline` where it is worded like harm."""

    text: str
    borderline: bool


@lru_cache
def harmful_prompts() -> tuple[HarmfulPrompt, ...]:
    """All harmful training prompts, in file order."""
    return tuple(HarmfulPrompt(row["prompt"], row["category"]) for row in _rows("harmful.jsonl"))


@lru_cache
def harmless_prompts() -> tuple[HarmlessPrompt, ...]:
    """All harmless training prompts, in file order: the borderline ones, then the plain ones."""
    rows = _rows("harmless.jsonl")
    return tuple(HarmlessPrompt(row["prompt"], row["kind"] == "borderline") for row in rows)


def refusal(prompt: HarmfulPrompt, seed: int = 0) -> str:
    """A short refusal for the prompt that names its category; the same for the same seed."""
    texts = _refusals()
    choice = random.Random(f"{seed}:{prompt.text}")
    facts = texts["categories"][prompt.category]
    return str(choice.choice(texts["templates"])).format(
        topic=choice.choice(facts["topics"]),
        reason=choice.choice(facts["reasons"]),
        offer=choice.choice(facts["offers"]),
    )


@lru_cache
def _refusals() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(_text("refusals.json"))
    return loaded


def _rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in _text(name).splitlines() if line.strip()]


def _text(name: str) -> str:
    return (
        resources.files(__package__).joinpath("prompts").joinpath(name).read_text(encoding="utf-8")
    )
