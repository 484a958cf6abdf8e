"""Every group of a run has the configured timeout, and a stage that waits gives up by it."""

import datetime
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from parallel.config import ParallelConfig
from parallel.lost_rank import all_ready, is_lost_rank
from parallel.mesh import build_mesh
from tests.helpers import run_distributed
from tests.integration.small_run import small_run, write_corpus
from train.build import build
from train.config.schema import SampleConfig
from train.errors import ExitCode

SECONDS = 47.0
CPU = torch.device("cpu")


def timeouts():
    """Description of each of this rank's groups, and its timeout in seconds."""
    return {
        f"{name} {group.group_desc}": group._get_backend(CPU).options._timeout.total_seconds()
        for group, (_, _) in distributed_c10d._world.pg_map.items()
        for name in [distributed_c10d._world.pg_names[group]]
    }


def run_on_ranks(rank, world, run):
    os.environ["WORLD_SIZE"] = str(world)
    trainer = build(run)
    for _ in range(2):  # what a step makes on its way counts too
        found = timeouts()
        assert len(found) > 2
        assert set(found.values()) == {SECONDS}, found
        if not trainer.state.progress.step:
            assert trainer.fit() == ExitCode.finished


@pytest.mark.parametrize("degrees", [{"pp": 2}, {"dp_shard": 2, "ep": 2}], ids=["pp", "dp-ep"])
def test_every_group_of_a_run_has_the_configured_timeout(tmp_path, degrees):
    run = small_run(tmp_path / "run", write_corpus(tmp_path), steps=1, micro_batch_size=1)
    layout = ParallelConfig(**degrees, timeout_seconds=SECONDS)
    run_distributed(run_on_ranks, 2, replace(run, parallel=layout, sample=SampleConfig(tokens=0)))


def wait_for_a_stage(rank, world):
    """Rank 1 sends nothing, and lives on until rank 0 has given up."""
    layout = ParallelConfig(pp=2).resolve(world)
    group = build_mesh(layout, "cpu", datetime.timedelta(seconds=2)).pipeline.get_group()
    all_ready(2)
    store = distributed_c10d._get_default_store()
    if rank == 1:
        store.wait(["given up"], datetime.timedelta(seconds=120))
        return
    buffer = torch.zeros(3)
    with pytest.raises(RuntimeError, match="Timed out") as caught:
        dist.batch_isend_irecv([dist.P2POp(dist.irecv, buffer, 1, group)])[0].wait()
    assert is_lost_rank(caught.value)
    store.set("given up", "")


@pytest.mark.core
def test_stage_that_waits_for_another_gives_up_by_the_timeout():
    run_distributed(wait_for_a_stage, 2)
