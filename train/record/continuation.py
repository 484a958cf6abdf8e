"""Text written by a model, one plain full forward pass per token (no cache)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from data.tokenizer import Tokenizer
from model.config import ModelConfig
from model.transformer import DeepSeekV4
from train.errors import UserError


@torch.no_grad()
def continue_text(
    model: DeepSeekV4,
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int,
    temperature: float,
    seed: int,
    device: torch.device,
    same_everywhere: Callable[[int], int] = int,
) -> str:
    """Continue ``prompt`` until ``num_tokens`` are written or the document ends.

    Args:
        model: trained.
        tokenizer: of the run.
        prompt: beginning; where it has no ids, an end-of-document token starts the text.
        num_tokens: length of the continuation, tokens.
        temperature: 0 takes the likeliest token each time.
        seed: of the draws; the same seed and model write the same text.
        device: where the model computes.
        same_everywhere: gives every rank rank 0's choice: ranks that share a model run in step.

    Returns:
        Prompt and continuation.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = encode_prompt(tokenizer, prompt)
    begin = len(ids)
    for _ in range(num_tokens):
        logits_V = model.logits(torch.tensor([ids], device=device))[0, -1].float().cpu()
        if temperature == 0:
            token = int(logits_V.argmax())
        else:
            weights_V = torch.softmax((logits_V - logits_V.max()) / temperature, dim=-1)
            token = int(torch.multinomial(weights_V, 1, generator=generator))
        token = same_everywhere(token)
        if token == tokenizer.eos_id:
            break
        ids.append(token)
    return prompt + tokenizer.decode(ids[begin:])


def first_words(text: bytes) -> str:
    """A beginning of a text, without the word or character that its end may have cut."""
    whole = text.decode(errors="ignore")
    words = whole.rsplit(maxsplit=1)
    return words[0].rstrip() if len(words) == 2 else whole.rstrip()


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a beginning; where it has none, an end-of-document token starts the text."""
    return tokenizer.encode(text) or [tokenizer.eos_id]


def check_prompt(tokenizer: Tokenizer, text: str, tokens: int, config: ModelConfig) -> None:
    """Refuse, before anything is trained, a text that the model has no positions for.

    Args:
        tokenizer: of the run.
        text: the beginning.
        tokens: that are to be written; 0: there is no text.
        config: of the model.

    Raises:
        UserError: names the key and both values.
    """
    limit, length = config.max_position_embeddings, len(encode_prompt(tokenizer, text))
    if tokens and length + tokens > limit:
        raise UserError(
            f"sample.tokens={tokens} and a sample.prompt of {length} tokens exceed"
            f" model.max_position_embeddings={limit}"
        )
