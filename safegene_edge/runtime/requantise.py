"""Requantise a GGUF through llama.cpp, atomically."""

from __future__ import annotations

import ctypes
import os

from ..compat import open_model
from ..errors import LlamaCppError, SettingError
from ..files import PathLike, atomic_output
from .devices import physical_cores

_PREFIX = "LLAMA_FTYPE_MOSTLY_"


def requantise(source: PathLike, output: PathLike, kind: str = "Q4_K_M") -> None:
    """Write `source` in another type; quantised sources are dequantised first, with some loss.

    Args:
        source, output: GGUF files.
        kind: llama.cpp's name of the mixture, such as "Q4_K_M" or "F16".

    Raises:
        SettingError: llama.cpp knows no such kind.
    """
    import llama_cpp

    from .log import reason

    name = "LLAMA_FTYPE_ALL_F32" if kind == "F32" else _PREFIX + kind
    ftype = getattr(llama_cpp, name, None)
    if ftype is None:
        known = sorted(n[len(_PREFIX) :] for n in dir(llama_cpp) if n.startswith(_PREFIX))
        raise SettingError(f"unknown quantisation '{kind}'", f"Give one of {', '.join(known)}")
    source = open_model(source).path
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = ftype, True, physical_cores()
    with atomic_output(output, [source]) as temporary:
        with reason() as why:
            code = llama_cpp.llama_model_quantize(
                os.fsencode(source), os.fsencode(temporary), ctypes.byref(params)
            )
        if code:
            raise LlamaCppError(why.after(f"{source}: llama.cpp could not write it as {kind}"))
