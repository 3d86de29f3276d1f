"""What the family's aligned model says to the shipped examples, written into its gene.

    python bench/recovery/aligned.py qwen

Genes that `extract` made before it measured this lack it. KL(degraded ‖ aligned) is taken of the
fine-tune on Dolly: Qwen's degraded models were not kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from finetunes import family, tune
from targets import Builder

from safegene_edge import SafetyGene
from safegene_edge.recalibrate.aligned import measured


def main() -> None:
    made = family(sys.argv[1])
    build = Builder(made, lambda: [])
    degraded = build.build("dolly", build.task(tune(made, "dolly")))
    gene = measured(SafetyGene.load(made.gene), [build.build("aligned", {})], [[degraded]])
    gene.save(made.gene)
    print(f"refuses {1 - gene.aligned_loss:.3f}, over-refuses {gene.aligned_over_refusal:.3f}, "
          f"KL {gene.aligned_kl:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
