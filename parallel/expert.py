"""Expert parallelism: every rank of an ep group holds some of the routed experts whole.

The dispatcher sorts token copies by expert, as the local one does, and sends them to the ranks that
hold their experts; results come back the same way. Splits are uneven, no token is dropped. Rows
arrive sorted by sender and are put in order of (expert, sender), which is the order that one
process would have had.
"""

# Legend: N tokens, D hidden, K experts per token, R rows sent, Q rows received, P ranks of the ep
# group, L experts of a rank
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from model.kernels.gather import spread
from model.linear import GroupedLinear
from model.moe.dispatch import Dispatched, LocalDispatcher
from model.moe.layer import MoE


@dataclass(frozen=True)
class _Route:
    """What combine needs to send results back.

    Attributes:
        local: of this rank's own sort by expert.
        sent: rows sent to each rank.
        received: rows received from each rank.
        order_Q: received row that stands at each place.
        place_Q: its inverse.
    """

    local: Dispatched
    sent: list[int]
    received: list[int]
    order_Q: Tensor
    place_Q: Tensor


class AllToAllDispatcher:
    """Sends rows to their experts' ranks, behind the Protocol of ``model/moe/dispatch.py``.

    Args:
        group: ranks that share the experts, in the order of the experts they hold.
        sort: of this rank's own copies by expert.
    """

    def __init__(self, group: dist.ProcessGroup, sort: LocalDispatcher) -> None:
        self._group, self._ranks = group, group.size()
        self._sort = sort

    def dispatch(
        self, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, num_experts: int
    ) -> Dispatched:
        """Send K copies of every token to its experts' ranks."""
        local = self._sort.dispatch(x_ND, index_NK, weight_NK, num_experts)
        count_PL = local.offsets_E.diff(prepend=local.offsets_E.new_zeros(1)).view(self._ranks, -1)
        received_PL = torch.empty_like(count_PL)
        dist.all_to_all_single(received_PL, count_PL, group=self._group)
        sent, received = self.splits(count_PL, received_PL)
        expert_L = torch.arange(count_PL.shape[1], device=x_ND.device)
        expert_Q = expert_L.repeat(self._ranks).repeat_interleave(
            received_PL.flatten(), output_size=sum(received)
        )
        order_Q = expert_Q.argsort(stable=True)
        place_Q = torch.empty_like(order_Q)
        place_Q[order_Q] = torch.arange(len(order_Q), device=x_ND.device)
        rows_QD = self._exchange(local.rows_RD, received, sent)
        weight_Q1 = self._exchange(local.weight_R[:, None], received, sent)
        return Dispatched(
            rows_RD=spread(rows_QD, order_Q, place_Q[:, None]),
            weight_R=spread(weight_Q1, order_Q, place_Q[:, None])[:, 0],
            offsets_E=received_PL.sum(0).cumsum(0).to(torch.int32),
            state=_Route(local, sent, received, order_Q, place_Q),
        )

    def splits(self, count_PL: Tensor, received_PL: Tensor) -> tuple[list[int], list[int]]:
        """Rows sent to each rank and received from it: the one thing that is read on the host."""
        return count_PL.sum(1).tolist(), received_PL.sum(1).tolist()

    def combine(
        self, rows_RD: Tensor, dispatched: Dispatched, plus_ND: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Bring results home and sum each token's K, and ``plus``, in fp32."""
        route: _Route = dispatched.state
        rows_QD = spread(rows_RD, route.place_Q, route.order_Q[:, None])
        back_RD = self._exchange(rows_QD, route.sent, route.received)
        return self._sort.combine(back_RD, route.local, plus_ND, dtype)

    def _exchange(self, rows: Tensor, output: list[int], input_: list[int]) -> Tensor:
        return all_to_all_single_autograd(rows.contiguous(), output, input_, self._group)


def shard_experts(model: nn.Module, ep: DeviceMesh) -> int:
    """Give each rank of ``ep`` its experts, and let the MoE layers send rows to them.

    Args:
        model: holds :class:`model.moe.layer.MoE` modules; real or on the meta device.
        ep: the ep axis.

    Returns:
        Number of MoE layers.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for layer in layers:
        assert isinstance(layer.dispatcher, LocalDispatcher)
        layer.dispatcher = AllToAllDispatcher(ep.get_group(), layer.dispatcher)
        for linear in layer.experts.children():
            assert isinstance(linear, GroupedLinear)
            sharded = distribute_tensor(linear.weight.data, ep, [Shard(0)], src_data_rank=None)
            linear.weight = nn.Parameter(sharded)
            linear.__class__ = _LocalExperts
            object.__setattr__(linear, "ep", ep)
    return len(layers)


class _LocalExperts(GroupedLinear):
    """Reads ``weight`` as this rank's experts; the parameter itself stays global, under its name.

    The attribute is the seam: the op, quantised or not, then sees a plain tensor. Only what FSDP
    has gathered is read so: its shards, on a mesh of more axes, it reads and keeps itself.
    """

    ep: DeviceMesh

    @property
    def weight(self) -> Any:
        master: Any = self._parameters["weight"]
        gathered = isinstance(master, DTensor) and master.device_mesh == self.ep
        return master.to_local() if gathered else master

    @weight.setter
    def weight(self, value: Any) -> None:
        self._parameters["weight"] = value
