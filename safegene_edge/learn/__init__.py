"""A safety gene by forward passes alone.

run         `learn`: ask, read, fit
samples     the prompts, and what answers to them say
base        the model that a fine-tune was made from
teachers    an aligned model, or the target itself under a safety system prompt
states      answers and states, in one pass
fit         all layers in one pass; `solve`: one tensor
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .._lazy import LazyPackage

if TYPE_CHECKING:
    from .run import learn as learn
    from .settings import LearnSettings as LearnSettings

_HOMES = {"LearnSettings": "settings", "learn": "run"}
__all__ = sorted(_HOMES)

sys.modules[__name__].__class__ = LazyPackage
