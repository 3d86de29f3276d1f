"""Before and after a gene: the same prompts, the same model, the same adapters otherwise."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from .. import __version__
from ..errors import SettingError
from ..gene import Adapter
from ..gguf_file import PathLike, sha256
from .judge import judge
from .report import Answer, Answers, EvalSettings, Report, Source, SuiteResult
from .suites import BUILT_IN, DEFAULT_SUITES, Prompt, Suite, load_suite

if TYPE_CHECKING:
    from ..runtime.engine import Generation
    from ..runtime.llama import AttachedAdapter, SafeLlama

__all__ = ["Answer", "EvalSettings", "Report", "Source", "SuiteResult", "evaluate"]

AdapterLike: TypeAlias = PathLike | Adapter
Progress: TypeAlias = Callable[[int, int], None]
_OWN_CONTEXT = 512  # the model's own context only proves adapters; answers come from the engine's


def evaluate(
    model: PathLike | SafeLlama,
    gene: AdapterLike | None = None,
    *,
    adapters: Iterable[AdapterLike | tuple[AdapterLike, float]] = (),
    suites: Iterable[str | Path | Suite] = DEFAULT_SUITES,
    settings: EvalSettings | None = None,
    progress: Progress | None = None,
) -> Report:
    """Ask every prompt without and with the gene, greedily, and judge the answers.

    Args:
        model: a GGUF file, or a loaded `SafeLlama`, which is left as it was.
        gene: the safety adapter; None gives only the "before" column.
        adapters: others, such as a task LoRA, on in both columns; so are those that are
            already attached to a `SafeLlama`.
        suites: built-in names, files or `Suite`s.
        settings: see `EvalSettings`.
        progress: called with answers done and answers in all.

    Raises:
        SafeGeneError: a file cannot be read, or an adapter does not fit.
    """
    settings = settings or EvalSettings()
    chosen = [suite.sample(settings.limit) for suite in _load_all(suites)]
    with ExitStack() as stack:
        llama = _opened(model, stack)
        for adapter in adapters:
            _attached(llama, adapter, stack)
        scales = {handle: handle.scale for handle in llama.adapters}
        columns = {"before": scales}
        if gene is not None:
            handle = _attached(llama, (gene, settings.gene_scale), stack)
            columns["after"] = {**scales, handle: settings.gene_scale}
        answers, seconds = _run(llama, chosen, columns, settings, progress)
        return Report(
            model=_source(llama.model_path),
            gene=None if gene is None else _source(gene, settings.gene_scale),
            adapters=tuple(_source(_file_of(h), scale) for h, scale in scales.items()),
            suites=tuple(
                SuiteResult(suite, *(answers[column][index] for column in columns))
                for index, suite in enumerate(chosen)
            ),
            settings=settings,
            chat_template_sha256=_template_hash(llama),
            versions=_versions(),
            seconds=seconds,
        )


def _load_all(suites: Iterable[str | Path | Suite]) -> list[Suite]:
    """Every suite once; two of one name would be one in the report."""
    found: dict[str, Suite] = {}
    for item in suites:
        for suite in [item] if isinstance(item, Suite) else load_suite(item):
            if suite.name in found:
                raise SettingError(f"the suite '{suite.name}' is given twice", "Rename one file")
            found[suite.name] = suite
    if not found:
        raise SettingError("no suite to evaluate", f"Give {' or '.join(BUILT_IN)}, or a file")
    return list(found.values())


def _opened(model: PathLike | SafeLlama, stack: ExitStack) -> SafeLlama:
    from ..runtime.llama import SafeLlama

    if isinstance(model, SafeLlama):
        return model
    llama = SafeLlama(model, n_ctx=_OWN_CONTEXT)
    stack.callback(llama.close)
    return llama


def _attached(
    llama: SafeLlama, item: AdapterLike | tuple[AdapterLike, float], stack: ExitStack
) -> AttachedAdapter:
    """Attach an adapter until the evaluation ends."""
    adapter, scale = item if isinstance(item, tuple) else (item, 1.0)
    handle = llama.attach(adapter, scale)
    stack.callback(llama.detach, handle)
    return handle


def _run(
    llama: SafeLlama,
    suites: list[Suite],
    columns: Mapping[str, dict[AttachedAdapter, float]],
    settings: EvalSettings,
    progress: Progress | None,
) -> tuple[dict[str, list[Answers]], dict[str, float]]:
    """Answers by column and suite, and the seconds that each column took."""
    from ..runtime.engine import Engine

    prompts = [prompt for suite in suites for prompt in suite.prompts]
    tokens = [llama.render([{"role": "user", "content": prompt.text}]) for prompt in prompts]
    total, done = len(prompts) * len(columns), 0

    def count(_index: int, _generation: Generation) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    answers: dict[str, list[Answers]] = {}
    seconds: dict[str, float] = {}
    with Engine(llama, n_parallel=settings.n_parallel, n_ctx=settings.n_ctx) as engine:
        for column, scales in columns.items():
            start = time.perf_counter()
            made = engine.generate(
                tokens, max_tokens=settings.max_tokens, adapters=scales, on_done=count
            )
            seconds[column] = round(time.perf_counter() - start, 3)
            answers[column] = _by_suite(llama, suites, made)
    return answers, seconds


def _by_suite(
    llama: SafeLlama, suites: Iterable[Suite], made: Iterable[Generation]
) -> list[Answers]:
    """Judge the generations, which lie in the order of the suites' prompts."""
    stream = iter(made)
    return [
        tuple(
            _judged(llama, prompt, generation)
            for prompt, generation in zip(suite.prompts, stream, strict=False)
        )
        for suite in suites
    ]


def _judged(llama: SafeLlama, prompt: Prompt, generation: Generation) -> Answer:
    if generation.finish == "context":  # the prompt did not fit: no answer to judge
        return Answer(prompt, "", None)
    completion = llama.text(generation.tokens)
    return Answer(prompt, completion, judge(prompt.text, completion))


# -- provenance ---------------------------------------------------------------


def _source(file: AdapterLike, scale: float | None = None) -> Source:
    """Name and hash of a file; paths stay out of the report, since they name people."""
    if isinstance(file, Adapter):
        return Source("in memory", "", scale)
    return Source(Path(file).name, sha256(file), scale)


def _file_of(handle: AttachedAdapter) -> AdapterLike:
    return handle.name if Path(handle.name).is_file() else handle.content


def _template_hash(llama: SafeLlama) -> str:
    """Hash of the GGUF's chat template; "" where it has none."""
    template = llama.metadata.get("tokenizer.chat_template", "")
    return hashlib.sha256(template.encode()).hexdigest() if template else ""


def _versions() -> dict[str, str]:
    return {
        "safegene_edge": __version__,
        "llama_cpp_python": metadata.version("llama-cpp-python"),
    }
