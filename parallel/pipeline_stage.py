"""One pipeline stage: a piece of the model under its global names, and what a rank holds of them.

A stage is a DeepSeekV4 without the modules that live elsewhere, so names, initialisation,
sharding and checkpoints are those of the whole model. Streams [B, T, S, D] cross stages; token ids,
document ids and labels reach every stage by themselves, and each builds its own sequence plan.

Losses that arise in the middle (the indexer's KL, the balance loss) enter the backward pass where
they arise, normalised beforehand: :class:`_Inject` is the identity and hands its loss a gradient
of one. The last stage reads the embedding too, for MTP: it holds a copy, which is no parameter of
the optimizer; see ``parallel/pipeline_engine.py``.
"""

# Legend: B rows, T tokens, S streams, D hidden, K prediction depths
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.loss import ModelOutput, Objective
from model.transformer import DeepSeekV4
from parallel.engine import Shares
from parallel.pipeline_split import PipelineStageParts


class PipelineStageModel(DeepSeekV4):
    """What one stage computes.

    Args:
        config: of the whole model.
        parts: what this stage holds of it.
        recomputes: whether blocks recompute; then a backward pass is not split in two.

    Attributes:
        parts: the same.
        objective: of the current step.
        routing: experts of the microbatch that comes, by gate; None: every gate chooses.
        recomputes: the same.
        shares: what the microbatches since :meth:`begin` gave.
    """

    def __init__(
        self, config: ModelConfig, parts: PipelineStageParts, recomputes: bool = False
    ) -> None:
        super().__init__(config)
        self.parts, self.recomputes = parts, recomputes
        self.objective: Objective | None = None
        self.routing: Mapping[str, Tensor] | None = None
        self.shares = Shares()
        for name in list(self.layers):
            if int(name) not in parts.layers:
                del self.layers[name]
        if not parts.last:
            del self.hc_head, self.norm, self.head
            self.mtp = nn.ModuleDict()
        if not (parts.first or self.mtp):
            del self.embed

    @property
    def copies_embedding(self) -> bool:
        """Whether this stage holds a second copy of the embedding, for MTP."""
        return bool(self.mtp) and not self.parts.first

    def begin(self, objective: Objective) -> None:
        """Start a step or an evaluation."""
        self.objective, self.routing, self.shares = objective, None, Shares()

    def forward(
        self,
        x_BTSD: Tensor | None = None,
        *,
        input_ids_BT: Tensor,
        document_ids_BT: Tensor,
        labels_BTK: Tensor,
    ) -> Tensor:
        """One microbatch through this stage.

        Args:
            x_BTSD: streams from the stage before; None on the first.
            input_ids_BT: token ids.
            document_ids_BT: equal inside a document, -1 for padding.
            labels_BTK: the token 1 + k places ahead, negative where there is none.

        Returns:
            Streams for the next stage, or on the last this microbatch's share of the objective.
        """
        objective = self.objective
        assert objective is not None, "begin() comes first"
        if self.routing is not None:
            objective = replace(objective, replay=dict(self.routing))
        context = self.training_context(document_ids_BT, objective)
        x_BTSD, results = self.trunk(self._enter(x_BTSD, input_ids_BT), input_ids_BT, context)
        h_KBTD: list[Tensor] = []
        if self.parts.last:
            h_KBTD.append(self.collapse(x_BTSD))
            if objective.mtp_weight:
                ahead, mtp_results = self.predict_ahead(x_BTSD, labels_BTK, context)
                h_KBTD += ahead
                results += mtp_results
        output = ModelOutput(torch.zeros((), device=x_BTSD.device), {}, {}, {})
        if objective.losses:
            output = self.losses(h_KBTD, labels_BTK, results, objective)
        self.shares.add(output)
        return output.total if self.parts.last else _Inject.apply(x_BTSD, output.total)

    def advance(
        self, x_BTSD: Tensor | None, input_ids_BT: Tensor, document_ids_BT: Tensor
    ) -> Tensor:
        """Streams for the next stage, or on the last the logits [B, T, V]; without losses."""
        context = self.context(document_ids_BT)
        x_BTSD, _ = self.trunk(self._enter(x_BTSD, input_ids_BT), input_ids_BT, context)
        return self.project(self.collapse(x_BTSD)) if self.parts.last else x_BTSD

    def _enter(self, x_BTSD: Tensor | None, input_ids_BT: Tensor) -> Tensor:
        if x_BTSD is not None:
            return _Enter.apply(x_BTSD)
        x_BTSD = self.streams(input_ids_BT)
        if torch.is_grad_enabled() and not x_BTSD.requires_grad:
            x_BTSD.requires_grad_()  # a frozen embedding: stages count on a gradient all the same
        return x_BTSD


class _Inject(torch.autograd.Function):
    """Passes the streams on and gives ``loss`` a gradient of one; may run backward twice."""

    @staticmethod
    def forward(ctx: Any, x_BTSD: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x_BTSD.clone(memory_format=torch.contiguous_format)  # a stage's output is no view

    @staticmethod
    def backward(ctx: Any, grad_BTSD: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad_BTSD, torch.ones_like(loss)


class _Enter(torch.autograd.Function):
    """The identity, whose gradient can be sent: it is contiguous."""

    @staticmethod
    def forward(ctx: Any, x_BTSD: Tensor) -> Tensor:
        return x_BTSD.view_as(x_BTSD)

    @staticmethod
    def backward(ctx: Any, grad_BTSD: Tensor) -> Tensor:
        return grad_BTSD.contiguous()


class ModelPart(DeepSeekV4):
    """All that this rank holds, each module once and under its global name.

    What looks at a model from outside (optimizer, checkpoints, audit, quantisation) looks at this;
    the modules belong to the stages and run there. A copy of the embedding is left out.

    Args:
        config: of the whole model.
        stages: of this rank, in order.
    """

    def __init__(self, config: ModelConfig, stages: list[PipelineStageModel]) -> None:
        nn.Module.__init__(self)
        object.__setattr__(self, "stages", stages)  # not as submodules: names stay global
        self.config = config
        for stage in stages:
            for name, module in stage.named_children():
                if name not in ("layers", "mtp", "embed"):
                    setattr(self, name, module)
            if stage.parts.first:
                self.embed = stage.embed
        self.layers = nn.ModuleDict({n: b for s in stages for n, b in s.layers.items()})
        self.mtp = nn.ModuleDict({n: b for s in stages for n, b in s.mtp.items()})

    stages: list[PipelineStageModel]
    run_logits: Callable[[Tensor, Tensor], Tensor] | None = None  # set by the engine

    def logits(self, input_ids_BT: Tensor, document_ids_BT: Tensor | None = None) -> Tensor:
        """Next-token logits [B, T, V] on every rank of the pipeline, which all call this."""
        assert self.run_logits is not None
        if document_ids_BT is None:
            document_ids_BT = torch.zeros(input_ids_BT.shape, dtype=torch.int64)
        return self.run_logits(input_ids_BT, document_ids_BT)

    @property
    def yarn(self) -> bool:
        """As in :class:`DeepSeekV4`, of all stages; likewise the two dtypes."""
        return self.stages[0].yarn

    @yarn.setter
    def yarn(self, value: bool) -> None:
        self._set("yarn", value)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the streams."""
        return self.stages[0].compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, value: torch.dtype) -> None:
        self._set("compute_dtype", value)

    @property
    def head_dtype(self) -> torch.dtype:
        """Of the head's operands."""
        return self.stages[0].head_dtype

    @head_dtype.setter
    def head_dtype(self, value: torch.dtype) -> None:
        self._set("head_dtype", value)

    @property
    def head_tf32(self) -> bool:
        """Whether they are multiplied as TF32."""
        return self.stages[0].head_tf32

    @head_tf32.setter
    def head_tf32(self, value: bool) -> None:
        self._set("head_tf32", value)

    def _set(self, name: str, value: Any) -> None:
        for stage in self.stages:
            setattr(stage, name, value)
