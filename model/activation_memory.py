"""Bytes that the forward pass keeps for the backward pass, in closed form (no module is built).

Coarse on purpose: it counts the large tensors that autograd saves in this implementation (fast
kernels), and leaves out index tables, RoPE tables and weights cast to the compute dtype. The test
beside it compares it with the tensors that are really saved. No dense [T, T] tensor exists, so
everything is proportional to tokens.
"""

# Legend (in comments): D hidden, S streams, H heads, C head dim, R query rank, I expert width
from __future__ import annotations

from dataclasses import dataclass

from model.config import LayerKind, ModelConfig, Residual

MODES = ("none", "block", "selective")  # values of train.activation_checkpoint


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes per token of a microbatch.

    Attributes:
        kept: from the forward to the backward pass.
        running: held besides while this block recomputes and differentiates; of all blocks of a
            rank only one runs at a time.
    """

    kept: float
    running: float


def block_activation_bytes(
    config: ModelConfig, kind: LayerKind, ratio: int, compute_bytes: int, mode: str = "none"
) -> ActivationBytes:
    """Bytes per token of one block.

    Args:
        config: the model.
        kind: of the block.
        ratio: tokens per compressed entry; 0 where there is none.
        compute_bytes: of the compute dtype: 4 or 2.
        mode: ``none`` keeps everything; ``block`` keeps the block's input alone; ``selective``
            keeps the input and the results of matmuls and attention, the rest is recomputed.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"train.activation_checkpoint={mode} is none of {', '.join(MODES)}")
    whole = sum(saved_bytes(config, kind, ratio, compute_bytes).values())
    if mode == "none":
        return ActivationBytes(whole, 0.0)
    entry = float(config.num_streams * config.hidden_size * compute_bytes)
    if mode == "block":
        return ActivationBytes(entry, whole)
    kept = min(entry + _matmul_results(config, kind, compute_bytes), whole)
    return ActivationBytes(kept, whole - kept)


def saved_bytes(
    config: ModelConfig, kind: LayerKind, ratio: int, compute_bytes: int
) -> dict[str, float]:
    """Bytes per token that autograd keeps in one block, by part, without checkpointing."""
    c, width, rank, dim = compute_bytes, config.hidden_size, config.q_lora_rank, config.head_dim
    wide = config.num_attention_heads * dim
    upcast = 4.0 * width if c < 4 else 0.0  # an fp32 copy of a sublayer's input
    # A norm keeps its input, the matmul behind it the result.
    parts = {"norms": 2 * 2.0 * c * width}
    parts["attention"] = (
        2.0 * c * (rank + dim)
        + 4.0 * c * wide  # queries before norm and after RoPE, attention's result, it rotated back
        + c * config.o_groups * config.o_lora_rank
        + 4.0 * config.num_attention_heads
    )
    if kind is LayerKind.mha:  # queries and keys before and after RoPE, values, the result
        parts["attention"] = 6.0 * c * wide + 4.0 * config.num_attention_heads
    if kind in (LayerKind.csa, LayerKind.hca):
        overlap = kind is LayerKind.csa
        parts["compressor"] = upcast + _compressor_saved(dim, ratio, c, overlap)
    if kind is LayerKind.csa:
        queries = config.index_n_heads * (c * config.index_head_dim + 4.0)
        keys = upcast + _compressor_saved(config.index_head_dim, ratio, c, overlap=True)
        parts["indexer"] = queries + keys + 8.0 * config.index_topk
    parts["gate"] = upcast + 3 * 4.0 * config.n_routed_experts
    swiglu = 3.0 * c * config.moe_intermediate_size  # gate, up, and the down projection's input
    parts["experts"] = config.num_experts_per_tok * (swiglu + c * width)
    parts["shared"] = config.n_shared_experts * swiglu
    if Residual(config.residual) is Residual.mhc:
        streams = config.hc_mult
        mixes = 4.0 * ((2 + streams) * streams + streams + 1)
        parts["mhc"] = 2 * (c * streams * width + c * width + mixes)
    return parts


def _compressor_saved(dim: int, ratio: int, compute_bytes: int, overlap: bool) -> float:
    slots = 2 * dim if overlap else dim  # values and softmax weights in fp32, then the entries
    return 2 * 4.0 * slots + 2.0 * compute_bytes * dim / ratio


def _matmul_results(config: ModelConfig, kind: LayerKind, compute_bytes: int) -> float:
    """Bytes per token of what matmuls and attention give in one block."""
    wide = config.num_attention_heads * config.head_dim
    if kind is LayerKind.mha:
        results = 4 * wide + config.hidden_size
    else:
        results = config.q_lora_rank + 2 * wide + config.head_dim
        results += config.o_groups * config.o_lora_rank + config.hidden_size
    if kind is LayerKind.csa:
        results += config.index_n_heads * config.index_head_dim
    experts = config.num_experts_per_tok + config.n_shared_experts
    results += experts * (2 * config.moe_intermediate_size + config.hidden_size)
    compressed = {
        LayerKind.csa: 4 * config.head_dim + 4 * config.index_head_dim,
        LayerKind.hca: 2 * config.head_dim,
    }.get(kind, 0)
    return float(compute_bytes * results + 4 * compressed)


def gathered_entry_bytes(
    config: ModelConfig, kind: LayerKind, ratio: int, compute_bytes: int
) -> float:
    """Bytes of all shards' entries, keys of a dense layer or of an indexer, a token of whole rows.

    Under context parallelism every rank holds them, of however many shards; they are the one part
    of a block's memory that does not fall with their number.
    """
    if kind is LayerKind.dense:  # the keys of all tokens before, on the last rank of all tokens
        return float(compute_bytes * config.head_dim)
    if kind not in (LayerKind.csa, LayerKind.hca):
        return 0.0
    dim = config.head_dim + (config.index_head_dim if kind is LayerKind.csa else 0)
    return compute_bytes * dim / ratio


def head_bytes(config: ModelConfig, compute_bytes: int) -> float:
    """Bytes per token of one prediction head: collapse, norm and the gradient of its input."""
    streams = config.num_streams if Residual(config.residual) is Residual.mhc else 0
    return (compute_bytes * (streams + 1) + 4.0) * config.hidden_size


def mtp_bytes(config: ModelConfig, compute_bytes: int) -> float:
    """Bytes per token of what a MTP depth does before its block: two norms, two projections."""
    return 2.0 * compute_bytes * (1 + config.num_streams) * config.hidden_size
