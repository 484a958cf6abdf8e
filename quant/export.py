"""The released checkpoint's layout (reference E.1): which tensor is stored how, and the writer.

:func:`quantise_official` turns official tensors into stored ones, one at a time, which
``train/exchange/export.py`` writes shard by shard. The way back is ``quant/importing.py``, which
shares no code with this file.
"""

# Legend: R rows, C columns
from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.errors import ConfigError
from quant.formats import FP8_WEIGHT, MXFP4, quantise

INDEX = "model.safetensors.index.json"


class Stored(StrEnum):
    """How a tensor lies in the released checkpoint."""

    fp4 = "fp4"  # int8, two codes a byte, and a scale per 1x32 group
    fp8 = "fp8"  # float8_e4m3fn, and a scale per 128x128 block
    bf16 = "bf16"
    fp32 = "fp32"
    int64 = "int64"


_ATTN = r"(layers|mtp)\.\d+\.attn\."
_FFN = r"(layers|mtp)\.\d+\.ffn\."
# Regular expression over the whole official name -> storage. Every tensor matches exactly one line.
TABLE: tuple[tuple[str, Stored], ...] = (
    (r"(embed|head|norm)\.weight", Stored.bf16),
    (r"(layers|mtp)\.\d+\.(attn|ffn)_norm\.weight", Stored.bf16),
    (_ATTN + r"(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)\.weight", Stored.fp8),
    (_ATTN + r"(q|kv)_norm\.weight", Stored.bf16),
    (_ATTN + r"(indexer\.)?compressor\.(wkv|wgate|norm)\.weight", Stored.bf16),
    (_ATTN + r"indexer\.weights_proj\.weight", Stored.bf16),
    (_ATTN + r"(indexer\.)?compressor\.ape", Stored.fp32),
    (_ATTN + r"attn_sink", Stored.fp32),
    (_FFN + r"experts\.\d+\.w[123]\.weight", Stored.fp4),
    (_FFN + r"shared_experts\.w[123]\.weight", Stored.fp8),
    (_FFN + r"gate\.weight", Stored.bf16),
    (_FFN + r"gate\.bias", Stored.fp32),
    (_FFN + r"gate\.tid2eid", Stored.int64),
    (r"mtp\.\d+\.(e_proj|h_proj)\.weight", Stored.fp8),
    (r"mtp\.\d+\.(enorm|hnorm|norm)\.weight", Stored.bf16),
    (r"((layers|mtp)\.\d+\.)?hc_(attn|ffn|head)_(fn|base|scale)", Stored.fp32),
)


def stored_as(name: str) -> Stored:
    """How the tensor of an official name is stored.

    Raises:
        ValueError: no line of the table matches, or more than one does.
    """
    found = [stored for pattern, stored in TABLE if re.fullmatch(pattern, name)]
    if len(found) != 1:
        raise ValueError(
            f"tensor {name} matches {len(found)} lines of the table in quant/export.py,"
            " it needs exactly 1"
        )
    return found[0]


def scale_name(name: str) -> str:
    """Official name of the scale that belongs to a quantised weight."""
    return name.removesuffix("weight") + "scale"


def quantise_official(
    tensors: Iterable[tuple[str, Tensor]], expert_format: Stored = Stored.fp4
) -> Iterator[tuple[str, Tensor]]:
    """Stored tensors of official ones; a quantised weight is followed by its scale.

    Args:
        tensors: official names and values (fp32 masters, or bf16).
        expert_format: of the routed experts; the base releases keep them in fp8.

    Yields:
        Name and tensor, on the tensor's device.

    Raises:
        ValueError: a name that is not official, or a value that is not finite.
    """
    for name, value in tensors:
        stored = stored_as(name)
        if stored is Stored.fp4:
            stored = expert_format
        if stored in (Stored.fp4, Stored.fp8):
            q = quantise(value, MXFP4 if stored is Stored.fp4 else FP8_WEIGHT)
            if bool((q.scale.view(torch.uint8) == 255).any()):
                raise ConfigError(f"tensor {name} holds NaN or Inf: nothing to quantise")
            yield name, q.codes
            yield scale_name(name), q.scale
        else:
            yield name, value.detach().to(_PLAIN[stored]).contiguous()


_PLAIN = {Stored.bf16: torch.bfloat16, Stored.fp32: torch.float32, Stored.int64: torch.int64}


def index_of(shards: Iterable[Path]) -> dict[str, Any]:
    """The index that maps names to files, as ``transformers`` and the releases have it."""
    weight_map: dict[str, str] = {}
    total = 0
    for shard in shards:
        for name, begin, end in _header(shard):
            weight_map[name] = shard.name
            total += end - begin
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _header(shard: Path) -> Iterator[tuple[str, int, int]]:
    """Names of a safetensors file with the first byte of each and the one past it; maps nothing."""
    with shard.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
    for name, entry in entries.items():
        if name != "__metadata__":
            yield name, *entry["data_offsets"]
