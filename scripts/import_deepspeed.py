"""Import a checkpoint of DeepSpeed's own (ZeRO 1 to 3) as one that a run can start from.

The folder is what ``engine.save_checkpoint`` was given. Names may be ours, official or those of
transformers; what is missing, unknown or of another shape is refused by name. Weights and expert
tables come over, the optimizer starts fresh. DeepSpeed's files are pickles: import only what you
trust.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.cli.command import command
from scripts.cli.parser import CommandParser
from train.errors import UserError
from train.exchange.deepspeed_folder import write_folder
from train.exchange.import_model import import_checkpoint
from train.exchange.open import open_source

EPILOG = """example:
  v4 import_deepspeed theirs/checkpoints theirs/config.json models/theirs
  v4 pretrain model=NAME init_from=models/theirs
"""


@command()
def main(words: Sequence[str] | None = None) -> None:
    """Import."""
    options = parse(words)
    print(f"wrote {import_deepspeed(options.source, options.config, options.target)}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__, epilog=EPILOG)
    parser.add_argument("source", type=Path, help="folder that save_checkpoint was given")
    parser.add_argument("config", type=Path, help="the model's config.json")
    parser.add_argument("target", type=Path, help="folder to write; empty")
    return parser.parse_args(arguments)


def import_deepspeed(source: Path, config: Path, target: Path) -> Path:
    """Write the checkpoint.

    Raises:
        UserError: the source cannot be read, or the target not be written.
    """
    if not config.is_file():
        raise UserError(f"{config} does not exist")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".importing_") as folder:
        write_folder(source, config, Path(folder))
        return import_checkpoint(open_source(Path(folder)), target)


if __name__ == "__main__":
    sys.exit(main())
