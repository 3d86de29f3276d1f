"""PEFT LoRA folders: pairs with their true scale, and a list of what GGUF cannot hold.

What a setting does to the maths was read in PEFT's own source (0.21, tuners/lora):

* A is r×in and B out×r, whatever the base stores; `fan_in_fan_out` transposes the base
  weight, so that it changes neither.
* The scale is alpha / r, or alpha / sqrt(r) with `use_rslora`.
* `rank_pattern` and `alpha_pattern` are tried in the file's order; the first key that, as a
  regular expression, matches the module's name or its end behind a dot, wins.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import FileFormatError, UnsupportedError
from ..files import PathLike, folder_remedy, parse_json, read_text
from . import safetensors_file
from .keys import module_of, of_senses, plain, within_peft
from .patterns import Patterns

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MLX_WEIGHTS = "adapters.safetensors"
_BASE_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Settings of PEFT that change what the adapter computes, beside the plain low-rank update.
_CHANGES_MATHS: Mapping[str, str] = {
    "use_dora": "DoRA rescales the whole weight, which is no low-rank update",
    "modules_to_save": "whole modules were trained, and a LoRA file holds only pairs",
    "trainable_token_indices": "token embeddings were trained",
    "target_parameters": "bare parameters were adapted, as in MoE experts",
    "layer_replication": "the adapter belongs to a model with repeated layers",
    "alora_invocation_tokens": "aLoRA works only behind its invocation tokens",
    "invocation_string": "aLoRA works only behind its invocation string",
    "use_qalora": "QA-LoRA pools its input in groups",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "arrow_config": "Arrow routes every token among several adapters",
    "kasa_config": "KaSA truncates the base weight and adds a diagonal",
    "monteclora_config": "MonteCLoRA samples its weights",
    "lora_bias": "a bias was trained, and a LoRA file has none",
    "megatron_config": "the adapter is for Megatron's parallel layers",
}
# Settings that concern training, saving or the choice of modules: the saved pairs tell all.
_HARMLESS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "enable_lora",
        "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
        "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
        "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
        "merge_weights", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
        "alpha_pattern", "revision", "runtime_config", "target_modules", "task_type",
        "use_rslora", "velora_config",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Refusal:
    """One thing that a GGUF LoRA cannot represent, why, and what to do where that is special."""

    item: str
    reason: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class PeftPair:
    """A (r×in) and B (out×r) of one module in float32, and the types they are stored in."""

    a: npt.NDArray[np.float32]
    b: npt.NDArray[np.float32]
    dtypes: tuple[str, str]


@dataclass(frozen=True)
class PeftConfig:
    """The settings that decide the scale, and the whole adapter_config.json as text."""

    text: str
    r: int
    alpha: float
    rslora: bool
    rank_pattern: Patterns[int]
    alpha_pattern: Patterns[float]

    def rank(self, module: str) -> int:
        """The rank that PEFT gives a module (its name without "base_model.model.")."""
        return self.rank_pattern.get(module, self.r)

    def scale(self, module: str) -> float:
        """The factor that PEFT puts before B A of a module."""
        alpha, rank = self.alpha_pattern.get(module, self.alpha), self.rank(module)
        return float(alpha / math.sqrt(rank) if self.rslora else alpha / rank)


@dataclass(frozen=True)
class PeftAdapter:
    """A PEFT folder in memory.

    Attributes:
        source: the folder, for messages.
        pairs: full module name ("base_model.model.model.layers.0...") to its pair.
        metadata: the safetensors file's own.
        refusals: what cannot be represented; empty for a plain LoRA.
        left_out: tensors of a vision or audio part that were left out on demand.
    """

    source: str
    config: PeftConfig
    pairs: Mapping[str, PeftPair]
    metadata: Mapping[str, str]
    refusals: tuple[Refusal, ...] = ()
    left_out: int = 0


def read_peft(folder: PathLike, *, text_only: bool = False) -> PeftAdapter:
    """Read a PEFT folder: adapter_config.json and adapter_model.safetensors.

    What a GGUF LoRA cannot hold is returned in `refusals`, for one message with all of it.

    Args:
        text_only: leave out what belongs to a vision or audio part.

    Raises:
        FileFormatError: a file is missing, malformed, or contradicts the other.
        UnsupportedError: no LoRA, or its weights are pickled.
    """
    folder = Path(folder)
    values, text = read_config(folder)
    kind = values.get("peft_type")
    if not isinstance(kind, str):
        raise FileFormatError(f"{folder / CONFIG}: has no 'peft_type'", "Give a PEFT folder")
    if kind != "LORA":
        raise UnsupportedError(
            f"{folder}: cannot be a GGUF LoRA: peft_type is {kind}, only LORA has A and B pairs"
        )
    refused = setting_refusals(_text_settings(values) if text_only else values)
    config = parse_config(values, text, folder / CONFIG)
    weights = folder / WEIGHTS
    if not weights.exists() and (folder / PICKLE).exists():
        refused.append(Refusal(PICKLE, "a pickle can run code; save it again as safetensors"))
        raise unsupported(str(folder), refused)
    require_weights(weights, MLX_WEIGHTS, "MLX")
    tensors, metadata = safetensors_file.read(weights)
    pairs, tensor_refusals, left_out = collect(weights, tensors, _PEFT, config, text_only)
    refused += tensor_refusals
    adapter = PeftAdapter(str(folder), config, pairs, metadata, tuple(refused), left_out)
    check_values(adapter, weights)
    return adapter


def require_weights(weights: Path, other: str, kind: str) -> None:
    """Say what lies there in place of an adapter's weights.

    Args:
        other: what the weights are called of the other kind of adapter.
    """
    if weights.exists():
        return
    if parts := sorted(weights.parent.glob(f"{weights.stem}-*-of-*.safetensors")):
        raise UnsupportedError(
            f"{weights.parent}: its weights are split into {len(parts)} files",
            "Save the adapter again in one file: save_pretrained(..., max_shard_size='100GB')",
        )
    if (weights.parent / other).exists():
        raise FileFormatError(
            f"{weights.parent}: {other} is {kind}'s, and {CONFIG} is not",
            "The two files do not belong together: save the adapter again",
        )


def unsupported(source: str, refusals: Iterable[Refusal]) -> UnsupportedError:
    """One error that names every item under its reason."""
    refusals = list(refusals)
    remedies = {refusal.remedy for refusal in refusals}
    default = "Train or save the adapter without these, or merge it into its base first"
    return UnsupportedError(
        f"{source}: cannot be a GGUF LoRA: {listed(refusals)}",
        remedies.pop() if len(remedies) == 1 and "" not in remedies else default,
    )


def listed(refusals: Iterable[Refusal]) -> str:
    """Every item with its reason, those of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for refusal in refusals:
        by_reason.setdefault(refusal.reason, []).append(refusal.item)
    return "; ".join(
        f"{', '.join(collapse_layers(items))}: {reason}" for reason, items in by_reason.items()
    )


def collapse_layers(names: Iterable[str]) -> list[str]:
    """Names that differ only in a layer's number, as one: "layers.0-29.self_attn.q_proj"."""
    numbers: dict[tuple[str, str], list[int]] = {}
    result: dict[tuple[str, str] | str, str] = {}
    for name in names:
        match = re.search(r"\b((?:layers|blk)\.)(\d{1,6})\.", name)
        if not match:
            result[name] = name
            continue
        key = (name[: match.end(1)], name[match.end(2) :])
        numbers.setdefault(key, []).append(int(match.group(2)))
        result[key] = f"{key[0]}{_ranges(numbers[key])}{key[1]}"
    return list(result.values())


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


# -- the config -----------------------------------------------------------


def parse_config(values: Mapping[str, Any], text: str, path: PathLike) -> PeftConfig:
    """The settings that decide the scale, each of the right kind and size, or FileFormatError."""

    def fail(name: str, value: Any, wanted: str) -> FileFormatError:
        return FileFormatError(f"{path}: '{name}' is {value!r}, not {wanted}", "Correct it")

    def rank(name: str, value: Any) -> int:
        if type(value) is not int or not 0 < value < 1 << 20:
            raise fail(name, value, "a positive whole number")
        return value

    def alpha(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise fail(name, value, "a number")
        if value == 0 or not abs(value) < 1e30:
            raise fail(name, value, "finite and different from 0")
        return float(value)

    rslora = values.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise fail("use_rslora", rslora, "true or false")
    return PeftConfig(
        text=text,
        r=rank("r", values.get("r", 8)),
        alpha=alpha("lora_alpha", values.get("lora_alpha", 8)),
        rslora=rslora,
        rank_pattern=_pattern(values, "rank_pattern", rank, path, fail),
        alpha_pattern=_pattern(values, "alpha_pattern", alpha, path, fail),
    )


def _pattern(
    values: Mapping[str, Any],
    name: str,
    parse: Callable[[str, Any], Any],
    path: PathLike,
    fail: Callable[[str, Any, str], FileFormatError],
) -> Patterns[Any]:
    pattern = values.get(name) or {}
    if not isinstance(pattern, dict):
        raise fail(name, pattern, "a table of module names")
    parsed = {key: parse(f"{name}[{key}]", value) for key, value in pattern.items()}
    return Patterns(parsed, f"{path}: '{name}'")


def setting_refusals(values: Mapping[str, Any]) -> list[Refusal]:
    """Every setting of an adapter_config.json that asks for more than a low-rank update."""
    found = [Refusal(key, why) for key, why in _CHANGES_MATHS.items() if values.get(key)]
    if values.get("bias", "none") not in ("none", None, False):
        found.append(Refusal(f"bias={values['bias']}", "biases were trained, a LoRA file has none"))
    start = str(values.get("init_lora_weights")).lower()
    if start.startswith(_BASE_CHANGED):
        found.append(
            Refusal(
                f"init_lora_weights={start}",
                "it changed the base weights, so the pairs do not fit the original model (PEFT's "
                "save_pretrained converts them, with path_initial_model_for_weight_conversion)",
            )
        )
    known = _HARMLESS | set(_CHANGES_MATHS)
    for key, value in values.items():
        if value and key not in known and key.startswith("use_") | key.endswith("_config"):
            found.append(Refusal(key, "this version does not know what the setting changes"))
    return found


def _text_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without whole modules of a vision or audio part, which are left out."""
    saved = values.get("modules_to_save")
    kept = (
        [name for name in saved if not of_senses(str(name))] if isinstance(saved, list) else saved
    )
    return {**values, "modules_to_save": kept}


def read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """The settings in an adapter's folder, and their text."""
    if not folder.is_dir():
        kind = "a file, not a folder" if folder.exists() else "not a folder"
        raise FileFormatError(
            f"{folder}: {kind}", f"Give the folder that holds the adapter and its {CONFIG}"
        )
    path = folder / CONFIG
    if not path.exists():
        inside = sorted(file.parent for file in folder.glob(f"*/{CONFIG}"))
        remedy = f"Did you mean {inside[0]}?" if inside else "Give the folder that PEFT wrote"
        remedy = folder_remedy(folder, remedy)
        raise FileFormatError(f"{path}: no such file", remedy)
    try:
        text = read_text(path)
        values = parse_json(text)
    except ValueError as error:
        raise FileFormatError(f"{path}: not JSON ({error})", "Save the adapter again") from error
    if not isinstance(values, dict):
        raise FileFormatError(f"{path}: not a table of settings", "Save the adapter again")
    return values, text


# -- the tensors ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layout:
    """How a kind of adapter names its halves, and whether it stores them as x A B, transposed."""

    half: re.Pattern[str]
    names: tuple[str, str]
    transposed: bool = False


_PEFT = Layout(re.compile(r"(.+)\.lora_([AB])\.weight"), ("A", "B"))
_Halves: TypeAlias = dict[str, dict[str, safetensors_file.StoredTensor]]


def collect(
    path: Path,
    tensors: Mapping[str, safetensors_file.StoredTensor],
    layout: Layout,
    config: PeftConfig,
    text_only: bool,
) -> tuple[dict[str, PeftPair], list[Refusal], int]:
    """The pairs by module, what cannot be one, and how many tensors were left out."""
    if not tensors:
        raise FileFormatError(f"{path}: holds no tensors", "Save the adapter again")
    senses = {name: None for name in tensors if of_senses(name)}
    refused = _senses_refused(list(senses), len(tensors), text_only)
    halves: _Halves = {}
    wrapped: dict[str, str] = {}
    for name in tensors:
        if name in senses or name.endswith(".base_layer.weight"):
            continue  # PEFT saves a targeted output's own weight with it, frozen as it was
        match = layout.half.fullmatch(name)
        if refusal := _tensor_refusal(name, tensors[name], bool(match)):
            refused.append(refusal)
        elif match:
            module = plain(match.group(1))
            first = wrapped.setdefault(module, match.group(1))
            if first != match.group(1):
                refused.append(Refusal(name, f"without wrappers it is the same as '{first}'"))
            halves.setdefault(module, {})[match.group(2)] = tensors[name]
    refused += _patterns_refused(wrapped, config)
    pairs, missing = _paired(halves, layout)
    return pairs, [*refused, *missing], len(senses)


def _paired(halves: _Halves, layout: Layout) -> tuple[dict[str, PeftPair], list[Refusal]]:
    pairs, refused = {}, []
    for module, found in halves.items():
        if absent := [name for name in layout.names if name not in found]:
            refused.append(Refusal(module, f"its lora_{absent[0]} half is missing"))
            continue
        a, b = (found[name] for name in layout.names)
        values = a.floats(), b.floats()
        if layout.transposed:
            values = np.ascontiguousarray(values[0].T), np.ascontiguousarray(values[1].T)
        pairs[module] = PeftPair(*values, (a.dtype, b.dtype))
    return pairs, refused


def _senses_refused(names: list[str], total: int, text_only: bool) -> list[Refusal]:
    count = f"{len(names)} tensor{'s' * (len(names) > 1)}"
    what = f"{count} such as {names[0]}" if names else ""
    if text_only and len(names) == total:
        return [Refusal(what, "nothing is for the text model", "Train an adapter of that")]
    if text_only or not names:
        return []
    why = "they belong to the vision or audio part, and llama.cpp adapts the text model alone"
    return [Refusal(what, why, "Convert with --text-only, which leaves them out")]


def _patterns_refused(wrapped: Mapping[str, str], config: PeftConfig) -> list[Refusal]:
    """Modules whose scale depends on whether PEFT saw the wrappers, too."""
    return [
        Refusal(key, "with its wrapper's name it has another rank or alpha pattern than without")
        for module, key in wrapped.items()
        if any(of(within_peft(key)) != of(module_of(module)) for of in (config.rank, config.scale))
    ]


_TENSOR_REASONS = (
    (r"lora_magnitude_vector", "DoRA's magnitudes are no low-rank update"),
    (r"lora_embedding_[AB]|embed_tokens", "llama.cpp's LoRA does not cover embeddings here"),
    (r"\.experts\b|block_sparse_moe|switch_mlp", "MoE experts are stored together in GGUF"),
    (r"modules_to_save", "whole modules were trained, and a LoRA file holds only pairs"),
    (r"norm\b", "llama.cpp silently skips norm weights"),
    (r"bias\b", "biases were trained, a LoRA file has none"),
    (r"lora_[AB]\.[^.]+\.weight", "the adapter's name is in it; save with PEFT's save_pretrained"),
)


def _tensor_refusal(
    name: str, tensor: safetensors_file.StoredTensor, is_half: bool
) -> Refusal | None:
    """Why a tensor cannot be converted; None where it can."""
    for pattern, reason in _TENSOR_REASONS:
        if re.search(pattern, name):
            return Refusal(name, reason)
    if not is_half:
        return Refusal(name, "it is no half of a LoRA pair")
    if not tensor.readable:
        return Refusal(
            name,
            f"it is stored as {tensor.dtype}, not as F32, F16 or BF16",
            "Save the adapter in float32 (model.to(torch.float32) before save_pretrained)",
        )
    if len(tensor.shape) != 2:
        return Refusal(name, "it has not two dimensions, as a linear layer's has")
    return None


def check_values(adapter: PeftAdapter, path: Path) -> None:
    """Raise FileFormatError for ranks that contradict each other and for NaN or infinity."""
    for key, pair in adapter.pairs.items():
        ranks = pair.a.shape[0], pair.b.shape[1]
        wanted = adapter.config.rank(module_of(key))
        if ranks != (wanted, wanted):
            raise FileFormatError(
                f"{path}: '{key}' has rank {ranks[0]} in lora_A and {ranks[1]} in lora_B, "
                f"and {CONFIG} says {wanted}",
                "The two files do not belong together: save the adapter again",
            )
        for half, values in (("lora_A", pair.a), ("lora_B", pair.b)):
            if not np.isfinite(values).all():
                raise FileFormatError(
                    f"{path}: '{key}.{half}.weight' holds NaN or infinity",
                    "The training diverged or the file is corrupt: make the adapter again",
                )
