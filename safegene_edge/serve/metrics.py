"""Counters in Prometheus's text format."""

from __future__ import annotations

from collections import Counter


class Metrics:
    """What happened since the start; touched by the event loop alone."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.finished: Counter[str] = Counter()
        self.prompt_tokens = self.reused_tokens = self.answer_tokens = 0
        self.seconds = 0.0

    def text(self, gauges: dict[str, float]) -> str:
        """The page that Prometheus reads; `gauges` are values of the moment, by name."""
        lines: list[str] = []

        def family(name: str, kind: str, samples: dict[str, float]) -> None:
            lines.append(f"# TYPE safegene_{name} {kind}")
            lines.extend(f"safegene_{name}{labels} {value}" for labels, value in samples.items())

        requests = {
            f'{{path="{path}",status="{status}"}}': float(count)
            for (path, status), count in sorted(self.requests.items())
        }
        finished = {f'{{reason="{r}"}}': float(n) for r, n in sorted(self.finished.items())}
        family("requests_total", "counter", requests)
        family("answers_total", "counter", finished)
        family("prompt_tokens_total", "counter", {"": self.prompt_tokens})
        family("prompt_tokens_reused_total", "counter", {"": self.reused_tokens})
        family("answer_tokens_total", "counter", {"": self.answer_tokens})
        family("answer_seconds_total", "counter", {"": round(self.seconds, 6)})
        for name, value in gauges.items():
            family(name, "gauge", {"": value})
        return "\n".join(lines) + "\n"
