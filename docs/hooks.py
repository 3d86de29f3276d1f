"""What the site needs beyond docs/: the benches' results, and the report's schema.

The pages link to them where they lie in the repository (`../bench/judge/results.md`), so that
the links work there, too. Here the files enter the site, and the links follow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
SCHEMA = "safegene_edge/evals/report/data/report.schema.json"


def on_files(files: Files, config: Any) -> Files:
    """Add the files that lie elsewhere in the repository."""
    for path in sorted([*ROOT.glob("bench/*/results.md"), *ROOT.glob("bench/*/*.svg")]):
        _add(files, config, path.relative_to(ROOT).as_posix())
    _add(files, config, SCHEMA)
    return files


def _add(files: Files, config: Any, name: str) -> None:
    files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of docs/ become links within the site."""
    return markdown.replace("](../bench/", "](bench/").replace(f"](../{SCHEMA}", f"]({SCHEMA}")
