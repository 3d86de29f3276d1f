"""A report: what an evaluation found, and the forms in which it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .gate import Gate, gate
from .html import render_html
from .json import report_json
from .markdown import render_markdown
from .record import record_for
from .results import Evaluation
from .text import render_text


@dataclass(frozen=True)
class Report(Evaluation):
    """What an evaluation found; knows how to show itself."""

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values; only `times` differs between two equal runs."""
        facts = report_json(self)
        if self.opinion is not None:
            facts["second_opinion"] = self.opinion.to_json()
        if self.thresholds.asks:
            facts["gate"] = gate(facts, self.thresholds).to_json()
        return {**facts, "record": record_for(facts)}

    def gate(self) -> Gate:
        """The thresholds that were set, and what became of them."""
        return gate(report_json(self), self.thresholds)

    def to_html(self) -> str:
        """One self-contained HTML page."""
        return render_html(self.to_json())

    def to_markdown(self) -> str:
        """A Markdown document."""
        return render_markdown(self.to_json())

    def table(self) -> str:
        """Plain text: n/N with 95 % intervals, before and after side by side."""
        return render_text(self.to_json())
