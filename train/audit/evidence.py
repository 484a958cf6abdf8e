"""Evidence of one audited step: what was asked for, and what ran.

It is collected by ``train/audit/observer.py`` and judged by ``train/audit/checks.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from model.config import LayerKind, Router
from model.kernels.ran import Ran
from model.moe.router import Gate
from model.transformer import DeepSeekV4
from optim.groups import ParamRecord
from parallel.compiled_blocks import CompiledBlocks
from parallel.engine import Shares, Update
from parallel.pipeline import Pipeline
from train.audit.by_operations import ByOperations
from train.audit.samples import AuditSample
from train.audit.seam_watch import SeamReading
from train.config.schema import RunConfig
from train.step import StepPlan


@dataclass
class Evidence:
    """One audited step.

    Attributes:
        run: what was asked for.
        step: what the step was to do.
        model: after the step.
        trained: parameters that the phase trains, by the config.
        records: owner, split and decay of every parameter, by the config.
        biases: of the learned gates, before the step.
        samples: pieces of the parameters whose update is judged by its form.
        early: parameters that moved before the update.
        changed: parameters of which any bit changed, on any rank.
        changed_states: the same of optimizer state, as ``name.key``; frozen parameters only.
        optimizer_after: optimizer state of all parameters after the step.
        requires_grad: names of the parameters that autograd tracked.
        moved: parameter -> algorithm that the optimizer says it ran.
        grad_norms: parameter -> norm of its gradient, per expert for stacked ones; none: absent.
        weights: what the update moves.
        stale: parameters of which the next forward pass reads something else.
        shares: losses and loads.
        update: whether it was applied.
        seams: what the replaceable ops and casts did.
        longest_document: tokens of the longest piece of the batch.
        targets_K: labels of the batch, for the main head and every MTP depth.
        num_microbatches: of this process.
        ran: what served the ops of the table.
        pipeline: what ran its stages; None without a pipeline.
        compiled: what made graphs of the blocks; None: nothing did.
        by_operations: what the step's passes gave before, without these graphs.
        graph_calls: block -> calls of its graph before the step.
    """

    run: RunConfig
    step: StepPlan
    model: DeepSeekV4
    trained: set[str]
    records: dict[str, ParamRecord]
    biases: dict[str, Tensor]
    samples: dict[str, AuditSample] = field(default_factory=dict)
    early: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    changed_states: set[str] = field(default_factory=set)
    optimizer_after: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    requires_grad: set[str] = field(default_factory=set)
    moved: dict[str, str] = field(default_factory=dict)
    grad_norms: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)
    shares: Shares = field(default_factory=Shares)
    update: Update = field(default_factory=lambda: Update(0.0, False))
    seams: SeamReading = field(default_factory=SeamReading)
    longest_document: int = 0
    targets_K: tuple[float, ...] = ()
    num_microbatches: int = 1
    ran: Ran = field(default_factory=Ran)
    pipeline: Pipeline | None = None
    compiled: CompiledBlocks | None = None
    by_operations: ByOperations = field(default_factory=ByOperations)
    graph_calls: Counter[str] = field(default_factory=Counter)

    @property
    def applied(self) -> bool:
        """Whether the step can have moved anything."""
        return self.update.applied and self.step.lr > 0

    def has_gradient(self, name: str) -> bool:
        """Whether any element of the parameter's gradient is not zero."""
        return name in self.grad_norms and bool((self.grad_norms[name] > 0).any())

    def csa_layers(self) -> list[int]:
        """Layers whose indexer can learn from this batch: it must see two entries to prefer one."""
        config = self.run.model
        return [
            layer
            for layer in range(config.num_hidden_layers)
            if config.kind(layer) is LayerKind.csa
            and self.longest_document > 2 * config.ratio(layer)
        ]

    def learned_gate_names(self) -> list[str]:
        """Gates that run and whose choice is learned, as the config lists them."""
        config = self.run.model
        names = [
            f"layers.{layer}.ffn.gate"
            for layer in range(config.num_hidden_layers)
            if config.router(layer) is Router.learned
        ]
        depths = config.num_nextn_predict_layers if self.step.weights.mtp > 0 else 0
        return names + [f"mtp.{k}.ffn.gate" for k in range(depths)]

    def learned_gates(self) -> dict[str, Gate]:
        """Those of them that live here."""
        modules = dict(self.model.named_modules())
        found = {name: modules.get(name) for name in self.learned_gate_names()}
        return {name: gate for name, gate in found.items() if isinstance(gate, Gate)}


Check = Callable[[Evidence], Iterator[str]]
