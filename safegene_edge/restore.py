"""`restore`: the whole way in one call, from a fine-tune that lost its refusals to a safe file.

Find or learn the gene, find its strength, write the fitted adapter or the merged model, and
measure before and after on prompts that neither the learning nor the fit saw. Each step leaves its
file in a folder beside the output, so that a run that was killed goes on where it was; the folder
goes when all is done.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from .compat import model_hashes, open_model, require_fit
from .errors import (
    FileFormatError,
    MismatchError,
    OutputError,
    SafeGeneError,
    SettingError,
    command,
)
from .evals.asking.journal import Journal, fingerprint
from .evals.evaluate import evaluate, versions
from .evals.judge import judge_sha256
from .evals.report.html import render_html
from .evals.settings import DEFAULT_SUITES, EvalSettings
from .files import (
    PathLike,
    atomic_folder,
    check_output,
    hold,
    parse_json,
    read_text,
    sha256,
    write_text,
    writing,
)
from .gene import Adapter, SafetyGene, listed
from .gguf_file import GGUFFile
from .learn.base import Model, files_of
from .learn.run import learn, plan, require_prompts
from .learn.settings import LearnSettings
from .merge.inputs import require_mergeable
from .merge.plan import merge
from .prompts import Prompt, listed_prompts
from .recalibrate import Examples, Recalibration, RecalibrationSettings, recalibrate
from .recalibrate.examples import compared
from .runtime.lockstep import WRITER
from .sharing import PACKAGE, base_of, find, is_place, licence_of
from .sharing import card as card_of

_LEARNT, _MOST = 0.67, 120  # of the task's prompts, the share to learn from, and at most in all
_FEW = 3  # task prompts below which all are learnt from, and the shipped examples fit alone
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Restored:
    """What was done.

    Attributes:
        gene: that was given or learnt.
        recalibration: its strength, and what that does to examples that the fit never saw.
        report: before and after, as `eval --json` has it; None where nothing was lost.
        files: what was written, by what it is: "output", "gene", "report", "page".
        next_steps: commands that go on from here.
    """

    gene: SafetyGene
    recalibration: Recalibration
    report: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)
    next_steps: tuple[str, ...] = ()

    @property
    def nothing_lost(self) -> bool:
        """Whether the target refuses as much as the aligned model, but for chance."""
        return self.recalibration.nothing_lost

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "nothing_lost": self.nothing_lost,
            "gene": {"family": self.gene.family, "sha256": self.gene.sha256,
                     "layers": list(self.gene.layers), "parameters": self.gene.n_parameters},
            "recalibration": self.recalibration.to_json(),
            "report": self.report,
            "files": self.files,
            "next_steps": list(self.next_steps),
        }  # fmt: skip


def restore(
    target: PathLike,
    aligned: Model | None = None,
    gene: PathLike | SafetyGene | None = None,
    *,
    output: PathLike,
    adapters: Iterable[PathLike] = (),
    task: Iterable[Prompt | str] = (),
    merged: bool = False,
    limit: int | None = 40,
    learning: LearnSettings | None = None,
    settings: RecalibrationSettings | None = None,
    card: PathLike | None = None,
    progress: Progress | None = None,
) -> Restored:
    """Bring a fine-tune's refusals back.

    Args:
        target: the fine-tuned, quantised GGUF; nothing is written to it.
        aligned: a GGUF of its family that refuses, a sequence of one and its adapters, or a
            folder that holds the one which the target names as its base.
        gene: a gene of its family, or a place to find one in, as `sharing.find` has it: "auto", a
            folder, `hf:OWNER/REPO`. None: the package's own if it fits and neither `aligned` nor
            `learning` is given; else one is learnt from the target itself, from `aligned` or,
            without that, from its own self under a safety system prompt.
        output: the fitted adapter, a GGUF LoRA, or with `merged` the whole model.
        adapters: GGUF LoRAs that the target is run with, such as its task's.
        task: prompts as the target's own job has them, unlabelled; what it answers there is kept.
            One that comes again counts once.
        learning: how a gene is learnt, not for a `gene` that is given.
        limit: prompts of each suite that is measured; None: all.
        card: where to write the gene's card, a README.md for a hub; None: nowhere.
        progress: called with what is being done, how much of it is done, and of how much.

    Raises:
        SafeGeneError: as `learn`, `recalibrate` and `merge`; or an output cannot be written. A gene
            that was learnt by then is kept.
    """
    if gene is not None and (aligned is not None or learning is not None):
        raise SettingError(
            "a gene is given, and how to learn one (aligned, learning) as well", "Leave one out"
        )
    work = _Work(
        Path(target), list(map(str, listed(adapters))), Path(output), _once(task), merged, limit,
        settings or RecalibrationSettings(), progress or (lambda *_: None),
        None if card is None else Path(card),
    )  # fmt: skip
    model, teacher = open_model(target), files_of(aligned, target)
    given = [] if gene is None or isinstance(gene, SafetyGene) or is_place(gene) else [gene]
    outputs = [path for name, path in work.outputs.items() if name != "gene" or not given]
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise OutputError(f"{card}: is another output of this run, too", "Give the card a name")
    for path in outputs:
        check_output(path, [*work.inputs, *teacher, *given])
    work.gene_name = Path(given[0]).name if given else work.outputs["gene"].name
    place = PACKAGE if gene is None and aligned is None and learning is None else gene
    if is_place(place):
        with suppress(MismatchError) if gene is None else nullcontext():
            name, gene = find(str(place), target)
            work.gene_name = Path(name.removesuffix(" of the package")).name
            work.progress(f"taking the gene {name}", 1, 1)
    elif isinstance(gene, SafetyGene):
        require_fit(gene, model, "the gene")
    elif gene is not None:
        require_fit(SafetyGene.load(gene), model, gene)
    learning = learning or LearnSettings()
    if merged:  # before minutes of learning
        _require_merge(model, gene, work.adapters, learning.for_teacher(itself=not teacher))
    return work.run(teacher, gene, learning)


def _require_merge(
    model: GGUFFile,
    gene: PathLike | SafetyGene | None,
    adapters: Iterable[PathLike],
    learning: LearnSettings,
) -> None:
    """Raise where a tensor that the gene and the adapters change cannot be written again."""
    names = {name for path in adapters for name in Adapter.load(path).pairs}
    if gene is None:
        names |= {f"blk.{layer}.{WRITER}.weight" for layer in plan(model, learning)[0]}
    else:
        names |= set((gene if isinstance(gene, SafetyGene) else SafetyGene.load(gene)).pairs)
    for name in sorted(names & model.tensors.keys()):
        try:
            require_mergeable(model, name, {})
        except SafeGeneError as error:
            error.remedy = "Leave out --merge; `merge` takes the fitted adapter, and --imatrix FILE"
            raise


def _once(task: Iterable[Prompt | str]) -> tuple[Prompt | str, ...]:
    """The first prompts, each once, as recalibration compares them: logs repeat themselves."""
    seen: dict[str, Prompt | str] = {}
    for one in listed_prompts(task):
        seen.setdefault(compared(one if isinstance(one, Prompt) else Prompt("", one)), one)
    return tuple(seen.values())[:_MOST]


@dataclass
class _Work:
    target: Path
    adapters: list[str]
    output: Path
    task: tuple[Prompt | str, ...]
    merged: bool
    limit: int | None
    settings: RecalibrationSettings
    progress: Progress
    card: Path | None = None
    gene_name: str = ""  # the file's, for the card
    _held: IO[bytes] | None = None  # the note

    @property
    def inputs(self) -> list[PathLike]:
        return [self.target, *self.adapters]

    @property
    def outputs(self) -> dict[str, Path]:
        """All files that a run writes."""
        name = _stem(self.output)
        asked = {} if self.card is None else {"card": self.card}
        return asked | {
            "output": self.output,
            "gene": name.with_name(name.name + ".gene.gguf"),
            "report": name.with_name(name.name + ".report.json"),
            "page": name.with_name(name.name + ".report.html"),
        }

    @property
    def folder(self) -> Path:
        """Where unfinished work lies."""
        return self.output.with_name(self.output.name + ".restore")

    @property
    def note(self) -> Path:
        """Says which run the folder is of."""
        return self.folder / "run.json"

    def run(
        self, teacher: list[PathLike], gene: PathLike | SafetyGene | None, learning: LearnSettings
    ) -> Restored:
        """Every step, but those that a stopped run has done."""
        try:
            self._enter(teacher, gene, learning)
            return self._steps(teacher, gene, learning)
        finally:
            self._let_go()

    def _steps(
        self, teacher: list[PathLike], gene: PathLike | SafetyGene | None, learning: LearnSettings
    ) -> Restored:
        held = self.task if gene is not None else self._task_parts()[1]
        examples = Examples.shipped("fit", held)  # refused before it is learnt
        found = self._gene(teacher, gene, learning)
        files = {}
        if gene is None:
            found.save(self.outputs["gene"])
            files["gene"] = str(self.outputs["gene"])
        try:
            fitted = self._recalibrated(found, examples)
        except SafeGeneError as error:
            kept = f"what was learnt is kept: --gene {files['gene']}" if files else ""
            error.remedy = "; ".join(filter(None, (error.remedy, kept)))
            raise
        if fitted.nothing_lost:
            self._leave()
            return Restored(found, fitted, None, files)
        adapter = self.folder / "fitted.gguf"
        found.express(fitted.expression).save(adapter)
        report = self._measured(adapter)
        self._written(adapter)
        write_text(self.outputs["report"], json.dumps(report, indent=2) + "\n", self.inputs)
        write_text(self.outputs["page"], render_html(report), self.inputs)
        if self.card is not None:
            write_text(self.card, self._card(found, fitted, report), self.inputs)
        self._leave()
        files = {name: str(path) for name, path in self.outputs.items()
                 if name in files or name != "gene"}  # fmt: skip
        return Restored(found, fitted, report, files, self._next())

    def _enter(
        self, teacher: list[PathLike], gene: PathLike | SafetyGene | None, learning: LearnSettings
    ) -> None:
        """The folder of this very run: what others left behind is not gone on with."""
        known = gene.sha256 if isinstance(gene, SafetyGene) else str(gene and sha256(gene))
        asked = [p if isinstance(p, str) else list(p.messages) for p in self.task]
        key = fingerprint(
            _hashes(self.inputs), _hashes(teacher), known, asked,
            self.merged, self.limit, asdict(self.settings), asdict(learning),
            versions(), judge_sha256(),
        )  # fmt: skip
        while not self._entered(key):
            pass  # what another run left was removed, or this one's was made

    def _entered(self, key: str) -> bool:
        """Whether the folder is there, of this very run, and held against other processes."""
        try:
            self._held = hold(self.note)
        except (FileNotFoundError, NotADirectoryError):
            self._make(key)
            return False
        if self._held is None:
            raise SettingError(
                f"{self.output}: another run of this command is writing it",
                "Wait for its end, or give another -o",
            )
        if not _is(self.note, key):
            self._leave()
            return False
        return True

    def _make(self, key: str) -> None:
        if self.folder.exists() and not self.note.exists():
            raise SettingError(
                f"{self.folder}: is there already, and no unfinished run of this command",
                "Move it away, or give another -o",
            )
        try:
            with atomic_folder(self.folder) as made:
                write_text(made / self.note.name, json.dumps({"key": key}) + "\n")
        except OutputError:
            if not self.note.exists():  # else another process was quicker
                raise

    def _let_go(self) -> None:
        if self._held is not None:
            self._held.close()
        self._held = None

    def _leave(self) -> None:
        """Remove the folder, its note last: a run that is stopped here is still known as one."""
        self._let_go()
        with writing(self.folder):
            for path in self.folder.iterdir():
                if path != self.note:
                    path.unlink()
            shutil.rmtree(self.folder)

    def _gene(
        self, teacher: list[PathLike], gene: PathLike | SafetyGene | None, learning: LearnSettings
    ) -> SafetyGene:
        if isinstance(gene, SafetyGene):
            return gene
        if gene is not None:
            return SafetyGene.load(gene)
        kept = self.folder / "gene.gguf"
        if not kept.exists():
            learnt, held = self._task_parts()
            require_prompts(self.inputs, held, learning.tokens)  # `learn` looks at its own
            learn(
                [self.inputs], teacher or None, task=learnt, settings=learning,
                progress=self.progress,
            ).save(kept)  # fmt: skip
        return SafetyGene.load(kept)

    def _task_parts(self) -> tuple[Sequence[Prompt | str], Sequence[Prompt | str]]:
        """To learn from, and to hold the strength against."""
        if len(self.task) < _FEW:
            return self.task, ()
        cut = round(_LEARNT * len(self.task))
        return self.task[:cut], self.task[cut:]

    def _recalibrated(self, gene: SafetyGene, examples: Examples) -> Recalibration:
        kept = self.folder / "recalibration.json"
        if kept.exists():
            return Recalibration.from_json(_json_of(kept))
        found = recalibrate(
            self.target, gene, examples, adapters=self.adapters, settings=self.settings,
            progress=lambda done, total: self.progress("finding the strength", done, total),
        )  # fmt: skip
        write_text(kept, json.dumps(found.to_json()) + "\n")
        return found

    def _measured(self, adapter: Path) -> dict[str, Any]:
        kept = self.folder / "report.json"
        if not kept.exists():
            with Journal(self.folder / "answers.jsonl") as journal:
                report = evaluate(
                    self.target, adapter, adapters=self.adapters, suites=DEFAULT_SUITES,
                    settings=replace(EvalSettings(), limit=self.limit), journal=journal,
                    progress=lambda done, total: self.progress("measuring", done, total),
                )  # fmt: skip
            write_text(kept, json.dumps(report.to_json()) + "\n")
        return _json_of(kept)

    def _written(self, adapter: Path) -> None:
        if self.merged:
            merge(
                self.target, [*self.adapters, adapter], self.output,
                progress=lambda done, total: self.progress("merging", done, total),
            )  # fmt: skip
        else:
            SafetyGene.load(adapter).save(self.output, self.inputs)

    def _card(self, gene: SafetyGene, fitted: Recalibration, report: dict[str, Any]) -> str:
        model, counted = open_model(self.target), fitted.validation
        return card_of(
            gene, self.gene_name, licence=licence_of(model), base=base_of(model),
            report=report, by_form=counted.by_form if counted else {},
        )  # fmt: skip

    def _next(self) -> tuple[str, ...]:
        own = [word for path in self.adapters for word in ("--adapter", path)]
        run = [self.output] if self.merged else [self.target, *own, "--gene", self.output]
        steps = (command("chat", *run), command("serve", *run))
        if self.merged:
            return steps
        files = (self.target, *self.adapters, self.output)
        folder = f"{_stem(self.output)}.ollama"
        return (
            *steps,
            command("merge", *files, "-o", f"{_stem(self.output)}.merged.gguf"),
            command("export", "ollama", *files, "--merged", "-o", folder),
        )


def _stem(output: Path) -> Path:
    """The path without .gguf: "model-1.5" ends in no suffix."""
    return output.with_suffix("") if output.suffix.lower() == ".gguf" else output


def _json_of(kept: Path) -> dict[str, Any]:
    """What an earlier step has written."""
    try:
        facts: dict[str, Any] = parse_json(read_text(kept))
    except ValueError as error:
        raise FileFormatError(f"{kept}: is not JSON ({error})", "Delete its folder") from error
    return facts


def _hashes(files: Sequence[PathLike]) -> list[str]:
    """Of a model and its adapters; a model may be split, an adapter is one file."""
    return [*(model_hashes(files[0]) if files else ()), *map(sha256, files[1:])]


def _is(note: Path, key: str) -> bool:
    try:
        return bool(parse_json(note.read_text(encoding="utf-8"))["key"] == key)
    except (OSError, ValueError, KeyError, TypeError):
        return False
