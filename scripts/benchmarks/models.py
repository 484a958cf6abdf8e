"""The contestants of ``bench_step.py``: one training step (forward, backward) of each.

``ours`` trains with the whole objective (indexer and balance losses on), ``ours_lm`` with the
language-model loss alone, which is all that ``hf`` (transformers' DeepseekV4) has. ``ours_lm`` and
``hf`` hold the same weights and see the same tokens, so their losses must agree. ``dense`` is a
plain transformer (RMSNorm, RoPE, SDPA, SwiGLU) with as many active parameters.
"""

# Legend: B rows, T tokens, D hidden, H heads, K head dim
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.flops import TrainingFlops, training_flops
from model.init import init_weights
from model.loss import Objective
from model.parameter_counts import parameter_counts
from model.transformer import DeepSeekV4
from parallel.activation_checkpoint import checkpoint_blocks
from train.errors import UserError

# The benchmark model of the project: 14 M parameters, every layer kind, no MTP.
BENCHMARK = ModelConfig(
    name="benchmark", vocab_size=4096, hidden_size=256, num_hidden_layers=6, num_attention_heads=8,
    head_dim=64, qk_rope_head_dim=16, q_lora_rank=128, o_groups=2, o_lora_rank=128,
    compress_ratios=[0, 0, 4, 128, 4, 128], sliding_window=128, index_n_heads=8, index_head_dim=32,
    index_topk=64, n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=128,
    num_hash_layers=1, num_nextn_predict_layers=0,
)  # fmt: skip

StepFunction = Callable[[], Tensor]


@dataclass(frozen=True)
class Contestant:
    """A model and one step of it.

    Attributes:
        step: forward and backward; returns the language-model loss. Gradients are dropped before.
        flops: matmul FLOPs of one step by the dtype they run in.
        parameters: all, and those one token uses.
    """

    step: StepFunction
    flops: dict[torch.dtype, float]
    parameters: tuple[int, int]


def tokens(config: ModelConfig, rows: int, seq_len: int, device: torch.device) -> Tensor:
    """The same random tokens for every contestant."""
    generator = torch.Generator().manual_seed(rows * seq_len)
    return torch.randint(config.vocab_size, (rows, seq_len), generator=generator).to(device)


# ---- ours -------------------------------------------------------------------------------------


def build_ours(
    config: ModelConfig,
    ids_BT: Tensor,
    dtype: torch.dtype,
    whole_objective: bool,
    activation_checkpoint: str = "none",
) -> Contestant:
    """Our model; every row is one document."""
    model = DeepSeekV4(config)
    checkpoint_blocks(model, activation_checkpoint)
    init_weights(model, seed=0)
    model.to(ids_BT.device)
    model.compute_dtype = model.head_dtype = dtype  # as every contestant: one dtype throughout
    rows, seq_len = ids_BT.shape
    depths = 1 + config.num_nextn_predict_layers
    labels_BTK = torch.full((rows, seq_len, depths), -1, device=ids_BT.device)
    for k in range(depths):
        labels_BTK[:, : seq_len - 1 - k, k] = ids_BT[:, 1 + k :]
    targets = tuple(float(rows * (seq_len - 1 - k)) for k in range(depths))
    count = float(ids_BT.numel())
    objective = (
        Objective(targets, count)
        if whole_objective
        else Objective(targets, count, indexer_weight=0.0, balance_weight=0.0)
    )
    documents_BT = torch.zeros_like(ids_BT)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        output = model(ids_BT, documents_BT, labels_BTK, objective)
        output.total.backward()
        return output.losses["loss"]

    flops = training_flops(config, seq_len, indexer_loss=whole_objective)
    counts = parameter_counts(config)
    by_dtype = _flops_by_dtype(flops, ids_BT.numel(), dtype)
    return Contestant(step, by_dtype, (counts.total, counts.active))


def _flops_by_dtype(
    flops: TrainingFlops, count: int, dtype: torch.dtype
) -> dict[torch.dtype, float]:
    """FLOPs of a step; head, gate, compressors and streams compute in fp32 (reference C.5)."""
    high = ("head", "gate", "compressor", "mhc")
    result = {torch.float32: 0.0, dtype: 0.0}
    for part, cost in flops.by_part.items():
        result[torch.float32 if part in high else dtype] += cost * count
    return result


# ---- the plain dense transformer --------------------------------------------------------------


class DenseBlock(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, width: int, head_dim: int, inner: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.attn_norm, self.ffn_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.w13 = nn.Linear(width, 2 * inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        qkv_BTHK = self.qkv(self.attn_norm(x_BTD)).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv_BTHK.transpose(1, 2).chunk(3, dim=1)
        q, k = (x * cos_TK + _turned(x) * sin_TK for x in (q, k))
        o_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(o_BHTK.transpose(1, 2).flatten(2))
        gate, up = self.w13(self.ffn_norm(x_BTD)).chunk(2, dim=-1)
        return x_BTD + self.w2(F.silu(gate) * up)


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class DenseTransformer(nn.Module):
    """The simplest modern decoder, as a yardstick."""

    def __init__(self, vocab: int, width: int, layers: int, head_dim: int, inner: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(DenseBlock(width, head_dim, inner) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits [B, T, V]."""
        x_BTD = self.embed(ids_BT)
        half = self.head_dim // 2
        inverse_K = 10000.0 ** (-torch.arange(half, device=x_BTD.device) / half)
        angle_TK = torch.arange(ids_BT.shape[1], device=x_BTD.device)[:, None] * inverse_K
        angle_TK = torch.cat((angle_TK, angle_TK), dim=-1)
        cos_TK, sin_TK = angle_TK.cos().to(x_BTD.dtype), angle_TK.sin().to(x_BTD.dtype)
        for block in self.blocks:
            x_BTD = block(x_BTD, cos_TK, sin_TK)
        return self.head(self.norm(x_BTD))


def build_dense(config: ModelConfig, ids_BT: Tensor, dtype: torch.dtype) -> Contestant:
    """As wide, as deep, and with as many parameters as one token of our model uses.

    Raises:
        ValueError: our model has fewer active parameters than attention and embeddings take.
    """
    width, layers, vocab = config.hidden_size, config.num_hidden_layers, config.vocab_size
    head_dim = min(64, width)
    rest = parameter_counts(config).active - 2 * vocab * width - layers * 4 * width**2
    inner = round(rest / (3 * width * layers) / 16) * 16
    if inner <= 0 or width % head_dim:
        raise UserError(f"no dense twin of {config.name}: SwiGLU width {inner}, hidden {width}")
    torch.manual_seed(0)
    model = DenseTransformer(vocab, width, layers, head_dim, inner)
    model.to(ids_BT.device, dtype)
    labels = F.pad(ids_BT[:, 1:], (0, 1), value=-1).flatten()

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        logits = model(ids_BT).flatten(0, 1).float()
        loss = F.cross_entropy(logits, labels, ignore_index=-1)
        loss.backward()
        return loss.detach()

    size = sum(p.numel() for p in model.parameters())
    seq_len = ids_BT.shape[1]
    matmul = size - vocab * width
    per_token = 6.0 * matmul + layers * 12.0 * width * (seq_len + 1) / 2
    return Contestant(step, {dtype: per_token * ids_BT.numel()}, (size, size))
