"""Importance matrices as llama-imatrix writes them: GGUF, or the older binary form."""

from __future__ import annotations

import struct

import numpy as np

from ..aliases import Floats
from ..errors import FileFormatError
from ..files import PathLike, reading, require_file
from ..gguf_file import MAGIC, GGUFFile

_SUMS, _COUNTS = ".in_sum2", ".counts"


def read_imatrix(path: PathLike) -> dict[str, Floats]:
    """Tensor name to the mean squared activation of each of its inputs (columns).

    Raises:
        FileFormatError: neither form, or a count, length or value that makes no sense.
    """
    with reading(path), open(require_file(path), "rb") as handle:
        data = handle.read()
    with np.errstate(all="ignore"):  # what is or becomes infinite or NaN is refused
        found = _from_gguf(path) if data[:4] == MAGIC else _from_binary(path, data)
    for name, values in found.items():
        if not values.size or not np.isfinite(values).all() or (values < 0).any():
            raise FileFormatError(f"{path}: '{name}' holds a value that is no mean square")
    return found


def _from_gguf(path: PathLike) -> dict[str, Floats]:
    file = GGUFFile(path)
    names = [name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)]
    if file.metadata.get("general.type") != "imatrix" or not names:
        raise FileFormatError(f"{path}: is no importance matrix", "Make one with llama-imatrix")
    found = {}
    for name in names:
        if name + _COUNTS not in file.tensors:
            raise FileFormatError(f"{path}: '{name}' has no counts")
        sums, counts = file.floats(name + _SUMS), file.floats(name + _COUNTS)
        if sums.size % counts.size:
            raise FileFormatError(f"{path}: '{name}' has {sums.size} sums, {counts.size} counts")
        if not np.isfinite(counts).all() or (counts < 0).any():
            raise FileFormatError(f"{path}: '{name}' holds a count that is none")
        each = sums.reshape(counts.size, -1)
        share = counts.reshape(-1, 1)
        mean = np.divide(each, share, out=np.ones_like(each), where=share > 0)
        found[name] = np.asarray(mean.reshape(-1), np.float32)
    return found


def _from_binary(path: PathLike, data: bytes) -> dict[str, Floats]:
    found: dict[str, Floats] = {}
    try:
        (count,) = struct.unpack_from("<i", data)
        at = 4
        if not 0 < count <= len(data) // 13:
            raise ValueError(f"it counts {count} entries")
        for _ in range(count):
            (length,) = struct.unpack_from("<i", data, at)
            if not 0 < length <= len(data):
                raise ValueError(f"a name of {length} bytes")
            name = data[at + 4 : at + 4 + length].decode("utf-8")
            at += 4 + length
            calls, size = struct.unpack_from("<ii", data, at)
            if size < 1 or calls < 0 or name in found:
                raise ValueError(f"'{name}' has {size} values of {calls} calls, or occurs twice")
            values = np.frombuffer(data, "<f4", size, at + 8)
            found[name] = values / np.float32(max(1, calls))
            at += 8 + 4 * size
    except (struct.error, ValueError) as error:
        raise FileFormatError(
            f"{path}: is no importance matrix ({error})", "Make one with llama-imatrix"
        ) from error
    return found
