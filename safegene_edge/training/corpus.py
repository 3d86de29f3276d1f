"""The refusals to learn, in the project's own words (no torch needed)."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from importlib import resources
from typing import Any

from ..prompts import Prompt


def refusal(prompt: Prompt, seed: int = 0) -> str:
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


def _text(name: str) -> str:
    return (
        resources.files(__package__).joinpath("prompts").joinpath(name).read_text(encoding="utf-8")
    )
