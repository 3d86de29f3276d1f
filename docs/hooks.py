"""What the site needs beyond docs/: design/, the benches' results, and the report's schema.

The pages link to them where they lie in the repository (`../bench/judge/results.md`), so that
the links work there, too. Here the files enter the site, and the links follow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = ("design/*.md", "bench/*/*.md", "bench/*/*.svg")
SCHEMA = "safegene_edge/evals/report/data/report.schema.json"


def on_files(files: Files, config: Any) -> Files:
    """Add the files that lie elsewhere in the repository."""
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        _add(files, config, path.relative_to(ROOT).as_posix())
    _add(files, config, SCHEMA)
    return files


def _add(files: Files, config: Any, name: str) -> None:
    files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links out of docs/, and from design/ into it, become links within the site."""
    if page.file.src_uri.startswith("design/"):
        return markdown.replace("](../docs/", "](../")
    for outside in ("design/", "bench/", SCHEMA):
        markdown = markdown.replace(f"](../{outside}", f"]({outside}")
    return markdown
