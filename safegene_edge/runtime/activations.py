"""What a model's tensors read, and the directions that it lies along.

The model reads prompts and begins its answers, with its adapters on. llama.cpp calls back before
and after each node of its graph (`cb_eval`). Of a product with one of the wanted weights, the other
factor is the input; llama-imatrix looks in the same place. What was read goes to a temporary file,
because all layers' together is larger than a small model. `merge` keeps rounding errors off these
directions; design/merging.md says why.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

import llama_cpp
import numpy as np

from ..aliases import Floats
from ..errors import LlamaCppError, OutputError
from ..files import scratch_file
from .engine import Engine
from .graph import is_matrix, library, node_at, values
from .llama import SafeLlama

COUNT = 256  # directions a tensor
ANSWER = 8  # tokens of its own that a model reads behind each prompt
_BATCH = 128  # tokens a decode: memory is taken for each


class _Watch:
    """The callback, and what it has copied to a file: pieces (tokens×in) of each tensor's inputs.

    Projections of one input share what the first of them copied.
    """

    def __init__(self, tensors: Iterable[str], file: IO[bytes]) -> None:
        self.wanted = frozenset(tensors)
        self.seen: dict[str, list[tuple[int, int, int]]] = {}  # place in the file, tokens, in
        self.shares: dict[str, str] = {}
        self.error: Exception | None = None
        self._file = file
        self.fault = ""
        self._weight = np.float32(1)
        self._checked = False  # that the fields above are where this ggml has them
        self._known: dict[int, str] = {}  # the input's address in this graph
        self.call = llama_cpp.ggml_backend_sched_eval_callback(self._called)

    def expect(self, count: int) -> None:
        """The next tokens that are decoded stand for `count` times as many."""
        self._known.clear()
        self._weight = np.float32(count**0.5)

    def _called(self, address: Any, ask: bool, _: Any) -> bool:
        try:
            return self._seen(address, ask)
        except Exception as error:  # which llama.cpp, our caller, would not pass on
            self.error = self.error or error
            return not ask

    def _seen(self, address: Any, ask: bool) -> bool:
        node = node_at(address)
        if not self._checked and library().ggml_get_name(address) != node.name:
            return not ask  # nothing is seen, which is an error in the end
        self._checked = True
        weight = node.src[0]
        name = weight.contents.name.decode("utf-8", "replace") if weight and node.src[1] else ""
        if name not in self.wanted:
            return not ask  # before: not wanted; after: go on
        if not ask:
            self._copy(name, node.src[1])
        return True

    def _copy(self, name: str, source: Any) -> None:
        first = self._known.setdefault(ctypes.addressof(source.contents), name)
        self.shares[name] = first
        if first != name:
            return
        tensor = source.contents
        if not is_matrix(tensor):
            self.fault = name
            return
        inputs = values(tensor)
        inputs *= self._weight
        place, left = self._file.seek(0, os.SEEK_END), inputs.reshape(-1).view(np.uint8).data
        while left:
            left = left[self._file.write(left) :]
        self.seen.setdefault(name, []).append((place, *inputs.shape))

    def read(self, name: str) -> Floats:
        """All that a tensor has read (tokens×in)."""
        pieces = []
        for place, rows, width in self.seen[name]:
            self._file.seek(place)
            data = self._file.read(4 * rows * width)
            pieces.append(np.frombuffer(data, np.float32).reshape(rows, width))
        return np.concatenate(pieces)


def directions(
    llama: SafeLlama, tensors: Iterable[str], prompts: Sequence[Sequence[int]], count: int = COUNT
) -> dict[str, Floats]:
    """The directions (k×in) of tensors' inputs; see `inputs_of`.

    With C = E[x x^T] over all tokens, l_i and v_i its largest eigenvalues and their vectors, and
    r the mean of the other eigenvalues, a direction is the row sqrt(l_i / r) v_i: for an error e
    of a row of weights, |e|^2 + sum_i (direction_i . e)^2 is E[(e . x)^2] / r, with the rest of
    C taken as even.

    Args:
        prompts: token sequences; count: directions a tensor, at most.

    Raises:
        LlamaCppError: a prompt could not be decoded, or an input is no plain matrix.
    """
    found: dict[str, Floats] = {}
    for names, sample in inputs_of(llama, tensors, prompts):
        found |= dict.fromkeys(names, directions_of(sample, count))
    return found


def directions_of(inputs: Floats, count: int = COUNT) -> Floats:
    """The directions (k×in) of a sample of inputs (tokens×in); see `directions`."""
    wide = inputs.astype(np.float64)
    width = wide.shape[1]
    few = len(wide) < width
    values, vectors = np.linalg.eigh(wide @ wide.T if few else wide.T @ wide)
    kept = np.flatnonzero(values > 1e-9 * max(values[-1], 1e-9))[::-1]
    kept = kept[: min(count, width // 2)]
    rows = vectors[:, kept].T
    if few:
        rows = rows @ wide / np.sqrt(values[kept])[:, None]
    rest = max(0.0, float(values.sum() - values[kept].sum())) / (width - len(kept))
    # A sample that these directions explain wholly says nothing of the rest.
    rest = max(rest, 1e-6 * float(values[-1]), 1e-30)
    return np.asarray(np.sqrt(values[kept] / rest)[:, None] * rows, np.float32)


def inputs_of(
    llama: SafeLlama, tensors: Iterable[str], prompts: Sequence[Sequence[int]]
) -> Iterator[tuple[list[str], Floats]]:
    """What tensors read (tokens×in), while the model reads prompts and begins its answers.

    Its adapters are on, at the scales that are set. Tokens that all prompts begin with, such as a
    template's system prompt, are read once; their rows are multiplied by the root of the number of
    prompts, which leaves the second moments as they are. Where the model's last layer reads only
    tokens whose logits are asked for, so do the samples: a prompt's last one, and the answer's.
    Projections of one input come together.

    Raises:
        LlamaCppError: a prompt could not be decoded, or a tensor is never read as a plain matrix.
        OutputError: the folder for temporary files is full.
    """
    tokens = ANSWER + 1  # an answer's last token is not read
    cells = sum(len(prompt) + tokens for prompt in prompts)
    with scratch_file() as file:
        watch = _Watch(tensors, file)
        # All at once: one that took another's slot over would not read what both begin with.
        with Engine(
            llama, n_parallel=len(prompts), n_ctx=cells, n_batch=_BATCH, flash_attn=True,
            watch=watch,
        ) as engine:  # fmt: skip
            engine.generate(prompts, max_tokens=tokens)
        if isinstance(watch.error, OSError):
            raise OutputError(
                f"{tempfile.gettempdir()}: cannot hold what the model reads ({watch.error})",
                "Name a folder with free space in TMPDIR",
            )
        if watch.error is not None:
            raise watch.error
        for name in sorted(watch.wanted):
            if watch.shares.get(name) not in watch.seen or name == watch.fault:
                raise LlamaCppError(f"the inputs of '{name}' cannot be watched")
        for first in watch.seen:
            names = [name for name in watch.wanted if watch.shares[name] == first]
            yield sorted(names), watch.read(first)
