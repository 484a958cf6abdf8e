"""What a rank exchanges in a step, in closed form: from config, layout and its layers alone.

Rows are one document each, tokens spread evenly over experts, blocks recompute
(``train.activation_checkpoint=block``): whatever a forward pass exchanges it exchanges twice. Bytes
and names are those of :mod:`scripts.layout_trials.exchanges`.
"""

# Legend (in comments): D hidden, S tokens of a shard, P ranks that share a row
from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from torch import nn

from model.config import LayerKind, Router
from model.parameter_counts import parameter_shapes
from model.precision import precision_of
from optim.groups import Owner, ParamRecord, build_table
from optim.muon import CHUNK_ELEMENTS, expand
from optim.muon_distributed import Matrix, Part, assign_owners
from parallel.mesh import Mesh, expert_shard_dim
from parallel.pipeline_split import rank_of_stage
from parallel.pipeline_stage import ModelPart
from quant.apply import reads_master
from scripts.layout_trials.exchanges import (
    COPY,
    COUNTS,
    DOCUMENTS,
    ENDS,
    GREETING,
    MUON,
    ROWS,
    STREAMS,
    SUMS,
    Key,
    Seen,
    entries,
    tokens_before,
)  # fmt: skip
from train.config.schema import Precision, RunConfig
from train.stages import Stage, loss_weights


@dataclass
class Expected(Seen):
    """How often, and bytes in all; ``exact``: what is seen must be equal."""

    exact: bool = True


Forms = defaultdict[Key, Expected]
# Of parallel/fsdp.py: what is used around a MTP block's own forward pass is gathered by itself.
_MTP_ENDS, _MTP_PROJECTIONS = ("enorm", "hnorm", "norm", "hc_head"), ("e_proj", "h_proj")


def expected(
    run: RunConfig, stage: Stage, model: nn.Module, mesh: Mesh, count: int
) -> dict[Key, Expected]:
    """The exchanges of one step.

    Args:
        run: resolved degrees, no replicas; every rank scores its own queries.
        stage: of training, in which all parameters learn.
        model: tells which layers the rank holds, and in which order.
        mesh: tells which rank it is.
        count: microbatches of the rank.
    """
    out: Forms = defaultdict(Expected)
    names = [f"{part}.{n}" for part in ("layers", "mtp") for n in getattr(model, part)]
    for name in names:
        if stage.cp > 1:
            _context(out, name, run, stage, mesh, count)
        if run.parallel.ep > 1:
            _experts(out, name, run, stage, count)
    _parameters(out, names, run, model, mesh, count)
    if run.parallel.pp > 1:
        _streams(out, run, stage, model, mesh, count)
    _muon(out, run, model, mesh)
    for few in (SUMS, GREETING):  # some numbers, once a step or once a run
        out[Key(ENDS, few)].exact = False
    return dict(out)


def _layer(name: str, run: RunConfig) -> tuple[LayerKind, int, Router]:
    """Kind, tokens of an entry, router; a MTP block has a window alone."""
    part, _, number = name.partition(".")
    if part == "mtp":
        return LayerKind.swa, 0, Router.learned
    return run.model.kind(int(number)), run.model.ratio(int(number)), run.model.router(int(number))


def _compute_bytes(run: RunConfig) -> int:
    return 2 if run.train.precision is Precision.bf16 else 4


def _context(out: Forms, name: str, run: RunConfig, stage: Stage, mesh: Mesh, count: int) -> None:
    """Tokens before the shard, entries and keys of all shards, counts of documents."""
    config = run.model
    kind, ratio, router = _layer(name, run)
    P, rows, size = stage.cp, stage.micro_batch_size, stage.seq_len // stage.cp
    rank, c = mesh.contexts[P].get_local_rank(1), _compute_bytes(run)

    def before(tokens: int, channels: int, itemsize: int) -> None:
        # the row begins at rank 0; what ranks behind read of this shard comes back
        there, back = min(tokens, rank * size), min(tokens, (P - 1 - rank) * size)
        of_token = rows * channels * itemsize
        out[Key(name, tokens_before(tokens, channels, "there"))].add(2 * count, there * of_token)
        out[Key(name, tokens_before(tokens, channels, "back"))].add(count, back * of_token)

    def all_entries(dim: int) -> None:
        whole = rows * P * math.ceil(size / ratio) * dim * c
        out[Key(name, entries(dim, "there"))].add(2 * count, whole)
        out[Key(name, entries(dim, "back"))].add(count, whole)

    dense = kind is LayerKind.dense
    before((stage.seq_len if dense else config.sliding_window) - 1, config.head_dim, c)
    if kind in (LayerKind.csa, LayerKind.hca):
        blocks = 2 if kind is LayerKind.csa else 1  # values and logits of each, fp32
        dims = (
            [config.head_dim, config.index_head_dim] if kind is LayerKind.csa else [config.head_dim]
        )
        for dim in dims:
            before(blocks * ratio - 1, 2 * blocks * dim, 4)
            all_entries(dim)
    if router is Router.learned and loss_weights(stage, run.train, False).balance:
        out[Key(name, DOCUMENTS)].add(2 * count, rows * config.n_routed_experts * 8)


def _experts(out: Forms, name: str, run: RunConfig, stage: Stage, count: int) -> None:
    """Copies to their experts and back, their weights, how many they are."""
    config = run.model
    copies = stage.micro_batch_size * stage.seq_len // stage.cp * config.num_experts_per_tok
    out[Key(name, COUNTS)].add(2 * count, config.n_routed_experts * 4)
    out[Key(name, ROWS)].add(3 * count, copies * 4)  # weights: two passes and the gradient
    out[Key(name, ROWS)].add(6 * count, copies * config.hidden_size * _compute_bytes(run))


def _parameters(
    out: Forms, names: list[str], run: RunConfig, model: nn.Module, mesh: Mesh, count: int
) -> None:
    """Weights made whole in their compute dtype; whole fp32 gradients cut and summed.

    A pipeline stage stays gathered for the whole step; else every pass gathers, but what the root
    holds serves both passes.
    """
    layout, config = run.parallel, run.model
    shards, of_experts = layout.shard_degree, mesh.experts.size()
    groups: defaultdict[tuple[str, str], int] = defaultdict(int)  # layer, group -> bytes gathered
    reduced: defaultdict[tuple[str, str], int] = defaultdict(int)
    shapes = parameter_shapes(config)
    for name, shape in shapes.items():
        layer = ".".join(name.split(".")[:2])
        copies = 1 if layer in names else _held_at_the_ends(name, layer, model)
        if not copies:
            continue
        precision = precision_of(name, run.train.precision.value)
        itemsize = 4 if reads_master(run.quant, name) else precision.compute.itemsize
        if layer not in names:
            layer, group, itemsize = ENDS, "root", 4
        elif layout.ep > 1 and ".experts." in name:
            group = "experts"
        elif layer.startswith("mtp") and name.split(".")[2] in _MTP_ENDS:
            group, itemsize = "ends", 4
        elif layer.startswith("mtp") and name.split(".")[2] in _MTP_PROJECTIONS:
            group = "projections"
        else:
            group = f"{itemsize}"
        if group == "experts":
            if of_experts == 1:
                continue
            elements = math.prod(shape) // layout.ep
        else:
            elements = math.ceil(shape[0] / shards) * shards * math.prod(shape[1:])
        groups[layer, group] += copies * elements * itemsize
        reduced[layer, group] += copies * elements * 4
    for (layer, group), size in groups.items():
        roots = _roots(model) if layer == ENDS else 1
        passes = 1 if layout.pp > 1 else count * (1 if layer == ENDS else 2)
        out[Key(layer, "parameters")].count += passes * roots
        out[Key(layer, "parameters")].bytes += passes * size
        times = 1 if layout.pp > 1 else count
        out[Key(layer, "gradients")].count += times * roots
        out[Key(layer, "gradients")].bytes += times * reduced[layer, group]


def _stages(model: nn.Module) -> list[nn.Module]:
    return list(model.stages) if isinstance(model, ModelPart) else [model]


def _roots(model: nn.Module) -> int:
    """Stages of this rank that hold something which is in no block."""
    return sum(any(hasattr(s, n) for n in ("embed", "head")) for s in _stages(model))


def _held_at_the_ends(name: str, layer: str, model: nn.Module) -> int:
    """How many of this rank's stages hold it."""
    if layer.startswith(("layers.", "mtp.")):
        return 0
    return sum(hasattr(stage, name.split(".")[0]) for stage in _stages(model))


def _streams(
    out: Forms, run: RunConfig, stage: Stage, model: nn.Module, mesh: Mesh, count: int
) -> None:
    """Streams to the next pipeline stage and their gradients, in and out; the embedding's copy."""
    assert isinstance(model, ModelPart)
    config, layout, here = run.model, run.parallel, mesh.pipeline.get_local_rank()
    tokens = stage.micro_batch_size * stage.seq_len // stage.cp
    size = tokens * config.num_streams * config.hidden_size * _compute_bytes(run)
    for one in model.stages:
        for index in (one.parts.index - 1, one.parts.index + 1):
            if 0 <= index < one.parts.count:
                if rank_of_stage(index, layout.pp, layout.schedule) != here:
                    out[Key(ENDS, STREAMS)].add(2 * count, size)
    ends = [
        rank_of_stage(i, layout.pp, layout.schedule) for i in (0, model.stages[0].parts.count - 1)
    ]
    if config.num_nextn_predict_layers and ends.count(here) == 1:
        shard = math.ceil(config.vocab_size / layout.shard_degree) * config.hidden_size * 4
        # the weight before the first step, its gradient, the moved weight
        out[Key(ENDS, COPY)].add(3, shard)


def _muon(out: Forms, run: RunConfig, model: nn.Module, mesh: Mesh) -> None:
    """Matrices to their owners in fp32 and updates back in bf16, an exchange each way a round.

    An owner receives what it lacks of its matrices, and every rank the update of its own parts of
    the matrices of others. Who owns which is the rule of ``optim/muon_distributed.py``, applied to
    parts that follow from shapes and layout.
    """
    ranks, here, config = mesh.data.size(), mesh.data_rank, run.model
    table = build_table(parameter_shapes(config), run.optim, config.split_counts)
    records = {record.name: record for record in table if record.owner is Owner.muon}
    matrices: list[Matrix] = []
    for name, _ in model.named_parameters():  # of equal matrices the first has the first choice
        if name in records:
            matrices += _matrices(records[name], run.parallel.ep, ranks)
    owned: defaultdict[tuple[int, int], list[list[Matrix]]] = defaultdict(
        lambda: [[] for _ in range(ranks)]
    )
    travels = out[Key(ENDS, MUON)]
    owners = assign_owners(matrices, ranks, len(expand(run.optim.muon)))
    for matrix, owner in zip(matrices, owners, strict=True):
        owned[matrix.rows, matrix.cols][owner].append(matrix)
        mine = matrix.parts[here].size if here in matrix.parts else 0
        travels.bytes += 4 * (matrix.rows * matrix.cols - mine) if owner == here else 2 * mine
    for (rows, cols), of_ranks in owned.items():
        size = max(1, CHUNK_ELEMENTS["cpu"] // (rows * cols))
        for start in range(0, max(map(len, of_ranks)), size):
            now = [matrix for some in of_ranks for matrix in some[start : start + size]]
            travels.count += 2 * any(len(matrix.parts) > 1 for matrix in now)


def _matrices(record: ParamRecord, ep: int, ranks: int) -> list[Matrix]:
    """The matrices of a parameter, and the part of each that every rank holds."""
    count, (*_, rows, cols) = record.num_matrices, record.shape
    if len(record.shape) == 2:  # matrices one below the other, cut anywhere
        rows, ep, unit, dim = rows // count, 1, 1, 0
    else:  # experts; consecutive ranks hold others, and what ep leaves of the ranks shares those
        unit, dim = rows, expert_shard_dim(record.shape, ep, ranks // ep) if ep > 1 else 0
    held, shards = count // ep, ranks // ep
    parts: list[dict[int, Part]] = [{} for _ in range(count)]
    for rank in range(ranks):
        shard, first, stop = rank // ep, rank % ep * held, (rank % ep + 1) * held
        for i in range(first, stop):
            top, bottom, left, right = 0, rows, 0, cols
            if dim == 0:
                size = math.ceil(held * rows // unit / shards) * unit
                begin = (first - i) * rows + shard * size
                top, bottom = max(0, begin), min(rows, begin + size)
            elif dim == 1:
                top, bottom = (n * rows // shards for n in (shard, shard + 1))
            else:
                left, right = (n * cols // shards for n in (shard, shard + 1))
            if top < bottom:
                parts[i][rank] = Part(top, bottom, left, right)
    return [Matrix(record.name, i, rows, cols, parts[i]) for i in range(count)]
