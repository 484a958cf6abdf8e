"""What the scripts that run a model have in common: options and loading."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from data.tokenizer import Tokenizer
from model.transformer import DeepSeekV4
from quant.config import Recipe
from scripts.cli.parser import whole
from train.config.schema import Weights
from train.errors import UserError
from train.exchange.model_source import ModelSource
from train.exchange.open import fill_model, open_source


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The model, and how it computes."""
    parser.add_argument(
        "model", type=Path, help="run folder, checkpoint, transformers folder or official folder"
    )
    parser.add_argument(
        "--quant", choices=[r.value for r in Recipe],
        help="casts of the forward pass (default: those that it was trained with, as far as the"
        " folder says)",
    )  # fmt: skip
    add_weights_option(parser)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of matmuls")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add_chunk_option(parser)


def add_chunk_option(parser: argparse.ArgumentParser) -> None:
    """How much of a text is computed at once."""
    parser.add_argument(
        "--chunk-tokens", type=whole(least=1), default=512, help="of text read at once"
    )


def add_weights_option(parser: argparse.ArgumentParser) -> None:
    """Which weights of a run."""
    parser.add_argument(
        "--weights", choices=[w.value for w in Weights], default=Weights.model.value,
        help="of a run: those that it trained, or their average (train.ema_decay)",
    )  # fmt: skip


def open_model(options: argparse.Namespace) -> tuple[DeepSeekV4, Tokenizer | None]:
    """The model that the options name, ready to compute.

    Raises:
        ValueError: it cannot be read, or there is no such device.
    """
    model, tokenizer, _ = open_model_source(options)
    return model, tokenizer


def open_model_source(
    options: argparse.Namespace,
) -> tuple[DeepSeekV4, Tokenizer | None, ModelSource]:
    """The same, with the place that it comes from."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device")
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    recipe = Recipe(options.quant) if options.quant else None
    source = open_source(options.model, Weights(options.weights))
    model = fill_model(source, "cuda" if on_gpu else "cpu", recipe)
    tokenizer = source.tokenizer()
    if options.precision == "bf16":
        model.compute_dtype = torch.bfloat16
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{options.model}: its tokenizer has {tokenizer.vocab_size} ids, its model"
            f" vocab_size={model.config.vocab_size}"
        )
    return model, tokenizer, source
