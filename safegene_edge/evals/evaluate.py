"""Before and after a gene: the same prompts, the same model, the same adapters otherwise."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .._version import __version__
from ..aliases import Progress
from ..errors import SettingError
from ..files import PathLike, sha256
from ..gene import AdapterLike, SafetyGene
from ..prompts import Prompt
from .asking.attacks import Attack, adaptive_chats, choose_attacks
from .asking.chat import Asker, Chat, Reply
from .asking.endpoint import Endpoint
from .asking.journal import Journal, fingerprint
from .asking.local import LocalModel
from .asking.suites import Suite, load_suite
from .costs import Task, kl_divergence, load_task, over_refusal, perplexity, task_accuracy
from .costs import speed as measured_speed
from .judge import judge
from .report.report import Report
from .report.results import (
    AlignedLabels,
    Answer,
    Answers,
    Artifact,
    AttackResult,
    Cost,
    SuiteResult,
)
from .settings import (
    BUILT_IN,
    DEFAULT_SUITES,
    CostSettings,
    EndpointModel,
    EvalSettings,
    GateSettings,
)

if TYPE_CHECKING:
    from ..runtime.llama import AttachedAdapter, SafeLlama

SuiteLike: TypeAlias = str | Path | Suite
_OWN_CONTEXT = 512  # the model's own context only proves adapters; answers come from the engine's
_NO_ATTACK = ("languages",)  # a suite whose point is the wording that an attack would change


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
    plan = _Plan.of(suites, choose_attacks(attacks), settings, costs or CostSettings())
    plan.check(gate, gene is not None)
    clock = _Clock()
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
    plan = _Plan.of(suites, choose_attacks(attacks, served=True), settings, CostSettings())
    plan.check(gate, after is not None)
    clock = _Clock()
    with Endpoint(before, after, settings, journal or Journal()) as endpoint:
        asked = plan.ask(endpoint, clock, progress)
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


# -- the plan -----------------------------------------------------------------


class _Plan:
    """What to ask, read and checked before a model is loaded."""

    def __init__(
        self,
        suites: list[Suite],
        attacks: list[Attack],
        settings: EvalSettings,
        costs: CostSettings,
        tasks: list[Task],
    ) -> None:
        self.suites, self.attacks = suites, attacks
        self.settings, self.costs, self.tasks = settings, costs, tasks

    @classmethod
    def of(
        cls,
        suites: Iterable[SuiteLike],
        attacks: list[Attack],
        settings: EvalSettings,
        costs: CostSettings,
    ) -> _Plan:
        whole = _load_all(suites)
        plan = cls(
            [suite.sample(settings.limit) for suite in whole],
            attacks,
            settings,
            costs,
            [load_task(path) for path in costs.tasks],
        )
        if plan.attacks and not plan.attacked:
            raise SettingError("no harmful suite to attack", "Add --suite harmful")
        return plan

    def check(self, gate: GateSettings, gene: bool) -> None:
        """Raise a SettingError where a threshold's figure would not be measured."""
        kinds = {suite.kind for suite in self.suites}
        lacks = {
            "min_refused": ("harmful" not in kinds, "no harmful suite", "Add --suite harmful"),
            "max_over_refused": ("harmless" not in kinds, "no harmless suite", "Add one"),
            "max_kl": (not gene or not self.costs.kl_prompts, "no gene, or no --kl", "Give both"),
            "max_task_drop": (not gene or not self.tasks, "no gene, or no --task", "Give both"),
        }
        for name, (lacking, cause, remedy) in lacks.items():
            if lacking and getattr(gate, name) is not None:
                raise SettingError(f"{name} is set, and there is {cause}", remedy)

    @property
    def attacked(self) -> list[Suite]:
        """The suites that attacks are tried on, cut to their limit."""
        return [
            suite.sample(self.settings.attack_limit)
            for suite in self.suites
            if suite.kind == "harmful" and not suite.name.startswith(_NO_ATTACK)
        ]

    @property
    def twins(self) -> list[Suite]:
        """Harmless prompts for the same wrappers: the first suite that has borderline ones."""
        if not self.attacks:
            return []
        harmless = [
            suite
            for suite in self.suites
            if suite.kind == "harmless" and not suite.name.startswith(_NO_ATTACK)
        ]
        traps = [suite for suite in harmless if any(p.borderline for p in suite.prompts)]
        return [suite.sample(self.settings.attack_limit) for suite in (traps or harmless)[:1]]

    def n_answers(self, asker: Asker) -> int:
        """Answers in all, for the progress."""
        attacked = len(self.attacks) * sum(len(suite.prompts) for suite in self.attacked)
        attacked += len(self._wrappers) * sum(len(suite.prompts) for suite in self.twins)
        tasks = sum(len(task.items) for task in self.tasks)
        plain = sum(len(suite.prompts) for suite in self.suites) + tasks
        return len(asker.columns) * plain + len(asker.attack_columns) * attacked

    @property
    def _wrappers(self) -> list[Attack]:
        """The attacks that can be put around any prompt: not the one that searches."""
        return [attack for attack in self.attacks if attack.apply is not None]

    def ask(
        self, asker: Asker, clock: _Clock, progress: Progress | None
    ) -> tuple[tuple[SuiteResult, ...], tuple[AttackResult, ...], tuple[AttackResult, ...]]:
        """Every suite, every attack and its harmless twins, column by column."""
        clock.count(self.n_answers(asker), progress)
        answers: dict[str, list[Answers]] = {}
        attacked: dict[str, list[Answers]] = {}
        jobs = [(suite, attack) for suite in self.attacked for attack in self.attacks]
        n_attacks = len(jobs)
        jobs += [(suite, attack) for suite in self.twins for attack in self._wrappers]
        for column in asker.columns:
            with clock.measure(column):
                answers[column] = [
                    _asked(asker, column, suite.prompts, _plain_chat, clock.advance)
                    for suite in self.suites
                ]
        for column in asker.attack_columns if jobs else ():
            with clock.measure(f"attacks_{column}"):
                attacked[column] = [
                    _attacked(asker, column, suite.prompts, attack, clock.advance)
                    for suite, attack in jobs
                ]
        suites = tuple(
            SuiteResult(suite, *(answers[column][index] for column in asker.columns))
            for index, suite in enumerate(self.suites)
        )
        attacks = tuple(
            AttackResult(
                attack.name,
                attack.paper,
                suite.name,
                *(attacked[column][index] for column in asker.attack_columns),
            )
            for index, (suite, attack) in enumerate(jobs)
        )
        return suites, attacks[:n_attacks], attacks[n_attacks:]

    def costs_of(
        self, local: LocalModel, results: Sequence[SuiteResult], clock: _Clock
    ) -> tuple[Cost, ...]:
        """The costs that no clock measures."""
        settings = self.costs
        with clock.measure("costs"):
            found = [over_refusal(r) for r in results if r.suite.kind == "harmless"]
            if settings.kl_prompts:
                kl = kl_divergence(local, self._harmless(settings.kl_prompts), settings.kl_tokens)
                found += [kl] if kl is not None else []
            if settings.perplexity is not None:
                found.append(perplexity(local, settings.perplexity, settings.perplexity_tokens))
            found += [task_accuracy(local, task, clock.advance) for task in self.tasks]
        return tuple(found)

    def _harmless(self, count: int) -> list[str]:
        """Plain harmless prompts of one turn: of the suites asked, else the project's own."""
        asked = [suite for suite in self.suites if suite.kind == "harmless"]
        plain = _plain(asked) or _plain(load_suite("harmless"))
        return [p.text for p in Suite("plain", "harmless", plain).sample(count).prompts]

    def speed_of(self, local: LocalModel) -> dict[str, Any]:
        return measured_speed(local) if self.costs.speed else {}


def _plain(suites: Iterable[Suite]) -> tuple[Prompt, ...]:
    """The English prompts of one turn that are not borderline."""
    prompts = (prompt for suite in suites for prompt in suite.prompts)
    return tuple(p for p in prompts if not (p.borderline or p.history) and p.language == "en")


class _Clock:
    """Seconds by part of the work, and the progress."""

    def __init__(self) -> None:
        self._date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._seconds: dict[str, float] = {}
        self._done = self._total = 0
        self._progress: Progress | None = None

    def count(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress

    def advance(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[name] = round(time.perf_counter() - start, 3)

    def times(self, **speed: Any) -> dict[str, Any]:
        return {"date": self._date, "seconds": self._seconds, "speed": speed}


def _plain_chat(prompt: Prompt) -> Chat:
    return Chat.of(prompt)


def _asked(
    asker: Asker,
    column: str,
    prompts: Sequence[Prompt],
    chat_of: Callable[[Prompt], Chat],
    advance: Callable[[], None],
) -> Answers:
    replies = asker.ask(column, [chat_of(prompt) for prompt in prompts], advance)
    return tuple(_judged(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True))


def _attacked(
    asker: Asker,
    column: str,
    prompts: Sequence[Prompt],
    attack: Attack,
    advance: Callable[[], None],
) -> Answers:
    if attack.apply is None:
        return _adaptively(asker, column, prompts, advance)
    apply = attack.apply
    return _asked(asker, column, prompts, lambda p: apply(_plain_chat(p)), advance)


def _adaptively(
    asker: Asker, column: str, prompts: Sequence[Prompt], advance: Callable[[], None]
) -> Answers:
    """The adaptive attack: its chats in turn for each prompt, until one gets compliance."""
    chats = []
    for prompt in prompts:
        chats.append(adaptive_chats(_plain_chat(prompt), partial(asker.refusal, column)))
        advance()
    best = [Answer(prompt, "", None) for prompt in prompts]
    for turn in range(max(map(len, chats), default=0)):
        left = [
            index
            for index, answer in enumerate(best)
            if turn < len(chats[index])
            and (answer.verdict is None or answer.verdict.label != "complied")
        ]
        replies = asker.ask(column, [chats[index][turn] for index in left])
        for index, reply in zip(left, replies, strict=True):
            answer = _judged(prompts[index], reply)
            if answer.verdict is not None:
                best[index] = answer
    return tuple(best)


def _judged(prompt: Prompt, reply: Reply) -> Answer:
    if reply.text is None:  # the chat did not fit, or the thought never ended: nothing to judge
        return Answer(prompt, "", None, reply.thinking)
    return Answer(prompt, reply.text, judge(prompt.text, reply.text))


# -- inputs -------------------------------------------------------------------


def _load_all(suites: Iterable[str | Path | Suite]) -> list[Suite]:
    """Every suite once; two of one name would be one in the report."""
    found: dict[str, Suite] = {}
    for item in suites:
        for suite in [item] if isinstance(item, Suite) else load_suite(item):
            if suite.name in found:
                raise SettingError(f"the suite '{suite.name}' is given twice", "Rename one file")
            if (name := suite.repeated_id()) is not None:
                cause = f"two prompts of the suite '{suite.name}' have the id '{name}'"
                raise SettingError(cause, "Give each an id of its own")
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


def _local(
    llama: SafeLlama,
    source: Artifact,
    columns: Mapping[str, dict[AttachedAdapter, float]],
    gene: AttachedAdapter | None,
    settings: EvalSettings,
    journal: Journal,
    stack: ExitStack,
) -> LocalModel:
    base = (source.sha256, settings.n_parallel, settings.n_ctx, versions())
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
        n_ctx=settings.n_ctx,
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
