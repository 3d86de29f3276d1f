"""GGUF LoRA to a PEFT folder.

A file that `to_gguf` wrote carries its PEFT config and what the way back needs, under
`safegene.peft.*`. The way back uses them only where converting its result again would give
this file; a GGUF LoRA from elsewhere, or one changed since, gets a config of its own.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from ..aliases import Floats
from ..compat import open_model, require_fit
from ..errors import SafeGeneError
from ..files import PathLike, atomic_folder, check_folder, parse_json
from ..gene import Adapter, Pair
from . import safetensors_file
from .keys import MODULE_PREFIX, module_of
from .names import BaseNames
from .peft import (
    CONFIG,
    WEIGHTS,
    PeftAdapter,
    PeftPair,
    Refusal,
    parse_config,
    setting_refusals,
    unsupported,
)
from .to_gguf import HALF_PRECISION, KEY, factor_of, to_gguf

_ROUNDING, _TINY = 1e-6, 1e-45  # a few float32 steps; the smallest float32


def to_peft(adapter_gguf: PathLike, base: PathLike, output_dir: PathLike) -> None:
    """Turn a GGUF LoRA into a PEFT folder that PEFT loads.

    Converting it again gives the same tensors, and where pairs ask for different alphas, the
    same but for rounding in the last place of a float32.

    Args:
        adapter_gguf: a GGUF LoRA, from here or from elsewhere.
        base: the GGUF model that the adapter is for.
        output_dir: a folder that does not exist yet, or is empty; it appears whole or not at all.

    Raises:
        FileFormatError, UnsupportedError, MismatchError, OutputError: as for `convert`.
    """
    check_folder(output_dir)
    adapter = Adapter.load(adapter_gguf)
    model = open_model(base)
    names = BaseNames(model)
    require_fit(adapter, model, adapter_gguf)
    _write_folder(_restored(adapter, names) or _described(adapter, names), output_dir)


def _restored(adapter: Adapter, names: BaseNames) -> PeftAdapter | None:
    """The PEFT adapter that the file was made from; None where the record does not lead there."""
    try:
        source = _from_record(adapter, names)
        if source is None or not _same(to_gguf(source, names), adapter):
            return None
    # The record is a claim by a file that anyone may have edited: whatever is wrong with it,
    # the tensors themselves are sound, and the adapter gets a config of its own.
    except (ValueError, TypeError, KeyError, AttributeError, SafeGeneError):
        return None
    return source


def _from_record(adapter: Adapter, names: BaseNames) -> PeftAdapter | None:
    extra, tensors = adapter.extra, list(adapter.pairs)
    text = extra.get(f"{KEY}config")
    if not isinstance(text, str) or extra.get(f"{KEY}pairs") != len(tensors):
        return None
    values = parse_json(text)
    if setting_refusals(values):
        return None
    config = parse_config(values, text, "the adapter's record")
    dtypes = extra.get(f"{KEY}dtypes") or [extra[f"{KEY}dtype"]] * len(tensors)
    modules = extra.get(f"{KEY}modules") or [
        MODULE_PREFIX + names.modules[name] for name in tensors
    ]
    folded = frozenset(extra.get(f"{KEY}folded", []))
    pairs = {}
    for tensor, module, dtype in zip(tensors, modules, dtypes, strict=True):
        pair, (dtype_a, dtype_b) = adapter.pairs[tensor], dtype.split("/")
        b = pair.b.astype(np.float32)
        if tensor in folded:
            wanted = config.scale(module_of(module)) * pair.rank
            b = _unfolded(b, factor_of(wanted, pair.rank, adapter.alpha), dtype_b)
        b = names.to_hf_rows(tensor, b)
        pairs[module] = PeftPair(pair.a.astype(np.float32), b, (dtype_a, dtype_b))
    return PeftAdapter("the adapter", config, pairs, _origin(adapter))


def _unfolded(b: Floats, factor: float, dtype: str) -> Floats:
    """B without the factor: as it was in float16 and bfloat16, within a float32 step else."""
    with np.errstate(over="ignore"):
        plain = (b / np.float64(factor)).astype(np.float32)
        return safetensors_file.as_dtype(plain, dtype).astype(np.float32)


def _same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters are the same but for rounding in float32."""
    return (
        one.alpha == other.alpha
        and one.pairs.keys() == other.pairs.keys()
        and all(_alike(pair, other.pairs[name]) for name, pair in one.pairs.items())
    )


def _alike(one: Pair, other: Pair) -> bool:
    halves = ((one.a, other.a), (one.b, other.b))
    return all(
        a.dtype == b.dtype and a.shape == b.shape and np.allclose(a, b, rtol=_ROUNDING, atol=_TINY)
        for a, b in halves
    )


def _origin(adapter: Adapter) -> dict[str, str]:
    """The safetensors metadata: PEFT's own, and which tensors were F16 in the GGUF."""
    halves = [
        f"{name}.{half}"
        for name, pair in adapter.pairs.items()
        for half, values in (("lora_a", pair.a), ("lora_b", pair.b))
        if values.dtype == np.float16
    ]
    return {"format": "pt"} | ({HALF_PRECISION: " ".join(halves)} if halves else {})


def _described(adapter: Adapter, names: BaseNames) -> PeftAdapter:
    """A PEFT adapter with a config of its own, for a GGUF LoRA that records none."""
    unknown = [name for name in adapter.pairs if name not in names.modules]
    if unknown:
        raise unsupported(
            "the adapter", [Refusal(name, "no linear layer of transformers") for name in unknown]
        )
    pairs = {
        MODULE_PREFIX + names.modules[name]: PeftPair(
            pair.a.astype(np.float32),
            names.to_hf_rows(name, pair.b.astype(np.float32)),
            (_dtype(pair.a), _dtype(pair.b)),
        )
        for name, pair in adapter.pairs.items()
    }
    values = _own_config(adapter, names)
    text = json.dumps(values, indent=2) + "\n"
    config = parse_config(values, text, "the adapter")
    return PeftAdapter("the adapter", config, pairs, _origin(adapter))


def _dtype(values: npt.NDArray[Any]) -> str:
    return "F16" if values.dtype == np.float16 else "F32"


def _own_config(adapter: Adapter, names: BaseNames) -> dict[str, Any]:
    ranks = {names.modules[name]: pair.rank for name, pair in adapter.pairs.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: value for module, value in ranks.items() if value != rank}
    alpha = adapter.alpha or float(rank)  # 0 in GGUF means a scale of 1
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "rank_pattern": others,
        "alpha_pattern": {} if adapter.alpha else dict(others),
        "target_modules": _target_modules(list(ranks), names),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _target_modules(modules: list[str], names: BaseNames) -> list[str]:
    """Short names where they mean exactly these modules, else the full ones."""
    short = sorted({module.rpartition(".")[2] for module in modules})
    covered = [path for path in names.modules.values() if path.rpartition(".")[2] in short]
    return short if sorted(covered) == sorted(modules) else sorted(modules)


# -- folders --------------------------------------------------------------


def _write_folder(peft: PeftAdapter, folder: PathLike) -> None:
    tensors = {}
    for key, pair in sorted(peft.pairs.items()):
        halves = (("A", pair.a, pair.dtypes[0]), ("B", pair.b, pair.dtypes[1]))
        for half, values, dtype in halves:
            tensors[f"{key}.lora_{half}.weight"] = safetensors_file.as_dtype(values, dtype)
    with atomic_folder(folder) as temporary:
        (temporary / CONFIG).write_text(peft.config.text, encoding="utf-8")
        safetensors_file.write(temporary / WEIGHTS, tensors, dict(peft.metadata))
