"""GGUF files: bounded reading.

The reader trusts nothing in the file: every count, length and offset is checked
against the file's size before it is used, so a truncated or hostile file gives a
`FileFormatError` and never a crash, a hang, or an allocation of its own choosing.
The format is llama.cpp's (ggml/include/gguf.h, versions 2 and 3, little endian).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FileFormatError
from ..files import PathLike, folder_remedy, reading, require_file, sha256
from ..hub import resolve
from .values import ARRAY, BOOL, FORMATS, STRING, UINT32, Scalar

MAGIC = b"GGUF"
_CUT = "It is truncated: download or convert it again"
ALIGNMENT = "general.alignment"
_OTHERS = {  # how the files begin that people give for a model
    b"PK\x03\x04": "a PyTorch checkpoint",
    b"\x80\x02": "a PyTorch checkpoint",
    b"vers": "a pointer of Git LFS",
    b"<": "a web page",
    b"{": "a JSON file",
}
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 63  # GGML_MAX_NAME is 64 with the closing NUL; longer names are refused by ggml
MAX_ENTRIES = 1 << 16  # keys, or tensors: the largest models have 2,000, and each takes memory


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. `shape` is numpy's order, rows first: (out, in) for a weight."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    n_bytes: int
    path: Path

    @property
    def n_elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def type_name(self) -> str:
        from gguf import GGMLQuantizationType

        return str(GGMLQuantizationType(self.ggml_type).name)


@dataclass(frozen=True, slots=True)
class ArrayValue:
    """A metadata array, decoded only when asked for: a vocabulary has 150,000 strings."""

    file: GGUFFile
    element_type: int
    offset: int
    count: int

    def values(self) -> list[Any]:
        """The elements as Python values."""
        return self.file._read_array(self)


class GGUFFile:
    """A GGUF file's metadata and tensor table; tensor data is read on request.

    Raises:
        FileFormatError: the file is missing, is no GGUF, or contradicts its own size.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = resolve(path)
        self.metadata: dict[str, Scalar | ArrayValue] = {}
        self.types: dict[str, int] = {}  # key to its value's GGUF type, of a list its elements'
        self.tensors: dict[str, TensorInfo] = {}
        self.spans: dict[str, tuple[int, int]] = {}  # key to where its bytes lie, name and value
        with _mapped(self.path) as data:
            self.n_bytes = len(data)
            try:
                self._parse(_Cursor(data, self.path))
            except (UnicodeDecodeError, struct.error) as error:
                raise self._broken(f"unreadable header ({error})") from error

    # -- metadata ---------------------------------------------------------

    @property
    def architecture(self) -> str:
        """`general.architecture`, such as "llama"."""
        return self.text("general.architecture")

    def text(self, key: str, default: str | None = None) -> str:
        """A string value; without a default a missing key raises FileFormatError."""
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self._broken(f"the key '{key}' is missing or not a string")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; without a default a missing key raises FileFormatError."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._broken(f"the key '{key}' is missing or not a number")
        return self._finite(key, value)

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number that is not negative; a missing key as for `number`."""
        value = self.number(key, default)
        if value < 0 or value != int(value):
            raise self._broken(f"{key} is {value}, not a count")
        return int(value)

    @property
    def alignment(self) -> int:
        """What tensors' offsets are multiples of."""
        return self.whole(ALIGNMENT, 32)

    def strings(self, key: str) -> list[str]:
        """A list of strings; empty when the key is missing."""
        value = self.metadata.get(key)
        if value is None:
            return []
        if not isinstance(value, ArrayValue) or value.element_type != STRING:
            raise self._broken(f"the key '{key}' is not a list of strings")
        return [str(item) for item in value.values()]

    def numbers(self, key: str) -> list[float]:
        """Finite numbers (a single number counts as a list of one); empty when missing."""
        value = self.metadata.get(key)
        if value is None:
            return []
        if self.types[key] in (STRING, BOOL):
            raise self._broken(f"the key '{key}' is not a list of numbers")
        items: list[Any] = value.values() if isinstance(value, ArrayValue) else [value]
        return [float(self._finite(key, item)) for item in items]

    def _finite(self, key: str, value: float) -> float:
        if not math.isfinite(value):
            raise self._broken(f"{key} is {value}, not a finite number")
        return value

    # -- tensors ----------------------------------------------------------

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """A tensor's bytes, mapped from disk and read-only."""
        info = self._info(name)
        with reading(info.path):
            return np.memmap(
                info.path, dtype=np.uint8, mode="r", offset=info.offset, shape=(info.n_bytes,)
            )

    def floats(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor as float32 of `shape`, dequantised with gguf-py where needed."""
        from gguf import GGMLQuantizationType, quants

        info = self._info(name)
        kind = GGMLQuantizationType(info.ggml_type)
        raw = self.raw(name)
        if kind == GGMLQuantizationType.F32:
            return np.array(raw.view("<f4").reshape(info.shape), dtype=np.float32)
        if kind == GGMLQuantizationType.F16:
            return raw.view("<f2").reshape(info.shape).astype(np.float32)
        rows = raw.reshape(*info.shape[:-1], -1)
        try:
            with np.errstate(all="ignore"):  # a hostile block's scale may be infinite
                values = quants.dequantize(rows, kind).reshape(info.shape)
        except NotImplementedError as error:
            raise self._broken(
                f"tensor '{name}' has the type {kind.name}, which cannot be read here",
                "Convert it again with tensors in F32 or F16",
            ) from error
        return np.asarray(values, dtype=np.float32)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the whole file, in hexadecimal."""
        return sha256(self.path)

    # -- parsing ----------------------------------------------------------

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise self._broken(f"there is no tensor '{name}'") from None

    def _broken(self, why: str, remedy: str = "") -> FileFormatError:
        return FileFormatError(f"{self.path}: {why}", remedy)

    def _parse(self, cursor: _Cursor) -> None:
        if (begin := cursor.take(4)) != MAGIC:
            raise self._broken(*self._other(begin))
        version = cursor.unpack("<I")
        if version not in (2, 3):
            raise self._broken(
                f"GGUF version {version} is not supported (only 2 and 3, little endian)",
                "Convert the model again with a current llama.cpp",
            )
        n_tensors, n_values = cursor.unpack("<Q"), cursor.unpack("<Q")
        # A tensor record takes at least 24 bytes and a value 13: more cannot be in the file.
        if n_tensors * 24 + n_values * 13 > cursor.left:
            raise self._broken("its header counts more entries than the file could hold", _CUT)
        if max(n_tensors, n_values) > MAX_ENTRIES:
            raise self._broken(f"its header counts {max(n_tensors, n_values)} entries")
        for _ in range(n_values):
            self._entry(cursor)
        pending = [self._tensor_record(cursor) for _ in range(n_tensors)]
        alignment = self.alignment
        if alignment < 1 or alignment & (alignment - 1):
            raise self._broken(f"{ALIGNMENT} is {alignment}, not a power of two")
        if self.types.get(ALIGNMENT, UINT32) != UINT32:  # llama.cpp's gguf.cpp aborts on another
            raise self._broken(f"{ALIGNMENT} is not stored as uint32")
        start = -(-cursor.position // alignment) * alignment
        offset = 0  # llama.cpp takes tensors that follow each other alone
        for info in pending:
            self._place(info, start, offset)
            offset += -(-self.tensors[info.name].n_bytes // alignment) * alignment

    def _other(self, begin: bytes) -> tuple[str, str]:
        """What a file is that is no GGUF, by its first four bytes, and what to do with it."""
        what = next((what for start, what in _OTHERS.items() if begin.startswith(start)), "")
        if self.path.suffix == ".safetensors":
            what = "a safetensors file"
        if what in ("a PyTorch checkpoint", "a safetensors file"):
            remedy = folder_remedy(self.path.parent, "Convert it with llama.cpp's scripts")
        elif what in ("a pointer of Git LFS", "a web page"):
            remedy = "Download the file itself"
        else:
            remedy = "Give a .gguf file as llama.cpp writes it"
        return f"not a GGUF file{what and f' but {what}'}", remedy

    def _entry(self, cursor: _Cursor) -> None:
        begin = cursor.position
        key = cursor.string()
        if not key:  # llama.cpp's gguf.cpp aborts on it
            raise self._broken("a key of its metadata is empty")
        if key in self.metadata:
            raise self._broken(f"the key '{key}' occurs twice")
        kind = cursor.unpack("<I")
        value = self._value(cursor, kind)
        self.types[key] = value.element_type if isinstance(value, ArrayValue) else kind
        self.metadata[key] = value
        self.spans[key] = begin, cursor.position

    def _value(self, cursor: _Cursor, kind: int) -> Scalar | ArrayValue:
        if kind == STRING:
            return cursor.string()
        if kind == ARRAY:
            return self._array(cursor)
        dtype = self._dtype(kind)
        value: Scalar = np.frombuffer(cursor.take(dtype.itemsize), dtype)[0].item()
        return value

    def _array(self, cursor: _Cursor) -> ArrayValue:
        kind, count = cursor.unpack("<I"), cursor.unpack("<Q")
        value = ArrayValue(self, kind, cursor.position, count)
        if kind == STRING:
            if count * 8 > cursor.left:
                raise self._broken("a list of strings is longer than the file", _CUT)
            cursor.skip_strings(count)
        else:
            cursor.skip(count * self._dtype(kind).itemsize)
        return value

    def _dtype(self, kind: int) -> np.dtype[Any]:
        if kind not in FORMATS:
            raise self._broken(f"a metadata value has the unknown type {kind}")
        return np.dtype(f"<{FORMATS[kind]}")

    def _read_array(self, value: ArrayValue) -> list[Any]:
        with _mapped(self.path) as data:
            cursor = _Cursor(data, self.path, value.offset)
            if value.element_type == STRING:
                try:
                    return [text.decode("utf-8") for text in cursor.strings(value.count)]
                except UnicodeDecodeError as error:
                    key = next((k for k, v in self.metadata.items() if v is value), "")
                    raise self._broken(f"a string of '{key}' is not UTF-8 ({error})") from error
            dtype = self._dtype(value.element_type)
            numbers = np.frombuffer(cursor.take(value.count * dtype.itemsize), dtype)
            return list(numbers.tolist())

    def _tensor_record(self, cursor: _Cursor) -> TensorInfo:
        name = cursor.string()
        if not name or len(name.encode()) > MAX_NAME_BYTES:
            raise self._broken(f"a tensor name of {len(name)} characters is not valid")
        n_dimensions = cursor.unpack("<I")
        if not 1 <= n_dimensions <= MAX_DIMENSIONS:
            raise self._broken(f"tensor '{name}' has {n_dimensions} dimensions")
        extents = [cursor.unpack("<Q") for _ in range(n_dimensions)]
        kind, offset = cursor.unpack("<I"), cursor.unpack("<Q")
        return TensorInfo(name, tuple(reversed(extents)), kind, offset, 0, self.path)

    def _place(self, info: TensorInfo, start: int, expected: int) -> None:
        """Check a tensor's size and place against the file, and enter it in the table."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = info.name
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(info.ggml_type)]
        except (ValueError, KeyError):
            raise self._broken(f"tensor '{name}' has the unknown type {info.ggml_type}") from None
        n_elements = 1
        for extent in info.shape:
            n_elements *= extent  # Python integers: this product cannot wrap around
        if n_elements == 0 or info.shape[-1] % block:
            raise self._broken(f"tensor '{name}' has the impossible shape {list(info.shape)}")
        n_bytes = n_elements // block * block_bytes
        offset = start + info.offset
        if info.offset != expected:
            raise self._broken(
                f"tensor '{name}' is at {info.offset} of the data, and those before it end at "
                f"{expected}: its place, or a shape or type before it, is wrong",
                "Download or convert the file again",
            )
        if offset + n_bytes > self.n_bytes:
            raise self._broken(
                f"tensor '{name}' lies outside of the file, which is truncated or corrupt",
                "Download or convert the file again",
            )
        if name in self.tensors:
            raise self._broken(f"tensor '{name}' occurs twice")
        self.tensors[name] = TensorInfo(
            name, info.shape, info.ggml_type, offset, n_bytes, self.path
        )


class _Cursor:
    """A bounds-checked reading position in a mapped file."""

    def __init__(self, data: mmap.mmap | bytes, path: Path, position: int = 0) -> None:
        self._data, self._path, self.position = data, path, position

    @property
    def left(self) -> int:
        return len(self._data) - self.position

    def skip(self, n_bytes: int) -> None:
        if n_bytes > self.left:
            raise FileFormatError(
                f"{self._path}: the file ends in the middle of its header",
                _CUT,
            )
        self.position += n_bytes

    def skip_strings(self, count: int) -> None:
        """Skip so many strings; a vocabulary's, so the loop is a tight one."""
        read, data, at = struct.Struct("<Q").unpack_from, self._data, self.position
        try:
            for _ in range(count):
                at += 8 + read(data, at)[0]
        except (struct.error, OverflowError):  # a length beyond the file, or beyond an address
            at = len(data) + 1
        self.skip(at - self.position)

    def strings(self, count: int) -> list[bytes]:
        """So many strings."""
        at, read, data, found = self.position, struct.Struct("<Q").unpack_from, self._data, []
        self.skip_strings(count)  # all lie in the file
        for _ in range(count):
            begin = at + 8
            at = begin + read(data, at)[0]
            found.append(data[begin:at])
        return found

    def take(self, n_bytes: int) -> bytes:
        start = self.position
        self.skip(n_bytes)
        return self._data[start : self.position]

    def unpack(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def string(self) -> str:
        return self.take(self.unpack("<Q")).decode("utf-8")


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """The file mapped read-only, with the operating system's errors in our words."""
    require_file(path)
    with (
        reading(path),
        open(path, "rb") as handle,
        mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        yield data
