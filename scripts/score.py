"""Negative log-likelihood of every token of a text, perplexity and bits per byte.

The model may be a run, a checkpoint, a transformers folder or an official folder. A text file is
one document. A token file (.npy, or .npz with an array "ids") is one document too, unless --eos-id
ends several; each is scored on its own, without what came before it. Nothing predicts the first
token of a document: its entry is NaN.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import math
import tokenize
import zipfile
import zlib

import numpy as np
import torch
from tqdm import tqdm

from data.tokenizer import Tokenizer
from scripts.cli.command import command
from scripts.cli.model_options import add_model_options, open_model
from scripts.cli.parser import CommandParser, whole
from train.errors import UserError, one_line
from train.exchange.output_files import make_folder, replacing
from train.exchange.score import Totals, check_document, documents, token_nll

EPILOG = """the NPZ holds
  ids        int64 [N]    token ids
  nll        float32 [N]  nats; NaN for the first token of a document
  byte_ends  int64 [N]    bytes of the text up to each token's end (text files only)

examples:
  scripts/score.py runs/nano book.txt --out book.npz
  scripts/score.py out/nano-official tokens.npy --eos-id 0
"""


@command()
def main(words: Sequence[str] | None = None) -> None:
    """Score."""
    score(parse(words))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__, epilog=EPILOG)
    add_model_options(parser)
    parser.add_argument("file", type=Path, help="text, .npy or .npz")
    parser.add_argument("--out", type=Path, help="NPZ to write")
    parser.add_argument("--eos-id", type=whole(least=0), help="ends a document in a token file")
    return parser.read(arguments, _check_file, _check_out)


def _check_file(options: argparse.Namespace) -> None:
    if not options.file.is_file():
        raise UserError(f"{options.file} is no file")


def _check_out(options: argparse.Namespace) -> None:
    if options.out is not None:
        check_out(options.out, options.file)


def score(options: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        ValueError: model or file cannot be read, or do not fit together.
    """
    model, tokenizer = open_model(options)
    ids_N, byte_ends_N = read_ids(options.file, tokenizer)
    check_eos(options.eos_id, byte_ends_N is None, model.config.vocab_size)
    spans = documents(ids_N, options.eos_id)
    for begin, end in spans:
        check_document(ids_N[begin:end], model.config)
    if all(end - begin < 2 for begin, end in spans):
        raise UserError(
            f"{options.file} has {len(ids_N)} tokens: of each document the first is not scored, so"
            " nothing is left"
        )
    parts = []
    with tqdm(total=len(ids_N), desc="scoring", unit="tok", disable=None) as bar:
        for begin, end in spans:
            part = token_nll(model, ids_N[begin:end], options.chunk_tokens, bar.update)
            parts.append(part)
    nll_N = torch.cat(parts).numpy()
    if options.out is not None:
        arrays: dict[str, Any] = {"ids": ids_N.numpy(), "nll": nll_N}
        if byte_ends_N is not None:
            arrays["byte_ends"] = byte_ends_N
        with replacing(options.out) as aside, aside.open("wb") as file:
            np.savez(file, **arrays)
    told = {"weights": options.weights, **summary(nll_N, byte_ends_N)}
    print(json.dumps(told, allow_nan=False))


def check_out(out: Path, source: Path) -> None:
    """Refuse an output that is not a new file or an earlier score; make the folder it is for.

    Raises:
        UserError: names it.
    """
    make_folder(out.absolute().parent)
    if not out.exists():
        return
    if not out.is_file():
        raise UserError(f"--out {out} is no file")
    if out.samefile(source):
        raise UserError(f"--out {out} is the file that is scored")
    try:
        with zipfile.ZipFile(out) as archive:
            ours = {"ids.npy", "nll.npy"} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        ours = False
    if not ours:
        raise UserError(f"--out {out} holds something else than an earlier score: name a new file")


def check_eos(eos_id: int | None, of_tokens: bool, vocab_size: int) -> None:
    """Refuse an ``--eos-id`` that ends nothing.

    Raises:
        UserError: it is given for a text, or is no id of the model.
    """
    if eos_id is None:
        return
    if not of_tokens:
        raise UserError(f"--eos-id {eos_id} is for token files: a text is one document")
    if not 0 <= eos_id < vocab_size:
        raise UserError(f"--eos-id {eos_id} is not one of the vocab_size={vocab_size} ids from 0")


def summary(nll_N: np.ndarray, byte_ends_N: np.ndarray | None) -> dict[str, float | int | None]:
    """Tokens scored, nats a token, perplexity, bits per byte (null where bytes are not known)."""
    scored_N = ~np.isnan(nll_N)
    num_bytes = 0
    if byte_ends_N is not None:
        num_bytes = int(np.diff(byte_ends_N, prepend=0)[scored_N].sum())
    nats = float(nll_N[scored_N].astype(np.float64).sum())
    totals = Totals(int(scored_N.sum()), nats, num_bytes)
    values = {
        "tokens": totals.tokens,
        "bytes": num_bytes or None,
        "nats_per_token": totals.loss,
        "perplexity": totals.perplexity,
        "bits_per_byte": totals.bits_per_byte,
    }
    return {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}


# What numpy raises for a file that is no array, or not all of one.
_NO_ARRAY = (
    ValueError, OSError, KeyError, IndexError, EOFError, MemoryError, OverflowError, SyntaxError,
    TypeError, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read_ids(file: Path, tokenizer: Tokenizer | None) -> tuple[torch.Tensor, np.ndarray | None]:
    """Token ids of a file, and for a text where each token ends in its bytes.

    Raises:
        UserError: it cannot be read, or is a text and the model has no tokenizer.
    """
    if file.suffix in (".npy", ".npz"):
        try:
            with file.open("rb") as opened:  # by numpy it would stay open where it is damaged
                loaded = np.load(opened, allow_pickle=False)
                array = loaded["ids"] if file.suffix == ".npz" else loaded
        except _NO_ARRAY as error:
            raise UserError(f"{file} cannot be read as token ids: {one_line(error)}") from error
        if not isinstance(array, np.ndarray):
            raise UserError(f"{file} holds several arrays: name it .npz")
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise UserError(
                f"{file} holds {array.dtype} of shape {array.shape}, wanted are integers in a row"
            )
        return torch.from_numpy(array.astype(np.int64)), None
    if tokenizer is None:
        raise UserError(f"{file} is a text, but the model has no tokenizer: give a .npy of ids")
    try:
        text = file.read_bytes().decode("utf-8-sig")  # a mark at the beginning is no text
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error}") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error
    ids, byte_ends = tokenizer.encode_with_byte_ends(text)
    return torch.from_numpy(ids.astype(np.int64)), byte_ends


if __name__ == "__main__":
    sys.exit(main())
