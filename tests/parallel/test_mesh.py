"""Layouts that cannot be are refused in one line, before any process group exists."""

import pytest

from optim.muon_distributed import Matrix, Part, assign_owners
from parallel.config import ParallelConfig
from parallel.mesh import check_layout, expert_shard_dim
from tests.helpers import small_config


@pytest.mark.core
@pytest.mark.parametrize(
    ("degrees", "world", "message"),
    [
        ({"ep": 3}, 3, r"parallel\.ep=3 must divide model\.n_routed_experts=4"),
        (
            {"dp_replicate": 2, "dp_shard": 3, "ep": 2},
            6,
            r"parallel\.ep=2 must divide parallel\.dp_shard=3, or be a multiple",
        ),
        (
            {"dp_shard": 76, "ep": 4},
            76,
            r"parallel\.ep=4 leaves 1 experts to 19 ranks of parallel\.dp_shard=76",
        ),
    ],
)
def test_layout_that_the_model_cannot_have_is_refused(degrees, world, message):
    layout = ParallelConfig(**degrees).resolve(world)
    with pytest.raises(ValueError, match=message):
        check_layout(layout, small_config())


@pytest.mark.core
def test_whole_experts_are_sharded_where_they_divide():
    assert expert_shard_dim((8, 32, 64), ep=2, shards=4) == 0
    assert expert_shard_dim((8, 32, 64), ep=4, shards=4) == 1
    assert expert_shard_dim((8, 30, 64), ep=4, shards=4) == 2
    assert expert_shard_dim((8, 30, 63), ep=4, shards=4) == -1


def matrix(rows, cols, ranks, cut=True):
    """A matrix cut by rows over some ranks, or whole on each."""
    share = rows // len(ranks) if cut else rows
    parts = {
        rank: Part(i * share * cut, (i * cut + 1) * share, 0, cols) for i, rank in enumerate(ranks)
    }
    return Matrix("w", 0, rows, cols, parts)


@pytest.mark.core
def test_owners_share_the_work_evenly_and_whole_matrices_stay():
    big, small = matrix(64, 64, range(4)), matrix(16, 64, range(4))
    owners = assign_owners([big, *[small] * 12], 4, 10)
    assert sorted(owners[1:]) == [r for r in range(4) if r != owners[0] for _ in range(4)]
    here = matrix(64, 64, [3], cut=False)
    copied = matrix(64, 64, [1, 3], cut=False)
    assert assign_owners([copied, here], 4, 10) == [1, 3]


@pytest.mark.core
def test_equal_parts_are_sent_once_by_the_nearest_replica():
    parts = {0: Part(0, 4, 0, 8), 1: Part(4, 8, 0, 8), 2: Part(0, 4, 0, 8), 3: Part(4, 8, 0, 8)}
    assert Matrix("w", 0, 8, 8, parts).sources(3) == {2: parts[2], 3: parts[3]}
    assert Matrix("w", 0, 8, 8, parts).sources(0) == {0: parts[0], 1: parts[1]}
