"""What tests of several packages share: distances, a tiny model, packed rows, several ranks."""

# Legend: B rows, T tokens, K prediction depths
from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from data.batch import IGNORE, Batch, BatchCounts
from model.config import ModelConfig
from model.init import init_weights
from model.transformer import DeepSeekV4

ROOT = Path(__file__).resolve().parents[1]


def relative(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of a - b over that of b, in float64; 0 where both are zero."""
    a, b = a.detach().double(), b.detach().double()
    if torch.equal(a, b):
        return 0.0
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


def calc_diff(a: Tensor, b: Tensor) -> float:
    """1 - 2 a.b / (a.a + b.b) in float64: 0 where equal, about relative^2 / 2 nearby."""
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    return float(1 - 2 * (a @ b) / (a @ a + b @ b).clamp(min=1e-300))


def tiny_config(**changes: Any) -> ModelConfig:
    """``conf/model/v4_tiny.yaml`` with some keys changed."""
    values = yaml.safe_load((ROOT / "conf" / "model" / "v4_tiny.yaml").read_text())
    known = {f.name for f in fields(ModelConfig)}
    return ModelConfig(**{k: v for k, v in values.items() if k in known} | changes)


def tiny_model(seed: int = 0, **changes: Any) -> DeepSeekV4:
    """An initialised model of :func:`tiny_config`."""
    model = DeepSeekV4(tiny_config(**changes))
    init_weights(model, seed)
    return model


def small_config(**changes: Any) -> ModelConfig:
    """Three layers that still hold every kind: hash swa, csa, hca, then a MTP block. Fast."""
    shape: dict[str, Any] = {
        "num_hidden_layers": 3,
        "compress_ratios": [0, 4, 8, 0],
        "layer_kinds": ["swa", "csa", "hca"],
        "hidden_size": 32,
        "vocab_size": 128,
        "num_attention_heads": 2,
        "head_dim": 16,
        "q_lora_rank": 16,
        "o_lora_rank": 16,
        "index_n_heads": 16,
        "index_head_dim": 16,
        "index_topk": 4,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "sliding_window": 8,
    }
    return tiny_config(**(shape | changes))


def small_model(seed: int = 0, **changes: Any) -> DeepSeekV4:
    """An initialised model of :func:`small_config`."""
    model = DeepSeekV4(small_config(**changes))
    init_weights(model, seed)
    return model


@dataclass(frozen=True)
class Rows:
    """A whole global batch as one :class:`Batch`."""

    whole: Batch
    counts: BatchCounts

    def batch(self, start: int, stop: int) -> Batch:
        """Rows ``start:stop``."""
        b = self.whole
        return Batch(
            b.input_ids_BT[start:stop], b.document_ids_BT[start:stop], b.labels_BTK[start:stop]
        )


def random_rows(
    num_rows: int, seq_len: int, vocab_size: int, num_depths: int = 2, seed: int = 0
) -> Rows:
    """Rows of documents of random, unequal length; every second row ends in padding."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    ids = torch.zeros(num_rows, seq_len, dtype=torch.long)
    documents = torch.full((num_rows, seq_len), -1)
    labels = torch.full((num_rows, seq_len, num_depths), IGNORE)
    pieces = 0
    for row in range(num_rows):
        used = seq_len - (draw(1, seq_len // 3) if row % 2 else 0)
        begin = 0
        while begin < used:
            end = min(used, begin + draw(3, seq_len))
            text = torch.randint(1, vocab_size, (end - begin,), generator=generator)
            ids[row, begin:end], documents[row, begin:end] = text, pieces
            for k in range(num_depths):
                labels[row, begin : end - 1 - k, k] = text[1 + k :]
            begin, pieces = end, pieces + 1
    counts = BatchCounts(
        tokens=int((documents >= 0).sum()),
        targets_K=tuple(int((labels[..., k] != IGNORE).sum()) for k in range(num_depths)),
        documents=pieces,
    )
    return Rows(Batch(ids, documents, labels), counts)


def warm_context() -> ForkServerContext:
    """Starts processes as forks of one that has a run's imports (``tests/preloaded.py``)."""
    multiprocessing.set_forkserver_preload(["tests.preloaded"])
    return multiprocessing.get_context("forkserver")


def run_distributed(
    fn: Callable[..., None], world_size: int, *args: Any, backend: str = "gloo"
) -> None:
    """Run ``fn(rank, world_size, *args)`` on ranks of this machine; a failure fails the test.

    ``fn`` must be a module-level function. With a backend for CUDA each rank has a device.
    """
    warm_context()
    with tempfile.TemporaryDirectory() as folder:
        given = (fn, world_size, f"{folder}/store", backend, dict(os.environ), args)
        mp.start_processes(_rank, given, nprocs=world_size, start_method="forkserver")


def _rank(
    rank: int,
    fn: Callable[..., None],
    world_size: int,
    store: str,
    backend: str,
    environment: dict[str, str],
    args: tuple[Any, ...],
) -> None:
    faulthandler.enable()  # a crash of native code says where Python was
    os.environ.clear()  # that of the process they are forked from is the first test's
    os.environ.update(environment)
    torch.set_num_threads(1)
    if "cuda" in backend:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        fn(rank, world_size, *args)
    finally:
        dist.destroy_process_group()


def table_load(table_VK: Tensor, num_experts: int, counts_V: Tensor | None = None) -> Tensor:
    """Tokens each expert receives under a hash table, int64 [E]; counts None: one of each id."""
    vocab_size, k = table_VK.shape
    counts_V = torch.ones(vocab_size, dtype=torch.int64) if counts_V is None else counts_V
    load_E = torch.zeros(num_experts, dtype=torch.int64)
    return load_E.index_add_(0, table_VK.flatten(), counts_V.long().repeat_interleave(k))


class LiveBytes(TorchDispatchMode):
    """Bytes of storages that were made inside, while they live; the most of them at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in tree_flatten((args, kwargs))[0]
                 if isinstance(t, torch.Tensor)}  # fmt: skip
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in given:
                self._count(tensor)
        return out

    def _count(self, tensor):
        size = tensor.untyped_storage().nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(tensor, self._free, size)

    def _free(self, size):
        self.now -= size
