"""Continue prompts with a model, from its compressed cache.

The model may be a run, a checkpoint, a transformers folder or an official folder. One prompt is
streamed; several are continued together and printed when all are done. What the cache takes is told
at the end.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.tokenizer import Tokenizer
from model.decoding_costs import kv_cache_bytes
from model.generate import OnToken, Sampling, generate
from model.transformer import DeepSeekV4
from quant.apply import apply_quant
from quant.cache_rows import released_formats
from quant.config import QuantConfig
from quant.indexer import IndexerCast
from quant.kv import KVCast
from quant.probe import QuantProbe
from scripts.cli.command import command
from scripts.cli.model_options import add_model_options, open_model
from scripts.cli.parser import CommandParser, real, whole
from train.config.load import is_text
from train.errors import TrainingFailedError, UserError, one_line
from train.record.continuation import encode_prompt

EPILOG = """examples:
  scripts/generate.py runs/nano --prompt "The function returns" --temperature 0.7
  scripts/generate.py out/nano --prompt "def f(" --prompt "import " --speculative --cache fp8
  scripts/generate.py models/v4 --ids 12,7,900 --tokens 20
"""


@command()
def main(words: Sequence[str] | None = None) -> None:
    """Generate."""
    write(parse(words))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__, epilog=EPILOG, beyond="--prompt '{}'")
    add_model_options(parser)
    parser.add_argument("--prompt", action="append", default=[], help="a text; may be repeated")
    parser.add_argument("--prompt-file", type=Path, action="append", default=[],
                        help="file that holds a prompt; may be repeated")  # fmt: skip
    parser.add_argument("--ids", action="append", default=[],
                        help="a prompt as token ids with commas; may be repeated")  # fmt: skip
    parser.add_argument(
        "--tokens", type=whole(least=1), default=100, help="new tokens of every text"
    )
    parser.add_argument(
        "--temperature", type=real(least=0), default=0.0, help="0: the likeliest token"
    )
    parser.add_argument(
        "--top-p", type=real(above=0, most=1), default=1.0, help="mass of tokens to draw from"
    )
    parser.add_argument("--seed", type=whole(least=0), default=0, help="of the draws")
    parser.add_argument("--no-stop", action="store_true", help="write on after end of document")
    parser.add_argument("--speculative", action="store_true",
                        help="draft with the MTP block; the text stays the same")  # fmt: skip
    parser.add_argument("--cache", choices=["plain", "fp8"], default="plain",
                        help="plain: compute dtype; fp8: FP8 rows and FP4 indexer keys, as"
                        " released (the model then computes with those casts)")  # fmt: skip
    return parser.read(arguments, _check_draws, _check_prompts)


def _check_draws(options: argparse.Namespace) -> None:
    if options.temperature == 0 and options.top_p != 1 and "temperature" not in options.refused:
        raise UserError(f"--top-p {options.top_p} has no effect with --temperature 0")


def _check_prompts(options: argparse.Namespace) -> None:
    if not (options.prompt or options.prompt_file or options.ids):
        raise UserError("no prompt: give --prompt, --prompt-file or --ids")


def write(options: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        ValueError: the model cannot be read, or the prompts not be continued.
    """
    model, tokenizer = open_model(options)
    prompts = read_prompts(options, tokenizer)
    stop = tokenizer.eos_id if tokenizer is not None and not options.no_stop else None
    sampling = Sampling(
        max_new_tokens=options.tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        stop_id=stop,
        speculative=options.speculative,
        chunk_tokens=options.chunk_tokens,
    )
    formats = None
    if options.cache == "fp8":
        cast_as_stored(model)
        formats = released_formats(model.config)
    stream = Stream(tokenizer, prompts[0])
    on_token: OnToken | None = stream.add if len(prompts) == 1 else None
    try:
        texts = generate(model, prompts, sampling, formats, on_token)
    except FloatingPointError as error:
        raise TrainingFailedError(one_line(error)) from error
    if on_token is not None:
        stream.end()
    else:
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            print(f"[{number}] {shown(prompt + text, tokenizer)}")
    longest = max(len(p) + len(t) for p, t in zip(prompts, texts, strict=True))
    print(cache_report(model, longest, options.cache == "fp8"), file=sys.stderr)


def read_prompts(options: argparse.Namespace, tokenizer: Tokenizer | None) -> list[list[int]]:
    """Ids of all prompts; an empty text begins with an end of document.

    Raises:
        UserError: none is given, one cannot be read, or texts are given without a tokenizer.
    """
    texts = list(options.prompt)
    for text in texts:
        if not is_text(text):
            raise UserError(f"--prompt {text!a} is not UTF-8")
    for file in options.prompt_file:
        if not file.is_file():
            raise UserError(f"--prompt-file {file} is no file")
        try:
            texts.append(file.read_bytes().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt-file {file} is not UTF-8: {error}") from error
        except OSError as error:
            raise UserError(f"--prompt-file {file} cannot be read: {one_line(error)}") from error
    if texts and tokenizer is None:
        raise UserError(f"{options.model} has no tokenizer: give the prompt as --ids")
    prompts = [encode_prompt(tokenizer, text) for text in texts] if tokenizer else []
    for ids in options.ids:
        try:
            prompts.append([int(part) for part in ids.split(",")])
        except ValueError as error:
            raise UserError(f"--ids {ids}: not integers with commas between them") from error
    return prompts


def cast_as_stored(model: DeepSeekV4) -> None:
    """Let KV and indexer run with the casts of the FP8 cache, where they do not yet."""
    kinds = (KVCast, IndexerCast)
    cast = {kind for kind in kinds for module in model.modules() if isinstance(module, kind)}
    has_indexer = any(".indexer." in name for name, _ in model.named_modules())
    quant = QuantConfig(kv=KVCast not in cast, indexer=has_indexer and IndexerCast not in cast)
    if quant.active:
        apply_quant(model, quant, QuantProbe())


def cache_report(model: DeepSeekV4, tokens: int, released: bool) -> str:
    """One line on the bytes of the cache."""
    size = 0 if released else model.compute_dtype.itemsize
    now = kv_cache_bytes(model.config, tokens, size)
    limit = model.config.max_position_embeddings
    full = kv_cache_bytes(model.config, limit, size)
    return (
        f"cache: {now} bytes for {tokens} tokens ({now / tokens:.1f} a token),"
        f" {full / limit:.1f} a token at {limit} tokens"
    )


class Stream:
    """Prints a text as it grows, prompt first; holds back bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: list[int]) -> None:
        self.tokenizer, self.ids = tokenizer, list(prompt)
        self.printed = ""

    def add(self, text: int, token: int) -> None:
        """Print what a new token adds."""
        self.ids.append(token)
        self._show(final=False)

    def end(self) -> None:
        """Print what was held back, and end the line."""
        self._show(final=True)
        print(flush=True)

    def _show(self, final: bool) -> None:
        text = shown(self.ids, self.tokenizer)
        if not final:
            text = text.rstrip("\ufffd")
        if text.startswith(self.printed):
            print(text[len(self.printed) :], end="", flush=True)
            self.printed = text


def shown(ids: list[int], tokenizer: Tokenizer | None) -> str:
    """Text of ids, or the ids where there is no tokenizer."""
    return tokenizer.decode(ids) if tokenizer is not None else ",".join(map(str, ids))


if __name__ == "__main__":
    sys.exit(main())
