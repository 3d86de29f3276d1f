"""How long `safegene-edge --help` takes, beside an empty Python: medians of ten, in turn."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import table, write

COMMANDS = {
    "safegene-edge --help": [sys.executable, "-m", "safegene_edge", "--help"],
    "python -c pass": [sys.executable, "-c", "pass"],
}


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(10):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(round(time.perf_counter() - start, 4))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    text = "# Start-up\n\n" + table(
        ["command", "median s", "max s"],
        [[name, f"{medians[name]:.3f}", max(seconds[name])] for name in COMMANDS],
    )
    write(Path(__file__).parent, {"seconds": seconds, "median": medians}, text)


if __name__ == "__main__":
    main()
