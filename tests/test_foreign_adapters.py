"""Adapters that other tools saved: wrappers, vision towers, MLX; against PEFT's numbers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from adapters import copy_of, stored_tensors
from click.testing import CliRunner
from safetensors.numpy import save_file
from test_convert import _llama_logits, _peft_logits, assert_same_deltas
from tiny import peft_deltas

from safegene_edge.cli import cli
from safegene_edge.converters import convert, to_peft
from safegene_edge.errors import FileFormatError, SafeGeneError, UnsupportedError
from safegene_edge.gene import Adapter, SafetyGene
from safegene_edge.gguf_file import write_gguf

MODEL = "base_model.model.model."
VISION = "base_model.model.model.vision_tower.vision_model.encoder.layers"


def saved(source, tmp_path, rename=str, add=None, **config):
    """A copy of a PEFT folder with its keys renamed, tensors added and settings changed."""
    folder = copy_of(source, tmp_path)
    tensors = {rename(key): values for key, values in stored_tensors(source).items()}
    save_file(tensors | (add or {}), folder / "adapter_model.safetensors", {"format": "pt"})
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def starting(prefix):
    return lambda key: prefix + key.removeprefix(MODEL)


# -- names ----------------------------------------------------------------

WRAPPED = [
    "base_model.model._orig_mod.model.",
    "_orig_mod.base_model.model.model.",
    "module.base_model.model.model.",
    "base_model.model.module.model.",
    "module._orig_mod.base_model.model.module.model._orig_mod.",
    "_fsdp_wrapped_module.base_model.model._fsdp_wrapped_module.model.",
    "_forward_module.base_model.model.model.",
    "base_model.model.base_model.model.model.",
    "base_model.model.base_model.model.base_model.model.model.",
]


@pytest.mark.parametrize("prefix", WRAPPED)
def test_wrappers_names_are_stripped(prefix, tiny, tiny_adapter, tmp_path):
    """What comes back from the GGUF has plain names, as PEFT loads them."""
    model, source = tiny("llama"), tiny_adapter("llama", alpha_pattern={"q_proj": 3})
    folder = saved(source, tmp_path, starting(prefix))
    adapter = convert(folder, model.gguf_path, tmp_path / "a.gguf")
    expected = peft_deltas(model, source)
    assert_same_deltas(adapter, model, expected)
    to_peft(tmp_path / "a.gguf", model.gguf_path, tmp_path / "back")
    back = peft_deltas(model, tmp_path / "back")
    assert back.keys() == expected.keys()
    for name, delta in expected.items():
        np.testing.assert_allclose(back[name], delta, rtol=1e-5, atol=1e-7)


def test_names_of_metas_own_code_are_refused(tiny, tiny_adapter, tmp_path):
    """Their q and k may have the rows in GGUF's order already, which would be changed again."""
    folder = saved(
        tiny_adapter("llama"), tmp_path,
        lambda key: key.replace("self_attn.q_proj", "attention.wq"),
    )  # fmt: skip
    with pytest.raises(SafeGeneError, match=r"attention\.wq.*only 'q_proj' and 'k_proj'"):
        convert(folder, tiny("llama").gguf_path, tmp_path / "a.gguf")


def test_an_adapter_without_a_pair_is_named(tiny, tiny_adapter, tmp_path):
    """A broken save that kept what was frozen alone."""
    folder = copy_of(tiny_adapter("llama"), tmp_path)
    alone = {"base_model.model.lm_head.base_layer.weight": np.ones((300, 64), np.float32)}
    save_file(alone, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(FileFormatError, match="holds no pair of a LoRA"):
        convert(folder, tiny("llama").gguf_path, tmp_path / "a.gguf")


def test_a_wrapper_around_each_layer_is_stripped(tiny, tiny_adapter, tmp_path):
    source = tiny_adapter("llama", rank_pattern={"q_proj": 2})
    folder = saved(
        source, tmp_path, lambda key: key.replace(".mlp.", "._checkpoint_wrapped_module.mlp.")
    )
    assert_same_deltas(
        convert(folder, tiny("llama").gguf_path), tiny("llama"), peft_deltas(tiny("llama"), source)
    )


def test_a_pattern_that_a_wrapper_leaves_open_is_named(tiny, tiny_adapter, tmp_path):
    """PEFT matches "layers.1.mlp" against the name that it saw, with the wrapper or without."""
    source = tiny_adapter("llama")
    wrap = lambda key: key.replace(".mlp.", "._orig_mod.mlp.")  # noqa: E731
    folder = saved(source, tmp_path, wrap, alpha_pattern={"layers.1.mlp.up_proj": 3})
    with pytest.raises(
        UnsupportedError, match=r"layers\.1\._orig_mod\.mlp\.up_proj: with its wrap"
    ):
        convert(folder, tiny("llama").gguf_path)


def test_one_module_under_two_names_is_named(tiny, tiny_adapter, tmp_path):
    source, key = tiny_adapter("llama"), "layers.0.self_attn.q_proj.lora_A.weight"
    add = {f"base_model.model._orig_mod.model.{key}": np.ones((4, 64), np.float32)}
    folder = saved(source, tmp_path, add=add)
    with pytest.raises(
        UnsupportedError, match=r"model\.layers\.0\.self_attn\.q_proj.*the same as '.*_orig_mod"
    ):
        convert(folder, tiny("llama").gguf_path)


@pytest.mark.parametrize(
    "nested",
    ["model.language_model.model.", "language_model.model.model.", "model.text_model.model.",
     "model.model.language_model.", "text_model.", "language_model."],
)  # fmt: skip
def test_the_text_model_within_another(nested, tiny, tiny_adapter, tmp_path):
    source = tiny_adapter("gemma3")
    folder = saved(source, tmp_path, starting(f"base_model.model.{nested}"))
    base = tiny("gemma3").gguf_path
    assert convert(folder, base).sha256 == convert(source, base).sha256


@pytest.mark.parametrize("number", ["9" * 5000, "12345678901", "-1"])
def test_a_layer_beyond_all_is_no_layer(number, tiny, tiny_adapter, tmp_path):
    folder = saved(
        tiny_adapter("llama"), tmp_path, lambda key: key.replace("layers.2", f"layers.{number}")
    )
    with pytest.raises(SafeGeneError):
        convert(folder, tiny("llama").gguf_path)


# -- vision and audio -----------------------------------------------------


def with_vision(tiny_adapter, tmp_path, **config):
    add = {}
    for n in range(2):
        for half, shape in (("A", (4, 32)), ("B", (32, 4))):
            add[f"{VISION}.{n}.self_attn.q_proj.lora_{half}.weight"] = np.ones(shape, np.float32)
    add["base_model.model.model.visual.patch_embed.proj.lora_A.weight"] = np.ones(
        (4, 3, 2, 2), "f4"
    )
    add["base_model.model.multi_modal_projector.linear_1.weight"] = np.ones((4, 4), np.float32)
    return saved(tiny_adapter("gemma3"), tmp_path, add=add, **config)


def test_a_vision_tower_is_named_as_what_it_is(tiny, tiny_adapter, tmp_path):
    with pytest.raises(
        UnsupportedError, match=r"6 tensors .*vision_tower.* vision or audio"
    ) as raised:
        convert(with_vision(tiny_adapter, tmp_path), tiny("gemma3").gguf_path, tmp_path / "a.gguf")
    assert "--text-only" in raised.value.remedy
    assert not (tmp_path / "a.gguf").exists()


def test_the_text_models_part_is_converted_alone(tiny, tiny_adapter, tmp_path):
    base, output = tiny("gemma3").gguf_path, tmp_path / "a.gguf"
    folder = with_vision(tiny_adapter, tmp_path, modules_to_save=["multi_modal_projector"])
    arguments = ["convert", folder, "--base", base, "-o", output, "--text-only"]
    done = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0
    assert "left out: 6 tensors of a vision or audio part" in done.stderr
    assert Adapter.load(output).sha256 == convert(tiny_adapter("gemma3"), base).sha256


@pytest.mark.parametrize(
    "module",
    ["model.visual.blocks.0.attn.qkv", "visual.merger.mlp.0",
     "model.audio_tower.layers.0.self_attn.q_proj",
     "model.vision_embed_tokens.img_processor.layers.0.mlp.fc1", "multi_modal_projector.linear_1",
     "model.connector.modality_projection.proj",
     "vision_model.text_model.layers.0.self_attn.q_proj"],
)  # fmt: skip
def test_parts_that_see_or_hear(module, tiny, tiny_adapter, tmp_path):
    add = {f"base_model.model.{module}.lora_A.weight": np.ones((4, 64), np.float32)}
    folder = saved(tiny_adapter("llama"), tmp_path, add=add)
    base = tiny("llama").gguf_path
    with pytest.raises(UnsupportedError, match="vision or audio"):
        convert(folder, base)
    assert (
        convert(folder, base, text_only=True).sha256 == convert(tiny_adapter("llama"), base).sha256
    )


def test_an_adapter_of_a_vision_tower_alone(tiny, tiny_adapter, tmp_path):
    folder = saved(tiny_adapter("llama"), tmp_path, starting("base_model.model.vision_tower."))
    with pytest.raises(UnsupportedError, match="nothing is for the text model"):
        convert(folder, tiny("llama").gguf_path, text_only=True)


# -- types and embeddings -------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.int8])
def test_pairs_of_another_type_come_with_the_remedy(dtype, tiny, tiny_adapter, tmp_path):
    source = tiny_adapter("llama")
    other = {key: values.astype(dtype) for key, values in stored_tensors(source).items()}
    folder = saved(source, tmp_path, add=other)
    name = "F64" if dtype is np.float64 else "I8"
    with pytest.raises(UnsupportedError, match=f"stored as {name}") as raised:
        convert(folder, tiny("llama").gguf_path)
    assert "float32" in raised.value.remedy
    assert "half is missing" not in str(raised.value)


def test_float64_in_a_gguf_comes_with_the_remedy(tmp_path):
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    for half, shape in (("a", (2, 8)), ("b", (8, 2))):
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{half}", np.ones(shape, np.float64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FileFormatError, match=r"lora_a' has the type F64.*F32 or F16"):
        SafetyGene.load(tmp_path / "a.gguf")


def test_a_pair_for_the_embeddings_is_named(tmp_path):
    """As llama.cpp wants it: A vocabulary×r, B width×r; not "rank 300 in lora_a"."""
    facts = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0}
    pair = [("lora_a", np.ones((300, 4), np.float32)), ("lora_b", np.ones((64, 4), np.float32))]
    tensors = [(f"token_embd.weight.{half}", values) for half, values in pair]
    write_gguf(tmp_path / "a.gguf", "llama", facts, tensors)
    with pytest.raises(UnsupportedError, match=r"token_embd\.weight.*embeddings.*embed_tokens"):
        SafetyGene.load(tmp_path / "a.gguf")


# -- MLX ------------------------------------------------------------------


def as_mlx(source, folder, **changes):
    """A PEFT folder as mlx-lm would have saved the same adapter (mlx_lm/tuner/lora.py)."""
    config = json.loads((source / "adapter_config.json").read_text())
    tensors = {}
    for key, values in stored_tensors(source).items():
        name = key.removeprefix("base_model.model.").removesuffix(".weight").lower()
        tensors[name] = np.ascontiguousarray(values.T)
    scale = config["lora_alpha"] / config["r"]
    settings = {
        "fine_tune_type": "lora",
        "model": "mlx-community/tiny-4bit",
        "num_layers": 16,
        "lora_parameters": {"rank": config["r"], "dropout": 0.0, "scale": scale},
    }
    folder.mkdir()
    edit = changes.pop("edit", None)
    if edit:
        edit(tensors)
    table = changes.pop("table", {})
    settings["lora_parameters"] |= table
    (folder / "adapter_config.json").write_text(json.dumps(settings | changes))
    save_file(tensors, folder / "adapters.safetensors")
    with_null_metadata(folder / "adapters.safetensors")
    return folder


def with_null_metadata(path):
    """MLX 0.32 writes null where others write a table or nothing."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": None, **json.loads(data[8:end])}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


@pytest.mark.parametrize("lora", [{}, {"r": 5, "lora_alpha": 3}])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_an_mlx_adapter_has_pefts_deltas(arch, lora, tiny, tiny_adapter, tmp_path):
    model, source = tiny(arch), tiny_adapter(arch, **lora)
    folder = as_mlx(source, tmp_path / "mlx")
    convert(folder, model.gguf_path, tmp_path / "a.gguf")
    written = Adapter.load(tmp_path / "a.gguf")
    assert_same_deltas(written, model, peft_deltas(model, source))
    assert written.sha256 == convert(source, model.gguf_path).sha256


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_an_mlx_adapter_has_pefts_logits(arch, tiny, tiny_adapter, tmp_path):
    model, source = tiny(arch), tiny_adapter(arch)
    convert(as_mlx(source, tmp_path / "mlx"), model.gguf_path, tmp_path / "a.gguf")
    got = _llama_logits(model.gguf_path, tmp_path / "a.gguf")
    assert np.abs(got - _llama_logits(model.gguf_path, None)).max() > 0.5
    assert np.abs(got - _peft_logits(model, source)).max() <= 1e-3


def test_mlx_scales_its_product_and_ignores_alpha(tiny, tiny_adapter, tmp_path):
    """scale·(A B)ᵀ, whatever `alpha` an old config names: mlx-lm reads none."""
    table = {"scale": 20.0, "alpha": 16}
    folder = as_mlx(tiny_adapter("qwen2"), tmp_path / "mlx", table=table)
    adapter = convert(folder, tiny("qwen2").gguf_path)
    stored = stored_tensors(tiny_adapter("qwen2"))
    name = f"{MODEL}layers.1.mlp.up_proj"
    a, b = (stored[f"{name}.lora_{half}.weight"].astype(np.float64) for half in "AB")
    np.testing.assert_allclose(adapter.delta("blk.1.ffn_up.weight"), 20.0 * (b @ a), rtol=1e-5)


def test_an_mlx_adapter_of_some_layers_in_bfloat16(tiny, tiny_adapter, tmp_path):
    import ml_dtypes

    def edit(tensors):
        for key in list(tensors):
            if "layers.0." in key or "k_proj" in key:
                del tensors[key]
            else:
                tensors[key] = tensors[key].astype(ml_dtypes.bfloat16)

    model, source = tiny("llama"), tiny_adapter("llama", dtype="bfloat16")
    folder = as_mlx_bf16(source, tmp_path, edit)
    adapter = convert(folder, model.gguf_path)
    assert adapter.layers == (1, 2)
    expected = {
        name: delta
        for name, delta in peft_deltas(model, source).items()
        if "layers.0." not in name and "k_proj" not in name
    }
    assert_same_deltas(adapter, model, expected)


def as_mlx_bf16(source, tmp_path, edit):
    """numpy's safetensors reads no bfloat16: through torch's."""
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save_torch

    plain = tmp_path / "plain"
    shutil.copytree(source, plain)
    values = {
        key: value.float() for key, value in load_file(source / "adapter_model.safetensors").items()
    }
    save_torch(values, plain / "adapter_model.safetensors")
    return as_mlx(plain, tmp_path / "mlx", edit=edit)


def test_an_mlx_adapter_becomes_a_peft_folder(tiny, tiny_adapter, tmp_path):
    model, source = tiny("llama"), tiny_adapter("llama")
    convert(as_mlx(source, tmp_path / "mlx"), model.gguf_path, tmp_path / "a.gguf")
    to_peft(tmp_path / "a.gguf", model.gguf_path, tmp_path / "peft")
    got, expected = peft_deltas(model, tmp_path / "peft"), peft_deltas(model, source)
    assert got.keys() == expected.keys()
    for name, delta in expected.items():
        np.testing.assert_array_equal(got[name], delta)


Q0 = "model.layers.0.self_attn.q_proj"


def adding(name, shape):
    return lambda tensors: tensors.update({name: np.ones(shape, np.float32)})


MLX_REFUSED = {
    "DoRA": ({"fine_tune_type": "dora"}, "fine_tune_type=dora: DoRA"),
    "DoRA of old": ({"use_dora": True, "fine_tune_type": None}, "fine_tune_type"),
    "full": ({"fine_tune_type": "full"}, "weights themselves were trained"),
    "another kind": ({"fine_tune_type": "oft"}, "fine_tune_type=oft"),
    "DoRA's magnitudes": ({"edit": adding(f"{Q0}.m", (64,))}, r"q_proj\.m: it is no half"),
    "embeddings": ({"edit": adding("model.embed_tokens.lora_a", (300, 4))}, "embed_tokens"),
    "experts": ({"edit": adding("layers.0.mlp.switch_mlp.up_proj.lora_a", (2, 4, 64))}, "experts"),
    "half a pair": ({"edit": lambda t: t.pop(f"{Q0}.lora_b")}, "lora_b half is missing"),
    "vision": ({"edit": adding("vision_tower.layers.0.fc1.lora_a", (64, 4))}, "--text-only"),
    "no parameters": ({"lora_parameters": None}, "'lora_parameters'"),
}  # fmt: skip
MLX_BROKEN = {
    "another rank": ({"table": {"rank": 5}}, "rank 4 in lora_A and 4.*says 5"),
    "rank of words": ({"table": {"rank": "4"}}, r"rank' is '4'"),
    "no scale": ({"table": {"scale": None}}, r"scale' is None"),
    "a scale of NaN": ({"table": {"scale": float("nan")}}, r"scale' is nan"),
    "a scale of 0": ({"table": {"scale": 0}}, r"scale' is 0"),
    "a value of NaN": ({"edit": lambda t: t[f"{Q0}.lora_a"].fill(np.nan)}, "NaN"),
}


@pytest.mark.parametrize("name", [*MLX_REFUSED, *MLX_BROKEN])
def test_mlx_adapters_that_are_refused(name, tiny, tiny_adapter, tmp_path):
    changes, reason = {**MLX_REFUSED, **MLX_BROKEN}[name]
    folder = as_mlx(tiny_adapter("llama"), tmp_path / "mlx", **changes)
    kind = UnsupportedError if name in MLX_REFUSED else FileFormatError
    with pytest.raises(kind, match=reason) as raised:
        convert(folder, tiny("llama").gguf_path, tmp_path / "a.gguf")
    assert str(folder) in str(raised.value)
    assert not (tmp_path / "a.gguf").exists()


def test_an_mlx_folder_without_its_weights(tiny, tiny_adapter, tmp_path):
    folder = as_mlx(tiny_adapter("llama"), tmp_path / "mlx")
    (folder / "adapters.safetensors").rename(folder / "0000100_adapters.safetensors")
    with pytest.raises(FileFormatError, match=r"mlx/adapters\.safetensors: no such file"):
        convert(folder, tiny("llama").gguf_path)


def test_an_output_is_never_the_mlx_weights(tiny, tiny_adapter, tmp_path):
    folder = as_mlx(tiny_adapter("llama"), tmp_path / "mlx")
    weights = folder / "adapters.safetensors"
    before = weights.read_bytes()
    with pytest.raises(SafeGeneError, match="also an input"):
        convert(folder, tiny("llama").gguf_path, weights)
    assert weights.read_bytes() == before


# -- a folder where a GGUF is wanted --------------------------------------


def test_folders_given_for_a_gguf_come_with_the_command(tiny, tiny_adapter, tmp_path):
    peft, mlx = tiny_adapter("llama"), as_mlx(tiny_adapter("llama"), tmp_path / "mlx")
    for folder in (peft, mlx):
        with pytest.raises(FileFormatError, match="is a folder") as raised:
            SafetyGene.load(folder)
        assert f"safegene-edge convert {folder} --base" in raised.value.remedy
    with pytest.raises(FileFormatError, match=r"Hugging Face model.*convert_hf_to_gguf"):
        SafetyGene.load(tiny("llama").hf_dir)
    with pytest.raises(FileFormatError, match=r"is a folder\. Give a file"):
        SafetyGene.load(tmp_path)
    for file in (peft / "adapter_model.safetensors", mlx / "adapters.safetensors"):
        with pytest.raises(
            FileFormatError, match=f"not a GGUF.*safegene-edge convert {file.parent}"
        ):
            SafetyGene.load(file)
        with pytest.raises(FileFormatError, match=r"a file, not a folder.*Give the folder"):
            convert(file, tiny("llama").gguf_path)
