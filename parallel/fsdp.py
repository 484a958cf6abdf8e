"""FSDP2 and HSDP: groups of parameters that are gathered together, by the precision table.

FSDP casts all parameters of a group alike, so each block has two groups under bf16: the large
matmuls, and everything that computes in fp32 (model/precision.py). Embedding, head and what stands
beside them are the root's group, gathered in fp32: they are used several times in a pass (MTP), and
their gradients have to add up in fp32.

Losses are shares of the global objective, so gradients are summed over ranks, never divided.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from model.block import Block
from model.init import Region, whole
from model.moe.experts import Experts
from model.mtp import MTPBlock
from model.precision import precision_of
from model.transformer import DeepSeekV4
from parallel.mesh import Mesh, expert_shard_dim


def shard_model(
    model: DeepSeekV4,
    mesh: Mesh,
    precision: str,
    reads_master: Callable[[str], bool] = lambda name: False,
    graphs: bool = False,
) -> None:
    """Shard every parameter of ``model``; experts are on the ep axis already where ep > 1.

    Args:
        model: on the meta device, or on the mesh's.
        mesh: of the layout.
        precision: ``fp32`` or ``bf16``.
        reads_master: whether a parameter is gathered in fp32 whatever the precision, because what
            reads it rounds it itself (``quant``); else exported and trained values would differ.
        graphs: blocks are graphs (``parallel/compiled_blocks.py``). A group of modules inside a
            block is gathered in front of the first of them, in the midst of the graph: so a block
            is one group, gathered in fp32, of which the graph makes bf16 where it computes in it.
    """
    # Nothing here writes into what a block returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    in_bf16 = _bf16_modules(model, precision, reads_master)
    for module in model.modules():
        if isinstance(module, Block):
            _shard_block(module, mesh, in_bf16, graphs)
    fully_shard(model, **_options(mesh, torch.float32))
    register_fsdp_forward_method(model, "logits")
    register_fsdp_forward_method(model, "mtp_logits")
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _bf16_modules(
    model: nn.Module, precision: str, reads_master: Callable[[str], bool]
) -> set[nn.Module]:
    """Modules whose own parameters are gathered in bf16."""
    return {
        module
        for name, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is not None
        and precision_of(f"{name}.{key}", precision).compute == torch.bfloat16
        and not reads_master(f"{name}.{key}")
    }


def _shard_block(block: Block, mesh: Mesh, in_bf16: set[nn.Module], graphs: bool) -> None:
    if mesh.layout.ep > 1:
        _shard_experts(block.ffn.experts, mesh, in_bf16)
    groups: list[list[nn.Module]] = []
    if isinstance(block, MTPBlock):  # used around the block's own forward, not in it
        groups.append([m for m in (block.enorm, block.hnorm, block.norm, block.hc_head)
                       if next(m.parameters(), None) is not None])  # fmt: skip
        groups.append([block.e_proj, block.h_proj])
    taken = {module for group in groups for module in group}
    if mesh.layout.ep > 1:
        taken.update(block.ffn.experts.modules())
    if not graphs:
        groups.append([m for m in block.modules() if m in in_bf16 and m not in taken])
    for group in groups:
        if group:
            fully_shard(group, **_options(mesh, _dtype(group[0], in_bf16)))
    fully_shard(block, **_options(mesh, torch.float32))


def _shard_experts(experts: Experts, mesh: Mesh, in_bf16: set[nn.Module]) -> None:
    """FSDP over what ep leaves of the data axes.

    Whole experts where they divide evenly, so that Muon need not gather them; else rows or columns.
    """
    ep, shards = mesh.layout.ep, mesh.root["shards"].size()

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(expert_shard_dim(tuple(parameter.shape), ep, shards))

    options = _options(mesh, _dtype(experts.w1, in_bf16))
    options["mesh"] = mesh.experts
    fully_shard(experts, **options, shard_placement_fn=placement)


def _dtype(module: nn.Module, in_bf16: set[nn.Module]) -> torch.dtype:
    return torch.bfloat16 if module in in_bf16 else torch.float32


def _options(mesh: Mesh, compute: torch.dtype) -> dict[str, Any]:
    """Arguments of ``fully_shard``; a pipeline stage stays gathered for a step."""
    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    resharding = {"reshard_after_forward": False} if mesh.layout.pp > 1 else {}
    return {"mesh": mesh.dense, "mp_policy": policy, **resharding}


def region_of(tensor: Tensor) -> Region:
    """The part of a parameter that this process holds, for ``model/init.py``."""
    if not isinstance(tensor, DTensor):
        return whole(tensor)
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    slices = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
    return Region(tensor.to_local(), tuple(tensor.shape), slices)


def fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    """All modules that FSDP wraps."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def follow_requires_grad(model: nn.Module) -> None:
    """Let what is gathered require gradients as its shards do: FSDP decides once, at first use."""
    for module in fsdp_modules(model):
        for group in module._get_fsdp_state()._fsdp_param_groups:
            for parameter in group.fsdp_params:
                if hasattr(parameter, "_unsharded_param"):
                    wanted = parameter.sharded_param.requires_grad
                    parameter._unsharded_param.requires_grad_(wanted)
