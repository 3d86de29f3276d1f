"""PEFT folders that no GGUF LoRA can hold: refused, with all reasons in one list."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny as tiny_models
from adapters import copy_of, stored_tensors

from safegene_edge.converters import convert
from safegene_edge.converters.peft import collapse_layers, parse_config
from safegene_edge.errors import (
    FileFormatError,
    MismatchError,
    OutputError,
    SafeGeneError,
    UnsupportedError,
)

PREFIX = "base_model.model.model.layers"


Change = Callable[[Path], None]


def _config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _add(name: str, shape: tuple[int, ...] = (4,), dtype: Any = np.float32) -> Change:
    def change(folder: Path) -> None:
        from safetensors.numpy import save_file

        tensors = dict(stored_tensors(folder)) | {name: np.ones(shape, dtype)}
        save_file(tensors, folder / "adapter_model.safetensors")

    return change


def _edit(edit: Callable[[dict[str, Any]], None]) -> Change:
    def change(folder: Path) -> None:
        from safetensors.numpy import save_file

        tensors = {name: np.array(values) for name, values in stored_tensors(folder).items()}
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


def _header(text: bytes) -> Change:
    """A safetensors file of this header alone."""
    return _bytes(lambda _: len(text).to_bytes(8, "little") + text)


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
    "a header that is no JSON": (_header(b"{nothing"), "not JSON"),
    "a header that is a list": (_header(b"[1, 2]"), "not a table of tensors"),
    "a deep header": (_header(b"[" * 100_000), "not JSON"),
    "metadata that is a list": (_header(b'{"__metadata__": [1]}'), "metadata is not a table"),
    "a record that is a number": (_header(b'{"x.lora_A.weight": 5}'), "malformed record"),
    "a type that is a number": (
        _header(b'{"x.lora_A.weight": {"dtype": 5, "shape": [1], "data_offsets": [0, 4]}}'),
        "malformed record",
    ),
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
    "a pattern's flags": (_config(rank_pattern={"(?i)q_proj": 2}), "regular expression"),
    "a pattern's count": (_config(rank_pattern={"q{99999999999}": 2}), "regular expression"),
    "a deep pattern": (_config(rank_pattern={"(" * 9999 + ")" * 9999: 2}), "regular expression"),
    "a pattern's key": (_config(alpha_pattern={"q_proj(": 2}), "regular expression"),
    "repeats in repeats": (_config(rank_pattern={r"([a-z_.0-9]+)+!": 4}), "too many ways"),
    "choices in repeats": (_config(rank_pattern={r"(\w|\w\.|[._])*!": 4}), "too many ways"),
    "repeats in a row": (_config(alpha_pattern={".*.*.*.*.*!": 4}), "too many ways"),
    "choices in a row": (_config(alpha_pattern={r"(\w|\w\.?)?" * 40 + "!": 4}), "too many ways"),
}  # fmt: skip


def test_keys_that_take_long_together_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    from safegene_edge.converters import patterns

    keys = {".*.*.*!" + "!" * number: 4 for number in range(300)}
    config = parse_config({"rank_pattern": keys}, "", tmp_path / "config")
    assert config.rank("model.layers.1.self_attn.q_proj") == 8
    monkeypatch.setattr(patterns, "_SECONDS", 0.05)
    with pytest.raises(FileFormatError, match=r"config: 'rank_pattern'.*too long to match"):
        parse_config({"rank_pattern": keys}, "", tmp_path / "config").rank("layers." * 28)


def _refuse(
    change: Change, kind: type[SafeGeneError], text: str, folder: Path, base: Path, tmp_path: Path
) -> str:
    copied, output = copy_of(folder, tmp_path), tmp_path / "out" / "adapter.gguf"
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
