"""Random lives of runs: started, killed, damaged, moved, extended; nothing may be lost.

  python -m tests.endurance --lives 500 --out runs/endurance
  python -m tests.endurance --lives 100 --ranks 2 --out runs/endurance
  python -m tests.endurance --seed 17 --out runs/endurance            one life, once more
  python -m tests.endurance --seed 17 --simplify --out runs/endurance the simplest that fails

A life is four starts or more of the training command in one folder; a seed repeats it. What is
done to it, and what must hold: tests/endurance. Lives that are done are not lived again by the
same command, unless the code has changed since. Exit code 1: something broke.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

_ENVIRONMENT = {  # a process is forked well as long as no library gives it a second thread
    "OMP_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "agg",
}
os.environ.update(_ENVIRONMENT)

from scripts.cli.command import command
from tests.endurance import planted, session
from train.errors import ExitCode


@command()
def main(words: list[str] | None = None) -> int:
    """Live; the exit code."""
    options = parse(words)
    faults = [planted.FAULTS[options.plant]] if options.plant else []
    lives = session.Session(options.out, options.ranks, options.plant, faults)
    if options.seed is not None:
        broken = lives.one(options.seed, options.simplify)
    else:
        seeds = range(options.first, options.first + options.lives)
        broken = lives.many(seeds, options.workers, options.stop)
    return ExitCode.failure if broken else ExitCode.finished


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--lives", type=_above_0, default=20, help="how many (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first (%(default)s)")
    parser.add_argument("--ranks", type=int, choices=[1, 2], default=1, help="of most starts")
    parser.add_argument("--workers", type=_above_0, default=1, help="lives at once (%(default)s)")
    parser.add_argument("--stop", action="store_true", help="leave at the first that breaks")
    parser.add_argument(
        "--plant", choices=sorted(planted.FAULTS), default="",
        help="put a mended fault back into the code: lives must find it",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="live this life alone, and keep its folder")
    parser.add_argument(
        "--simplify", action="store_true",
        help="with --seed: drop from it what is not needed to break it",
    )  # fmt: skip
    return parser.parse_args(words)


def _above_0(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} must be above 0")
    return number


if __name__ == "__main__":
    sys.exit(main())
