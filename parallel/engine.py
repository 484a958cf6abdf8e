"""The engine: everything about a step that depends on how the work is spread over processes.

``train`` decides what a step is (which rows, which weights, which learning rate) and asks an
:class:`Engine` to run it; layouts and DeepSpeed are further implementations. The engine here runs
one process and plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data.batch import Batch
from model.config import Router
from model.loss import ModelOutput, Objective
from model.moe.balance import update_bias
from model.moe.router import Gate
from model.sequence_plan import SequenceShard
from model.weight_copies import WeightCopies
from optim.build import Optimizer
from optim.clip import clip_grad_norm
from parallel.prefetch import prefetched


@dataclass
class Shares:
    """Results of microbatches, added up over microbatches and ranks.

    Attributes:
        total: the objective.
        losses: its parts, by name, without their weights.
        expert_load: gate name -> tokens per expert [E].
        monitors: ``<name>.sum`` and ``<name>.count``.
    """

    total: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    expert_load: dict[str, Tensor] = field(default_factory=dict)
    monitors: dict[str, Tensor] = field(default_factory=dict)

    def add(self, output: ModelOutput) -> None:
        """Add one microbatch."""
        self.merge(
            Shares(output.total.detach(), output.losses, output.expert_load, output.monitors)
        )

    def merge(self, other: Shares) -> None:
        """Add other microbatches, or those of another part of the model."""
        if other.total is not None:
            self.total = other.total if self.total is None else self.total + other.total
        for mine, theirs in (
            (self.losses, other.losses),
            (self.expert_load, other.expert_load),
            (self.monitors, other.monitors),
        ):
            for name, value in theirs.items():
                mine[name] = mine[name] + value if name in mine else value


@dataclass(frozen=True)
class Update:
    """What became of a step's gradients.

    Attributes:
        grad_norm: global norm before clipping.
        applied: False where the norm was not finite: weights and optimizer state are untouched.
    """

    grad_norm: float
    applied: bool


class Engine(Protocol):
    """One step of training, evaluation, and the state that a checkpoint holds.

    Attributes:
        model: the model, or the part of it that lives here; parameters bear their global names.
        optimizer: owns the parameters' updates.
        device: where this process computes.
        rank: number of this process; 0 writes files.
        data_rank: which share of a batch's rows this process computes.
        data_degree: number of such shares.
        shard: which part of those rows it computes.
        sharded: whether parameters are shards (DTensor), gathered anew for each use.
    """

    model: nn.Module
    optimizer: Optimizer
    device: torch.device
    rank: int
    data_rank: int
    data_degree: int
    shard: SequenceShard
    sharded: bool

    def forward_backward(self, batches: Iterable[Batch], objective: Objective) -> Shares:
        """Run this process's microbatches and leave the gradient of the whole global batch.

        Here and below microbatches are of whole rows; the engine takes its shard of them.
        """
        ...

    def evaluate(self, batches: Iterable[Batch], objective: Objective) -> Shares:
        """Run microbatches without gradients."""
        ...

    def choices(self, batches: Iterable[Batch], objective: Objective) -> list[dict[str, Tensor]]:
        """What every gate and indexer chooses in each microbatch, by name; no gradients."""
        ...

    def embedding_gradient(self, batch: Batch, objective: Objective) -> Tensor | None:
        """Gradient [B, T, D] of a batch's objective by its embeddings; moves nothing.

        None on ranks that do not hold the embedding.
        """
        ...

    def cut_rows(self, cp: int) -> None:
        """From now on rows are held in ``cp`` shards (context parallelism)."""
        ...

    def optimizer_step(self, lr: float, finite: bool) -> Update:
        """Clip, update, drop the gradients; nothing is updated unless all ranks are finite."""
        ...

    def update_biases(self, expert_load: dict[str, Tensor], speed: float) -> None:
        """Move every learned gate's selection bias by the global batch's load."""
        ...

    def set_trainable(self, trains: Callable[[str], bool]) -> None:
        """Freeze the parameters whose names ``trains`` denies: no gradient, decay, momentum."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint by layout-free name; loading fills them in place."""
        ...

    def take_up(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the tensors of :meth:`state`, which a checkpoint has filled. Collective."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """What the update moves, by name; whole or cut, maybe copies. Collective."""
        ...

    def stale(self) -> list[str]:
        """Parameters whose next forward pass would not read their master. Collective."""
        ...

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Gradients of the global batch by name, between backward and update. Collective."""
        ...

    def spread_rows(self, mine: Tensor) -> Tensor:
        """Values [R, T, ...] of what this process has of the global batch, for a checkpoint."""
        ...

    def agree(self, flag: bool) -> bool:
        """Whether any rank raised ``flag``."""
        ...

    def add_up(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum scalars over ranks, of which each may know other names."""
        ...

    def largest(self, number: float) -> float:
        """The largest of any rank."""
        ...

    def same_everywhere(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        ...


class TorchEngine:
    """One process, plain torch.

    Args:
        model: initialised, on ``device``.
        optimizer: of its parameters.
        device: where to compute.
        grad_clip: bound of the global gradient norm; 0 = none.
        masters: name -> fp32 master of a parameter that is bf16 here (``parallel/offload.py``).
    """

    rank = data_rank = 0
    data_degree = 1
    shard = SequenceShard()
    sharded = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        device: torch.device,
        grad_clip: float,
        masters: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.optimizer, self.device = model, optimizer, device
        self._masters = dict(masters or {})
        self._grad_clip = grad_clip
        self._copies = WeightCopies(model)

    def forward_backward(self, batches: Iterable[Batch], objective: Objective) -> Shares:
        """Accumulate the gradients of all microbatches; their losses are normalised already."""
        self._copy_weights()
        shares = Shares()
        for batch in self._shards(batches):
            output = self._forward(batch, objective)
            output.total.backward()
            shares.add(output)
        return shares

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], objective: Objective) -> Shares:
        """Run microbatches without gradients."""
        self._copy_weights()
        shares = Shares()
        for batch in self._shards(batches):
            shares.add(self._forward(batch, objective))
        return shares

    @torch.no_grad()
    def choices(self, batches: Iterable[Batch], objective: Objective) -> list[dict[str, Tensor]]:
        """What every gate and indexer chooses in each microbatch, by name."""
        self._copy_weights()
        records: list[dict[str, Tensor]] = []
        for batch in self._shards(batches):
            records.append({})
            self._forward(batch, replace(objective, record=records[-1]))
        return records

    def embedding_gradient(self, batch: Batch, objective: Objective) -> Tensor | None:
        """Gradient [B, T, D] of a batch's objective by the embeddings it reads first."""
        self._copy_weights()
        with self._embedding_as_leaf(self.model) as leaves:
            output = self._forward(batch.part(self.shard.index, self.shard.count), objective)
            return torch.autograd.grad(output.total, leaves[0])[0]

    def cut_rows(self, cp: int) -> None:
        """Rows stay whole."""
        assert cp == 1, cp

    def optimizer_step(self, lr: float, finite: bool) -> Update:
        """Clip and update; with a norm or loss that is not finite, only drop the gradients."""
        norm = clip_grad_norm(self.optimizer.trainable_parameters().values(), self._grad_clip)
        applied = finite and math.isfinite(norm)
        if applied:
            self.optimizer.step(lr)
        self.optimizer.zero_grad()
        return Update(norm, applied)

    @torch.no_grad()
    def update_biases(self, expert_load: dict[str, Tensor], speed: float) -> None:
        """Move every learned gate's selection bias by the global batch's load."""
        for name, module in self.model.named_modules():
            if isinstance(module, Gate) and module.router is Router.learned and name in expert_load:
                update_bias(module, expert_load[name], speed)

    def set_trainable(self, trains: Callable[[str], bool]) -> None:
        """Freeze the parameters for whose names ``trains`` is false."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trains(name))
        self.optimizer.set_trainable(trains)

    def state(self) -> dict[str, Tensor]:
        """``model.<name>`` of parameters and saved buffers, and ``optim.<name>.<state>``."""
        tensors = {f"model.{name}": t.detach() for name, t in self.model.state_dict().items()}
        tensors |= {f"model.{name}": master for name, master in self._masters.items()}
        for name, states in self.optimizer.state_dict().items():
            tensors |= {f"optim.{name}.{key}": t for key, t in states.items()}
        return tensors

    @torch.no_grad()
    def take_up(self, state: Mapping[str, Tensor]) -> None:
        """They are the model's and the optimizer's own; what is bf16 here follows its master."""
        for name, master in self._masters.items():
            self.model.get_parameter(name).copy_(master)

    def weights(self) -> Mapping[str, Tensor]:
        """The parameters, or their masters."""
        return dict(self.model.named_parameters()) | self._masters

    def stale(self) -> list[str]:
        """Parameters whose next forward pass would not read their master."""
        return [
            name
            for name, master in self._masters.items()
            if not torch.equal(self.model.get_parameter(name).cpu(), master.to(torch.bfloat16))
        ]

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Gradients of those that have one."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                yield name, parameter.grad

    def spread_rows(self, mine: Tensor) -> Tensor:
        """All rows are here."""
        return mine

    def agree(self, flag: bool) -> bool:
        """There is nobody else."""
        return flag

    def add_up(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """There is nobody else."""
        return values

    def largest(self, number: float) -> float:
        """There is nobody else."""
        return number

    def same_everywhere(self, number: int) -> int:
        """There is nobody else."""
        return number

    def gather(self, value: Any) -> list[Any]:
        """There is nobody else."""
        return [value]

    def _shards(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """This process's part of each, read ahead where the device gains by it."""
        return prefetched(
            (batch.part(self.shard.index, self.shard.count) for batch in batches), self.device
        )

    def _copy_weights(self) -> None:
        """Weights may have moved since the last pass: by a step, a load, a swap for an average."""
        self._copies.refresh(getattr(self.model, "compute_dtype", torch.float32))

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {
            "input_ids_BT": batch.input_ids_BT.to(self.device, non_blocking=True),
            "document_ids_BT": batch.document_ids_BT,  # the plan is built on the host
            "labels_BTK": batch.labels_BTK.to(self.device, non_blocking=True),
        }

    def _forward(self, batch: Batch, objective: Objective) -> ModelOutput:
        if batch.routing is not None:
            objective = replace(objective, replay=dict(batch.routing))
        return self.model(*self._inputs(batch).values(), objective)

    @contextmanager
    def _embedding_as_leaf(self, model: nn.Module) -> Iterator[list[Tensor]]:
        """Cut what the embedding gives off from its weight; the list has one tensor a call."""
        leaves: list[Tensor] = []

        def as_leaf(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[-1]

        handle = model.get_submodule("embed").register_forward_hook(as_leaf)
        try:
            yield leaves
        finally:
            handle.remove()
