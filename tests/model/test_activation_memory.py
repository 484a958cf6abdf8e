"""The closed form of saved activations against the tensors that autograd really saves.

Coarse by design: it leaves out index tables, RoPE tables and small per-token vectors, hence 10 %
either way. Weights cast to the compute dtype are not activations: a saved tensor counts when its
first dim is that of the rows or the tokens (no weight here has such a size).
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.activation_memory import (
    block_activation_bytes,
    head_bytes,
    mtp_bytes,
    saved_bytes,
)
from model.config import LayerKind, ModelConfig, Residual
from model.init import init_weights
from model.loss import Objective
from model.transformer import DeepSeekV4

BASE = ModelConfig(
    vocab_size=256, hidden_size=128, num_hidden_layers=3, q_lora_rank=64, num_attention_heads=4,
    compress_ratios=[0, 4, 16, 0], layer_kinds=[LayerKind(k) for k in ("swa", "csa", "hca")],
    index_topk=8, moe_intermediate_size=96, loss_chunk_tokens=64,
)  # fmt: skip
ROWS, TOKENS = 2, 131

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "wide_experts": {"moe_intermediate_size": 320, "num_experts_per_tok": 3, "hc_mult": 2},
    "plain_no_shared": {"residual": Residual.plain, "n_shared_experts": 0},
}


def saved_activations(config: ModelConfig, dtype: torch.dtype) -> float:
    """Bytes per token of every distinct activation saved by one forward pass with all losses."""
    model = DeepSeekV4(config)
    init_weights(model, seed=0)
    model.compute_dtype = dtype
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (ROWS, TOKENS), generator=generator)
    depths = 1 + config.num_nextn_predict_layers
    labels = torch.randint(config.vocab_size, (ROWS, TOKENS, depths), generator=generator)
    objective = Objective((float(ROWS * TOKENS),) * depths, float(ROWS * TOKENS))
    count = ROWS * TOKENS
    firsts = {ROWS, count, count * config.num_experts_per_tok}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.dim() and tensor.shape[0] in firsts and storage.data_ptr() not in weights:
            # The tensor is held, so that its storage's address stays its own.
            seen.setdefault(storage.data_ptr(), (storage.nbytes(), tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(ids, torch.zeros_like(ids), labels, objective)
    assert output.total.requires_grad
    return sum(size for size, _ in seen.values()) / count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_closed_form_is_within_ten_percent_of_what_is_saved(variant, dtype):
    config = replace(BASE, **VARIANTS[variant])
    blocks = [(config.kind(i), config.ratio(i)) for i in range(3)] + [(LayerKind.swa, 0)]
    closed = sum(block_activation_bytes(config, k, r, dtype.itemsize).kept for k, r in blocks)
    closed += 2 * head_bytes(config, dtype.itemsize) + mtp_bytes(config, dtype.itemsize)
    assert closed == pytest.approx(saved_activations(config, dtype), rel=0.1)


@pytest.mark.core
def test_checkpointing_keeps_less_and_recomputes_the_rest():
    for kind, ratio in ((LayerKind.swa, 0), (LayerKind.csa, 4), (LayerKind.hca, 16)):
        none, block, selective = (
            block_activation_bytes(BASE, kind, ratio, 2, mode)
            for mode in ("none", "block", "selective")
        )
        assert none.running == 0
        assert block.kept == 2 * BASE.hc_mult * BASE.hidden_size
        assert block.running == none.kept
        assert block.kept < selective.kept < none.kept
        assert selective.kept + selective.running == none.kept


@pytest.mark.core
def test_absent_parts_cost_nothing():
    assert "mhc" not in saved_bytes(replace(BASE, residual=Residual.plain), LayerKind.swa, 0, 2)
    assert saved_bytes(replace(BASE, n_shared_experts=0), LayerKind.swa, 0, 2)["shared"] == 0
    assert {"indexer", "compressor"}.isdisjoint(saved_bytes(BASE, LayerKind.swa, 0, 2))
    assert "indexer" not in saved_bytes(BASE, LayerKind.hca, 16, 2)


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="activation_checkpoint=full"):
        block_activation_bytes(BASE, LayerKind.swa, 0, 2, "full")
