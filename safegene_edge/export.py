"""Files for tools that know nothing of genes: Ollama, llama-server, LM Studio.

None of them has a strength a layer, and Ollama has no scale at all: what they get is one
adapter with everything folded in, or a merged model. LM Studio always gets a merged one, and so
must Ollama from 0.34.1 on, which refuses adapters. Names are held against the programs' own
rules, as their sources have them (Ollama's parser and types/model, `lms import`, llama.cpp's
arguments).
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from .compat import SHARD, open_model, other_parts, require_fit
from .errors import OutputError, SettingError
from .files import PathLike, write_text
from .gguf_file import GGUFFile
from .merge import MergeReport, MergeSettings, merge
from .merge.inputs import Folded, Given, combined, fold
from .runtime.chat import ChatTemplate, template_fault
from .runtime.controls import ControlTexts

TOOLS = ("ollama", "llama-server", "lm-studio")
_ADAPTER = "adapter.gguf"
_PUBLISHER = "safegene"
_NAME_LENGTH = 75  # and "-safe": Ollama takes 80
_REFUSED = "Ollama refuses adapters from version 0.34.1 on: give --merged (merged=True) for it"


@dataclass(frozen=True)
class Export:
    """What was written, and what to do with it.

    Attributes:
        files: the written files; commands: to run, a line each.
        merged: what the merge did, where there was one.
        warnings: one line each.
    """

    files: tuple[Path, ...]
    commands: tuple[str, ...]
    merged: MergeReport | None = None
    warnings: tuple[str, ...] = ()


def export(
    tool: str,
    model: PathLike,
    adapters: Iterable[Given],
    folder: PathLike,
    *,
    merged: bool = False,
    settings: MergeSettings | None = None,
) -> Export:
    """Write what a tool needs to run the model with the adapters.

    Args:
        tool: one of `TOOLS`.
        adapters: as for `merge`; several become one.
        folder: made if need be; files of the same names are replaced.
        merged: write a merged model in place of an adapter; LM Studio always gets one.
        settings: of the merge, as for `merge`.

    Raises:
        SettingError: an unknown tool, or a name or a split model that the tool cannot take.
        OutputError: the folder or a file in it cannot be written.
        FileFormatError, MismatchError: as for `merge`.
    """
    require_tool(tool)
    home = Path(folder)
    source = open_model(model).path.absolute()
    chosen = replace(settings or MergeSettings(), threads=None) != MergeSettings()
    if chosen and not (merged or tool == "lm-studio"):
        raise SettingError(
            "an importance matrix, --promote, --run and --plain are for a merged model",
            "Give --merged as well",
        )
    if merged or tool == "lm-studio":
        return _merged(tool, source, adapters, home, settings)
    folded, opened = fold(adapters), open_model(source)
    for one in folded:
        require_fit(one.content, opened, one.name)
    if tool == "ollama" and other_parts(opened):
        raise SettingError(
            f"{source}: Ollama takes no adapter with a split model", "Give --merged (merged=True)"
        )
    return _ollama(source, folded, home) if tool == "ollama" else _server(source, folded, home)


def require_tool(tool: str) -> None:
    """Raise SettingError for a tool that there is no export for."""
    if tool not in TOOLS:
        raise SettingError(f"unknown tool '{tool}'", f"Give one of {', '.join(TOOLS)}")


def safe_name(model: Path) -> str:
    """A name for the new model that every tool takes: of the model's, what all of them allow.

    Ollama's are ASCII letters, digits, `_`, `-` and `.`, 80 at most, the first no `-` or `.`.
    LM Studio's folders neither begin nor end with a full stop.
    """
    split = SHARD.fullmatch(model.name)
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", split[1] if split else model.stem)
    stem = re.sub(r"\.{2,}", ".", stem).strip("-._")[:_NAME_LENGTH].rstrip("-._")
    return f"{stem or 'model'}-safe"


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder is there for the block; where the block fails, folders made for it go again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            cause = f"{folder}: {error.strerror}"
            raise OutputError(cause, "Name a folder to write to") from error
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):  # it holds something, or was never made
                path.rmdir()
        raise


def _save(folded: Sequence[Folded], model: Path, output: Path) -> None:
    """One adapter that does what several do."""
    combined(folded).save(output, [model, *(one.source for one in folded if one.source)])


def _ollama(model: Path, folded: Sequence[Folded], home: Path) -> Export:
    """A Modelfile: FROM takes a path, ADAPTER one relative to the Modelfile."""
    if '"' in str(model) or not str(model).isprintable():
        raise SettingError(
            f"{model}: Ollama cannot read a path with quotes, line breaks or unprintable letters",
            "Move the model, or give --merged (merged=True)",
        )
    file, adapter = home / "Modelfile", home / _ADAPTER
    with _made(home):
        _save(folded, model, adapter)
        text = f'FROM "{model}"\nADAPTER "./{adapter.name}"\n{_system(model)}'
        write_text(file, text, [model])
    return Export((file, adapter), _create(file, model), warnings=(_REFUSED,))


def _system(model: Path) -> str:
    """The system message that a model's template adds by itself, as a line of a Modelfile.

    Ollama may take a template of its own that is near the file's and adds none, such as that of
    SmolLM2; the gene was fitted with it.
    """
    text = default_system(open_model(model))
    return f'SYSTEM """{text}"""\n' if text and '"""' not in text else ""


def default_system(file: GGUFFile) -> str:
    """What a model's chat template says in a system message where the chat has none; or ""."""
    template = file.text("tokenizer.chat_template", "")
    if not template.strip() or template_fault(template):
        return ""
    words = file.strings("tokenizer.ggml.tokens")
    bos, eos = (
        words[number] if 0 <= number < len(words) else ""
        for number in (file.whole(f"tokenizer.ggml.{end}_token_id", -1) for end in ("bos", "eos"))
    )
    chat = ChatTemplate(template, bos=bos, eos=eos, controls=ControlTexts([]))
    user, mark = {"role": "user", "content": "Hello"}, "Words of the system"
    try:
        with_mark, without = (
            "".join(text for text, _ in chat.parts(turns, add_generation_prompt=True, variables={}))
            for turns in ([{"role": "system", "content": mark}, user], [user])
        )
    except Exception:  # a template may raise anything, and takes no system message then
        return ""
    before, _, after = with_mark.partition(mark)
    fits = without.startswith(before) and without.endswith(after) and after
    return without[len(before) : len(without) - len(after)] if fits else ""


def _create(file: Path, model: Path) -> tuple[str, ...]:
    name = safe_name(model).lower()
    return f"ollama create {name} -f {_shell(file)}", f"ollama run {name}"


def _server(model: Path, folded: Sequence[Folded], home: Path) -> Export:
    """The flags, and the body that sets the scale with POST /lora-adapters."""
    file, adapter = home / "lora-adapters.json", home / _ADAPTER
    flags = f"-m {_shell(model)} --lora {_shell(adapter)}"
    if "," in str(adapter.absolute()):
        raise SettingError(f"{adapter}: llama.cpp takes a comma for the end of the adapter's name")
    with _made(home):
        _save(folded, model, adapter)
        write_text(file, json.dumps([{"id": 0, "scale": 1.0}]) + "\n", [model])
    return Export(
        (adapter, file),
        (
            f"llama-server {flags}",
            f"llama-cli {flags}",
            f"curl http://127.0.0.1:8080/lora-adapters -H 'Content-Type: application/json' "
            f"-d @{_shell(file)}",
        ),
    )


def _merged(
    tool: str,
    model: Path,
    adapters: Iterable[Given],
    home: Path,
    settings: MergeSettings | None,
) -> Export:
    """A merged model: for LM Studio in the folders that it expects, else with what it needs."""
    name = safe_name(model)
    target = home / f"{name}.gguf"
    if tool == "lm-studio":
        target = home / _PUBLISHER / name / target.name
    with _made(target.parent):
        report = merge(model, adapters, target, settings=settings)
        if tool == "ollama":
            file = home / "Modelfile"
            write_text(file, f'FROM "./{target.name}"\n{_system(model)}', [model, target])
            return Export((file, target), _create(file, model), report, report.warnings)
    commands: tuple[str, ...] = (
        f"llama-server -m {_shell(target)}",
        f"llama-cli -m {_shell(target)}",
    )
    if tool == "lm-studio":  # which would move the file, or ask for its place
        commands = (
            f"lms import --copy --user-repo {_PUBLISHER}/{name} {_shell(target)}",
            f"# or: cp -r {_shell(home / _PUBLISHER)} ~/.lmstudio/models/",
        )
    return Export((target,), commands, report, report.warnings)


def _shell(path: Path) -> str:
    return shlex.quote(str(path.absolute()))
