"""PEFT LoRA to GGUF LoRA, and back.

llama.cpp multiplies every pair by alpha / r, with one alpha a file. A pair whose PEFT scale
is s therefore asks for alpha = s·r. Where all pairs ask for the same, A and B are written as
they are. Otherwise the alpha that most pairs ask for is written, and the others get the
missing factor multiplied into B.

A converted file carries its PEFT config and what the way back needs, under
`safegene.peft.*`. The way back uses them only where converting its result again would give
this very file; a GGUF LoRA from elsewhere, or one changed since, gets a config of its own.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..compat import open_model, require_fit
from ..errors import FileFormatError, MismatchError, SafeGeneError
from ..files import PathLike, atomic_folder, check_folder, check_output, sha256
from ..gene import OUTSIDE_BLOCKS, Adapter, Pair, layer_of
from . import safetensors_file
from .names import BaseNames, is_linear_layer
from .peft import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    PeftAdapter,
    PeftPair,
    Refusal,
    collapse_layers,
    module_of,
    parse_config,
    read_peft,
    setting_refusals,
    unsupported,
)

KEY = "safegene.peft."
HALF_PRECISION = "safegene.gguf.f16"  # in safetensors: the tensors that were F16 in the GGUF


def convert(peft_dir: PathLike, base: PathLike, output: PathLike | None = None) -> Adapter:
    """Turn a PEFT LoRA folder into a GGUF LoRA, and write it where `output` is given.

    Args:
        peft_dir: the folder with adapter_config.json and adapter_model.safetensors.
        base: the GGUF model that the adapter is for; names, shapes and row order come from it.
        output: the GGUF file to write, atomically; tensors are F32.

    Raises:
        FileFormatError: an input is missing, malformed, or contradicts itself.
        UnsupportedError: names everything that a GGUF LoRA cannot represent.
        MismatchError: names what does not fit the base: it is for another size or family.
        OutputError: the output cannot be written, or is an input.
    """
    inputs = [base, Path(peft_dir) / CONFIG, Path(peft_dir) / WEIGHTS]
    if output is not None:
        check_output(output, inputs)
    source = read_peft(peft_dir)
    adapter = _to_gguf(source, BaseNames(open_model(base)))
    adapter = replace(adapter, extra={**adapter.extra, f"{KEY}sha256": sha256(inputs[2])})
    if output is not None:
        adapter.save(output, inputs)
    return adapter


def to_peft(adapter_gguf: PathLike, base: PathLike, output_dir: PathLike) -> None:
    """Turn a GGUF LoRA into a PEFT folder that PEFT loads; converting it again is exact.

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


# -- PEFT to GGUF ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Update:
    """One pair on its way: B in GGUF's row order, and the alpha that its scale asks for."""

    module: str
    tensor: str
    a: npt.NDArray[np.float32]
    b: npt.NDArray[np.float32]
    dtypes: tuple[str, str]
    alpha: float


def _to_gguf(source: PeftAdapter, names: BaseNames) -> Adapter:
    updates = sorted(_mapped(source, names), key=lambda u: _file_order(u.tensor))
    alpha = _global_alpha(updates)
    half = set(source.metadata.get(HALF_PRECISION, "").split())
    pairs: dict[str, Pair] = {}
    folded: dict[str, str] = {}
    for update in updates:
        b, factor = update.b, _factor(update.alpha, update.b.shape[1], alpha)
        if factor != 1.0:
            b = _folded(source, update, factor)
            folded[update.tensor] = _lost_in_folding(update, b, factor)
        pairs[update.tensor] = Pair(
            _stored(update.a, f"{update.tensor}.lora_a" in half),
            _stored(b, f"{update.tensor}.lora_b" in half),
        )
    return Adapter(names.architecture, alpha, pairs, _record(source, names, updates, folded))


def _mapped(source: PeftAdapter, names: BaseNames) -> list[_Update]:
    """Every pair under its GGUF name, or an error that names all that cannot be placed."""
    refused, misfits = list(source.refusals), []
    updates: dict[str, _Update] = {}
    for key, pair in source.pairs.items():
        module = module_of(key)
        tensor = names.tensor(module)
        shape = pair.b.shape[0], pair.a.shape[1]
        if reason := _refusal(module, tensor, names):
            refused.append(Refusal(module, reason))
        elif tensor in updates:
            refused.append(Refusal(module, f"two modules of the adapter become '{tensor}'"))
        elif reason := _misfit(tensor, shape, names):
            misfits.append(Refusal(module, reason))
        elif tensor:
            b = names.to_gguf_rows(tensor, pair.b)
            alpha = source.config.scale(module) * pair.b.shape[1]
            updates[tensor] = _Update(key, tensor, pair.a, b, pair.dtypes, alpha)
    if refused:
        raise unsupported(source.source, [*refused, *misfits])
    if misfits:
        raise _mismatch(source.source, misfits, names)
    return list(updates.values())


def _refusal(module: str, tensor: str | None, names: BaseNames) -> str:
    if is_linear_layer(module):  # of this family or another: whether it fits is seen below
        return ""
    if tensor is None or (layer_of(tensor) == OUTSIDE_BLOCKS and tensor != "output.weight"):
        return f"GGUF has no linear layer of this name for '{names.architecture}'"
    if tensor == "output.weight" and tensor not in names.model.tensors:
        return "the base's output is tied to its embeddings, llama.cpp cannot change it alone"
    return ""


def _misfit(tensor: str | None, shape: tuple[int, int], names: BaseNames) -> str:
    info = names.model.tensors.get(tensor or "")
    if info is None:
        beyond = tensor and layer_of(tensor) >= names.n_blocks
        return f"the base has {names.n_blocks} blocks" if beyond else "the base has no such layer"
    if info.shape != shape:
        wanted = "×".join(map(str, info.shape))
        return f"the adapter is for {shape[0]}×{shape[1]}, the base has {wanted}"
    return ""


def _mismatch(source: str, misfits: list[Refusal], names: BaseNames) -> MismatchError:
    by_reason: dict[str, list[str]] = {}
    for misfit in misfits:
        by_reason.setdefault(misfit.reason, []).append(misfit.item)
    listed = "; ".join(
        f"{', '.join(collapse_layers(items))}: {why}" for why, items in by_reason.items()
    )
    return MismatchError(
        f"{source} does not fit {names.model.path}: {listed}",
        "Give the model that the adapter was trained on",
    )


def _file_order(tensor: str) -> tuple[int, str]:
    layer = layer_of(tensor)
    return (1 << 30 if layer == OUTSIDE_BLOCKS else layer, tensor)


def _global_alpha(updates: list[_Update]) -> float:
    """The alpha that leaves most tensors untouched, as the float32 that the file holds.

    0 tells llama.cpp to apply B A as it is: right where every scale is 1, whatever the ranks.
    """
    wanted = [float(np.float32(update.alpha)) for update in updates]
    if len(set(wanted)) > 1 and all(u.alpha == u.b.shape[1] for u in updates):
        return 0.0
    return Counter(wanted).most_common(1)[0][0]


def _factor(wanted: float, rank: int, alpha: float) -> float:
    """What B must be multiplied by, where the file's alpha is not the one a pair asks for."""
    if alpha == 0.0:
        return wanted / rank
    return 1.0 if float(np.float32(wanted)) == alpha else wanted / alpha


def _folded(source: PeftAdapter, update: _Update, factor: float) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        b: npt.NDArray[np.float32] = (update.b * np.float64(factor)).astype(np.float32)
    if not np.isfinite(b).all():
        raise FileFormatError(
            f"{source.source}: the scale of '{update.module}' is too large for float32 "
            f"({factor:g} times the file's)",
            "Correct lora_alpha and alpha_pattern",
        )
    return b


def _stored(values: npt.NDArray[np.float32], half: bool) -> npt.NDArray[Any]:
    """F16 where the GGUF that the adapter came from had F16 and nothing is lost by it."""
    if half and np.array_equal(values.astype(np.float16).astype(np.float32), values):
        return values.astype(np.float16)
    return values


# -- the record for the way back ------------------------------------------


def _record(
    source: PeftAdapter, names: BaseNames, updates: list[_Update], folded: Mapping[str, str]
) -> dict[str, Any]:
    """The `safegene.peft.*` keys; what is as expected is left out."""
    dtypes = ["/".join(update.dtypes) for update in updates]
    modules = [update.module for update in updates]
    record: dict[str, Any] = {
        f"{KEY}config": source.config.text,
        f"{KEY}pairs": len(updates),
        f"{KEY}dtype": dtypes[0] if len(set(dtypes)) == 1 else "",
    }
    if len(set(dtypes)) > 1:
        record[f"{KEY}dtypes"] = dtypes
    if modules != [PREFIX + names.modules.get(update.tensor, "") for update in updates]:
        record[f"{KEY}modules"] = modules
    if folded:
        record[f"{KEY}folded"] = list(folded)
        record[f"{KEY}folded_loss"] = list(folded.values())
    return record


def _lost_in_folding(update: _Update, b: npt.NDArray[np.float32], factor: float) -> str:
    """What dividing the factor out again would miss, in float32 steps, packed as text.

    Multiplying a float32 rounds. Dividing gives nearly every number back; a few come out one
    step beside. Noting those steps (usually -1, 0 or 1) makes the way back exact.
    """
    missed = _steps(update.b) - _steps(_unfolded(b, factor, update.dtypes[1]))
    if not missed.any():
        return ""
    return base64.b85encode(zlib.compress(missed.astype("<i4").tobytes(), 9)).decode("ascii")


def _unfolded(b: npt.NDArray[np.float32], factor: float, dtype: str) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        plain = (b / np.float64(factor)).astype(np.float32)
        return safetensors_file.as_dtype(plain, dtype).astype(np.float32)


def _steps(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """float32 numbered in the order of their size, so that neighbours differ by 1."""
    bits = values.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)


def _from_steps(steps: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    bits = np.where(steps < 0, (-(steps + 1)) | 0x80000000, steps)
    return bits.astype(np.uint32).view(np.float32)


# -- GGUF to PEFT ---------------------------------------------------------


def _restored(adapter: Adapter, names: BaseNames) -> PeftAdapter | None:
    """The PEFT adapter that the file was made from; None where the record does not lead there."""
    try:
        source = _from_record(adapter, names)
        if source is None or not _same(_to_gguf(source, names), adapter):
            return None
    # The record is a claim by a file that anyone may have edited: whatever is wrong with it,
    # the tensors themselves are sound, and the adapter gets a config of its own.
    except (ValueError, TypeError, KeyError, AttributeError, zlib.error, SafeGeneError):
        return None
    return source


def _from_record(adapter: Adapter, names: BaseNames) -> PeftAdapter | None:
    extra, tensors = adapter.extra, list(adapter.pairs)
    text = extra.get(f"{KEY}config")
    if not isinstance(text, str) or extra.get(f"{KEY}pairs") != len(tensors):
        return None
    values = json.loads(text)
    if setting_refusals(values):
        return None
    config = parse_config(values, text, "the adapter's record")
    dtypes = extra.get(f"{KEY}dtypes") or [extra[f"{KEY}dtype"]] * len(tensors)
    modules = extra.get(f"{KEY}modules") or [PREFIX + names.modules[name] for name in tensors]
    losses = dict(
        zip(extra.get(f"{KEY}folded", []), extra.get(f"{KEY}folded_loss", []), strict=True)
    )
    pairs = {}
    for tensor, module, dtype in zip(tensors, modules, dtypes, strict=True):
        pair, (dtype_a, dtype_b) = adapter.pairs[tensor], dtype.split("/")
        b = pair.b.astype(np.float32)
        if tensor in losses:
            wanted = config.scale(module_of(module)) * pair.rank
            b = _unfolded(b, _factor(wanted, pair.rank, adapter.alpha), dtype_b)
            b = _with_loss(b, losses[tensor])
        b = names.to_hf_rows(tensor, b)
        pairs[module] = PeftPair(pair.a.astype(np.float32), b, (dtype_a, dtype_b))
    return PeftAdapter("the adapter", config, pairs, _origin(adapter))


def _with_loss(b: npt.NDArray[np.float32], packed: str) -> npt.NDArray[np.float32]:
    if not packed:
        return b
    unpack = zlib.decompressobj()  # bounded: a small text can claim to be gigabytes
    missed = np.frombuffer(unpack.decompress(base64.b85decode(packed), 4 * b.size), "<i4")
    return _from_steps(_steps(b) + missed.reshape(b.shape))


def _same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters have the same alpha and, bit for bit, the same tensors."""

    def bits(adapter: Adapter) -> list[tuple[str, str, bytes, str, bytes]]:
        return sorted(
            (name, pair.a.dtype.str, pair.a.tobytes(), pair.b.dtype.str, pair.b.tobytes())
            for name, pair in adapter.pairs.items()
        )

    return one.alpha == other.alpha and bits(one) == bits(other)


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
    strangers = [name for name in adapter.pairs if name not in names.modules]
    if strangers:
        raise unsupported(
            "the adapter", [Refusal(name, "no linear layer of transformers") for name in strangers]
        )
    pairs = {
        PREFIX + names.modules[name]: PeftPair(
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
