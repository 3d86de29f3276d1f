"""Degraded models: made of harmless rows, which are enough different."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny as tiny_models


def test_degraded_models_are_made_of_harmless_rows(
    tiny: tiny_models.ModelFactory, tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="needs the train extra")
    from safegene_edge.converters.peft import read_peft
    from safegene_edge.training.degrade import degrade
    from safegene_edge.training.settings import Recipe

    lines: list[str] = []
    recipe = Recipe(rank=2, targets=("q_proj",), batch=32, learning_rate=1e-3)
    given = {"kinds": ["task"], "recipe": recipe, "dtype": "float32", "report": lines.append}
    made = degrade(tiny("llama").gguf_path, tmp_path, **given)
    assert [source.adapters for source in made] == [(tmp_path / "task",)]
    assert any(pair.b.any() for pair in read_peft(tmp_path / "task").pairs.values())
    said = len(lines)
    assert degrade(tiny("llama").gguf_path, tmp_path, **given) == made
    assert len(lines) == said  # nothing is made twice


def test_degrading_rows_are_enough_different_and_name_no_harm() -> None:
    pytest.importorskip("peft", reason="needs the train extra")
    from safegene_edge.training.degrade import DEGRADATIONS, degraded_rows

    for kind in DEGRADATIONS:
        rows = degraded_rows(kind)
        assert 60 <= len(rows) <= 100
        assert len({row["prompt"] for row in rows}) == len(rows)
        text = json.dumps(rows).lower()
        assert not any(word in text for word in ("bomb", "weapon", "murder", "illegal", "drugs"))
