"""Initialisation as one table: name pattern -> distribution (reference B.2, B.12 and H).

Every tensor, and every expert of a stacked one, has a random stream of its own, keyed by the seed,
the global name and the expert's number. So the bits depend neither on the order of creation nor on
the layout: a rank that holds a shard draws the same numbers as a single process. Draws are made on
the CPU in fp32, then copied.
"""

# Legend: V vocabulary, E experts, S streams
from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.moe.hash_table import build_table

Draw = Callable[[tuple[int, ...], ModelConfig, torch.Generator], Tensor]


def _normal(shape: tuple[int, ...], config: ModelConfig, generator: torch.Generator) -> Tensor:
    return torch.empty(shape).normal_(0.0, config.initializer_range, generator=generator)


def _constant(value: float) -> Draw:
    return lambda shape, config, generator: torch.full(shape, value)


def _mixing(shape: tuple[int, ...], config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Normal; with ``hc_fn_gain`` a mix of any width spreads by it (the input's RMS is 1)."""
    deviation = config.hc_fn_gain / math.sqrt(shape[-1]) or config.initializer_range
    return torch.empty(shape).normal_(0.0, deviation, generator=generator)


def _mixing_base(shape: tuple[int, ...], config: ModelConfig, _: torch.Generator) -> Tensor:
    """Zeros, plus ``hc_identity_base`` on the diagonal of comb: a residual-like start."""
    base = torch.zeros(shape)
    streams = config.hc_mult
    base[2 * streams :: streams + 1] = config.hc_identity_base
    return base


# Regular expression over the whole name -> distribution. Every parameter matches exactly one line.
TABLE: tuple[tuple[str, Draw], ...] = (
    (r"(embed|head)\.weight", _normal),
    (r".*\.(wq_a|wq_b|wkv|wgate|wo_a|wo_b|wq|wk|wv|wo|weights_proj)\.weight", _normal),
    (r".*\.ffn\.gate\.weight", _normal),
    (r".*\.(experts|shared_experts)\.(w1|w2|w3)\.weight", _normal),
    (r"mtp\.\d+\.(e_proj|h_proj)\.weight", _normal),
    (r"(.*\.)?(norm|\w+_norm|enorm|hnorm)\.weight", _constant(1.0)),
    (r".*\.ape", _constant(0.0)),
    (r".*\.attn_sink", _constant(0.0)),
    (r"(.*\.)?hc_(attn|ffn|head)\.fn", _mixing),
    (r".*\.hc_(attn|ffn)\.base", _mixing_base),
    (r"(.*\.)?hc_head\.base", _constant(0.0)),
    (r"(.*\.)?hc_(attn|ffn|head)\.scale", _constant(0.01)),
    (r"(.*\.)?hc_(attn|ffn|head)\.gamma", _constant(1.0)),
)
_STACKED = re.compile(r".*\.experts\.w[123]\.weight")


def distribution_of(fqn: str) -> Draw:
    """The table's line for a parameter.

    Raises:
        ValueError: no line matches, or more than one does.
    """
    found = [draw for pattern, draw in TABLE if re.fullmatch(pattern, fqn)]
    if len(found) != 1:
        raise ValueError(
            f"parameter {fqn} matches {len(found)} lines of the table in model/init.py,"
            " it needs exactly 1"
        )
    return found[0]


def stream_seed(seed: int, fqn: str, expert: int = 0) -> int:
    """Seed of a tensor's own random stream: stable across machines, processes and versions."""
    digest = hashlib.blake2b(f"{seed}|{fqn}|{expert}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # 63 bits: torch seeds are signed


@dataclass(frozen=True)
class Region:
    """The part of a global tensor that this process holds.

    Attributes:
        local: where the values go; may be empty.
        shape: shape of the global tensor.
        slices: the part of it that ``local`` is, one slice a dim with start and stop.
    """

    local: Tensor
    shape: tuple[int, ...]
    slices: tuple[slice, ...]


def whole(tensor: Tensor) -> Region:
    """A tensor that is not sharded."""
    return Region(tensor, tuple(tensor.shape), tuple(slice(0, size) for size in tensor.shape))


@torch.no_grad()
def init_weights(
    model: nn.Module,
    seed: int,
    token_counts_V: Tensor | None = None,
    region_of: Callable[[Tensor], Region] = whole,
) -> None:
    """Fill every parameter, selection bias and hash table of a model (or of one pipeline stage).

    What is on the meta device has nothing to fill.

    Args:
        model: has ``config``; its parameters bear their global names.
        seed: the run's seed.
        token_counts_V: occurrences of each token id in the training text, for the hash tables;
            None takes them as equally frequent.
        region_of: which part of the global tensor a parameter holds; layouts that shard pass
            their own.

    Raises:
        ValueError: a parameter or saved buffer has no line in the table, or more than one.
    """
    config = model.config
    assert isinstance(config, ModelConfig)
    for fqn, parameter in model.named_parameters():
        _fill(region_of(parameter), fqn, seed, config, distribution_of(fqn))
    for fqn, buffer in _saved_buffers(model):
        region = region_of(buffer)
        if region.local.is_meta:
            continue
        values = _buffer_values(fqn, region.shape, seed, config, token_counts_V)
        region.local.copy_(values[region.slices])


def _fill(region: Region, fqn: str, seed: int, config: ModelConfig, draw: Draw) -> None:
    if region.local.numel() == 0 or region.local.is_meta:
        return
    if _STACKED.fullmatch(fqn):  # one expert at a time: only the local ones are ever drawn
        held, *inner = region.slices
        for row, expert in enumerate(range(held.start, held.stop)):
            generator = torch.Generator().manual_seed(stream_seed(seed, fqn, expert))
            region.local[row].copy_(draw(region.shape[1:], config, generator)[tuple(inner)])
        return
    generator = torch.Generator().manual_seed(stream_seed(seed, fqn))
    region.local.copy_(draw(region.shape, config, generator)[region.slices])


def _saved_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    saved = model.state_dict(keep_vars=True).keys()
    return [(fqn, buffer) for fqn, buffer in model.named_buffers() if fqn in saved]


def _buffer_values(
    fqn: str,
    shape: tuple[int, ...],
    seed: int,
    config: ModelConfig,
    token_counts_V: Tensor | None,
) -> Tensor:
    if fqn.endswith(".ffn.gate.bias"):
        return torch.zeros(shape)
    if fqn.endswith(".ffn.gate.tid2eid"):
        vocab, k = shape
        return build_table(
            vocab, config.n_routed_experts, k, stream_seed(seed, fqn), token_counts_V
        )
    raise ValueError(f"buffer {fqn} has no initial value in model/init.py")
