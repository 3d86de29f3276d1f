"""GGUF files written from arrays, through gguf-py and atomically."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..files import PathLike, atomic_output
from .reader import Scalar


def write_gguf(
    path: PathLike,
    architecture: str,
    metadata: Mapping[str, Scalar | list[str] | list[float] | list[int]],
    tensors: Iterable[tuple[str, npt.NDArray[Any]]],
    inputs: Iterable[PathLike] = (),
) -> None:
    """Write a GGUF file atomically through gguf-py.

    Args:
        path: the output; `inputs` are the files that it must not be.
        architecture: becomes `general.architecture`.
        metadata: strings, booleans, integers (uint32, or int64 where they do not fit),
            floats (float32) and homogeneous lists of these.
        tensors: name and array (float32 or float16), rows first.
    """
    from gguf import GGUFWriter

    with atomic_output(path, inputs) as temporary:
        writer = GGUFWriter(temporary, architecture)
        try:
            for key, value in metadata.items():
                _add(writer, key, value)
            for name, array in tensors:
                writer.add_tensor(name, np.ascontiguousarray(array))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if 0 <= value < 1 << 32 else writer.add_int64)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:  # GGUF has no type for an empty list: an absent key says the same
        writer.add_array(key, value)
