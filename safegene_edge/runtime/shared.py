"""A `llama_cpp.Llama` that threads may share: nothing is freed, or changed, under a live call.

Its own context serves one call at a time. Contexts that others open on the model are closed before
it. A call on a closed model raises.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import llama_cpp

from ..errors import LlamaCppError, SettingError
from ..gene import Adapter, AdapterLike
from ..hub import resolve
from .batch import Batch, common
from .guard import Forks, Guard, Look
from .log import interrupts_deferred

_OWN, _SPARE = 0, 1  # sequences of the model's own context
_ROWS = 16  # of logits, in one decode of a look


@dataclass(eq=False)
class AttachedAdapter:
    """A handle on an adapter that a model has loaded. Compared by identity."""

    name: str
    scale: float
    content: Adapter = field(repr=False)
    source: Path | None = None
    """The file it was read from."""
    pointer: Any = field(default=None, repr=False)


def find_attached(
    attached: Iterable[AttachedAdapter], adapter: AttachedAdapter | AdapterLike
) -> AttachedAdapter:
    """The handle of an attached adapter.

    Args:
        adapter: the handle, or what `attach` was given: the file's path, or the `Adapter`.

    Raises:
        SettingError: it is not attached, or a path or `Adapter` is attached more than once.
    """
    if isinstance(adapter, AttachedAdapter):
        found, name = [one for one in attached if one is adapter], adapter.name
    elif isinstance(adapter, Adapter):
        found, name = [one for one in attached if one.content is adapter], "the adapter in memory"
    elif isinstance(adapter, (str, os.PathLike)):
        path, name = os.path.realpath(resolve(adapter)), str(adapter)
        found = [one for one in attached if one.source and os.path.realpath(one.source) == path]
    else:
        raise SettingError(f"{adapter!r} is no adapter", "Give what attach returned, or the path")
    if len(found) == 1:
        return found[0]
    if found:
        raise SettingError(f"{name}: is attached {len(found)} times", "Give what attach returned")
    raise SettingError(f"{name}: is not attached to this model")


class OtherAdaptersError(SettingError, KeyError):
    """A state was saved under other adapters. To llama-cpp-python's caches a KeyError is a miss."""


class ContextOwner(Protocol):
    """What has a context of its own on a `SafeLlama`'s model: an `Engine`."""

    def require_closable(self) -> None:
        """LlamaCppError where the calling thread is in the midst of using the context."""

    def close(self) -> None:
        """End what runs on the context, and free it; again does nothing."""

    def release(self, handle: AttachedAdapter) -> None:
        """Take an adapter off the context; SettingError where an answer depends on it."""


def _while_open(method: Callable[..., Any]) -> Any:
    """The method as a call that closing waits for."""

    @functools.wraps(method)
    def call(self: SharedLlama, *args: Any, **options: Any) -> Any:
        with self._in_use():
            return method(self, *args, **options)

    return call


def _alone(method: Callable[..., Any], *, spoils_streams: bool = True) -> Any:
    """The method as a call that has the model's own context to itself."""

    @functools.wraps(method)
    def call(self: SharedLlama, *args: Any, **options: Any) -> Any:
        with self._own_context() as outermost:
            if outermost and spoils_streams:
                self._turn += 1
            return method(self, *args, **options)

    return call


class SharedLlama(llama_cpp.Llama):  # type: ignore[misc]
    """What `SafeLlama` knows of threads, of other contexts on its model, and of closing."""

    def _share(self) -> None:
        """Make the locks; called before anything else."""
        self._owners: weakref.WeakSet[ContextOwner] = weakref.WeakSet()
        # Locks are taken in this order: the turn on the own context, an engine's, the guard.
        self._turns = _Turns()
        self._guard = threading.RLock()  # adapters and contexts change one at a time
        # Calls, each with its thread; it is freed when there are none.
        self._users: dict[object, int] = {}
        self._unused = threading.Condition()
        self._turn = 0  # grows when a stream that was begun before cannot go on
        self._closed = False
        self._most_new: int | None = None  # tokens of the completion that is being made
        self._cut: list[int] | None = None  # those of one that `_until_full` ended
        self._refusal = ""  # what the guard has ended the completion with that is being made

    @property
    def guard(self) -> Guard | None:
        """What looks at the answers of the model's own context; None where nothing does."""
        return None

    def open_context(self, owner: ContextOwner, params: Any) -> Any:
        """A new llama.cpp context on this model, or None; `owner` is closed before the model."""
        with self._guard:
            self._require_open()
            context = llama_cpp.llama_init_from_model(self.model, params)
            if context:
                self._owners.add(owner)
            return context

    def close(self) -> None:
        """Free the model, its contexts and its adapters; again does nothing.

        Batchers and engines on the model are closed first, so that nothing they use goes
        away under them. A request that still waits ends with "error". A chat or completion in
        another thread ends at its next token, with LlamaCppError, and so does a stream.

        Raises:
            LlamaCppError: a batcher's listener, an engine's callback, or what an answer calls
                (a logits processor, say) calls this.
        """
        if threading.get_ident() in self._users.values():
            raise LlamaCppError(
                "a model cannot be closed by what it calls", "Close it from another thread"
            )
        with self._guard:
            owners = list(self._owners)
            for owner in owners:
                owner.require_closable()
            self._closed = True
        for owner in owners:
            owner.close()
        with self._unused:
            self._unused.wait_for(lambda: not self._users)
        with self._guard:  # for others that close it, too
            self._let_go()
            if hasattr(self, "_stack"):  # __del__ also runs where the model never loaded
                super().close()
                # llama-cpp-python would go on to use what is freed.
                self._ctx = self._model = self._batch = self.tokenizer_ = _Closed()

    def _require_open(self) -> None:
        if self._closed:
            raise _closed_error()

    def _let_go(self) -> None:
        """Forget what is freed with the model."""

    # -- one thread at a time ---------------------------------------------

    tokenize = _while_open(llama_cpp.Llama.tokenize)
    detokenize = _while_open(llama_cpp.Llama.detokenize)
    n_ctx = _while_open(llama_cpp.Llama.n_ctx)
    n_embd = _while_open(llama_cpp.Llama.n_embd)
    n_vocab = _while_open(llama_cpp.Llama.n_vocab)
    token_bos = _while_open(llama_cpp.Llama.token_bos)
    token_eos = _while_open(llama_cpp.Llama.token_eos)
    token_nl = _while_open(llama_cpp.Llama.token_nl)
    pooling_type = _while_open(llama_cpp.Llama.pooling_type)
    reset = _alone(llama_cpp.Llama.reset)
    eval = _alone(llama_cpp.Llama.eval)
    sample = _alone(llama_cpp.Llama.sample, spoils_streams=False)
    embed = _alone(llama_cpp.Llama.embed)
    _save_state = _alone(llama_cpp.Llama.save_state, spoils_streams=False)
    _load_state = _alone(llama_cpp.Llama.load_state)

    @_alone
    def first_tokens(self, tokens: Sequence[int], count: int) -> list[int]:
        """The first tokens of a greedy answer, in the own context; no guard looks at them."""
        return list(islice(super().generate(tokens, temp=0.0), count))

    @functools.wraps(llama_cpp.Llama.generate)
    def generate(self, *args: Any, **options: Any) -> Any:
        tokens, guard = super().generate(*args, **options), self.guard
        if guard is not None:
            prompt = args[0] if args else options["tokens"]
            tokens = self._watched(tokens, guard, list(prompt))
        limited = self._until_full(tokens, self._most_new, guard.room if guard else 0)
        return self._in_steps(limited, begins=True)

    def _create_completion(self, *args: Any, **options: Any) -> Any:
        # A completion that isn't streamed is one step of this, and its tokens steps of `generate`.
        answers = super()._create_completion(*args, **options)
        limited = self._with_text(answers, options.get("max_tokens"))
        return self._in_steps(limited, begins=False)

    # llama-cpp-python looks at its limits only where the text ends with a whole character. An
    # answer that goes on with bytes of none would run over its limit, and fail where the context
    # ends. The next two methods end it, and give it its text.

    def _until_full(
        self, tokens: Generator[int, Any, None], most: int | None, room: int
    ) -> Generator[int, Any, None]:
        """The tokens, up to as many as were asked for, and as the context holds."""
        sent, found = None, list[int]()
        while True:
            try:
                token = tokens.send(sent)
            except StopIteration:
                return
            found.append(token)
            sent = yield token
            if len(found) == most or self.n_tokens + 1 >= self._n_ctx - room:
                self._cut = found
                return

    def _with_text(
        self, answers: Generator[Any, Any, None], max_tokens: int | None
    ) -> Generator[Any, Any, None]:
        """The answers; one that was ended by `_until_full` has no text of its own."""
        refusal = ""
        while True:
            self._most_new = max_tokens if max_tokens and max_tokens > 0 else None
            self._cut, self._refusal = None, ""
            try:
                answer = next(answers)
            except StopIteration:
                return
            finally:
                self._most_new = None
            choice = answer["choices"][0]
            if self._cut is not None and "usage" in answer and not choice["text"]:
                choice["text"] = self.detokenize(self._cut).decode("utf-8", "ignore")
            refusal = refusal or self._refusal
            if refusal and choice["finish_reason"]:
                choice["finish_reason"] = "content_filter"
                choice["text"] += refusal
                if "usage" not in answer:  # the last of a stream, whose text chats leave out
                    yield {**answer, "choices": [{**choice, "finish_reason": None}]}
                    choice["text"] = ""
            yield answer

    # -- the guard --------------------------------------------------------

    def _watched(
        self, tokens: Generator[int, Any, None], guard: Guard, prompt: list[int]
    ) -> Generator[int, Any, None]:
        """The tokens, up to where the guard ends them with a refusal."""
        if len(prompt) > self._n_ctx - guard.room:
            raise SettingError(
                f"the prompt's {len(prompt)} tokens leave no room for the guard in a context of "
                f"{self._n_ctx}",
                f"Give a larger n_ctx: the guard takes {guard.room} tokens",
            )
        sent, n_new = None, 0
        while True:
            try:
                token = tokens.send(sent)
            except StopIteration:
                return
            if (
                guard.due(n_new, prompt)
                and not llama_cpp.llama_vocab_is_eog(self._model.vocab, token)
                and self._refused(guard, guard.look(_OWN, self.n_tokens, _SPARE))
            ):
                self._refusal = guard.ending(True)
                yield self.token_eos()
                return
            n_new += 1
            sent = yield token

    def refuses(self, request: list[int], guard: Guard) -> bool:
        """Whether the guard refuses a user's last message alone; its tokens.

        Raises:
            SettingError: it is longer than the context.
        """
        with self._own_context():
            if len(request) > self._n_ctx - guard.room:
                raise SettingError(
                    f"the last message's {len(request)} tokens leave no room for the guard in a "
                    f"context of {self._n_ctx}",
                    "Send a shorter one, or give a larger n_ctx",
                )
            if self.n_tokens + len(request) > self._n_ctx - guard.room:
                self.clear()
            memory = llama_cpp.llama_get_memory(self.ctx)
            llama_cpp.llama_memory_seq_rm(memory, _OWN, self.n_tokens, -1)  # as after a `reset`
            keep = common(request, self._input_ids, min(self.n_tokens, len(request) - 1))
            if llama_cpp.llama_memory_seq_pos_min(memory, _OWN):  # of a sliding window, or empty
                keep = 0
            threshold = guard.request_threshold
            return self._refused(guard, Look(_OWN, keep, _SPARE, request[keep:], threshold))

    def _refused(self, guard: Guard, look: Look) -> bool:
        batch = Batch(self.n_batch)

        def decode() -> None:
            with interrupts_deferred():
                code = llama_cpp.llama_decode(self.ctx, batch.struct())
            if code:
                raise LlamaCppError(f"llama.cpp could not decode the guard's look (code {code})")

        self._requires_eval = True  # the logits will be those of the look
        forks = Forks(self.ctx, batch, decode, self.n_vocab(), _ROWS)
        return forks.margins(guard.openers, [look])[0] > look.above

    def _in_steps(
        self, items: Generator[Any, Any, None], *, begins: bool
    ) -> Generator[Any, Any, None]:
        """The items, each made with the own context to itself; LlamaCppError once it is spoilt."""
        turn, sent = None, None
        while True:
            with self._own_context():
                if turn is None and begins:
                    self._turn += 1
                    turn = self._turn
                if turn is not None and turn != self._turn:
                    raise LlamaCppError(
                        "an answer cannot go on: the adapters were changed, or another text was "
                        "begun",
                        "Read a stream to its end first, or answer with a Batcher",
                    )
                try:
                    item = items.send(sent)
                except StopIteration:
                    return
                if not begins:
                    turn = self._turn
            sent = yield item

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Closing waits until this is over."""
        call = object()
        try:  # Ctrl-C may come between any two steps, and a call left here is one for ever
            with self._unused:
                self._require_open()
                self._users[call] = threading.get_ident()
            yield
        finally:
            self._users.pop(call, None)
            with self._unused:
                self._unused.notify_all()

    @contextmanager
    def _own_context(self) -> Iterator[bool]:
        """The own context is this thread's; whether it was not before."""
        with self._in_use(), self._turns as outermost:
            self._require_open()  # a wait may have come before
            yield outermost

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Adapters may be changed on all contexts of the model."""
        if threading.get_ident() in self._users.values():
            raise SettingError(
                "adapters cannot be changed by what an answer calls", "Change them between answers"
            )
        with self._own_context(), self._guard:
            yield

    def _of_own(self, context: Any) -> AbstractContextManager[Any]:
        return self._own_context() if context == self.ctx else nullcontext()


class _Turns:
    """A lock for a thread that may take it again, and which others get in between.

    With an RLock, a thread that makes one token after the other takes it back each time before
    those that wait have woken up.
    """

    def __init__(self) -> None:
        self._next, self._lock = threading.Lock(), threading.Lock()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> bool:
        """Take it; False where the thread has it already."""
        thread = threading.get_ident()
        if self._owner != thread:
            with self._next:  # who waits for the lock keeps the one that had it from its return
                self._lock.acquire()
            self._owner = thread
        self._depth += 1
        return self._depth == 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()


class _Closed:
    """Stands where a freed part of a model was: whatever is asked of it fails."""

    def __getattr__(self, name: str) -> Any:
        raise _closed_error()


def _closed_error() -> LlamaCppError:
    return LlamaCppError("the model is closed", "Load it again")
