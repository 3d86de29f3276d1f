"""How the docs read: `python tests/prose.py [FOLDER]` prints figures, and exits with 1 on a fault.

Counted are the sentences of README, docs, CONTRIBUTING and SECURITY, without code, headings, tables
of figures and generated parts. Words that stay out are looked for in the commands' help, too. Links
are followed in every page, as GitHub follows them: a file by its path, a heading by its anchor.
Addresses on the web are not asked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

LONGEST, LONG, MOST_LONG = 40, 30, 0.03  # words; words; the share of sentences that may have more
FORBIDDEN = "told|paid|rooms?|heirs?|heard|news|lessons?|strangers?|ours"
READ = ("README.md", "docs/**/*.md", "CONTRIBUTING.md", "SECURITY.md")
LINKED = (*READ, "CHANGELOG.md", "design/*.md", "bench/*/*.md")
HELP = "tests/data/cli/*.txt"
_GENERATED = re.compile(r"<!-- (?:begin|table of) (?:.|\n)*?<!-- end .*?-->")
_CODE = re.compile(r"^(```+)(?:.|\n)*?^\1 *$", re.M)
_COMMENT = re.compile(r"<!--(?:.|\n)*?-->")
_LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)(?: \"[^\"]*\")?\)")
_END = re.compile(r"(?<=[.!?])[\"'”)*_]*\s+(?=[\"'“(*_]*[A-Z0-9`])")
_SHORT = re.compile(r"\b(e\.g|i\.e|et al|vs|cf)\.")


@dataclass
class Findings:
    """What was counted, and the faults, a line each."""

    lengths: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    forbidden: int = 0
    dead: int = 0

    @property
    def long(self) -> int:
        return sum(length > LONG for length in self.lengths)

    def __str__(self) -> str:
        count = len(self.lengths)
        mean = sum(self.lengths) / max(count, 1)
        return (
            f"{count} sentences, {mean:.1f} words in the mean; {self.long} "
            f"({100 * self.long / max(count, 1):.1f} %) over {LONG} words, "
            f"{sum(n > LONGEST for n in self.lengths)} over {LONGEST}; "
            f"{self.forbidden} words that stay out; {self.dead} dead links"
        )


def examine(root: Path) -> Findings:
    """Read every page below a folder."""
    found = Findings()
    for page in pages(root, READ):
        name = page.relative_to(root)
        for sentence, in_table in sentences(page.read_text(encoding="utf-8")):
            length = len(words(sentence))
            if not in_table:  # a cell is short anyway, and would flatter the mean
                found.lengths.append(length)
            if length > LONGEST:
                found.faults.append(f"{name}: {length} words: {sentence[:70]}…")
            _forbid(found, name, sentence)
    for page in pages(root, (HELP,)):
        _forbid(found, page.relative_to(root), page.read_text(encoding="utf-8"))
    if found.long > MOST_LONG * len(found.lengths):
        found.faults.append(f"{found.long} sentences have over {LONG} words")
    for page in pages(root, LINKED):
        for link in dead_links(page, root):
            found.dead += 1
            found.faults.append(f"{page.relative_to(root)}: nothing at {link}")
    return found


def pages(root: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(page for pattern in patterns for page in root.glob(pattern))


def _forbid(found: Findings, name: Path, text: str) -> None:
    """Words as they stand, in lower case: AG News is a name."""
    for word in re.findall(rf"\b(?:{FORBIDDEN})\b", text):
        found.forbidden += 1
        found.faults.append(f"{name}: '{word}' stays out")


def prose(text: str) -> str:
    """A page without code, generated parts and comments; a link is its text."""
    for pattern in (_GENERATED, _CODE, _COMMENT):
        text = pattern.sub("\n\n", text)
    text = re.sub(r"`[^`\n]+(?:\n[^`\n]+)?`", "Code", text)
    return _LINK.sub(r"\1", text)


def sentences(text: str) -> Iterator[tuple[str, bool]]:
    """The sentences of a page, and whether each is in a table. A list's item ends one."""
    for paragraph, in_table in _paragraphs(prose(text)):
        for sentence in _END.split(_SHORT.sub(r"\1", paragraph)):
            if len(words(sentence)) > 1:
                yield sentence.strip(), in_table


def _paragraphs(text: str) -> Iterator[tuple[str, bool]]:
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        bare = line.strip()
        if lines and re.match(r"(?:[-*]|\d+\.) |[>|#:]|    |$", bare or line):
            yield " ".join(lines), False
            lines = []
        if bare.startswith("|"):
            yield from ((cell, True) for cell in bare.strip("|").split("|"))
        elif bare and not bare.startswith(("#", ":::")):
            lines.append(re.sub(r"^(?:[-*>]|\d+\.) ", "", bare))


def words(sentence: str) -> list[str]:
    return re.findall(r"[^\W_][\w'.,%×/+-]*", sentence)


def dead_links(page: Path, root: Path) -> Iterator[str]:
    """Links to files and headings that are not there."""
    text = _COMMENT.sub("", _CODE.sub("", page.read_text(encoding="utf-8")))
    text = re.sub(r"`[^`\n]*`", "", text)
    for _, link in _LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page.resolve()
        there = target.exists() and target.is_relative_to(root.resolve())
        if anchor and there:
            there = target.suffix == ".md" and anchor in anchors(target)
        if not there:
            yield link


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found: set[str] = set()
    text = _CODE.sub("", page.read_text(encoding="utf-8"))
    for heading in re.findall(r"^#+ +(.+?) *#*$", text, re.M):
        plain = _LINK.sub(r"\1", heading).lower()
        base = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        name, number = base, 0
        while name in found:
            number += 1
            name = f"{base}-{number}"
        found.add(name)
    return found


def main() -> int:
    root = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent.parent
    found = examine(root)
    for fault in found.faults:
        print(fault, file=sys.stderr)
    print(found)
    return bool(found.faults)


if __name__ == "__main__":
    sys.exit(main())
