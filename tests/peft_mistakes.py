"""Mistakes with PEFT folders, which `convert` names."""

from __future__ import annotations

import shutil

import numpy as np
from mistakes import case, first_key


@case("DoRA")
def dora(c):
    return c.convert(use_dora=True)


def with_tensors(c, shapes):
    """Converts the folder with these tensors in it, too."""

    def change(tensors):
        for name, shape in shapes.items():
            tensors[f"base_model.model.{name}"] = np.ones(shape, np.float32)

    return c.convert_tensors(change)


@case("modules_to_save")
def modules_to_save(c):
    return c.convert(modules_to_save=["lm_head"])


@case("bias")
def bias(c):
    return c.convert(bias="all")


@case("embed")
def embeddings(c):
    layer = "model.embed_tokens.lora_embedding_"
    return with_tensors(c, {f"{layer}A": (4, 300), f"{layer}B": (64, 4)})


@case("norm")
def norm_weights(c):
    return with_tensors(c, {"model.norm.weight": (64,)})


@case("expert")
def moe_experts(c):
    layer = "model.layers.0.mlp.experts.3.gate_proj.lora_"
    return with_tensors(c, {f"{layer}A.weight": (4, 64), f"{layer}B.weight": (96, 4)})


@case("lm_head")
def tied_lm_head(c):
    model = c.tiny("gemma3").gguf_path
    peft = c.tiny_adapter("gemma3")
    shutil.rmtree(c.peft)
    shutil.copytree(peft, c.peft)
    shutil.copy(model, c.model)

    layer = "lm_head.lora_"
    return with_tensors(c, {f"{layer}A.weight": (4, 64), f"{layer}B.weight": (300, 4)})


@case("adapter_model.bin")
def pickled_weights(c):
    (c.peft / "adapter_model.safetensors").rename(c.peft / "adapter_model.bin")
    return c.convert()


@case("IA3")
def another_peft_type(c):
    return c.convert(peft_type="IA3")


@case("adapter_config.json")
def malformed_config(c):
    args = c.convert()
    (c.peft / "adapter_config.json").write_text('{"r": 4,')
    return args


@case("adapter_config.json")
def missing_config(c):
    args = c.convert()
    (c.peft / "adapter_config.json").unlink()
    return args


@case("r")
def rank_zero(c):
    return c.convert(r=0)


@case("lora_alpha")
def alpha_of_words(c):
    return c.convert(lora_alpha="plenty")


@case("adapter_model.safetensors")
def truncated_safetensors(c):
    path = c.peft / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return c.convert()


@case("lora_B half is missing")
def peft_half_missing(c):
    return c.convert_tensors(lambda tensors: tensors.pop(first_key(tensors, "lora_B")))


@case("NaN")
def peft_nan(c):
    return c.convert_tensors(lambda tensors: tensors[first_key(tensors)].fill(np.nan))


@case("model.layers.0")
def peft_of_another_size(c):
    def change(tensors):
        for key in tensors:
            if key.endswith("q_proj.lora_A.weight"):
                tensors[key] = np.ones((4, 128), np.float32)

    return c.convert_tensors(change)


@case("qwen2.5-7b-unknown")
def module_that_the_base_has_not(c):
    def change(tensors):
        for half, shape in (("A", (4, 64)), ("B", (64, 4))):
            key = f"base_model.model.qwen2.5-7b-unknown.lora_{half}.weight"
            tensors[key] = np.ones(shape, np.float32)

    return c.convert_tensors(change)


@case("also an input")
def convert_over_the_base(c):
    args = c.convert()
    return [*args[:-1], c.model]


@case("is a folder")
def convert_into_a_folder(c):
    args = c.convert()
    return [*args[:-1], c.folder]


@case("two outputs are the same file")
def two_names_of_one_output(c):
    other_name = f"{c.folder}/./{c.output.name}"
    return ["recalibrate", c.model, c.gene, "-o", c.output, "--plot", other_name]


@case("convert_hf_to_gguf.py")
def convert_a_whole_model(c):
    (c.peft / "adapter_config.json").rename(c.peft / "config.json")
    return ["convert", c.peft, "--base", c.model, "-o", c.output]


@case("not a folder")
def convert_nothing(c):
    args = c.convert()
    return [args[0], c.folder / "nowhere", *args[2:]]
