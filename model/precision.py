"""One precision policy: name pattern -> storage, compute and reduce dtype (reference C.5).

Masters are fp32 whatever the run's precision. Under ``bf16`` the large matmuls compute in bf16;
what the released model keeps in fp32 stays there: mHC parameters, sinks, ape, gate, compressor
projections, norms and the head. Gradients are reduced in fp32. FSDP casts all parameters of a
group alike, so fp32 parameters form groups of their own. Quantised formats (``quant``) replace the
compute dtype of the matmuls they name; they don't enter this table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from model.errors import ConfigError

PRECISIONS = ("fp32", "bf16")  # values of train.precision
# train.head_precision -> dtype of the operands, and whether CUDA multiplies them as TF32 (11 bits).
HEAD_PRECISIONS = {
    "fp32": (torch.float32, False), "tf32": (torch.float32, True), "bf16": (torch.bfloat16, False),
}  # fmt: skip


@dataclass(frozen=True)
class ParameterDtypes:
    """Dtypes of one parameter.

    Attributes:
        storage: the master weight, and what checkpoints hold.
        compute: the dtype the forward and backward passes use it in.
        reduce: the dtype its gradient is summed across ranks in.
    """

    storage: torch.dtype
    compute: torch.dtype
    reduce: torch.dtype


_ALWAYS_FP32 = ParameterDtypes(torch.float32, torch.float32, torch.float32)
_BF16_MATMUL = ParameterDtypes(torch.float32, torch.bfloat16, torch.float32)

# Regular expression over the whole name -> dtypes under bf16. Every parameter matches exactly one.
TABLE: tuple[tuple[str, ParameterDtypes], ...] = (
    (r"embed\.weight", _BF16_MATMUL),
    (r"head\.weight", _ALWAYS_FP32),
    (r".*\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b|wq|wk|wv|wo)\.weight", _BF16_MATMUL),
    (r".*\.indexer\.(wq_b|weights_proj)\.weight", _BF16_MATMUL),
    (r".*\.compressor\.(wkv|wgate)\.weight", _ALWAYS_FP32),
    (r".*\.compressor\.ape", _ALWAYS_FP32),
    (r".*\.attn\.attn_sink", _ALWAYS_FP32),
    (r".*\.ffn\.gate\.weight", _ALWAYS_FP32),
    (r".*\.ffn\.(experts|shared_experts)\.(w1|w2|w3)\.weight", _BF16_MATMUL),
    (r"mtp\.\d+\.(e_proj|h_proj)\.weight", _BF16_MATMUL),
    (r"(.*\.)?(norm|\w+_norm|enorm|hnorm)\.weight", _ALWAYS_FP32),
    (r"(.*\.)?hc_(attn|ffn|head)\.(fn|base|scale|gamma)", _ALWAYS_FP32),
)


def precision_of(fqn: str, precision: str, head: str = "fp32") -> ParameterDtypes:
    """Dtypes of a parameter under ``train.precision``.

    Args:
        fqn: the parameter's global name.
        precision: ``fp32`` or ``bf16``.
        head: of the prediction head alone (``train.head_precision``): ``fp32``, ``tf32`` (fp32 in
            memory) or ``bf16``.

    Raises:
        ValueError: unknown precision; or a name that matches no line of the table, or several.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"train.precision={precision} is none of {', '.join(PRECISIONS)}")
    found = [dtypes for pattern, dtypes in TABLE if re.fullmatch(pattern, fqn)]
    if len(found) != 1:
        raise ValueError(
            f"parameter {fqn} matches {len(found)} lines of the table in model/precision.py,"
            " it needs exactly 1"
        )
    if fqn == "head.weight" and head == "bf16":
        return _BF16_MATMUL
    return found[0] if precision == "bf16" else _ALWAYS_FP32
