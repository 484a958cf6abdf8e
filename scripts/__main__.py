"""Every command: ``v4 COMMAND ...`` once installed, or ``python scripts COMMAND ...``.

    v4                                     the list
    v4 pretrain model=v4_tiny              the same as python train/pretrain.py model=v4_tiny
    v4 score runs/v4_nano book.txt         the same as python scripts/score.py ...
    v4 COMMAND --help                      what a command takes

Several ranks need a launcher: ``torchrun train/pretrain.py ...``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from parallel.launch import forget_absent_backend
from scripts.cli.group import run_command, show_list

MOVED = {  # old script -> how it is called now
    "prepare_data": "prepare",
    "bench_step": "bench step",
    "bench_optim": "bench optim",
    "bench_quant": "bench quant",
    "bench_checkpoint": "bench checkpoint",
    "bench_recovery": "bench recovery",
    "efficiency": "bench efficiency",
    "step_parts": "bench step_parts",
    "fake_ranks": "bench fake_ranks",
    "pipeline_timeline": "bench timeline",
}
MEANT = {  # a word that people type -> the command that does it
    "train": "pretrain",
    "finetune": "pretrain",
    "sweep": "pretrain -m",
    "resume": "pretrain",
    "compare": "report",
    "plot": "report",
    "evaluate": "eval",
    "sample": "generate",
    "export": "export_hf",
    "import": "import_hf",
}
COMMANDS = {
    "pretrain": "train.pretrain:command",
    "plan": "scripts.plan",
    "prepare": "scripts.prepare",
    "score": "scripts.score",
    "probe": "scripts.probe",
    "generate": "scripts.generate",
    "eval": "scripts.eval",
    "export_hf": "scripts.export_hf",
    "import_hf": "scripts.import_hf",
    "import_deepspeed": "scripts.import_deepspeed",
    "checkpoints": "scripts.checkpoints",
    "samples": "scripts.samples",
    "report": "scripts.report",
    "watch": "scripts.watch",
    "study": "scripts.study",
    "layouts": "scripts.layouts",
    "twins": "scripts.twins",
    "bench": "scripts.bench",
}


def main(words: Sequence[str] | None = None) -> int:
    """Run the command that the first word names.

    Args:
        words: the command line; None: of this process.

    Returns:
        Its exit code; 2: there is no such command.
    """
    forget_absent_backend()
    name, *rest = list(sys.argv[1:] if words is None else words) or ["--help"]
    if name in ("-h", "--help"):
        return show_list(__doc__, "commands", COMMANDS)
    return run_command("v4", COMMANDS, MOVED, name, rest, MEANT)


if __name__ == "__main__":
    sys.exit(main())
