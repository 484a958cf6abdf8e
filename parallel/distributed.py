"""The engine of several processes: data, expert and context parallelism.

A step is the same as one process's: the rows are cut over the data ranks, each row maybe over
several, losses are shares of the global objective and are added up over ranks once, as are expert
loads and monitors; gradients are summed by FSDP. Whatever decides something (finite or not, stop or
not) is the same on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from data.batch import Batch
from model.kv_exchange import WholeRows
from model.loss import Objective
from model.transformer import DeepSeekV4
from optim.build import Optimizer
from optim.clip import scale_grads_, sharded_grad_norm
from parallel.collectives import add_up, add_up_loose, gathered
from parallel.config import CpScoring
from parallel.context_parallel import ShardedRows
from parallel.engine import Shares, TorchEngine, Update
from parallel.fsdp import follow_requires_grad, fsdp_modules
from parallel.mesh import Mesh


class RankedEngine(TorchEngine):
    """What several processes decide and add up together, however the model is spread over them.

    Args:
        model: initialised.
        optimizer: of its parameters.
        device: where this process computes.
        grad_clip: bound of the global gradient norm; 0 = none.
        mesh: this process's place.
    """

    sharded = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        device: torch.device,
        grad_clip: float,
        mesh: Mesh,
    ) -> None:
        super().__init__(model, optimizer, device, grad_clip)
        self._mesh = mesh
        self._group = dist.distributed_c10d._get_default_group()
        self.rank = dist.get_rank()
        self.data_rank, self.data_degree = mesh.data_rank, mesh.data.size()

    def spread_rows(self, mine: Tensor) -> Tensor:
        """The rows of all data ranks, in order."""
        return DTensor.from_local(mine, self._mesh.data, [Shard(0)], run_check=False)

    def agree(self, flag: bool) -> bool:
        """Whether any rank raised ``flag``."""
        return float(self._sum(torch.tensor(float(flag), device=self.device))) > 0

    def add_up(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum scalars over ranks; a rank may lack some of the names."""
        return add_up_loose(values)

    def largest(self, number: float) -> float:
        """The largest of any rank."""
        most = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return float(most)

    def same_everywhere(self, number: int) -> int:
        """Rank 0's number."""
        shared = torch.tensor(number, device=self.device)
        dist.broadcast(shared, src=0)
        return int(shared)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. Collective and slow."""
        return gathered(value)

    def _sum(self, value: Tensor) -> Tensor:
        dist.all_reduce(value, group=self._group)
        return value

    def _add_up(self, shares: Shares) -> Shares:
        return named_shares(add_up(flat_shares(shares), self._group))


class DistributedEngine(RankedEngine):
    """Several processes without pipeline stages.

    Args:
        model: sharded and initialised.
        optimizer: of its parameters.
        device: where this process computes.
        grad_clip: bound of the global gradient norm; 0 = none.
        mesh: this process's place.
        roots: modules that FSDP runs by themselves; None: the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        device: torch.device,
        grad_clip: float,
        mesh: Mesh,
        roots: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__(model, optimizer, device, grad_clip, mesh)
        self._roots = [root for root in roots or [model] if isinstance(root, FSDPModule)]
        assert len(self._roots) == len(roots or [model]), "shard the model first"
        self.cut_rows(mesh.layout.cp)

    def cut_rows(self, cp: int) -> None:
        """From now on rows are held in ``cp`` shards; no weight moves."""
        self.data_rank, self.data_degree = self._mesh.data_rank // cp, self._mesh.data.size() // cp
        exchange = WholeRows()
        if cp > 1:
            balanced = self._mesh.layout.cp_scoring is CpScoring.balanced
            exchange = ShardedRows(self._mesh.contexts[cp].get_group(1), balanced)
        self.shard = exchange.shard
        for root in self._roots:
            assert isinstance(root, DeepSeekV4)
            root.kv_exchange = exchange

    def forward_backward(self, batches: Iterable[Batch], objective: Objective) -> Shares:
        """Accumulate shards of the gradient; replicas are added up with the last microbatch."""
        shares = Shares()
        for batch, last in with_last(self._shards(batches)):
            for root in self._roots:
                root.set_requires_all_reduce(last)
            output = self._forward(batch, objective)
            output.total.backward()
            shares.add(output)
        return self._add_up(shares)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], objective: Objective) -> Shares:
        """Run microbatches without gradients; every rank must have as many."""
        shares = self._add_up(super().evaluate(batches, objective))
        self._let_go()
        return shares

    def choices(self, batches: Iterable[Batch], objective: Objective) -> list[dict[str, Tensor]]:
        """What every gate and indexer chooses in each of this process's microbatches."""
        records = super().choices(batches, objective)
        self._let_go()
        return records

    def embedding_gradient(self, batch: Batch, objective: Objective) -> Tensor | None:
        """As in the base class, of whole rows."""
        return self._whole_rows(super().embedding_gradient(batch, objective))

    def optimizer_step(self, lr: float, finite: bool) -> Update:
        """Clip and update; with a norm or loss that is not finite, only drop the gradients."""
        parameters = list(self.optimizer.trainable_parameters().values())
        norm = sharded_grad_norm(parameters, self._sum, self.device)
        scale_grads_(parameters, norm, self._grad_clip)
        applied = finite and math.isfinite(norm)
        if applied:
            self.optimizer.step(lr)
        self.optimizer.zero_grad()
        return Update(norm, applied)

    def set_trainable(self, trains: Callable[[str], bool]) -> None:
        """Freeze the parameters for whose names ``trains`` is false."""
        super().set_trainable(trains)
        for root in self._roots:
            for name, parameter in root.named_parameters():
                parameter.requires_grad_(trains(name))  # a stage may hold a copy of the embedding
            follow_requires_grad(root)

    def spread_rows(self, mine: Tensor) -> Tensor:
        """The rows of all data ranks, in order; of each the shards."""
        if self.shard.count == 1:
            return super().spread_rows(mine)
        mesh = self._mesh.contexts[self.shard.count]
        return DTensor.from_local(mine, mesh, [Shard(0), Shard(1)], run_check=False)

    def _whole_rows(self, x_BSD: Tensor | None) -> Tensor | None:
        """Shards of rows put together."""
        if x_BSD is None or self.shard.count == 1:
            return x_BSD
        parts = [torch.empty_like(x_BSD) for _ in range(self.shard.count)]
        group = self._mesh.contexts[self.shard.count].get_group(1)
        dist.all_gather(parts, x_BSD.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    def _let_go(self) -> None:
        """The root's group stays gathered after a forward pass alone."""
        for root in self._roots:
            for module in fsdp_modules(root):
                module.reshard()


def flat_shares(shares: Shares) -> dict[str, Tensor]:
    """All of them under one name each, ``<part>:<name>``."""
    assert shares.total is not None, "every data rank needs a microbatch"
    parts = {"losses": shares.losses, "load": shares.expert_load, "monitor": shares.monitors}
    flat = {f"{part}:{n}": v for part, values in parts.items() for n, v in values.items()}
    return flat | {"total:": shares.total}


def named_shares(flat: dict[str, Tensor]) -> Shares:
    """The inverse of :func:`flat_shares`."""
    named: dict[str, dict[str, Tensor]] = {"losses": {}, "load": {}, "monitor": {}, "total": {}}
    for key, value in flat.items():
        part, _, name = key.partition(":")
        named[part][name] = value
    return Shares(named["total"][""], named["losses"], named["load"], named["monitor"])


def with_last(batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each batch, and whether it is the last; one is read ahead."""
    before: Batch | None = None
    for batch in batches:
        if before is not None:
            yield before, False
        before = batch
    if before is not None:
        yield before, True
