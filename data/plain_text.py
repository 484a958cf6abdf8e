"""Text is never control: a tokenizer of the ``tokenizers`` library made to read text as text alone.

The library looks for *added tokens* in every text, special ones (which it can be told to leave) and
plain ones (which it cannot), and a model may also reach the entry of a control token by itself: a
word of WordLevel, a piece of Unigram, a merge of BPE. :func:`text_encoder` makes a twin for
encoding that has no added tokens and in which the entries of control tokens have names that no text
holds. What it cannot write otherwise becomes smaller pieces, bytes, or the unknown token.

:func:`lost_characters` tells which characters a tokenizer does not keep.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterable, Sequence, Set
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

_SCRIPTS = (
    "\u0142\u0151\u1e9e\u03b1\u03a9\u0436\u042f\u0561\u05d0\u0639\u0928\u0995\u0ba4\u0e01\u10d0"
    "\u1200\u1780\u3042\u30ab\u4e2d\u9f98\uac00\u2014\u20ac\u221e\u2713\u2500\U0001f600\U00020000"
)
_LEADS = [  # a character for every byte that begins one in UTF-8
    *(bytes([lead, 0x80]) for lead in range(0xC2, 0xE0)),
    *(bytes([lead, 0xA0 if lead == 0xE0 else 0x80, 0x80]) for lead in range(0xE0, 0xF0)),
    *(bytes([lead, 0x90 if lead == 0xF0 else 0x80, 0x80, 0x80]) for lead in range(0xF0, 0xF5)),
]
# Every byte value that UTF-8 has, and characters of many scripts.
PROBES = sorted({*map(chr, range(0x100)), *(lead.decode() for lead in _LEADS), *_SCRIPTS})


def unknown_id(content: dict[str, Any]) -> int | None:
    """The id that the model writes for what it does not know; None where it has none."""
    model = content["model"]
    if model["type"] == "Unigram":
        return model.get("unk_id")
    unknown = model.get("unk_token")
    return None if unknown is None else model["vocab"].get(unknown)


def text_encoder(content: dict[str, Any], control: Collection[int]) -> HFTokenizer:
    """A tokenizer that encodes every text as ``content`` does, and never gives a control id.

    Args:
        content: JSON of a tokenizer of the library.
        control: ids that no text may give.
    """
    model = dict(content["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [
            [_no_text() if number in control else piece, score]
            for number, (piece, score) in enumerate(model["vocab"])
        ]
    else:
        hidden = {piece for piece, number in model["vocab"].items() if number in control}
        model["vocab"] = {
            _no_text() if piece in hidden else piece: number
            for piece, number in model["vocab"].items()
        }
        if "merges" in model:
            prefix = model.get("continuing_subword_prefix") or ""
            model["merges"] = list(_without(model["merges"], hidden, prefix))
        if model.get("unk_token") in hidden:  # unknown text would end the document
            model["unk_token"] = None if model["type"] == "BPE" else _no_text()
    return HFTokenizer.from_str(
        json.dumps({**content, "model": model, "added_tokens": []}, allow_nan=False)
    )


def lost_characters(
    encoder: HFTokenizer, decoder: HFTokenizer, unknown: int | None, more: Iterable[str]
) -> tuple[list[str], list[str]]:
    """What does not come back from ids.

    Args:
        encoder: from :func:`text_encoder`.
        decoder: the tokenizer itself.
        unknown: from :func:`unknown_id`.
        more: texts to try beside :data:`PROBES`.

    Returns:
        Those that are lost without a trace, and those that become the unknown token.
    """
    lost, told = [], []
    for probe in [*PROBES, *more]:
        text = f"a{probe}b" if probe.isspace() else probe
        try:
            ids = encoder.encode(text, add_special_tokens=False).ids
        except Exception:  # the library raises bare ones: WordLevel without an unknown token
            lost.append(probe)
            continue
        if unknown is not None and unknown in ids:
            told.append(probe)
        elif not _same(decoder.decode(ids, skip_special_tokens=False), text, encoder):
            lost.append(probe)
    return lost, told


def _same(found: str, text: str, encoder: HFTokenizer) -> bool:
    """Whether a text came back, as it is or as the normaliser left it.

    White space may come back as another, between words only there: some tokenizers write it as
    U+2581 or take it as the border of words, but none may join what it parted.
    """
    normal = text if encoder.normalizer is None else encoder.normalizer.normalize_str(text)
    join = list if len(text.split()) > 1 else "".join
    return found == text or join(_words(found)) in (join(_words(text)), join(_words(normal)))


def _words(text: str) -> list[str]:
    return text.replace("\u2581", " ").split()


def _no_text() -> str:
    """A name that no text holds: nobody knows it before, and it is never written."""
    return secrets.token_hex(32)


def _without(merges: Sequence[Any], hidden: Set[str], prefix: str) -> Iterable[list[str] | str]:
    """The merges that neither use nor make a hidden entry."""
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if hidden.isdisjoint({left, right, left + right.removeprefix(prefix)}):
            yield merge
