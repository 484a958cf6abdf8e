"""Every op of ``model/kernels/select.py`` by itself: its time, the plain path's, its roofline.

The calls are a model's own: one forward pass through a block of each kind notes the inputs of every
op, then the call with the most bytes is repeated, forward and with its backward pass, with the
kernels that the device takes and with plain torch. A part of ``bench gpu``.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from model.config import Kernels, ModelConfig
from model.init import init_weights
from model.kernels import select as table
from model.loss import Objective
from model.transformer import DeepSeekV4
from model.weight_copies import WeightCopies
from scripts.benchmarks.launches import kinds
from scripts.benchmarks.models import tokens
from scripts.gpu.traffic import bytes_of, op_flops
from train.preflight.cards import Card

_OVERWRITES = ("cross_entropy",)  # its logits; a copy of them is in its times
# Op -> its names in traffic.op_flops, forward and backward, and how often the backward one counts.
_COUNTED = {
    "attention": ("attention", "attention_backward", 1),
    "grouped_linear": ("grouped", "grouped", 2),
    "index_topk": ("index_topk", "", 0),
    "indexer_loss": ("", "indexer_loss_backward", 1),
    "mhc_pre": ("mhc_pre", "mhc_pre_backward", 1),
    "mhc_merge_pre": ("mhc_merge_pre", "mhc_merge_pre_backward", 1),
    "mhc_merge": ("mhc_merge", "mhc_merge_backward", 1),
    "mhc_head": ("mhc_head", "mhc_head_backward", 1),
    "pool_entries": ("pool", "pool_backward", 1),
}


@dataclass(frozen=True)
class Call:
    """One call of an op.

    Attributes:
        op: its name.
        layer: number of the block in :func:`one_of_each` that makes it.
        args: inputs.
        named: inputs by name.
    """

    op: str
    layer: int
    args: tuple[Any, ...]
    named: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the inputs."""
        return [*tensors_in(self.args), *tensors_in(tuple(self.named.values()))]


def one_of_each(config: ModelConfig) -> ModelConfig:
    """The same sizes with one block of each kind, and nothing predicted further ahead."""
    layers = [*kinds(config).values()]
    return replace(
        config,
        num_hidden_layers=len(layers),
        layer_kinds=[config.kind(i).value for i in layers],
        compress_ratios=[config.ratio(i) for i in layers],
        routers=[config.router(i) for i in layers],
        num_hash_layers=0,
        num_nextn_predict_layers=0,
    )


def calls_of(
    config: ModelConfig, rows: int, seq_len: int, device: torch.device, dtype: torch.dtype
) -> list[Call]:
    """The costliest call of each op in a forward pass with all losses.

    Args:
        config: of :func:`one_of_each`.
        rows: of the microbatch, each one document.
        seq_len: tokens of a row.
        device: where to compute.
        dtype: of the pass.
    """
    noted: list[Call] = []
    with _noting(noted) as block:
        model = DeepSeekV4(config)
        init_weights(model, 0)
        model.to(device)
        model.compute_dtype = dtype
        WeightCopies(model).refresh(dtype)
        for number, layer in enumerate(model.layers.values()):
            layer.register_forward_pre_hook(lambda *_, number=number: block.append(number))
        ids_BT = tokens(config, rows, seq_len, device)
        labels_BTK = ids_BT.roll(-1, 1)[..., None]
        documents_BT = torch.zeros(rows, seq_len, dtype=torch.int64)
        count = float(ids_BT.numel())
        model(ids_BT, documents_BT, labels_BTK, Objective((count,), count))
    largest: dict[str, Call] = {}
    for call in noted:
        known = largest.get(call.op)
        if known is None or bytes_of(call.tensors, []) > bytes_of(known.tensors, []):
            largest[call.op] = call
    return [largest[op] for op in sorted(largest)]


@contextmanager
def _noting(noted: list[Call]) -> Iterator[list[int]]:
    """Note every call of an op that a model built while it is open makes."""
    block = [0]
    chosen = table.select

    def select(op_name: str, *asked: Any) -> Callable[..., Any]:
        op = chosen(op_name, *asked)

        def call(*args: Any, **named: Any) -> Any:
            kept = map_tensors(torch.clone, args) if op_name in _OVERWRITES else args
            noted.append(Call(op_name, block[-1], kept, named))
            return op(*args, **named)

        return call

    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("model.") and getattr(module, "select", None) is chosen:
                stack.enter_context(patch.object(module, "select", select))
        yield block


def measured(
    call: Call, config: ModelConfig, rows: int, seq_len: int, one: Card, seconds: float
) -> dict[str, Any]:
    """Times of a call with the device's kernels and with plain torch, beside its roofline.

    Args:
        call: to repeat.
        config: of :func:`one_of_each`.
        rows: of its microbatch.
        seq_len: tokens of a row.
        one: rates of this device, measured.
        seconds: to spend on each time.
    """
    device = call.tensors[0].device
    kinds_of = table.active_kernels(Kernels.auto, device)
    result: dict[str, Any] = {"op": call.op, "kernels": kinds_of[call.op]}
    for name, kernels in (("ours", Kernels.auto), ("plain", Kernels.torch)):
        if name == "plain" and kinds_of[call.op] == "torch":
            result["plain"] = result["ours"]
            continue
        forward = _time(lambda k=kernels: run_call(call, k, False), device, seconds)
        both = _time(lambda k=kernels: run_call(call, k, True), device, seconds)
        result[name] = {"forward_seconds": forward, "with_backward_seconds": both}
    work, traffic = _work(call, config, rows, seq_len), _traffic(call)
    rate = one.fp32_tflops if call.tensors[0].dtype is torch.float32 else one.bf16_tflops
    bounds = [
        max(flops / (rate * 1e12), size / (one.bandwidth_gb * 1e9))
        for flops, size in zip(work, traffic, strict=True)
    ]
    result["roofline"] = {
        "forward_seconds": bounds[0], "with_backward_seconds": sum(bounds),
        "flops": list(work), "bytes": list(traffic),
    }  # fmt: skip
    return result


def run_call(call: Call, kernels: Kernels, backward: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Results of a call, and the gradients of its inputs where all results have gradients of one.

    Args:
        call: to repeat.
        kernels: which.
        backward: whether to differentiate.
    """
    leaves: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        fresh = x.detach().clone() if call.op in _OVERWRITES else x.detach()
        if x.requires_grad and backward:
            fresh.requires_grad_()
            leaves.append(fresh)
        return fresh

    args = map_tensors(leaf, call.args)
    named = {key: map_tensors(leaf, value) for key, value in call.named.items()}
    out = [*tensors_in(table.select(call.op, kernels)(*args, **named))]
    ends = [t for t in out if t.requires_grad]
    if not (ends and leaves):
        return out, []
    found = torch.autograd.grad(ends, leaves, [torch.ones_like(t) for t in ends], allow_unused=True)
    return out, [g for g in found if g is not None]


def _traffic(call: Call) -> tuple[int, int]:
    """Bytes of the forward and of the backward pass, each operand and result once."""
    results, grads = run_call(call, Kernels.auto, True)
    forward = bytes_of(call.tensors, results)
    return forward, bytes_of([*call.tensors, *results], grads) if grads else 0


def _work(call: Call, config: ModelConfig, rows: int, seq_len: int) -> tuple[float, float]:
    """FLOPs of the forward and of the backward pass."""
    count = rows * seq_len
    if call.op == "block_linear":
        wide = config.num_attention_heads * config.head_dim
        forward = 2.0 * count * config.o_lora_rank * wide
        return forward, 2 * forward
    layer = call.layer
    flops = op_flops(config, seq_len, config.kind(layer), config.ratio(layer), count)
    forward, backward, times = _COUNTED.get(call.op, ("", "", 0))
    return flops(forward, call.args), times * flops(backward, call.args)


def _time(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Median seconds of a call, after one that warms up and compiles."""
    work()
    found: list[float] = []
    begin = time.perf_counter()
    while len(found) < 3 or (time.perf_counter() - begin < seconds and len(found) < 200):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        else:
            before = time.perf_counter()
            work()
            found.append(time.perf_counter() - before)
    return statistics.median(found)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples, lists and records."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same value with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(change, item) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(change, item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: map_tensors(change, getattr(value, f.name)) for f in fields(value)}
        return replace(value, **changed)
    return value
