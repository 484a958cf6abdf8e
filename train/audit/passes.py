"""What the audit asks of a step's passes: kernels, precision, casts, graphs, schedule.

Each check looks at the modules that ran and at what served them, beside what the config asks for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch

from model.attention.core import WindowAttention
from model.block import Block
from model.config import IndexerPhase, Kernels
from model.hyper_connections import HyperConnection
from model.kernels.ran import KERNELS_OF_OWN, Ran
from model.kernels.select import active_kernels
from model.moe.experts import Experts
from model.precision import precision_of
from parallel.pipeline_split import splits_backward
from quant.config import ExpertFormat
from train.audit.by_operations import allowed
from train.audit.evidence import Evidence
from train.config.schema import ActivationCheckpoint

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
    yield from order_of_sums(e.run.model.deterministic, e.ran)


def order_of_sums(deterministic: bool, ran: Ran) -> Iterator[str]:
    """Sums over the queries of an entry keep an order, or none, in every pass.

    Args:
        deterministic: as ``model.deterministic``.
        ran: what ran.
    """
    for kernel in ran.kernels:
        if kernel.endswith("_atomic") if deterministic else kernel == "segment_sum":
            asked = str(deterministic).lower()
            yield f"model.deterministic={asked}: {kernel} was started, which sums the other way"


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
