"""Models to learn from: an HF folder, a GGUF file, or either with PEFT adapters on top.

One model is in memory, whatever their number: `LiveModel` keeps all adapters attached and
switches them, and copies other base weights in from a file mapped from disk.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..compat import open_model
from ..converters import safetensors_file
from ..converters.keys import MODULE_PREFIX, module_of
from ..converters.names import BaseNames
from ..converters.peft import CONFIG, WEIGHTS, PeftAdapter, read_peft, unsupported
from ..errors import FileFormatError, MismatchError, UnsupportedError
from ..files import PathLike, atomic_output, sha256
from ..gene import Adapter
from ..hub import resolve
from .processes import Processes
from .recipe import learning_dtype, load_base
from .settings import Recipe

GENE = "gene"  # the name of the adapter that learns
_HF_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from.

    Attributes:
        base: a GGUF file or a Hugging Face folder with safetensors.
        adapters: PEFT folders, applied one on top of the other.
    """

    base: Path
    adapters: tuple[Path, ...] = ()

    @classmethod
    def parse(cls, text: PathLike | Source, below: Source | None = None) -> Source:
        """A source from "MODEL", "MODEL,ADAPTER..." or, on top of `below`, "ADAPTER...".

        Raises:
            FileFormatError: a part is neither a model nor a PEFT folder.
        """
        if isinstance(text, Source):
            return text
        parts = [resolve(part) for part in str(text).split(",") if part]
        if not parts:
            raise FileFormatError("a model's name is empty", "Give a GGUF file or an HF folder")
        if below is not None and _is_adapter(parts[0]):
            return cls(below.base, (*below.adapters, *parts)).checked()
        return cls(parts[0], tuple(parts[1:])).checked()

    def checked(self) -> Source:
        """Itself, or FileFormatError naming the part that is not what it should be."""
        if self.base.is_dir():
            if not (self.base / _HF_CONFIG).exists() or not weight_files(self.base):
                raise FileFormatError(
                    f"{self.base}: no model folder ({_HF_CONFIG} and *.safetensors)",
                    "Give a GGUF file or a folder that save_pretrained wrote",
                )
        else:
            open_model(self.base)
        for folder in self.adapters:
            if not _is_adapter(folder):
                raise FileFormatError(f"{folder}: no PEFT folder", f"It must hold {CONFIG}")
        return self

    @property
    def is_gguf(self) -> bool:
        return not self.base.is_dir()

    def digest(self) -> str:
        """SHA-256 of everything that makes the model: of the one file, or of the files' own."""
        files = [self.base] if self.is_gguf else weight_files(self.base)
        hashes = [sha256(file) for file in files]
        hashes += [sha256(folder / name) for folder in self.adapters for name in (CONFIG, WEIGHTS)]
        return (
            hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        )

    def shape(self) -> dict[str, Any]:
        """What all models of a family share, by name."""
        return _gguf_shape(self.base) if self.is_gguf else _hf_shape(self.base)


_AS_GGUF = {"mistral": "llama"}  # model types to other names of the same graph


def _is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).exists()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the order of their names."""
    return sorted(path for path in folder.glob("*.safetensors") if path.name != WEIGHTS)


def _gguf_shape(path: Path) -> dict[str, Any]:
    file = open_model(path)
    arch = file.architecture

    def first(key: str, default: int = 0) -> int:
        return int((file.numbers(f"{arch}.{key}") or [default])[0])

    heads = first("attention.head_count")
    return {
        "architecture": arch,
        "blocks": first("block_count"),
        "width": first("embedding_length"),
        "feed-forward width": first("feed_forward_length"),
        "heads": heads,
        "KV heads": first("attention.head_count_kv", heads),
        "vocabulary": file.tensors["token_embd.weight"].shape[0]
        if "token_embd.weight" in file.tensors
        else 0,
    }


def _hf_shape(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / _HF_CONFIG).read_text(encoding="utf-8"))
        heads = config["num_attention_heads"]
        kind = str(config["model_type"]).removesuffix("_text")
        return {
            "architecture": _AS_GGUF.get(kind, kind),
            "blocks": config["num_hidden_layers"],
            "width": config["hidden_size"],
            "feed-forward width": config["intermediate_size"],
            "heads": heads,
            "KV heads": config.get("num_key_value_heads") or heads,
            "vocabulary": config["vocab_size"],
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"{folder / _HF_CONFIG}: no model's config ({error!r})") from error


def require_family(sources: Sequence[Source]) -> None:
    """Raise MismatchError unless all sources have the first one's architecture and shape."""
    first, *others = sources
    wanted = first.shape()
    for other in others:
        got = other.shape()
        wrong = [f"{name} {got[name]}, not {wanted[name]}" for name in wanted
                 if got[name] != wanted[name]]  # fmt: skip
        if wrong:
            raise MismatchError(
                f"{other.base} is of another family than {first.base}: {', '.join(wrong)}",
                "Give fine-tunes of one model",
            )


# -- weights, without torch -----------------------------------------------


def weight_reader(source: Source, names: BaseNames) -> Callable[[str], npt.NDArray[np.float64]]:
    """A function from a GGUF tensor name to the source's weight (out×in), rows as in GGUF.

    Quantised weights are dequantised; the adapters' updates are added.
    """
    if source.is_gguf:
        file = open_model(source.base)
        read: Callable[[str], npt.NDArray[Any]] = file.floats
    else:
        stored: dict[str, safetensors_file.StoredTensor] = {}
        for path in weight_files(source.base):
            stored.update(safetensors_file.read(path)[0])

        def read(tensor: str) -> npt.NDArray[Any]:
            name = f"{names.modules[tensor]}.weight"
            if name not in stored:
                raise FileFormatError(f"{source.base}: has no tensor '{name}'")
            return names.to_gguf_rows(tensor, stored[name].floats())

    updates = [_update(folder, names) for folder in source.adapters]

    def weight(tensor: str) -> npt.NDArray[np.float64]:
        total = read(tensor).astype(np.float64)
        for update in updates:
            for key, pair in update.pairs.items():
                if names.tensor(module_of(key)) == tensor:
                    b = names.to_gguf_rows(tensor, pair.b).astype(np.float64)
                    total += update.config.scale(module_of(key)) * (b @ pair.a)
        return total

    return weight


def _update(folder: Path, names: BaseNames) -> PeftAdapter:
    """An adapter that is its pairs alone; UnsupportedError where it is more."""
    found = read_peft(folder)
    if found.refusals:
        raise unsupported(found.source, found.refusals)
    if lost := [key for key in found.pairs if names.tensor(module_of(key)) is None]:
        raise UnsupportedError(f"{found.source}: {lost[0]} is no tensor of the GGUF")
    return found


# -- the live model -------------------------------------------------------


def load_model(path: Path, dtype: str) -> Any:
    """The transformers model of a GGUF file or an HF folder, in eval mode."""
    if not path.is_dir():
        return load_base(path, dtype)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=learning_dtype(dtype)).eval()


class LiveModel:
    """One model in memory that can be any of its sources, with or without the gene.

    Args:
        sources: models of one family.
        recipe: rank, alpha, targets and seed of the gene's LoRA pairs.
        folder: where base weights are kept to be switched, if there is more than one base.
        dtype: of the base weights, see `learning_dtype`; adapters are float32.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        recipe: Recipe,
        folder: Path,
        dtype: str = "auto",
    ) -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        bases = list(dict.fromkeys(source.base for source in sources))
        world = Processes.current()
        with world.first():
            self._weights = _stored_weights(bases, folder, dtype) if len(bases) > 1 else {}
        self._base, self._recipe = bases[0], recipe
        torch.manual_seed(recipe.seed)
        config = LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            target_modules=list(recipe.targets),
            task_type="CAUSAL_LM",
        )
        device = world.device()
        if device.type == "cuda":
            # Its gradients are NaN for some masks: github.com/pytorch/pytorch/issues/196678
            torch.backends.cuda.enable_cudnn_sdp(False)
        loaded = load_model(self._base, dtype).to(device)
        self.model: Any = get_peft_model(loaded, config, adapter_name=GENE)
        self._names: dict[Path, str] = {}
        for folder_of in dict.fromkeys(part for source in sources for part in source.adapters):
            self._names[folder_of] = f"part{len(self._names)}"
            self.model.load_adapter(str(folder_of), adapter_name=self._names[folder_of])
        self.model.eval()

    @contextmanager
    def as_source(self, source: Source, *, gene: bool) -> Iterator[Any]:
        """The model as one of its sources; only the gene's weights ever take gradients."""
        if source.base != self._base:
            self._copy_weights(source.base)
        active = [self._names[folder] for folder in source.adapters] + [GENE] * gene
        if not active:
            with self.model.disable_adapter():
                yield self.model
            self._freeze()
            return
        self.model.base_model.set_adapter(active)
        self._freeze()
        yield self.model

    def gene_weights(self) -> dict[str, Any]:
        """The gene's parameters by name."""
        return {n: w for n, w in self.model.named_parameters() if f".{GENE}." in n}

    def load_gene(self, adapter: Adapter, names: BaseNames) -> None:
        """Put an adapter into the gene's weights; modules that it does not touch get zeros."""
        import torch

        weights = self.gene_weights()
        with torch.no_grad():
            for weight in weights.values():
                weight.zero_()
            for tensor, pair in adapter.pairs.items():
                module = MODULE_PREFIX + names.modules[tensor]
                b = names.to_hf_rows(tensor, pair.b) * (
                    adapter.effective_scale(tensor) * self._recipe.rank / self._recipe.alpha
                )
                weights[f"{module}.lora_A.{GENE}.weight"][: pair.rank] = torch.from_numpy(pair.a)
                weights[f"{module}.lora_B.{GENE}.weight"][:, : pair.rank] = torch.from_numpy(b)

    def blocks(self) -> Any:
        """The list of transformer blocks."""
        return self.model.get_base_model().model.layers

    def _freeze(self) -> None:
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(f".{GENE}." in name)

    def _copy_weights(self, base: Path) -> None:
        import torch
        from safetensors import safe_open

        with torch.no_grad(), safe_open(str(self._weights[base]), framework="pt") as stored:
            for name, weight in _base_parameters(self.model):
                weight.copy_(stored.get_tensor(name))
        self._base = base


def _base_parameters(model: Any) -> Iterator[tuple[str, Any]]:
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), weight


def _stored_weights(bases: Sequence[Path], folder: Path, dtype: str) -> dict[Path, Path]:
    from safetensors.torch import save_file

    found = {}
    for number, base in enumerate(bases):
        found[base] = folder / f"weights-{number}.safetensors"
        if not found[base].exists():
            with atomic_output(found[base]) as temporary:
                save_file(dict(_base_parameters(load_model(base, dtype))), str(temporary))
            gc.collect()
    return found
