"""The audit: a run that does not do what it was asked to stops in its first steps.

reference P.2, Honest. It goes by what ran, not by what the config says: gradients, bits before
and after an update, outputs of the seams. Before the first audited step it checks owners, hash
tables and the isolation of documents (of graphs in every stage); then it holds the first steps of
every stage (and of every start) against ``train/audit/checks.py``; then it asks which parameters
never had a gradient. A resumed run is audited again: another machine may do otherwise.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from data.batch import IGNORE, Batch
from model.config import LayerKind, Router
from model.flops import parameter_shapes
from model.kernels.ran import Ran, recorded
from model.loss import Objective
from model.moe.router import Gate
from model.transformer import DeepSeekV4
from optim.groups import build_table
from parallel.collectives import local
from parallel.compiled_blocks import CompiledBlocks
from parallel.deepspeed_engine import DeepSpeedEngine
from parallel.engine import Engine, Shares, Update
from parallel.pieces import fingerprints, norms_of
from parallel.pipeline_engine import PipelineEngine
from train.audit.by_operations import streams_moved
from train.audit.checks import (
    AFTER_UPDATE,
    BEFORE_UPDATE,
    Check,
    Evidence,
    lr_to_judge,
)
from train.audit.samples import SAMPLE_SIZES, AuditSample, chosen, take
from train.audit.seam_watch import watch_seams
from train.config.schema import RunConfig
from train.stages import Stage, StagePlan, trains
from train.step import StepObserver, StepPlan, StepRows, microbatches, objective_of

log = logging.getLogger(__name__)

AUDITED_STEPS = 3  # at the beginning of every stage and of every start
_NEXT_TO_NOTHING = 1e-30  # weight of a side loss that is to be formed and not to matter
_FEW_TOKENS = 16  # an expert that got fewer may have met none whose loss reaches it


_OTHER_CHECKS = ("isolation", "hash_table", "sharding", "gradient")


class AuditError(RuntimeError):
    """The run does not do what it was asked to; one line a fault, each with the check's name."""


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
        self._gradients: dict[str, Tensor] = {}
        self._loads: dict[str, Tensor] = {}
        self._longest = 0
        self._targets_K: list[float] = []
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
            faults = [*self._owners(), *self._holders(), *self._shards(), *hash_tables(self._model)]
            with nullcontext() if self._compiled is None else self._compiled.eager():
                _refuse(self._engine, [*faults, *isolation(self._engine)])
            self._checked = True
        if self._compiled is not None and not self._graphs_checked:
            _refuse(self._engine, isolation_of_graphs(self._engine, step))
            self._graphs_checked = True
        observer = _Observer(self._evidence(step, rows), self._engine, self._samples)
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
        self._gradients, self._loads, self._longest = {}, {}, 0
        self._targets_K = [0.0] * (1 + self._run.model.num_nextn_predict_layers)
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
        _refuse(self._engine, _faults(AFTER_UPDATE, e))
        if not e.update.applied:
            return  # nothing moved; the next step will show
        self._steps += 1
        self._result["steps"].append(e.step.number)
        self._result["checks"] = [*BEFORE_UPDATE, *AFTER_UPDATE, *_OTHER_CHECKS]
        for name, norms in e.grad_norms.items():
            self._gradients[name] = self._gradients.get(name, torch.zeros_like(norms)) + norms
        for name, load_E in e.shares.expert_load.items():
            self._loads[name] = self._loads.get(name, torch.zeros_like(load_E)) + load_E
        self._note_kernels(e.ran)
        self._longest = max(self._longest, e.longest_document)
        self._targets_K = [a + b for a, b in zip(self._targets_K, e.targets_K, strict=True)]
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
            problem, excuse = self._missing_gradient(name)
            if problem and not excuse:
                faults.append(f"gradient: {name} {problem} in {self._steps} step(s)")
            elif problem:
                self._result["not_exercised"].append(f"{name}: {excuse}")
        _refuse(self._engine, faults)
        log.info(
            "audit: stage %s is as asked for (%d parameters, %d checks, steps %s)",
            e.step.stage.name,
            len(e.trained),
            len(self._result["checks"]),
            self._result["steps"],
        )

    def _missing_gradient(self, name: str) -> tuple[str, str]:
        """What is wrong with a parameter's gradient so far, and what excuses it; empty: nothing."""
        norms = self._gradients.get(name)
        if ".ffn.experts." in name:
            load_E = self._loads[f"{name.partition('.experts.')[0]}.gate"]
            labelled_E = load_E - self._unlabelled(name, load_E)
            silent = torch.ones_like(load_E) if norms is None else (norms == 0)
            for expert in silent.nonzero().flatten().tolist():
                if labelled_E[expert] >= _FEW_TOKENS:
                    return f"had no gradient for expert {expert}, which got tokens", ""
            count = int(silent.sum())
            few = f"{count} experts got, for sure, fewer than {_FEW_TOKENS} tokens with a label"
            return ("had no gradient", few) if count else ("", "")
        if norms is not None and bool((norms > 0).any()):
            return "", ""
        least = self._least_document(name)
        if self._longest < least:
            return "had no gradient", f"no document of {least} tokens (longest {self._longest})"
        if self._weighs_one_entry(name):
            return "had no gradient", "windows of one token: there is nothing to weigh"
        return "received no gradient", ""

    def _unlabelled(self, name: str, load_E: Tensor) -> float:
        """Tokens among those of a gate that no loss is taken of: the ends of documents.

        In the trunk a token without a next one, in the MTP block of depth k one without a token
        2 + k places ahead. Nothing reads such a token, since attention is causal.
        """
        depth = 1 + int(name.split(".")[1]) if name.startswith("mtp.") else 0
        tokens = float(load_E.sum()) / self._run.model.num_experts_per_tok
        return tokens - self._targets_K[depth]

    def _weighs_one_entry(self, name: str) -> bool:
        """Whether a parameter weighs the tokens of a compressed entry that has but one."""
        if not name.startswith("layers.") or ".attn.compressor." not in name:
            return False
        layer, model = int(name.split(".")[1]), self._run.model
        alone = model.kind(layer) is LayerKind.hca and model.ratio(layer) == 1
        return alone and name.endswith((".ape", ".wgate.weight"))

    def _least_document(self, name: str) -> int:
        """Tokens that a document needs before a parameter can matter to a loss."""
        parts = name.split(".")
        if parts[0] == "mtp":
            return 3 + int(parts[1])
        if parts[0] != "layers":
            return 2
        ratio = self._run.model.ratio(int(parts[1]))
        if ".indexer." in name:
            return 2 * ratio + 1
        return ratio + 2 if ".compressor." in name else 2

    def _owners(self) -> list[str]:
        """Every parameter stands in the optimizer's table once, under the owner asked for."""
        table = Counter(record.name for record in self._engine.optimizer.table)
        owners = {record.name: record.owner for record in self._engine.optimizer.table}
        faults = []
        for name, record in self._records.items():
            if table[name] != 1:
                faults.append(f"owner: {name} stands in the optimizer's table {table[name]} times")
            elif owners[name] is not record.owner:
                faults.append(
                    f"owner: {name} belongs to {owners[name].value}, {record.owner.value} was asked"
                )
        unknown = sorted(set(table) - set(self._records))
        return faults + [f"owner: {name} is no parameter of the model" for name in unknown]

    def _holders(self) -> list[str]:
        """Every parameter of the model lives on exactly one pipeline stage."""
        engine = self._engine
        place = engine.data_rank, engine.shard.index
        ranks = engine.gather((place, list(self._records)))
        held = Counter(name for where, names in ranks if where == (0, 0) for name in names)
        return [
            f"owner: {name} lives on {held[name]} pipeline stages"
            for name in parameter_shapes(self._run.model)
            if held[name] != 1
        ]

    def _shards(self) -> list[str]:
        """Every parameter is in FSDP's hands, and its shards make as many copies as asked for."""
        if not self._engine.sharded or isinstance(self._engine, DeepSpeedEngine):
            return []  # what DeepSpeed reduces it checks itself, at every step
        shapes, faults = parameter_shapes(self._run.model), []
        here = dict(self._model.named_parameters())
        ranks = self._engine.gather({name: local(p).numel() for name, p in here.items()})
        layout = self._run.parallel.resolve(len(ranks))
        in_ep = layout.ep // math.gcd(layout.ep, layout.shard_degree)  # replicas that share experts
        for name, parameter in here.items():
            copies = layout.dp_replicate // (in_ep if ".ffn.experts." in name else 1)
            held = sum(sizes.get(name, 0) for sizes in ranks) / math.prod(shapes[name])
            if not isinstance(parameter, DTensor):
                faults.append(f"sharding: {name} is left out: its gradient is not reduced")
            elif held != copies:
                faults.append(
                    f"sharding: {name} is held {held:g} times, {layout} asks for {copies}"
                )
        return faults


class _Observer:
    """Collects the evidence of one step."""

    def __init__(
        self,
        evidence: Evidence,
        engine: Engine,
        samples: Callable[[Evidence], dict[str, AuditSample]],
    ) -> None:
        self.evidence, self._engine, self._samples = evidence, engine, samples
        self._weights: dict[str, tuple[int, int]] = {}
        self._states: dict[str, tuple[int, int]] = {}

    def before_step(self) -> None:
        """Note the bits of what may move and of what must not."""
        self._weights, self._states = self._bits()

    def after_backward(self, shares: Shares) -> None:
        """Note gradients and losses, and judge them before anything moves.

        Losses that are not finite are not judged: ``train.recovery`` says what becomes of such a
        step, in an audited step as in any other. Where the operations of a compiled block give
        finite ones, its graph is the fault.
        """
        e = self.evidence
        e.shares = shares
        for name, parameter in e.model.named_parameters():
            if parameter.requires_grad:
                e.requires_grad.add(name)
        for name, gradient in self._engine.gradients():
            e.grad_norms[name] = norms_of(gradient, ".ffn.experts." in name)
        if e.compiled is not None:
            e.by_operations.distances = e.by_operations.compare(self._engine.gradients())
            e.by_operations.gradients.clear()
        e.seams.settle()
        e.early = self._changed(self._weights, fingerprints(self._engine.weights()))
        e.samples = self._samples(e)
        assert shares.total is not None
        if math.isfinite(float(shares.total)):
            _refuse(self._engine, _faults(BEFORE_UPDATE, e))
        elif e.compiled is not None and math.isfinite(float(e.by_operations.shares.total or 0.0)):
            _refuse(self._engine, _faults({"compiled": BEFORE_UPDATE["compiled"]}, e))

    def after_update(self, update: Update) -> None:
        """Note what moved; frozen parameters keep their state objects, so both are compared."""
        e = self.evidence
        e.update = update
        e.optimizer_after = self._engine.optimizer.state_dict()
        e.moved = dict(self._engine.optimizer.moved)
        e.weights = dict(self._engine.weights())
        e.stale = self._engine.stale()
        weights, states = self._bits()
        e.changed = self._changed(self._weights, weights)
        e.changed_states = self._changed(self._states, states)

    def _bits(self) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]]:
        states = {
            f"{name}.{key}": tensor
            for name, tensors in self._engine.optimizer.state_dict().items()
            if name not in self.evidence.trained
            for key, tensor in tensors.items()
        }
        return fingerprints(self._engine.weights()), fingerprints(states)

    def _changed(
        self, before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]
    ) -> set[str]:
        """Names that changed on any rank."""
        mine = [name for name, bits in before.items() if after[name] != bits]
        return {name for names in self._engine.gather(mine) for name in names}


def _gates(model: DeepSeekV4) -> Iterator[tuple[str, Gate]]:
    return (
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, Gate) and module.router is Router.learned
    )


def _faults(checks: dict[str, Check], e: Evidence) -> list[str]:
    return [f"{name}: {line}" for name, check in checks.items() for line in check(e)]


def _refuse(engine: Engine, faults: list[str]) -> None:
    """Every rank raises what any has found, and names which where not all have."""
    ranks = engine.gather(faults)
    found = {
        line: [r for r, lines in enumerate(ranks) if line in lines] for f in ranks for line in f
    }
    if not found:
        return
    told = [
        line if len(holders) == len(ranks) else f"{line} (rank {', '.join(map(str, holders))})"
        for line, holders in found.items()
    ]
    shown = told[:20] + ([f"... and {len(told) - 20} more"] if len(told) > 20 else [])
    raise AuditError(
        "the run does not do what it was asked to:\n" + "\n".join(f"  {f}" for f in shown)
    )


# ---- before the first step ----------------------------------------------------------------------
def hash_tables(model: DeepSeekV4) -> list[str]:
    """Faults of hash-routed layers: a constant table, or a row that names an expert twice."""
    faults = []
    for name, table_VK in model.named_buffers():
        if not name.endswith(".tid2eid"):
            continue
        config = model.config
        if config.n_routed_experts == config.num_experts_per_tok:
            continue  # there is nothing to choose
        if bool((table_VK == table_VK[0]).all()):
            faults.append(f"hash_table: {name} is constant: every token goes to the same experts")
        elif table_VK.shape[1] > 1 and bool((table_VK.sort(dim=1).values.diff(dim=1) == 0).any()):
            faults.append(f"hash_table: {name} names an expert twice for one token")
        elif len(table_VK.unique()) < min(config.n_routed_experts, table_VK.numel()):
            faults.append(f"hash_table: {name} leaves experts out")
    return faults


def isolation(engine: Engine) -> list[str]:
    """Faults of packing: the gradient of one document's loss with respect to another's embeddings.

    It must be exactly zero whatever the precision. Values would only be equal up to rounding, since
    the experts' products depend on how many rows each gets.
    """
    assert isinstance(engine.model, DeepSeekV4)
    config = engine.model.config
    cp = engine.shard.count
    length = -(-(2 * max((1, *config.ratios)) + 2) // cp) * cp
    depths = 1 + config.num_nextn_predict_layers
    objective = Objective((1.0,) * depths, 1.0, 1.0, indexer_weight=0.0, balance_weight=0.0)
    return [f"isolation: {line}" for line in _leaks(engine, 1, 2 * length, objective, 0.0)]


def isolation_of_graphs(engine: Engine, step: StepPlan) -> list[str]:
    """The same of the graphs that train (``train.compile``).

    They are asked for rows like the step's and for what its objective asks of the blocks, or they
    would be others. Side losses are of all tokens: they are weighed by so little that their
    gradient cannot pass for a leak.
    """
    assert isinstance(engine.model, DeepSeekV4)
    weights, depths = step.weights, 1 + engine.model.config.num_nextn_predict_layers
    objective = Objective(
        (1.0,) * depths, 1.0, float(weights.mtp != 0), _NEXT_TO_NOTHING * (weights.indexer != 0),
        _NEXT_TO_NOTHING * (weights.balance != 0), step.stage.indexer_phase, step.monitors,
    )  # fmt: skip
    rows, length = step.stage.micro_batch_size, step.stage.seq_len
    if length < 4:
        return []  # half a row has nothing to predict
    found = _leaks(engine, rows, length, objective, math.sqrt(_NEXT_TO_NOTHING))
    return [f"isolation: train.compile=true: by the graphs {line}" for line in found]


def _leaks(
    engine: Engine, rows: int, length: int, objective: Objective, least: float
) -> Iterator[str]:
    """Two documents a row, of which the second has labels.

    Args:
        engine: runs the model.
        rows: of the batch.
        length: of a row.
        objective: of the second documents.
        least: share of the second's gradient above which the first's is a leak.
    """
    assert isinstance(engine.model, DeepSeekV4)
    config, half = engine.model.config, length // 2
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(config.vocab_size, (rows, length), generator=generator)
    documents_BT = torch.arange(length).ge(half).long().expand(rows, -1)
    depths = 1 + config.num_nextn_predict_layers
    labels_BTK = torch.full((rows, length, depths), IGNORE)
    for k in range(depths):
        labels_BTK[:, half : length - 1 - k, k] = ids_BT[:, half + 1 + k :]
    grad_BTD = engine.embedding_gradient(Batch(ids_BT, documents_BT, labels_BTK), objective)
    if grad_BTD is None:
        return  # another pipeline stage holds the embedding, and judges
    if not bool(grad_BTD.isfinite().all()):
        return  # says nothing of isolation; train.recovery judges steps that are not finite
    leak, own = float(grad_BTD[:, :half].abs().max()), float(grad_BTD[:, half:].abs().max())
    if leak > least * own:
        yield f"a document's loss reaches the one before it (gradient {leak:.2g})"
    elif own == 0:
        yield "a document's loss does not reach its own tokens"


def longest_document(document_ids_BT: Tensor) -> int:
    """Tokens of the longest piece of a batch."""
    positions = torch.arange(document_ids_BT.shape[1])
    ids_BT = document_ids_BT.cpu()
    begins_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    begins_BT[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]
    start_BT = torch.where(begins_BT, positions, 0).cummax(dim=1).values
    return int(((positions - start_BT + 1) * (ids_BT >= 0)).max())
