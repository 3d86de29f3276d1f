"""A gene's strength in each layer, found for one model from a few examples.

fit             `recalibrate`: is anything lost, the bounds, the choice, the validation
search          the strengths that are read
reading         what the target says at one strength
aligned         what is known of the aligned model
refusal_margin  how near an answer is to opening with a refusal
examples        the prompts that are read
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .._lazy import LazyPackage

if TYPE_CHECKING:
    from .examples import PARTS as PARTS
    from .examples import Examples as Examples
    from .fit import Point as Point
    from .fit import Recalibration as Recalibration
    from .fit import Shares as Shares
    from .fit import Validation as Validation
    from .fit import recalibrate as recalibrate
    from .search import Bounds as Bounds
    from .settings import RecalibrationSettings as RecalibrationSettings

_HOMES = {
    "Bounds": "search",
    "Examples": "examples",
    "PARTS": "examples",
    "Point": "fit",
    "Recalibration": "fit",
    "RecalibrationSettings": "settings",
    "Shares": "fit",
    "Validation": "fit",
    "recalibrate": "fit",
}
__all__ = sorted(_HOMES)

sys.modules[__name__].__class__ = LazyPackage
