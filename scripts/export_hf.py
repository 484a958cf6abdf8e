"""Export a model: a transformers folder, or the official layout in plain or quantised tensors.

The source may be a run, one of its checkpoints, or a folder in any of these layouts. Tensors stream
through, shard by shard, so a model may be larger than memory; a stopped export goes on when it is
started again by the same command.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from quant.export import Stored
from scripts.cli.command import command
from scripts.cli.model_options import add_weights_option
from scripts.cli.parser import CommandParser, real
from train.config.schema import Weights
from train.errors import UserError
from train.exchange.export import ExportFormat, ExportJob, FloatType, export_folder
from train.exchange.model_card import UNKNOWN_LICENCE
from train.exchange.open import open_source

EPILOG = """examples:
  scripts/export_hf.py runs/nano out/nano
  scripts/export_hf.py runs/nano out/nano-official --to official
  scripts/export_hf.py runs/nano/checkpoints/step_00001000 out/nano-fp4 --to quantised
"""


@command()
def main(words: Sequence[str] | None = None) -> None:
    """Export."""
    export(parse(words))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__, epilog=EPILOG)
    parser.add_argument("source", type=Path, help="run folder, checkpoint, or model folder")
    parser.add_argument("target", type=Path, help="folder to write; empty, or a stopped export")
    layouts, dtypes = (
        [layout.value for layout in ExportFormat],
        [dtype.value for dtype in FloatType],
    )
    parser.add_argument("--to", choices=layouts, default="transformers",
                        help="layout (default: %(default)s)")  # fmt: skip
    parser.add_argument("--dtype", choices=dtypes,
                        help="of a plain layout (default: bf16); mHC, sinks and biases stay"
                        " fp32")  # fmt: skip
    parser.add_argument("--experts", choices=["fp4", "fp8"],
                        help="of the quantised layout (default: fp4)")  # fmt: skip
    parser.add_argument("--shard-gb", type=real(above=0), default=4.0, help="largest shard, GiB")
    parser.add_argument("--no-tokenizer", action="store_true", help="write tensors and config only")
    parser.add_argument("--license", default=UNKNOWN_LICENCE, metavar="ID",
                        help="identifier for the model card, as model hubs have it")  # fmt: skip
    add_weights_option(parser)
    return parser.read(arguments, _check_licence, _check_layout, _check_folders)


def _check_licence(options: argparse.Namespace) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", options.license):
        raise UserError(f"--license {options.license!r} must be one word, such as mit")


def _check_layout(options: argparse.Namespace) -> None:
    layout = ExportFormat(options.to)
    idle = "dtype" if layout is ExportFormat.quantised else "experts"
    if (given := getattr(options, idle)) is not None and "to" not in options.refused:
        raise UserError(f"--{idle} {given} has no effect with --to {layout.value}")


def _check_folders(options: argparse.Namespace) -> None:
    if options.source.resolve() == options.target.resolve():
        raise UserError(f"source and target are the same folder, {options.source}")


def export(options: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        ValueError: the source cannot be read, or the target not be written.
    """
    job = ExportJob(
        layout=ExportFormat(options.to),
        dtype=FloatType(options.dtype or "bf16"),
        experts=Stored(options.experts or "fp4"),
        shard_bytes=int(options.shard_gb * 2**30),
        tokenizer=not options.no_tokenizer,
        licence=options.license,
    )
    source = open_source(options.source, Weights(options.weights))
    with tqdm(desc="exporting", unit="B", unit_scale=True, disable=None) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        export_folder(source, options.target, job, report)
    print(f"wrote {options.target} ({job.layout.value})")


if __name__ == "__main__":
    sys.exit(main())
