"""MLX LoRA folders, as `mlx_lm.lora` writes them, read as the PEFT adapters they are equal to.

mlx-lm (mlx_lm/tuner/lora.py) computes  W x + scale·(x A) B  with A in×r and B r×out: both are the
transposes of PEFT's, and its `scale` is PEFT's alpha / r. It ignores an `alpha` in old configs.
Modules are named, and rows ordered, as in the Hugging Face model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import FileFormatError, UnsupportedError
from . import safetensors_file
from .keys import MODULE_PREFIX
from .peft import (
    CONFIG,
    MLX_WEIGHTS,
    WEIGHTS,
    Layout,
    PeftAdapter,
    PeftConfig,
    Refusal,
    check_values,
    collect,
    parse_config,
    read_config,
    require_weights,
    unsupported,
)

_LAYOUT = Layout(re.compile(r"(.+)\.lora_([ab])"), ("a", "b"), transposed=True)
_KINDS = {
    "dora": "DoRA rescales the whole weight, which is no low-rank update",
    "full": "the weights themselves were trained, and a LoRA file holds only pairs",
}


def is_mlx(folder: Path, values: Mapping[str, Any]) -> bool:
    """Whether an adapter's folder, with these settings, is MLX's and not PEFT's."""
    if "peft_type" in values:
        return False
    return "lora_parameters" in values or (folder / MLX_WEIGHTS).is_file()


def read_mlx(folder: Path, *, text_only: bool = False) -> PeftAdapter:
    """Read adapter_config.json and adapters.safetensors.

    Args:
        text_only: leave out what belongs to a vision part.

    Raises:
        FileFormatError: a file is missing, malformed, or contradicts the other.
        UnsupportedError: no LoRA.
    """
    values, _ = read_config(folder)
    kind = values.get("fine_tune_type") or ("dora" if values.get("use_dora") else "lora")
    if kind != "lora":
        why = _KINDS.get(str(kind), "only 'lora' has A and B pairs")
        raise unsupported(str(folder), [Refusal(f"fine_tune_type={kind}", why)])
    rank, scale = _numbers(values, folder / CONFIG)
    weights = folder / MLX_WEIGHTS
    require_weights(weights, WEIGHTS, "PEFT")
    tensors, _ = safetensors_file.read(weights)
    plain = _config(values, rank, scale, (), weights)  # the same scale for all
    pairs, refused, left_out = collect(weights, tensors, _LAYOUT, plain, text_only)
    config = _config(values, rank, scale, pairs, weights)
    named = {MODULE_PREFIX + module: pair for module, pair in pairs.items()}
    metadata = {"format": "pt"}  # what PEFT would have written
    adapter = PeftAdapter(str(folder), config, named, metadata, tuple(refused), left_out)
    check_values(adapter, weights)
    return adapter


def _numbers(values: Mapping[str, Any], path: Path) -> tuple[int, float]:
    """The rank and the scale; the pairs themselves are checked against the rank."""
    table = values.get("lora_parameters")
    if not isinstance(table, dict):
        raise UnsupportedError(
            f"{path}: has no 'lora_parameters', which hold an adapter's rank and scale",
            "Give the folder of an adapter that mlx_lm.lora trained",
        )
    rank, scale = table.get("rank"), table.get("scale")
    if type(rank) is not int or not 0 < rank < 1 << 20:
        raise _wrong(path, "rank", rank, "a positive whole number")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise _wrong(path, "scale", scale, "a number")
    if scale == 0 or not abs(scale) < 1e30:
        raise _wrong(path, "scale", scale, "finite and different from 0")
    return rank, float(scale)


def _wrong(path: Path, name: str, value: Any, wanted: str) -> FileFormatError:
    return FileFormatError(
        f"{path}: 'lora_parameters.{name}' is {value!r}, not {wanted}",
        "Give the folder that mlx_lm.lora wrote",
    )


def _config(
    values: Mapping[str, Any], rank: int, scale: float, modules: Iterable[str], path: Path
) -> PeftConfig:
    """The settings of PEFT that mean the same; `to_peft` writes them."""
    alpha, model = scale * rank, values.get("model")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model if isinstance(model, str) else None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    return parse_config(settings, json.dumps(settings, indent=2) + "\n", path)
