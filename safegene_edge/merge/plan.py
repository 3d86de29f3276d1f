"""Merge adapters into a quantised GGUF; every tensor keeps its type.

Untouched tensors are copied byte for byte. A touched one is read in blocks of rows, gets its update
in float32, and goes back to its own quantisation (`rounding`). Memory does not grow with the model,
unless the model is run first. A merged file does not record which codes changed, so there is no way
back: keep the model and the adapter.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..aliases import Floats, Progress
from ..compat import SHARD, open_model, other_parts, require_fit, whole_hash
from ..errors import NoEffectError, OutputError
from ..files import PathLike, atomic_output, check_output, sha256, writing
from ..gene import Expression
from ..gguf_file import GGUFFile, Value
from ..gguf_file.kernels import TensorType
from ..gguf_file.rewrite import Draft, Place, begin, copy, draft, write_at
from ..runtime.devices import logical_cores
from .codes import layouts
from .imatrix import read_imatrix
from .inputs import KEY, Folded, Given, fold, provenance, require_mergeable, updates_of
from .rounding import Update
from .settings import RUN_UP_TO, MergeSettings
from .workers import WORKER_MEMORY, Job, TensorReport, run_jobs

ENOUGH = 0.8  # of the update must survive, or a warning says so
PROMOTED = {"Q8_0": "F16", "F16": "F32", "BF16": "F32"}  # every smaller type becomes Q8_0
_COPIED = 500e6  # bytes a second, hashed and copied: a laptop's disk
_BASE_MEMORY = 100 << 20  # 71 MiB were measured with SmolLM2, 97 with the vocabulary of Qwen2.5


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, or would do.

    Attributes:
        tensors: the touched ones, in file order.
        untouched: how many others there are.
        before, after: bytes of the model's files.
        rms_error: |error| / |update| over all touched tensors.
        survived: mean of the tensors' shares, weighted by |update|^2.
        warnings: one line each.
    """

    tensors: tuple[TensorReport, ...]
    untouched: int
    before: int
    after: int
    rms_error: float = 0.0
    survived: float = 0.0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a merge that runs no model will take: seconds on this machine, and bytes of memory."""

    seconds: float
    memory: int


def merge(
    model: PathLike,
    adapters: Iterable[Given],
    output: PathLike,
    *,
    settings: MergeSettings | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Write the model with the adapters in its own tensors, each in the type that it had.

    Args:
        model: a GGUF; of a split model the first file.
        adapters: GGUF LoRAs, or (adapter, scale), or (gene, its expression).
        output: the file to write, atomically. Where the input is split and the output's name
            ends in -00001-of-000NN.gguf like the input's, as many files are written, the first
            one last; with any other name they become one file.
        progress: called with the touched weights done and their number.

    Raises:
        FileFormatError: an input is missing or malformed, or an adapter holds NaN.
        MismatchError: an adapter does not fit; each tensor is named.
        UnsupportedError: a touched tensor has a type that ggml cannot write.
        SettingError: a touched tensor's type needs an importance matrix.
        NoEffectError: not a byte of the model would change, or, where the model is run, the
            adapters leave its logits as they were.
        LlamaCppError: the model is to be run, and cannot be.
        OutputError: the output is an input, or cannot be written.
    """
    plan = Plan.of(model, adapters, settings)
    outputs = plan.check_outputs(output)
    if plan.runs_model:
        plan = plan.with_directions()
    if plan.settings.promote:
        plan = plan.promoted(progress)
    found: list[TensorReport] = []
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(1))
        hashing = threads.submit(lambda: [sha256(part.path) for part in plan.parts])
        # Renamed in the reverse of this order: the first file, which stands for the model, last.
        temporary = [stack.enter_context(atomic_output(path, plan.inputs)) for path in outputs]
        for number, path in enumerate(temporary):
            found += plan.write(path, number, len(outputs), hashing.result, progress)
        report = plan.signed(hashing.result()).report(found)
        if not any(t.changed > 0 or (t.changed < 0 and t.survived > 0) for t in report.tensors):
            raise NoEffectError(
                f"{plan.name}: every update is too small for the model's quantisation; "
                "merged, nothing would change",
                "Side-load the adapter, or raise its scale",
            )
    return report


@dataclass(frozen=True)
class Plan:
    """A merge, checked before any work."""

    parts: list[GGUFFile]
    updates: Mapping[str, Update]
    types: Mapping[str, int]  # of the touched tensors, in the output
    folded: Sequence[Folded]
    provenance: Mapping[str, Value]  # of files not hashed yet: as long as it will be
    inputs: tuple[Path, ...]
    importance: Mapping[str, Floats]
    settings: MergeSettings
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, model: PathLike, adapters: Iterable[Given], settings: MergeSettings | None = None
    ) -> Plan:
        """Read and check everything but the weights."""
        settings = settings or MergeSettings()
        whole = open_model(model)
        parts = [whole, *other_parts(whole)]  # the first one's table holds the others' tensors too
        folded = fold(adapters)
        for one in folded:
            require_fit(one.content, whole, one.name)
        updates = updates_of(one.content for one in folded)
        importance = read_imatrix(settings.imatrix) if settings.imatrix else {}
        for name in updates:
            require_mergeable(whole, name, importance)
        types = {name: whole.tensors[name].ggml_type for name in updates}
        files = [part.path for part in parts] + [one.source for one in folded if one.source]
        files += [Path(settings.imatrix)] if settings.imatrix else []
        facts = provenance(["0" * 64 for _ in parts], whole.path, folded)
        return cls(parts, updates, types, folded, facts, tuple(files), importance, settings)

    @property
    def name(self) -> Path:
        return self.parts[0].path

    def signed(self, hashes: list[str]) -> Plan:
        """The plan with the hashes of the model's files, which take a while for a large one."""
        warnings = tuple(
            f"{one.name}: its expression was found for another model"
            for one in self.folded
            if isinstance(one.how, Expression) and one.how.target not in ("", whole_hash(hashes))
        )
        facts = provenance(hashes, self.name, self.folded)
        return replace(self, provenance=facts, warnings=warnings)

    # -- a look at the model ----------------------------------------------

    @property
    def runs_model(self) -> bool:
        """Whether the model is run before its tensors are touched."""
        if self.settings.run is None:
            return sum(part.n_bytes for part in self.parts) <= RUN_UP_TO
        return self.settings.run

    def with_directions(self) -> Plan:
        """The plan with what the touched tensors read; the model runs for it.

        It does not run where no touched tensor has a grid that errors could be shifted on.
        """
        tensors = [n for n in self.updates if self.parts[0].tensors[n].type_name in layouts()]
        if not tensors:
            return self
        from .model_run import read_directions  # which loads llama.cpp

        found = read_directions(self.name, self.folded, tensors)
        updates = updates_of((one.content for one in self.folded), found)
        return replace(self, updates=updates)

    # -- outputs ----------------------------------------------------------

    def check_outputs(self, output: PathLike) -> list[Path]:
        """The files to write; checked for free space, too."""
        check_output(output)  # as it was written: a slash at its end is gone from a Path
        output, count = Path(output), len(self.parts)
        match = SHARD.fullmatch(output.name)
        if match is None:
            paths = [output]
        elif (int(match[2]), int(match[3])) == (1, count):
            paths = [
                output.with_name(f"{match[1]}-{n + 1:05d}-of-{count:05d}.gguf")
                for n in range(count)
            ]
        else:
            raise OutputError(
                f"{output}: the name asks for {int(match[3])} files, the model has {count}",
                f"End it in -00001-of-{count:05d}.gguf, or give a plain name for one file",
            )
        for path in paths:
            check_output(path, self.inputs)
        needed = sum(self.draft(n, len(paths)).n_bytes for n in range(len(paths)))
        with writing(output):
            free = shutil.disk_usage(output.parent).free
        if needed > free:
            raise OutputError(
                f"{output}: needs {needed:,} bytes, {free:,} are free", "Choose another disk"
            )
        return paths

    def draft(self, number: int, count: int) -> Draft:
        """The layout of one of `count` output files."""
        joined = count == 1 < len(self.parts)
        parts = self.parts if joined else [self.parts[number]]
        added = self.provenance if number == 0 else {}
        gone = (*(("split.",) if joined else ()), *((KEY,) if number == 0 else ()))
        return draft(parts, self.types, added, lambda key: key.startswith(gone))

    # -- work -------------------------------------------------------------

    def promoted(self, progress: Progress | None = None) -> Plan:
        """The plan with larger types for the tensors that would keep least of their update."""
        places = [p for p in self.draft(0, 1).places if p.info.name in self.updates]
        rows = run_jobs(self.jobs(places), None, self.settings.threads, progress)
        worst = sorted(rows, key=lambda r: (r.survived, r.name))
        worst = [r for r in worst if r.before != "F32"][: self.settings.promote]
        larger = {row.name: _promoted(row.before).number for row in worst}
        return replace(self, types={**self.types, **larger})

    def write(
        self,
        path: Path,
        number: int,
        count: int,
        hashes: Callable[[], list[str]],
        progress: Progress | None,
    ) -> list[TensorReport]:
        """Write one of `count` output files; returns its touched tensors."""
        planned = self.draft(number, count)
        handle = begin(path, planned.n_bytes)
        try:
            touched = [p for p in planned.places if p.info.name in self.updates]
            others = [p for p in planned.places if p.info.name not in self.updates]
            with ThreadPoolExecutor(1) as threads:  # the kernel copies while the codes are found
                copying = threads.submit(copy, others, handle)
                found = run_jobs(self.jobs(touched), path, self.settings.threads, progress)
                copying.result()
            write_at(handle, self.signed(hashes()).draft(number, count).header, 0)
            return found
        finally:
            os.close(handle)

    def jobs(self, places: Iterable[Place]) -> list[Job]:
        """The work on touched tensors, one by one."""
        return [
            Job(self.name, p, (TensorType.of(p.info.ggml_type), TensorType.of(p.ggml_type)),
                self.updates[p.info.name], self.importance.get(p.info.name))
            for p in places
        ]  # fmt: skip

    def estimate(self) -> Estimate:
        """Time and memory, from a sample of each type's rows and of the copying."""
        started, elements, sampled = time.perf_counter(), 0, 0
        seen: dict[int, Place] = {}
        for place in self.draft(0, 1).places:
            if place.info.name in self.updates:
                elements += place.info.n_elements
                seen.setdefault(place.info.ggml_type, place)
        for place in seen.values():
            rows, columns = min(256, place.info.shape[0]), place.info.shape[1]
            width = place.info.n_bytes // place.info.shape[0]
            part = replace(place.info, shape=(rows, columns), n_bytes=rows * width)
            run_jobs(self.jobs([replace(place, info=part)]), None, 1, None)
            sampled += rows * columns
        threads = self.settings.threads or logical_cores()
        work = (time.perf_counter() - started) * elements / sampled / threads
        copied = sum(part.n_bytes for part in self.parts) / _COPIED
        halves = sum(u.a.nbytes + u.b.nbytes + u.seen.nbytes for u in self.updates.values())
        return Estimate(work + copied, _BASE_MEMORY + halves + threads * WORKER_MEMORY)

    def report(self, rows: Sequence[TensorReport]) -> MergeReport:
        """The whole merge, from its tensors; without them, the plan."""
        drafts = [self.draft(n, len(self.parts)) for n in range(len(self.parts))]
        places = [p for d in drafts for p in d.places]
        if not rows:
            rows = [TensorReport(p.info.name, p.info.shape, p.info.type_name,
                                 TensorType.of(p.ggml_type).name, p.n_bytes)
                    for p in places if p.info.name in self.updates]  # fmt: skip
        updates = sum(row.update**2 for row in rows)
        errors = sum(row.error**2 for row in rows)
        survived = sum(row.survived * row.update**2 for row in rows) / updates if updates else 0.0
        warnings = self.warnings
        if updates and survived < ENOUGH:
            cost = self.promotion_bytes(rows)
            warnings += (
                f"only {100 * survived:.0f} % of the update survives the model's quantisation: "
                f"side-load the adapter, or give --promote {self.settings.promote + len(cost)} "
                f"({sum(cost):,} bytes more)",
            )
        return MergeReport(
            tuple(rows), len(places) - len(self.updates), sum(p.n_bytes for p in self.parts),
            sum(d.n_bytes for d in drafts), float(np.sqrt(errors / updates)) if updates else 0.0,
            survived, warnings,
        )  # fmt: skip

    def promotion_bytes(self, rows: Sequence[TensorReport]) -> list[int]:
        """What promoting each tensor that keeps too little would cost."""
        return [
            _promoted(row.after).width(int(np.prod(row.shape))) - row.n_bytes
            for row in rows
            if row.survived < ENOUGH and row.after != "F32"
        ]


def _promoted(kind: str) -> TensorType:
    return TensorType.named(PROMOTED.get(kind, "Q8_0"))
