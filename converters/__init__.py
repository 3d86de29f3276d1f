"""Converters between PEFT or MLX folders and GGUF, without torch; names are imported when used."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .._lazy import LazyPackage

if TYPE_CHECKING:
    from .to_gguf import convert as convert
    from .to_peft import to_peft as to_peft

_HOMES = {"convert": "to_gguf", "to_peft": "to_peft"}
__all__ = sorted(_HOMES)

sys.modules[__name__].__class__ = LazyPackage
