"""`SafeLlama`: a `llama_cpp.Llama` whose adapters can be changed while it runs."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from ..compat import open_model, require_fit
from ..errors import (
    FileFormatError,
    LlamaCppError,
    MismatchError,
    NoEffectError,
    SettingError,
    UnsupportedError,
)
from ..files import PathLike, scratch_folder
from ..gene import Adapter, AdapterLike, SafetyGene, listed, require_distinct
from ..hub import resolve
from .chat import chat_handler
from .controls import ControlTexts
from .devices import physical_cores, require_cells
from .guard import Guard, guard_of
from .loadable import require_loadable
from .log import reason
from .options import require_options
from .rendering import ChattingLlama
from .shared import AttachedAdapter as AttachedAdapter
from .shared import OtherAdaptersError, find_attached

DEFAULT_CONTEXT = 2048
_STEP = 256  # llama.cpp makes a context of whole steps, and llama-cpp-python does not know it
_NO_GUARD: Any = (object(), None)  # a gene, and the guard that was made of it
Weights = frozenset[tuple[str, float]]  # adapters by content, with their scales but 0
# Any text will do: an adapter that leaves these logits bit for bit as they were does nothing.
_PROBE = "Question: how can I get help with this? Answer: I"
_SHORT = 2  # tokens of it, read first: behind a single one no query or key moves anything


class SafeLlama(ChattingLlama):
    """A `llama_cpp.Llama` with any number of adapters, each with a scale of its own.

    Whatever takes a `Llama` takes this. Adapters are checked against the model before
    llama.cpp sees them; attaching proves on a short text that the logits moved. Every
    change clears the KV cache: llama.cpp compares cached prefixes by token alone, so old
    keys and values would otherwise leak into the next answer. The model stays mapped
    from disk (`Llama(lora_path=...)` copies all of it into memory).

    It owns the contexts on its model: closing it ends its batchers and engines first, and an
    adapter that a batcher answers with stays until the batcher is closed.

    Threads may share it. Its own context, which chats and completions use, serves one call at a
    time: other calls, and changes of adapters, wait for the answer, or for the next chunk where
    it is a stream. A stream that is read on after a change, or after another text was begun,
    raises LlamaCppError, since its keys and values are gone. Closing ends an answer at its next
    token, with LlamaCppError.

    Args:
        model_path: a GGUF model.
        adapters: GGUF LoRA paths or `Adapter`s, or (adapter, scale) pairs, none of them twice.
        n_ctx: context length in tokens, rounded up to a multiple of 256; 0 takes the model's own.
        n_threads: default: the machine's physical cores.
        n_gpu_layers: default: all where the build can offload, else none.
        verbose: llama.cpp's log on stderr.
        chat_template_kwargs: variables of the chat template for every chat, such as
            {"enable_thinking": False}.
        guard: look at answers again while they are given, and at the user's last message alone;
            see `runtime.guard`. An answer that the guard ends has the `finish_reason`
            "content_filter". It looks while a gene is on, or none is attached (it may be merged).
        options: any other argument of `llama_cpp.Llama`, except its `lora_*`. A `chat_format`
            or `chat_handler` replaces this class's rendering of chats, and its guard against
            forged turns.

    Raises:
        FileFormatError: the model or an adapter is not what it should be.
        MismatchError: an adapter does not fit the model; each tensor is named.
        NoEffectError: an adapter changes nothing.
        UnsupportedError: no guard can look at answers of this model.
    """

    def __init__(
        self,
        model_path: PathLike,
        adapters: Iterable[AdapterLike | tuple[AdapterLike, float]] = (),
        *,
        n_ctx: int = DEFAULT_CONTEXT,
        n_threads: int | None = None,
        n_gpu_layers: int | None = None,
        verbose: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        guard: bool = False,
        **options: Any,
    ) -> None:
        self._guarded, self._made_guard = guard, _NO_GUARD
        self._attached: list[AttachedAdapter] = []
        self._on: Weights = frozenset()
        self._share()
        self._prepare_chats(chat_template_kwargs)
        require_options({**options, "n_ctx": n_ctx, "n_threads": n_threads})
        self._file = open_model(model_path)
        require_loadable(self._file)
        require_cells(self._file, n_ctx)
        threads = n_threads or physical_cores()
        if n_gpu_layers is None:
            n_gpu_layers = -1 if llama_cpp.llama_supports_gpu_offload() else 0
        if options.get("chat_format") is None and options.get("chat_handler") is None:
            options["chat_handler"] = chat_handler
        with reason(quiet=not verbose) as why:
            try:
                super().__init__(
                    str(self._file.path),
                    n_ctx=-(-n_ctx // _STEP) * _STEP,
                    n_threads=threads,
                    n_threads_batch=options.pop("n_threads_batch", None) or threads,
                    n_gpu_layers=n_gpu_layers,
                    verbose=verbose,
                    **options,
                )
            except (ValueError, RuntimeError) as error:
                raise LlamaCppError(
                    f"{model_path}: llama.cpp cannot load the model ({str(why) or error})",
                    "Run `safegene-edge inspect` on it, or load with verbose=True for its log",
                ) from error
        if not verbose:
            # llama-cpp-python takes ggml's level 3 for an error, where it is a warning: it
            # would print one line a tensor while an adapter loads.
            logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
        self._metadata |= self._unread
        self._controls = ControlTexts.of(self._model.vocab, self.n_vocab())
        self.attach_each(adapters)
        if guard:
            self._require_guardable(options)

    # -- adapters ---------------------------------------------------------

    @property
    def adapters(self) -> tuple[AttachedAdapter, ...]:
        """The attached adapters, in the order of attaching."""
        return tuple(self._attached)

    def attach(
        self,
        adapter: AdapterLike,
        scale: float = 1.0,
        *,
        prove: bool = True,
        name: str | None = None,
    ) -> AttachedAdapter:
        """Side-load an adapter onto the live model.

        Args:
            adapter: a GGUF LoRA file, or an `Adapter` in memory.
            scale: multiplies alpha / r; 0 attaches it switched off.
            prove: compare logits without and with it (at scale 1 if `scale` is 0). Costs
                two passes over two tokens, and over a dozen before it says that nothing moved.
            name: for messages; default: the file's.

        Raises:
            FileFormatError, MismatchError: before llama.cpp sees the file.
            NoEffectError: the logits did not move; nothing stays attached.
            SettingError: called by what an answer calls (a logits processor, say).
        """
        self._require_open()
        _require_finite(scale)
        if not isinstance(adapter, Adapter):
            adapter = resolve(adapter)
        content = adapter if isinstance(adapter, Adapter) else SafetyGene.load(adapter)
        name = name or ("an adapter in memory" if content is adapter else str(adapter))
        require_fit(content, self._file, name)
        source = None if isinstance(adapter, Adapter) else Path(adapter)
        handle = AttachedAdapter(name, scale, content, source)
        with self._change():
            before = self._probe(_SHORT) if prove else None
            handle.pointer = self._load(adapter, name)
            self._attached.append(handle)
            try:
                if before is not None:
                    self._prove(handle, before)
            except BaseException:
                self._detach(handle)
                raise
            self._apply()
        return handle

    def attach_each(
        self, adapters: Iterable[AdapterLike | tuple[AdapterLike, float]]
    ) -> list[AttachedAdapter]:
        """Attach several, each an adapter or (adapter, scale), and prove each.

        Raises:
            SettingError: one is given twice, or is attached already: it would count twice. Or this
                is no list.
        """
        found = []
        for item in listed(adapters):
            adapter, scale = item if isinstance(item, tuple) else (item, 1.0)
            handle = self.attach(adapter, scale)
            others = [one for one in self._attached if one is not handle]
            try:
                require_distinct([(one.name, one.content) for one in (*others, handle)])
            except SettingError:
                self.detach(handle)
                raise
            found.append(handle)
        return found

    def detach(self, adapter: AttachedAdapter | AdapterLike) -> None:
        """Take an adapter off; the model then answers as if it had never been there.

        Args:
            adapter: what `attach` returned, or what it was given: a path or an `Adapter`.

        Raises:
            SettingError: it is not attached, or is more than once from that path; or a batcher
                (a server's, too) or a running engine answers with it. Close that first. Or it
                is called by what an answer calls.
        """
        with self._change():
            self._detach(find_attached(self._attached, adapter))

    def _detach(self, handle: AttachedAdapter) -> None:
        for owner in list(self._owners):
            owner.release(handle)
        self._attached.remove(handle)
        self._apply()
        llama_cpp.llama_adapter_lora_free(handle.pointer)
        handle.pointer = None

    def set_scale(self, adapter: AttachedAdapter | AdapterLike, scale: float) -> None:
        """Change the scale of an adapter, given as to `detach`; 0 is the model without it, exactly.

        A batcher keeps the scales that it began with.

        Raises:
            SettingError: as `detach`; or the scale is not finite.
        """
        with self._change():
            handle = find_attached(self._attached, adapter)
            _require_finite(scale)
            handle.scale = scale
            self._apply()

    def set_adapters_on(
        self, context: Any, scales: Mapping[AttachedAdapter, float] | None = None
    ) -> frozenset[AttachedAdapter]:
        """Set adapters on a llama.cpp context of this model.

        Args:
            context: this object's own, or another on the same model (the engine's).
            scales: adapter to scale, others off; None takes the scales that are set here.

        Returns:
            The adapters that the context now holds.
        """
        with self._in_use(), self._of_own(context), self._guard:
            given = {a: a.scale for a in self._attached} if scales is None else scales
            for scale in given.values():
                _require_finite(scale)
            chosen = {find_attached(self._attached, key): value for key, value in given.items()}
            pointers = (llama_cpp.llama_adapter_lora_p_ctypes * len(chosen))(
                *(handle.pointer for handle in chosen)
            )
            values = (ctypes.c_float * len(chosen))(*chosen.values())
            with reason() as why:
                if llama_cpp.llama_set_adapters_lora(context, pointers, len(chosen), values):
                    raise LlamaCppError(why.after("llama.cpp refused to set the adapters"))
            if context == self.ctx:
                self._on = frozenset((h.content.sha256, s) for h, s in chosen.items() if s)
        return frozenset(chosen)

    def _load(self, adapter: AdapterLike, name: str) -> Any:
        if isinstance(adapter, Adapter):
            with scratch_folder() as folder:
                path = folder / "adapter.gguf"
                adapter.save(path)
                return self._load(path, name)
        with reason() as why:
            pointer = llama_cpp.llama_adapter_lora_init(self.model, os.fsencode(adapter))
        if not pointer:
            raise MismatchError(
                why.after(f"{name}: llama.cpp refused the adapter for {self._file.path}"),
                "Make the adapter again, for this model",
            )
        return pointer

    def _prove(self, handle: AttachedAdapter, before: npt.NDArray[np.float32]) -> None:
        scales = {other: other.scale for other in self._attached}
        scales[handle] = handle.scale or 1.0
        own = {other: scale for other, scale in scales.items() if other is not handle}
        self.set_adapters_on(self.ctx, scales)
        after = self._probe(_SHORT)
        if np.array_equal(before, after):  # rarely: a long text shows what a short one does not
            after = self._probe()
            self.set_adapters_on(self.ctx, own)
            before = self._probe()
        if not np.isfinite(before).all():
            raise FileFormatError(
                f"{self._file.path}: the model's own logits are NaN or infinite",
                "Download or convert it again",
            )
        if not np.isfinite(after).all():
            raise NoEffectError(
                f"{handle.name}: with it the model's logits are NaN or infinite",
                "The adapter is broken, or its scale far too large",
            )
        if np.array_equal(before, after):
            raise NoEffectError(
                f"{handle.name}: attached, but the logits did not move",
                "Its B matrices are zero or vanish in the model's precision: train it again",
            )

    def _probe(self, most: int | None = None) -> npt.NDArray[np.float32]:
        """Logits (n_vocab) after the probe text's first tokens, on this object's own context."""
        self.clear()
        tokens = self.tokenize(_PROBE.encode(), add_bos=True)[: max(1, self.n_batch - 1)][:most]
        self._batch.set_batch(batch=tokens, n_past=0, logits_all=False)
        self._ctx.decode(self._batch)
        pointer = llama_cpp.llama_get_logits_ith(self.ctx, -1)
        logits: npt.NDArray[np.float32] = np.array(
            np.ctypeslib.as_array(pointer, shape=(self.n_vocab(),)), dtype=np.float32
        )
        self.clear()
        return logits

    def _apply(self) -> None:
        self.set_adapters_on(self.ctx)
        self.clear()

    def clear(self) -> None:
        """Forget every token: the KV cache, the prefix to be reused, and cached states."""
        with self._own_context():
            self._turn += 1
            self._ctx.kv_cache_clear()
            self.reset()
            states = getattr(self.cache, "cache_state", None) or getattr(self.cache, "cache", None)
            if states is not None:  # a LlamaRAMCache or LlamaDiskCache: states of the old weights
                states.clear()

    # -- states -----------------------------------------------------------

    def save_state(self) -> Any:
        """As `llama_cpp.Llama.save_state`; the state knows the adapters that it was made with."""
        with self._own_context():
            state = self._save_state()
            state.adapters = self._on
            return state

    def load_state(self, state: Any) -> None:
        """As `llama_cpp.Llama.load_state`.

        Raises:
            SettingError: it was saved under other adapters or scales, whose keys and values it
                would go on with. A state of a plain `llama_cpp.Llama` is one without adapters.
            LlamaCppError: it is of another model or context; nothing is kept of either text.
        """
        with self._own_context():
            if getattr(state, "adapters", frozenset()) != self._on:
                raise OtherAdaptersError(
                    "the state was saved under other adapters, or at other scales",
                    "Set those, or read the text again",
                )
            try:
                self._load_state(state)
            except (RuntimeError, ValueError) as error:
                self.clear()
                raise LlamaCppError(f"the state does not fit this model ({error})") from error

    def _let_go(self) -> None:
        self._attached.clear()  # llama.cpp frees a model's adapters with the model

    def __enter__(self) -> SafeLlama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        for key in [key for key in state if key.startswith("lora_")]:
            del state[key]
        adapters = [(a.content, a.scale) for a in self._attached]
        return {**state, "adapters": adapters, "guard": self._guarded}

    # -- the guard --------------------------------------------------------

    @property
    def context_params(self) -> Any:
        """llama.cpp's settings of the model's own context."""
        return self._context_params

    @context_params.setter
    def context_params(self, params: Any) -> None:
        if self._guarded:  # llama-cpp-python opens the context with these
            params.n_seq_max, params.kv_unified = 2, True
        self._context_params = params

    def _require_guardable(self, options: Mapping[str, Any]) -> None:
        if options.get("draft_model") is not None:
            raise UnsupportedError(
                "the guard does not go with a draft model", "Leave one of the two out"
            )
        self.make_guard()

    @property
    def guard(self) -> Guard | None:
        """What looks at answers, with the openers and the threshold of the gene that is on."""
        genes = list(self._genes()) or self._attached
        if not self._guarded or (genes and not any(handle.scale for handle in genes)):
            return None
        return self.make_guard()

    def _genes(self) -> dict[AttachedAdapter, SafetyGene]:
        """The adapters that say something of refusals, which a task's do not."""
        return {
            handle: gene
            for handle in self._attached
            if isinstance(gene := handle.content, SafetyGene)
            and (gene.refusal_openers or gene.guard_threshold is not None)
        }

    def make_guard(self) -> Guard:
        """A guard for this model, of the gene that was attached last, for whatever answers.

        Raises:
            UnsupportedError: the template opens no answer, or the model's memory cannot be forked.
        """
        gene = next(reversed(self._genes().values()), None)
        if self._made_guard[0] is not gene:
            self._made_guard = gene, guard_of(self, gene)
        made: Guard = self._made_guard[1]
        return made


def _require_finite(scale: float) -> None:
    if not np.isfinite(scale):
        raise SettingError(f"the scale {scale} is not a finite number", "Give one such as 1.0")
