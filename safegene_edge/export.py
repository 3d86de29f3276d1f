"""Files for tools that know nothing of genes: Ollama, llama-server, LM Studio.

None of them has a coefficient a layer, and Ollama has no scale at all: what they get is one
adapter with everything folded in, or, for LM Studio, a merged model.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .compat import open_model, require_fit
from .errors import OutputError, SettingError
from .files import PathLike, check_output, write_text
from .merge import MergeReport, MergeSettings, merge
from .merge.inputs import Given, combined, fold

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
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{home}: {error.strerror}", "Name a folder to write to") from error
    source = open_model(model).path.absolute()
    if tool == "lm-studio":
        return _lm_studio(source, adapters, home, settings)
    adapter = _adapter(source, adapters, home / _ADAPTER)
    return _ollama(source, adapter, home) if tool == "ollama" else _server(source, adapter, home)


def _adapter(model: Path, adapters: Iterable[Given], output: Path) -> Path:
    folded = fold(adapters)
    for one in folded:
        require_fit(one.content, open_model(model), one.name)
    combined(folded).save(output, [model, *(one.source for one in folded if one.source)])
    return output


def _ollama(model: Path, adapter: Path, home: Path) -> Export:
    """A Modelfile: FROM takes a path, ADAPTER one relative to the Modelfile; the template is
    the GGUF's own, which Ollama reads itself."""
    for path in (model, home.absolute()):
        if any(char in str(path) for char in '"\n\r'):
            raise SettingError(f"{path}: Ollama cannot read a path with quotes or line breaks")
    file = home / "Modelfile"
    name = f"{model.stem.lower()}-safe"
    write_text(file, f'FROM "{model}"\nADAPTER "./{adapter.name}"\n', [model])
    return Export(
        (file, adapter),
        (f"ollama create {shlex.quote(name)} -f {_shell(file)}", f"ollama run {shlex.quote(name)}"),
    )


def _server(model: Path, adapter: Path, home: Path) -> Export:
    """The flags, and the body that sets the scale with POST /lora-adapters."""
    file = home / "lora-adapters.json"
    write_text(file, json.dumps([{"id": 0, "scale": 1.0}]) + "\n", [model])
    flags = f"-m {_shell(model)} --lora {_shell(adapter)}"
    if "," in str(adapter.absolute()):
        raise SettingError(f"{adapter}: llama.cpp takes a comma for the end of the adapter's name")
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
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{target.parent}: {error.strerror}") from error
    check_output(target, [model])
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
