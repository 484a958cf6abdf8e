"""A sharded tensor looked at in pieces is as the whole one: oracle is the global tensor.

Rows and bits are copies, so they are equal; norms are sums of squares in another order (1e-6).
"""

import itertools

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from parallel.pieces import fingerprints, largest_of, norms_of, rows_of, total_of
from tests.helpers import run_distributed

SHAPES = [(6, 5, 4), (5, 3), (3, 8, 2), (1, 4)]
PLACEMENTS = [
    (Shard(0), Shard(1)),
    (Shard(1), Shard(0)),
    (Replicate(), Shard(0)),
    (Shard(0), Replicate()),
    (Replicate(), Replicate()),
]


def pieces_equal_the_whole(rank, world):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    for shape in SHAPES:
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for placements in PLACEMENTS:
            sharded = distribute_tensor(whole, mesh, placements)
            for start in range(shape[0]):
                for stop in range(start + 1, shape[0] + 1):
                    assert torch.equal(rows_of(sharded, start, stop), whole[start:stop])
            by_slice = norms_of(sharded, True)
            torch.testing.assert_close(by_slice, whole.flatten(1).norm(dim=1), rtol=1e-6, atol=0)
            one = norms_of(sharded, False)
            torch.testing.assert_close(one, whole.norm()[None], rtol=1e-6, atol=0)
            assert largest_of(sharded) == float(whole.abs().max())
            count = torch.tensor([float(sharded.to_local().numel())])
            assert int(total_of(sharded, count)) == whole.numel()


def test_pieces_of_a_sharded_tensor_equal_the_whole():
    run_distributed(pieces_equal_the_whole, 4)


def fingerprint(tensor):
    return fingerprints({"it": tensor})["it"]


def test_plain_tensor_is_its_own_piece():
    whole = torch.randn(4, 3, 2)
    assert torch.equal(rows_of(whole, 1, 3), whole[1:3])
    torch.testing.assert_close(norms_of(whole, True), whole.flatten(1).norm(dim=1))
    assert largest_of(torch.zeros(0)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_sees_a_first_step_of_adam(dtype):
    """Each value moves by the rate: words of one binade by one amount up or down."""
    before = torch.tensor([0.00158, -0.0013, -0.00142, 0.00139], dtype=dtype)
    for signs in itertools.product((-1.0, 0.0, 1.0), repeat=4):
        after = before - 4e-4 * torch.tensor(signs, dtype=dtype)
        assert (fingerprint(after) == fingerprint(before)) == torch.equal(after, before), signs


def test_fingerprint_sees_one_bit_a_swap_and_a_sign_of_zero():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensor = torch.randn(3, 1000).to(dtype)
        before = fingerprint(tensor)
        assert fingerprint(tensor.clone()) == before
        swapped = tensor.clone()
        swapped[0, 0], swapped[2, 7] = tensor[2, 7], tensor[0, 0]
        assert fingerprint(swapped) != before
        bits = tensor.clone()
        bits.view({4: torch.int32, 2: torch.int16, 8: torch.int64}[tensor.element_size()])[
            1, 1
        ] ^= 1
        assert fingerprint(bits) != before
    assert fingerprint(torch.zeros(2)) != fingerprint(-torch.zeros(2))
