"""Safety adapters for quantised GGUF models, on the laptop, through llama.cpp.

The public names are imported when first used, so that `import safegene_edge` costs
nothing and `--help` answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .converters import convert as convert
    from .converters import to_peft as to_peft
    from .errors import SafeGeneError as SafeGeneError
    from .evals.evaluate import evaluate as evaluate
    from .evals.judge import judge as judge
    from .gene import Adapter as Adapter
    from .gene import Expression as Expression
    from .gene import SafetyGene as SafetyGene
    from .measuring import merge as merge
    from .recalibration import recalibrate as recalibrate
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
    "convert": "converters",
    "evaluate": "evals.evaluate",
    "extract": "training.extract",
    "judge": "evals.judge",
    "merge": "measuring",
    "recalibrate": "recalibration",
    "to_peft": "converters",
}
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
