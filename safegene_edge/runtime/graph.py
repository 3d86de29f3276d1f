"""llama.cpp's graph as its eval callback sees it: nodes, their sources, and their values."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import llama_cpp
import numpy as np

from ..aliases import Floats

_F32 = 0


class Tensor(ctypes.Structure):
    """ggml/include/ggml.h, `struct ggml_tensor`, as far as the name, by which it is checked."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


@lru_cache
def library() -> Any:
    """ggml's functions, through the library of llama.cpp, which is linked against it."""
    found = llama_cpp.llama_cpp._lib
    found.ggml_get_name.restype = found.ggml_op_name.restype = ctypes.c_char_p
    found.ggml_get_name.argtypes, found.ggml_op_name.argtypes = [ctypes.c_void_p], [ctypes.c_int]
    for moved in (found.ggml_backend_tensor_get, found.ggml_backend_tensor_set):
        moved.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        moved.restype = None
    return found


def node_at(address: Any) -> Any:
    """The node that a callback is shown."""
    return ctypes.cast(address, ctypes.POINTER(Tensor)).contents


def name_of(tensor: Any) -> str:
    """A tensor's name; of a copy on another backend ("CPU#NAME#0"), the original's."""
    parts = tensor.name.decode("utf-8", "replace").split("#")
    return str(parts[1] if len(parts) == 3 else parts[0])


def is_matrix(tensor: Any) -> bool:
    """Whether it is a plain matrix of float32, so that `values` can read it."""
    width = int(tensor.ne[0])
    plain = tensor.type == _F32 and tensor.nb[0] == 4 and tensor.nb[1] == 4 * width
    return bool(plain and tensor.ne[2] == tensor.ne[3] == 1)


def values(tensor: Any, into: Floats | None = None) -> Floats:
    """A copy of a plain matrix (rows×columns), in an array of its shape or in a new one."""
    shape = (int(tensor.ne[1]), int(tensor.ne[0]))
    found = into if into is not None and into.shape == shape else np.empty(shape, np.float32)
    address = ctypes.c_void_p(ctypes.addressof(tensor))
    library().ggml_backend_tensor_get(address, found.ctypes.data, 0, found.nbytes)
    return found


def put(tensor: Any, matrix: Floats) -> None:
    """Overwrite a plain matrix: what comes later in the same decode is computed from it."""
    whole = np.ascontiguousarray(matrix, np.float32)
    address = ctypes.c_void_p(ctypes.addressof(tensor))
    library().ggml_backend_tensor_set(address, whole.ctypes.data, 0, whole.nbytes)
