"""A gene's strength in each layer, found for one model from a few examples.

fit             the search: `recalibrate`
refusal_margin  how near an answer is to opening with a refusal
examples        the prompts that it looks at
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .._lazy import LazyPackage

if TYPE_CHECKING:
    from .examples import Examples as Examples
    from .fit import Point as Point
    from .fit import Recalibration as Recalibration
    from .fit import recalibrate as recalibrate
    from .settings import RecalibrationSettings as RecalibrationSettings

_HOMES = {
    "Examples": "examples",
    "Point": "fit",
    "Recalibration": "fit",
    "RecalibrationSettings": "settings",
    "recalibrate": "fit",
}
__all__ = sorted(_HOMES)

sys.modules[__name__].__class__ = LazyPackage
