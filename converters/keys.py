"""The names of modules in an adapter's file, as wrappers and larger models leave them.

Training tools save what their wrappers call a module: `_orig_mod` of torch.compile, `module` of
DistributedDataParallel, and so on. Models with eyes or ears have more linear layers than the text
model that llama.cpp runs.
"""

from __future__ import annotations

import re

MODULE_PREFIX = "base_model.model."
_WRAPPERS = frozenset({
    "module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
})  # fmt: skip
_SENSES = re.compile(
    r"(?:^|\.)(?:vision\w*|visual|image\w*|img_\w+|embed_vision|audio\w*|embed_audio|speech\w*"
    r"|mm_projector|multi_modal_projector|connector|perceiver\w*)(?=\.|$)"
)


def module_of(key: str) -> str:
    """A module's name in the base model, as PEFT matches patterns against it."""
    return key.removeprefix(MODULE_PREFIX)


def plain(key: str) -> str:
    """A key without the names of wrappers, and with PEFT's own prefix once."""
    found = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    while found.startswith(MODULE_PREFIX * 2):
        found = found.removeprefix(MODULE_PREFIX)
    return found


def within_peft(key: str) -> str:
    """What PEFT called the module when it matched patterns: all that comes after its prefix."""
    return key.partition(MODULE_PREFIX)[2] or key


def of_senses(key: str) -> bool:
    """Whether a module belongs to a vision or audio part, or to what joins it to the text model."""
    return bool(_SENSES.search(key))
