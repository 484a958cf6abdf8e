"""The audit: a run that does not do what it was asked to stops in its first steps.

reference P.2, Honest. It goes by what ran, not by what the config says: gradients, bits before
and after an update, outputs of the seams. Before the first audited step it checks owners, hash
tables and the isolation of documents (of graphs in every stage); then it holds the first steps of
every stage (and of every start) against ``train/audit/checks.py``; then it asks which parameters
never had a gradient. A resumed run is audited again: another machine may do otherwise.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from model.config import Router
from model.kernels.ran import Ran, recorded
from model.moe.router import Gate
from model.parameter_counts import parameter_shapes
from model.transformer import DeepSeekV4
from optim.groups import build_table
from parallel.collectives import local
from parallel.compiled_blocks import CompiledBlocks
from parallel.engine import Engine, Shares
from parallel.pipeline_engine import PipelineEngine
from train.audit.before_first_step import (
    hash_tables,
    holders,
    isolation,
    isolation_of_graphs,
    owners,
    shards,
)
from train.audit.by_operations import streams_moved
from train.audit.checks import AFTER_UPDATE, BEFORE_UPDATE
from train.audit.evidence import Evidence
from train.audit.faults import faults_of, refuse
from train.audit.missing_gradient import GradientsSeen
from train.audit.observer import Observer
from train.audit.samples import SAMPLE_SIZES, AuditSample, chosen, take
from train.audit.seam_watch import watch_seams
from train.audit.updates import lr_to_judge
from train.config.schema import RunConfig
from train.stages import Stage, StagePlan, trains
from train.step import StepObserver, StepPlan, StepRows, microbatches, objective_of

log = logging.getLogger(__name__)

AUDITED_STEPS = 3  # at the beginning of every stage and of every start
_OTHER_CHECKS = ("isolation", "hash_table", "sharding", "gradient")


class Audit:
    """Watches the first steps of a run.

    Args:
        run: what was asked for.
        plan: its stages.
        engine: what runs.
        compiled: makes graphs of its blocks; None: nothing does.
    """

    def __init__(
        self, run: RunConfig, plan: StagePlan, engine: Engine, compiled: CompiledBlocks | None
    ) -> None:
        assert isinstance(engine.model, DeepSeekV4)
        self._run, self._plan, self._engine, self._compiled = run, plan, engine, compiled
        self._model = engine.model
        known = parameter_shapes(run.model)
        here = {name: known.get(name, tuple(p.shape)) for name, p in self._model.named_parameters()}
        shapes = {**known, **here}
        table = build_table(shapes, run.optim, run.model.split_counts)
        self._records = {record.name: record for record in table if record.name in here}
        self._stage: Stage | None = None
        self._steps = 0
        self._gradients = GradientsSeen(run.model)
        self._size = SAMPLE_SIZES[engine.device.type]
        self._whole = False  # every update is judged
        self._hidden: dict[str, float] = {}  # sampled, but not to be judged below this rate
        self._some_hidden, self._judging_lr = True, 0.0  # of any rank
        self._checked = self._graphs_checked = False
        self._result: dict[str, Any] = {
            "steps": [], "checks": [], "not_exercised": [], "kernels": {}, "started": {},
            "judged": {},
        }  # fmt: skip

    def result(self) -> dict[str, Any]:
        """What was audited, for the receipt; a fault never gets this far."""
        compiled = {} if self._compiled is None else {"compiled": self._compiled.told()}
        return self._result | compiled

    @contextmanager
    def watching(self, step: StepPlan, rows: StepRows) -> Iterator[StepObserver | None]:
        """Audit ``step`` if it is one of those to be audited.

        Raises:
            AuditError: something is not as asked.
        """
        if step.stage is not self._stage:
            self._enter_stage(step)
        if not self._is_due(step):
            yield None
            return
        if not self._checked:
            faults = [
                *owners(self._engine, self._records),
                *holders(self._engine, self._records, self._run.model),
                *shards(self._engine, self._run),
                *hash_tables(self._model),
            ]
            with nullcontext() if self._compiled is None else self._compiled.eager():
                refuse(self._engine, [*faults, *isolation(self._engine)])
            self._checked = True
        if self._compiled is not None and not self._graphs_checked:
            refuse(self._engine, isolation_of_graphs(self._engine, step))
            self._graphs_checked = True
        observer = Observer(self._evidence(step, rows), self._engine, self._samples)
        observer.before_step()
        if self._compiled is None:
            with self._seen(observer.evidence):
                yield observer
        else:
            observer.evidence.compiled = self._compiled
            self._run_by_operations(observer.evidence, rows, self._compiled)
            yield observer
        self._judge(observer.evidence)

    @contextmanager
    def _seen(self, e: Evidence) -> Iterator[None]:
        """What serves the ops, and what the seams do, is noted inside."""
        with recorded() as e.ran, watch_seams(self._model, self._engine.sharded) as e.seams:
            yield

    def _run_by_operations(self, e: Evidence, rows: StepRows, compiled: CompiledBlocks) -> None:
        """Run the passes of the step one operation after the other, and drop the gradients.

        A graph cannot be looked into. Its operations can, and what the graphs give is compared with
        what these gave.
        """
        engine, step, found = self._engine, e.step, e.by_operations
        objective = objective_of(step, rows.counts)

        def run() -> Shares:
            batches = microbatches(
                rows, step.num_rows, step.stage.micro_batch_size, engine.data_rank,
                engine.data_degree,
            )  # fmt: skip
            return engine.forward_backward(batches, objective)

        with compiled.eager(), self._seen(e):
            found.shares = run()
            e.seams.settle()
        found.keep(engine.gradients())
        engine.optimizer.zero_grad()
        seed = self._run.seed + step.number + engine.rank
        with compiled.eager(), streams_moved(self._model, seed):
            run()
        found.moved = found.compare(engine.gradients())
        engine.optimizer.zero_grad()
        e.graph_calls = Counter(compiled.calls)

    def _enter_stage(self, step: StepPlan) -> None:
        self._stage, self._steps = step.stage, 0
        self._graphs_checked = False  # rows and objective are others, and so are the graphs
        self._gradients = GradientsSeen(self._run.model)
        trained, weights = self._trained(step), self._engine.weights()
        held = self._engine.largest(sum(local(weights[name]).nbytes for name in trained))
        self._whole, self._hidden = held <= self._size.whole_bytes, {}
        self._some_hidden = True

    def _is_due(self, step: StepPlan) -> bool:
        """The first steps, and the first whose learning rate shows what the first ones hid."""
        if self._steps < AUDITED_STEPS:
            return True
        return self._some_hidden and step.lr >= self._judging_lr

    def _trained(self, step: StepPlan) -> set[str]:
        return {name for name in self._records if trains(name, step.stage, step.weights)}

    def _evidence(self, step: StepPlan, rows: StepRows) -> Evidence:
        return Evidence(
            run=self._run,
            step=step,
            model=self._model,
            trained=self._trained(step),
            records=self._records,
            biases={name: gate.bias.detach().clone() for name, gate in _gates(self._model)},
            num_microbatches=-(
                -step.num_rows // self._engine.data_degree // step.stage.micro_batch_size
            ),
            longest_document=longest_document(rows.batch(0, step.num_rows).document_ids_BT),
            targets_K=tuple(rows.counts.targets_K),
            pipeline=self._engine.pipeline if isinstance(self._engine, PipelineEngine) else None,
        )

    @torch.no_grad()
    def _samples(self, e: Evidence) -> dict[str, AuditSample]:
        """What is judged of the update, while the gradients are there. Collective."""
        seed, names = self._run.seed + e.step.number, self._trained(e.step)
        if self._steps >= AUDITED_STEPS:
            names = self._hidden.keys() & names
        judged = chosen(names, self._records, self._size, self._whole, seed)
        weights, samples = self._engine.weights(), dict[str, AuditSample]()
        for name, gradient in self._engine.gradients():
            norms = e.grad_norms[name]
            if name in judged and e.has_gradient(name) and bool(norms.isfinite().all()):
                record = self._records[name]
                samples[name] = take(weights[name], gradient, norms, record, self._size, seed)
        return samples

    def _judge(self, e: Evidence) -> None:
        refuse(self._engine, faults_of(AFTER_UPDATE, e))
        if not e.update.applied:
            return  # nothing moved; the next step will show
        self._steps += 1
        self._result["steps"].append(e.step.number)
        self._result["checks"] = [*BEFORE_UPDATE, *AFTER_UPDATE, *_OTHER_CHECKS]
        self._gradients.add(e)
        self._note_kernels(e.ran)
        for name in e.samples:
            self._hidden.pop(name, None)
            if (lr := lr_to_judge(e, name)) > e.step.lr:
                self._hidden[name] = lr
        self._some_hidden = self._engine.agree(bool(self._hidden))  # stages hold other names
        self._judging_lr = self._engine.largest(max(self._hidden.values(), default=0.0))
        self._note_judged(e)
        if self._steps == AUDITED_STEPS or e.step.number == self._plan.steps:
            self._end_window(e)

    def _note_judged(self, e: Evidence) -> None:
        """Which pieces of which parameters were judged so far, on any rank."""
        told = {n: sample.told for n, sample in e.samples.items() if n not in self._hidden}
        for names in self._engine.gather(told):
            for name, piece in names.items():
                pieces = self._result["judged"].setdefault(name, [])
                if piece not in pieces:
                    pieces.append(piece)

    def _note_kernels(self, ran: Ran) -> None:
        """What served each op on any rank, and how often each kernel was started here."""
        kinds: dict[str, set[str]] = {}
        for ops in [self._result["kernels"], *self._engine.gather(ran.by_op())]:
            for op, found in ops.items():
                kinds.setdefault(op, set()).update(found.split("+"))
        self._result["kernels"] = {op: "+".join(sorted(kinds[op])) for op in sorted(kinds)}
        self._result["started"] = dict(sorted(ran.kernels.items()))

    def _end_window(self, e: Evidence) -> None:
        faults: list[str] = []
        for name in sorted(e.trained):
            problem, excuse = self._gradients.missing(name)
            if problem and not excuse:
                faults.append(f"gradient: {name} {problem} in {self._steps} step(s)")
            elif problem:
                self._result["not_exercised"].append(f"{name}: {excuse}")
        refuse(self._engine, faults)
        log.info(
            "audit: stage %s is as asked for (%d parameters, %d checks, steps %s)",
            e.step.stage.name,
            len(e.trained),
            len(self._result["checks"]),
            self._result["steps"],
        )


def _gates(model: DeepSeekV4) -> Iterator[tuple[str, Gate]]:
    return (
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, Gate) and module.router is Router.learned
    )


def longest_document(document_ids_BT: Tensor) -> int:
    """Tokens of the longest piece of a batch."""
    positions = torch.arange(document_ids_BT.shape[1])
    ids_BT = document_ids_BT.cpu()
    begins_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    begins_BT[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]
    start_BT = torch.where(begins_BT, positions, 0).cummax(dim=1).values
    return int(((positions - start_BT + 1) * (ids_BT >= 0)).max())
