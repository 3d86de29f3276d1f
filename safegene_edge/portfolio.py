"""One gene for many fine-tunes: recalibrate and evaluate each, one table at the end.

Every model's results lie in a folder of its own; what was done with the same files and
settings is not done again. A model that fails, even by crashing llama.cpp, stops no other.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from .errors import OutputError, SafeGeneError, SettingError
from .evals.report import findings
from .evals.report.findings import Json
from .evals.statistics import Count
from .files import PathLike, sha256, write_text
from .gene import SafetyGene
from .hub import resolve
from .portfolio_settings import PortfolioSettings as PortfolioSettings

_DONE = "result.json"
_NONE = Count(0, 0), Count(0, 0)


@dataclass(frozen=True)
class PortfolioRow:
    """One model's results; `error` says why there are none.

    Attributes:
        refused, over_refused: (before, after), over the harmful and the harmless suites.
        passes: points that the recalibration looked at.
    """

    model: str
    refused: tuple[Count, Count] | None = None
    over_refused: tuple[Count, Count] | None = None
    coefficients: dict[int, float] = field(default_factory=dict)
    kl: float = 0.0
    passes: int = 0
    seconds: float = 0.0
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> PortfolioRow:
        """What `to_json` wrote."""
        counts: dict[str, Any] = {
            name: tuple(Count(**count) for count in facts[name]) if facts[name] else None
            for name in ("refused", "over_refused")
        }
        values = {int(layer): value for layer, value in facts["coefficients"].items()}
        return cls(**{**facts, **counts, "coefficients": values})


def portfolio(
    models: Sequence[PathLike],
    gene: PathLike,
    folder: PathLike,
    *,
    settings: PortfolioSettings | None = None,
    executor: Executor | None = None,
    on_row: Callable[[PortfolioRow], None] | None = None,
) -> list[PortfolioRow]:
    """Express one gene in many fine-tunes, and measure each before and after.

    Writes, for each model, `folder/NAME/`: fitted.gguf (where something was lost),
    expression.json, report.json, report.html and result.json.

    Args:
        models: GGUF files with names that differ.
        gene: a gene file of their family.
        executor: of the shape of `concurrent.futures.Executor`, such as dask.distributed's
            `Client.get_executor()`; its workers must see the same files. Default: one process
            after the other, since llama.cpp uses all cores.
        on_row: called as each model is finished.

    Returns:
        The rows in the models' order; those that failed have an `error`.

    Raises:
        SettingError: no model, or two of one name.
        FileFormatError: the gene or an adapter cannot be read.
        OutputError: the folder cannot be made.
    """
    settings = settings or PortfolioSettings()
    paths = [resolve(model).absolute() for model in models]
    names = [path.stem for path in paths]
    if not paths or len(set(names)) < len(names):
        raise SettingError(
            "no model is given" if not paths else "two models have the same file name",
            "Give GGUF files with names that differ",
        )
    gene = resolve(gene).absolute()
    adapters = tuple(resolve(path).absolute() for path in settings.adapters)
    settings = replace(settings, adapters=tuple(map(str, adapters)))
    for path in (gene, *adapters):
        SafetyGene.load(path)
    home = Path(folder).absolute()
    try:
        for name in names:
            (home / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}", "Name a folder to write to") from error
    if executor is not None:
        return _gathered(executor, express_one, paths, gene, home, settings, on_row)
    with ThreadPoolExecutor(1) as threads:
        return _gathered(threads, _apart, paths, gene, home, settings, on_row)


def _gathered(
    executor: Executor,
    work: Callable[[Path, Path, Path, PortfolioSettings], PortfolioRow],
    paths: Sequence[Path],
    gene: Path,
    home: Path,
    settings: PortfolioSettings,
    on_row: Callable[[PortfolioRow], None] | None,
) -> list[PortfolioRow]:
    futures = {
        executor.submit(work, path, gene, home / path.stem, settings): path for path in paths
    }
    rows: dict[Path, PortfolioRow] = {}
    try:
        for future in as_completed(futures):
            path = futures[future]
            try:
                rows[path] = future.result()
            except Exception as error:  # a worker may be lost in any way
                rows[path] = PortfolioRow(
                    str(path), error=f"{path}: {type(error).__name__}: {error}"
                )
            if on_row is not None:
                on_row(rows[path])
    except BaseException:  # interrupted: what has not begun shall not begin
        for future in futures:
            future.cancel()
        raise
    return [rows[path] for path in paths]


def _apart(model: Path, gene: Path, folder: Path, settings: PortfolioSettings) -> PortfolioRow:
    """`express_one` in a process of its own, so that a crash takes nothing with it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(express_one, model, gene, folder, settings).result()
        except BrokenProcessPool:
            return PortfolioRow(
                str(model), error=f"{model}: llama.cpp crashed, or was killed, on it"
            )


def express_one(model: Path, gene: Path, folder: Path, settings: PortfolioSettings) -> PortfolioRow:
    """Recalibrate and evaluate one model into its folder; errors of the user become a row's."""
    try:
        key = {
            "model": sha256(model),
            "gene": sha256(gene),
            "settings": json.loads(json.dumps(asdict(settings))),
            "examples": sha256(settings.examples) if settings.examples else "",
            "adapters": [sha256(path) for path in settings.adapters],
        }
        done = folder / _DONE
        if done.exists() and (kept := _kept(done, key)) is not None:
            return kept
        row = _expressed(model, gene, folder, settings)
        facts = {"key": key, "row": row.to_json()}
        write_text(done, json.dumps(facts, indent=2) + "\n")
        return row
    except SafeGeneError as error:
        return PortfolioRow(str(model), error=str(error))


def _kept(path: Path, key: dict[str, Any]) -> PortfolioRow | None:
    """The row of an earlier run with the same files and settings, if it is one."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return PortfolioRow.from_json(facts["row"]) if facts["key"] == key else None
    except (ValueError, KeyError, TypeError):
        return None


def _expressed(model: Path, gene: Path, folder: Path, settings: PortfolioSettings) -> PortfolioRow:
    from .evals.asking.journal import Journal
    from .evals.evaluate import evaluate
    from .evals.settings import EvalSettings
    from .recalibrate import PARTS, Examples, recalibrate

    started = time.monotonic()
    loaded = SafetyGene.load(gene)
    file = settings.examples
    examples, others = (Examples.load(file, part) if file else None for part in PARTS)
    found = recalibrate(
        model, loaded, examples, validation=others, adapters=settings.adapters,
        settings=settings.recalibration,
    )  # fmt: skip
    found.expression.save(folder / "expression.json")
    fitted = None if found.nothing_lost else folder / "fitted.gguf"
    if fitted is not None:
        loaded.express(found.expression).save(fitted, [model, gene, *settings.adapters])
    with Journal(folder / "answers.jsonl") as journal:  # a stopped run goes on from it
        report = evaluate(
            model, fitted, adapters=settings.adapters, suites=settings.suites,
            settings=EvalSettings(limit=settings.limit), journal=journal,
        )  # fmt: skip
        write_text(folder / "report.json", json.dumps(report.to_json(), indent=2) + "\n")
        write_text(folder / "report.html", report.to_html())
        journal.delete()
    return PortfolioRow(
        str(model),
        *counts(report.to_json()),
        dict(found.expression.coefficients),
        found.point.kl,
        len(found.curve),
        time.monotonic() - started,
    )


BeforeAfter: TypeAlias = tuple[Count, Count]


def counts(report: Json) -> tuple[BeforeAfter, BeforeAfter]:
    """Refused harmful and over-refused harmless prompts of a report, each before and after."""
    found = findings.refusals(report), findings.over_refusals(report)
    refused, over = ((row.before, row.after or row.before) if row else _NONE for row in found)
    return refused, over


def table(rows: Sequence[PortfolioRow]) -> str:
    """A line a model, aligned for a terminal."""
    head = ("model", "refused", "with gene", "over-refused", "with gene", "KL")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        name = Path(row.model).stem
        if row.error or row.refused is None or row.over_refused is None:
            lines.append((name, "failed", "", "", "", ""))
            continue
        shown = (str(count) for count in (*row.refused, *row.over_refused))
        lines.append((name, *shown, f"{row.kl:.3f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
