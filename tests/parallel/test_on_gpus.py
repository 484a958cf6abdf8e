"""Two GPUs over NCCL, and the same bodies on two gloo ranks: FSDP, ep, every pipeline schedule.

A run of two ranks is compared with one process on the same device. Bounds: losses of the first
step within 1e-6, of the further ones within 1e-4 (fp32; a step's update amplifies rounding). Each
save is written behind the steps, by both ranks, and read by one process.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from parallel.config import ParallelConfig
from tests.helpers import run_distributed
from tests.integration.devices import ON_TWO
from tests.integration.small_run import final_tensors, fit, metrics_of, small_run, write_corpus
from train.config.schema import Device
from train.errors import ExitCode

STEPS = 3
LAYOUTS = {
    "fsdp": {"dp_shard": 2},
    "hsdp": {"dp_replicate": 2, "dp_shard": 1},
    "ep": {"dp_shard": 2, "ep": 2},
    **{
        schedule: {"pp": 2, "dp_shard": 1, "schedule": schedule}
        for schedule in (
            "gpipe", "1f1b", "interleaved1f1b", "interleavedzerobubble", "zbvzerobubble",
            "dualpipev",
        )
    },
}  # fmt: skip
IN_CI = ("ep",)  # the others run on gloo by hand; tests/parallel has their gradients


def variants():
    for name in LAYOUTS:
        yield pytest.param(name, "cuda", id=f"{name}-nccl", marks=ON_TWO)
        slow = [] if name in IN_CI else [pytest.mark.slow]
        yield pytest.param(name, "cpu", id=f"{name}-gloo", marks=slow)


def config(folder, corpus, device):
    return small_run(
        Path(folder), Path(corpus), steps=STEPS, device=Device(device), micro_batch_size=1,
        global_batch_tokens=8 * 48, checkpoint_every=1, keep_checkpoints=0, async_checkpoint=True,
    )  # fmt: skip


def train(rank, world, folder, corpus, device, layout):
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    run = config(folder, corpus, device)
    run.parallel = ParallelConfig(**layout)
    code, trainer = fit(run)
    assert code == ExitCode.finished
    assert {p.device.type for p in trainer.engine.model.parameters()} == {device}
    if device == "cuda":
        assert torch.cuda.current_device() == rank


@pytest.mark.parametrize(("name", "device"), list(variants()))
def test_two_ranks_train_as_one_and_both_write_every_save(name, device, tmp_path):
    corpus = write_corpus(tmp_path)
    one, two = (config(tmp_path / n, corpus, device) for n in ("one", "two"))
    assert fit(one)[0] == ExitCode.finished
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    run_distributed(train, 2, two.run_dir, str(corpus), device, LAYOUTS[name], backend=backend)
    for step, (mine, theirs) in enumerate(zip(metrics_of(two), metrics_of(one), strict=True)):
        bound = 1e-6 if step == 0 else 1e-4
        for loss in ("loss", "loss_mtp", "loss_indexer", "loss_balance"):
            assert mine[loss] == pytest.approx(theirs[loss], abs=bound), (step, loss)
    saves = sorted((tmp_path / "two" / "checkpoints").iterdir())
    assert [save.name for save in saves] == [f"step_{n:08}" for n in range(1, STEPS + 1)]
    for save in saves:
        files = {path.name for path in save.glob("*.distcp")}
        assert {name.split("_")[2] for name in files} == {"0", "1"}, files  # __RANK_N.distcp
    assert final_tensors(two).keys() == final_tensors(one).keys()
    receipt = json.loads((tmp_path / "two" / "receipt.json").read_text())
    assert receipt["finished"]
