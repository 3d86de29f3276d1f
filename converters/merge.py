"""Merge adapters into a quantised GGUF; every tensor keeps its type.

Untouched tensors are copied byte for byte. A touched one is read in blocks of rows, gets its
update in float32, and goes back to its own quantisation in the way of `rounding`. Memory does
not grow with the model. What cannot be undone: the codes that changed are not recorded, so
there is no way back from a merged file; keep the model and the adapter.
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
import numpy.typing as npt

from ..compat import SHARD, other_parts, require_fit
from ..errors import NoEffectError, OutputError, SafeGeneError, SettingError
from ..gene import Expression
from ..gguf_file import GGUFFile, PathLike, atomic_output, check_output, sha256
from . import kernels, rounding
from .imatrix import read_imatrix
from .merge_inputs import Given, Update, fold, provenance, require_writable, updates_of
from .rewrite import Draft, Place, Value, begin, copy, draft

Floats = npt.NDArray[np.float32]
ENOUGH = 0.8  # of the update must survive, or a warning says so
PROMOTED = {"Q8_0": "F16", "F16": "F32", "BF16": "F32"}  # every smaller type becomes Q8_0
_BLOCK = 1 << 19  # weights that a thread works on at a time
_COPIED = 500e6  # bytes a second, hashed and copied: a laptop's disk
_BASE_MEMORY, _BYTES_A_WEIGHT = 90 << 20, 70
_FLOAT_TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class MergeSettings:
    """Settings of a merge.

    Attributes:
        imatrix: file of an importance matrix; some types need one.
        promote: how many of the touched tensors that keep least of their update get a larger type.
        strength: see `rounding`; 0 rounds to the nearest code, None quantises afresh.
        threads: default: the processors that this process may use.
    """

    imatrix: PathLike | None = None
    promote: int = 0
    strength: float | None = rounding.STRENGTH
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.promote < 0:
            raise SettingError(f"promote is {self.promote}", "Give 0 or more")
        if self.strength is not None and not 0 <= self.strength < float("inf"):
            raise SettingError(f"the strength is {self.strength}", "Give a number from 0 up")
        if self.threads is not None and self.threads < 1:
            raise SettingError(f"threads is {self.threads}", "Give 1 or more")


@dataclass(frozen=True, slots=True)
class TensorReport:
    """What became of one touched tensor.

    Attributes:
        shape: out×in; before, after: type names; n_bytes: in the output.
        update: Frobenius norm of the update; error: of what is wrong with it after rounding.
        survived: share of the update that is there, by projection: <kept, update> / |update|^2.
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


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, or would do.

    Attributes:
        tensors: the touched ones, in file order.
        untouched: how many others there are.
        before, after: bytes of the model's files.
        rms_error: |error| / |update| over all touched tensors.
        survived: share of the whole update that is there, by projection.
        warnings: one line each.
    """

    tensors: tuple[TensorReport, ...]
    untouched: int
    before: int
    after: int
    rms_error: float = 0.0
    survived: float = 0.0
    warnings: tuple[str, ...] = ()


def merge(
    model: PathLike,
    adapters: Iterable[Given],
    output: PathLike,
    *,
    settings: MergeSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
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
        NoEffectError: not a byte of the model would change.
        OutputError: the output is an input, or cannot be written.
    """
    plan = Plan.of(model, adapters, settings)
    outputs = plan.check_outputs(output)
    if plan.settings.promote:
        plan = plan.promoted(progress)
    found: list[TensorReport] = []
    with ExitStack() as stack:
        # Renamed in the reverse of this order: the first file, which stands for the model, last.
        temporary = [stack.enter_context(atomic_output(path, plan.inputs)) for path in outputs]
        for number, path in enumerate(temporary):
            found += plan.write(path, number, len(outputs), progress)
        report = plan.report(found)
        if not any(t.changed for t in report.tensors):
            raise NoEffectError(
                f"{plan.name}: every update is too small for the model's quantisation; "
                "merged, nothing would change",
                "Side-load the adapter, or raise its scale",
            )
    return report


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a merge will take: seconds on this machine, and bytes of memory."""

    seconds: float
    memory: int


@dataclass(frozen=True)
class Plan:
    """A merge, checked before any work."""

    parts: list[GGUFFile]
    updates: Mapping[str, Update]
    types: Mapping[str, int]  # of the touched tensors, in the output
    provenance: Mapping[str, Value]
    inputs: tuple[Path, ...]
    importance: Mapping[str, Floats]
    settings: MergeSettings
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: PathLike,
        adapters: Iterable[Given],
        settings: MergeSettings | None = None,
    ) -> Plan:
        """Read and check everything but the weights."""
        from ..compat import open_model

        settings = settings or MergeSettings()
        whole = open_model(model)
        parts = [whole, *other_parts(whole)]  # the first one's table holds the others' tensors too
        folded = fold(adapters)
        for one in folded:
            require_fit(one.content, whole, one.name)
        updates = updates_of(one.content for one in folded)
        importance = read_imatrix(settings.imatrix) if settings.imatrix else {}
        for name in updates:
            require_writable(whole, name, importance)
        types = {name: whole.tensors[name].ggml_type for name in updates}
        files = [part.path for part in parts] + [one.source for one in folded if one.source]
        files += [Path(settings.imatrix)] if settings.imatrix else []
        hashes = [sha256(part.path) for part in parts]
        warnings = tuple(
            f"{one.name}: its expression was found for another model"
            for one in folded
            if isinstance(one.how, Expression) and one.how.target not in ("", hashes[0])
        )
        facts = provenance(hashes, whole.path, folded)
        return cls(parts, updates, types, facts, tuple(files), importance, settings, warnings)

    @property
    def name(self) -> Path:
        return self.parts[0].path

    # -- outputs ----------------------------------------------------------

    def check_outputs(self, output: PathLike) -> list[Path]:
        """The files to write; checked for room, too."""
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
        return draft(parts, self.types, added, lambda key: joined and key.startswith("split."))

    # -- work -------------------------------------------------------------

    def promoted(self, progress: Callable[[int, int], None] | None = None) -> Plan:
        """The plan with larger types for the tensors that would keep least of their update."""
        places = [p for p in self.draft(0, 1).places if p.info.name in self.updates]
        rows = self._each(places, None, progress)
        worst = sorted(rows, key=lambda r: (r.survived, r.name))
        worst = [r for r in worst if r.before != "F32"][: self.settings.promote]
        from gguf import GGMLQuantizationType

        larger = {r.name: int(GGMLQuantizationType[PROMOTED.get(r.before, "Q8_0")]) for r in worst}
        return replace(self, types={**self.types, **larger})

    def write(
        self, path: Path, number: int, count: int, progress: Callable[[int, int], None] | None
    ) -> list[TensorReport]:
        """Write one output file; returns its touched tensors."""
        planned = self.draft(number, count)
        handle = begin(path, planned)
        try:
            touched = [p for p in planned.places if p.info.name in self.updates]
            copy((p for p in planned.places if p.info.name not in self.updates), handle)
            return self._each(touched, handle, progress)
        finally:
            os.close(handle)

    def _each(
        self,
        places: Sequence[Place],
        handle: int | None,
        progress: Callable[[int, int], None] | None,
    ) -> list[TensorReport]:
        done, total = 0, sum(place.info.n_elements for place in places)
        found = []
        with ThreadPoolExecutor(self.settings.threads or _cpus()) as pool:
            futures = [pool.submit(self._merge_tensor, place, handle) for place in places]
            try:
                for place, future in zip(places, futures, strict=True):
                    found.append(future.result())
                    done += place.info.n_elements
                    if progress is not None:
                        progress(done, total)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return found

    def estimate(self) -> Estimate:
        """Time and memory, from a sample of each type's rows and of the copying."""
        started, elements, sampled = time.perf_counter(), 0, 0
        places = [p for p in self.draft(0, 1).places if p.info.name in self.updates]
        seen: dict[int, Place] = {}
        for place in places:
            elements += place.info.n_elements
            seen.setdefault(place.info.ggml_type, place)
        for place in seen.values():
            rows, columns = min(64, place.info.shape[0]), place.info.shape[1]
            width = place.info.n_bytes // place.info.shape[0]
            part = replace(place.info, shape=(rows, columns), n_bytes=rows * width)
            self._merge_tensor(replace(place, info=part), None)
            sampled += rows * columns
        threads = self.settings.threads or _cpus()
        work = (time.perf_counter() - started) * elements / sampled / threads
        copied = sum(part.n_bytes for part in self.parts) / _COPIED
        halves = sum(u.a.nbytes + u.b.nbytes + u.basis.nbytes for u in self.updates.values())
        return Estimate(work + copied, _BASE_MEMORY + halves + threads * _BLOCK * _BYTES_A_WEIGHT)

    def _merge_tensor(self, place: Place, handle: int | None) -> TensorReport:
        """Merge one tensor, block of rows by block of rows; written unless `handle` is None."""
        info, update = place.info, self.updates[place.info.name]
        rows, columns = info.shape
        width = info.n_bytes // rows
        block = max(1, _BLOCK // columns)
        sums = np.zeros(4)  # |update|^2, |error|^2, <kept, update>, bytes changed
        with open(info.path, "rb", buffering=0) as source:
            for start in range(0, rows, block):
                stop = min(rows, start + block)
                raw = np.frombuffer(
                    os.pread(source.fileno(), (stop - start) * width, info.offset + start * width),
                    np.uint8,
                ).reshape(stop - start, width)
                delta = update.rows(start, stop)
                new, error = self._rounded(raw, place, delta, update.basis)
                changed = (raw != new).sum() if place.ggml_type == info.ggml_type else 0
                sums += _account(delta, error, int(changed))
                if handle is not None:
                    os.pwrite(handle, new.data, place.offset + start * (place.n_bytes // rows))
        size = float(np.sqrt(sums[0]))
        return TensorReport(
            info.name, info.shape, info.type_name, _type_name(place.ggml_type), place.n_bytes,
            size, float(np.sqrt(sums[1])), float(sums[2] / sums[0]) if sums[0] else 1.0,
            int(sums[3]) if place.ggml_type == info.ggml_type else -1,
        )  # fmt: skip

    def _rounded(
        self, raw: kernels.Bytes, place: Place, delta: Floats, basis: Floats
    ) -> tuple[kernels.Bytes, Floats]:
        info, strength = place.info, self.settings.strength
        importance = self.importance.get(info.name)
        if not np.isfinite(delta).all():
            raise SafeGeneError(
                f"{self.name}: the update of '{info.name}' is not finite",
                "The adapter is broken, or its scale far too large",
            )
        fresh = info.type_name in _FLOAT_TYPES or place.ggml_type != info.ggml_type
        if fresh or strength is None:
            return rounding.afresh(raw, info.ggml_type, place.ggml_type, delta, importance)
        return rounding.requantise(
            raw, info.type_name, info.ggml_type, delta, basis, importance, strength
        )

    def report(self, rows: Sequence[TensorReport]) -> MergeReport:
        """The whole merge, from its tensors; without them, the plan."""
        planned = self.draft(0, 1) if len(self.parts) == 1 else None
        drafts = [planned] if planned else [self.draft(n, len(self.parts))
                                            for n in range(len(self.parts))]  # fmt: skip
        places = [p for d in drafts for p in d.places]
        if not rows:
            rows = [TensorReport(p.info.name, p.info.shape, p.info.type_name,
                                 _type_name(p.ggml_type), p.n_bytes)
                    for p in places if p.info.name in self.updates]  # fmt: skip
        updates = sum(row.update**2 for row in rows)
        errors = sum(row.error**2 for row in rows)
        survived = sum(row.survived * row.update**2 for row in rows) / updates if updates else 0.0
        warnings = self.warnings
        if updates and survived < ENOUGH:
            cost = self.promotion_bytes(rows)
            warnings += (
                f"only {100 * survived:.0f} % of the update survives the model's quantisation: "
                f"side-load the adapter, or give --promote {len(cost)} "
                f"({sum(cost):,} bytes more)",
            )
        return MergeReport(
            tuple(rows), len(places) - len(self.updates), sum(p.n_bytes for p in self.parts),
            sum(d.n_bytes for d in drafts), float(np.sqrt(errors / updates)) if updates else 0.0,
            survived, warnings,
        )  # fmt: skip

    def promotion_bytes(self, rows: Sequence[TensorReport]) -> list[int]:
        """What promoting each tensor that keeps too little would cost."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        costs = []
        for row in rows:
            if row.survived < ENOUGH and row.after != "F32":
                larger = GGMLQuantizationType[PROMOTED.get(row.after, "Q8_0")]
                block, size = GGML_QUANT_SIZES[larger]
                costs.append(int(np.prod(row.shape)) // block * size - row.n_bytes)
        return costs


# -- small things ---------------------------------------------------------


def _account(delta: Floats, error: Floats, changed: int) -> npt.NDArray[np.float64]:
    """|update|^2, |error|^2, <kept, update> and bytes changed of some rows."""
    flat, wrong = delta.reshape(-1), error.reshape(-1)
    size = flat @ flat
    return np.array([size, wrong @ wrong, size + wrong @ flat, changed], np.float64)


def _type_name(ggml_type: int) -> str:
    from gguf import GGMLQuantizationType

    return str(GGMLQuantizationType(ggml_type).name)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
