"""Reading what we did not write: truncated, hostile and plain wrong files."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from safegene_edge.errors import FileFormatError, OutputError
from safegene_edge.files import atomic_output
from safegene_edge.gguf_file import GGUFFile, write_gguf

HEADER = b"GGUF" + struct.pack("<I", 3)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def counts(tensors: int, values: int) -> bytes:
    return HEADER + struct.pack("<QQ", tensors, values)


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    extents = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + extents + struct.pack("<IQ", kind, offset)


U32, STRING, ARRAY = 4, 8, 9
HOSTILE = {
    "not a GGUF": (b"PK\x03\x04 something else entirely", "not a GGUF"),
    "magic alone": (b"GGUF", "ends in the middle"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
    "2^60 values": (counts(0, 1 << 60), "more entries than"),
    "2^60 tensors": (counts(1 << 60, 0), "more entries than"),
    "key of 2^63 bytes": (counts(0, 1) + struct.pack("<Q", 1 << 63) + b"x" * 40, "ends in"),
    "key not UTF-8": (counts(0, 1) + struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc" + b"\0" * 9, "utf"),
    "unknown value type": (
        counts(0, 1) + text("k") + struct.pack("<I", 77) + b"\0" * 16,
        "type 77",
    ),
    "same key twice": (
        counts(0, 2) + (text("key") + struct.pack("<II", U32, 1)) * 2 + b"\0" * 32,
        "occurs twice",
    ),
    "list of 2^61 strings": (
        counts(0, 1) + text("k") + struct.pack("<IIQ", ARRAY, STRING, 1 << 61) + b"\0" * 16,
        "longer than the file",
    ),
    "list of 2^62 numbers": (
        counts(0, 1) + text("k") + struct.pack("<IIQ", ARRAY, U32, 1 << 62) + b"\0" * 16,
        "ends in",
    ),
    "list of lists": (
        counts(0, 1) + text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + b"\0" * 16,
        "unknown type",
    ),
    "5 dimensions": (counts(1, 0) + tensor("t", (1,) * 5) + b"\0" * 64, "5 dimensions"),
    "no dimension": (counts(1, 0) + tensor("t", ()) + b"\0" * 64, "0 dimensions"),
    "overflowing shape": (counts(1, 0) + tensor("t", (1 << 33, 1 << 33)) + b"\0" * 64, "outside"),
    "zero extent": (counts(1, 0) + tensor("t", (0, 4)) + b"\0" * 64, "impossible shape"),
    "row no multiple of its block": (counts(1, 0) + tensor("t", (33,), 2) + b"\0" * 99, "shape"),
    "unknown tensor type": (counts(1, 0) + tensor("t", (4,), 250) + b"\0" * 64, "type 250"),
    "offset outside": (counts(1, 0) + tensor("t", (4,), 0, 1 << 40) + b"\0" * 64, "outside"),
    "offset not aligned": (counts(1, 0) + tensor("t", (4,), 0, 7) + b"\0" * 64, "outside"),
    "name of 100 bytes": (counts(1, 0) + tensor("n" * 100, (4,)) + b"\0" * 64, "100 characters"),
    "same tensor twice": (counts(2, 0) + tensor("t", (4,)) * 2 + b"\0" * 99, "occurs twice"),
    "alignment 0": (
        counts(0, 1) + text("general.alignment") + struct.pack("<II", U32, 0) + b"\0" * 32,
        "power of two",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused_with_a_reason(name, tmp_path):
    content, reason = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=reason) as raised:
        GGUFFile(path)
    assert str(path) in str(raised.value)


def small_file(path):
    arrays = [("a", np.arange(12, dtype=np.float32).reshape(3, 4)), ("b", np.ones(5, np.float16))]
    facts = {"x.flag": True, "x.count": 7, "x.scale": 0.5, "x.words": ["ä", ""], "x.n": [1.5, 2.0]}
    write_gguf(path, "llama", facts, arrays)
    return path


def test_what_is_written_is_read_back(tmp_path):
    file = GGUFFile(small_file(tmp_path / "x.gguf"))
    assert file.architecture == "llama"
    assert (file.metadata["x.flag"], file.number("x.count"), file.number("x.scale")) == (
        True,
        7,
        0.5,
    )
    assert (file.strings("x.words"), file.numbers("x.n")) == (["ä", ""], [1.5, 2.0])
    assert file.tensors["a"].shape == (3, 4)
    np.testing.assert_array_equal(file.floats("a"), np.arange(12).reshape(3, 4))
    np.testing.assert_array_equal(file.floats("b"), np.ones(5))


def test_every_truncation_is_noticed(tmp_path):
    whole = small_file(tmp_path / "whole.gguf").read_bytes()
    # The last tensor is followed by padding, which may go without harm.
    padding = -(5 * 2) % 32
    cut = tmp_path / "cut.gguf"
    for length in range(1, len(whole) - padding):
        cut.write_bytes(whole[:length])
        with pytest.raises(FileFormatError):
            GGUFFile(cut)


def test_a_key_of_another_type_is_named(tmp_path):
    file = GGUFFile(small_file(tmp_path / "x.gguf"))
    for read, key in ((file.text, "x.count"), (file.number, "x.words"), (file.strings, "x.n")):
        with pytest.raises(FileFormatError, match=key):
            read(key)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_output(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_output_is_never_an_input(tmp_path):
    path = tmp_path / "x"
    path.write_text("precious")
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(OutputError, match="also an input"), atomic_output(link, [path]):
        pass
    assert path.read_text() == "precious"
