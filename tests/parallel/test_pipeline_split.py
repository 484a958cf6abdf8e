"""How a network is cut into stages, and what a schedule refuses; from numbers alone."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from model.flops import training_flops_by_block
from parallel.config import SCHEDULES, ParallelConfig
from parallel.mesh import check_layout
from parallel.pipeline_split import (
    check_microbatches,
    describe_split,
    rank_of_stage,
    split_stages,
    stages_per_rank,
)
from tests.helpers import small_config, tiny_config


@pytest.mark.core
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", [2, 4])
def test_stages_hold_every_layer_once_and_the_total_cost(pp, schedule):
    config, layout = tiny_config(), ParallelConfig(pp=pp, schedule=schedule)
    stages = split_stages(config, layout, 128)
    assert [i for stage in stages for i in stage.layers] == list(range(config.num_hidden_layers))
    total = sum(training_flops_by_block(config, 128).values())
    assert sum(stage.flops for stage in stages) == pytest.approx(total)
    held = [rank_of_stage(stage.index, pp, schedule) for stage in stages]
    assert sorted(held) == sorted(list(range(pp)) * stages_per_rank(schedule))
    if schedule in ("zbvzerobubble", "dualpipev"):
        assert held == [*range(pp), *reversed(range(pp))]
    assert describe_split(config, layout, 128).count("stage ") == len(stages)


@pytest.mark.core
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_costliest_stage_is_the_cheapest_of_all_cuts(pp):
    config = tiny_config()
    cost = training_flops_by_block(config, 128)
    layers = [cost[f"layers.{i}"] for i in range(8)]
    tail = sum(cost.values()) - sum(layers)
    best = min(
        max(sum(layers[a:b]) + tail * (b == 8) for a, b in pairwise((0, *cut, 8)))
        for cut in combinations(range(1, 8), pp - 1)
    )
    stages = split_stages(config, ParallelConfig(pp=pp), 128)
    assert max(stage.flops for stage in stages) == pytest.approx(best)


@pytest.mark.core
@pytest.mark.parametrize(
    ("pp", "schedule", "count", "message"),
    [
        (4, "1f1b", 3, r"parallel\.schedule=1f1b needs .* at least parallel\.pp=4, but .* makes 3"),
        (2, "dualpipev", 3, r"at least twice parallel\.pp=2, but a batch makes 3"),
        (2, "interleaved1f1b", 5, r"a multiple of its 2 rounds of parallel\.pp=2"),
        (2, "interleavedzerobubble", 7, r"a multiple of its 3 rounds of parallel\.pp=2"),
    ],
)
def test_number_of_microbatches_that_a_schedule_cannot_run_is_refused(pp, schedule, count, message):
    layout = ParallelConfig(pp=pp, schedule=schedule)
    with pytest.raises(ValueError, match=message):
        check_microbatches(layout, count, "a batch")
    check_microbatches(layout, 4 * pp, "a batch")
    check_microbatches(replace(layout, schedule="gpipe"), 1, "a batch")


@pytest.mark.core
def test_more_stages_than_layers_are_refused():
    layout = ParallelConfig(pp=4, schedule="dualpipev").resolve(4)
    with pytest.raises(ValueError, match=r"parallel\.pp=4 .* makes 8 stages, too many for model\."):
        check_layout(layout, small_config())
