"""Genes and expressions: exact round trips, folding, splitting, refusing."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from adapters import random_adapter

from safegene_edge import Expression, SafetyGene
from safegene_edge import gene as gene_file
from safegene_edge.compat import check, require_fit
from safegene_edge.errors import FileFormatError, MismatchError, SettingError, UnsupportedError
from safegene_edge.gene import Adapter, Pair, is_lora, layer_of
from safegene_edge.gguf_file import ArrayValue, GGUFFile, write_gguf

FACTS = {
    "family": "tiny",
    "sources": {"aligned": "ab" * 32, "degraded": "cd" * 32},
    "scores": {0: 0.25, 2: 1.5},
    "coefficients": {0: 1.0, 1: 0.5, 2: 2.0},
    "refusal_openers": ("I'm sorry", "I can't"),
    "aligned_loss": 0.25,
    "aligned_over_refusal": 0.125,
}


def random_gene(seed=0, dtype=np.float32, layers=3):
    random = np.random.default_rng(seed)
    pairs = {
        f"blk.{layer}.{name}.weight": Pair(
            random.normal(size=(rank, 8)).astype(dtype), random.normal(size=(6, rank)).astype(dtype)
        )
        for layer in range(layers)
        for name, rank in (("attn_q", 2), ("ffn_down", 3))
    }
    return SafetyGene("llama", 4.0, pairs, {"general.name": "a gene"}, **FACTS)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_save_and_load_are_exact(tmp_path, dtype):
    gene = random_gene(dtype=dtype)
    gene.save(tmp_path / "gene.gguf")
    again = SafetyGene.load(tmp_path / "gene.gguf")
    assert (again.architecture, again.alpha) == ("llama", 4.0)
    assert {key: getattr(again, key) for key in FACTS} == FACTS
    assert again.extra["general.name"] == "a gene"
    assert list(again.pairs) == list(gene.pairs)
    for name, pair in gene.pairs.items():
        assert again.pairs[name].b.dtype == dtype
        np.testing.assert_array_equal(again.pairs[name].a, pair.a)
        np.testing.assert_array_equal(again.pairs[name].b, pair.b)
    again.save(tmp_path / "twice.gguf")
    assert (tmp_path / "twice.gguf").read_bytes() == (tmp_path / "gene.gguf").read_bytes()


@pytest.mark.parametrize("alpha", [16, 16.0, 0.1, 0])
def test_a_gene_knows_its_hash_wherever_it_came_from(tmp_path, alpha):
    gene = replace(random_gene(), alpha=alpha)
    gene.save(tmp_path / "gene.gguf")
    assert SafetyGene.load(tmp_path / "gene.gguf").sha256 == gene.sha256
    assert replace(gene, family="another name").sha256 == gene.sha256
    assert replace(gene, alpha=8.0).sha256 != gene.sha256 != random_gene(seed=1).sha256


def test_counts_and_layers():
    gene = random_gene()
    assert gene.layers == (0, 1, 2)
    assert gene.n_parameters == 3 * ((2 * 8 + 6 * 2) + (3 * 8 + 6 * 3))
    assert layer_of("output.weight") == -1


def test_delta_has_llama_cpps_scale():
    gene = random_gene()
    pair = gene.pairs["blk.0.ffn_down.weight"]
    np.testing.assert_allclose(
        gene.delta("blk.0.ffn_down.weight"), 4.0 / 3 * pair.b @ pair.a, rtol=1e-5, atol=1e-6
    )
    bare = Adapter("llama", 0.0, gene.pairs)
    np.testing.assert_allclose(
        bare.delta("blk.0.ffn_down.weight"), pair.b @ pair.a, rtol=1e-5, atol=1e-6
    )


def test_a_factor_that_overflows_is_refused():
    with pytest.raises(SettingError, match="is 1e\\+39: too large"):
        random_gene(dtype=np.float16).scaled(1e39)
    assert random_gene(dtype=np.float16).scaled(1e6).pairs["blk.0.attn_q.weight"].b.max() > 1e5


def test_a_large_factor_warns_of_nothing():
    gene = random_gene()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaled = gene.scaled(1e30)
    assert np.isfinite(scaled.pairs["blk.0.attn_q.weight"].b).all()


def test_an_expression_scales_each_layers_delta_and_drops_zeros():
    gene = random_gene()
    expressed = gene.express(Expression({0: 2.0, 1: 0.0}))
    assert expressed.layers == (0, 2)  # layer 2, not named, keeps its 1
    np.testing.assert_allclose(
        expressed.delta("blk.0.attn_q.weight"), 2 * gene.delta("blk.0.attn_q.weight"), rtol=1e-6
    )
    assert expressed.coefficients == {0: 2.0, 2: 2.0}


def test_parts_make_the_whole():
    gene = random_gene()
    parts = gene.split()
    assert {layer: part.layers for layer, part in parts.items()} == {0: (0,), 1: (1,), 2: (2,)}
    joined = {name: pair for part in parts.values() for name, pair in part.pairs.items()}
    assert joined.keys() == gene.pairs.keys()
    assert sum(part.n_parameters for part in parts.values()) == gene.n_parameters


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_coefficients_are_finite_and_not_negative(value):
    with pytest.raises(SettingError, match="layer 3"):
        Expression({3: value})


def test_expression_for_other_layers_is_refused():
    with pytest.raises(MismatchError, match=r"\[7\]"):
        random_gene().express(Expression({7: 1.0}))


def test_expression_round_trip_and_garbage(tmp_path):
    expression = Expression({0: 0.5, 11: 1.25}, gene="aa", target="bb")
    expression.save(tmp_path / "e.json")
    assert Expression.load(tmp_path / "e.json") == expression
    garbage = ["[]", "{}", '{"coefficients": {"x": 1}}', '{"coefficients": 3}', "no json"]
    for value in ("NaN", "-1", "1e999", "1" + "0" * 400):
        garbage.append(f'{{"coefficients": {{"3": {value}}}}}')
    for text in (*garbage, "[" * 100_000, "\ud800"):
        (tmp_path / "bad.json").write_text(text, errors="surrogatepass")
        with pytest.raises(FileFormatError, match=r"bad\.json"):
            Expression.load(tmp_path / "bad.json")


def broken(tmp_path, tensors, metadata=None):
    facts = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0}
    write_gguf(tmp_path / "x.gguf", "llama", facts | (metadata or {}), tensors)
    return tmp_path / "x.gguf"


A, B = np.ones((2, 8), np.float32), np.ones((6, 2), np.float32)
NAN = np.full((6, 2), np.nan, np.float32)
_BOTH = [("t.lora_a", A), ("t.lora_b", B)]
SCORES, FACTORS = "safegene.scores", "safegene.coefficients"
BROKEN = {
    "missing half": ([("blk.0.attn_q.weight.lora_a", A)], {}, "lacks its lora_b"),
    "ranks differ": (
        [("blk.0.attn_q.weight.lora_a", A), ("blk.0.attn_q.weight.lora_b", B[:, :1])],
        {},
        "rank 2 in lora_a and 1",
    ),
    "NaN": ([("t.weight.lora_a", A), ("t.weight.lora_b", NAN)], {}, r"t\.weight\.lora_b.*NaN"),
    "norm vector": (
        [("t.lora_a", A), ("t.lora_b", B), ("blk.0.attn_norm.weight", np.ones(8, np.float32))],
        {},
        "attn_norm",
    ),
    "no tensors": ([], {}, "no tensors"),
    "one dimension": ([("t.lora_a", np.ones(8, np.float32)), ("t.lora_b", B)], {}, "dimensions"),
    "control vector": ([("t.lora_a", A)], {"adapter.type": "control_vector"}, "not a LoRA"),
    "infinite alpha": ([("t.lora_a", A)], {"adapter.lora.alpha": float("inf")}, "alpha is inf"),
    "future format": ([("t.lora_a", A), ("t.lora_b", B)], {"safegene.version": 9}, "format 9"),
    "a list that is not UTF-8": (  # patched below: a writer writes no such string
        [("t.lora_a", A), ("t.lora_b", B)],
        {"safegene.refusal_openers": ["patch me"]},
        "refusal_openers' is not UTF-8",
    ),
    "alpha as a count": (
        [("t.lora_a", A), ("t.lora_b", B)],
        {"adapter.lora.alpha": 16},
        "alpha is not stored as float32",
    ),
    "a layer of NaN": (_BOTH, {SCORES: [0.5], f"{SCORES}.layers": [math.nan]}, "layers is nan"),
    "an infinite layer": (_BOTH, {SCORES: [0.5], f"{SCORES}.layers": [math.inf]}, "layers is inf"),
    "layer 1.5": (_BOTH, {SCORES: [0.5], f"{SCORES}.layers": [1.5]}, "no layer's"),
    "layer -2": (_BOTH, {SCORES: [0.5], f"{SCORES}.layers": [-2]}, "no layer's"),
    "a layer twice": (_BOTH, {SCORES: [1, 2], f"{SCORES}.layers": [3, 3]}, "a layer twice"),
    "a score of NaN": (_BOTH, {SCORES: [math.nan], f"{SCORES}.layers": [1]}, "scores is nan"),
    "a coefficient of NaN": (
        _BOTH,
        {FACTORS: [math.nan], f"{FACTORS}.layers": [1]},
        "coefficients is nan",
    ),
    "an infinite coefficient": (
        _BOTH,
        {FACTORS: [math.inf], f"{FACTORS}.layers": [1]},
        "coefficients is inf",
    ),
    "a negative coefficient": (
        _BOTH,
        {FACTORS: [-0.5], f"{FACTORS}.layers": [1]},
        "of layer 1 is -0.5",
    ),
    "a margin of NaN": (_BOTH, {"safegene.aligned_margins": [1.0, math.nan]}, "margins is nan"),
    "a KL of NaN": (_BOTH, {"safegene.aligned_kl": math.nan}, "aligned_kl is nan"),
    "a share of NaN": (_BOTH, {"safegene.aligned_loss": math.nan}, "aligned_loss is nan"),
    "a version of NaN": (_BOTH, {"safegene.version": math.nan}, "version is nan"),
    "a source twice": (
        _BOTH,
        {"safegene.sources": ["a", "a"], "safegene.source_hashes": ["b", "c"]},
        "a name twice",
    ),
    "names without hashes": (
        _BOTH,
        {"safegene.sources": ["a", "b"], "safegene.source_hashes": ["c"]},
        "2 names for 1 values",
    ),
    "scores without layers": (
        _BOTH,
        {SCORES: [0.5, 1.0], f"{SCORES}.layers": [1]},
        "2 values for 1 layers",
    ),
    "a negative KL": (_BOTH, {"safegene.aligned_kl": -0.1}, "aligned_kl is -0.1"),
    "margins that are words": (
        _BOTH,
        {"safegene.aligned_margins": ["x"]},
        "is not a list of numbers",
    ),
    "sources that are numbers": (_BOTH, {"safegene.sources": [1, 2]}, "not a list of strings"),
    "a metadata of 17 MB": (_BOTH, {"x": "y" * (17 << 20)}, "17 MB of metadata"),
    "goal of no share": (
        [("t.lora_a", A), ("t.lora_b", B)],
        {"safegene.aligned_loss": 1.5},
        "aligned_loss is 1.5",
    ),
}


@pytest.mark.parametrize(
    "factors", [math.nan, math.inf, {3: -math.inf}, 0, dict.fromkeys(range(9), 0.0)]
)
def test_factors_that_leave_no_adapter_are_refused(factors, tmp_path):
    gene = SafetyGene("llama", 8.0, {f"blk.{n}.attn_q.weight": Pair(A, B) for n in range(9)})
    with pytest.raises(SettingError, match="the factor"):
        gene.scaled(factors)
    with pytest.raises(SettingError, match=r"nothing in the layers \[99\]"):
        gene.only([99])


@pytest.mark.parametrize("name", BROKEN)
def test_broken_adapters_are_refused(name, tmp_path):
    tensors, metadata, reason = BROKEN[name]
    path = broken(tmp_path, tensors, metadata)
    path.write_bytes(path.read_bytes().replace(b"patch me", b"\xff" * 8))
    with pytest.raises(FileFormatError, match=reason) as raised:
        SafetyGene.load(path)
    assert str(path) in str(raised.value)


def test_an_alpha_that_no_float32_holds_is_not_saved(tmp_path):
    with pytest.raises(SettingError, match="alpha is 1e\\+300"):
        replace(random_gene(), alpha=1e300).save(tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_preflight_names_every_tensor(tiny):
    model = tiny("llama").gguf_path
    gene, header = random_adapter(model), GGUFFile(model)
    assert check(gene, header) == []
    a, b = gene.pairs["blk.0.attn_q.weight"].a, gene.pairs["blk.0.attn_q.weight"].b
    misfit = {
        "blk.0.attn_q.weight": Pair(a[:, :32], b),
        "blk.9.attn_q.weight": Pair(a, b),
        "token_embd.weight": Pair(a, b),
        "blk.1.attn_q.weight": Pair(a, b),
    }
    problems = check(Adapter("llama", 1.0, misfit), header)
    assert [problem.tensor for problem in problems] == list(misfit)[:3]
    with pytest.raises(MismatchError, match=r"64×32.*64×64.*no such tensor.*embeddings"):
        require_fit(Adapter("llama", 1.0, misfit), header)
    with pytest.raises(MismatchError, match="'qwen2'"):
        require_fit(gene, GGUFFile(tiny("qwen2").gguf_path))


WHOLE = {
    **FACTS,
    "aligned_margins": (0.5, -1.25),
    "aligned_examples": "ef" * 32,
    "aligned_kl": 0.375,
    "target": "aa" * 32,
    "tokenizer": "bb" * 32,
    "guard_threshold": -2.5,
}


def test_a_file_holds_each_fact_under_its_key(tmp_path):
    gene = replace(random_gene(), **WHOLE)
    gene.save(tmp_path / "gene.gguf")
    file = GGUFFile(tmp_path / "gene.gguf")
    found = {key: value.values() if isinstance(value, ArrayValue) else value
             for key, value in file.metadata.items()}  # fmt: skip
    assert found == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "a gene",
        "adapter.type": "lora",
        "adapter.lora.alpha": 4.0,
        "safegene.version": 1,
        "safegene.family": "tiny",
        "safegene.sources": ["aligned", "degraded"],
        "safegene.source_hashes": ["ab" * 32, "cd" * 32],
        "safegene.layers": [0, 1, 2],
        "safegene.scores.layers": [0, 2],
        "safegene.scores": [0.25, 1.5],
        "safegene.coefficients.layers": [0, 1, 2],
        "safegene.coefficients": [1.0, 0.5, 2.0],
        "safegene.refusal_openers": ["I'm sorry", "I can't"],
        "safegene.aligned_loss": 0.25,
        "safegene.aligned_over_refusal": 0.125,
        "safegene.aligned_margins": [0.5, -1.25],
        "safegene.aligned_examples": "ef" * 32,
        "safegene.aligned_kl": 0.375,
        "safegene.target": "aa" * 32,
        "safegene.text_tokens": "bb" * 32,
        "safegene.guard_threshold": -2.5,
    }
    assert list(file.tensors)[:2] == ["blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"]
    again = SafetyGene.load(tmp_path / "gene.gguf")
    assert {key: getattr(again, key) for key in WHOLE} == WHOLE
    assert again.extra == {"general.name": "a gene"}


def test_what_a_file_does_not_say(tmp_path):
    path = broken(tmp_path, _BOTH)
    gene = SafetyGene.load(path)
    assert gene == SafetyGene("llama", 4.0, gene.pairs, {}, gene.types)
    facts = {"general.type": "adapter", "adapter.type": "lora", "x": [1, 2], "y": "z",
             "safegene.peft.config": "{}", "safegene.learn.asked": 128}  # fmt: skip
    write_gguf(path, "qwen2", facts, _BOTH)
    gene = SafetyGene.load(path)
    assert (gene.architecture, gene.alpha, gene.effective_scale("t")) == ("qwen2", 0.0, 1.0)
    kept = ("x", "y", "safegene.peft.config", "safegene.learn.asked")
    assert gene.extra == {key: facts[key] for key in kept}
    with pytest.raises(FileFormatError, match=r"format 1\.5, this version reads 1"):
        SafetyGene.load(broken(tmp_path, _BOTH, {"safegene.version": 1.5}))
    assert SafetyGene.load(broken(tmp_path, _BOTH, {"safegene.version": 1})).family == ""


@pytest.mark.parametrize(
    ("name", "layer"),
    [("blk.0.attn_q.weight", 0), ("blk.123456789.x", 123456789), ("blk.1234567890.x", -1),
     ("xblk.3.attn_q.weight", -1), ("blk.3", -1), ("blk.-1.x", -1), ("output.weight", -1)],
)  # fmt: skip
def test_the_block_of_a_tensor(name, layer):
    assert layer_of(name) == layer


def test_a_hash_is_of_names_shapes_types_and_values():
    gene = random_gene()
    pair = gene.pairs["blk.0.attn_q.weight"]

    def with_pair(**changes):
        return replace(gene, pairs={**gene.pairs, "blk.0.attn_q.weight": replace(pair, **changes)})

    flat = Pair(pair.a.reshape(1, 16), pair.b)
    others = [
        with_pair(a=pair.a + 1), with_pair(b=pair.b + 1), with_pair(a=pair.a.astype(np.float16)),
        replace(gene, pairs={**gene.pairs, "blk.0.attn_q.weight": flat}),
        replace(gene, architecture="qwen2"), gene.only([0, 1]),
        replace(gene, pairs={f"x.{name}": pair for name, pair in gene.pairs.items()}),
    ]  # fmt: skip
    assert len({gene.sha256, *(other.sha256 for other in others)}) == 1 + len(others)
    backwards = replace(gene, pairs=dict(reversed(gene.pairs.items())))
    assert backwards.sha256 == replace(gene, alpha=np.float64(4.0) + 1e-12).sha256 == gene.sha256


def test_factors_by_layer_and_for_all():
    gene = random_gene()
    half, some = gene.scaled(0.5), gene.scaled({1: 3.0})
    for name, pair in gene.pairs.items():
        assert half.pairs[name].a is pair.a
        np.testing.assert_array_equal(half.pairs[name].b, pair.b * np.float32(0.5))
        factor = np.float32(3 if layer_of(name) == 1 else 1)
        np.testing.assert_array_equal(some.pairs[name].b, pair.b * factor)
    assert random_gene(dtype=np.float16).scaled(2.0).pairs["blk.0.attn_q.weight"].b.dtype == "f2"
    with pytest.raises(SettingError, match=r"every layer has the factor 0"):
        gene.scaled(0.0)


def test_an_expression_of_another_gene_is_refused():
    gene = random_gene()
    with pytest.raises(MismatchError, match="of another gene"):
        gene.express(Expression({0: 1.0}, gene="ab" * 32))
    fitted = replace(gene, target="old", guard_threshold=9.0).express(
        Expression({1: 0.5}, gene=gene.sha256)
    )
    assert fitted.coefficients == {0: 1.0, 1: 0.25, 2: 2.0}  # times those already folded
    assert (fitted.target, fitted.guard_threshold) == ("old", None)
    fitted = gene.express(Expression({0: 1.0}, "", "new", 1.5))
    assert (fitted.target, fitted.guard_threshold) == ("new", 1.5)


def test_the_shipped_gene_names_its_tokenizer():
    gene = SafetyGene.shipped()
    assert len(gene.tokenizer) == 64 and gene.family and gene.refusal_openers
    assert gene.n_parameters < 600_000 and 0 not in (gene.aligned_loss, gene.aligned_kl)
    assert not gene.is_alora
    assert replace(gene, extra={"adapter.alora.invocation_tokens": [1]}).is_alora


@pytest.mark.parametrize(
    ("kind", "remedy"), [("model", "the model goes before"), ("x", "GGUF LoRA")]
)
def test_what_is_no_lora_comes_with_the_remedy(kind, remedy, tmp_path):
    write_gguf(tmp_path / "x.gguf", "llama", {"general.type": kind}, _BOTH)
    with pytest.raises(FileFormatError, match=f"of the type '{kind}', not a LoRA") as raised:
        SafetyGene.load(tmp_path / "x.gguf")
    assert remedy in raised.value.remedy
    assert not is_lora(GGUFFile(tmp_path / "x.gguf"))
    write_gguf(tmp_path / "x.gguf", "llama", {}, _BOTH)
    with pytest.raises(FileFormatError, match="of the type 'model', not a LoRA"):
        SafetyGene.load(tmp_path / "x.gguf")


def test_strays_are_counted(tmp_path):
    strays = [(f"s{n}", A) for n in range(3)]
    with pytest.raises(FileFormatError, match=r"'s0' is no half of a LoRA pair \(nor are 2 others"):
        Adapter.load(broken(tmp_path, [*_BOTH, *strays]))
    with pytest.raises(FileFormatError, match=r"'s0' is no half of a LoRA pair\.") as raised:
        Adapter.load(broken(tmp_path, [*_BOTH, strays[0]]))
    assert raised.value.message.endswith("pair")


def test_a_plain_adapter_is_read_as_one(tmp_path):
    path = broken(tmp_path, [*_BOTH, ("u.lora_a", A), ("u.lora_b", B)], {"safegene.family": "x"})
    adapter = Adapter.load(path)
    assert type(adapter) is Adapter and list(adapter.pairs) == ["t", "u"]
    assert adapter.extra == {"safegene.family": "x"}  # kept, whoever's it is
    np.testing.assert_array_equal(adapter.pairs["u"].a, A)


def test_coefficients_that_nobody_named_are_one():
    gene = replace(random_gene(), coefficients={0: 0.5})
    fitted = gene.express(Expression({1: 3.0}))
    assert fitted.coefficients == {0: 0.5, 1: 3.0, 2: 1.0}


def test_an_adapter_of_the_embeddings_is_refused(tmp_path):
    halves = [("token_embd.weight.lora_a", A), ("token_embd.weight.lora_b", B)]
    with pytest.raises(UnsupportedError, match=r"'token_embd\.weight\.lora_a' adapts the embed"):
        Adapter.load(broken(tmp_path, halves))


def test_just_as_much_metadata_as_is_allowed(tmp_path, monkeypatch):
    path = broken(tmp_path, _BOTH, {"x": "y" * 1000})
    most = max(end for _, end in GGUFFile(path).spans.values())
    monkeypatch.setattr(gene_file, "MAX_METADATA", most)
    assert Adapter.load(path).extra["x"] == "y" * 1000
    monkeypatch.setattr(gene_file, "MAX_METADATA", most - 1)
    with pytest.raises(FileFormatError, match="of metadata are too much"):
        Adapter.load(path)


@pytest.mark.parametrize("factor", [1.0, 0.5, 1e-3, 1e-6])
def test_a_factor_is_not_lost_in_half_precision(factor):
    random = np.random.default_rng(0)
    a, b = (random.normal(0, 5e-5, shape).astype(np.float16) for shape in ((4, 16), (16, 4)))
    adapter = Adapter("llama", 0.0, {"blk.0.attn_q.weight": Pair(a, b)})
    scaled = adapter.scaled(factor).delta("blk.0.attn_q.weight")
    wanted = factor * adapter.delta("blk.0.attn_q.weight")
    assert np.abs(scaled - wanted).max() <= 1e-3 * np.abs(wanted).max()


def test_a_usual_adapter_stays_in_half_precision():
    b = np.random.default_rng(0).normal(0, 1e-2, (64, 8)).astype(np.float16)
    pairs = {"blk.0.attn_q.weight": Pair(b.T, b)}
    for factor in (0.8, 1.3):
        assert Adapter("llama", 0.0, pairs).scaled(factor).pairs.popitem()[1].b.dtype == np.float16
