"""The mesh: one DeviceMesh with axes pp, dp_replicate, dp_shard, cp and ep.

``cp`` and ``ep`` are folded out of the data axes: consecutive data ranks hold one row, and share
the routed experts. Parameters are sharded over ``dp_shard * cp`` ranks, whatever ``cp`` is, so a
stage of training may cut rows otherwise than the one before and no weight moves. What ``ep`` leaves
of the data axes shards each expert once more (FSDP) or, across replicas, copies it. So both axes
are made of two parts, one outside and one inside an ep group:

    dp_replicate  = replicas * replicas_in_ep       ep = replicas_in_ep * shards_in_ep
    dp_shard * cp = shards * shards_in_ep           experts: copied over replicas, FSDP over shards
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from model.config import ModelConfig
from parallel.config import ParallelConfig
from parallel.errors import ConfigError
from parallel.launch import launched_world_size
from parallel.pipeline_split import check_pipeline
from parallel.rendezvous import fresh_store

# One rank may prepare data for long while others wait; parallel/lost_rank.py shortens it then.
TIMEOUT = datetime.timedelta(hours=2)


@dataclass(frozen=True)
class Mesh:
    """The process's place in the layout.

    Attributes:
        layout: resolved degrees.
        root: all axes, ep folded out: pp, replicas, replicas_in_ep, shards, shards_in_ep.
        dense: dp_replicate and dp_shard (cp in it), for all parameters but routed experts.
        experts: replicas and shards that are left of the data axes, for the routed experts.
        ep: ranks that share the routed experts.
        data: all data ranks of this pipeline stage.
        pipeline: ranks that hold the stages for this process's tokens.
        contexts: by cp, the data ranks as groups that hold the same rows, by the shards of a row;
            of every cp above 1 that a stage has.
    """

    layout: ParallelConfig
    root: DeviceMesh
    dense: DeviceMesh
    experts: DeviceMesh
    ep: DeviceMesh
    data: DeviceMesh
    pipeline: DeviceMesh
    contexts: dict[int, DeviceMesh]

    @property
    def data_rank(self) -> int:
        """Number of this process among the data ranks."""
        return self.data.get_local_rank()


def init_process_group(device: torch.device) -> None:
    """Join the process group, once: a second job of a multirun finds it there.

    Args:
        device: of this process; CUDA computes over NCCL and talks over gloo besides.
    """
    if dist.is_initialized():
        return
    if launched_world_size() == 1:  # for an engine that wants a group of one
        rank, world_size, store = 0, 1, dist.HashStore()
    else:
        shared, rank, world_size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
        store = fresh_store(shared, rank, world_size, TIMEOUT)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)


def leave_process_group() -> None:
    """Leave in good order, once all jobs are done; nothing where none was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_layout(layout: ParallelConfig, model: ModelConfig, prefix: str = "parallel") -> None:
    """Refuse a resolved layout that this model or this code cannot run.

    Raises:
        ValueError: names the key, its value and what it does not go with.
    """
    check_pipeline(layout, model, prefix)
    if model.n_routed_experts % layout.ep:
        raise ConfigError(
            f"{prefix}.ep={layout.ep} must divide model.n_routed_experts={model.n_routed_experts}"
        )
    sharded = f"{prefix}.dp_shard={layout.dp_shard}"
    if layout.cp > 1:
        sharded += f" * {prefix}.cp={layout.cp}"
    if layout.shard_degree % layout.ep and layout.ep % layout.shard_degree:
        raise ConfigError(f"{prefix}.ep={layout.ep} must divide {sharded}, or be a multiple of it")
    shards = layout.shard_degree // math.gcd(layout.shard_degree, layout.ep)
    E, D, I = model.n_routed_experts, model.hidden_size, model.moe_intermediate_size  # noqa: E741
    if layout.ep > 1 and not all(expert_shard_dim(s, layout.ep, shards) >= 0
                                 for s in ((E, I, D), (E, D, I))):  # fmt: skip
        raise ConfigError(
            f"{prefix}.ep={layout.ep} leaves {E // layout.ep} experts to {shards} ranks of"
            f" {sharded}, which divide neither them nor"
            f" model.moe_intermediate_size={I} nor model.hidden_size={D}"
        )


def expert_shard_dim(shape: tuple[int, ...], ep: int, shards: int) -> int:
    """Dim along which a stacked expert weight is sharded over what ep leaves; -1: none divides.

    Args:
        shape: [E, out, in], all experts.
        ep: ranks that share the experts.
        shards: ranks that share those of one ep rank.
    """
    sizes = (shape[0] // ep, *shape[1:])
    return next((dim for dim, size in enumerate(sizes) if size % shards == 0), -1)


def build_mesh(
    layout: ParallelConfig,
    device_type: str,
    timeout: datetime.timedelta | None = None,
    cps: Iterable[int] = (),
) -> Mesh:
    """Make the mesh of a checked layout. Collective.

    Args:
        layout: resolved and checked.
        device_type: cpu or cuda.
        timeout: how long stages wait for each other; None: as long as torch lets them. The
            other axes' groups take what :func:`parallel.lost_rank.all_ready` gives them.
        cps: shards of a row that stages ask for, besides that of the layout.
    """
    in_ep = math.gcd(layout.shard_degree, layout.ep)
    replicas_in_ep = layout.ep // in_ep
    sizes = {
        "pp": layout.pp,
        "replicas": layout.dp_replicate // replicas_in_ep,
        "replicas_in_ep": replicas_in_ep,
        "shards": layout.shard_degree // in_ep,
        "shards_in_ep": in_ep,
    }
    own: dict[int | str, Any] | None = None
    if timeout is not None and device_type == "cpu" and layout.pp > 1:
        # gloo's send and receive keep the timeout with which their group was made.
        options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
        options._timeout = timeout
        own = {"pp": options}
    root = init_device_mesh(
        device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes), backend_override=own
    )
    replicate = root["replicas", "replicas_in_ep"]._flatten("dp_replicate")
    shard = root["shards", "shards_in_ep"]._flatten("dp_shard")
    data = root["replicas", "replicas_in_ep", "shards", "shards_in_ep"]._flatten("data")
    return Mesh(
        layout=layout,
        root=root,
        dense=DeviceMesh._concatenate([replicate, shard]) if layout.dp_replicate > 1 else shard,
        experts=root["replicas", "shards"] if sizes["replicas"] > 1 else root["shards"],
        ep=root["replicas_in_ep", "shards_in_ep"]._flatten("ep"),
        data=data,
        pipeline=root["pp"],
        contexts={
            cp: data._unflatten(0, (data.size() // cp, cp), (f"rows_of_{cp}", f"cp_of_{cp}"))
            for cp in sorted({layout.cp, *cps})
            if cp > 1
        },
    )
