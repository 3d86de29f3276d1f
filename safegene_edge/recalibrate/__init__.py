"""A gene's strength in each layer, found for one model from a few examples.

fit             `recalibrate`: is anything lost, the bounds, the choice, the validation
results         what it found
search          the strengths that are read
reading         what the target says at one strength
aligned         what is known of the aligned model
examples        the prompts that are read
guard           from which margin on a guard ends an answer
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .._lazy import LazyPackage

if TYPE_CHECKING:
    from .examples import PARTS as PARTS
    from .examples import Examples as Examples
    from .fit import recalibrate as recalibrate
    from .guard import GuardThreshold as GuardThreshold
    from .results import Point as Point
    from .results import Recalibration as Recalibration
    from .results import Shares as Shares
    from .results import Validation as Validation
    from .search import Bounds as Bounds
    from .settings import RecalibrationSettings as RecalibrationSettings

_HOMES = {
    "Bounds": "search",
    "Examples": "examples",
    "GuardThreshold": "guard",
    "PARTS": "examples",
    "Point": "results",
    "Recalibration": "results",
    "RecalibrationSettings": "settings",
    "Shares": "results",
    "Validation": "results",
    "recalibrate": "fit",
}
__all__ = sorted(_HOMES)

sys.modules[__name__].__class__ = LazyPackage
