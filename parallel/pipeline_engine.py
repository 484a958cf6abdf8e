"""The engine of a pipeline: DistributedEngine whose forward and backward run a schedule.

Inside each stage everything is as without a pipeline: FSDP over the stage's data ranks, experts
over its ep groups, Muon over its shards. What is decided or reported goes over all ranks once:
losses and loads of every stage are added up, the gradient norm counts every parameter once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from data.batch import Batch
from model.loss import Objective
from optim.build import Optimizer
from parallel.collectives import add_up
from parallel.distributed import DistributedEngine, flat_shares, named_shares
from parallel.engine import Shares, Update
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline
from parallel.pipeline_stage import ModelPart, PipelineStageModel


class PipelineEngine(DistributedEngine):
    """Several processes with pipeline stages.

    Args:
        model: what this rank holds, sharded and initialised.
        optimizer: of its parameters.
        device: where this process computes.
        grad_clip: bound of the global gradient norm; 0 = none.
        mesh: this process's place.

    Attributes:
        pipeline: runs the stages.
    """

    def __init__(
        self,
        model: ModelPart,
        optimizer: Optimizer,
        device: torch.device,
        grad_clip: float,
        mesh: Mesh,
    ) -> None:
        super().__init__(model, optimizer, device, grad_clip, mesh, model.stages)
        self.pipeline = Pipeline(model.stages, mesh, device)
        model.run_logits = self._logits
        self._stages = model.stages
        self._copy = EmbeddingCopy(self.pipeline) if model.config.num_nextn_predict_layers else None
        self._shapes: dict[tuple[Any, ...], dict[str, torch.Size]] = {}

    def forward_backward(self, batches: Iterable[Batch], objective: Objective) -> Shares:
        """Run the schedule over all microbatches; leaves reduced gradients of every stage."""
        self._begin(objective)
        self.pipeline.step([batch.part(self.shard.index, self.shard.count) for batch in batches])
        self._let_go()
        if self._copy is not None and objective.mtp_weight:  # else nothing has read the copy
            self._copy.sum_gradients()
        return self._collect(objective)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], objective: Objective) -> Shares:
        """Send microbatches from stage to stage without gradients."""
        self._begin(objective)
        for batch in batches:
            self._pass_on(batch.part(self.shard.index, self.shard.count))
        self._let_go()
        return self._collect(objective)

    @torch.no_grad()
    def choices(self, batches: Iterable[Batch], objective: Objective) -> list[dict[str, Tensor]]:
        """What every gate and indexer of this rank's stages chooses in each microbatch."""
        records: list[dict[str, Tensor]] = []
        for batch in batches:
            records.append({})
            self._begin(replace(objective, record=records[-1]))
            self._pass_on(batch.part(self.shard.index, self.shard.count))
        self._let_go()
        return records

    def embedding_gradient(self, batch: Batch, objective: Objective) -> Tensor | None:
        """As in the base class; None on ranks without the first stage."""
        self._begin(objective)
        batch = batch.part(self.shard.index, self.shard.count)
        inputs = self._inputs(batch)
        ran: dict[int, tuple[Tensor | None, Tensor]] = {}

        def forward(stage: PipelineStageModel, x_BTSD: Tensor | None) -> Tensor:
            x_BTSD = None if x_BTSD is None else x_BTSD.detach().requires_grad_()
            if stage.parts.first:
                with self._embedding_as_leaf(stage) as leaves:
                    out = stage(x_BTSD, **inputs)
                x_BTSD = leaves[0]
            else:
                out = stage(x_BTSD, **inputs)
            ran[stage.parts.index] = x_BTSD, out
            return out.detach()

        def backward(stage: PipelineStageModel, grad: Tensor | None) -> Tensor:
            x, out = ran.pop(stage.parts.index)
            assert x is not None
            return torch.autograd.grad(out, x, grad)[0]

        rows, seq_len = batch.input_ids_BT.shape
        self.pipeline.relay(rows, seq_len, forward)
        grad = self.pipeline.relay_back(rows, seq_len, backward)
        self._let_go()
        return self._whole_rows(grad)

    def optimizer_step(self, lr: float, finite: bool) -> Update:
        """Clip by the norm over all stages and update; the copy of the embedding follows."""
        update = super().optimizer_step(lr, finite)
        if self._copy is not None and update.applied:
            self._copy.refresh()
        return update

    def state(self) -> dict[str, Tensor]:
        """Tensors of this rank's part of a checkpoint; loading fills them in place.

        Raises:
            RuntimeError: the copy of the embedding has other bits.
        """
        if self._copy is not None and self.agree(self._copy.differs()):
            raise RuntimeError("the two copies of embed.weight differ between pipeline stages")
        return super().state()

    def _begin(self, objective: Objective) -> None:
        if self._copy is not None:
            self._copy.follow()
        for stage in self._stages:
            stage.begin(objective)

    def _pass_on(self, batch: Batch) -> None:
        inputs = self._inputs(batch)
        rows, seq_len = batch.input_ids_BT.shape
        self.pipeline.relay(rows, seq_len, lambda stage, x: stage(x, **inputs))

    def _logits(self, input_ids_BT: Tensor, document_ids_BT: Tensor) -> Tensor:
        if self._copy is not None:
            self._copy.follow()
        logits = self.pipeline.logits(input_ids_BT, document_ids_BT)
        self._let_go()
        return logits

    def _collect(self, objective: Objective) -> Shares:
        """Every stage's shares added up, over all ranks; the same on each."""
        mine = Shares()
        for stage in self._stages:
            mine.merge(stage.shares)
        flat = flat_shares(mine)
        shapes = self._all_shapes(flat, objective)
        zeros = {n: torch.zeros(s, device=self.device) for n, s in shapes.items() if n not in flat}
        return named_shares(add_up(flat | zeros, self._group))

    def _all_shapes(self, mine: dict[str, Tensor], objective: Objective) -> dict[str, torch.Size]:
        """Names and shapes that any rank reports; asked once for each kind of objective."""
        key = (
            torch.is_grad_enabled(), objective.monitors, objective.mtp_weight != 0,
            objective.indexer_weight != 0, objective.balance_weight != 0, objective.indexer_phase,
        )  # fmt: skip
        if key not in self._shapes:
            shapes = self.gather({name: value.shape for name, value in mine.items()})
            self._shapes[key] = {name: shape for some in shapes for name, shape in some.items()}
        return self._shapes[key]


class EmbeddingCopy:
    """The embedding that MTP reads on the last stage: a follower of the first stage's.

    One parameter, one optimizer state, one entry in norms, tables and checkpoints: the first
    stage's. The copy sends its gradient there and receives the moved weight, shard by shard.

    Args:
        pipeline: holds both.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        first, last = pipeline.stages[0], pipeline.stages[-1]
        self._group = pipeline.group
        self._first, self._last = pipeline.holder(0), pipeline.last_holder
        self._original = first.embed.weight if first.parts.first else None
        self._copy = last.embed.weight if last.copies_embedding else None
        self._may_differ = True  # something may have been loaded into the original

    def sum_gradients(self) -> None:
        """Add the copy's gradient to the original's, on all data ranks alike."""
        theirs: Tensor | None = None
        if self._copy is not None and self._copy.requires_grad:
            theirs = _gradient(self._copy).clone()
            self._copy.grad = None
            if self._first != self._last:
                dist.send(theirs, dst=self._first, group=self._group)
        if self._original is not None and self._original.requires_grad:
            mine = _gradient(self._original)
            if theirs is None:
                theirs = torch.empty_like(mine)
                dist.recv(theirs, src=self._last, group=self._group)
            mine.add_(theirs)

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the original's bits to the copy."""
        weight = self._sent()
        if self._copy is not None:
            assert weight is not None
            _local(self._copy).copy_(weight)
        self._may_differ = False

    def follow(self) -> None:
        """Refresh if something may have changed the original since."""
        if self._may_differ:
            self.refresh()

    def differs(self) -> bool:
        """Whether the copy, as last used, has other bits; from now on it may differ."""
        weight = None if self._may_differ else self._sent()
        self._may_differ = True
        return weight is not None and self._copy is not None and not torch.equal(
            _local(self._copy), weight
        )  # fmt: skip

    def _sent(self) -> Tensor | None:
        """The original's shard, where the copy is."""
        if self._original is not None and self._first != self._last:
            dist.send(_local(self._original), dst=self._last, group=self._group)
        if self._copy is None:
            return None
        if self._original is not None:
            return _local(self._original)
        weight = torch.empty_like(_local(self._copy))
        dist.recv(weight, src=self._first, group=self._group)
        return weight


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()


def _gradient(parameter: Tensor) -> Tensor:
    """This rank's shard of a gradient; made where there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return _local(parameter.grad)
