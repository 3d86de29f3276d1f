"""PEFT LoRA to GGUF LoRA.

llama.cpp multiplies every pair by alpha / r, with one alpha a file. A pair whose PEFT scale
is s therefore asks for alpha = s·r. Where all pairs ask for the same, A and B are written as
they are. Otherwise the alpha that most pairs ask for is written, and the others get the
missing factor multiplied into B.

A converted file carries its PEFT config and what the way back needs, under
`safegene.peft.*`; see `to_peft`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..compat import open_model
from ..errors import FileFormatError, MismatchError
from ..files import PathLike, check_output, sha256
from ..gene import Adapter, Pair, layer_of
from ..gene_facts import OUTSIDE_BLOCKS
from .keys import MODULE_PREFIX, module_of
from .mlx import is_mlx, read_mlx
from .names import BaseNames, is_linear_layer
from .peft import (
    CONFIG,
    MLX_WEIGHTS,
    WEIGHTS,
    PeftAdapter,
    Refusal,
    listed,
    read_config,
    read_peft,
    unsupported,
)

KEY = "safegene.peft."
HALF_PRECISION = "safegene.gguf.f16"  # in safetensors: the tensors that were F16 in the GGUF


def convert(
    peft_dir: PathLike, base: PathLike, output: PathLike | None = None, *, text_only: bool = False
) -> Adapter:
    """Turn a PEFT or MLX LoRA folder into a GGUF LoRA, and write it where `output` is given.

    Args:
        peft_dir: the folder with adapter_config.json and adapter_model.safetensors (PEFT) or
            adapters.safetensors (mlx-lm).
        base: the GGUF model that the adapter is for; names, shapes and row order come from it.
        output: the GGUF file to write, atomically; tensors are F32.
        text_only: leave out what the adapter has for a vision or audio part.

    Raises:
        FileFormatError: an input is missing, malformed, or contradicts itself.
        UnsupportedError: names everything that a GGUF LoRA cannot represent.
        MismatchError: names what does not fit the base: it is for another size or family.
        NoEffectError: the adapter was never trained: all its updates are zero.
        OutputError: the output cannot be written, or is an input.
    """
    folder = Path(peft_dir)
    inputs = [base, folder / CONFIG, folder / WEIGHTS, folder / MLX_WEIGHTS]
    if output is not None:
        check_output(output, inputs)
    mlx = is_mlx(folder, read_config(folder)[0])
    source = (read_mlx if mlx else read_peft)(folder, text_only=text_only)
    adapter = to_gguf(source, BaseNames(open_model(base)))
    adapter.require_effect(folder)
    facts: dict[str, Any] = {f"{KEY}sha256": sha256(folder / (MLX_WEIGHTS if mlx else WEIGHTS))}
    if source.left_out:
        facts[f"{KEY}left_out"] = source.left_out
    adapter = replace(adapter, extra={**adapter.extra, **facts})
    if output is not None:
        adapter.save(output, inputs)
    return adapter


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


def to_gguf(source: PeftAdapter, names: BaseNames) -> Adapter:
    """The GGUF LoRA of a PEFT adapter, with the record that `to_peft` goes back by."""
    updates = sorted(_mapped(source, names), key=lambda u: _file_order(u.tensor))
    alpha = _global_alpha(updates)
    half = set(source.metadata.get(HALF_PRECISION, "").split())
    pairs: dict[str, Pair] = {}
    folded: list[str] = []
    for update in updates:
        b, factor = update.b, factor_of(update.alpha, update.b.shape[1], alpha)
        if factor != 1.0:
            b = _folded(source, update, factor)
            folded.append(update.tensor)
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
    if not (updates or misfits):
        raise FileFormatError(f"{source.source}: holds no pair of a LoRA", "Save the adapter again")
    if misfits:
        raise _mismatch(source.source, misfits, names)
    return list(updates.values())


_TURNED = (".attn_q.weight", ".attn_k.weight")  # of which llama's rows are put into another order


def _refusal(module: str, tensor: str | None, names: BaseNames) -> str:
    if is_linear_layer(module):  # of this family or another: whether it fits is seen below
        return ""
    if names.architecture == "llama" and tensor and tensor.endswith(_TURNED):
        return "its rows may lie as GGUF has them already: only 'q_proj' and 'k_proj' are known"
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
    return MismatchError(
        f"{source} does not fit {names.model.path}: {listed(misfits)}",
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


def factor_of(wanted: float, rank: int, alpha: float) -> float:
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
    source: PeftAdapter, names: BaseNames, updates: list[_Update], folded: list[str]
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
    if modules != [MODULE_PREFIX + names.modules.get(update.tensor, "") for update in updates]:
        record[f"{KEY}modules"] = modules
    if folded:
        record[f"{KEY}folded"] = folded
    return record
