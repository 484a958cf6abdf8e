"""What a pass moves and multiplies, operation by operation, from a trace (``bench roofline``).

Bytes are those of every operand and every result once; FLOPs of a matmul follow from its shapes,
those of our operators are what ``model/flops.py`` counts, so that a block's sum is that file's.
"""

# Legend: T tokens, S streams, D hidden
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.config import LayerKind, ModelConfig
from model.flops import mean_keys
from model.kernels.triton.launch import IMPLEMENTATIONS, counted
from model.loss import Objective
from model.transformer import DeepSeekV4
from model.weight_copies import WeightCopies
from scripts.benchmarks.launches import computes, meta_block, trace_block
from train.preflight.cards import Card

LAUNCH_SECONDS = 4e-6
_MATMULS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1}  # place of the first factor


@dataclass
class Operation:
    """Calls of one operation on equal shapes.

    Attributes:
        name: ``aten::mm``, ``v4::triton_attention`` ...
        calls: how often.
        launches: kernels that a call starts.
        bytes: of a call's operands and results.
        flops: of a call.
        fp32: whether these run in fp32.
    """

    name: str
    calls: int
    launches: int
    bytes: int
    flops: float
    fp32: bool

    def seconds(self, one: Card) -> tuple[float, str]:
        """Least time of all calls on a card, and what binds it: compute, memory or launches."""
        rate = one.fp32_tflops if self.fp32 else one.bf16_tflops
        bounds = {
            "compute": self.flops / (rate * 1e12),
            "memory": self.bytes / (one.bandwidth_gb * 1e9),
            "launches": self.launches * LAUNCH_SECONDS,
        }
        binding = max(bounds, key=lambda name: bounds[name])
        return self.calls * bounds[binding], binding


Flops = Callable[[str, Sequence[Any]], float]


class Traffic(TorchDispatchMode):
    """Notes operations while it is active: bytes, launches, FLOPs.

    Args:
        flops_of: FLOPs of an operator of ``torch.ops.v4`` by name and operands.
        device: where the pass computes; what runs elsewhere (a plan, on the host) is left out.

    Attributes:
        found: the operations, calls of equal shapes together.
    """

    def __init__(self, flops_of: Flops, device: str = "meta") -> None:
        super().__init__()
        self._device = device
        self.found: dict[tuple[Any, ...], Operation] = {}
        self._flops_of = flops_of
        self._launches = 0
        self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        implementation = IMPLEMENTATIONS.get(name)
        if implementation is None:
            out = func(*args, **kwargs)
            if computes(func):
                self._launches += 1
                if not self._inside:
                    self._note(name, [*args, kwargs], out, 1)
            return out
        before, outside = self._launches, self._inside
        self._inside = True
        try:
            with self, counted() as kernels:
                out = implementation(*args, **kwargs)
        finally:
            self._inside = outside
        self._launches += sum(kernels.values())
        if not self._inside:
            self._note(name, [*args, kwargs], out, self._launches - before)
        return out

    def _note(self, name: str, args: Sequence[Any], out: Any, launches: int) -> None:
        operands = [a for a in tree_leaves(args) if isinstance(a, Tensor)]
        results = [r for r in tree_leaves(out) if isinstance(r, Tensor)]
        if all(t.device.type != self._device for t in (*operands, *results)):
            return
        written = args[-1].get("out") if isinstance(args[-1], dict) else None
        operands = [a for a in operands if a is not written]
        if name == "aten::embedding":  # reads rows alone
            operands = [*operands[1:], *results]
        traffic = bytes_of(operands, results)
        if name in _MATMULS:
            flops = matmul_flops(*operands[_MATMULS[name] :][:2])
        else:
            flops = self._flops_of(name, args)
        fp32 = bool(operands) and operands[0].dtype is torch.float32
        key = (name, launches, traffic, flops, fp32)
        known = self.found.setdefault(key, Operation(name, 0, launches, traffic, flops, fp32))
        known.calls += 1


def bytes_of(operands: Iterable[Tensor], results: Iterable[Tensor]) -> int:
    """Of every operand once and every result once; what is written in place is both."""
    return sum(t.numel() * t.element_size() for some in (operands, results) for t in some)


def matmul_flops(a: Tensor, b: Tensor) -> float:
    """Of a product, batched or not."""
    return 2.0 * a.numel() * b.shape[-1]


def op_flops(config: ModelConfig, seq_len: int, kind: LayerKind, ratio: int, tokens: int) -> Flops:
    """FLOPs of our operators in a block, as ``model/flops.py`` counts them.

    Args:
        config: the model.
        seq_len: tokens of a row.
        kind: of the block.
        ratio: tokens of an entry.
        tokens: of the microbatch.
    """
    keys = mean_keys(config, kind, ratio, seq_len, "sparse", True)
    core = 4.0 * config.num_attention_heads * config.head_dim * keys.core * tokens
    score = 2.0 * config.index_n_heads * (config.index_head_dim + 1) * tokens
    streams = config.num_streams

    wide = config.num_streams * config.hidden_size * tokens

    def grouped(args: Sequence[Any]) -> float:
        return 2.0 * args[0].shape[0] * args[1].shape[-1] * args[1].shape[-2]

    def weight_gradient(args: Sequence[Any]) -> float:
        return 2.0 * args[0].shape[0] * args[0].shape[-1] * args[1].shape[-1]

    table: Mapping[str, tuple[float, Callable[[Sequence[Any]], float]]] = {
        "grouped": (1.0, grouped),
        "grouped_weight_gradient": (1.0, weight_gradient),
        "index_topk": (1.0, lambda _: score * keys.scored),
        "indexer_loss_backward": (2.0, lambda _: score * keys.taught),
        "blocks": (2.0, lambda args: args[0].shape[0] * args[1].numel()),
    }
    both: Mapping[str, Callable[[Sequence[Any]], float]] = {
        "attention": lambda _: core,
        "mhc_pre": lambda _: 2.0 * wide * ((2 + streams) * streams + 1),
        "mhc_merge_pre": lambda _: 2.0 * wide * ((2 + streams) * streams + 2 + streams),
        "mhc_merge": lambda _: 2.0 * wide * (1 + streams),
        "mhc_head": lambda _: 2.0 * wide * (1 + streams),
        "pool": lambda args: 2.0 * args[0].numel(),
    }
    table = {
        **table,
        **{name: (1.0, count) for name, count in both.items()},
        **{f"{name}_backward": (2.0, count) for name, count in both.items()},
    }

    def flops(name: str, args: Sequence[Any]) -> float:
        factor, count = table.get(name.removeprefix("v4::triton_"), (0.0, lambda _: 0.0))
        return factor * count(args)

    return flops


@dataclass
class TracedPass:
    """Operations of a forward and a backward pass."""

    forward: list[Operation]
    backward: list[Operation]

    @property
    def all(self) -> list[Operation]:
        """Of both."""
        return [*self.forward, *self.backward]


def block_traffic(config: ModelConfig, layer: int, rows: int, seq_len: int) -> TracedPass:
    """Operations of one block with all its losses.

    Args:
        config: the model, its kernels those of a GPU.
        layer: number of the block.
        rows: of the microbatch, each one document.
        seq_len: tokens of a row.
    """
    flops = op_flops(config, seq_len, config.kind(layer), config.ratio(layer), rows * seq_len)
    forward, backward = Traffic(flops), Traffic(flops)
    trace_block(meta_block(config, layer), config, seq_len, forward, backward, rows)
    return TracedPass([*forward.found.values()], [*backward.found.values()])


def model_traffic(config: ModelConfig, rows: int, seq_len: int, head: torch.dtype) -> TracedPass:
    """Operations of a whole pass of a model whose blocks all have only a window.

    Args:
        config: the model.
        rows: of the microbatch, each one document.
        seq_len: tokens of a row.
        head: dtype of the head's products.
    """
    meta = torch.device("meta")
    with meta:
        model = DeepSeekV4(config)
    model.compute_dtype, model.head_dtype = torch.bfloat16, head
    WeightCopies(model).refresh(torch.bfloat16)
    depths = 1 + config.num_nextn_predict_layers
    ids = torch.zeros(rows, seq_len, dtype=torch.int64, device=meta)
    labels = torch.zeros(rows, seq_len, depths, dtype=torch.int64, device=meta)
    documents = torch.zeros(rows, seq_len, dtype=torch.int64)
    flops = op_flops(config, seq_len, LayerKind.swa, 0, rows * seq_len)
    forward, backward = Traffic(flops), Traffic(flops)
    with forward:
        output = model(ids, documents, labels, Objective((1.0,) * depths, 1.0))
    with backward:
        output.total.backward()
    return TracedPass([*forward.found.values()], [*backward.found.values()])
