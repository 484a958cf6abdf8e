"""One dial: the shapes between a model of minutes on a CPU and DeepSeek-V4-Flash.

The dial is the depth. Every other size grows geometrically with log(depth) from the smallest shape
in which every part acts to the released one, rounded to what kernels and divisibility ask for; at
the top it is V4-Flash exactly. Layer kinds, ratios, shared expert, streams and MTP follow the
released pattern at every depth. Between the ends the family is an interpolation, not a published
one (reference A.1 has two points).
"""

from __future__ import annotations

import math
from typing import Any

from model.errors import ConfigError

SMALLEST, LARGEST = 4, 43  # layers: window, window, CSA, HCA; V4-Flash


def place(scale: int) -> float:
    """Where a scale lies between the ends, 0 to 1, in the logarithm of the depth.

    Raises:
        ConfigError: the scale is outside.
    """
    if isinstance(scale, bool) or not isinstance(scale, int) or not SMALLEST <= scale <= LARGEST:
        raise ConfigError(
            f"model.scale={scale} is the number of layers of v4_scaled: {SMALLEST} to {LARGEST}"
        )
    return math.log(scale / SMALLEST) / math.log(LARGEST / SMALLEST)


def between(scale: int, low: float, high: float) -> float:
    """Geometric interpolation, exact at both ends."""
    at = place(scale)
    return low if at == 0 else high if at == 1 else low * (high / low) ** at


def _step(scale: int, low: int, high: int, unit: int) -> int:
    """The same as a multiple of ``unit``; ``low`` where that is smaller than one unit."""
    rounded = unit * math.floor(between(scale, low, high) / unit + 0.5)
    return min(high, max(low, rounded))


def power_between(scale: int, low: int, high: int) -> int:
    """Geometric interpolation, rounded to a power of two."""
    return 2 ** round(math.log2(between(scale, low, high)))


def scaled_shape(scale: int) -> dict[str, Any]:
    """Keys of the ``model`` section that change over the family.

    Args:
        scale: the number of layers.

    Raises:
        ConfigError: outside ``SMALLEST .. LARGEST``.
    """
    heads = _step(scale, 8, 64, 8)
    pairs = [4, power_between(scale, 16, 128)]  # of CSA and of HCA, in turn
    ratios = [0, 0, *(pairs[layer % 2] for layer in range(scale - 2))]
    kinds = ["swa", "swa", *(("csa", "hca")[layer % 2] for layer in range(scale - 2))]
    return {
        "num_hidden_layers": scale,
        "vocab_size": _step(scale, 1024, 129280, 256),
        "hidden_size": _step(scale, 32, 4096, 16),
        "num_attention_heads": heads,
        "head_dim": power_between(scale, 16, 512),
        "qk_rope_head_dim": power_between(scale, 8, 64),
        "q_lora_rank": _step(scale, 16, 1024, 16),
        "o_groups": min(heads // 2, power_between(scale, 2, 8)),
        "o_lora_rank": _step(scale, 16, 1024, 16),
        "compress_ratios": [*ratios, 0],
        # as released, where a kind follows from the ratio
        "layer_kinds": [] if pairs[1] == 128 else kinds,
        "sliding_window": power_between(scale, 32, 128),
        "index_n_heads": power_between(scale, 16, 64),
        "index_head_dim": power_between(scale, 16, 128),
        "index_topk": power_between(scale, 16, 512),
        "n_routed_experts": _step(scale, 8, 256, 8),
        "num_experts_per_tok": _step(scale, 2, 6, 1),
        "moe_intermediate_size": _step(scale, 16, 2048, 16),
        "num_hash_layers": _step(scale, 1, 3, 1),
        "initializer_range": float(f"{between(scale, 0.02, 0.006):.3g}"),
    }
