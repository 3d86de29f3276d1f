"""Contexts that decode in lock-step, and may change the residual stream in each layer.

Each lane decodes one batch in a context of its own. All stop where a layer has added its attention
to the residual stream: the node that adds to `l_out` of the layer below. There a visitor sees what
`attn_output` reads and the states of all lanes, and may put others in their place; what follows in
the same decode is computed from those. So a change of `attn_output` can be fitted to one layer and
be at work before the next one is computed: a fit of all layers costs one forward pass.

Lanes may also answer: each goes on by itself, a token a sequence and step, and shows the states.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, TypeVar

import llama_cpp
import numpy as np

from ..aliases import Floats
from ..errors import LlamaCppError, SettingError
from .batch import Ints, batch_struct, common_prefix
from .graph import is_matrix, library, name_of, node_at, put, values
from .llama import SafeLlama
from .log import reason
from .schedule import Scales, context_params

WRITER = "attn_output"  # the tensor whose product is added to the residual stream
_BELOW = "l_out-{}"
T = TypeVar("T")


@dataclass(frozen=True)
class States:
    """What one lane shows in one layer; rows are those of the batch. They last until it goes on.

    Attributes:
        inputs: what `attn_output` reads (rows×in).
        stream: the residual stream with the attention added (rows×width).
        output: what `attn_output` and the adapters on it give (rows×width), where a norm lies
            between that and the stream; else None.
    """

    inputs: Floats
    stream: Floats
    output: Floats | None


Visit = Callable[[int, list[States]], "list[Floats] | None"]  # layer, lanes -> streams
See = Callable[[int, int, list[int], int, States], None]
"""Lane, step, the sequences that have a row each (step 0: the whole batch), layer, states."""
_Meet = Callable[[int, States], "Floats | None"]


class Lane:
    """Sequences that one context decodes in one batch: what all open with once, then each.

    Args:
        sequences: tokens, at most llama.cpp's limit of sequences.
        scales: the adapters that are on.
        outputs: positions of each whose logits are wanted.
        room: tokens that each may be continued by.
    """

    def __init__(
        self,
        llama: SafeLlama,
        sequences: Sequence[Sequence[int]],
        scales: Scales,
        outputs: Sequence[Iterable[int]] = (),
        room: int = 0,
    ) -> None:
        limit = int(llama_cpp.llama_max_parallel_sequences())
        if not 1 <= len(sequences) <= limit or not all(sequences):
            raise SettingError(
                f"a lane has {len(sequences)} sequences", f"Give 1 to {limit}, none empty"
            )
        self.llama, self.sequences, self.scales, self.room = llama, sequences, scales, room
        self.prefix = common_prefix(sequences)
        own = [len(sequence) - self.prefix for sequence in sequences]
        self._starts = list(accumulate(own, initial=self.prefix))
        self.rows = self._starts[-1]
        self.outputs = sorted(
            self.row(number, position)
            for number, wanted in enumerate(outputs)
            for position in wanted
        )

    def row(self, sequence: int, position: int) -> int:
        """Where in the batch a token is."""
        if position < self.prefix:
            return position
        return self._starts[sequence] + position - self.prefix

    def params(self, call: Any) -> Any:
        """Of a context that decodes all in one micro-batch, seen by an eval callback."""
        count = len(self.sequences)
        params = context_params(self.llama, self.rows + count * self.room, count, flash_attn=True)
        params.n_batch = params.n_ubatch = max(self.rows, count)
        params.n_outputs_max = max(len(self.outputs), count)
        params.n_threads = params.n_threads_batch = 1
        params.cb_eval = call
        return params

    def decode(self, context: Any) -> None:
        """All sequences."""
        token, position = np.zeros(self.rows, np.int32), np.zeros(self.rows, np.int32)
        for number, sequence in enumerate(self.sequences):
            rows = slice(self._starts[number], self._starts[number + 1])
            token[rows] = sequence[self.prefix :]
            position[rows] = np.arange(self.prefix, len(sequence))
        shared = slice(0, self.prefix)
        token[shared], position[shared] = self.sequences[0][: self.prefix], np.arange(self.prefix)
        owner = np.repeat(np.arange(len(self.sequences)), np.diff(self._starts))
        self.feed(context, token, position, owner, self.outputs)

    def feed(
        self, context: Any, token: Ints, position: Ints, owner: Any, outputs: Sequence[int]
    ) -> None:
        """One decode; where owners are fewer, the first tokens belong to all sequences."""
        size, every = len(token), np.arange(len(self.sequences), dtype=np.int32)
        count, output = np.ones(size, np.int32), np.zeros(size, np.int8)
        pointers = np.full(size, every.ctypes.data, np.uint64)
        shared = size - len(owner)
        pointers[shared:] += (every.itemsize * np.asarray(owner)).astype(np.uint64)
        count[:shared], output[list(outputs)] = len(every), 1
        batch = batch_struct(size, token, position, count, pointers, output)
        code = llama_cpp.llama_decode(context, batch)
        if code:
            raise LlamaCppError(
                f"llama.cpp could not decode a batch of {size} tokens (code {code})",
                "Learn from fewer prompts",
            )

    def logits(self, context: Any, count: int) -> Floats:
        """The last decode's rows (count×vocabulary), not copied."""
        pointer = llama_cpp.llama_get_logits(context)
        return np.asarray(np.ctypeslib.as_array(pointer, shape=(count, self.llama.n_vocab())))


def run(lanes: Sequence[Lane], layers: Iterable[int], visit: Visit) -> list[Floats]:
    """Decode all lanes, stopping together at these layers.

    Args:
        layers: from 1 to the last but one; in the last one llama.cpp drops rows.
        visit: called once a layer, from one of the lanes' threads.

    Returns:
        Each lane's logits (outputs×vocabulary), in the order of its rows.

    Raises:
        LlamaCppError: a model's graph has no such node in one of the layers, or llama.cpp fails.
    """
    return _Together(lanes, sorted(layers), visit).go()


def answer(
    lanes: Sequence[Lane], layers: Iterable[int], tokens: int, see: See, at_once: int = 2
) -> list[list[list[int]]]:
    """Decode all lanes, and then what each sequence is answered with, greedily.

    Args:
        lanes: with room for the answers, and each sequence's last position as its output.
        tokens: of an answer, at most.
        see: called in each layer of each decode, from the lanes' threads. Answers' tokens are
            read, too, the last one as well.
        at_once: lanes that run side by side.

    Returns:
        Each lane's answers; one that ends has the end token at its end.
    """
    return _Answers(lanes, sorted(layers), tokens, see, at_once).go()


class _Run(Generic[T]):
    """Lanes in threads; the first error ends all."""

    def __init__(self, lanes: Sequence[Lane], layers: list[int]) -> None:
        self.lanes, self.layers = lanes, layers
        self.error: BaseException | None = None

    def go(self) -> T:
        """Run to the end; returns what `result` says."""
        # Not Thread.join: interrupted, it takes the thread for one that has ended (CPython 3.11).
        ended = [threading.Event() for _ in self.lanes]
        started = 0
        try:
            for number, event in enumerate(ended):
                threading.Thread(target=self._lane_to_end, args=(number, event)).start()
                started += 1
            for event in ended:
                event.wait()
        except BaseException as error:  # Ctrl-C
            self.fail(error)
            for event in ended[:started]:
                event.wait()
        if self.error is not None:
            raise self.error
        return self.result()

    def fail(self, error: BaseException) -> None:
        """Let all lanes run out; the first error counts."""
        self.error = self.error or error

    def result(self) -> T:
        """Of all lanes."""
        raise NotImplementedError

    def meet(self, number: int, layer: int, states: States) -> Floats | None:
        """A lane's states in a layer; its new stream, or None."""
        raise NotImplementedError

    def decode(self, number: int, context: Any) -> None:
        """What one lane does."""
        raise NotImplementedError

    def _lane_to_end(self, number: int, ended: threading.Event) -> None:
        try:
            self._lane(number)
        finally:
            ended.set()

    def _lane(self, number: int) -> None:
        lane = self.lanes[number]
        stops = _Stops(self, lane, lambda layer, states: self.meet(number, layer, states))
        try:
            with _Context(lane, stops) as context:
                self.decode(number, context)
                if self.error is None:
                    stops.require_all()
        except threading.BrokenBarrierError:
            pass  # another lane's error
        except BaseException as error:
            self.fail(error)


class _Together(_Run[list[Floats]]):
    def __init__(self, lanes: Sequence[Lane], layers: list[int], visit: Visit) -> None:
        super().__init__(lanes, layers)
        self.visit = visit
        self._layer = 0
        self._states: list[States | None] = [None] * len(lanes)
        self._changed: list[Floats] | None = None
        self._logits = [np.empty((0, 0), np.float32)] * len(lanes)
        self._barrier = threading.Barrier(len(lanes), action=self._all_met)

    def fail(self, error: BaseException) -> None:
        super().fail(error)
        self._barrier.abort()

    def result(self) -> list[Floats]:
        return self._logits

    def meet(self, number: int, layer: int, states: States) -> Floats | None:
        self._states[number], self._layer = states, layer
        self._barrier.wait()
        return None if self._changed is None else self._changed[number]

    def _all_met(self) -> None:
        found = [state for state in self._states if state is not None]
        self._changed = self.visit(self._layer, found)
        self._states = [None] * len(self.lanes)

    def decode(self, number: int, context: Any) -> None:
        lane = self.lanes[number]
        lane.decode(context)
        if lane.outputs and self.error is None:
            self._logits[number] = lane.logits(context, len(lane.outputs)).copy()


class _Answers(_Run[list[list[list[int]]]]):
    def __init__(
        self, lanes: Sequence[Lane], layers: list[int], tokens: int, see: See, at_once: int
    ) -> None:
        super().__init__(lanes, layers)
        self.tokens, self.see = tokens, see
        self._turns = threading.Semaphore(at_once)
        self._said = [[list[int]() for _ in lane.sequences] for lane in lanes]
        self._now: list[tuple[int, list[int]]] = [
            (0, list(range(len(one.sequences)))) for one in lanes
        ]

    def result(self) -> list[list[list[int]]]:
        return self._said

    def _lane(self, number: int) -> None:
        with self._turns:
            if self.error is None:
                super()._lane(number)

    def meet(self, number: int, layer: int, states: States) -> None:
        step, active = self._now[number]
        self.see(number, step, active, layer, states)

    def decode(self, number: int, context: Any) -> None:
        lane, said = self.lanes[number], self._said[number]
        model = lane.llama.model
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        lane.decode(context)
        fed = alive = list(range(len(lane.sequences)))  # sequences with a row; those that go on
        for step in range(1, self.tokens + 1):
            if self.error is not None or not alive:
                return
            rows = [fed.index(sequence) for sequence in alive]
            chosen = lane.logits(context, len(fed))[rows].argmax(1).tolist()
            for sequence, token in zip(alive, chosen, strict=True):
                said[sequence].append(token)
            self._now[number], fed = (step, alive), alive
            place = np.array([len(lane.sequences[n]) + step - 1 for n in fed], np.int32)
            lane.feed(context, np.array(chosen, np.int32), place, fed, range(len(fed)))
            alive = [
                sequence for sequence, token in zip(fed, chosen, strict=True)
                if not llama_cpp.llama_vocab_is_eog(vocabulary, token)
            ]  # fmt: skip


class _Context:
    """A lane's context, closed with its model at the latest."""

    def __init__(self, lane: Lane, stops: _Stops) -> None:
        self.lane, self.stops = lane, stops
        self._free: Any = None

    def __enter__(self) -> Any:
        lane = self.lane
        with reason() as why:
            context = lane.llama.open_context(self, lane.params(self.stops.call))
        if not context:
            raise LlamaCppError(
                why.after(f"llama.cpp could not make a context of {lane.rows} cells"),
                "Learn from fewer prompts",
            )
        self._free = weakref.finalize(self, llama_cpp.llama_free, context)
        llama_cpp.llama_set_abort_callback(context, self.stops.abort, None)
        lane.llama.set_adapters_on(context, lane.scales)
        return context

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free it."""
        if self._free is not None:
            self._free()

    def require_closable(self) -> None:
        """The model must not go away in the midst of a decode."""
        if self._free is not None and self._free.alive:
            raise LlamaCppError("a gene is being learnt from the model", "Wait for its end")

    def release(self, handle: Any) -> None:
        """Adapters stay as long as the pass lasts."""
        if handle in self.lane.scales:
            self.require_closable()


class _Stops:
    """One lane's eval callback."""

    def __init__(self, run: _Run[Any], lane: Lane, meet: _Meet) -> None:
        self.run, self.lane, self.meet = run, lane, meet
        self._writers = {f"blk.{layer}.{WRITER}.weight": layer for layer in run.layers}
        self._met: set[int] = set()
        self._ggml = library()
        self._checked = False
        self._layer: int | None = None  # between its product and the sum
        self._normed = False
        # Used again from layer to layer: new arrays each time would cost memory in every thread.
        self._inputs: Floats | None = None
        self._output: Floats | None = None
        self._stream: Floats | None = None
        self._writer = 0  # the address of the node that the output is of
        self.call = llama_cpp.ggml_backend_sched_eval_callback(self._called)
        self.abort = llama_cpp.ggml_abort_callback(lambda _: run.error is not None)

    def _called(self, address: Any, ask: bool, _: Any) -> bool:
        if self.run.error is not None:
            return not ask
        try:
            return self._seen(address, ask)
        except threading.BrokenBarrierError:
            return not ask
        except BaseException as error:  # which llama.cpp, our caller, would not pass on
            self.run.fail(error)
            return not ask

    def _seen(self, address: Any, ask: bool) -> bool:
        node = node_at(address)
        if not self._checked and self._ggml.ggml_get_name(address) != node.name:
            return not ask  # fields are not where we look: no layer is met, an error in the end
        self._checked = True
        if not node.src[0]:
            return not ask
        name = name_of(node.src[0].contents)
        if name in self._writers and node.src[1]:
            if not ask:
                self._layer, self._normed = self._writers[name], False
                self._inputs = self._matrix(node.src[1].contents, self._inputs)
                self._take(node)
            return True
        return self._behind(node, name, ask) if self._layer is not None else not ask

    def _behind(self, node: Any, name: str, ask: bool) -> bool:
        """A node between the product of `attn_output`, which has been, and the sum."""
        assert self._layer is not None
        kind = self._ggml.ggml_op_name(node.op)
        self._normed |= kind == b"RMS_NORM"
        if kind != b"ADD":
            self._require_plain(node, name, kind)
            return not ask
        below = _BELOW.format(self._layer - 1)
        is_sum = below in (name, name_of(node.src[1].contents))
        if not is_sum and ctypes.addressof(node.src[0].contents) != self._writer:
            return not ask
        if not ask:
            self._sum(node) if is_sum else self._take(node)  # what an adapter has added
        return True

    def _require_plain(self, node: Any, name: str, kind: bytes) -> None:
        """What is added is what `attn_output` gives, or a norm of it. Granite scales it first."""
        if kind == b"RMS_NORM" or ctypes.addressof(node.src[0].contents) != self._writer:
            return
        raise LlamaCppError(
            f"{self.lane.llama.model_path}: in layer {self._layer} the node '{name}' goes through "
            f"{kind.decode()} before it is added to the residual stream",
            "A gene for this architecture cannot be learnt by forward passes",
        )

    def _take(self, node: Any) -> None:
        """Copied at once: a norm may be computed in its place."""
        self._output, self._writer = self._matrix(node, self._output), ctypes.addressof(node)

    def _sum(self, node: Any) -> None:
        inputs, output, layer = self._inputs, self._output, self._layer
        assert inputs is not None and layer is not None
        self._stream = self._matrix(node, self._stream)
        found = States(inputs, self._stream, output if self._normed else None)
        self._layer = None
        self._met.add(layer)
        changed = self.meet(layer, found)
        if changed is not None:
            put(node, changed)

    def _matrix(self, tensor: Any, into: Floats | None) -> Floats:
        if not is_matrix(tensor):
            raise LlamaCppError(
                f"{self.lane.llama.model_path}: the node '{name_of(tensor)}' of layer "
                f"{self._layer} is no plain matrix of float32",
                "A gene for this architecture cannot be learnt by forward passes",
            )
        return values(tensor, into)

    def require_all(self) -> None:
        """LlamaCppError where a layer was not met."""
        missing = sorted(set(self.run.layers) - self._met)
        if missing:
            raise LlamaCppError(
                f"{self.lane.llama.model_path}: in layer {missing[0]} no node adds what {WRITER} "
                "gives to the residual stream ('l_out' of the layer below)",
                "This architecture, or this version of llama.cpp, is built otherwise; a gene for "
                "it cannot be learnt by forward passes",
            )
