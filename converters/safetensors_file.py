"""Safetensors without torch: bounded reading, and arrays in bfloat16.

The format (https://github.com/huggingface/safetensors): eight bytes with the header's
length, a JSON header with each tensor's type, shape and place, then the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import FileFormatError
from ..files import PathLike, parse_json, reading, require_file

Array: TypeAlias = npt.NDArray[Any]

_FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_MAX_HEADER = 100_000_000  # the reference implementation's own limit


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's type as safetensors names it, its shape, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]

    @property
    def readable(self) -> bool:
        """Whether the type is one of F32, F16 and BF16."""
        return self.dtype in _FLOATS

    def floats(self) -> npt.NDArray[np.float32]:
        """The values in float32, which holds all three types exactly."""
        stored = self.data.view(_FLOATS[self.dtype]).reshape(self.shape)
        if self.dtype == "BF16":  # the upper half of a float32
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32)


def as_dtype(values: npt.NDArray[np.float32], dtype: str) -> Array:
    """float32 values rounded to a safetensors type, as an array of that type."""
    if dtype == "BF16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16)
    return values.astype(_FLOATS[dtype])


def read(path: PathLike) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """All tensors of a file by name, mapped from disk, and its metadata.

    Raises:
        FileFormatError: missing, empty, truncated, or a header that contradicts the file.
    """
    path = require_file(path)
    with reading(path):
        header, start = _header(path, path.stat().st_size)
    metadata = header.pop("__metadata__", None) or {}  # MLX writes null
    if not isinstance(metadata, dict):
        raise _broken(path, "its metadata is not a table")
    with reading(path):
        content = np.memmap(path, dtype=np.uint8, mode="r")[start:]
    tensors = {name: _tensor(path, name, record, content) for name, record in header.items()}
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def write(path: PathLike, tensors: dict[str, Array], metadata: dict[str, str]) -> None:
    """Write float32, float16 and bfloat16 arrays; the caller makes it atomic."""
    from safetensors.numpy import save

    ready = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    # Not save_file, whose error for a full disk is one of its own and no OSError.
    Path(path).write_bytes(save(ready, metadata=metadata))


def _header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    with open(path, "rb") as handle:
        prefix = handle.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
            raise _broken(path, "not a safetensors file, or truncated inside its header")
        text = handle.read(length)
    try:
        header = parse_json(text)
    except ValueError as error:
        raise _broken(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a table of tensors")
    return header, 8 + length


def _tensor(path: Path, name: str, record: Any, content: npt.NDArray[np.uint8]) -> StoredTensor:
    try:
        dtype, shape = record["dtype"], tuple(record["shape"])
        begin, end = record["data_offsets"]
        numbers = (*shape, begin, end)
        if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{record!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, f"tensor '{name}' has a malformed record ({error})") from error
    if not begin <= end <= len(content):
        raise _broken(path, f"tensor '{name}' lies outside of the file, which is truncated")
    if dtype in _FLOATS:
        n_bytes = np.dtype(_FLOATS[dtype]).itemsize
        for extent in shape:
            n_bytes *= extent
        if n_bytes != end - begin:
            raise _broken(path, f"tensor '{name}' has {end - begin} bytes, not {n_bytes}")
    return StoredTensor(dtype, shape, content[begin:end])


def _broken(path: Path, why: str) -> FileFormatError:
    return FileFormatError(f"{path}: {why}", "Download or save the adapter again")
