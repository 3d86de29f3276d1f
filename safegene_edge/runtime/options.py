"""Arguments of `llama_cpp.Llama`, which takes any name, and values that end the process."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import llama_cpp

from ..errors import SettingError

# The least value of each; llama.cpp asserts, or takes a negative number for a huge one.
_LEAST = {"n_ctx": 0, "n_batch": 1, "n_ubatch": 1, "n_threads": 1, "n_threads_batch": 1,
          "last_n_tokens_size": 0}  # fmt: skip
_TYPES = ("type_k", "type_v")


def require_options(options: Mapping[str, Any]) -> None:
    """Raise SettingError for a name that there is not, or a value that llama.cpp cannot take.

    Args:
        options: by name; None is the default.
    """
    for name, value in options.items():
        if name.startswith("lora_"):
            raise SettingError(f"{name} is not used here", "Give adapters=[(path, scale)]")
        if name not in _known():
            near = difflib.get_close_matches(name, _known(), n=1)
            remedy = f"Did you mean {near[0]}?" if near else "See llama_cpp.Llama"
            raise SettingError(f"SafeLlama has no argument '{name}'", remedy)
        if value is None:
            continue
        if name in _LEAST and not (isinstance(value, int) and value >= _LEAST[name]):
            raise SettingError(
                f"{name} is {value!r}", f"Give a whole number from {_LEAST[name]} on"
            )
        if name in _TYPES and value not in _cache_types():
            raise SettingError(
                f"{name} is {value!r}, no type of ggml's", "See llama_cpp.GGML_TYPE_F16"
            )
    if options.get("vocab_only"):
        raise SettingError("vocab_only loads no model", "Leave it out")


@cache
def _known() -> frozenset[str]:
    names = set(inspect.signature(llama_cpp.Llama.__init__).parameters)
    return frozenset(names - {"self", "model_path", "kwargs"})


@cache
def _cache_types() -> frozenset[int]:
    return frozenset(
        value for name, value in vars(llama_cpp).items()
        if name.startswith("GGML_TYPE_") and isinstance(value, int) and name != "GGML_TYPE_COUNT"
    )  # fmt: skip
