"""Before and after a gene: the same prompts, the same model, the same adapters otherwise."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from .._version import __version__
from ..aliases import Progress
from ..errors import SettingError
from ..files import PathLike, sha256
from ..gene import AdapterLike, SafetyGene
from .asking.attacks import choose_attacks
from .asking.endpoint import Endpoint
from .asking.journal import Journal, fingerprint
from .asking.local import LocalModel
from .costs import over_refusal
from .plan import Clock, Plan, SuiteLike
from .report.report import Report
from .report.results import AlignedLabels, Artifact, SuiteResult
from .settings import DEFAULT_SUITES, CostSettings, EndpointModel, EvalSettings, GateSettings

if TYPE_CHECKING:
    from ..runtime.llama import AttachedAdapter, SafeLlama

_OWN_CONTEXT = 512  # the model's own context only proves adapters; answers come from the engine's


def evaluate(
    model: PathLike | SafeLlama,
    gene: AdapterLike | None = None,
    *,
    adapters: Iterable[AdapterLike | tuple[AdapterLike, float]] = (),
    suites: Iterable[SuiteLike] = DEFAULT_SUITES,
    settings: EvalSettings | None = None,
    attacks: Iterable[str] = (),
    costs: CostSettings | None = None,
    aligned: AlignedLabels | None = None,
    gate: GateSettings | None = None,
    journal: Journal | None = None,
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
        attacks: names from `attacks.ATTACKS`, or "all", tried on the harmful suites.
        costs: what to measure beside over-refusal.
        aligned: the aligned model's labels (`report.aligned_labels`), for what came back.
        gate: thresholds that `Report.gate` and the report's JSON say are met or missed.
        journal: where finished answers are kept and looked up, to go on after a stop.
        progress: called with answers done and answers in all.

    Raises:
        SafeGeneError: a file cannot be read, or an adapter does not fit.
    """
    settings, gate = settings or EvalSettings(), gate or GateSettings()
    plan = Plan.of(suites, choose_attacks(attacks), settings, costs or CostSettings())
    plan.check(gate, gene is not None)
    clock = Clock()
    with ExitStack() as stack:
        llama = _opened(model, stack)
        for adapter in adapters:
            _attached(llama, adapter, stack)
        scales = {handle: handle.scale for handle in llama.adapters}
        columns = {"before": scales}
        handle = None
        if gene is not None:
            handle = _attached(llama, (gene, settings.gene_scale), stack)
            columns["after"] = {**scales, handle: settings.gene_scale}
        source = _file(Path(llama.model_path))
        local = _local(llama, source, columns, handle, settings, journal or Journal(), stack)
        asked = plan.ask(local, clock, progress)
        _require_scored(asked[0], settings)
        found = plan.costs_of(local, asked[0], clock)
        timed = plan.speed_of(local)
        return Report(
            model=source,
            gene=None if handle is None else _adapter(handle, settings.gene_scale),
            adapters=tuple(_adapter(h, scale) for h, scale in scales.items()),
            suites=asked[0],
            settings=settings,
            chat_template_sha256=_template_hash(llama),
            coefficients=_coefficients(handle),
            attacks=asked[1],
            attack_twins=asked[2],
            costs=found,
            versions=versions(),
            times=clock.times(threads=llama.n_threads, **timed),
            aligned=aligned or {},
            thresholds=gate,
        )


def evaluate_endpoint(
    before: EndpointModel,
    after: EndpointModel | None = None,
    *,
    suites: Iterable[SuiteLike] = DEFAULT_SUITES,
    settings: EvalSettings | None = None,
    attacks: Iterable[str] = (),
    aligned: AlignedLabels | None = None,
    gate: GateSettings | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> Report:
    """The same of an OpenAI-compatible server: a model, or one without and one with a gene.

    Where a server lends its weights under several names (an adapter each, as vLLM does),
    `after` is another name on the same server.

    Raises:
        SafeGeneError: the server cannot be reached or refuses, or an attack needs more than
            a chat server offers.
    """
    settings, gate = settings or EvalSettings(), gate or GateSettings()
    plan = Plan.of(suites, choose_attacks(attacks, served=True), settings, CostSettings())
    plan.check(gate, after is not None)
    clock = Clock()
    with Endpoint(before, after, settings, journal or Journal()) as endpoint:
        asked = plan.ask(endpoint, clock, progress)
        _require_scored(asked[0], settings)
    return Report(
        model=Artifact(before.name, ""),
        gene=None if after is None else Artifact(after.name, ""),
        adapters=(),
        suites=asked[0],
        settings=settings,
        chat_template_sha256="",
        attacks=asked[1],
        attack_twins=asked[2],
        costs=tuple(over_refusal(r) for r in asked[0] if r.suite.kind == "harmless"),
        versions={"safegene_edge": __version__},
        times=clock.times(),
        aligned=aligned or {},
        thresholds=gate,
    )


def _require_scored(suites: Sequence[SuiteResult], settings: EvalSettings) -> None:
    """SettingError where not one prompt fitted into the context."""
    answers = [answer for suite in suites for answer in (*suite.before, *(suite.after or ()))]
    if not any(answer.verdict is not None or answer.thinking for answer in answers):
        raise SettingError(
            f"no prompt fits into the context, with {settings.max_tokens} tokens of answer and "
            f"{settings.think_tokens} of a thought",
            "Ask for fewer tokens (max_tokens, think_tokens), or for shorter prompts",
        )


# -- inputs -----------------------------------------------------------------


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
    (handle,) = llama.attach_each([(adapter, scale)])
    stack.callback(llama.detach, handle)
    return handle


def _local(
    llama: SafeLlama,
    source: Artifact,
    columns: Mapping[str, dict[AttachedAdapter, float]],
    gene: AttachedAdapter | None,
    settings: EvalSettings,
    journal: Journal,
    stack: ExitStack,
) -> LocalModel:
    # Room for thoughts that are longer than usual.
    n_ctx = settings.n_ctx + max(0, settings.think_tokens - EvalSettings.think_tokens)
    base = (source.sha256, settings.n_parallel, n_ctx, versions())
    identities = {
        column: fingerprint(base, sorted((h.content.sha256, scale) for h, scale in scales.items()))
        for column, scales in columns.items()
    }
    content = None if gene is None else gene.content
    guard = llama.make_guard() if settings.guard and gene is not None else None
    local = LocalModel(
        llama,
        columns,
        identities,
        max_tokens=settings.max_tokens,
        n_parallel=settings.n_parallel,
        n_ctx=n_ctx,
        journal=journal,
        openers=content.refusal_openers if isinstance(content, SafetyGene) else (),
        think_tokens=settings.think_tokens,
        no_think=settings.no_think,
        guard=guard,
    )
    return stack.enter_context(local)


# -- provenance ---------------------------------------------------------------


def _file(path: Path) -> Artifact:
    """Name and hash of a file; paths stay out of the report, since they name people."""
    return Artifact(path.name, sha256(path))


def _adapter(handle: AttachedAdapter, scale: float) -> Artifact:
    if handle.source is None:
        return Artifact("in memory", "", scale)
    return replace(_file(handle.source), scale=scale)


def _coefficients(gene: AttachedAdapter | None) -> dict[int, float]:
    """Layer to coefficient, 1 where nothing was recalibrated; none without a gene."""
    if gene is None:
        return {}
    known = gene.content.coefficients if isinstance(gene.content, SafetyGene) else {}
    return {layer: known.get(layer, 1.0) for layer in gene.content.layers}


def _template_hash(llama: SafeLlama) -> str:
    """Hash of the GGUF's chat template; "" where it has none."""
    template = llama.metadata.get("tokenizer.chat_template", "")
    return hashlib.sha256(template.encode()).hexdigest() if template else ""


def versions() -> dict[str, str]:
    """Of what answers and verdicts depend on."""
    return {
        "safegene_edge": __version__,
        "llama_cpp_python": metadata.version("llama-cpp-python"),
    }
