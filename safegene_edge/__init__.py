"""Safety adapters for quantised GGUF models, on the laptop, through llama.cpp.

The public names are imported when first used, so that `import safegene_edge` costs
nothing and `--help` answers at once.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ._lazy import LazyPackage
from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .converters import convert as convert
    from .converters import to_peft as to_peft
    from .errors import SafeGeneError as SafeGeneError
    from .evals.evaluate import evaluate as evaluate
    from .evals.judge import judge as judge
    from .export import export as export
    from .gene import Adapter as Adapter
    from .gene import Expression as Expression
    from .gene import SafetyGene as SafetyGene
    from .learn import learn as learn
    from .merge import bake as bake
    from .merge import merge as merge
    from .portfolio import portfolio as portfolio
    from .recalibrate import recalibrate as recalibrate
    from .restore import restore as restore
    from .runtime.engine import Engine as Engine
    from .runtime.llama import SafeLlama as SafeLlama
    from .training.extract import extract as extract

_HOMES = {
    "Adapter": "gene",
    "Engine": "runtime.engine",
    "Expression": "gene",
    "SafeGeneError": "errors",
    "SafeLlama": "runtime.llama",
    "SafetyGene": "gene",
    "bake": "merge.bake",
    "convert": "converters.to_gguf",
    "evaluate": "evals.evaluate",
    "export": "export",
    "extract": "training.extract",
    "judge": "evals.judge",
    "learn": "learn.run",
    "merge": "merge.plan",
    "portfolio": "portfolio",
    "recalibrate": "recalibrate.fit",
    "restore": "restore",
    "to_peft": "converters.to_peft",
}
__all__ = sorted([*_HOMES, "__version__"])

sys.modules[__name__].__class__ = LazyPackage
