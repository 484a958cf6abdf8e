"""What the audit holds against what was asked for (reference P.2, Honest).

Each check looks at the evidence of one step, which is what ran: gradients, bits before and after
the update, outputs of the seams beside those of the plain ops. It yields one line a fault. To add a
check, write it and add a line to one of the two tables at the end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.attention.core import WindowAttention
from model.block import Block
from model.config import IndexerPhase, Kernels, LayerKind, Router
from model.flops import parameter_shapes
from model.hyper_connections import HyperConnection
from model.kernels.ran import KERNELS_OF_OWN, Ran
from model.kernels.select import active_kernels
from model.moe.experts import Experts
from model.moe.router import Gate
from model.precision import precision_of
from model.transformer import DeepSeekV4
from optim.config import AdamWConfig
from optim.groups import Owner, ParamRecord, build_table
from optim.muon import update_scale
from parallel.collectives import local
from parallel.compiled_blocks import CompiledBlocks
from parallel.engine import Shares, Update
from parallel.pieces import largest_of, norms_of, total_of
from parallel.pipeline import Pipeline
from parallel.pipeline_split import splits_backward
from quant.config import ExpertFormat
from train.audit.by_operations import ByOperations, allowed
from train.audit.orthogonal import largest_singular_value, most_asked_for
from train.audit.samples import AuditSample
from train.audit.seam_watch import SeamReading
from train.config.schema import ActivationCheckpoint, RunConfig
from train.errors import UserError
from train.step import StepPlan

# Share that U - U U^T U has of the energy of U: (1 - s^2)^2 for a singular value s. Five steps of
# Newton-Schulz leave s in 0.7 .. 1.2, which gives 0.26 at most; 0.5 and 1.5 give 0.56 and 1.6.
_FLAT = 0.5
# Of the largest singular value: 0.02 for products in bf16 (a few roundings of 2^-9), 0.04 for the
# rounding of W, whose elements are _LOST_DIGITS of the update's at most and independent.
_LOUD = 0.06
_LOST_DIGITS = 0.02  # rounding of W beside its update, above which an update cannot be judged
_EPS = torch.finfo(torch.float32).eps
_LOST_MOMENTUM = 0.02  # of its norm; bf16 storage rounds by 2^-9
_LEAST_SQUARE = 1e-35  # fp32 and bf16 lose digits below 1e-38
_CHUNK = 1 << 20  # elements of a state looked at once
# fp32 knows W (1 - lr wd), in the update and here, and the sum of the update to half of this each.
_ROUNDINGS = 1.5 * _EPS


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


@dataclass(frozen=True)
class KnownUpdate:
    """What the audit knows of the updates of an algorithm.

    Attributes:
        form: faults of the update of a parameter, by its sample and its weight after the step.
        usual: its usual element, as a multiple of the learning rate.
        largest: about the largest element of the update just done, as such a multiple.
    """

    form: Callable[[Evidence, str, AuditSample, Tensor], Iterator[str]]
    usual: Callable[[Evidence, str], float]
    largest: Callable[[Evidence, str], float]


# ---- who moves what -----------------------------------------------------------------------------
def tracked(e: Evidence) -> Iterator[str]:
    """Autograd tracks what trains, and nothing else."""
    for name, _ in e.model.named_parameters():
        if name in e.trained and name not in e.requires_grad:
            yield f"{name} should train in this phase but is frozen (requires_grad=False)"
        if name not in e.trained and name in e.grad_norms:
            yield f"{name} is frozen in this phase but received a gradient"


def early(e: Evidence) -> Iterator[str]:
    """Nothing moves before the update."""
    for name in sorted(e.early):
        yield f"{name} moved before the update: during the forward or the backward pass"


def frozen(e: Evidence) -> Iterator[str]:
    """Frozen parameters keep every bit, optimizer state included."""
    for name, _ in e.model.named_parameters():
        if name not in e.trained and name in e.changed:
            yield f"{name} is frozen in this phase but moved"
    for state in sorted(e.changed_states):
        name, _, key = state.rpartition(".")
        yield f"{name} is frozen in this phase but its optimizer state {key} moved"


def owner(e: Evidence) -> Iterator[str]:
    """Every trained parameter was moved, by the algorithm that was asked for."""
    if not e.applied:
        return
    for name in sorted(e.trained):
        if e.has_gradient(name) and name not in e.changed:
            largest = UPDATES[e.records[name].owner].largest(e, name)
            if e.step.lr * largest <= _EPS * largest_of(e.weights[name]):
                continue  # rounded away, as at the first steps of a long warm-up
            yield f"{name} received a gradient but did not move: no optimizer owns it"
            continue
        asked = e.records[name].owner.value
        ran = e.moved.get(name, "nothing")
        if ran != asked:
            yield f"{name}: {ran} moved it, but {asked} was asked for"


def algorithm(e: Evidence) -> Iterator[str]:
    """The update itself has the form of the algorithm: orthogonal for Muon, AdamW's formula."""
    if not e.applied:
        return
    for name, sample in sorted(e.samples.items()):
        if e.step.lr >= lr_to_judge(e, name):
            yield from UPDATES[e.records[name].owner].form(e, name, sample, e.weights[name])


def momentum(e: Evidence) -> Iterator[str]:
    """``M <- mu M + G`` from zero leaves the clipped gradient: seen at a run's first step."""
    if not e.applied or e.step.number != 1:
        return
    clip = e.run.optim.grad_clip
    scale = min(1.0, clip / e.update.grad_norm) if clip > 0 else 1.0
    for name in sorted(e.trained):
        if e.records[name].owner is Owner.muon and e.has_gradient(name):
            got = float(norms_of(e.optimizer_after[name]["momentum"], False).norm())
            asked = scale * float(e.grad_norms[name].norm())
            if not abs(got - asked) <= _LOST_MOMENTUM * asked:
                yield (
                    f"{name}: the first step leaves {got / asked:.3g} times its clipped gradient as"
                    " momentum, but muon adds it up whole"
                )


def live(e: Evidence) -> Iterator[str]:
    """The next forward pass reads what the update set."""
    for name in e.stale:
        yield f"{name}: the next forward pass reads another value than its master's"


def lr_to_judge(e: Evidence, name: str) -> float:
    """Learning rate from which an update stands out of the rounding of the weight itself."""
    usual = UPDATES[e.records[name].owner].usual(e, name)
    return _EPS * e.samples[name].largest / (_LOST_DIGITS * usual)


def check_audited(run: RunConfig) -> None:
    """Refuse an optimizer whose updates nothing here would judge.

    Raises:
        UserError: names it, and what lacks.
    """
    table = build_table(parameter_shapes(run.model), run.optim, run.model.split_counts)
    for owner in sorted({record.owner for record in table} - UPDATES.keys()):
        raise UserError(
            f"optim.name={run.optim.name.value}: the audit does not know what an update of"
            f" {owner.value} looks like; it needs a line in UPDATES of train/audit/checks.py"
        )


def _muon_size(e: Evidence, name: str) -> float:
    """Root mean square of an update of full rank."""
    record = e.records[name]
    rows, cols = math.prod(record.shape[:-1]) // record.num_matrices, record.shape[-1]
    return update_scale(rows, cols, e.run.optim.muon) / math.sqrt(max(rows, cols))


def _adamw_size(e: Evidence, name: str) -> float:
    """A chunk at a time: a tensor of this size may have no room."""
    config, state = e.run.optim.adamw, e.optimizer_after[name]
    steps = float(local(state["step"]))
    moments = [local(state[key]).detach().reshape(-1) for key in ("exp_avg", "exp_avg_sq")]
    most = moments[0].new_zeros(1, dtype=torch.float32)
    for first, second in zip(*(moment.split(_CHUNK) for moment in moments), strict=True):
        step = _adamw_step(first.float(), second.float(), config, steps)
        most = torch.maximum(most, torch.linalg.vector_norm(step, math.inf))
    return largest_of(state["exp_avg"], most)


def _adamw_step(first: Tensor, second: Tensor, config: AdamWConfig, steps: float) -> Tensor:
    """The update that moments ask for, as a multiple of the learning rate; fp32."""
    root = (second / (1 - config.betas[1] ** steps)).sqrt_().add_(config.eps)
    return (first / (1 - config.betas[0] ** steps)).div_(root)


def _muon_form(e: Evidence, name: str, sample: AuditSample, after: Tensor) -> Iterator[str]:
    record, lr = e.records[name], e.step.lr
    rows, cols = sample.before.shape
    scale = update_scale(rows, cols, e.run.optim.muon)
    update = sample.before.mul_(1 - lr * record.weight_decay).sub_(sample.of(after))
    energy, off = distance_from_orthogonal(update.div_(lr * scale))
    if not (energy > 0 and off <= _FLAT):
        yield (
            f"{name}: muon was asked for, but {off:.2g} of the update's energy is off an orthogonal"
            f" matrix (at most {_FLAT})"
        )
    most, asked = largest_singular_value(update), most_asked_for(e.run.optim.muon)
    if not most <= asked + _LOUD:
        yield (
            f"{name}: the update's largest singular value is {most:.3g}, but the iterations of"
            f" optim.muon.newton_schulz leave {asked:.3g} at most"
        )


def distance_from_orthogonal(update_RC: Tensor) -> tuple[float, float]:
    """Energy of U, and the share that U - U U^T U has of it: 0 where singular values are 0 or 1.

    In fp32. Columns of U have a norm near 1, so that an element of a product of n terms is off by
    ``n 2^-24`` at most, and U U^T U by ``sqrt(r) n 2^-23`` of its norm for r columns: 0.12 for
    V4-Flash's largest [32768, 1024] if all roundings went one way, and else a thousandth.
    """
    tall = update_RC if update_RC.shape[0] >= update_RC.shape[1] else update_RC.T
    off = (tall @ (tall.T @ tall)).sub_(tall)
    energy = float(root_sum_square(tall)) ** 2
    return energy, float(root_sum_square(off)) ** 2 / max(energy, 1e-30)


def root_sum_square(x: Tensor) -> Tensor:
    """Euclidean norm in fp32, by rows and then over rows.

    No sum has more than about ``2 sqrt(n)`` terms, so it is off by ``sqrt(n) 2^-23`` at most,
    5e-4 for 2^24 elements, in whatever order a device adds them.
    """
    flat = x.reshape(-1)
    width = max(1, math.isqrt(flat.numel()))
    body = flat.numel() // width * width
    rows = torch.linalg.vector_norm(flat[:body].view(-1, width), dim=1)
    rest = torch.linalg.vector_norm(flat[body:])
    return torch.linalg.vector_norm(torch.cat([rows, rest[None]]))


def _adamw_form(e: Evidence, name: str, sample: AuditSample, after: Tensor) -> Iterator[str]:
    """Every rank compares the part that it holds."""
    state = e.optimizer_after[name]
    if not {"exp_avg", "exp_avg_sq", "step"} <= state.keys():
        yield f"{name}: adamw was asked for, but its state holds {sorted(state)}"
        return
    lr, decay, steps = e.step.lr, e.records[name].weight_decay, float(local(state["step"]))
    first, second = sample.of(state["exp_avg"]), sample.of(state["exp_avg_sq"])
    # A gradient near 0 has a square that storage cannot hold; the update knew it in full.
    lost = (second < _LEAST_SQUARE) & (first != 0)
    expected = _adamw_step(first, second, e.run.optim.adamw, steps).masked_fill_(lost, 0.0)
    norms = [root_sum_square(sample.before), root_sum_square(expected)]
    got = sample.before.mul_(1 - lr * decay).sub_(sample.of(after)).div_(lr)
    norms.append(root_sum_square(got.masked_fill_(lost, 0.0).sub_(expected)))
    weight, size, off = total_of(after, torch.stack(norms).square()).sqrt().tolist()
    error = max(off - _ROUNDINGS * weight / lr, 0.0) / max(size, 1e-30)  # less what W may hide
    if not error <= 0.1:  # bf16 state: 1e-2
        yield f"{name}: adamw was asked for, but the update is {error:.2g} off its formula"


# ---- the objective ------------------------------------------------------------------------------
def objective(e: Evidence) -> Iterator[str]:
    """The total that was minimised is the sum of its parts under the weights asked for."""
    losses, weights = e.shares.losses, e.step.weights
    config = e.run.model
    csa = sum(config.kind(i) is LayerKind.csa for i in range(config.num_hidden_layers))
    parts = {
        "loss": (1.0, losses["loss"]),
        "loss_mtp": (weights.mtp, losses["loss_mtp"]),
        "loss_indexer": (weights.indexer * csa, losses["loss_indexer"]),
        "loss_balance": (weights.balance * len(e.learned_gate_names()), losses["loss_balance"]),
    }
    assert e.shares.total is not None
    expected = sum(weight * float(value) for weight, value in parts.values())
    total = float(e.shares.total)
    if not abs(total - expected) <= 5e-6 * abs(expected):
        shown = " + ".join(f"{w:g} * {name} {float(v):.6g}" for name, (w, v) in parts.items())
        yield f"the objective is {total:.7g}, but {shown} = {expected:.7g}"


def mtp(e: Evidence) -> Iterator[str]:
    """MTP has a loss where it was asked for, and does nothing where it was not."""
    depths = e.run.model.num_nextn_predict_layers
    ran = [name for name in e.seams.passes if name.startswith("mtp.")]
    if ran and not e.step.weights.mtp:
        yield f"{ran[0]} ran, but the MTP loss has the weight 0"
    if not (depths and e.step.weights.mtp > 0 and e.longest_document > 2):
        return
    if len(e.model.mtp) != depths and e.pipeline is None:
        yield f"model.num_nextn_predict_layers={depths}, but the model has {len(e.model.mtp)}"
    if not float(e.shares.losses["loss_mtp"]) > 0:
        loss = float(e.shares.losses["loss_mtp"])
        yield f"the MTP loss is {loss} with weight {e.step.weights.mtp}"


def indexer(e: Evidence) -> Iterator[str]:
    """The indexers have a loss where it was asked for."""
    loss = float(e.shares.losses["loss_indexer"])
    if e.step.weights.indexer > 0 and e.csa_layers() and not loss > 0:
        yield f"the indexer loss is {loss} with weight {e.step.weights.indexer}"


def balance(e: Evidence) -> Iterator[str]:
    """The balance loss is there where it was asked for; 1 at perfect balance, never 0."""
    loss = float(e.shares.losses["loss_balance"])
    if e.step.weights.balance > 0 and e.learned_gate_names() and not loss > 0:
        yield f"the balance loss is {loss} with weight {e.step.weights.balance}"


def bias(e: Evidence) -> Iterator[str]:
    """Every learned gate's bias moved by the speed asked for, against the load."""
    speed = e.step.weights.bias_update_speed if e.update.applied else 0.0
    for name, gate in e.learned_gates().items():
        load_E = e.shares.expert_load.get(name)
        if load_E is None:
            yield f"{name} reported no expert load"
            continue
        expected = e.biases[name]
        if speed:
            expected = expected + speed * torch.sign(load_E.mean() - load_E)
        if not torch.allclose(gate.bias, expected, rtol=0, atol=1e-3 * speed):
            moved = float((gate.bias - e.biases[name]).abs().max())
            yield f"{name}.bias moved by {moved:g}, train.bias_update_speed asks for {speed:g}"


# ---- kernels ------------------------------------------------------------------------------------
# Op -> modules that call it once a pass, and of how many one does: of the two HyperConnections of a
# block the first reads the streams, the second forms them while it reads, and writes them.
_CALLERS = {
    "attention": (WindowAttention, 1),
    "mhc_pre": (HyperConnection, 2),
    "mhc_merge_pre": (HyperConnection, 2),
    "mhc_merge": (HyperConnection, 2),
    "swiglu": (Experts, 1),
}


def kernels(e: Evidence) -> Iterator[str]:
    """Every op was served by the code that ``model.kernels`` stands for here, in each call."""
    asked = Kernels(e.run.model.kernels)
    table = active_kernels(asked, next(e.model.parameters()).device)
    for (op, kind), calls in sorted(e.ran.calls.items()):
        if kind != table[op]:
            yield f"model.kernels={asked.value}: {op} was served by {kind.value}, not {table[op]}"
        plain = e.ran.without[op, kind] if kind in KERNELS_OF_OWN else 0
        if plain and not _left_to_torch(e, op, kind):
            yield (
                f"model.kernels={asked.value}: {op} was called {calls} times by its {kind.value}"
                f" implementation, and in {plain} of them no {kind.value} kernel was started"
            )
    for op, (caller, one_of) in _CALLERS.items():
        served = sum(e.ran.calls[op, kind] for kind in Kernels)
        least = e.num_microbatches * (_callers(e, caller) // one_of)
        if served < least:
            yield (
                f"model.kernels={asked.value}: {op} was served {served} times by the table,"
                f" {least} or more were to be: something else runs in its place"
            )


def _left_to_torch(e: Evidence, op: str, kind: Kernels) -> bool:
    """Whether an implementation says of itself that it leaves this to torch.

    Triton's block_linear is torch's batched product; C++ leaves what it cannot serve
    (``model/kernels/*_cpu.py``).
    """
    if kind is not Kernels.compiled:
        return op == "block_linear"
    asked = e.run.model.kernels == Kernels.compiled
    phase = e.step.stage.indexer_phase
    return not asked or (op == "indexer_loss" and phase is not IndexerPhase.sparse)


def _callers(e: Evidence, caller: type[torch.nn.Module]) -> int:
    """Modules of a kind in the blocks that ran."""
    blocks = [m for name, m in e.model.named_modules()
              if isinstance(m, Block) and e.seams.passes[name]]  # fmt: skip
    return sum(isinstance(m, caller) for block in blocks for m in block.modules())


# ---- precision and quantisation -----------------------------------------------------------------
def precision(e: Evidence) -> Iterator[str]:
    """The large matmuls ran in the dtype asked for, and the head's in its own."""
    head = e.run.train.head_precision.value
    here = any(name.rpartition(".")[2] == "head" for name, _ in e.model.named_modules())
    if set(e.ran.heads) != ({head} if here else set()):
        found = ", ".join(sorted(e.ran.heads)) or "nothing"
        yield f"the head multiplied in {found}, train.head_precision={head} was asked for"
    asked = e.run.train.precision.value
    for name, dtype in e.seams.input_dtypes.items():
        compute = precision_of(f"{name}.weight", asked).compute
        if dtype != compute and (compute != torch.float32 or asked == "fp32"):
            yield f"{name} multiplied in {dtype}, train.precision={asked} asks for {compute}"


_OP_ERROR = {"fp4": (0.05, 0.4), "fp8": (0.01, 0.05)}  # relative error of a product of its format


def quant(e: Evidence) -> Iterator[str]:
    """Each part of the quant section acted on every module that it names, and nothing else did."""
    parts = e.run.quant.parts()
    on = e.step.stage.quantised
    fp8_inputs = parts.activations  # their error adds to the weights'
    for name, error in e.seams.op_errors.items():
        part = _part_of(name)
        wanted = getattr(parts, part) if part and on else False
        if part == "experts" and on:
            wanted = parts.experts.value if parts.experts is not ExpertFormat.none else False
        low, high = _OP_ERROR["fp4" if wanted == "fp4" else "fp8"]
        if wanted and not low < error < (0.5 if fp8_inputs else high):
            yield f"quant.{part}: {name} gave products {error:.2g} off the plain ones"
        if not wanted and error > _OP_ERROR["fp8"][0]:
            yield f"{name} gave products {error:.2g} off the plain ones, unasked by quant"
    for name, error in e.seams.cast_errors.items():
        part = "indexer" if ".indexer." in name else "kv"
        wanted = on and getattr(parts, part)
        if wanted and not error > 5e-3:
            yield f"quant.{part}: {name} left its values as they were (relative {error:.2g})"
        if not wanted and error > 0:
            yield f"{name} changed its values by {error:.2g}, which quant.{part} did not ask for"
    for name, rounded in e.seams.rounded_weights.items():
        if rounded != (on and parts.stored):
            is_read = "rounded to bf16" if rounded else "in full"
            yield f"quant.stored={parts.stored}: {name}.weight is read {is_read}"


def recompute(e: Evidence) -> Iterator[str]:
    """Blocks ran once more for each backward pass where recomputation was asked for."""
    asked = e.run.train.activation_checkpoint
    if e.step.stage.indexer_phase is IndexerPhase.warmup:
        return  # most blocks have no backward pass
    for name, passes in e.seams.passes.items():
        again = e.num_microbatches if e.pipeline is None else e.pipeline.backward_passes(name)
        wanted = e.num_microbatches + (0 if asked is ActivationCheckpoint.none else again)
        if passes != wanted:
            yield (
                f"{name} ran {passes} times in {e.num_microbatches} microbatches,"
                f" train.activation_checkpoint={asked.value} asks for {wanted}"
            )


def compiled(e: Evidence) -> Iterator[str]:
    """Every block ran as a graph, and the graphs gave what their operations give.

    Gradients are judged one by one (``train/audit/by_operations.py``).
    """
    if e.compiled is None:
        return
    if not e.compiled.graphs:
        yield "train.compile=true: no graph was built"
    for name in e.compiled.names:
        calls, passes = e.compiled.calls[name] - e.graph_calls[name], e.seams.passes[name]
        if calls != passes:
            yield f"train.compile=true: {name} ran {passes} times, and its graph {calls} times"
    digits = {"fp32": torch.float32, "bf16": torch.bfloat16}[e.run.train.precision.value]
    unit = torch.finfo(digits).eps
    bound = allowed(unit)
    for name, loss in e.by_operations.shares.losses.items():
        found, value = float(e.shares.losses[name]), float(loss)
        if not abs(found - value) <= bound * abs(value):
            yield (
                f"train.compile=true: the graphs give {name} {found:.7g}, their operations"
                f" {value:.7g}; {bound:.1g} of it may be rounding"
            )
    yield from e.by_operations.faults(unit)


def pipeline(e: Evidence) -> Iterator[str]:
    """The schedule asked for ran every microbatch once forward and once backward on each stage."""
    if e.pipeline is None:
        return
    asked = e.run.parallel.schedule
    ran = e.pipeline.schedule_name
    if ran.lower() != f"schedule{asked}":
        yield f"{ran} ran, parallel.schedule={asked} was asked for"
    done = Counter((action.stage, action.kind, action.microbatch) for action in e.pipeline.actions)
    for stage in e.pipeline.stages:
        index = stage.parts.index
        for microbatch in range(e.num_microbatches):
            forward, whole, inputs, weights = (done[index, kind, microbatch] for kind in "FBIW")
            if forward != 1 or whole + weights != 1 or inputs != weights:
                yield (
                    f"stage {index} ran microbatch {microbatch} {forward} times forward, {whole}"
                    f" times backward, {inputs} and {weights} times by inputs and weights"
                )
    apart = any(kind == "W" for _, kind, _ in done)
    if apart != splits_backward(asked):
        yield (
            f"the backward pass ran {'in two parts' if apart else 'whole'},"
            f" not as parallel.schedule={asked} asks"
        )


def _part_of(module: str) -> str:
    """Part of the quant section that names a linear; empty: none does."""
    leaf = module.rpartition(".")[2]
    if ".experts." in module:
        return "experts"
    if ".shared_experts." in module:
        return "shared_experts"
    if leaf in ("e_proj", "h_proj"):
        return "mtp"
    own = ("wq_a", "wq_b", "wo_a", "wo_b", "wq", "wk", "wv", "wo")
    if leaf in own or module.endswith(".attn.wkv"):
        return "attention"
    return ""


# Without a line here an optimizer is refused: it could be any other, and nobody would notice.
UPDATES: dict[Owner, KnownUpdate] = {
    Owner.muon: KnownUpdate(_muon_form, _muon_size, _muon_size),
    Owner.adamw: KnownUpdate(_adamw_form, lambda e, name: 1.0, _adamw_size),
}
BEFORE_UPDATE: dict[str, Check] = {
    "tracked": tracked,
    "early": early,
    "objective": objective,
    "mtp": mtp,
    "indexer": indexer,
    "balance": balance,
    "kernels": kernels,
    "precision": precision,
    "quant": quant,
    "recompute": recompute,
    "compiled": compiled,
    "pipeline": pipeline,
}
AFTER_UPDATE: dict[str, Check] = {
    "frozen": frozen,
    "owner": owner,
    "momentum": momentum,
    "algorithm": algorithm,
    "live": live,
    "bias": bias,
}
