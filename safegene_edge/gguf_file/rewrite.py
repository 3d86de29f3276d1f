"""A GGUF file written anew: metadata and untouched tensors byte for byte, others in their place.

The header is the source's own bytes with keys added or left out; tensors keep their order.
gguf-py would read every value and write it again; a copy cannot change what it does not read.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import FileFormatError
from ..files import reading
from .kernels import TensorType
from .reader import MAGIC, GGUFFile, TensorInfo
from .values import Value, pack_string, pack_value

_COPY = 1 << 26  # bytes a system call


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor goes in the new file."""

    info: TensorInfo
    ggml_type: int
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Draft:
    """A file to be written: its header, its tensors' places, its size in bytes."""

    header: bytes
    places: tuple[Place, ...]
    n_bytes: int


def draft(
    parts: list[GGUFFile],
    types: Mapping[str, int],
    added: Mapping[str, Value],
    drop: Callable[[str], bool],
) -> Draft:
    """Lay out a file with the first part's metadata and the tensors of all parts.

    Args:
        parts: one file, or all files of a split model that becomes one.
        types: tensor to its new ggml type; others keep theirs.
        added: keys to add; they replace those of the same name.
        drop: tells the keys to leave out.
    """
    first = parts[0]
    alignment = first.alignment
    with reading(first.path), open(first.path, "rb") as source:
        data = source.read(max((end for _, end in first.spans.values()), default=24))
    kept = [data[a:b] for key, (a, b) in first.spans.items() if key not in added and not drop(key)]
    pairs = kept + [pack_string(key) + pack_value(value) for key, value in added.items()]
    infos = [info for part in parts for info in part.tensors.values() if info.path == part.path]
    records, places, end = [], list[Place](), 0
    for info in infos:
        kind = TensorType.of(types.get(info.name, info.ggml_type))
        if info.shape[-1] % kind.block:
            raise FileFormatError(f"{info.path}: rows of '{info.name}' do not fit {kind.name}")
        size = kind.width(info.n_elements)
        shape = info.shape[::-1]
        entry = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind.number, end)
        records.append(pack_string(info.name) + entry)
        places.append(Place(info, kind.number, end, size))
        end = -(-(end + size) // alignment) * alignment
    version = struct.unpack("<I", data[4:8])[0]
    head = MAGIC + struct.pack("<IQQ", version, len(records), len(pairs))
    header = head + b"".join(pairs) + b"".join(records)
    header += b"\0" * (-len(header) % alignment)
    moved = tuple(Place(p.info, p.ggml_type, p.offset + len(header), p.n_bytes) for p in places)
    return Draft(header, moved, len(header) + end)


def begin(path: Path, n_bytes: int) -> int:
    """Open the new file with its full size reserved; returns the descriptor.

    Raises:
        OSError: the disk is too small; nothing is written yet.
    """
    handle = open_binary(path, os.O_RDWR)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, n_bytes)
        else:
            os.ftruncate(handle, n_bytes)
    except BaseException:
        os.close(handle)
        raise
    return handle


def open_binary(path: Path, flags: int) -> int:
    """os.open; Windows would else turn every byte 10 into two."""
    return os.open(path, flags | getattr(os, "O_BINARY", 0))


_seeking = threading.Lock()  # a descriptor has one position, whichever thread moves it


def read_at(handle: int, n_bytes: int, offset: int) -> bytes:
    """So many bytes from a place in a file; Windows has no os.pread.

    Raises:
        OSError: they cannot be read, or the file ends before.
    """
    parts: list[bytes] = []
    while n_bytes:
        if hasattr(os, "pread"):
            part = os.pread(handle, n_bytes, offset)
        else:
            with _seeking:
                os.lseek(handle, offset, os.SEEK_SET)
                part = os.read(handle, n_bytes)
        if not part:
            raise OSError("it became shorter while it was read")
        parts.append(part)
        n_bytes, offset = n_bytes - len(part), offset + len(part)
    return b"".join(parts)


def write_at(handle: int, data: bytes | memoryview, offset: int) -> None:
    """All bytes to a place in a file; Windows has no os.pwrite."""
    left = memoryview(data).cast("B")
    while left:
        if hasattr(os, "pwrite"):
            done = os.pwrite(handle, left, offset)
        else:
            with _seeking:
                os.lseek(handle, offset, os.SEEK_SET)
                done = os.write(handle, left)
        left, offset = left[done:], offset + done


def copy(places: Iterable[Place], handle: int) -> None:
    """Copy tensors byte for byte; the kernel does it where it can.

    Raises:
        FileFormatError: a source cannot be read. OSError: the target cannot be written.
    """
    sources: dict[Path, int] = {}
    try:
        for place in places:
            path = place.info.path
            if path not in sources:
                with reading(path):
                    sources[path] = open_binary(path, os.O_RDONLY)
            _copy_range(path, sources[path], place, handle)
    finally:
        for source in sources.values():
            os.close(source)


def _copy_range(path: Path, source: int, place: Place, target: int) -> None:
    at, to, left = place.info.offset, place.offset, place.n_bytes
    in_kernel = hasattr(os, "copy_file_range")
    while left:
        done = _copied_in_kernel(source, at, target, to, min(left, _COPY)) if in_kernel else 0
        if not done:  # tell which of the two files is at fault
            in_kernel = False
            done = min(left, 1 << 20)
            with reading(path):
                data = read_at(source, done, at)
            write_at(target, data, to)
        if hasattr(os, "posix_fadvise"):  # starts the writing, which the fsync would wait for
            with suppress(OSError):  # a hint, which not every file system takes
                os.posix_fadvise(target, to, done, os.POSIX_FADV_DONTNEED)
        at, to, left = at + done, to + done, left - done


def _copied_in_kernel(source: int, at: int, target: int, to: int, n_bytes: int) -> int:
    """Bytes copied; 0 where the kernel cannot: across file systems, an error, the source's end."""
    try:
        return os.copy_file_range(source, target, n_bytes, at, to)
    except OSError:
        return 0
