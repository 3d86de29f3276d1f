"""A tiny `SafeLlama`, and what it says and computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from safegene_edge import SafeLlama

PROMPT = "What is it that the weather is like in an old town by the sea?"


def logits(llama: SafeLlama, text: str = PROMPT) -> np.ndarray:
    """The last token's."""
    llama.clear()
    tokens = llama.tokenize(text.encode())
    llama.eval(tokens)
    pointer = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
    return np.array(np.ctypeslib.as_array(pointer, shape=(llama.n_vocab(),)))


def answer(llama: SafeLlama, prompt: str = PROMPT) -> str:
    """Greedy, without a template."""
    found: Any = llama.create_completion(prompt, max_tokens=24, temperature=0.0)
    return str(found["choices"][0]["text"])


@pytest.fixture
def model(tiny: Callable[..., Any]) -> Path:
    """A tiny llama's file."""
    path: Path = tiny("llama").gguf_path
    return path


@pytest.fixture
def llama(model: Path) -> Iterator[SafeLlama]:
    """It, loaded for one test."""
    loaded = SafeLlama(model, n_ctx=256)
    yield loaded
    loaded.close()
