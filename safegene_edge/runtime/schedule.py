"""One scheduler for all that an engine decodes.

A job is a token sequence, the positions whose logits somebody wants, and how many tokens to add.
Jobs take free slots as others finish (continuous batching); the prefix that all jobs share is
computed once and copied by sequence, which in llama.cpp's unified KV cache costs no memory. A job
that opens like one that has just finished takes its slot over and goes on where the two part.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import llama_cpp

from ..aliases import Floats
from ..errors import LlamaCppError, SettingError
from .batch import Batch, common, logit_rows, trim
from .devices import require_cells
from .guard import Forks
from .llama import AttachedAdapter, SafeLlama
from .log import interrupts_deferred, reason

Scales = Mapping[AttachedAdapter, float]
_PREFIX = 0  # the sequence that holds the shared prefix; slots are 1, 2, ...
_MIN_PREFIX = 4  # below this a copy saves nothing


class Watch(Protocol):
    """Looks on while an engine decodes.

    Attributes:
        call: a `ggml_backend_sched_eval_callback`, which sees each node of llama.cpp's graph.
    """

    call: Any

    def expect(self, count: int) -> None:
        """Called before each decode; its tokens stand for `count` times as many."""


class Holder(Protocol):
    """What has an engine to itself: a `Batcher`."""

    @property
    def in_own_thread(self) -> bool:
        """Whether the calling thread is the one that uses the engine."""

    def close(self) -> None:
        """Leave the engine; the thread has ended when this returns, but for its own calls."""


Choose = Callable[[Floats, "list[Job]"], "list[Job]"]  # rows of jobs to those that are done


@dataclass(eq=False, slots=True)
class Job:
    """One sequence on its way: `fed` of its tokens are in the KV cache."""

    index: int
    tokens: list[int]
    wanted: frozenset[int]
    n_new: int
    fed: int = 0
    slot: int = -1
    spare: int = 0  # cells that it turned out not to need, or a guard may, held until it is done
    own_from: int = field(init=False)  # a wanted position, or its last token: never copied

    def __post_init__(self) -> None:
        last = len(self.tokens) - 1
        self.own_from = min(self.wanted, default=last)

    def cells(self, shared: int) -> int:
        return len(self.tokens) - shared + self.n_new + self.spare

    def leave(self, n_new: int) -> None:
        """Add no more than so many tokens."""
        self.spare += self.n_new - n_new
        self.n_new = n_new


def most_parallel(*, guarded: bool = False) -> int:
    """Sequences that an engine may decode together at most."""
    return (int(llama_cpp.llama_max_parallel_sequences()) - 1) // (2 if guarded else 1)


class Scheduler:
    """A context of its own on a `SafeLlama`'s model, and the jobs that it decodes.

    The arguments are those of `Engine`.
    """

    def __init__(
        self,
        llama: SafeLlama,
        *,
        n_parallel: int = 16,
        n_ctx: int = 4096,
        n_batch: int = 512,
        max_outputs: int = 64,
        n_threads: int | None = None,
        flash_attn: bool | None = None,
        watch: Watch | None = None,
        guarded: bool = False,
    ) -> None:
        for name, value in (("n_ctx", n_ctx), ("n_batch", n_batch), ("max_outputs", max_outputs)):
            if value < 1:
                raise SettingError(f"{name} is {value}", "Give 1 or more")
        limit = most_parallel(guarded=guarded)
        if not 1 <= n_parallel <= limit:
            raise SettingError(f"n_parallel is {n_parallel}", f"Give 1 to {limit}")
        self.llama, self.guarded = llama, guarded
        self.n_parallel, self.n_batch = n_parallel, min(n_batch, n_ctx)
        self._n_sequences = n_parallel * (2 if guarded else 1) + 1
        self.max_outputs = max(max_outputs, self._n_sequences)  # llama.cpp aborts below n_seq_max
        self.n_vocab: int = llama.n_vocab()
        self._lock = threading.Lock()  # held by a run
        self._runner: int | None = None
        self._closing = False
        self._holder: Holder | None = None
        self._adapters: frozenset[AttachedAdapter] = frozenset()  # that the context holds
        self._batch = Batch(self.n_batch)
        self._watch = watch
        self._context = self._open(n_ctx, n_threads or llama.n_threads, flash_attn)
        self._free = weakref.finalize(self, llama_cpp.llama_free, self._context)
        self._free.atexit = False  # a thread may still use it then, and memory goes anyway
        self._memory = llama_cpp.llama_get_memory(self._context)
        self.n_ctx = int(llama_cpp.llama_n_ctx(self._context))

    def _open(self, n_ctx: int, n_threads: int, flash_attn: bool | None) -> Any:
        params = context_params(self.llama, n_ctx, self._n_sequences, flash_attn)
        params.n_batch = params.n_ubatch = self.n_batch
        params.n_outputs_max = self.max_outputs
        params.n_threads = params.n_threads_batch = n_threads
        if self._watch is not None:
            params.cb_eval = self._watch.call
        with reason() as why:
            context = self.llama.open_context(self, params)
        if not context:
            raise LlamaCppError(
                why.after(f"llama.cpp could not make a context of {n_ctx} cells"),
                "Give a smaller n_ctx",
            )
        return context

    def close(self) -> None:
        """Free the context; the model stays with its `SafeLlama`. Again does nothing.

        A batcher on it is closed first. A run in another thread ends with LlamaCppError.

        Raises:
            LlamaCppError: a callback of its own run, or its batcher's listener, calls this.
        """
        self.require_closable()
        self._closing = True
        with self._lock:  # no run goes on, and none begins
            holder = self._holder
        if holder is not None:
            holder.close()
        with self._lock:  # whoever closes it, too, goes on to free the model
            self._context, self._adapters = None, frozenset()
            self._free()

    # -- who uses it ------------------------------------------------------

    def require_closable(self) -> None:
        """LlamaCppError where the calling thread is in the midst of using the context."""
        holder = self._holder
        if self._runner == threading.get_ident() or (holder and holder.in_own_thread):
            raise LlamaCppError(
                "an engine cannot be closed by what it calls", "Close it from another thread"
            )

    def release(self, handle: AttachedAdapter) -> None:
        """Take an adapter off the context.

        Raises:
            SettingError: a batcher or a run answers with it.
        """
        if handle not in self._adapters:
            return
        if self._holder is not None:
            raise SettingError(
                f"{handle.name}: a batcher answers with it", "Close the batcher or server first"
            )
        if not self._lock.acquire(blocking=False):
            if self._context is None:  # it is being freed
                return
            raise SettingError(
                f"{handle.name}: an engine is answering with it", "Wait for its run, or cancel it"
            )
        try:
            if self._context is not None:
                self._set_adapters({})
        finally:
            self._lock.release()

    def reserve(self, holder: Holder, adapters: Scales | None) -> None:
        """Give the engine to a batcher, with these adapters on, until `unreserve`.

        Raises:
            SettingError: another batcher has it.
        """
        with self._lock:
            self._require_free()
            self._set_adapters(adapters)
            llama_cpp.llama_memory_clear(self._memory, False)
            self._holder = holder

    def unreserve(self) -> None:
        """The batcher is done: the engine can run again, or be given to another."""
        self._holder = None

    def _require_free(self) -> None:
        if self._context is None or self._closing:
            raise LlamaCppError("the engine is closed", "Make a new one")
        if self._holder is not None:
            raise SettingError("a batcher answers on this engine", "Make another engine")

    def _set_adapters(self, adapters: Scales | None) -> None:
        with self.llama._guard:  # or one could be detached before it is noted here
            self._adapters = self.llama.set_adapters_on(self._context, adapters)

    def forks(self) -> Forks:
        """What reads margins between two decodes; slot s has the spare sequence `spare(s)`.

        Raises:
            SettingError: the engine was not made with `guarded`.
        """
        if not self.guarded:
            raise SettingError("the engine has no sequences to look on", "Give guarded=True")
        most = self.max_outputs
        return Forks(self._context, self._batch, self._decode, self.n_vocab, most)

    def spare(self, slot: int) -> int:
        """The sequence on which a slot's answer is looked at."""
        return slot + self.n_parallel

    # -- runs -------------------------------------------------------------

    def _run(
        self,
        jobs: list[Job],
        adapters: Scales | None,
        cancel: threading.Event | None,
        choose: Choose | None,
        visit: Callable[[int, int, Floats], None] | None,
        *,
        alone: bool = False,
    ) -> None:
        if self._runner == threading.get_ident():
            raise LlamaCppError("an engine has one run at a time", "Make another engine")
        with self._lock:
            self._require_free()
            self._runner = threading.get_ident()
            try:
                self._set_adapters(adapters)
                self._run_jobs(jobs, cancel, choose, visit, alone=alone)
            finally:
                self._runner = None

    def _run_jobs(
        self,
        jobs: list[Job],
        cancel: threading.Event | None,
        choose: Choose | None,
        visit: Callable[[int, int, Floats], None] | None,
        *,
        alone: bool,
    ) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)
        shared = 0 if alone else self._share_prefix(jobs)
        waiting, active = deque(jobs), list[Job]()
        free = [1] if alone else list(range(self.n_parallel, 0, -1))
        cells = self.n_ctx - shared
        while waiting or active:
            if cancel is not None and cancel.is_set():
                return
            if self._closing:
                raise LlamaCppError("the engine was closed while it ran", "Make a new one")
            while waiting and free and waiting[0].cells(shared) <= cells:
                job = waiting.popleft()
                cells -= job.cells(shared)
                self._seat(job, free.pop(), shared)
                active.append(job)
            for job in self._step(active, choose, visit):
                active.remove(job)
                # What is counted back is what was taken: tokens grew as n_new shrank.
                cells += job.cells(shared)
                successor = None if alone else self._successor(job, waiting, shared, cells)
                if successor is None:
                    llama_cpp.llama_memory_seq_rm(self._memory, job.slot, -1, -1)
                    free.append(job.slot)
                    continue
                waiting.remove(successor)
                cells -= successor.cells(shared)
                active.append(successor)

    def _share_prefix(self, jobs: list[Job]) -> int:
        """Compute the tokens that all jobs open with once; returns how many there are."""
        if len(jobs) < 2:
            return 0
        first, shared = jobs[0].tokens, min(job.own_from for job in jobs)
        for job in jobs:
            shared = common(first, job.tokens, shared)
        if shared < _MIN_PREFIX:
            return 0
        for start in range(0, shared, self.n_batch):
            self._batch.clear()
            for position in range(start, min(start + self.n_batch, shared)):
                self._batch.add(first[position], position, _PREFIX, False)
            self._decode(len(jobs))
        return shared

    def _seat(self, job: Job, slot: int, shared: int) -> None:
        job.slot, job.fed = slot, shared
        if shared:
            llama_cpp.llama_memory_seq_cp(self._memory, _PREFIX, slot, -1, -1)

    def _successor(self, job: Job, waiting: Iterable[Job], shared: int, cells: int) -> Job | None:
        """The waiting job that opens most like a finished one, seated in its slot; or None."""
        best, known = None, shared
        for other in waiting:
            most = min(job.fed, other.own_from)
            # One token tells nearly all of them apart: this is asked of each as each one ends.
            if most > known and job.tokens[known] == other.tokens[known]:
                length = common(job.tokens, other.tokens, most)
                if length > known and other.cells(shared) <= cells:
                    best, known = other, length
        if best is None or not trim(self._memory, job.slot, known):
            return None
        best.slot, best.fed = job.slot, known
        return best

    def _step(
        self,
        active: list[Job],
        choose: Choose | None,
        visit: Callable[[int, int, Floats], None] | None,
    ) -> list[Job]:
        """One decode: a token for each that generates, then prompt tokens as they fit."""
        self._batch.clear()
        outputs: list[tuple[Job, int]] = []
        generating = {job for job in active if job.n_new}
        # Short remainders first: those that generate are one token away from their next.
        for job in sorted(active, key=lambda job: len(job.tokens) - job.fed):
            while job.fed < len(job.tokens) and not self._batch.full:
                last = job.fed == len(job.tokens) - 1
                output = last if job in generating else job.fed in job.wanted
                if output and len(outputs) == self.max_outputs:
                    break
                self._batch.add(job.tokens[job.fed], job.fed, job.slot, output)
                if output:
                    outputs.append((job, job.fed))
                job.fed += 1
        self._decode()
        rows = logit_rows(self._context, len(outputs), self.n_vocab)
        chosen = [number for number, (job, _) in enumerate(outputs) if job in generating]
        if visit is not None:
            for (job, position), row in zip(outputs, rows, strict=True):
                if job not in generating:
                    visit(job.index, position, row)
        done = [job for job in active if job not in generating and job.fed == len(job.tokens)]
        if choose is not None and chosen:
            done += choose(rows[chosen], [outputs[number][0] for number in chosen])
        return done

    def _decode(self, stands_for: int = 1) -> None:
        if self._watch is not None:
            self._watch.expect(stands_for)
        with interrupts_deferred():
            code = llama_cpp.llama_decode(self._context, self._batch.struct())
        if code:
            raise LlamaCppError(
                f"llama.cpp could not decode a batch of {self._batch.size} tokens (code {code})",
                "Give a larger n_ctx or a smaller n_parallel",
            )


def context_params(
    llama: SafeLlama, n_ctx: int, n_seq_max: int, flash_attn: bool | None = None
) -> Any:
    """llama.cpp's settings of another context on a model, as its own but for these."""
    require_cells(llama._file, n_ctx)
    params, own = llama_cpp.llama_context_default_params(), llama.context_params
    for name in ("rope_scaling_type", "rope_freq_base", "rope_freq_scale", "type_k", "type_v",
                 "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow",
                 "yarn_orig_ctx", "offload_kqv", "op_offload", "flash_attn_type"):  # fmt: skip
        setattr(params, name, getattr(own, name))
    if flash_attn is not None:
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if flash_attn
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
    params.n_ctx, params.n_seq_max, params.kv_unified = n_ctx, n_seq_max, True
    return params
