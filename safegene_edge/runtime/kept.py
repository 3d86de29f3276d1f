"""Keys and values of sequences that gave up their slot, within a bound of memory.

A prompt that comes again, or the next turn of a conversation that others have pushed out of its
slot, goes on from there and is not read anew. Those that were not used for longest go first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from .batch import common

_Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False, slots=True)
class State:
    """A sequence's tokens, with their keys and values as llama.cpp writes them."""

    tokens: tuple[int, ...] = ()
    data: _Bytes = field(default_factory=lambda: np.empty(0, np.uint8))


class KeptStates:
    """States of one context's sequences, by their tokens.

    Args:
        context: llama.cpp's; its adapters never change.
        most: bytes that all states together may take; 0 keeps none.
    """

    def __init__(self, context: Any, most: int) -> None:
        self._context, self._memory = context, llama_cpp.llama_get_memory(context)
        self.most, self.size = most, 0
        self._states: dict[tuple[int, ...], State] = {}  # the longest unused first

    def __len__(self) -> int:
        return len(self._states)

    def keep(self, sequence: int, tokens: Sequence[int]) -> None:
        """Copy a sequence's keys and values, which are those of `tokens`, where there is room.

        Sliding windows and recurrent states, which hold no whole text, are not kept.
        """
        if not self.most or llama_cpp.llama_memory_seq_pos_min(self._memory, sequence) != 0:
            return
        key = tuple(tokens)
        longer = next((known for known in self._states if key == known[: len(key)]), None)
        if longer is not None:
            self._use(longer)  # it says all of this one
            return
        size = int(llama_cpp.llama_state_seq_get_size(self._context, sequence))
        if not 0 < size <= self.most:
            return
        for known in [known for known in self._states if known == key[: len(known)]]:
            self._drop(known)  # this one says all of it
        while self.size + size > self.most:
            self._drop(next(iter(self._states)))
        try:
            data = np.empty(size, np.uint8)
        except MemoryError:  # a convenience, and no reason to fail
            return
        got = llama_cpp.llama_state_seq_get_data(self._context, _pointer(data), size, sequence)
        if got == size:
            self._states[key] = State(key, data)
            self.size += size

    def best(self, prompt: Sequence[int], most: int) -> tuple[State, int]:
        """What has most in common with a prompt's first `most` tokens, and how many it has.

        It can be loaded, too, when others have taken its room by then.
        """
        found, length = State(), 0
        for state in self._states.values():
            alike = common(prompt, state.tokens, min(most, len(state.tokens)))
            if alike > length:
                found, length = state, alike
        return found, length

    def load(self, state: State, sequence: int) -> bool:
        """Put keys and values into an empty sequence; whether there was room for them."""
        if state.tokens in self._states:
            self._use(state.tokens)
        data, size = _pointer(state.data), len(state.data)
        return bool(llama_cpp.llama_state_seq_set_data(self._context, data, size, sequence))

    def clear(self) -> None:
        """Forget all of it."""
        self._states.clear()
        self.size = 0

    def _use(self, tokens: tuple[int, ...]) -> None:
        self._states[tokens] = self._states.pop(tokens)  # the last one to go

    def _drop(self, tokens: tuple[int, ...]) -> None:
        self.size -= len(self._states.pop(tokens).data)


def _pointer(data: _Bytes) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
