"""The work of a merge: tensor by tensor, in processes of their own where there is much of it.

Threads would wait for each other: the search for codes is many short calls of numpy, each of
which takes Python's lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from ..aliases import Bytes, Floats, Progress
from ..child import Child, can_start
from ..errors import FileFormatError, SafeGeneError
from ..files import reading
from ..gguf_file import kernels
from ..gguf_file.kernels import TensorType
from ..gguf_file.rewrite import Place, open_binary, read_at, write_at
from ..runtime.devices import logical_cores
from . import rounding
from .rounding import Update

WORKER_MEMORY = 52 << 20  # bytes that a worker takes with --plain; 81 MiB else, with SmolLM2
_ROWS, _BYTES = 1024, 1 << 20  # of a tensor that are worked on at a time
_WORTH = 8_000_000  # weights below which a worker takes longer to start than to help


@dataclass(frozen=True, slots=True)
class TensorReport:
    """What became of one touched tensor.

    Attributes:
        shape: out×in; before, after: type names; n_bytes: in the output.
        update: Frobenius norm of the update; error: of what is wrong with it after rounding.
        survived: share of the update's effect that is there, by projection: E[(kept x)(u x)] /
            E[(u x)^2] for an update u and inputs x, evenly spread ones where the model's were not
            looked at.
        changed: bytes that differ from the input; -1 where the type changed.
    """

    name: str
    shape: tuple[int, ...]
    before: str
    after: str
    n_bytes: int
    update: float = 0.0
    error: float = 0.0
    survived: float = 0.0
    changed: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor to merge.

    Attributes:
        model: for messages; place: where the tensor lies and goes.
        kinds: its type, before and after; workers need not load gguf-py for it.
        importance: a weight for each column, or None.
    """

    model: Path
    place: Place
    kinds: tuple[TensorType, TensorType]
    update: Update
    importance: Floats | None

    def run(self, handle: int | None) -> TensorReport:
        """Merge the tensor, rows by rows; written to an open file unless `handle` is None.

        Raises:
            SafeGeneError: the update is not finite; FileFormatError: the model's tensor is not.
        """
        info = self.place.info
        rows, columns = info.shape
        kinds = self.kinds
        widths = [kind.width(columns) for kind in kinds]
        block = max(64, min(_ROWS, _BYTES // widths[0]))
        sums, changed = np.zeros(4), 0
        with reading(info.path):
            source = open_binary(info.path, os.O_RDONLY)
        try:
            for start in range(0, rows, block):
                count = min(block, rows - start)
                with reading(info.path):
                    data = read_at(source, count * widths[0], info.offset + start * widths[0])
                raw = np.frombuffer(data, np.uint8).reshape(count, widths[0])
                new, found = self._merged(raw, start)
                sums += found
                changed += int((raw != new).sum()) if kinds[0] == kinds[1] else 0
                if handle is not None:
                    write_at(handle, new.data, self.place.offset + start * widths[1])
        finally:
            os.close(source)
        update, error, effect, lost = map(float, sums)
        return TensorReport(
            info.name, info.shape, kinds[0].name, kinds[1].name, self.place.n_bytes, update**0.5,
            error**0.5, 1 + lost / effect if effect else 1.0,
            changed if kinds[0] == kinds[1] else -1,
        )  # fmt: skip

    def _merged(self, raw: Bytes, start: int) -> tuple[Bytes, npt.NDArray[np.float64]]:
        piece = replace(self.update, b=self.update.b[start : start + len(raw)])
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # looked at below
                new, sums = rounding.merged(raw, self.kinds, piece, self.importance)
            if not np.isfinite(sums).all():
                raise FloatingPointError
            return new, sums
        except FloatingPointError:
            shape = len(raw), self.place.info.shape[1]
            whole = kernels.dequantise(raw, self.kinds[0].number, shape)
            if not np.isfinite(whole).all():
                raise FileFormatError(
                    f"{self.model}: its tensor '{self.place.info.name}' holds NaN or infinity",
                    "Download or convert the model again",
                ) from None
            raise SafeGeneError(
                f"{self.model}: the update of '{self.place.info.name}' is not finite, "
                "or too large for its type",
                "The adapter is broken, or its scale far too large",
            ) from None


def run_jobs(
    jobs: Sequence[Job], output: Path | None, threads: int | None, progress: Progress | None
) -> list[TensorReport]:
    """Do all jobs; the reports come in the jobs' order.

    Args:
        output: an existing file to write into; None only counts what would survive.
        threads: workers at most; default: one a processor.
        progress: called with the weights done and their number.
    """
    total = sum(job.place.info.n_elements for job in jobs)
    count = min(threads or logical_cores(), len(jobs))
    if count < 2 or total < _WORTH or not can_start():
        done = _here(jobs, output)
    else:
        done = _with_workers(_shared_out(jobs, count), output)
    found: dict[str, TensorReport] = {}
    finished = 0
    for report in done:
        found[report.name] = report
        finished += int(np.prod(report.shape))
        if progress is not None:
            progress(finished, total)
    return [found[job.place.info.name] for job in jobs]


def _here(jobs: Sequence[Job], output: Path | None) -> Iterator[TensorReport]:
    handle = None if output is None else open_binary(output, os.O_RDWR)
    try:
        for job in jobs:
            yield job.run(handle)
    finally:
        if handle is not None:
            os.close(handle)


def _shared_out(jobs: Sequence[Job], count: int) -> list[list[Job]]:
    """The jobs in `count` piles of about the same number of weights."""
    piles: list[list[Job]] = [[] for _ in range(count)]
    sizes = [0] * count
    for job in sorted(jobs, key=lambda job: -job.place.info.n_elements):
        least = sizes.index(min(sizes))
        piles[least].append(job)
        sizes[least] += job.place.info.n_elements
    return piles


# -- workers --------------------------------------------------------------

_ALONE = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _with_workers(piles: Sequence[list[Job]], output: Path | None) -> Iterator[TensorReport]:
    """Reports as they come, of a worker for each pile.

    This process takes none: its BLAS has started with a thread for every processor, and each
    waits for the next product in a loop that keeps a worker off its processor.
    """
    queue: SimpleQueue[TensorReport | BaseException | None] = SimpleQueue()
    with ExitStack() as stack:
        for pile in piles:
            worker = stack.enter_context(Child(_here, pile, output, environment=_ALONE))
            threading.Thread(target=_listen, args=(worker, queue), daemon=True).start()
        running = len(piles)
        while running:
            said = queue.get()
            if said is None:
                running -= 1
            elif isinstance(said, BaseException):
                raise said
            else:
                yield said


def _listen(worker: Child, queue: SimpleQueue[TensorReport | BaseException | None]) -> None:
    """Pass on what a worker answers, and in any case its end, which is waited for."""
    try:
        for report in worker.answers():
            queue.put(report)
        queue.put(None)
    except BaseException as error:
        queue.put(error)
