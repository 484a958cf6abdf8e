"""Reads documents with a model and scores their tokens, whatever library the model is of."""

# Legend: N tokens of a document, P of them that are scored, T tokens of a chunk, V vocabulary
from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.generate import Decoder
from model.transformer import DeepSeekV4


class TokenScores(NamedTuple):
    """Of every scored token its negative log-likelihood in nats, and whether it was the likeliest.

    Attributes:
        nll_P: fp32.
        hit_P: bool.
    """

    nll_P: Tensor
    hit_P: Tensor


class Reader(Protocol):
    """A model that reads."""

    max_tokens: int

    def score(self, ids_N: np.ndarray, begin: int) -> TokenScores:
        """Score tokens ``begin .. N - 1``, each given all before it; ``begin`` is 1 or more."""
        ...


class CacheReader:
    """Our model, which reads through its compressed cache: any length, linear memory.

    Args:
        model: in the state it is to be probed in.
        chunk_tokens: read at once.
    """

    def __init__(self, model: DeepSeekV4, chunk_tokens: int = 512) -> None:
        self._model, self._chunk = model, chunk_tokens
        self.max_tokens = model.config.max_position_embeddings

    @torch.no_grad()
    def score(self, ids_N: np.ndarray, begin: int) -> TokenScores:
        """See :class:`Reader`."""
        decoder = Decoder(self._model, 1, len(ids_N))
        ids = torch.from_numpy(ids_N).to(decoder.device)
        found: list[TokenScores] = []
        for start in range(0, len(ids) - 1, self._chunk):
            stop = min(start + self._chunk, len(ids) - 1)
            counts = [stop - start]
            x_BTSD = decoder.read(ids[None, start:stop], counts)
            decoder.commit(counts)
            if stop < begin:
                continue
            first = max(start, begin - 1)  # the token that predicts the first scored one
            logits_TV = decoder.project(x_BTSD[:, first - start :])[0]
            found.append(_scored(logits_TV, ids[first + 1 : stop + 1]))
        return TokenScores(*(torch.cat(parts) for parts in zip(*found, strict=True)))


class TransformersReader:
    """A causal model of the library ``transformers``: one forward pass over the document.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.max_tokens = int(getattr(model.config, "max_position_embeddings", 1 << 30))

    @torch.no_grad()
    def score(self, ids_N: np.ndarray, begin: int) -> TokenScores:
        """See :class:`Reader`."""
        ids = torch.from_numpy(ids_N).to(self._model.device)
        logits_NV = self._model(input_ids=ids[None]).logits[0].float()
        return _scored(logits_NV[begin - 1 : -1], ids[begin:])


def _scored(logits_TV: Tensor, target_T: Tensor) -> TokenScores:
    nll_T = F.cross_entropy(logits_TV.float(), target_T, reduction="none")
    return TokenScores(nll_T.cpu(), (logits_TV.argmax(-1) == target_T).cpu())
