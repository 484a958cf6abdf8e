"""A tokenizer as the files of a model folder: ``AutoTokenizer`` reads the ids that we train on."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers

from data.tokenizer import EOS, FIM_TOKENS, ByteTokenizer, Tokenizer
from train.errors import UserError

_PROBES = ("", "The cat", " two  spaces\n\tand \u00e9\u4e2d\U0001f600", "def f(x):\n    return x")


def tokenizer_files(tokenizer: Tokenizer, max_length: int) -> dict[str, dict[str, Any]]:
    """Contents of ``tokenizer.json`` and ``tokenizer_config.json``, by file name.

    Args:
        tokenizer: of the model.
        max_length: positions of the model.

    Raises:
        UserError: what would be written gives other ids.
    """
    content = tokenizer_json(tokenizer)
    written = HFTokenizer.from_str(json.dumps(content, allow_nan=False))
    for text in _PROBES:
        found, wanted = written.encode(text).ids, tokenizer.encode(text)
        if found != wanted:
            raise UserError(
                f"the tokenizer cannot be written: {text!r} has the ids {wanted} here, and would"
                f" have {found} in tokenizer.json (--no-tokenizer leaves it out)"
            )
    eos = written.id_to_token(tokenizer.eos_id)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "eos_token": eos,
        "pad_token": eos,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": content, "tokenizer_config.json": config}


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The same tokenizer for the ``tokenizers`` library.

    A template that puts tokens around a text is left out: training reads texts without.
    """
    if not isinstance(tokenizer, ByteTokenizer):
        content = json.loads(tokenizer.serialise())["tokenizer"]
        return {**content, "post_processor": _without_templates(content.get("post_processor"))}
    # BPE without merges: the alphabet stands for the bytes, ids in the order of the bytes.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable}
    letter |= {byte: chr(256 + place) for place, byte in enumerate(moved)}
    assert set(letter.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    inner = HFTokenizer(models.BPE({letter[byte]: byte for byte in range(256)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([EOS, *FIM_TOKENS])
    return json.loads(inner.to_str())


def _without_templates(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """What is left of a post-processor: byte level, which touches offsets only."""
    if processor is None or processor["type"] == "ByteLevel":
        return processor
    if processor["type"] != "Sequence":
        return None
    kept = [part for p in processor["processors"] if (part := _without_templates(p)) is not None]
    return {**processor, "processors": kept} if kept else None
