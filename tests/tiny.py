"""Tiny random-weight models of every supported architecture, as Hugging Face folder and F32 GGUF.

A model has three layers of width 64, grouped-query attention and 300 byte-level tokens: it
computes in milliseconds and takes about a megabyte, yet llama.cpp runs the same graph for
it as for a real model of its architecture. Nothing is downloaded.

Needs torch, transformers, peft and gguf; `missing_training_stack` says what is missing.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
VOCABULARY = 300
WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, CONTEXT = 64, 96, 3, 4, 2, 512
END_OF_TEXT, IM_START, IM_END, PAD = 296, 297, 298, 299
# Settings of a model whose rows hold whole super-blocks of 256.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PHI3_LINEAR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MERGES = (
    "Ġ t", "Ġ a", "h e", "i n", "r e", "o n", "Ġt he", "e r", "Ġ s", "a t", "Ġ w", "Ġ o",
    "e n", "Ġ c", "i t", "i s", "a n", "o r", "e s", "Ġ b", "e d", "Ġ f", "in g", "Ġ p",
    "o u", "Ġa n", "a l", "a r", "Ġt o", "Ġ m", "Ġo f", "Ġ in", "Ġ d", "Ġ h", "Ġan d",
    "i c", "a s", "l e", "Ġt h", "o m",
)  # fmt: skip


def missing_training_stack() -> str:
    """The packages that tiny models need and that are not installed; empty when all are there."""
    needed = ("torch", "transformers", "peft", "tokenizers", "gguf")
    return ", ".join(name for name in needed if importlib.util.find_spec(name) is None)


def linear_modules(arch: str) -> list[str]:
    """The names of all linear layers in a block, as PEFT's target_modules."""
    return list(PHI3_LINEAR if arch == "phi3" else LINEAR)


@dataclass
class TinyModel:
    """One tiny model: `hf_dir` and `gguf_path` hold the same float32 weights."""

    arch: str
    hf_dir: Path
    gguf_path: Path
    hf_model: Any = field(repr=False)

    def copy_of_model(self) -> Any:
        """A fresh transformers model that PEFT may change."""
        return copy.deepcopy(self.hf_model)


def build(arch: str, folder: Path, seed: int = 0, **changes: Any) -> TinyModel:
    """Make a tiny model under `folder`; `changes` go into its transformers config."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = _config(arch, changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    _randomise(model)
    hf_dir = folder / "hf"
    model.save_pretrained(hf_dir)
    _write_tokenizer(hf_dir)
    model.name_or_path = model.config._name_or_path = str(hf_dir)
    gguf_path = folder / f"tiny-{arch}-f32.gguf"
    write_model_gguf(gguf_path, arch, model)
    return TinyModel(arch, hf_dir, gguf_path, model)


def _config(arch: str, changes: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": IM_END,
        "pad_token_id": PAD,
        "tie_word_embeddings": arch.startswith("gemma"),
    }
    if arch in ("qwen3", "gemma2", "gemma3"):
        settings["head_dim"] = 32  # wider than width/heads: Q's and O's shapes must not be guessed
    if arch.startswith("gemma"):
        settings |= {"query_pre_attn_scalar": 32, "sliding_window": 64}
    if arch == "phi3":
        settings |= {"original_max_position_embeddings": CONTEXT, "sliding_window": None}
    name = "gemma3_text" if arch == "gemma3" else arch
    return AutoConfig.for_model(name, **(settings | changes))


def _randomise(model: Any) -> None:
    """Weights that keep activations and logits near unit size, and norms that differ from 1.

    As in a trained model a branch adds less than the residual stream carries. Gemma's less
    still: llama.cpp's CPU backend takes GELU from a float16 table (GGML_GELU_FP16), an error
    of some 1e-3 of the branch, which would hide a wrong conversion.
    """
    import torch

    branch = 0.1 if model.config.model_type.startswith("gemma") else 0.25
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if weight.dim() == 1:
                gemma_branch = "gemma" in model.config.model_type and ".post_" in name
                weight.add_(noise * 0.1 - (1 - branch if gemma_branch else 0))
            else:
                ends_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
                weight.copy_(noise * weight.shape[1] ** -0.5 * (branch if ends_branch else 1))


# -- tokenizer ------------------------------------------------------------


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each of the 256 bytes, by byte value."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(spare)) for byte in range(256)]


def byte_token(byte: int) -> int:
    """The token of one byte."""
    return vocabulary().index(_byte_symbols()[byte])


def vocabulary() -> list[str]:
    """All 300 tokens in order of their ids."""
    return [*_byte_symbols(), *(merge.replace(" ", "") for merge in _MERGES), *SPECIAL]


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = {token: number for number, token in enumerate(vocabulary())}
    merges = [(left, right) for left, right in (merge.split(" ") for merge in _MERGES)]
    tokenizer = Tokenizer(models.BPE(tokens, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[3],
        additional_special_tokens=[SPECIAL[1]],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def _add_tokenizer(writer: Any) -> None:
    from gguf import TokenType

    normal, control = int(TokenType.NORMAL), int(TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary())
    writer.add_token_types([normal] * (VOCABULARY - 4) + [control] * 4)
    writer.add_token_merges(list(_MERGES))
    writer.add_bos_token_id(END_OF_TEXT)
    writer.add_eos_token_id(IM_END)
    writer.add_pad_token_id(PAD)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


# -- GGUF -----------------------------------------------------------------


def write_model_gguf(path: Path, arch: str, model: Any) -> None:
    """Write a transformers model of one of the architectures as an F32 GGUF."""
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map

    config = model.config
    names = get_tensor_name_map(MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    writer = GGUFWriter(path, arch)
    _add_shape(writer, arch, config)
    _add_tokenizer(writer)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ValueError(f"{name} has no name in GGUF's {arch}")
        writer.add_tensor(target, _arranged(arch, config, name, tensor.detach().float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _arranged(arch: str, config: Any, name: str, weight: Any) -> Any:
    """The weight as GGUF stores it: Q and K interleaved for llama, Gemma's norms raised by 1."""
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return weight + 1
    if arch == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        halves = weight.reshape(heads, 2, -1, weight.shape[-1])
        return halves.swapaxes(1, 2).reshape(weight.shape).copy()
    return weight


def _add_shape(writer: Any, arch: str, config: Any) -> None:
    rope = config.rope_parameters
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name("tiny")  # llama.cpp looks for Phi 3's own tokens in a model of its name
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_file_type(0)
    if arch.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch == "gemma3":
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])


# -- adapters -------------------------------------------------------------


def build_adapter(
    model: TinyModel, folder: Path, seed: int = 1, dtype: str = "float32", **lora: Any
) -> Path:
    """A PEFT folder with random A and B, both far from zero; `lora` goes to LoraConfig.

    Without target_modules all linear layers of the blocks are adapted, with r=4, alpha=8.
    """
    peft_model = peft_model_of(model, seed, dtype, **lora)
    peft_model.save_pretrained(folder)
    return folder


def peft_model_of(model: TinyModel, seed: int = 1, dtype: str = "float32", **lora: Any) -> Any:
    """The PEFT model that `build_adapter` saves; its base is a copy of the tiny model."""
    import torch
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": linear_modules(model.arch),
        "task_type": "CAUSAL_LM",
    }
    torch.manual_seed(seed)
    peft_model = get_peft_model(model.copy_of_model(), LoraConfig(**(settings | lora))).eval()
    with torch.no_grad():
        for name, weight in peft_model.named_parameters():
            if "lora_" in name:
                random = torch.randn(weight.shape) * (0.3 if "lora_A" in name else 0.1)
                weight.data = random.to(getattr(torch, dtype))
    return peft_model


def lora_settings(arch: str) -> dict[str, dict[str, Any]]:
    """LoRA settings by name; but for the first, lora_alpha / r alone is not the scale."""
    first, *_, last = linear_modules(arch)
    return {
        "plain": {},
        "rslora": {"use_rslora": True},
        "mixed ranks": {"rank_pattern": {first: 6, rf"layers\.1\.mlp\.{last}": 2}},
        "alpha pattern": {"alpha_pattern": {first: 5, f"model.layers.2.mlp.{last}": 3.5}},
        "rslora, mixed ranks": {"use_rslora": True, "rank_pattern": {first: 3, last: 7}},
        "everything": {
            "use_rslora": True,
            "lora_alpha": 3,
            "rank_pattern": {first: 3, last: 7},
            "alpha_pattern": {rf"layers\.[01]\.self_attn\.{first}": 11, last: -2},
        },
    }


def peft_deltas(model: TinyModel, folder: Path, base: Any = None) -> dict[str, Any]:
    """Module name to the update that PEFT would merge, by PEFT's own code, out×in."""
    from peft import PeftModel

    peft_model = PeftModel.from_pretrained(base or model.copy_of_model(), folder)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        .detach()
        .float()
        .numpy()
        for name, module in peft_model.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", {})
    }


def relative_error(got: Any, expected: Any) -> float:
    """The difference's Frobenius norm over that of `expected`."""
    import numpy as np

    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


class TinyZoo:
    """Builds each model and adapter once and keeps it for the session."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._models: dict[tuple[str, str], TinyModel] = {}
        self._adapters: dict[tuple[str, str], Path] = {}

    def model(self, arch: str, **changes: Any) -> TinyModel:
        """A tiny model; the same call gives the same object."""
        key = (arch, repr(sorted(changes.items())))
        if key not in self._models:
            self._models[key] = build(arch, self._new_folder(arch), **changes)
        return self._models[key]

    def adapter(self, arch: str, **settings: Any) -> Path:
        """A PEFT folder for the tiny model; read it, and copy it before changing it."""
        key = (arch, repr(sorted(settings.items())))
        if key not in self._adapters:
            target = self._new_folder(f"{arch}-adapter")
            self._adapters[key] = build_adapter(self.model(arch), target, **settings)
        return self._adapters[key]

    def _new_folder(self, name: str) -> Path:
        folder = self._folder / f"{len(self._models) + len(self._adapters):03d}-{name}"
        folder.mkdir(parents=True)
        return folder


ModelFactory = Callable[..., TinyModel]
AdapterFactory = Callable[..., Path]
