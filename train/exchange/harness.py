"""Our models behind the model API of lm-evaluation-harness, which brings the tasks.

Text is split and scored as its ``hf`` model does: trailing spaces of a context belong to the
continuation, an empty context is an end-of-document token, texts that are too long lose their
beginning. One difference: control tokens that are spelled out in a task's text stay text here.
"""

# Legend: N tokens of a text
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from data.tokenizer import Tokenizer
from model.generate import Sampling, generate
from model.transformer import DeepSeekV4
from train.errors import UserError
from train.exchange.score import score_continuation

T = TypeVar("T")
_NEW_TOKENS = 256  # where a task does not say, as the harness's own models do


class HarnessModel(TemplateLM):
    """A model with its tokenizer.

    Args:
        model: in the state it is to be evaluated in.
        tokenizer: its own.
        chunk_tokens: of a text read at once.
    """

    def __init__(self, model: DeepSeekV4, tokenizer: Tokenizer, chunk_tokens: int = 512) -> None:
        super().__init__()
        self._model, self._tokenizer, self._chunk = model, tokenizer, chunk_tokens

    @property
    def eot_token_id(self) -> int:
        """Ends a document."""
        return self._tokenizer.eos_id

    @property
    def max_length(self) -> int:
        """Positions."""
        return self._model.config.max_position_embeddings

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; no token is ever added."""
        return list(self._tokenizer.encode(string))

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        return [
            self._score(context, continuation)
            for _, context, continuation in _shown(requests, "scoring", disable_tqdm)
        ]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        if len(continuation) > self.max_length:
            raise UserError(
                f"the task asks for the score of {len(continuation)} tokens behind a context, but"
                f" the model has max_position_embeddings={self.max_length}"
            )
        ids_N = torch.tensor((context + continuation)[-(self.max_length + 1) :])
        nats, greedy = score_continuation(self._model, ids_N, len(continuation), self._chunk)
        return -nats, greedy

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's length."""
        found = []
        for request in _shown(requests, "scoring texts", disable_tqdm):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            found.append(sum(self._score(*make_disjoint_window(window))[0] for window in windows))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue texts from the compressed cache until a stop text, the end, or the length."""
        return [
            self._continue(*request.args) for request in _shown(requests, "writing", disable_tqdm)
        ]

    def _continue(self, context: str, asked: dict[str, Any]) -> str:
        options: dict[str, Any] = {**normalize_gen_kwargs(asked, _NEW_TOKENS)}
        stops = handle_stop_sequences(options.pop("until", None), eos=None)
        new = int(options.pop("max_gen_toks"))
        sampled = bool(options.pop("do_sample", False))
        temperature = float(options.pop("temperature", 1.0)) if sampled else 0.0
        top_p = float(options.pop("top_p", 1.0)) if sampled else 1.0
        for name in ("temperature", "top_p"):  # of a text that is not sampled
            options.pop(name, None)
        if options:
            name, value = next(iter(options.items()))
            raise UserError(f"the task asks for {name}={value}, which generation here has not")
        room = self.max_length - new
        if room < 1:
            raise UserError(
                f"the task asks for max_gen_toks={new}, but the model has"
                f" max_position_embeddings={self.max_length}"
            )
        prompt = (self.tok_encode(context) or [self.eot_token_id])[-room:]
        sampling = Sampling(
            max_new_tokens=new, temperature=temperature, top_p=top_p, stop_id=self.eot_token_id,
            chunk_tokens=self._chunk,
        )  # fmt: skip
        written: list[int] = []

        def ends(_: int, token: int) -> bool:
            written.append(token)
            text = self._tokenizer.decode(written)
            return any(stop in text for stop in stops)

        [ids] = generate(self._model, [prompt], sampling, on_token=ends)
        text = self._tokenizer.decode(ids)
        for stop in stops:
            text = text.split(stop)[0]
        return text


def _shown(requests: Sequence[T], what: str, hidden: bool) -> Iterable[T]:
    return tqdm(requests, desc=what, disable=True if hidden else None)
