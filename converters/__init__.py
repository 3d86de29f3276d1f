"""Converters between PEFT folders and GGUF, without torch: names are imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lora_gguf import convert as convert
    from .lora_gguf import to_peft as to_peft
    from .merging import merge as merge

_HOMES = {"convert": "lora_gguf", "merge": "merging", "to_peft": "lora_gguf"}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
