"""Fixtures that all tests share."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny as tiny_models
from browser import chromium, visit
from llamas import llama, model
from shelf import few, place, shelf

from safegene_edge.runtime.llama import SafeLlama

__all__ = ["chromium", "few", "llama", "model", "place", "shelf", "visit"]  # fixtures

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell leaves it in the background. Tests send Ctrl-C to themselves and to children.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.TinyZoo:
    """Tiny models and adapters, built once a session; skips where they cannot be built."""
    if missing := tiny_models.missing_training_stack():
        pytest.skip(f"tiny models need {missing}: pip install 'safegene-edge[train,dev]'")
    folder: Path = tmp_path_factory.mktemp("tiny")
    return tiny_models.TinyZoo(folder)


@pytest.fixture(scope="session")
def tiny(zoo: tiny_models.TinyZoo) -> tiny_models.ModelFactory:
    """`tiny(arch)` gives a TinyModel(arch, hf_dir, gguf_path, hf_model)."""
    return zoo.model


@pytest.fixture(scope="session")
def tiny_adapter(zoo: tiny_models.TinyZoo) -> tiny_models.AdapterFactory:
    """`tiny_adapter(arch, dtype="float32", **lora_config)` gives a PEFT folder."""
    return zoo.adapter


@pytest.fixture(scope="session")
def quantised(
    tiny: tiny_models.ModelFactory, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`quantised(kind)` is a tiny model whose rows hold whole super-blocks, as a GGUF."""
    from safegene_edge.runtime.requantise import requantise

    folder: Path = tmp_path_factory.mktemp("quantised")

    def made(kind: str = "Q4_K_M") -> Path:
        path = folder / f"{kind}.gguf"
        if not path.exists():
            requantise(tiny("llama", **tiny_models.WIDE).gguf_path, path, kind)
        return path

    return made


@pytest.fixture
def sent_prompts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The prompts that reach llama-cpp-python, as it gets them."""
    seen: list[Any] = []
    create = SafeLlama.create_completion

    def watched(self: SafeLlama, prompt: Any, *args: Any, **options: Any) -> Any:
        seen.append(prompt)
        return create(self, prompt, *args, **options)

    monkeypatch.setattr(SafeLlama, "create_completion", watched)
    return seen
