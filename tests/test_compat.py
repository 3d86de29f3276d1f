"""Models that are split over several files, files that are no model, genes fitted or not."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
from adapters import random_adapter
from gguf import GGUFWriter

from safegene_edge import Expression, SafeLlama, compat
from safegene_edge.compat import (
    check,
    model_hashes,
    open_model,
    other_parts,
    require_fit,
    same_tokenizer,
    tokenizer_digest,
    unfitted,
)
from safegene_edge.errors import FileFormatError, MismatchError, UnsupportedError
from safegene_edge.files import sha256
from safegene_edge.gene import Adapter, Pair
from safegene_edge.gguf_file import ArrayValue, GGUFFile, write_gguf
from safegene_edge.runtime.loadable import require_loadable
from safegene_edge.runtime.requantise import requantise


@pytest.fixture()
def split_model(tiny, tmp_path):
    """The tiny llama in files of ten tensors, as llama.cpp's gguf-split makes them."""
    whole = GGUFFile(tiny("llama").gguf_path)
    writer = GGUFWriter(tmp_path / "tiny.gguf", whole.architecture, split_max_tensors=10)
    for key, value in whole.metadata.items():
        if isinstance(value, ArrayValue):
            writer.add_array(key, value.values())
        elif key != "general.architecture":
            add = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32}
            add.get(type(value), writer.add_uint32)(key, value)
    for name in whole.tensors:
        writer.add_tensor(name, whole.floats(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(tmp_path.glob("tiny-*.gguf")), whole


def test_a_split_model_has_all_its_tensors(split_model):
    parts, whole = split_model
    assert len(parts) > 1
    model = open_model(parts[0])
    assert model.tensors.keys() == whole.tensors.keys()
    for name in whole.tensors:
        np.testing.assert_array_equal(model.floats(name), whole.floats(name))


def test_a_first_part_without_tensors_is_one(split_model, tmp_path):
    """As llama.cpp's gguf-split makes it with --no-tensor-first-split."""
    parts, whole = split_model
    rest = open_model(parts[0])
    facts = {
        key: value.values() if isinstance(value, ArrayValue) else value
        for key, value in whole.metadata.items() if key != "general.architecture"
    }  # fmt: skip
    first, second = (tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2))
    write_gguf(first, whole.architecture, {**facts, "split.count": 2, "split.no": 0}, [])
    tensors = [(name, np.array(rest.floats(name))) for name in whole.tensors]
    write_gguf(second, whole.architecture, {"split.count": 2, "split.no": 1}, tensors)
    assert open_model(first).tensors.keys() == whole.tensors.keys()
    before = model_hashes(first)
    tensors[-1][1][:] += 1
    write_gguf(second, whole.architecture, {"split.count": 2, "split.no": 1}, tensors)
    after = model_hashes(first)
    assert len(before) == 2 and before[0] == after[0] and before[1] != after[1]


def test_an_adapter_is_attached_to_a_split_model(split_model):
    parts, whole = split_model
    with SafeLlama(parts[0], [random_adapter(whole.path)], n_ctx=64) as llama:
        assert len(llama.adapters) == 1


def test_parts_that_are_missing_or_later_are_named(split_model):
    parts, _ = split_model
    with pytest.raises(FileFormatError, match="not the first"):
        open_model(parts[1])
    parts[1].unlink()
    with pytest.raises(FileFormatError, match=f"{parts[1].name}.*no such file"):
        open_model(parts[0])


@pytest.mark.parametrize("count", [math.nan, math.inf, 2.5, -2])
def test_a_number_of_parts_that_is_none(count, tmp_path):
    facts = {"split.count": count}
    path = tmp_path / "tiny-00001-of-00002.gguf"
    write_gguf(path, "llama", facts, [("t.weight", np.ones((2, 2), np.float32))])
    with pytest.raises(FileFormatError, match=rf"split\.count is {count}"):
        open_model(path)


def test_a_tensor_in_two_parts_is_named(tmp_path):
    paths = [tmp_path / f"tiny-0000{number}-of-00002.gguf" for number in (1, 2)]
    for path in paths:
        write_gguf(path, "llama", {"split.count": 2}, [("t.weight", np.ones((2, 2), np.float32))])
    with pytest.raises(
        FileFormatError, match=rf"{paths[1].name}: tensor 't\.weight' is in another"
    ):
        open_model(paths[0])


def test_a_gene_that_was_not_fitted_to_this_model_is_known(tiny, tmp_path):
    model, other = tiny("llama").gguf_path, tmp_path / "other.gguf"
    requantise(model, other, "F16")  # of its family, and not the same
    gene, fitted = tmp_path / "gene.gguf", tmp_path / "fitted.gguf"
    whole = random_adapter(model, family="tiny")
    whole.save(gene)
    strengths = dict.fromkeys(whole.layers, 0.5)
    whole.express(Expression(strengths, whole.sha256, sha256(model))).save(fitted)
    assert "never fitted" in unfitted(gene, model)
    assert unfitted(fitted, model) == ""
    assert "another model" in unfitted(fitted, other)
    assert unfitted(fitted, tiny("qwen2").gguf_path) == ""  # it does not fit
    whole.express(Expression(strengths)).save(fitted)  # nobody says for which model
    assert unfitted(fitted, model) == ""
    replace(whole, family="").save(gene)  # a LoRA that is no gene
    assert unfitted(gene, model) == ""


def test_a_token_twice_is_refused_before_llama_cpp_ends_the_process(tiny, tmp_path):
    """An assertion of llama.cpp's: no error, but the end of whoever loads the model."""
    source = tiny("llama").gguf_path
    tokens = GGUFFile(source).strings("tokenizer.ggml.tokens")
    data, path = source.read_bytes(), tmp_path / "model.gguf"
    known, other = (bytes([1, 0, 0, 0, 0, 0, 0, 0]) + token.encode() for token in ("A", "B"))
    assert {"A", "B"} < set(tokens) and data.count(known) == 1
    path.write_bytes(data.replace(known, other))
    with pytest.raises(FileFormatError, match="has the token 'B' twice"):
        SafeLlama(path)
    path.write_bytes(data.replace("Ġand".encode(), "Ġ\0nd".encode()))  # llama.cpp reads "Ġ"
    with pytest.raises(FileFormatError, match="has the token 'Ġ' twice"):
        SafeLlama(path)


def misfits(names):
    """An adapter with a pair of wrong shape for each of these tensors."""
    pair = Pair(np.ones((1, 3), np.float32), np.ones((5, 1), np.float32))
    return Adapter("llama", 1.0, dict.fromkeys(names, pair))


def test_each_reason_is_said_in_full(tiny):
    model = open_model(tiny("llama").gguf_path)
    names = ["blk.0.attn_q.weight", "blk.9.attn_q.weight", "token_embd.weight"]
    problems = [str(problem) for problem in check(misfits(names), model)]
    assert problems == [
        "blk.0.attn_q.weight: the adapter is for 5×3, the model has 64×64",
        "blk.9.attn_q.weight: the model has no such tensor",
        "token_embd.weight: adapters on the embeddings are not supported",
    ]
    other = replace(misfits(names), architecture="gemma")
    assert [str(problem) for problem in check(other, model)] == [
        "the adapter is for the architecture 'gemma', the model is 'llama'"
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_that_is_the_embeddings(tied, tiny):
    model = open_model(tiny("llama").gguf_path)
    model.tensors.pop("output.weight", None)
    if not tied:
        model.tensors.pop("token_embd.weight")
    (problem,) = check(misfits(["output.weight"]), model)
    assert ("tied to its embeddings" in problem.reason) == tied
    assert ("no such tensor" in problem.reason) != tied


@pytest.mark.parametrize(("count", "end"), [(5, ""), (6, "; and 1 more"), (8, "; and 3 more")])
def test_five_misfits_are_named_and_the_others_counted(count, end, tiny):
    model = open_model(tiny("llama").gguf_path)
    names = [f"blk.{90 + n}.attn_q.weight" for n in range(count)]
    with pytest.raises(MismatchError) as raised:
        require_fit(misfits(names), model, "a.gguf")
    listed = "; ".join(f"{name}: the model has no such tensor" for name in names[:5])
    assert raised.value.message == f"a.gguf does not fit {model.path}: {listed}{end}"
    with pytest.raises(MismatchError, match=r"^the adapter does not fit"):
        require_fit(misfits(names), model)
    require_fit(misfits([]), model)


def test_an_alora_is_refused_with_its_tokens(tiny):
    model = open_model(tiny("llama").gguf_path)
    extra = {"adapter.alora.invocation_tokens": [7, 8]}
    with pytest.raises(UnsupportedError, match=r"^it\.gguf is an aLoRA.*tokens \[7, 8\], and"):
        require_fit(replace(misfits([]), extra=extra), model, "it.gguf")


def test_what_is_no_model_is_named(tmp_path):
    ones = [("t.weight", np.ones((2, 2), np.float32))]
    write_gguf(tmp_path / "a.gguf", "llama", {"general.type": "adapter"}, ones)
    with pytest.raises(FileFormatError, match="is of the type 'adapter', not a model"):
        open_model(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf", "llama", {"general.type": "model"}, [])
    with pytest.raises(FileFormatError, match="has no tensors"):
        open_model(tmp_path / "b.gguf")
    write_gguf(tmp_path / "c.gguf", "llama", {}, ones)  # older files say no type
    assert list(open_model(tmp_path / "c.gguf").tensors) == ["t.weight"]


@pytest.mark.parametrize(("name", "count", "others"), [
    ("tiny.gguf", 0, 0), ("tiny.gguf", 1, 0), ("tiny-00001-of-00003.gguf", 3, 2),
    ("tiny.gguf", 2, None), ("tiny-00002-of-00002.gguf", 2, None),
    ("tiny-00001-of-00003.gguf", 2, None), ("tiny-0001-of-0002.gguf", 2, None),
])  # fmt: skip
def test_which_parts_there_are_follows_from_the_name(name, count, others, tmp_path):
    ones = np.ones((2, 2), np.float32)
    write_gguf(tmp_path / name, "llama", {"split.count": count}, [("t.0", ones)])
    for number in range(2, (others or 0) + 2):
        part = tmp_path / f"tiny-{number:05d}-of-{count:05d}.gguf"
        write_gguf(part, "llama", {}, [(f"t.{number}", ones)])
    if others is None:
        with pytest.raises(FileFormatError, match=f"split into {count} files") as raised:
            other_parts(GGUFFile(tmp_path / name))
        assert f"ends in -00001-of-{count:05d}.gguf" in raised.value.remedy
        return
    found = other_parts(GGUFFile(tmp_path / name))
    assert [list(part.tensors) for part in found] == [[f"t.{n}"] for n in range(2, others + 2)]


def test_a_token_that_comes_twice_is_shown_cut(tmp_path):
    ones = [("t.weight", np.ones((2, 2), np.float32))]
    for listed, wrong in ((["a", "b", "", ""], False), (["x" * 50, "a", "x" * 50], True)):
        write_gguf(tmp_path / "m.gguf", "llama", {"tokenizer.ggml.tokens": listed}, ones)
        if not wrong:
            require_loadable(GGUFFile(tmp_path / "m.gguf"))
            continue
        with pytest.raises(FileFormatError, match=f"the token '{'x' * 40}' twice"):
            require_loadable(GGUFFile(tmp_path / "m.gguf"))


def test_a_tokenizer_is_its_tokens_and_merges(tmp_path):
    def digest(**lists):
        facts = {f"tokenizer.ggml.{key}": values for key, values in lists.items()}
        write_gguf(tmp_path / "m.gguf", "llama", facts, [("t", np.ones((2, 2), np.float32))])
        return tokenizer_digest(GGUFFile(tmp_path / "m.gguf"))

    own = digest(tokens=["a", "b"], merges=["a b"])
    assert own == hashlib.sha256(b'[["a", "b"], ["a b"]]').hexdigest()
    assert own == digest(tokens=["a", "b"], merges=["a b"], scores=[1.0])
    assert len({own, digest(tokens=["a", "b"]), digest(tokens=["b"], merges=["a b"])}) == 3


def test_the_same_tokens_of_other_types_are_read_alike(tmp_path):
    """Converters of an earlier day called special tokens plain, or named no types."""
    files = []
    for number, types in enumerate(([1, 1, 3], [1, 1, 1], [])):
        facts = {"tokenizer.ggml.tokens": ["a", "b", "<s>"]}
        facts |= {"tokenizer.ggml.token_type": types} if types else {}
        path = tmp_path / f"{number}.gguf"
        write_gguf(path, "llama", facts, [("t", np.ones((2, 2), np.float32))])
        files.append(GGUFFile(path))
    assert all(same_tokenizer(files[0], other) for other in files)


@pytest.mark.parametrize(
    ("tokens", "types", "same"),
    [
        (["a", "b", "<s>", "<pad>"], [1, 1, 3, 3], True),  # one more to pad with
        (["a", "b", "<bos>"], [1, 1, 3], True),  # another name
        (["a", "b", "<s>", "<im>"], [1, 1, 3, 4], True),  # one that text may hold
        (["a", "b", "<s>", "[PAD]"], [1, 1, 3, 5], True),  # unused
        (["a", "b", "<s>", "c"], [1, 1, 3, 1], False),  # a word
        (["a", "<s>", "b"], [1, 3, 1], False),  # another number
        (["a", "b", "<s>", "c"], [1, 1, 3], False),  # of a kind that the file does not say
    ],
)
def test_special_tokens_may_differ_in_a_family(tokens, types, same, tmp_path):
    def digest(tokens, types):
        facts = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
        write_gguf(tmp_path / "m.gguf", "llama", facts, [("t", np.ones((2, 2), np.float32))])
        return tokenizer_digest(GGUFFile(tmp_path / "m.gguf"))

    assert (digest(["a", "b", "<s>"], [1, 1, 3]) == digest(tokens, types)) is same


@pytest.mark.parametrize(("room", "known"), [(0, True), (-1, False)])
def test_a_large_model_is_not_hashed_for_a_warning(room, known, tiny, tmp_path, monkeypatch):
    model, gene = tiny("llama").gguf_path, tmp_path / "gene.gguf"
    whole = random_adapter(model, family="tiny")
    whole.express(Expression(dict.fromkeys(whole.layers, 0.5), whole.sha256, "ab" * 32)).save(gene)
    monkeypatch.setattr(compat, "_HASHED", model.stat().st_size + room)
    assert unfitted(gene, model) == (
        f"{gene} was fitted to another model than {model}" if known else ""
    )
