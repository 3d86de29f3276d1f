"""Files for tools that know nothing of genes: Ollama, llama-server, LM Studio.

None of them has a strength a layer, and Ollama has no scale at all: what they get is one
adapter with everything folded in, or, for LM Studio, a merged model.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .compat import open_model, require_fit
from .errors import OutputError, SettingError
from .files import PathLike, write_text
from .merge import MergeReport, MergeSettings, merge
from .merge.inputs import Folded, Given, combined, fold

TOOLS = ("ollama", "llama-server", "lm-studio")
_ADAPTER = "adapter.gguf"
_PUBLISHER = "safegene"


@dataclass(frozen=True)
class Export:
    """What was written, and what to do with it.

    Attributes:
        files: the written files; commands: to run, a line each.
        merged: LM Studio's merge, else None.
    """

    files: tuple[Path, ...]
    commands: tuple[str, ...]
    merged: MergeReport | None = None


def export(
    tool: str,
    model: PathLike,
    adapters: Iterable[Given],
    folder: PathLike,
    *,
    settings: MergeSettings | None = None,
) -> Export:
    """Write what a tool needs to run the model with the adapters.

    Args:
        tool: one of `TOOLS`.
        adapters: as for `merge`; several become one.
        folder: made if need be; files of the same names are replaced.
        settings: of LM Studio's merge, as for `merge`.

    Raises:
        SettingError: an unknown tool.
        OutputError: the folder or a file in it cannot be written.
        FileFormatError, MismatchError: as for `merge`.
    """
    if tool not in TOOLS:
        raise SettingError(f"unknown tool '{tool}'", f"Give one of {', '.join(TOOLS)}")
    home = Path(folder)
    source = open_model(model).path.absolute()
    if tool == "lm-studio":
        return _lm_studio(source, adapters, home, settings)
    folded, opened = fold(adapters), open_model(source)
    for one in folded:
        require_fit(one.content, opened, one.name)
    return _ollama(source, folded, home) if tool == "ollama" else _server(source, folded, home)


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
    """A Modelfile: FROM takes a path, ADAPTER one relative to the Modelfile; the template is
    the GGUF's own, which Ollama reads itself."""
    for path in (model, home.absolute()):
        if any(char in str(path) for char in '"\n\r'):
            raise SettingError(f"{path}: Ollama cannot read a path with quotes or line breaks")
    file, adapter = home / "Modelfile", home / _ADAPTER
    name = f"{model.stem.lower()}-safe"
    with _made(home):
        _save(folded, model, adapter)
        write_text(file, f'FROM "{model}"\nADAPTER "./{adapter.name}"\n', [model])
    return Export(
        (file, adapter),
        (f"ollama create {shlex.quote(name)} -f {_shell(file)}", f"ollama run {shlex.quote(name)}"),
    )


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


def _lm_studio(
    model: Path, adapters: Iterable[Given], home: Path, settings: MergeSettings | None
) -> Export:
    """LM Studio loads no adapters: a merged model, in the folders that it expects."""
    name = f"{model.stem}-safe"
    target = home / _PUBLISHER / name / f"{name}.gguf"
    with _made(target.parent):
        report = merge(model, adapters, target, settings=settings)
    return Export(
        (target,),
        (
            f"lms import {_shell(target)}",
            f"# or: cp -r {_shell(home / _PUBLISHER)} ~/.lmstudio/models/",
        ),
        report,
    )


def _shell(path: Path) -> str:
    return shlex.quote(str(path.absolute()))
