"""PEFT folder to GGUF LoRA: numerically true."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny as tiny_models
from adapters import copy_of, stored_tensors
from tiny import lora_settings, peft_deltas, relative_error

from safegene_edge.converters import convert
from safegene_edge.converters.names import BaseNames
from safegene_edge.converters.peft import parse_config
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
    adapter, stored = convert(folder, tiny("qwen2").gguf_path), stored_tensors(folder)
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
        {r"(model\.)?layers\.(0|1|1[0-9]|2[0-3])\.self_attn\.(q|k|v)_proj": 3},
        {r".*layers\.\d+\..*q_proj": 3},
        {r"^(?!.*mlp).*proj": 3, r"(?:self_)?attn\.[qk]_proj": 5},
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
    folder = copy_of(plain, tmp_path)
    renamed = {
        key.replace(".model.model.layers", f".model.{nested}"): values
        for key, values in stored_tensors(plain).items()
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
