"""Which rank holds which blocks, and which schedules a batch admits: decided from numbers alone.

Stages are cut so that the costliest is as cheap as possible by the FLOPs formula, embedding, head
and MTP included. Interleaved and V schedules give each rank two stages: interleaved ones the
stages r and r + P of P ranks, V schedules r and 2P - 1 - r, so that the loss is on rank 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from model.config import ModelConfig
from model.flops import training_flops_by_block
from parallel.config import ParallelConfig
from parallel.errors import ConfigError

_V_SCHEDULES = ("zbvzerobubble", "dualpipev")
_TWO_STAGES = ("interleaved1f1b", "interleavedzerobubble", *_V_SCHEDULES)
_SPLIT_BACKWARD = ("interleavedzerobubble", *_V_SCHEDULES)


@dataclass(frozen=True)
class PipelineStageParts:
    """What one pipeline stage holds.

    Attributes:
        index: number of the stage; activations go from low to high.
        count: number of stages.
        layers: main blocks; none where the last stage is head and MTP alone.
        flops: per token, forward and backward.
    """

    index: int
    count: int
    layers: range
    flops: float

    @property
    def first(self) -> bool:
        """Whether it begins with the embedding."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether it ends with head and MTP."""
        return self.index == self.count - 1


def stages_per_rank(schedule: str) -> int:
    """Pipeline stages that every rank holds."""
    return 2 if schedule in _TWO_STAGES else 1


def splits_backward(schedule: str) -> bool:
    """Whether gradients of inputs and of weights are computed apart (zero bubble)."""
    return schedule in _SPLIT_BACKWARD


def rank_of_stage(index: int, pp: int, schedule: str) -> int:
    """Rank on the pp axis that holds a stage."""
    if schedule in _V_SCHEDULES:
        return index if index < pp else 2 * pp - 1 - index
    return index % pp


def in_flight(layout: ParallelConfig, rank: int, count: int) -> float:
    """Most microbatches whose activations a rank holds at once, per stage of the rank.

    Args:
        layout: its ``pp`` and ``schedule`` count.
        rank: on the pp axis.
        count: microbatches of a step.
    """
    pp, schedule = layout.pp, layout.schedule
    if schedule == "gpipe":
        return count
    if schedule == "1f1b":
        return min(count, pp - rank)
    # Two stages: those of the first run ahead; a weight gradient that waits holds on to its own.
    ahead = {
        "interleaved1f1b": pp + 2 * (pp - 1 - rank) + 1,
        "interleavedzerobubble": pp + 2 * (pp - 1 - rank) + 1 + rank,
        "zbvzerobubble": 2 * pp,
        "dualpipev": 2 * pp + 1,
    }[schedule]
    return min(2 * count, ahead) / 2


def check_pipeline(layout: ParallelConfig, model: ModelConfig, prefix: str = "parallel") -> None:
    """Refuse more stages than blocks.

    Raises:
        ValueError: names both keys and values.
    """
    stages = layout.pp * stages_per_rank(layout.schedule)
    if stages - 1 > model.num_hidden_layers:  # the last may be head and MTP alone
        raise ConfigError(
            f"{prefix}.pp={layout.pp} with {prefix}.schedule={layout.schedule} makes {stages}"
            f" stages, too many for model.num_hidden_layers={model.num_hidden_layers}"
        )


def check_microbatches(
    layout: ParallelConfig, count: int, batch: str, prefix: str = "parallel"
) -> None:
    """Refuse a number of microbatches that the schedule cannot run.

    Args:
        layout: resolved.
        count: microbatches of a step on each data rank.
        batch: where the number comes from, for the message.
        prefix: config path for messages.

    Raises:
        ValueError: names the keys and both values.
    """
    schedule, pp = layout.schedule, layout.pp
    stages = pp * stages_per_rank(schedule)
    problem = ""
    if schedule == "1f1b" and count < stages:
        problem = f"at least {prefix}.pp={pp}"
    if schedule == "dualpipev" and count < stages:
        problem = f"at least twice {prefix}.pp={pp}"
    if schedule in ("interleaved1f1b", "interleavedzerobubble"):
        rounds = max(1, count // pp)
        if count % rounds:
            problem = f"a multiple of its {rounds} rounds of {prefix}.pp={pp}"
    if problem:
        raise ConfigError(
            f"{prefix}.schedule={schedule} needs a number of microbatches that is {problem}, but"
            f" {batch} makes {count}"
        )


def split_stages(
    model: ModelConfig, layout: ParallelConfig, seq_len: int
) -> list[PipelineStageParts]:
    """Cut the network into consecutive stages: the costliest rank, then stage, as cheap as can be.

    Args:
        model: the model.
        layout: its ``pp`` and ``schedule`` count.
        seq_len: tokens of a row.
    """
    count = layout.pp * stages_per_rank(layout.schedule)
    cost = training_flops_by_block(model, seq_len)
    layers = [cost[f"layers.{layer}"] for layer in range(model.num_hidden_layers)]
    tail = sum(value for block, value in cost.items() if not block.startswith("layers."))
    ranks = [rank_of_stage(index, layout.pp, layout.schedule) for index in range(count)]
    edges = _improved(_cuts(layers, tail, count), layers, tail, ranks)
    costs = _costs(edges, layers, tail)
    return [
        PipelineStageParts(index, count, range(edges[index], edges[index + 1]), costs[index])
        for index in range(count)
    ]


def _costs(edges: list[int], layers: list[float], tail: float) -> list[float]:
    """Cost of each stage."""
    costs = [math.fsum(layers[a:b]) for a, b in pairwise(edges)]
    costs[-1] += tail
    return costs


def _improved(edges: list[int], layers: list[float], tail: float, ranks: list[int]) -> list[int]:
    """Shift runs of edges by one while the costliest rank, the costliest stage or the squares fall.

    The first cut balances stages; a rank with two of them may still have too much.
    """

    def badness(edges: list[int]) -> tuple[float, float, float]:
        by_rank = [0.0] * len(ranks)
        costs = _costs(edges, layers, tail)
        for rank, cost in zip(ranks, costs, strict=True):
            by_rank[rank] += cost
        return max(by_rank), max(costs), math.fsum(cost**2 for cost in costs)

    inner = range(1, len(edges) - 1)
    while True:
        shifted = [
            [edge + step * (first <= i <= last) for i, edge in enumerate(edges)]
            for first in inner
            for last in inner[first - 1 :]
            for step in (-1, 1)
        ]
        # only the last stage may be without a layer
        possible = [
            e for e in shifted if all(a < b for a, b in pairwise(e[:-1])) and e[-2] <= e[-1]
        ]
        better = min(possible, key=badness, default=edges)
        if badness(better) >= badness(edges):
            return edges
        edges = better


def _cuts(layers: list[float], tail: float, count: int) -> list[int]:
    """Edges of ``count`` parts: smallest maximum, then smallest sum of squares.

    Every part but the last, which has ``tail`` besides, takes at least one layer.
    """
    total = [0.0]
    for cost in layers:
        total.append(total[-1] + cost)
    # best[i]: of the parts so far, that hold the first i layers: (maximum, squares, edges)
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [0])}
    for part in range(count - 1):
        best = {
            stop: min(_extended(best, total, range(part, stop), stop))
            for stop in range(part + 1, len(layers) + 1)
        }
    return min(
        (max(most, total[-1] - total[i] + tail), squares + (total[-1] - total[i] + tail) ** 2,
         [*edges, len(layers)])
        for i, (most, squares, edges) in best.items()
    )[2]  # fmt: skip


def _extended(
    best: dict[int, tuple[float, float, list[int]]], total: list[float], starts: range, stop: int
) -> Iterator[tuple[float, float, list[int]]]:
    for start in starts:
        if start in best:
            most, squares, edges = best[start]
            cost = total[stop] - total[start]
            yield max(most, cost), squares + cost**2, [*edges, stop]


def describe_split(model: ModelConfig, layout: ParallelConfig, seq_len: int) -> str:
    """The split as a table: stage, rank, what it holds, share of the FLOPs."""
    stages = split_stages(model, layout, seq_len)
    total = math.fsum(stage.flops for stage in stages)
    lines = [f"pipeline of {model.name}: {layout.pp} ranks, schedule {layout.schedule}"]
    for stage in stages:
        held = ["embedding"] if stage.first else []
        if stage.layers:
            held.append(f"layers {stage.layers[0]} to {stage.layers[-1]}")
        if stage.last:
            held.append("head")
            held += [f"{model.num_nextn_predict_layers} MTP"] * bool(model.num_nextn_predict_layers)
        rank = rank_of_stage(stage.index, layout.pp, layout.schedule)
        lines.append(
            f"  stage {stage.index:2} on rank {rank:2}: {', '.join(held):44}"
            f" {stage.flops / total:6.1%} of {total / 1e6:,.1f} MFLOPs a token"
        )
    return "\n".join(lines)
