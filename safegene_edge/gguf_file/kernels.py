"""ggml's own quantise and dequantise, through ctypes, from the library in llama-cpp-python's wheel.

The calls leave Python's lock, so that threads run side by side. Nothing of llama.cpp's model
code is loaded: `libggml-base` needs only the C library.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..aliases import Bytes, Floats
from ..errors import LlamaCppError, SettingError, UnsupportedError

WRITABLE = frozenset({
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_XXS", "IQ3_S",
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M",
})  # fmt: skip
_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
_F32 = 0
# No weight is as large. With some 1e14, types of the IQ family end the process ("point not on
# grid"); with 1e12 none did.
_LARGEST = 1e12
_NAMES = {"linux": "libggml-base.so", "darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor type: its name, ggml's number, weights a block and bytes a block."""

    name: str
    number: int
    block: int
    size: int

    @classmethod
    def of(cls, number: int) -> TensorType:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        kind = GGMLQuantizationType(number)
        return cls(str(kind.name), number, *GGML_QUANT_SIZES[kind])

    @classmethod
    def named(cls, name: str) -> TensorType:
        from gguf import GGMLQuantizationType

        return cls.of(GGMLQuantizationType[name])

    def width(self, weights: int) -> int:
        """Bytes of so many weights, whole blocks of them."""
        return weights // self.block * self.size


class _Traits(ctypes.Structure):
    """ggml/include/ggml.h, `struct ggml_type_traits`."""

    _fields_ = (
        ("type_name", ctypes.c_void_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


# What ggml's own functions say of some types is held against the number and the struct.
_KNOWN = {0: "f32", 1: "f16", 2: "q4_0", 8: "q8_0", 12: "q4_k", 14: "q6_k", 30: "bf16"}


@lru_cache
def _library() -> Any:
    found = find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise LlamaCppError("llama-cpp-python is not installed", "pip install llama-cpp-python")
    path = Path(found.origin).parent / "lib" / _NAMES.get(sys.platform, _NAMES["linux"])
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LlamaCppError(f"{path}: {error}", "Reinstall llama-cpp-python") from error
    try:
        _declare(library)
    except AttributeError as error:
        raise _another_ggml(path, str(error)) from error
    for number, name in _KNOWN.items():
        named = (library.ggml_type_name(number) or b"unknown").decode("ascii", "replace")
        if named.lower() != name:
            raise _another_ggml(path, f"its type {number} is {named}, not {name}")
        _require_layout(library, path, number)
    return library


def _declare(library: Any) -> None:
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_is_quantized.restype = ctypes.c_bool
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip


def _require_layout(library: Any, path: Path, ggml_type: int) -> None:
    """Hold the struct against ggml's functions: from another one a wrong pointer would be called.

    The name is compared as an address, since a wrong one must not be followed.
    """
    traits = library.ggml_get_type_traits(ggml_type)
    name = ctypes.cast(library.ggml_type_name, ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int))
    said = (
        name(ggml_type),
        library.ggml_blck_size(ggml_type),
        library.ggml_type_size(ggml_type),
        library.ggml_is_quantized(ggml_type),
    )
    if not traits:
        raise _another_ggml(path, f"it has no traits of the type {ggml_type}")
    held = traits.contents
    if said != (held.type_name, held.blck_size, held.type_size, held.is_quantized):
        raise _another_ggml(path, "its ggml_type_traits have another layout")


def _another_ggml(path: Path, why: str) -> LlamaCppError:
    return LlamaCppError(
        f"{path}: is another ggml than this version knows ({why})",
        "Install the llama-cpp-python that this version asks for: in its clone, pip install .",
    )


@lru_cache
def _to_float(ggml_type: int) -> Any:
    address = _library().ggml_get_type_traits(ggml_type).contents.to_float
    return _ToFloat(address) if address else None


def needs_imatrix(ggml_type: int) -> bool:
    """Whether ggml refuses to quantise to this type without an importance matrix."""
    return bool(_library().ggml_quantize_requires_imatrix(ggml_type))


def require_writable(ggml_type: int, name: str, where: str) -> None:
    """Raise UnsupportedError for a type that ggml can read and not write.

    `ggml_quantize_chunk` aborts the whole process on such a type: it must never be asked.
    """
    if name not in WRITABLE:
        raise UnsupportedError(
            f"{where}: has the type {name}, which ggml cannot write",
            "Side-load the adapter, or requantise the model to another type first",
        )


def dequantise(raw: Bytes, ggml_type: int, shape: tuple[int, int]) -> Floats:
    """Quantised bytes as float32.

    Args:
        raw: the rows' bytes, contiguous.
        shape: rows×columns; columns are a multiple of the type's block.
    """
    values = np.empty(shape, np.float32)
    if ggml_type == _F32:
        values.reshape(-1).view(np.uint8)[:] = raw.reshape(-1)
        return values
    convert = _to_float(ggml_type)
    if convert is None:
        raise UnsupportedError(f"ggml cannot read the type {ggml_type}")
    raw = np.ascontiguousarray(raw)
    convert(raw.ctypes.data, values.ctypes.data, values.size)
    return values


def quantise(values: Floats, ggml_type: int, importance: Floats | None = None) -> Bytes:
    """Float32 (rows×columns) as bytes (rows×bytes a row) of a type.

    Args:
        importance: weight of each column (columns), from an importance matrix.

    Raises:
        SettingError: the type needs an importance matrix.
        FloatingPointError: values are not finite, or so large that ggml would end the process.
    """
    values = np.ascontiguousarray(values, np.float32)
    rows, columns = values.shape
    if needs_imatrix(ggml_type) and importance is None:
        raise SettingError(f"the type {ggml_type} needs an importance matrix", "Give --imatrix")
    traits = _library().ggml_get_type_traits(ggml_type).contents
    most = _LARGEST if traits.blck_size > 1 else np.inf
    if not (values.max(initial=0.0) < most and values.min(initial=0.0) > -most):
        raise FloatingPointError
    width = columns // traits.blck_size * traits.type_size
    out = np.empty((rows, width), np.uint8)
    weights = None
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        weights = importance.ctypes.data
    written = _library().ggml_quantize_chunk(
        ggml_type, values.ctypes.data, out.ctypes.data, 0, rows, columns, weights
    )
    if written != out.size:
        raise LlamaCppError(f"ggml wrote {written} bytes of {out.size} for the type {ggml_type}")
    return out
