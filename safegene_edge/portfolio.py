"""One gene for many fine-tunes: recalibrate and evaluate each, one table at the end.

Every model's results lie in a folder of its own. What was done with the same files, prompts,
settings and versions, and is still there as it was written, is not done again.
A model that fails, even by crashing llama.cpp, stops no other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from .child import Child, can_start
from .compat import model_hashes
from .errors import OutputError, ProcessLostError, SafeGeneError, SettingError
from .evals.asking.suites import load_suite
from .evals.report import findings
from .evals.report.findings import Json
from .evals.report.pictures import of_models
from .evals.settings import BUILT_IN
from .evals.statistics import Count
from .files import PathLike, check_output, parse_json, sha256, write_text
from .gene import SafetyGene
from .hub import resolve
from .portfolio_settings import PortfolioSettings as PortfolioSettings

_DONE = "result.json"
_FITTED, _EXPRESSION = "fitted.gguf", "expression.json"
_REPORT, _PAGE = "report.json", "report.html"
_WRITTEN = (_FITTED, _EXPRESSION, _REPORT, _PAGE)
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
        FileFormatError: the gene, an adapter or a suite cannot be read.
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
    settings = _with_whole_paths(settings)
    SafetyGene.load(gene)
    for adapter in settings.adapters:
        SafetyGene.load(adapter)
    for suite in settings.suites:
        load_suite(suite)
    home = Path(folder).absolute()
    _keep_off(home, names, [*paths, gene], settings)
    try:
        for name in names:
            (home / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}", "Name a folder to write to") from error
    if executor is not None:
        return _gathered(executor, paths, gene, home, settings, on_row)
    rows = []
    for path in paths:
        rows.append(_row(path, partial(_apart, path, gene, home / path.stem, settings)))
        if on_row is not None:
            on_row(rows[-1])
    return rows


def _keep_off(
    home: Path, names: Sequence[str], files: Sequence[PathLike], settings: PortfolioSettings
) -> None:
    """Raise OutputError where an input lies where a model's files will be: they are removed."""
    own = [suite for suite in settings.suites if suite not in BUILT_IN]
    examples = [settings.examples] if settings.examples else []
    inputs = [*files, *settings.adapters, *own, *examples]
    for name in names:
        for written in (_DONE, *_WRITTEN):
            if (home / name / written).exists():
                check_output(home / name / written, inputs)


def _with_whole_paths(settings: PortfolioSettings) -> PortfolioSettings:
    """Paths that hold in any current folder: another process may have another one."""
    suites = [s if s in BUILT_IN else str(Path(s).absolute()) for s in settings.suites]
    adapters = [str(resolve(path).absolute()) for path in settings.adapters]
    examples = settings.examples and str(resolve(settings.examples).absolute())
    return replace(settings, suites=tuple(suites), adapters=tuple(adapters), examples=examples)


def _row(model: Path, work: Callable[[], PortfolioRow]) -> PortfolioRow:
    """What the work gives; its error as a row, since a process may be lost in any way."""
    try:
        return work()
    except Exception as error:
        return PortfolioRow(str(model), error=f"{model}: {type(error).__name__}: {error}")


def _gathered(
    executor: Executor,
    paths: Sequence[Path],
    gene: Path,
    home: Path,
    settings: PortfolioSettings,
    on_row: Callable[[PortfolioRow], None] | None,
) -> list[PortfolioRow]:
    futures = {
        executor.submit(express_one, path, gene, home / path.stem, settings): path for path in paths
    }
    rows: dict[Path, PortfolioRow] = {}
    try:
        for future in as_completed(futures):
            path = futures[future]
            rows[path] = _row(path, future.result)
            if on_row is not None:
                on_row(rows[path])
    except BaseException:  # interrupted: what has not begun shall not begin
        for future in futures:
            future.cancel()
        raise
    return [rows[path] for path in paths]


def _apart(model: Path, gene: Path, folder: Path, settings: PortfolioSettings) -> PortfolioRow:
    """`express_one` in a process of its own, so that a crash takes nothing with it."""
    if not can_start():
        return express_one(model, gene, folder, settings)
    with Child(express_one, model, gene, folder, settings) as child:
        try:
            row: PortfolioRow = next(child.answers())
            return row
        except ProcessLostError as lost:
            error = f"{model}: llama.cpp crashed, or was killed, on it ({lost})"
            return PortfolioRow(str(model), error=error)


def express_one(model: Path, gene: Path, folder: Path, settings: PortfolioSettings) -> PortfolioRow:
    """Recalibrate and evaluate one model into its folder; errors of the user become a row's."""
    try:
        key = _key(model, gene, settings)
        if (kept := _kept(folder, key)) is not None:
            return replace(kept, model=str(model))
        for name in (_DONE, *_WRITTEN):  # nothing of another run stays beside this one's
            (folder / name).unlink(missing_ok=True)
        row = _expressed(model, gene, folder, settings)
        facts = {"key": key, "files": _hashes(folder), "row": row.to_json()}
        write_text(folder / _DONE, json.dumps(facts, indent=2) + "\n")
        return row
    except SafeGeneError as error:
        return PortfolioRow(str(model), error=str(error))
    except OSError as error:
        return PortfolioRow(str(model), error=f"{folder}: {error.strerror or error}")


def _key(model: Path, gene: Path, settings: PortfolioSettings) -> dict[str, Any]:
    """All that a row depends on, by content: paths may change, and files under the same path."""
    from .evals.asking.journal import fingerprint
    from .evals.evaluate import versions
    from .evals.judge import judge_sha256
    from .recalibrate import PARTS, Examples

    suites = [suite for name in settings.suites for suite in load_suite(name)]
    file = settings.examples
    plain = replace(settings, suites=(), examples=None, adapters=())
    return {
        "model": model_hashes(model),
        "gene": sha256(gene),
        "adapters": [sha256(path) for path in settings.adapters],
        "suites": [fingerprint(asdict(suite)) for suite in suites],
        "examples": sha256(file) if file else [Examples.shipped(part).digest for part in PARTS],
        "settings": json.loads(json.dumps(asdict(plain))),
        "judge": judge_sha256(),
        "versions": versions(),
    }


def _kept(folder: Path, key: dict[str, Any]) -> PortfolioRow | None:
    """The row of an earlier run that depends on the same, if all that it wrote is still there."""
    try:
        facts = parse_json((folder / _DONE).read_text(encoding="utf-8"))
        same = facts["key"] == key and facts["files"] == _hashes(folder)
        return PortfolioRow.from_json(facts["row"]) if same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _hashes(folder: Path) -> dict[str, str]:
    """What a run has written, by name."""
    return {name: sha256(folder / name) for name in _WRITTEN if (folder / name).is_file()}


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
    found.expression.save(folder / _EXPRESSION)
    fitted = None if found.nothing_lost else folder / _FITTED
    if fitted is not None:
        loaded.express(found.expression).save(fitted, [model, gene, *settings.adapters])
    with Journal(folder / "answers.jsonl") as journal:  # a stopped run goes on from it
        report = evaluate(
            model, fitted, adapters=settings.adapters, suites=settings.suites,
            settings=EvalSettings(limit=settings.limit), journal=journal,
        )  # fmt: skip
        write_text(folder / _REPORT, json.dumps(report.to_json(), indent=2) + "\n")
        write_text(folder / _PAGE, report.to_html())
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


def picture(rows: Sequence[PortfolioRow]) -> str:
    """What came back and what it cost in each model that has figures, as an SVG file."""
    shown = []
    for row in rows:
        for what, counted in (("refused", row.refused), ("over-refused", row.over_refused)):
            if counted and counted[0].total:
                shown.append(findings.Outcome(f"{Path(row.model).stem}, {what}", *counted))
    return of_models("One gene, many models", shown)


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
