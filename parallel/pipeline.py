"""Pipeline schedules of ``torch.distributed.pipelining`` over pipeline stages, and a relay.

A step runs a schedule: every rank calls :meth:`Pipeline.step` with its data rank's microbatches.
What has no backward pass, or a shape of its own (evaluation, sampling, the audit's probe), goes
from stage to stage by :meth:`Pipeline.relay`, for which no rule on the number of microbatches
holds.
"""

# Legend: B rows, T tokens, S streams, D hidden
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    get_schedule_class,
)

from data.batch import Batch
from parallel.mesh import Mesh
from parallel.pipeline_split import rank_of_stage, stages_per_rank
from parallel.pipeline_stage import PipelineStageModel


@dataclass(frozen=True)
class Action:
    """What a schedule ran on a stage.

    Attributes:
        kind: ``F`` forward, ``B`` backward, ``I`` backward of inputs, ``W`` of weights.
        stage: number of the stage.
        microbatch: number of the microbatch.
        start: seconds, of this machine's monotonic clock.
        stop: seconds.
    """

    kind: str
    stage: int
    microbatch: int
    start: float
    stop: float


class RecordedPipelineStage(PipelineStage):
    """Notes what ran and when: the audit and the drawn timeline go by it.

    The base class holds receive buffers for all microbatches of a step at once, which of V4-Pro's
    180 would be 170 GB a rank, and every output until its backward pass. Here a buffer comes with
    its receive operation and goes with its last use, and an output is let go once it is sent.
    """

    actions: list[Action]
    routings: Sequence[Mapping[str, Tensor] | None]  # of each microbatch

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """As in the base class."""
        assert isinstance(self.submod, PipelineStageModel)
        self.submod.routing = self.routings[fwd_chunk_id]  # not a keyword: it would be cut
        with self._noting("F", fwd_chunk_id):
            out = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _drop(self.args_recv_info[fwd_chunk_id])  # the backward pass has its own reference
        return out

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, **kwargs: Any
    ) -> None:
        """As in the base class."""
        with self._noting("B" if full_backward else "I", bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, **kwargs)
        _drop(self.grad_recv_info[bwd_chunk_id])

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """As in the base class."""
        self._allocate(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """As in the base class; from here on the operations alone hold the output."""
        ops = super().get_fwd_send_ops(fwd_chunk_id)
        if not self.is_last and self.has_backward:
            outputs, inputs = self.fwd_cache[fwd_chunk_id]
            self.fwd_cache[fwd_chunk_id] = (tuple(_Root.apply(x) for x in outputs), inputs)
        return ops

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """As in the base class."""
        self._allocate(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        super()._setup_forward_recv_info(1, has_backward)
        _drop(self.args_recv_info[0])
        for chunk in range(1, num_microbatches):
            self.args_recv_info[chunk] = tuple(copy(info) for info in self.args_recv_info[0])

    def _create_grad_recv_info(self, act_send_info: dict[int, Any]) -> Any:
        infos = super()._create_grad_recv_info(act_send_info)
        _drop(infos)
        return infos

    def _allocate(self, infos: Any) -> None:
        for info in infos:
            meta = info.tensor_meta
            if not info.is_root_arg and info.buffer is None and meta is not None:
                info.buffer = torch.empty(meta.shape, dtype=meta.dtype, device=self.device)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """As in the base class."""
        with self._noting("W", bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)

    @contextmanager
    def _noting(self, kind: str, microbatch: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        stop = time.perf_counter()
        self.actions.append(Action(kind, self.stage_index, microbatch, start, stop))


class _Root(torch.autograd.Function):
    """Stands for a stage's output where its gradient comes in: same shape, one element."""

    @staticmethod
    def forward(ctx: Any, x_BTSD: Tensor) -> Tensor:
        one = x_BTSD.new_zeros(1)  # set_, not expand: a view could not be detached in place
        return x_BTSD.new_empty(0).set_(one.untyped_storage(), 0, x_BTSD.shape, (0,) * x_BTSD.ndim)

    @staticmethod
    def backward(ctx: Any, grad_BTSD: Tensor) -> Tensor:
        return grad_BTSD


def _nothing_left() -> Callable[[], None]:
    """Of a backward pass that was not split: torch would recompute a block for each weight."""
    return lambda: None


def _drop(infos: Any) -> None:
    for info in infos:
        info.buffer = None


class Pipeline:
    """This rank's stages, and how they reach their neighbours.

    Args:
        stages: of this rank, in order.
        mesh: of the layout.
        device: where this process computes.

    Attributes:
        stages: the same.
        actions: of the last step, in order.
        schedule_name: class of the schedule that ran it.
    """

    def __init__(self, stages: list[PipelineStageModel], mesh: Mesh, device: torch.device) -> None:
        self.stages = stages
        self.actions: list[Action] = []
        self.schedule_name = ""
        self._device, self._schedule = device, mesh.layout.schedule
        self._group, self._size = mesh.pipeline.get_group(), mesh.layout.pp
        self._rank = mesh.pipeline.get_local_rank()
        self._count = self._size * stages_per_rank(self._schedule)
        self._built: tuple[tuple[int, ...], Any] = ((), None)
        self._runners: list[RecordedPipelineStage] = []

    def holder(self, index: int) -> int:
        """Global rank that holds a stage, in this process's pipeline."""
        return dist.get_global_rank(self._group, rank_of_stage(index, self._size, self._schedule))

    def backward_passes(self, block: str) -> int:
        """Backward passes through a block that recomputes, in the last step."""
        stage = next(s for s in self.stages if block in dict(s.named_modules()))
        return sum(a.kind in "BI" and a.stage == stage.parts.index for a in self.actions)

    @property
    def last_holder(self) -> int:
        """Global rank that holds the last stage."""
        return self.holder(self._count - 1)

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks of this pipeline."""
        return self._group

    def step(self, batches: list[Batch]) -> None:
        """Forward and backward of all microbatches, of one shape; leaves reduced gradients.

        Args:
            batches: of this process's data rank: the same on every rank of the pipeline.
        """
        whole = {
            name: torch.cat([getattr(batch, name) for batch in batches])
            for name in ("input_ids_BT", "document_ids_BT", "labels_BTK")
        }
        for name in ("input_ids_BT", "labels_BTK"):  # document ids stay on the host
            whole[name] = whole[name].to(self._device)
        schedule = self._schedule_for(len(batches), *batches[0].input_ids_BT.shape)
        for stage in self._runners:
            stage.routings = [batch.routing for batch in batches]
        self.actions.clear()
        self.schedule_name = type(schedule).__name__
        schedule.step(target=whole["labels_BTK"], return_outputs=False, **whole)

    def _schedule_for(self, count: int, rows: int, seq_len: int) -> Any:
        """The schedule of a shape; only the last is kept, as it owns receive buffers."""
        key = (count, rows, seq_len)
        if self._built[0] != key:
            self._built = (key, self._build(*key))
        return self._built[1]

    def _build(self, count: int, rows: int, seq_len: int) -> Any:
        x_BTSD = torch.empty(
            self.shape(rows, seq_len), dtype=self.stages[0].compute_dtype, device=self._device
        ).requires_grad_()
        total = torch.zeros((), device=self._device).requires_grad_()
        self._runners = stages = []
        for model in self.stages:
            stage = RecordedPipelineStage(
                model, model.parts.index, self._count, self._device,
                input_args=() if model.parts.first else (x_BTSD,),
                output_args=(total if model.parts.last else x_BTSD,),
                group=self._group, dw_builder=_nothing_left if model.recomputes else None,
            )  # fmt: skip
            stage.actions = self.actions
            stages.append(stage)
        kind: Any = get_schedule_class(self._schedule)
        held: Any = stages[0] if issubclass(kind, PipelineScheduleSingle) else stages
        return kind(held, count, loss_fn=_total, scale_grads=False)

    def shape(self, rows: int, seq_len: int) -> tuple[int, int, int, int]:
        """Of the streams that cross stages."""
        config = self.stages[0].config
        return rows, seq_len, config.num_streams, config.hidden_size

    def relay(
        self, rows: int, seq_len: int, run: Callable[[PipelineStageModel, Tensor | None], Tensor]
    ) -> Tensor | None:
        """Send one microbatch through all stages, forward alone.

        Args:
            rows: of the microbatch.
            seq_len: of a row.
            run: what a stage does with the streams of the one before.

        Returns:
            What the last stage gave; None on ranks that do not hold it.
        """
        out: Tensor | None = None
        for stage in self.stages:
            index = stage.parts.index
            x_BTSD = None if stage.parts.first else self._receive(index - 1, out, rows, seq_len)
            out = run(stage, x_BTSD)
            self._send(index + 1, out)
        return out if self.stages[-1].parts.last else None

    def relay_back(
        self,
        rows: int,
        seq_len: int,
        grad_of: Callable[[PipelineStageModel, Tensor | None], Tensor],
    ) -> Tensor | None:
        """Send a gradient back through all stages.

        Args:
            rows: of the microbatch.
            seq_len: of a row.
            grad_of: gradient of a stage's input, given that of its output (None on the last).

        Returns:
            What the first stage gave; None on ranks that do not hold it.
        """
        grad: Tensor | None = None
        for stage in reversed(self.stages):
            index = stage.parts.index
            above = None if stage.parts.last else self._receive(index + 1, grad, rows, seq_len)
            grad = grad_of(stage, above)
            self._send(index - 1, grad)
        return grad if self.stages[0].parts.first else None

    def logits(self, input_ids_BT: Tensor, document_ids_BT: Tensor) -> Tensor:
        """Logits [B, T, V], on every rank."""
        rows, seq_len = input_ids_BT.shape

        def run(stage: PipelineStageModel, x_BTSD: Tensor | None) -> Tensor:
            return stage.advance(x_BTSD, input_ids_BT, document_ids_BT)

        logits = self.relay(rows, seq_len, run)
        if logits is None:
            vocab = self.stages[0].config.vocab_size
            logits = torch.empty(rows, seq_len, vocab, device=self._device)
        dist.broadcast(logits, src=self.last_holder, group=self._group)
        return logits

    def _receive(self, source: int, own: Tensor | None, rows: int, seq_len: int) -> Tensor:
        if self.holder(source) == dist.get_rank():
            assert own is not None
            return own
        x_BTSD = torch.empty(
            self.shape(rows, seq_len), dtype=self.stages[0].compute_dtype, device=self._device
        )
        dist.recv(x_BTSD, src=self.holder(source), group=self._group)
        return x_BTSD

    def _send(self, target: int, x_BTSD: Tensor) -> None:
        if 0 <= target < self._count and self.holder(target) != dist.get_rank():
            dist.send(x_BTSD.detach().contiguous(), dst=self.holder(target), group=self._group)


def _total(output: Tensor, _: Tensor) -> Tensor:
    """The last stage returns the objective itself."""
    return output
