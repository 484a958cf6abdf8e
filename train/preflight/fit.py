"""Does the model fit this world? Answered from the config alone, before anything is allocated.

Bytes of the fullest rank by kind, what a rank has here, and the smallest layouts that would fit,
as a table. What a rank needs is counted in ``train/preflight/needs.py``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from model.config import ModelConfig
from model.parameter_counts import parameter_counts
from parallel.config import OffloadTo, ParallelConfig
from parallel.launch import launched_here
from parallel.pipeline_split import check_pipeline
from train.config.schema import RunConfig
from train.errors import USER_ERRORS, DoesNotFitError
from train.preflight.needs import Memory, Needs
from train.preflight.world import GB, World, gb, machine_memory
from train.stages import Stage, StagePlan, check_schedule

_CLUSTER_GPU = 80e9  # bytes of the GPU that large layouts are also searched for
_MAX_RANKS = 2**16


def check(run: RunConfig, plan: StagePlan, world: World) -> None:
    """Refuse a run that cannot fit.

    Raises:
        DoesNotFitError: names the model, what a rank needs and has; carries the table.
        UserError: the layout does not match the number of ranks.
    """
    mismatch = None
    try:
        layout = run.parallel.resolve(world.ranks)
    except USER_ERRORS as error:  # a large preset on a small machine: the table says more
        mismatch, layout = error, ParallelConfig(dp_shard=world.ranks)
    need = Needs(run, plan).peak(layout, world.device).total
    if need <= world.bytes_per_rank:
        if mismatch is not None:
            raise mismatch
        return _check_host(run, plan, layout, world)
    if not world.bytes_per_rank:
        message = "train.device=cuda, but this machine has no CUDA device (train.device=auto, cpu)"
    else:
        message = (
            f"model.name={run.model.name} needs {gb(need)} a rank on {world.ranks}"
            f" {world.device} rank(s), which have {world.memory}"
        )
    raise DoesNotFitError(message, table=report(run, plan, layout, world))


def _check_host(run: RunConfig, plan: StagePlan, layout: ParallelConfig, world: World) -> None:
    """Refuse what would rest in more host memory, or on a smaller drive, than there is."""
    needs, path = Needs(run, plan), run.engine.nvme_path
    rest = needs.resting(layout)
    if rest.disk and Path(path).is_dir():
        free = shutil.disk_usage(path).free // launched_here()
        if rest.disk > free:
            raise DoesNotFitError(
                f"engine.nvme_path={path} has {gb(free)} free a rank, but model.name="
                f"{run.model.name} needs {gb(rest.disk)} there",
                table=report(run, plan, layout, world),
            )
    if world.device == "cpu":  # its memory is the device's own
        return
    host = rest.host + needs.audited_gradients(layout)
    if host > (has := machine_memory() // launched_here()):
        raise DoesNotFitError(
            f"{', '.join(_on_host(run))}: {gb(host)} of model.name={run.model.name} in host memory,"
            f" which has {gb(has)} a rank",
            table=report(run, plan, layout, world),
        )


def _on_host(run: RunConfig) -> Iterator[str]:
    """The keys that keep something in host memory, with their values."""
    if run.parallel.offload != "none":
        yield f"parallel.offload={run.parallel.offload}"
    if run.parallel.offload_activations:
        yield "parallel.offload_activations=true"
    for key in ("offload_optimizer", "offload_parameters"):
        if (where := getattr(run.engine, key)) is not OffloadTo.none:
            yield f"engine.{key}={where.value}"
    if run.train.compile:
        yield "train.compile=true"


def smallest_layouts(
    run: RunConfig, plan: StagePlan, device: str, bytes_per_rank: float, count: int = 3
) -> list[tuple[ParallelConfig, Memory]]:
    """The layouts with the fewest ranks, powers of two, that fit; fewest pipeline stages first.

    Args:
        run: the config; its batch must split over the data ranks.
        plan: its stages.
        device: cpu or cuda.
        bytes_per_rank: what a rank may use.
        count: how many to return, all with the same number of ranks.
    """
    needs, ranks = Needs(run, plan), 1
    while ranks <= _MAX_RANKS:
        found = [f for f in layouts_on(needs, plan, device, ranks) if f[1].total <= bytes_per_rank]
        if found:
            return found[:count]
        ranks *= 2
    return []


def layouts_on(
    needs: Needs, plan: StagePlan, device: str, ranks: int
) -> list[tuple[ParallelConfig, Memory]]:
    """Layouts of a number of ranks over which every batch splits, fewest pipeline stages first.

    Args:
        needs: of the run.
        plan: its stages.
        device: cpu or cuda.
        ranks: processes, all of which are used.
    """
    tried = ((layout, needs.peak(layout, device)) for layout in _layouts(needs.run, plan, ranks))
    return sorted(tried, key=lambda found: (found[0].pp, found[1].total))


def report(run: RunConfig, plan: StagePlan, layout: ParallelConfig, world: World) -> str:
    """The fit table as text.

    Args:
        run: the config.
        plan: its stages.
        layout: the layout that was asked for, resolved.
        world: what there is.
    """
    counts = parameter_counts(run.model)
    columns = [("here", layout, Needs(run, plan).peak(layout, world.device))]
    targets = [(world.device, float(world.bytes_per_rank))] if world.bytes_per_rank else []
    if world.device == "cpu" or world.bytes_per_rank < 0.9 * _CLUSTER_GPU:
        targets.append(("cuda", _CLUSTER_GPU))
    fits = [(d, size, smallest_layouts(run, plan, d, size)) for d, size in targets]
    for device, size, found in fits:
        for candidate, memory in found[:1]:
            columns.append(
                (f"{candidate.world_size} x {size / GB:.0f} {device}", candidate, memory)
            )
    lines = [
        f"{run.model.name}: {counts.total:,} parameters, {counts.active:,} active a token",
        *memory_table([(name, memory) for name, _, memory in columns]),
    ]
    if rest := Needs(run, plan).resting(layout).text():
        lines.append(f"off the device: {rest}")
    lines.append(f"this world: {world.ranks} {world.device} rank(s) with {world.memory}, {layout}")
    lines.append("smallest layouts that would fit:")
    for device, size, found in fits:
        if not found:
            lines.append(f"  {device} ranks of {size / GB:.0f} GB: none up to {_MAX_RANKS} ranks")
        for candidate, memory in found:
            lines.append(
                f"  {candidate.world_size:5} {device} rank(s) of {size / GB:.0f} GB:"
                f" {layout_flags(candidate)} ({gb(memory.total)} a rank)"
            )
    return "\n".join(lines)


def memory_table(columns: Sequence[tuple[str, Memory]]) -> list[str]:
    """GB of a rank by kind, a column each."""
    lines = ["GB per rank".ljust(22) + "".join(name.rjust(18) for name, _ in columns)]
    for kind in (*vars(columns[0][1]), "total"):
        cells = [getattr(memory, kind) / GB for _, memory in columns]
        lines.append(kind.ljust(22) + "".join(f"{cell:18,.2f}" for cell in cells))
    return lines


def _layouts(run: RunConfig, plan: StagePlan, ranks: int) -> Iterator[ParallelConfig]:
    """Powers of two of pp and ep on ``ranks`` ranks over which every batch splits."""
    pp = 1
    while pp <= min(ranks, run.model.num_hidden_layers) and ranks % pp == 0:
        shard, ep = ranks // pp, 1
        while ep <= shard and shard % ep == 0 and run.model.n_routed_experts % ep == 0:
            if all(_splits(stage, shard) for stage in plan.reached()):
                # the schedule asked for, or the one that admits any number of microbatches
                schedules = (run.parallel.schedule, "zbvzerobubble") if pp > 1 else ("1f1b",)
                tried = (ParallelConfig(1, shard, ep, pp, schedule=s) for s in schedules)
                yield from islice((t for t in tried if _admits(t, run.model, plan)), 1)
            ep *= 2
        pp *= 2


def _splits(stage: Stage, shard: int) -> bool:
    """Whether every batch of a stage is whole microbatches on each group of ``cp`` ranks."""
    rows, groups = stage.quantum_tokens // stage.seq_len, shard // stage.cp
    return shard % stage.cp == 0 and rows % (groups * stage.micro_batch_size) == 0


def _admits(layout: ParallelConfig, model: ModelConfig, plan: StagePlan) -> bool:
    """Whether there are layers and microbatches enough for the pipeline."""
    try:
        check_pipeline(layout, model)
        check_schedule(plan, layout)
    except USER_ERRORS:
        return False
    return True


def layout_flags(layout: ParallelConfig) -> str:
    """A layout as one types it."""
    flags = f"parallel.pp={layout.pp} parallel.dp_shard={layout.dp_shard} parallel.ep={layout.ep}"
    return flags + (f" parallel.schedule={layout.schedule}" if layout.pp > 1 else "")
