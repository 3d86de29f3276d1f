"""Reading what we did not write: truncated, hostile and plain wrong files."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest

from safegene_edge.errors import FileFormatError, OutputError, SettingError
from safegene_edge.files import atomic_output
from safegene_edge.gguf_file import GGUFFile, write_gguf

HEADER = b"GGUF" + struct.pack("<I", 3)


def text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def counts(tensors: int, values: int) -> bytes:
    return HEADER + struct.pack("<QQ", tensors, values)


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    extents = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + extents + struct.pack("<IQ", kind, offset)


def alignment(kind: int, form: str, value: float) -> bytes:
    key = text("general.alignment") + struct.pack(f"<I{form}", kind, value)
    return counts(0, 1) + key + b"\0" * 64


U32, I32, F32, STRING, ARRAY, U64 = 4, 5, 6, 8, 9, 10
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
    "offset outside": (counts(1, 0) + tensor("t", (4,), 0, 1 << 40) + b"\0" * 64, "is at 1099"),
    "longer than the file": (counts(1, 0) + tensor("t", (400,)) + b"\0" * 64, "outside"),
    "offset not aligned": (counts(1, 0) + tensor("t", (4,), 0, 7) + b"\0" * 64, "is at 7"),
    # A shape or a type that was changed: llama.cpp does not load such a file.
    "a gap between tensors": (
        counts(2, 0) + tensor("t", (4,)) + tensor("u", (4,), 0, 64) + b"\0" * 128,
        "'u' is at 64 of the data, and those before it end at 32",
    ),
    "name of 100 bytes": (counts(1, 0) + tensor("n" * 100, (4,)) + b"\0" * 64, "100 characters"),
    "same tensor twice": (
        counts(2, 0) + tensor("t", (4,)) + tensor("t", (4,), 0, 32) + b"\0" * 99,
        "occurs twice",
    ),
    "string of 2^63 bytes in a list": (
        counts(0, 1) + text("k") + struct.pack("<IIQQ", ARRAY, STRING, 1, 1 << 63) + b"\0" * 16,
        "ends in",
    ),
    "strings that together are longer": (
        counts(0, 1)
        + text("k")
        + struct.pack("<IIQQ9sQ", ARRAY, STRING, 2, 9, b"", 100)
        + b"\0" * 40,
        "ends in",
    ),
    "70,000 keys": (counts(0, 70_000) + b"\0" * (13 * 70_000), "counts 70000 entries"),
    "an empty key": (counts(0, 1) + text("") + struct.pack("<II", U32, 1), "key .* is empty"),
    "alignment of NaN": (alignment(F32, "f", math.nan), "alignment is nan"),
    "infinite alignment": (alignment(F32, "f", -math.inf), "alignment is -inf"),
    "alignment of 32.5": (alignment(F32, "f", 32.5), "alignment is 32.5"),
    "alignment below 0": (alignment(I32, "i", -32), "alignment is -32"),
    "alignment as uint64": (alignment(U64, "Q", 32), "not stored as uint32"),
    "alignment of 2^63": (alignment(U64, "Q", 1 << 63), "not stored as uint32"),
    "alignment 3": (alignment(U32, "I", 3), "alignment is 3, not a power of two"),
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


NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_every_type_of_metadata_is_written_as_it_was_read(kind, tmp_path):
    """Alone and in a list; the largest that the type holds, where it is an integer."""
    size = struct.calcsize(f"<{NUMBERS[kind]}")
    bits = 8 * size - NUMBERS[kind].islower()
    value = {6: 0.5, 7: True, 12: 1e300}.get(kind, (1 << bits) - 1)
    scalar = text("one") + struct.pack(f"<I{NUMBERS[kind]}", kind, value)
    list_of = [False, True, True] if kind == 7 else [0, 1, value]
    several = text("more") + struct.pack(f"<IIQ3{NUMBERS[kind]}", ARRAY, kind, 3, *list_of)
    none = text("none") + struct.pack("<IIQ", ARRAY, kind, 0)
    architecture = text("general.architecture") + struct.pack("<I", STRING) + text("llama")
    content = counts(0, 4) + architecture + scalar + several + none
    (tmp_path / "a.gguf").write_bytes(content)
    file = GGUFFile(tmp_path / "a.gguf")
    assert file.types == {"general.architecture": STRING, "one": kind, "more": kind, "none": kind}
    facts = {"one": value, "more": list_of, "none": []}
    assert file.metadata["one"] == value
    assert {k: file.metadata[k].values() for k in ("more", "none")} == {
        k: facts[k] for k in ("more", "none")
    }
    write_gguf(tmp_path / "b.gguf", "llama", facts, [], types=file.types)
    written = (tmp_path / "b.gguf").read_bytes()
    assert written == content + bytes(-len(content) % 32)


@pytest.mark.parametrize(
    ("value", "kind", "got"),
    [
        (-1, U32, 11),  # int64: a value that was changed, and its type no longer holds it
        (1 << 63, None, U64),
        (7, None, U32),
        ([7, -7], None, I32),
        ([1 << 31], None, 11),
        ([0.5, 2], None, F32),
        (1e300, F32, 12),
        ("text", F32, STRING),
        ([True, False], None, 7),
    ],
)
def test_a_type_is_chosen_that_holds_the_value(value, kind, got, tmp_path):
    types = {} if kind is None else {"key": kind}
    write_gguf(tmp_path / "x.gguf", "llama", {"key": value}, [], types=types)
    file = GGUFFile(tmp_path / "x.gguf")
    assert file.types["key"] == got
    found = file.metadata["key"]
    assert (found.values() if isinstance(value, list) else found) == value


@pytest.mark.parametrize("value", [["a", 1], 1 << 70, [True, 2], None])
def test_what_no_type_holds_is_refused(value, tmp_path):
    with pytest.raises(SettingError, match="no type of GGUF"):
        write_gguf(tmp_path / "x.gguf", "llama", {"key": value}, [])
    assert not list(tmp_path.iterdir())


def test_the_bytes_are_those_of_gguf_py(tmp_path):
    from gguf import GGUFWriter

    small_file(tmp_path / "a.gguf")
    writer = GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.add_bool("x.flag", True)
    writer.add_uint32("x.count", 7)
    writer.add_float32("x.scale", 0.5)
    writer.add_array("x.words", ["ä", ""])
    writer.add_array("x.n", [1.5, 2.0])
    writer.add_tensor("a", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("b", np.ones(5, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_bad_utf8_in_a_list_is_named(tmp_path):
    words = (
        struct.pack("<IIQ", ARRAY, STRING, 2) + text("fine") + struct.pack("<Q", 2) + b"\xff\xfe"
    )
    (tmp_path / "x.gguf").write_bytes(counts(0, 1) + text("a.list") + words)
    with pytest.raises(FileFormatError, match=r"a string of 'a\.list' is not UTF-8"):
        GGUFFile(tmp_path / "x.gguf").strings("a.list")


@pytest.mark.parametrize("value", [math.nan, math.inf, 2.5, -1])
def test_a_count_that_is_none(value, tmp_path):
    write_gguf(tmp_path / "x.gguf", "llama", {"split.count": value}, [])
    file = GGUFFile(tmp_path / "x.gguf")
    with pytest.raises(FileFormatError, match=rf"split\.count is {value}"):
        file.whole("split.count")
    if not math.isfinite(value):
        for read in (file.number, file.numbers):
            with pytest.raises(FileFormatError, match="not a finite number"):
                read("split.count")


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path):
    content = counts(1, 0) + tensor("t\x1b[2J\u202e", (0, 4)) + b"\0" * 64
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(FileFormatError) as raised:
        GGUFFile(tmp_path / "x.gguf")
    assert "tensor 't?[2J?'" in str(raised.value)


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


OTHERS = {
    "m.pt": (b"PK\x03\x04....", "a PyTorch checkpoint", "Convert it with llama.cpp"),
    "m.bin": (b"\x80\x02....", "a PyTorch checkpoint", "Convert it with llama.cpp"),
    "m.safetensors": (b"\x10\0\0\0....", "a safetensors file", "Convert it with llama.cpp"),
    "m.gguf": (b"version https://git-lfs", "a pointer of Git LFS", "Download the file itself"),
    "n.gguf": (b"<!DOCTYPE html>", "a web page", "Download the file itself"),
    "m.json": (b'{"a": 1}', "a JSON file", "Give a .gguf file"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_named_as_what_they_are(name, tmp_path):
    content, what, remedy = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=f"not a GGUF file but {what}") as raised:
        GGUFFile(tmp_path / name)
    assert raised.value.remedy.startswith(remedy)
    (tmp_path / "x.txt").write_bytes(b"1234 and more")
    with pytest.raises(FileFormatError, match=r"not a GGUF file\."):
        GGUFFile(tmp_path / "x.txt")


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_quantised_tensors_are_dequantised_as_gguf_py_does(kind, tmp_path):
    from gguf import GGMLQuantizationType, quants

    number = GGMLQuantizationType[kind]
    block, size = {"Q4_0": (32, 18), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q6_K": (256, 210)}[kind]
    random = np.random.default_rng(0)
    raw = random.integers(0, 60, (3, 2, size), np.uint8)  # small bytes: every scale is finite
    shape = (block, 2, 3)  # in the file the extents are the other way round
    content = counts(1, 0) + tensor("t", shape, number)
    start = -len(content) % 32
    (tmp_path / "x.gguf").write_bytes(content + bytes(start) + raw.tobytes())
    file = GGUFFile(tmp_path / "x.gguf")
    info = file.tensors["t"]
    assert (info.shape, info.type_name, info.n_elements) == ((3, 2, block), kind, 6 * block)
    assert (info.n_bytes, info.offset) == (raw.size, len(content) + start)
    np.testing.assert_array_equal(file.raw("t"), raw.reshape(-1))
    expected = quants.dequantize(raw, number).reshape(3, 2, block)
    np.testing.assert_array_equal(file.floats("t"), expected)
    with pytest.raises(FileFormatError, match="there is no tensor 'u'"):
        file.floats("u")


def test_a_type_that_cannot_be_read_is_named(tmp_path):
    content = counts(1, 0) + tensor("t", (256,), 27)  # I64: llama.cpp has it, a model has not
    (tmp_path / "x.gguf").write_bytes(content + bytes(-len(content) % 32) + bytes(2048))
    with pytest.raises(FileFormatError, match=r"'t' has the type I64, which cannot be read here"):
        GGUFFile(tmp_path / "x.gguf").floats("t")


def test_what_is_just_allowed_is_read(tmp_path):
    """The last value before each bound of the reader."""
    name = "n" * 63
    content = counts(1, 0) + tensor(name, (1, 1, 1, 32))
    padded = content + bytes(-len(content) % 32) + bytes(128)
    (tmp_path / "x.gguf").write_bytes(padded)
    assert GGUFFile(tmp_path / "x.gguf").tensors[name].shape == (32, 1, 1, 1)
    (tmp_path / "x.gguf").write_bytes(padded[:-1])
    with pytest.raises(FileFormatError, match="outside of the file"):
        GGUFFile(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(padded.replace(name.encode(), b"n" * 63 + b"n", 1))
    with pytest.raises(FileFormatError):
        GGUFFile(tmp_path / "x.gguf")
    for version, fine in ((2, True), (3, True), (4, False)):
        (tmp_path / "v.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, 0))
        if fine:
            assert GGUFFile(tmp_path / "v.gguf").tensors == {}
            continue
        with pytest.raises(FileFormatError, match="version 4"):
            GGUFFile(tmp_path / "v.gguf")
    keys = b"".join(text(f"{n:05d}") + struct.pack("<IB", 0, 1) for n in range(1 << 16))
    (tmp_path / "k.gguf").write_bytes(counts(0, 1 << 16) + keys)
    assert len(GGUFFile(tmp_path / "k.gguf").metadata) == 1 << 16


@pytest.mark.parametrize("size", [1, 8, 64])
def test_tensors_lie_where_the_files_alignment_says(size, tmp_path):
    key = text("general.alignment") + struct.pack("<II", U32, size)
    place = max(8, size)
    content = counts(2, 1) + key + tensor("a", (2,)) + tensor("b", (2,), 0, place)
    start = -(-len(content) // size) * size
    values = np.arange(18, dtype="<f4")
    (tmp_path / "x.gguf").write_bytes(content.ljust(start, b"\0") + values.tobytes())
    file = GGUFFile(tmp_path / "x.gguf")
    assert file.alignment == size
    np.testing.assert_array_equal(file.floats("a"), values[:2])
    np.testing.assert_array_equal(file.floats("b"), values[place // 4 :][:2])


def test_a_missing_key_and_its_default(tmp_path):
    file = GGUFFile(small_file(tmp_path / "x.gguf"))
    assert (file.text("no", "yes"), file.number("no", 1.5), file.whole("no", 3)) == ("yes", 1.5, 3)
    assert (file.strings("no"), file.numbers("no"), file.numbers("x.count")) == ([], [], [7.0])
    assert (file.whole("x.count"), file.alignment, file.n_bytes) == (
        7, 32, (tmp_path / "x.gguf").stat().st_size,
    )  # fmt: skip
    for read in (file.text, file.number, file.whole):
        with pytest.raises(FileFormatError, match="'no' is missing"):
            read("no")
    for read, key in ((file.number, "x.flag"), (file.numbers, "x.flag"), (file.numbers, "x.words")):
        with pytest.raises(FileFormatError, match=key):
            read(key)
    with pytest.raises(FileFormatError, match=r"x\.scale is 0\.5, not a count"):
        file.whole("x.scale")
    begin, end = file.spans["x.count"]
    assert (tmp_path / "x.gguf").read_bytes()[begin:end] == text("x.count") + struct.pack(
        "<II", U32, 7
    )


@pytest.mark.parametrize(
    ("values", "tensors", "fine"),
    [(1, 0, True), (0, 1, True), (2, 0, False), (0, 2, False), (2, 1, False)],
)
def test_more_entries_than_the_rest_of_the_file_could_hold(values, tensors, fine, tmp_path):
    """A value takes at least 13 bytes, a tensor 24; here there are as many as one of them needs."""
    need = 13 * min(values, 1) + 24 * (tensors > 0 and not values)
    (tmp_path / "x.gguf").write_bytes(counts(tensors, values) + bytes(need))
    with pytest.raises(FileFormatError) as raised:  # zeros are no entry either
        GGUFFile(tmp_path / "x.gguf")
    assert ("more entries than" not in str(raised.value)) == fine


def test_a_list_of_empty_strings_takes_eight_bytes_each(tmp_path):
    words = counts(0, 1) + text("k") + struct.pack("<IIQ", ARRAY, STRING, 3)
    (tmp_path / "x.gguf").write_bytes(words + bytes(24))
    assert GGUFFile(tmp_path / "x.gguf").strings("k") == ["", "", ""]
    (tmp_path / "x.gguf").write_bytes(words + bytes(23))
    with pytest.raises(FileFormatError, match="a list of strings is longer than the file"):
        GGUFFile(tmp_path / "x.gguf")
