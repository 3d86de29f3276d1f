"""What the engine and the batcher share: llama.cpp's batch, and what of its KV cache is kept."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from ..aliases import Floats

Ints = npt.NDArray[np.int32]


class Batch:
    """llama.cpp's batch over numpy buffers: a token costs four stores, no ctypes objects."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.size = capacity, 0
        self._token = np.zeros(capacity, np.int32)
        self._position = np.zeros(capacity, np.int32)
        self._n_sequences = np.ones(capacity, np.int32)
        self._sequence = np.zeros(capacity, np.int32)
        self._output = np.zeros(capacity, np.int8)
        step = self._sequence.itemsize
        self._sequences = self._sequence.ctypes.data + step * np.arange(capacity, dtype=np.uint64)

    @property
    def full(self) -> bool:
        return self.size == self.capacity

    def clear(self) -> None:
        self.size = 0

    def add(self, token: int, position: int, sequence: int, output: bool) -> None:
        i = self.size
        self._token[i], self._position[i] = token, position
        self._sequence[i], self._output[i] = sequence, output
        self.size = i + 1

    def struct(self) -> Any:
        return batch_struct(self.size, self._token, self._position, self._n_sequences,
                            self._sequences, self._output)  # fmt: skip


def batch_struct(
    size: int, token: Ints, position: Ints, n_sequences: Ints,
    sequences: npt.NDArray[np.uint64], output: npt.NDArray[np.int8],
) -> Any:  # fmt: skip
    """llama.cpp's batch over arrays, which must outlive it; `sequences` are addresses of ids."""

    def pointer(array: npt.NDArray[Any], kind: Any) -> Any:
        return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))

    return llama_cpp.llama_batch(
        n_tokens=size,
        token=pointer(token, llama_cpp.llama_token),
        embd=None,
        pos=pointer(position, llama_cpp.llama_pos),
        n_seq_id=pointer(n_sequences, ctypes.c_int32),
        seq_id=pointer(sequences, ctypes.POINTER(llama_cpp.llama_seq_id)),
        logits=pointer(output, ctypes.c_int8),
    )


def common(a: Sequence[int], b: Sequence[int], most: int) -> int:
    """How many tokens two sequences open with alike, at most `most`; both have as many."""
    return next((i for i in range(most) if a[i] != b[i]), most)


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens that all sequences open with, at least one less than the shortest; 0 of one alone."""
    if len(sequences) < 2:
        return 0
    most = min(map(len, sequences)) - 1
    for sequence in sequences[1:]:
        most = common(sequences[0], sequence, most)
    return most


def logit_rows(context: Any, count: int, n_vocab: int) -> Floats:
    """The rows of logits of a context's last decode, valid until its next."""
    if not count:
        return np.empty((0, n_vocab), np.float32)
    pointer = llama_cpp.llama_get_logits(context)
    return np.asarray(np.ctypeslib.as_array(pointer, shape=(count, n_vocab)), np.float32)


def trim(memory: Any, slot: int, keep: int) -> int:
    """Forget a sequence's tokens from `keep` on; returns how many really are kept."""
    if (
        keep
        # Sliding windows and recurrent states may not hold, or not give up, a part.
        and llama_cpp.llama_memory_seq_pos_min(memory, slot) == 0
        and llama_cpp.llama_memory_seq_rm(memory, slot, keep, -1)
    ):
        return keep
    llama_cpp.llama_memory_seq_rm(memory, slot, -1, -1)
    return 0
