"""The released checkpoint's layout (V4_SPEC E.1): which tensor is stored how, and the writer.

:func:`quantise_official` turns official tensors into stored ones, one at a time;
:func:`quantise_folder` does so for a folder of safetensors, shard by shard, so that a checkpoint
larger than memory converts and a stopped conversion goes on where it was. The way back is
``quant/importing.py``, which shares no code with this file.
"""

# Legend: R rows, C columns
from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

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
                raise ValueError(f"tensor {name} holds NaN or Inf: nothing to quantise")
            yield name, q.codes
            yield scale_name(name), q.scale
        else:
            yield name, value.detach().to(_PLAIN[stored]).contiguous()


_PLAIN = {Stored.bf16: torch.bfloat16, Stored.fp32: torch.float32, Stored.int64: torch.int64}


def quantise_folder(
    source: Path,
    target: Path,
    expert_format: Stored = Stored.fp4,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Convert a folder of official safetensors shards, one shard at a time.

    Each shard becomes one of the same name, written beside its place and renamed when complete; one
    that was made from the same file is kept, so that a stopped conversion goes on. The index comes
    last.

    Args:
        source: official tensors in bf16 or fp32.
        target: made if need be; other files of ``source`` (config, tokenizer) are not copied.
        expert_format: as in :func:`quantise_official`.
        progress: called with the shards done and all shards.

    Raises:
        ValueError: ``source`` holds no shards or is ``target``; ``target`` holds a shard that was
            made from something else; a tensor does not fit the layout.
    """
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"{source} holds no .safetensors file")
    if source.resolve() == target.resolve():
        raise ValueError(f"source {source} and target {target} are the same folder")
    target.mkdir(parents=True, exist_ok=True)
    for done, shard in enumerate(shards):
        progress(done, len(shards))
        finished, origin = target / shard.name, _origin(shard, expert_format)
        if finished.exists():
            _check_origin(finished, origin)
            continue
        tensors = dict(quantise_official(read_shard(shard), expert_format))
        partial = finished.with_suffix(".partial")
        save_file(tensors, partial, metadata={"format": "pt", **origin})
        partial.replace(finished)
    write_index(target, [target / shard.name for shard in shards])
    progress(len(shards), len(shards))


def _origin(shard: Path, expert_format: Stored) -> dict[str, str]:
    """What a converted shard was made from."""
    stat = shard.stat()
    made_from = f"{stat.st_size} bytes, modified {stat.st_mtime_ns} ns"
    return {"source": made_from, "experts": expert_format.value}


def _check_origin(finished: Path, origin: dict[str, str]) -> None:
    with safe_open(finished, framework="pt") as file:
        found = file.metadata() or {}
    for key, value in origin.items():
        if found.get(key) != value:
            raise ValueError(
                f"{finished} is there already but was made from another {key}"
                f" ({found.get(key)}, now {value}): choose an empty target folder"
            )


def read_shard(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a safetensors file, loaded one at a time, in the order of their names."""
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            yield name, file.get_tensor(name)


def write_index(folder: Path, shards: Iterable[Path]) -> None:
    """Write the index that maps names to files, as ``transformers`` and the releases have it."""
    weight_map: dict[str, str] = {}
    total = 0
    for shard in shards:
        for name, tensor in read_shard(shard):
            weight_map[name] = shard.name
            total += tensor.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    partial = folder / f"{INDEX}.partial"
    partial.write_text(json.dumps(index, indent=2) + "\n")
    partial.replace(folder / INDEX)
