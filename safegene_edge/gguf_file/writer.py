"""GGUF files written from arrays, atomically."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import SettingError
from ..files import PathLike, atomic_output
from .reader import ALIGNMENT, MAGIC
from .values import Value, pack_string, pack_value

_VERSION = 3
_DEFAULT_ALIGNMENT = 32  # what a file has that does not name one
_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1}  # ggml's numbers


def write_gguf(
    path: PathLike,
    architecture: str,
    metadata: Mapping[str, Value],
    tensors: Iterable[tuple[str, npt.NDArray[Any]]],
    inputs: Iterable[PathLike] = (),
    types: Mapping[str, int] | None = None,
) -> None:
    """Write a GGUF file atomically.

    Args:
        path: the output; `inputs` are the files that it must not be.
        architecture: becomes `general.architecture`.
        metadata: strings, booleans, integers (uint32, or int64 where they do not fit),
            floats (float32) and homogeneous lists of these.
        tensors: name and array (float32 or float16), rows first.
        types: GGUF types of values (of a list its elements') that are to have another one.

    Raises:
        SettingError: a value or a tensor has a type that the file cannot hold.
        OutputError: the output cannot be written, or is an input.
    """
    types = types or {}
    facts: dict[str, Value] = {"general.architecture": architecture}
    for key, value in metadata.items():
        # An empty list of no known type says the same as an absent key. The alignment is the
        # one that this file gets, whatever another file had.
        if key != ALIGNMENT and (value != [] or key in types):
            facts[key] = value
    pairs = [pack_string(key) + pack_value(value, types.get(key)) for key, value in facts.items()]
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors}
    records, end = [], 0
    for name, array in arrays.items():
        records.append(_record(name, array, end))
        end += array.nbytes + _padding(array.nbytes)
    header = MAGIC + struct.pack("<IQQ", _VERSION, len(records), len(pairs))
    header += b"".join(pairs) + b"".join(records)
    with atomic_output(path, inputs) as temporary, open(temporary, "wb") as handle:
        handle.write(header + bytes(_padding(len(header))))
        for array in arrays.values():
            handle.write(array.tobytes())
            handle.write(bytes(_padding(array.nbytes)))


def _record(name: str, array: npt.NDArray[Any], offset: int) -> bytes:
    """A tensor's entry in the header."""
    if array.dtype not in _TYPES:
        raise SettingError(f"tensor '{name}' is {array.dtype}, not float32 or float16")
    shape = array.shape[::-1]
    entry = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, _TYPES[array.dtype], offset)
    return pack_string(name) + entry


def _padding(n_bytes: int) -> int:
    return -n_bytes % _DEFAULT_ALIGNMENT
