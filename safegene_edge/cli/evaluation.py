"""`eval`: refusals and harmless answers, before and after."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from ..errors import SettingError, command
from ..evals.settings import (
    BUILT_IN,
    DEFAULT_SUITES,
    By,
    CostSettings,
    EndpointModel,
    EvalSettings,
    GateSettings,
)
from ..portfolio_settings import PortfolioSettings
from .adapters import beside, say_where_unfitted
from .options import (
    FILE,
    FINITE,
    Number,
    check_outputs,
    default_of,
    examples,
    file_option,
    require_used,
    say_next,
    setting,
    with_adapters,
)
from .terminal import progress

if TYPE_CHECKING:
    from ..evals.asking.journal import Journal
    from ..evals.report.gate import Gate
    from ..evals.report.report import Report
    from ..evals.report.results import AlignedLabels

# What --quick and --full choose where the user chose nothing.
_QUICK: dict[str, Any] = {
    "limit": 40,
    "max_tokens": 24,
    "think_tokens": 256,
    "attacks": ("prefix_injection", "prefill"),
    "attack_limit": 12,
    "kl": 12,
}
_FULL: dict[str, Any] = {
    "suites": ("harmful", "borderline", "harmless", "languages"),
    "attacks": ("all",),
    "attack_limit": 60,
    "guard": True,
    "kl": 64,
    "speed": True,
}
_FALLBACK: dict[str, Any] = {
    "max_tokens": default_of(EvalSettings, "max_tokens"),
    "think_tokens": default_of(EvalSettings, "think_tokens"),
    "attack_limit": default_of(EvalSettings, "attack_limit"),
    "kl": default_of(CostSettings, "kl_prompts"),
}


@dataclass
class _Options:
    """The command's options, by their parameters' names."""

    model: str | None
    gene: str | None
    adapter: tuple[str, ...]
    suites: tuple[str, ...]
    limit: int | None
    max_tokens: int | None
    think_tokens: int | None
    no_think: bool
    guard: bool
    parallel: int
    attacks: tuple[str, ...]
    attack_limit: int | None
    kl: int | None
    perplexity: str | None
    task: tuple[str, ...]
    speed: bool
    aligned: str | None
    grader: str | None
    min_refused: float | None
    max_over_refused: float | None
    max_kl: float | None
    max_task_drop: float | None
    by: By
    quick: bool
    full: bool
    resume: str | None
    no_resume: bool
    endpoint: str | None
    model_name: str | None
    endpoint_after: str | None
    model_name_after: str | None
    api_key_env: str
    concurrency: int
    timeout: float
    json_out: str | None
    html: str | None
    markdown: str | None
    plot: str | None

    def __post_init__(self) -> None:
        self._check()
        chosen = _QUICK if self.quick else _FULL if self.full else {}
        if self.endpoint:
            chosen = _for_a_server(chosen)
        self._preset_attacks = not self.attacks
        if self.max_kl is not None and self.kl is None:
            self.kl = _FULL["kl"]
        for name, value in {**_FALLBACK, **chosen}.items():
            current = getattr(self, name)
            if current is None or current is False or current == ():  # 0 is a choice
                setattr(self, name, value)

    def _check(self) -> None:
        if self.quick and self.full:
            raise click.UsageError("--quick and --full exclude each other")
        if bool(self.model) == bool(self.endpoint):
            raise click.UsageError("give MODEL, or --endpoint URL with --model-name")
        if not self.endpoint:
            if self.model_name or self.model_name_after or self.endpoint_after:
                raise click.UsageError("--model-name and its like go with --endpoint")
            return
        if not self.model_name:
            raise click.UsageError("--endpoint needs --model-name, the server's name of the model")
        local = {
            "--gene": self.gene,
            "--adapter": self.adapter,
            "--kl": self.kl,
            "--perplexity": self.perplexity,
            "--task": self.task,
            "--speed": self.speed,
            "--max-kl": self.max_kl is not None,
            "--max-task-drop": self.max_task_drop is not None,
        }
        local["--guard"] = self.guard
        if given := [name for name, value in local.items() if value]:
            raise click.UsageError(f"{given[0]} needs a local model, not --endpoint")

    @property
    def inputs(self) -> list[str]:
        paths = (self.model, self.gene, self.perplexity, self.aligned, self.grader, self.resume)
        suites = [suite for suite in self.suites if suite not in BUILT_IN]
        return [*self.adapter, *self.task, *suites, *(path for path in paths if path)]

    @property
    def attack_names(self) -> list[str]:
        return [name for item in self.attacks for name in item.split(",") if name.strip()]

    def attacks_on(self, suites: Sequence[str]) -> list[str]:
        """Without those of --quick and --full, where there is nothing to attack."""
        from ..evals.plan import attackable

        if self._preset_attacks and self.attacks and not attackable(suites):
            return []
        return self.attack_names

    def settings(self) -> EvalSettings:
        return EvalSettings(
            max_tokens=self.max_tokens or 1,
            limit=self.limit,
            attack_limit=self.attack_limit,
            n_parallel=self.parallel,
            think_tokens=self.think_tokens or 1,
            no_think=self.no_think,
            guard=self.guard,
        )

    def gate(self) -> GateSettings:
        return GateSettings(
            self.min_refused, self.max_over_refused, self.max_kl, self.max_task_drop, self.by
        )

    def costs(self) -> CostSettings:
        return CostSettings(
            kl_prompts=self.kl or 0,
            perplexity=self.perplexity,
            tasks=self.task,
            speed=self.speed,
        )


def _for_a_server(chosen: dict[str, Any]) -> dict[str, Any]:
    """The part of --quick and --full that a chat server can do."""
    from ..evals.asking.attacks import ATTACKS

    kept = {name: value for name, value in chosen.items() if name not in ("kl", "speed", "guard")}
    kept["attacks"] = tuple(
        name
        for name in kept.get("attacks", ())
        if name not in ATTACKS or not ATTACKS[name].needs_local_model
    )
    return kept


@click.command(
    "eval",
    epilog=examples(
        "eval model.gguf --quick",
        "eval model.gguf --gene fitted.gguf --json report.json --html report.html",
    ),
)
@click.argument("model", type=FILE, required=False)
@file_option("--gene", metavar="GENE.gguf", help="The safety adapter; measures before and after.")
@file_option("--adapter", multiple=True, metavar="TASK.gguf", help="Other adapters, always on.")
@setting(PortfolioSettings, "suites", "--suite", "suites", preset=True, multiple=True,
         metavar="NAME|FILE", type=FILE)  # fmt: skip
@setting(EvalSettings, "limit", metavar="N", type=click.IntRange(min=1))
@setting(EvalSettings, "max_tokens", preset=True, type=click.IntRange(min=1))
@setting(EvalSettings, "think_tokens", preset=True, type=click.IntRange(min=1))
@setting(EvalSettings, "no_think", is_flag=True)
@setting(EvalSettings, "n_parallel", "--parallel", "parallel", type=click.IntRange(1, 255))
@click.option("--quick", is_flag=True, help="Under a minute for a small model.")
@click.option("--full", is_flag=True, help="Every suite, attack and cost.")
@click.option(
    "--attack", "attacks", multiple=True, metavar="all|NAME", help="On the harmful suites."
)
@setting(EvalSettings, "guard", is_flag=True)
@setting(EvalSettings, "attack_limit", preset=True, type=click.IntRange(min=1))
@setting(
    CostSettings, "kl_prompts", "--kl", "kl", preset=True, metavar="N", type=click.IntRange(min=0)
)
@setting(CostSettings, "perplexity", metavar="FILE", type=FILE)
@setting(CostSettings, "tasks", "--task", "task", multiple=True, metavar="FILE", type=FILE)
@setting(CostSettings, "speed", is_flag=True)
@file_option(
    "--aligned", metavar="REPORT.json", help="The aligned model's report: what share came back?"
)
@file_option("--resume", metavar="FILE", help="Keep finished answers in FILE, and go on from it.")
@file_option("--grader", metavar="MODEL.gguf", help="Another model's opinion on the answers.")
@setting(GateSettings, "min_refused", metavar="SHARE", type=FINITE)
@setting(GateSettings, "max_over_refused", metavar="SHARE", type=FINITE)
@setting(GateSettings, "max_kl", metavar="NATS", type=FINITE)
@setting(GateSettings, "max_task_drop", metavar="SHARE", type=FINITE)
@setting(GateSettings, "by", type=click.Choice(get_args(By)))
@click.option("--no-resume", is_flag=True, help="Neither keep nor look up finished answers.")
@click.option("--endpoint", metavar="URL", help="An OpenAI-compatible server instead of MODEL.")
@click.option("--model-name", metavar="NAME", help="The server's name of the model.")
@click.option("--endpoint-after", metavar="URL", help="Another server for the second column.")
@click.option("--model-name-after", metavar="NAME", help="The second column's model.")
@setting(EndpointModel, "api_key_variable", "--api-key-env", "api_key_env", metavar="VARIABLE")
@setting(EndpointModel, "concurrency", type=click.IntRange(1, 256))
@setting(EndpointModel, "timeout", type=Number(min=1))
@file_option("--json", "json_out", metavar="FILE", help="Write the report as JSON.")
@file_option("--html", metavar="FILE", help="Write it as one HTML file.")
@file_option("--markdown", metavar="FILE", help="Write it as Markdown.")
@file_option("--plot", metavar="FILE.svg", help="Its main figures as a picture.")
def evaluate_model(**options: Any) -> None:
    """Count refusals on harmful prompts and answers on harmless ones.

    Without --suite the project's own suites "harmful", "borderline" and "harmless" are used;
    "languages" asks in eight languages. A FILE may be JSONL, CSV (AdvBench, HarmBench and their
    like) or plain text, one prompt a line.

    A run that was stopped goes on where it was: finished answers lie in the user's cache
    folder until the report is written, or in the FILE of --resume.

    With a threshold the exit code is 1 where it is missed, or where the prompts are too few
    to show that it is met.
    """
    from ..evals.report.summary import cost_warnings
    from ..files import write_text

    chosen = _Options(**{field.name: options[field.name] for field in fields(_Options)})
    _require_used(chosen)
    outputs = [
        path for path in (chosen.json_out, chosen.html, chosen.markdown, chosen.plot) if path
    ]
    check_outputs(outputs, chosen.inputs)
    if chosen.model:
        say_where_unfitted(chosen.model, chosen.gene, chosen.adapter)
    with _journal(chosen) as journal, progress("evaluating") as advance:
        report = _graded(_evaluated(chosen, journal, advance), chosen.grader)
        facts = report.to_json()
        for path, text in _documents(chosen, facts):
            write_text(path, text, chosen.inputs)
    click.echo(report.table())
    for warning in cost_warnings(facts):
        click.echo(f"warning: {warning}", err=True)
    for path in outputs:
        click.echo(f"report: {path}", err=True)
    end_by(report.gate())
    say_next(*_after(chosen))


def _require_used(chosen: _Options) -> None:
    """UsageError for an option that was given, and that nothing would look at."""
    if chosen.resume and chosen.no_resume:
        raise click.UsageError("--resume and --no-resume exclude each other")
    wanted: dict[str, tuple[object, tuple[str, ...]]] = {
        "--endpoint": (chosen.endpoint, ("timeout", "concurrency", "api_key_env")),
        "--attack": (chosen.attacks, ("attack_limit", "guard")),
        "--gene": (chosen.gene, ("guard",)),
        "a threshold": (chosen.gate().asks, ("by",)),
        "--gene or a second server": (
            chosen.gene or chosen.endpoint_after or chosen.model_name_after,
            ("aligned",),
        ),
    }
    require_used(wanted)


def _after(chosen: _Options) -> list[str]:
    """What goes on from a report, and from what it says of the model."""
    steps = []
    if chosen.model:
        own = [chosen.model, *with_adapters(chosen.adapter)]
        lost = ["restore", *own, "-o", beside(chosen.model, "fitted")]
        steps = [command(*(["chat", *own, "--gene", chosen.gene] if chosen.gene else lost))]
    if chosen.json_out:
        steps.append(command("report", "verify", chosen.json_out))
    return steps or [command("report", "--help")]


def end_by(gate: Gate, quiet: bool = False) -> None:
    """Print each threshold's line; exit with 1 where one is missed or undecided.

    Args:
        quiet: standard output holds JSON: print the failed ones alone.
    """
    for threshold in gate.failed if quiet else gate.thresholds:
        click.echo(str(threshold), err=threshold.state != "met")
    if gate.failed:
        raise click.exceptions.Exit(1)


def _documents(chosen: _Options, facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Output path and content of every report that was asked for."""
    if chosen.json_out:
        yield chosen.json_out, json.dumps(facts, indent=2) + "\n"
    if chosen.html:
        from ..evals.report.html import render_html

        yield chosen.html, render_html(facts)
    if chosen.markdown:
        from ..evals.report.markdown import render_markdown

        yield chosen.markdown, render_markdown(facts)
    if chosen.plot:
        from ..evals.report.pictures import of_report

        yield chosen.plot, of_report(facts)


def _evaluated(chosen: _Options, journal: Journal, advance: Any) -> Report:
    from ..evals.evaluate import evaluate, evaluate_endpoint

    suites = chosen.suites or DEFAULT_SUITES
    shared: dict[str, Any] = {
        "suites": suites,
        "settings": chosen.settings(),
        "attacks": chosen.attacks_on(suites),
        "aligned": _aligned(chosen.aligned),
        "gate": chosen.gate(),
        "journal": journal,
        "progress": advance,
    }
    if chosen.endpoint:
        return evaluate_endpoint(*_served(chosen), **shared)
    if chosen.model is None:  # _Options has refused this already
        raise SettingError("no model is given")
    costs = chosen.costs()
    return evaluate(chosen.model, chosen.gene, adapters=chosen.adapter, costs=costs, **shared)


def _graded(report: Report, grader: str | None) -> Report:
    """The report with a second opinion, where one is wanted."""
    if grader is None:
        return report
    from ..evals.grader import second_opinion

    return replace(report, opinion=second_opinion(report.suites, grader))


def _served(chosen: _Options) -> tuple[Any, Any]:
    """The two sides of an evaluation over the network; the second may be None."""

    def served(url: str, name: str) -> EndpointModel:
        return EndpointModel(
            url,
            name,
            api_key_variable=chosen.api_key_env,
            concurrency=chosen.concurrency,
            timeout=chosen.timeout,
        )

    url, name = chosen.endpoint or "", chosen.model_name or ""
    if not chosen.endpoint_after and not chosen.model_name_after:
        return served(url, name), None
    return served(url, name), served(chosen.endpoint_after or url, chosen.model_name_after or name)


def _aligned(path: str | None) -> AlignedLabels | None:
    if path is None:
        return None
    from ..evals.report.json import aligned_labels
    from ..evals.report.schema import read_report

    return aligned_labels(read_report(path))


@contextmanager
def _journal(chosen: _Options) -> Iterator[Journal]:
    """The file of finished answers: the user's own, or one in the cache that goes when done."""
    from ..evals.asking.journal import Journal, fingerprint, journal_folder

    if chosen.no_resume:
        yield Journal()
        return
    if chosen.resume:
        with Journal(chosen.resume) as journal:
            if journal.count:
                server = "; a server's answers count as long as its address and model's name do"
                click.echo(f"going on: {journal.count} results are in {chosen.resume}"
                           f"{server if chosen.endpoint else ''}", err=True)  # fmt: skip
            yield journal
        return
    # Entries are keyed by what they depend on; the name only keeps models apart.
    source = chosen.endpoint or str(Path(chosen.model or "").resolve())
    path = journal_folder() / f"{fingerprint(source)[:24]}.jsonl"
    with _alone(path) as alone, Journal(path if alone else None) as journal:
        if not alone:
            click.echo(
                "another eval of this model is running: what this one finds is not kept for a "
                "stop; --resume FILE keeps it",
                err=True,
            )
        if journal.count:
            click.echo(f"going on: {journal.count} results of a stopped run are kept", err=True)
        try:
            yield journal
        except BaseException:
            if not journal.count:  # nothing to go on from
                journal.delete()
            raise
        if journal.all_used:  # what a longer run has left stays
            journal.delete()


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """A file that this process alone goes on with; False where another one does just now."""
    from ..files import hold, writing

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            with suppress(FileNotFoundError):  # which another run has ended and removed
                held = hold(path)
                break
    if held is None:
        yield False
        return
    with held:
        yield True
