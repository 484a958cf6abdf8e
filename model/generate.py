"""Sampling from the compressed cache (``model/cache.py``), with MTP drafts as an option.

Prompts of any lengths are read in chunks, then texts grow token by token, all in one batch. Every
draw is keyed by (seed, text, position), so a text depends neither on its neighbours nor on whether
drafts were used. A draft of the first MTP block is checked by the same pass that reads the token
before it: where the model itself draws the draft, that pass has already read it (reference B.11;
released models have one MTP block). Further MTP blocks are not used.
"""

# Legend: B texts, T tokens of a pass, S streams, D hidden, V vocabulary
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.core import WindowAttention
from model.block import Block
from model.cache import CacheFormats, KVCache, PlainRows
from model.config import ModelConfig
from model.errors import ConfigError
from model.init import stream_seed
from model.mtp import MTPBlock
from model.transformer import DeepSeekV4

OnToken = Callable[[int, int], bool | None]


@dataclass(frozen=True)
class Sampling:
    """How texts are continued.

    Attributes:
        max_new_tokens: of every text.
        temperature: 0 takes the likeliest token.
        top_p: draw from the likeliest tokens that hold this probability together.
        seed: of the draws.
        stop_id: ends a text; it is not part of it.
        speculative: let the MTP block draft.
        chunk_tokens: of a prompt read at once.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_id: int | None = None
    speculative: bool = False
    chunk_tokens: int = 512

    def validate(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: names the value.
        """
        if self.max_new_tokens < 1 or self.chunk_tokens < 1:
            raise ConfigError(
                f"max_new_tokens={self.max_new_tokens} and chunk_tokens={self.chunk_tokens} must"
                " be above 0"
            )
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature={self.temperature} must be 0 or more and top_p={self.top_p} in (0, 1]"
            )


class Decoder:
    """A model with the caches of a batch of texts.

    Args:
        model: in the state it is to be sampled in.
        batch: texts.
        max_tokens: longest text, tokens.
        formats: of the cached rows; None: the compute dtype.
        drafts: keep a cache of the first MTP block too.

    Attributes:
        cache: of the main layers.
        draft_cache: of the MTP block, or None.

    Raises:
        ValueError: drafts of a model without MTP.
    """

    def __init__(
        self,
        model: DeepSeekV4,
        batch: int,
        max_tokens: int,
        formats: CacheFormats | None = None,
        drafts: bool = False,
    ) -> None:
        if drafts and not model.mtp:
            raise ConfigError(
                "speculative decoding drafts with the MTP block, but"
                f" num_nextn_predict_layers={len(model.mtp)}"
            )
        plain = PlainRows(model.compute_dtype)
        formats = formats or CacheFormats(plain, plain)
        self.model, self.device = model, model.embed.weight.device

        def cache(blocks: list[Block]) -> KVCache:
            layers: dict[str, WindowAttention] = {}
            for attention in (block.attn for block in blocks):
                if not isinstance(attention, WindowAttention):
                    raise ConfigError(
                        f"{attention.name}: layer kind {attention.kind.value} has no cache, so the"
                        " model cannot generate"
                    )
                layers[attention.name] = attention
            return KVCache(
                model.config, layers, batch, max_tokens, formats, self.device, model.yarn
            )

        self.cache = cache([b for b in model.layers.values() if isinstance(b, Block)])
        first = next(iter(model.mtp.values())) if drafts else None
        self._mtp = first if isinstance(first, MTPBlock) else None
        self.draft_cache = cache([self._mtp]) if self._mtp is not None else None

    def read(self, ids_BT: Tensor, counts: list[int]) -> Tensor:
        """Streams [B, T, S, D] of new tokens; :meth:`commit` says how many of them stay.

        Args:
            ids_BT: next tokens of each text, anything where there is none.
            counts: how many of them are real.
        """
        context = self.cache.begin(counts, ids_BT.shape[1])
        x_BTSD, _ = self.model.trunk(self.model.streams(ids_BT), ids_BT, context)
        return x_BTSD

    def commit(self, counts: list[int]) -> None:
        """Keep the first ``counts`` tokens of each row that was read."""
        self.cache.commit(counts)

    def logits(self, ids_BT: Tensor, counts: list[int] | None = None) -> Tensor:
        """Read and keep tokens; their next-token logits [B, T, V] in fp32."""
        counts = [ids_BT.shape[1]] * ids_BT.shape[0] if counts is None else counts
        x_BTSD = self.read(ids_BT, counts)
        self.commit(counts)
        return self.project(x_BTSD)

    def project(self, x_BTSD: Tensor) -> Tensor:
        """Logits of streams."""
        return self.model.project(self.model.collapse(x_BTSD))

    def draft(self, x_BTSD: Tensor, next_ids_BT: Tensor, counts: list[int]) -> Tensor:
        """Logits [B, T, V] of the token two places ahead, from committed streams.

        Args:
            x_BTSD: streams of the main model, in order of position, none left out.
            next_ids_BT: the token after each.
            counts: how many of each row are real.
        """
        assert self._mtp is not None
        assert self.draft_cache is not None
        context = self.draft_cache.begin(counts, next_ids_BT.shape[1])
        next_BTD = self.model.embed_tokens(next_ids_BT)
        _, h_BTD, _ = self._mtp.predict(x_BTSD, next_BTD, next_ids_BT, context)
        self.draft_cache.commit(counts)
        return self.model.project(h_BTD)


def choose(logits_V: Tensor, sampling: Sampling, text: int, position: int) -> int:
    """The token that stands at ``position`` of a text.

    Args:
        logits_V: fp32, on the CPU.
        sampling: temperature, top-p and seed.
        text: number of the text.
        position: counted from the start of its prompt.

    Raises:
        FloatingPointError: the logits are not finite.
    """
    if not bool(logits_V.isfinite().all()):
        raise FloatingPointError(f"the logits at position {position} of text {text} are not finite")
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # From the likeliest on: a temperature near 0 leaves that one, and no infinity.
    below_V = logits_V.double() - logits_V.max()
    p_V = (below_V / sampling.temperature).softmax(dim=-1)
    p_V, token_V = p_V.sort(descending=True, stable=True)
    total_V = p_V.cumsum(dim=-1)
    kept = int((total_V - p_V < sampling.top_p).sum())
    draw = stream_seed(sampling.seed, f"text {text}", position) / 2**63 * float(total_V[kept - 1])
    place = int(torch.searchsorted(total_V[:kept], draw, right=True))
    return int(token_V[min(place, kept - 1)])


@torch.no_grad()
def generate(
    model: DeepSeekV4,
    prompts: list[list[int]],
    sampling: Sampling,
    formats: CacheFormats | None = None,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Continue every prompt.

    Args:
        model: in the state it is to be sampled in.
        prompts: token ids, at least one each.
        sampling: how.
        formats: of the cached rows; None: the compute dtype.
        on_token: told each token as it is drawn: (text, id); True ends the text with it.

    Returns:
        The new tokens of each text.

    Raises:
        ConfigError: no prompt, an empty one, an id or a position that the model does not have, or
            values of ``sampling`` that cannot be.
    """
    sampling.validate()
    longest = _longest(prompts, sampling, model.config)
    decoder = Decoder(model, len(prompts), longest, formats, sampling.speculative)
    return _Generation(decoder, prompts, sampling, on_token).run()


def _longest(prompts: list[list[int]], sampling: Sampling, config: ModelConfig) -> int:
    """Tokens of the longest text that may come out; refuses prompts that cannot be."""
    if not prompts:
        raise ConfigError("no prompt is given")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(
                f"prompt {number} has no tokens; begin it with the end-of-document id"
            )
        wrong = [i for i in prompt if not 0 <= i < config.vocab_size]
        if wrong:
            raise ConfigError(
                f"prompt {number}: id {wrong[0]} is not one of the vocab_size={config.vocab_size}"
                " ids from 0 on"
            )
    longest, new = max(map(len, prompts)), sampling.max_new_tokens
    if longest + new > config.max_position_embeddings:
        raise ConfigError(
            f"a prompt of {longest} tokens and max_new_tokens={new} exceed the model's"
            f" max_position_embeddings={config.max_position_embeddings}"
        )
    return longest + new


class _Generation:
    """One call of :func:`generate`."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: list[list[int]],
        sampling: Sampling,
        on_token: OnToken | None,
    ) -> None:
        self.decoder, self.prompts, self.sampling = decoder, prompts, sampling
        self.on_token = on_token
        self.texts: list[list[int]] = [[] for _ in prompts]
        self.done = [False] * len(prompts)

    def run(self) -> list[list[int]]:
        logits_BV, x_B1SD = self._read_prompts()
        for text, logits_V in enumerate(logits_BV):
            self._add(text, logits_V)
        guesses = self._guess(x_B1SD, [not done for done in self.done], 1)
        while not all(self.done):
            guesses = self._round(guesses)
        return self.texts

    def _read_prompts(self) -> tuple[Tensor, Tensor]:
        """Read all prompts; logits [B, V] and streams [B, 1, S, D] of their last tokens."""
        decoder, size = self.decoder, self.sampling.chunk_tokens
        ids = [torch.tensor(prompt, device=decoder.device) for prompt in self.prompts]
        padded_BT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        after_BT = torch.nn.functional.pad(padded_BT[:, 1:], (0, 1))
        last: list[Tensor] = [padded_BT.new_empty(0)] * len(ids)
        for begin in range(0, padded_BT.shape[1], size):
            chunk = slice(begin, begin + size)
            width = padded_BT[:, chunk].shape[1]
            counts = [min(max(len(prompt) - begin, 0), width) for prompt in self.prompts]
            x_BTSD = decoder.read(padded_BT[:, chunk], counts)
            decoder.commit(counts)
            for text, prompt in enumerate(self.prompts):
                if begin < len(prompt) <= begin + size:
                    last[text] = x_BTSD[text, len(prompt) - 1 - begin]
            if decoder.draft_cache is not None:
                # The last token of a prompt has no successor yet.
                known = [min(max(len(prompt) - 1 - begin, 0), width) for prompt in self.prompts]
                decoder.draft(x_BTSD, after_BT[:, chunk], known)
        x_B1SD = torch.stack(last)[:, None]
        return decoder.project(x_B1SD)[:, 0].cpu(), x_B1SD

    def _round(self, guesses: list[int]) -> list[int]:
        """One pass: every text grows by a token, or by two where its guess was right."""
        decoder, drafting = self.decoder, self.decoder.draft_cache is not None
        active = [not done for done in self.done]
        new = [text[-1] if text else 0 for text in self.texts]
        columns = [new, guesses] if drafting else [new]
        ids_BT = torch.tensor(columns, device=decoder.device).T
        room = [self.sampling.max_new_tokens - len(text) for text in self.texts]
        counts = [min(len(columns), r) * a for r, a in zip(room, active, strict=True)]
        x_BTSD = decoder.read(ids_BT, counts)
        logits_BTV = decoder.project(x_BTSD).cpu()
        kept = [0] * len(new)
        for text in range(len(new)):
            if active[text]:
                self._add(text, logits_BTV[text, 0])
                kept[text] = 1
                if counts[text] > 1 and not self.done[text] and self._last(text) == guesses[text]:
                    self._add(text, logits_BTV[text, 1])
                    kept[text] = 2
        decoder.commit(kept)
        return self._guess(x_BTSD, active, max(kept), kept) if drafting else guesses

    def _guess(
        self, x_BTSD: Tensor, active: list[bool], width: int, kept: list[int] | None = None
    ) -> list[int]:
        """Let the MTP block read the last ``kept`` tokens (1 each) and guess one ahead."""
        decoder = self.decoder
        guesses = [0] * len(active)
        if decoder.draft_cache is None or all(self.done):
            return guesses
        counts = [int(a) for a in active] if kept is None else kept
        counts = [0 if done else c for c, done in zip(counts, self.done, strict=True)]
        after = [
            (text[len(text) - c :] if c else []) + [0] * (width - c)
            for text, c in zip(self.texts, counts, strict=True)
        ]
        ids_BT = torch.tensor(after, device=decoder.device)
        logits_BTV = decoder.draft(x_BTSD[:, :width], ids_BT, counts).cpu()
        for text, count in enumerate(counts):
            if count:
                position = len(self.prompts[text]) + len(self.texts[text])
                logits_V = logits_BTV[text, count - 1]
                guesses[text] = choose(logits_V, self.sampling, text, position)
        return guesses

    def _add(self, text: int, logits_V: Tensor) -> None:
        position = len(self.prompts[text]) + len(self.texts[text])
        token = choose(logits_V, self.sampling, text, position)
        if token == self.sampling.stop_id:
            self.done[text] = True
            return
        self.texts[text].append(token)
        ended = self.on_token is not None and self.on_token(text, token) is True
        self.done[text] = ended or len(self.texts[text]) == self.sampling.max_new_tokens

    def _last(self, text: int) -> int:
        return self.texts[text][-1]
