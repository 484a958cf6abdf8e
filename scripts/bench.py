"""Benchmarks, each beside its peers and its limit, in one run: ``bench.py NAME ...``.

    python scripts/bench.py step --cases 8x512 16x256 --dtypes bf16
    python scripts/bench.py checkpoint --model v4_tiny
    python scripts/bench.py NAME --help

Measure alone on a machine: what else runs there is in every figure.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.cli.group import run_command, show_list

BENCHMARKS = {
    "step": "scripts.benchmarks.step",
    "optim": "scripts.benchmarks.optim",
    "quant": "scripts.benchmarks.quant",
    "checkpoint": "scripts.benchmarks.checkpoint",
    "recovery": "scripts.benchmarks.recovery",
    "efficiency": "scripts.benchmarks.efficiency",
    "launches": "scripts.benchmarks.launches",
    "gpu": "scripts.gpu.gpu",
    "roofline": "scripts.gpu.roofline",
    "triton_aot": "scripts.benchmarks.triton_aot",
    "context": "scripts.benchmarks.context",
    "scoring": "scripts.layout_trials.scoring",
    "recall": "scripts.benchmarks.recall",
    "step_parts": "scripts.layout_trials.step_parts",
    "timeline": "scripts.layout_trials.timeline",
    "fake_ranks": "scripts.layout_trials.fake_ranks",
    "fake_step": "scripts.layout_trials.fake_step",
}


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark that the first word names.

    Args:
        words: the command line; None: of this process.
    """
    name, *rest = list(sys.argv[1:] if words is None else words) or ["--help"]
    if name in ("-h", "--help"):
        return show_list(__doc__, "benchmarks", BENCHMARKS)
    return run_command("bench", BENCHMARKS, {}, name, rest)


if __name__ == "__main__":
    sys.exit(main())
