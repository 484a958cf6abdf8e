"""Import a model folder as a checkpoint that a run can start from (init_from=TARGET).

The source may be a transformers folder, or an official one in plain or quantised tensors, as
released. Tensors stream through, so a model may be larger than memory (twice its fp32 size on disk
is needed); a stopped import goes on when it is started again by the same command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from scripts.cli.command import command
from scripts.cli.model_options import add_weights_option
from scripts.cli.parser import CommandParser
from train.config.schema import Weights
from train.exchange.import_model import import_checkpoint
from train.exchange.open import open_source

EPILOG = """example:
  scripts/import_hf.py downloads/v4 models/v4
  python train/pretrain.py model=NAME init_from=models/v4
"""


@command()
def main(words: Sequence[str] | None = None) -> None:
    """Import."""
    import_folder(parse(words))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__, epilog=EPILOG)
    parser.add_argument("source", type=Path, help="model folder")
    parser.add_argument("target", type=Path, help="folder to write; empty, or a stopped import")
    add_weights_option(parser)
    return parser.parse_args(arguments)


def import_folder(options: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        ValueError: the source cannot be read, or the target not be written.
    """
    source = open_source(options.source, Weights(options.weights))
    with tqdm(desc="importing", unit="B", unit_scale=True, disable=None) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        path = import_checkpoint(source, options.target, report)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
