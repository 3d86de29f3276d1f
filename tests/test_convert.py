"""PEFT folder to GGUF LoRA: numerically true, or refused with all its reasons."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny as tiny_models
from tiny import lora_settings, peft_deltas, relative_error

from safegene_edge.converters import convert
from safegene_edge.converters.names import BaseNames
from safegene_edge.converters.peft import collapse_layers, parse_config
from safegene_edge.errors import (
    FileFormatError,
    MismatchError,
    OutputError,
    SafeGeneError,
    UnsupportedError,
)
from safegene_edge.gene import Adapter
from safegene_edge.gguf_file import GGUFFile

ARCHITECTURES = tiny_models.ARCHITECTURES
TOKENS = [(7 * n * n + 3 * n) % 296 for n in range(24)]
PREFIX = "base_model.model.model.layers"


CASES = [(arch, name) for arch in ARCHITECTURES for name in lora_settings(arch)]


def assert_same_deltas(adapter: Adapter, model: tiny_models.TinyModel, expected: Any) -> None:
    names = BaseNames(GGUFFile(model.gguf_path))
    assert {names.tensor(module) for module in expected} == set(adapter.pairs)
    for module, delta in expected.items():
        tensor = names.tensor(module)
        assert tensor is not None
        got = names.to_hf_rows(tensor, adapter.delta(tensor))
        assert relative_error(got, delta) <= 1e-5, module


@pytest.mark.parametrize(("arch", "name"), CASES)
def test_the_delta_is_pefts_merged_delta(
    arch: str,
    name: str,
    tiny: tiny_models.ModelFactory,
    tiny_adapter: tiny_models.AdapterFactory,
    tmp_path: Path,
) -> None:
    model, folder = tiny(arch), tiny_adapter(arch, **lora_settings(arch)[name])
    convert(folder, model.gguf_path, tmp_path / "adapter.gguf")
    written = Adapter.load(tmp_path / "adapter.gguf")
    assert_same_deltas(written, model, peft_deltas(model, folder))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_adapters_are_read_exactly(
    dtype: str, tiny: tiny_models.ModelFactory, tiny_adapter: tiny_models.AdapterFactory
) -> None:
    model, folder = tiny("llama"), tiny_adapter("llama", dtype=dtype, alpha_pattern={"q_proj": 3})
    assert_same_deltas(convert(folder, model.gguf_path), model, peft_deltas(model, folder))


def test_fan_in_fan_out_changes_neither_a_nor_b(
    tiny: tiny_models.ModelFactory, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    model = tiny("llama")

    def transposed_base() -> Any:
        """The same model with up_proj stored in×out, as GPT-2 does."""
        base = model.copy_of_model()
        for layer in base.model.layers:
            linear, layer.mlp.up_proj = layer.mlp.up_proj, Conv1D(96, 64)
            layer.mlp.up_proj.weight.data = linear.weight.data.T.contiguous()
        return base

    config = LoraConfig(r=3, target_modules=["up_proj"], fan_in_fan_out=True)
    config.init_lora_weights = False
    get_peft_model(transposed_base(), config).save_pretrained(tmp_path / "peft")
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["fan_in_fan_out"]
    expected = peft_deltas(model, tmp_path / "peft", transposed_base())
    assert_same_deltas(
        convert(tmp_path / "peft", model.gguf_path),
        model,
        {name: delta.T for name, delta in expected.items()},
    )


# -- logits ---------------------------------------------------------------


def _llama_logits(model: Path, adapter: Path | None) -> Any:
    from llama_cpp import Llama

    llama = Llama(
        str(model),
        lora_path=str(adapter) if adapter else None,
        n_ctx=64,
        n_threads=1,
        logits_all=True,
        verbose=False,
        type_k=0,  # a float32 cache: the default, float16, rounds more than the bound allows
        type_v=0,
    )
    llama.eval(TOKENS)
    logits = np.array(llama.scores[: len(TOKENS)])
    llama.close()
    return logits


def _peft_logits(model: tiny_models.TinyModel, folder: Path, gelu_table: bool = False) -> Any:
    import torch
    from peft import PeftModel

    base = model.copy_of_model()
    if gelu_table:
        for layer in base.model.layers:  # argument and value are float16 in llama.cpp's table
            layer.mlp.act_fn.register_forward_pre_hook(lambda _, xs: (xs[0].half().float(),))
            layer.mlp.act_fn.register_forward_hook(lambda _, xs, y: y.half().float())
    peft_model = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        return peft_model(torch.tensor([TOKENS])).logits[0].float().numpy()


@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_agree_with_transformers_and_peft(
    arch: str,
    name: str,
    tiny: tiny_models.ModelFactory,
    tiny_adapter: tiny_models.AdapterFactory,
    tmp_path: Path,
) -> None:
    model, folder = tiny(arch), tiny_adapter(arch, **lora_settings(arch)[name])
    output = tmp_path / "adapter.gguf"
    convert(folder, model.gguf_path, output)
    got = _llama_logits(model.gguf_path, output)
    effect = np.abs(got - _llama_logits(model.gguf_path, None)).max()
    assert effect > 0.5  # else agreement would prove nothing
    assert np.abs(got - _peft_logits(model, folder)).max() <= 1e-3


@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
def test_what_is_left_for_gemma_is_llama_cpps_gelu_table(
    arch: str,
    tiny: tiny_models.ModelFactory,
    tiny_adapter: tiny_models.AdapterFactory,
    tmp_path: Path,
) -> None:
    model, folder = tiny(arch), tiny_adapter(arch)
    output = tmp_path / "adapter.gguf"
    convert(folder, model.gguf_path, output)
    got = _llama_logits(model.gguf_path, output)
    exact = np.abs(got - _peft_logits(model, folder)).max()
    rounded = np.abs(got - _peft_logits(model, folder, gelu_table=True)).max()
    assert rounded < exact / 2


# -- what is written ------------------------------------------------------


def _stored(folder: Path) -> Any:
    from safetensors.numpy import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({}, 8.0),
        ({"use_rslora": True}, 8 * math.sqrt(4)),
        ({"use_rslora": True, "r": 5}, float(np.float32(8 * math.sqrt(5)))),
        ({"rank_pattern": {"v_proj": 2}}, 8.0),
        ({"alpha_pattern": {"v_proj": 16}, "rank_pattern": {"v_proj": 16}}, 8.0),
    ],
)
def test_one_alpha_is_enough_where_it_can_express_all(
    settings: dict[str, Any],
    alpha: float,
    tiny: tiny_models.ModelFactory,
    tiny_adapter: tiny_models.AdapterFactory,
) -> None:
    folder = tiny_adapter("qwen2", **settings)  # qwen2 has no permutation: bytes stay as they are
    adapter, stored = convert(folder, tiny("qwen2").gguf_path), _stored(folder)
    assert adapter.alpha == alpha
    folded = adapter.extra.get("safegene.peft.folded", [])
    assert folded == [f"blk.{n}.attn_v.weight" for n in range(3) if "alpha_pattern" in settings]
    for layer in range(3):
        pair = adapter.pairs[f"blk.{layer}.ffn_up.weight"]
        assert np.array_equal(pair.a, stored[f"{PREFIX}.{layer}.mlp.up_proj.lora_A.weight"])
        assert np.array_equal(pair.b, stored[f"{PREFIX}.{layer}.mlp.up_proj.lora_B.weight"])


def test_scales_of_one_with_mixed_ranks_need_no_folding(
    tiny: tiny_models.ModelFactory, tiny_adapter: tiny_models.AdapterFactory
) -> None:
    pattern = {"q_proj": 2, "down_proj": 6}
    folder = tiny_adapter("llama", lora_alpha=4, rank_pattern=pattern, alpha_pattern=pattern)
    adapter = convert(folder, tiny("llama").gguf_path)
    assert adapter.alpha == 0.0  # llama.cpp: no alpha, no scale
    assert "safegene.peft.folded" not in adapter.extra


@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 3, r".*\.q_proj": 5},
        {r".*\.q_proj": 5, "q_proj": 3},
        {r"layers\.1\..*": 3, "q_proj": 5},
        {"model.layers.1.self_attn.q_proj": 3, "proj": 5},
        {"proj": 5, "^model.layers.1.self_attn.q_proj": 3},
        {"q_proj|k_proj": 3},
        {"attn.q_proj": 3},
    ],
)
def test_the_pattern_that_wins_is_the_one_that_peft_picks(pattern: dict[str, int]) -> None:
    other = pytest.importorskip("peft.utils.other")
    module = "model.layers.1.self_attn.q_proj"
    expected = pattern.get(other.get_pattern_key(pattern.keys(), module), 8)
    config = parse_config({"r": 8, "rank_pattern": pattern}, "", "config")
    assert config.rank(module) == expected


def test_an_output_of_its_own_is_converted(
    tiny: tiny_models.ModelFactory, tiny_adapter: tiny_models.AdapterFactory, tmp_path: Path
) -> None:
    model, folder = tiny("llama"), tiny_adapter("llama", target_modules=["lm_head", "q_proj"])
    adapter = convert(folder, model.gguf_path, tmp_path / "adapter.gguf")
    assert "output.weight" in adapter.pairs
    got = _llama_logits(model.gguf_path, tmp_path / "adapter.gguf")
    assert np.abs(got - _peft_logits(model, folder)).max() <= 1e-3


@pytest.mark.parametrize(
    "nested", ["model.language_model.layers", "language_model.model.layers", "layers"]
)
def test_names_of_multi_modal_and_headless_models(
    nested: str,
    tiny: tiny_models.ModelFactory,
    tiny_adapter: tiny_models.AdapterFactory,
    tmp_path: Path,
) -> None:
    from safetensors.numpy import save_file

    plain, base = tiny_adapter("gemma3"), tiny("gemma3").gguf_path
    folder = _copy(plain, tmp_path)
    renamed = {
        key.replace(".model.model.layers", f".model.{nested}"): values
        for key, values in _stored(plain).items()
    }
    save_file(renamed, folder / "adapter_model.safetensors", {"format": "pt"})
    one, other = convert(plain, base), convert(folder, base)
    assert set(one.pairs) == set(other.pairs)
    assert all(np.array_equal(one.delta(name), other.delta(name)) for name in one.pairs)


def test_the_file_says_where_it_came_from(
    tiny: tiny_models.ModelFactory, tiny_adapter: tiny_models.AdapterFactory, tmp_path: Path
) -> None:
    folder = tiny_adapter("llama")
    convert(folder, tiny("llama").gguf_path, tmp_path / "adapter.gguf")
    file = GGUFFile(tmp_path / "adapter.gguf")
    assert file.text("safegene.peft.config") == (folder / "adapter_config.json").read_text()
    assert file.text("safegene.peft.dtype") == "F32/F32"
    assert len(file.text("safegene.peft.sha256")) == 64


def test_converting_imports_no_torch(
    tiny: tiny_models.ModelFactory, tiny_adapter: tiny_models.AdapterFactory, tmp_path: Path
) -> None:
    arguments = [str(tiny_adapter("llama")), str(tiny("llama").gguf_path), str(tmp_path / "a.gguf")]
    code = (
        "import sys; from safegene_edge.converters import convert, to_peft; convert(*sys.argv[1:]);"
        "to_peft(sys.argv[3], sys.argv[2], sys.argv[3] + '.peft');"
        "print([n for n in ('torch', 'transformers', 'peft', 'llama_cpp') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# -- what is refused ------------------------------------------------------

Change = Callable[[Path], None]


def _copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "peft"))


def _config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _add(name: str, shape: tuple[int, ...] = (4,), dtype: Any = np.float32) -> Change:
    def change(folder: Path) -> None:
        from safetensors.numpy import save_file

        tensors = dict(_stored(folder)) | {name: np.ones(shape, dtype)}
        save_file(tensors, folder / "adapter_model.safetensors")

    return change


def _edit(edit: Callable[[dict[str, Any]], None]) -> Change:
    def change(folder: Path) -> None:
        from safetensors.numpy import save_file

        tensors = {name: np.array(values) for name, values in _stored(folder).items()}
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return change


def _bytes(edit: Callable[[bytes], bytes], name: str = "adapter_model.safetensors") -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(edit(path.read_bytes()))

    return change


def _pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


Q0 = f"{PREFIX}.0.self_attn.q_proj"
REFUSED: dict[str, tuple[Change, str]] = {
    "DoRA": (_config(use_dora=True), "use_dora"),
    "DoRA's tensors": (_add(f"{Q0}.lora_magnitude_vector"), "lora_magnitude_vector"),
    "modules_to_save": (_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "a saved module": (_add("base_model.model.lm_head.weight", (300, 64)), "lm_head.weight"),
    "embeddings": (_add("base_model.model.model.embed_tokens.lora_embedding_A"), "embed_tokens"),
    "whole embeddings": (_add("base_model.model.model.embed_tokens.weight"), "embed_tokens"),
    "a norm": (_add(f"{PREFIX}.0.input_layernorm.weight"), "input_layernorm"),
    "a norm's pair": (_add(f"{PREFIX}.0.input_layernorm.lora_A.weight", (4, 1)), "layernorm"),
    "MoE experts": (_add(f"{PREFIX}.0.mlp.experts.3.w1.lora_A.weight", (4, 64)), "experts"),
    "bias": (_config(bias="all"), "bias=all"),
    "a bias tensor": (_add(f"{Q0}.bias"), "bias"),
    "lora_bias": (_config(lora_bias=True), "lora_bias"),
    "its tensor": (_add(f"{Q0}.lora_B.bias"), "lora_B.bias"),
    "a pickle": (_pickled, "adapter_model.bin"),
    "IA3": (_config(peft_type="IA3"), "IA3"),
    "token indices": (_config(trainable_token_indices=[1]), "trainable_token_indices"),
    "target_parameters": (_config(target_parameters=["x"]), "target_parameters"),
    "layer_replication": (_config(layer_replication=[[0, 2]]), "layer_replication"),
    "aLoRA": (_config(alora_invocation_tokens=[5]), "alora_invocation_tokens"),
    "QA-LoRA": (_config(use_qalora=True), "use_qalora"),
    "BD-LoRA": (_config(use_bdlora={"nblocks": 2}), "use_bdlora"),
    "Arrow": (_config(arrow_config={"top_k": 2}), "arrow_config"),
    "KaSA": (_config(kasa_config={"beta": 1}), "kasa_config"),
    "Megatron": (_config(megatron_config={"x": 1}), "megatron_config"),
    "PiSSA": (_config(init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
    "LoftQ": (_config(init_lora_weights="loftq"), "loftq"),
    "an unknown variant": (_config(use_novel_thing=True), "use_novel_thing"),
    "half a pair": (_edit(lambda t: t.pop(f"{Q0}.lora_A.weight")), "lora_A half is missing"),
    "an unknown layer": (_add(f"{PREFIX}.0.self_attn.z_proj.lora_A.weight", (4, 64)), "z_proj"),
    "an adapter's name": (_add(f"{Q0}.lora_A.default.weight", (4, 64)), "save_pretrained"),
    "a float64": (_add(f"{PREFIX}.0.mlp.x.lora_A.weight", (4, 64), np.float64), "F64"),
    "a convolution": (_add(f"{PREFIX}.0.mlp.x.lora_A.weight", (4, 64, 1)), "two dimensions"),
}  # fmt: skip


def _nan(tensors: dict[str, Any]) -> None:
    tensors[f"{Q0}.lora_B.weight"][3, 1] = np.nan


def _shorten(tensors: dict[str, Any]) -> None:
    tensors[f"{Q0}.lora_A.weight"] = tensors[f"{Q0}.lora_A.weight"][:3]


BROKEN: dict[str, tuple[Change, str]] = {
    "NaN": (_edit(_nan), "NaN"),
    "rank of one half": (_edit(_shorten), "rank 3 in lora_A"),
    "rank in the config": (_config(r=5), "says 5"),
    "empty weights": (_bytes(lambda _: b""), "empty"),
    "truncated weights": (_bytes(lambda b: b[: len(b) // 2]), "truncated"),
    "truncated header": (_bytes(lambda b: b[:50]), "truncated"),
    "seven bytes": (_bytes(lambda b: b[:7]), "not a safetensors"),
    "a huge header": (_bytes(lambda b: b"\xff" * 8 + b[8:]), "not a safetensors"),
    "text for weights": (_bytes(lambda _: b"not tensors at all"), "not a safetensors"),
    "no tensors": (_bytes(lambda _: (2).to_bytes(8, "little") + b"{}"), "no tensors"),
    "a lying shape": (_bytes(lambda b: b.replace(b"[4,64]", b"[4,65]")), "bytes, not"),
    "negative offsets": (_bytes(lambda b: b.replace(b"[0,", b"[-1")), "malformed|not JSON"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "no such file"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "no such file"),
    "malformed config": (_bytes(lambda _: b"{", "adapter_config.json"), "not JSON"),
    "deep config": (_bytes(lambda _: b"[" * 100_000, "adapter_config.json"), "not JSON"),
    "a binary config": (_bytes(lambda _: b"\xff\xfe\x00", "adapter_config.json"), "not JSON"),
    "a list for config": (_bytes(lambda _: b"[]", "adapter_config.json"), "not a table"),
    "no peft_type": (_config(peft_type=None), "peft_type"),
    "r of 0": (_config(r=0), "'r' is 0"),
    "r as text": (_config(r="8"), "'r' is '8'"),
    "alpha of 0": (_config(lora_alpha=0), "lora_alpha"),
    "alpha NaN": (_config(lora_alpha=math.nan), "lora_alpha"),
    "alpha infinite": (_config(lora_alpha=math.inf), "lora_alpha"),
    "alpha true": (_config(lora_alpha=True), "lora_alpha"),
    "rslora as text": (_config(use_rslora="no"), "use_rslora"),
    "a pattern list": (_config(rank_pattern=["q_proj"]), "rank_pattern"),
    "a pattern's rank": (_config(rank_pattern={"q_proj": -1}), "rank_pattern"),
    "a pattern's alpha": (_config(alpha_pattern={"q_proj": math.nan}), "alpha_pattern"),
    "a pattern's key": (_config(alpha_pattern={"q_proj(": 2}), "regular expression"),
}  # fmt: skip


def _refuse(
    change: Change, kind: type[SafeGeneError], text: str, folder: Path, base: Path, tmp_path: Path
) -> str:
    copied, output = _copy(folder, tmp_path), tmp_path / "out" / "adapter.gguf"
    output.parent.mkdir()
    change(copied)
    with pytest.raises(kind) as caught:
        convert(copied, base, output)
    message = str(caught.value)
    assert re.search(text, message)
    assert "\n" not in message
    assert str(copied) in message
    assert not list(output.parent.iterdir())
    return message


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(
    name: str,
    tiny: tiny_models.ModelFactory,
    tiny_adapter: tiny_models.AdapterFactory,
    tmp_path: Path,
) -> None:
    change, text = REFUSED[name]
    base = tiny("llama").gguf_path
    _refuse(change, UnsupportedError, text, tiny_adapter("llama"), base, tmp_path)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders(
    name: str,
    tiny: tiny_models.ModelFactory,
    tiny_adapter: tiny_models.AdapterFactory,
    tmp_path: Path,
) -> None:
    change, text = BROKEN[name]
    base = tiny("llama").gguf_path
    _refuse(change, FileFormatError, text, tiny_adapter("llama"), base, tmp_path)


def test_all_refusals_come_in_one_list(
    tiny: tiny_models.ModelFactory, tiny_adapter: tiny_models.AdapterFactory, tmp_path: Path
) -> None:
    def change(folder: Path) -> None:
        _config(use_dora=True, bias="lora_only", modules_to_save=["lm_head"])(folder)
        for layer in range(3):
            _add(f"{PREFIX}.{layer}.input_layernorm.weight")(folder)
        _add(f"{PREFIX}.0.mlp.experts.0.lora_A.weight", (4, 64))(folder)
        _edit(lambda t: t.pop(f"{Q0}.lora_B.weight"))(folder)

    base = tiny("llama").gguf_path
    message = _refuse(change, UnsupportedError, "use_dora", tiny_adapter("llama"), base, tmp_path)
    for item in ("bias=lora_only", "modules_to_save", "layers.0-2.input_layernorm", "experts"):
        assert item in message
    assert "layers.0.self_attn.q_proj: its lora_B half is missing" in message


def test_a_tied_output_is_refused(
    tiny: tiny_models.ModelFactory, tiny_adapter: tiny_models.AdapterFactory
) -> None:
    folder = tiny_adapter("qwen2", target_modules=["lm_head", "q_proj"])
    tied = tiny("qwen2", tie_word_embeddings=True).gguf_path
    with pytest.raises(UnsupportedError, match="lm_head: the base's output is tied"):
        convert(folder, tied)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden_size": 32}, r"layers\.0-2\.self_attn\.q_proj.*64×64, the base has 32×32"),
        ({"num_hidden_layers": 2}, r"layers\.2\.mlp\.up_proj.*the base has 2 blocks"),
        ({"num_key_value_heads": 1}, r"layers\.0-2\.self_attn\.[kv]_proj"),
    ],
)
def test_another_size_of_the_family_does_not_fit(
    changes: dict[str, int],
    text: str,
    tiny: tiny_models.ModelFactory,
    tiny_adapter: tiny_models.AdapterFactory,
) -> None:
    with pytest.raises(MismatchError, match=text):
        convert(tiny_adapter("llama"), tiny("llama", **changes).gguf_path)


def test_fused_and_split_families_do_not_mix(
    tiny: tiny_models.ModelFactory, tiny_adapter: tiny_models.AdapterFactory
) -> None:
    with pytest.raises(MismatchError, match="qkv_proj"):
        convert(tiny_adapter("phi3"), tiny("llama").gguf_path)
    with pytest.raises(MismatchError, match="q_proj"):
        convert(tiny_adapter("llama"), tiny("phi3").gguf_path)


def test_bases_that_cannot_be_used(
    tiny: tiny_models.ModelFactory, tiny_adapter: tiny_models.AdapterFactory, tmp_path: Path
) -> None:
    folder, adapter = tiny_adapter("llama"), tmp_path / "adapter.gguf"
    convert(folder, tiny("llama").gguf_path, adapter)
    text = tmp_path / "text.gguf"
    text.write_text("hello")
    for base, kind in ((adapter, "adapter"), (text, "GGUF"), (tmp_path / "none.gguf", "no such")):
        with pytest.raises(FileFormatError, match=kind):
            convert(folder, base)


def test_an_architecture_that_is_not_supported(
    tiny_adapter: tiny_models.AdapterFactory, tmp_path: Path
) -> None:
    from safegene_edge.gguf_file import write_gguf

    base = tmp_path / "mamba.gguf"
    write_gguf(base, "mamba", {"mamba.block_count": 1}, [("x.weight", np.ones((2, 2), np.float32))])
    with pytest.raises(UnsupportedError, match=r"architecture 'mamba'.*llama, qwen2"):
        convert(tiny_adapter("llama"), base)


def test_outputs_that_cannot_be_written(
    tiny: tiny_models.ModelFactory, tiny_adapter: tiny_models.AdapterFactory, tmp_path: Path
) -> None:
    base, folder = tiny("llama").gguf_path, tiny_adapter("llama")
    before = base.read_bytes()
    outputs = (base, folder / "adapter_model.safetensors", tmp_path, tmp_path / "no" / "a.gguf")
    for output in outputs:
        with pytest.raises(OutputError):
            convert(folder, base, output)
    assert base.read_bytes() == before


def test_layers_are_named_in_ranges() -> None:
    names = ["a.layers.0.q", "a.layers.1.q", "b", "a.layers.2.q", "a.layers.7.q", "a.layers.1.k"]
    assert collapse_layers(names) == ["a.layers.0-2,7.q", "b", "a.layers.1.k"]
