"""Negative log-likelihood of given tokens, read through the cache (any length, linear memory)."""

# Legend: N tokens of a document, T tokens of a chunk, V vocabulary
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.generate import Decoder
from model.transformer import DeepSeekV4
from train.errors import TrainingFailedError, UserError


@dataclass(frozen=True)
class Totals:
    """Sums over scored tokens.

    Attributes:
        tokens: scored; the first of a document is not, nothing comes before it.
        nats: their negative log-likelihood.
        num_bytes: of UTF-8 text that they stand for; 0 where it is not known.
    """

    tokens: int
    nats: float
    num_bytes: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """``exp`` of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """NaN where the bytes are not known."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan


@torch.no_grad()
def token_nll(
    model: DeepSeekV4,
    ids_N: Tensor,
    chunk_tokens: int = 512,
    report: Callable[[int], object] = lambda tokens: None,
) -> Tensor:
    """Negative log-likelihood of each token of one document given those before it.

    Args:
        model: in the state it is to be scored in.
        ids_N: token ids.
        chunk_tokens: read at once.
        report: told the tokens of every chunk.

    Returns:
        [N] fp32 on the CPU, nats; NaN for the first token.

    Raises:
        UserError: an id or a position that the model does not have.
        TrainingFailedError: a score is not finite.
    """
    check_document(ids_N, model.config)
    nll_N = torch.full(ids_N.shape, math.nan)
    for begin, nll_T, _ in _scored(model, ids_N, chunk_tokens):
        nll_N[begin : begin + len(nll_T)] = nll_T
        report(len(nll_T))
    return nll_N


@torch.no_grad()
def score_continuation(
    model: DeepSeekV4, ids_N: Tensor, count: int, chunk_tokens: int = 512
) -> tuple[float, bool]:
    """Negative log-likelihood of the end of a text, and whether greedy choice would write it.

    Args:
        model: in the state it is to be scored in.
        ids_N: token ids; the last one is only asked for, so there may be one more than positions.
        count: tokens of the end.
        chunk_tokens: read at once.

    Returns:
        Nats of the ``count`` tokens together; whether each is the likeliest at its place.

    Raises:
        UserError: an id or a position that the model does not have.
        TrainingFailedError: a score is not finite.
    """
    check_document(ids_N[:-1], model.config)
    first, nats, greedy = len(ids_N) - count, 0.0, True
    for begin, nll_T, likeliest_T in _scored(model, ids_N, chunk_tokens):
        past = max(0, first - begin)
        nats += float(nll_T[past:].double().sum())
        greedy &= bool(likeliest_T[past:].all())
    return nats, greedy


def _scored(
    model: DeepSeekV4, ids_N: Tensor, chunk_tokens: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """By chunk: place of its first target, nats [T] of each, whether it is the likeliest [T]."""
    decoder = Decoder(model, 1, max(len(ids_N) - 1, 1))
    ids_N = ids_N.to(decoder.device)
    for begin in range(0, len(ids_N) - 1, chunk_tokens):
        read_T = ids_N[begin : min(begin + chunk_tokens, len(ids_N) - 1)]
        target_T = ids_N[begin + 1 : begin + 1 + len(read_T)]
        logits_TV = decoder.logits(read_T[None])[0]
        nll_T = torch.nn.functional.cross_entropy(logits_TV, target_T, reduction="none")
        if not bool(nll_T.isfinite().all()):
            raise TrainingFailedError(
                f"the scores of tokens {begin + 1} to {begin + len(read_T)} are not all finite"
            )
        yield begin + 1, nll_T.cpu(), (logits_TV.argmax(-1) == target_T).cpu()


def check_document(ids_N: Tensor, config: ModelConfig) -> None:
    """Refuse a document that the model cannot read.

    Raises:
        UserError: it has no such id, or fewer positions.
    """
    wrong = ids_N[(ids_N < 0) | (ids_N >= config.vocab_size)]
    if wrong.numel():
        raise UserError(
            f"token id {int(wrong[0])} is not one of the vocab_size={config.vocab_size} ids from"
            " 0 on"
        )
    if len(ids_N) > config.max_position_embeddings:
        raise UserError(
            f"a document of {len(ids_N)} tokens exceeds the model's"
            f" max_position_embeddings={config.max_position_embeddings}"
        )


def documents(ids_N: Tensor, eos_id: int | None) -> list[tuple[int, int]]:
    """Begin and end of each document; one ends behind every ``eos_id``."""
    if eos_id is None:
        return [(0, len(ids_N))]
    ends = [int(i) + 1 for i in (ids_N == eos_id).nonzero()]
    if not ends or ends[-1] != len(ids_N):
        ends.append(len(ids_N))
    return list(zip([0, *ends[:-1]], ends, strict=True))
