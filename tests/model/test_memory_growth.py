"""Memory of a training step is linear in the sequence length (reference G).

Measured, not computed: the peak of the resident memory of a fresh process that takes one step with
every loss, above what it held before. Four times the tokens may take 4.4 times the memory (10 % for
pages and the allocator). The reference kernels, which make dense score matrices, must fail the
same bound: so it can tell.
"""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import torch

from model.config import Kernels, LayerKind, ModelConfig
from model.init import init_weights
from model.loss import Objective
from model.transformer import DeepSeekV4

CONFIG = ModelConfig(
    vocab_size=256, hidden_size=64, num_hidden_layers=4, q_lora_rank=32, num_attention_heads=4,
    head_dim=32, qk_rope_head_dim=8, o_groups=2, o_lora_rank=32,
    compress_ratios=[0, 4, 16, 0, 0],
    layer_kinds=[LayerKind(k) for k in ("swa", "csa", "hca", "dense")],
    sliding_window=32, index_n_heads=4, index_head_dim=32, index_topk=16, n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=32, loss_chunk_tokens=256,
)  # fmt: skip
SHORT, LONG = 512, 2048


def status_bytes(field: str) -> int:
    """Resident memory of this process now (``VmRSS``) or at its peak (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def step_bytes(tokens: int, kernels: str) -> int:
    """Peak of one step above what the process held before it."""
    torch.set_num_threads(1)
    model = DeepSeekV4(replace(CONFIG, kernels=Kernels(kernels)))
    init_weights(model, seed=0)

    def step(length: int) -> None:
        ids = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0))
        labels = ids[..., None].expand(1, length, 1 + CONFIG.num_nextn_predict_layers)
        objective = Objective((float(length),) * labels.shape[-1], float(length))
        model(ids, torch.zeros_like(ids), labels.contiguous(), objective).total.backward()

    step(64)  # libraries, compiled kernels, gradients
    before = status_bytes("VmRSS")
    step(tokens)
    return status_bytes("VmHWM") - before


def growth(kernels: str) -> float:
    """Memory of the long row over that of the short one, each in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        short, long = (pool.apply(step_bytes, (n, kernels)) for n in (SHORT, LONG))
    return long / short


def test_memory_of_a_step_grows_no_faster_than_its_tokens():
    assert growth("fast") < 1.1 * LONG / SHORT


def test_dense_scores_would_be_seen():
    assert growth("reference") > 1.1 * LONG / SHORT
