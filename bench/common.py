"""What every bench shares: the real model, the machine's description, files of results."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
SAFETY = ROOT / "examples" / "smollm2-135m-safety"
sys.path.insert(0, str(ROOT / "examples"))
from real_model import cache_folder, smollm2  # noqa: E402

__all__ = ["SHARED", "machine", "rows_of", "safety_adapter", "smollm2", "table", "write"]


def safety_adapter(model: Path) -> Path:
    """The example's safety adapter as GGUF, converted afresh."""
    from safegene_edge import convert

    target = cache_folder() / "smollm2-135m-safety.gguf"
    convert(SAFETY, base=model, output=target)
    return target


def machine() -> dict[str, Any]:
    """Enough to read a figure by: processor, cores, versions."""
    from safegene_edge.runtime.devices import memory_bytes, physical_cores

    names = [
        line.split(":")[1].strip()
        for line in _lines("/proc/cpuinfo")
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "physical_cores": physical_cores(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "safegene_edge": version("safegene-edge"),
        "llama_cpp_python": version("llama-cpp-python"),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def rows_of(pattern: Path) -> list[dict[str, Any]]:
    """All rows of the JSON lines that a bench keeps, of files by a pattern."""
    return [
        json.loads(line)
        for path in sorted(pattern.parent.glob(pattern.name))
        for line in path.read_text().splitlines()
    ]


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def write(folder: Path, results: dict[str, Any], text: str, name: str = "results") -> None:
    """NAME.json, and NAME.md made from it."""
    whole = {"machine": machine(), **results}
    (folder / f"{name}.json").write_text(json.dumps(whole, indent=2) + "\n")
    lines = ", ".join(f"{key}: {value}" for key, value in whole["machine"].items())
    note = f"<!-- written by {Path(sys.argv[0]).name} from {name}.json -->"
    (folder / f"{name}.md").write_text(f"{note}\n\n{text}\nMachine: {lines}.\n")
    print(text)
