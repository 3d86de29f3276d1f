"""Adapters merged into a quantised GGUF, tensor by tensor, each in its own type.

bake       a model loaded with adapters in its weights
plan       what is merged into what, checked before any work; `merge` itself
inputs     adapters with their scales, the sum of their updates, where they came from
model_run  what the touched tensors read, where the model is run first
workers    the tensors' work, in processes of their own
rounding   an update on a tensor's own grid; codes: where the grid's codes lie
imatrix    llama-imatrix's files

Names are imported when first used: a worker loads no more than it needs.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .._lazy import LazyPackage

if TYPE_CHECKING:
    from .bake import bake as bake
    from .plan import MergeReport as MergeReport
    from .plan import Plan as Plan
    from .plan import merge as merge
    from .settings import MergeSettings as MergeSettings

_HOMES = dict.fromkeys(("MergeReport", "Plan", "merge"), "plan") | {
    "MergeSettings": "settings",
    "bake": "bake",
}
__all__ = sorted(_HOMES)

sys.modules[__name__].__class__ = LazyPackage
